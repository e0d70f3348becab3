"""Whether a job may write to a folder: its path, its permissions, and the lock that one job holds at a time."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from disk import filled, small_disk
from permissions import obeyed

from cfd.runs import access


def hold_lock(folder: str, ready: Any) -> None:
    with access.lock(folder):
        ready.set()
        time.sleep(60)


def test_second_job_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    first = context.Process(target=hold_lock, args=(str(tmp_path), ready))
    first.start()
    assert ready.wait(60)
    host = os.uname().nodename
    with (
        pytest.raises(ValueError, match=f"locked by pid {first.pid} on {host} since 20.*--workdir"),
        access.lock(tmp_path),
    ):
        pass
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with access.lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        with pytest.raises(ValueError, match=f"locked by pid {os.getpid()}"), access.lock(tmp_path):
            pass
        with access.lock(tmp_path / "other"):  # the remedy
            pass
    with access.lock(tmp_path):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(ValueError, match=r"lock cannot be locked \(.*\): mount its file system with flock"),
        access.lock(tmp_path),
    ):
        pass


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), access.lock(tmp_path):
        raise KeyError
    with access.lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    """The folder belongs to another user, lies below a file, or lies below a folder in which nothing can be made."""
    closed, file = tmp_path / "closed", tmp_path / "file"
    closed.mkdir()
    closed.chmod(0o555)
    file.touch()
    with obeyed():
        for folder, reason in (
            (closed, "Permission denied"),
            (closed / "new", "Permission denied"),
            (file, "(File exists|Not a directory)"),
            (file / "new", "Not a directory"),
        ):
            message = rf"{folder} cannot be written \({reason}\): give --out=DIR"
            with pytest.raises(ValueError, match=message), access.lock(folder, "give --out=DIR"):
                pass
            with pytest.raises(ValueError, match=message):
                access.check_writable(folder, "give --out=DIR")
        access.check_writable(tmp_path / "a" / "b", "")  # the remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "file"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as mounted:
        if not mounted:
            pytest.skip("mounting a file system needs root")
        with (
            filled(tmp_path / "disk"),
            pytest.raises(ValueError, match=r"cannot be written \(No space left on device\): free space, or"),
            access.lock(tmp_path / "disk"),
        ):
            pass
        with access.lock(tmp_path / "disk"):  # the remedy
            pass


def test_urls_and_empty_paths_are_refused_by_the_name_of_their_flag() -> None:
    for url in ("gs://bucket/run", "s3://bucket/run", "https://host/run"):
        with pytest.raises(ValueError, match=f"--out is '{url}', a URL; .* mount one"):
            access.local_path("--out", url)
    with pytest.raises(ValueError, match="--runs is empty: name a folder"):
        access.local_path("--runs", "")
    assert access.local_path("--workdir", "~/run") == os.path.expanduser("~/run")
    with pytest.raises(ValueError, match="the run's folder is 'gs://bucket/run', a URL"):
        access.check_run_path("gs://bucket/run")


def saved_and_read_back(folder: Path) -> bool:
    """Whether Orbax, with its own defaults, reads back what it saved."""
    state = {"x": jnp.arange(3.0)}
    with ocp.CheckpointManager(folder) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        try:
            read = manager.restore(1, args=ocp.args.StandardRestore(state))
        except ValueError:
            return False
    return bool(jnp.all(read["x"] == state["x"]))


@pytest.mark.parametrize("name", ["a\\b", "[a]", "a b", "a%20b", "a:b", "ü λ", "a\nb", "a'b\"", "{a}", "~a", "a#b"])
def test_paths_are_refused_with_which_checkpoints_cannot_be_read(tmp_path: Path, name: str) -> None:
    refused = False
    try:
        access.check_run_path(tmp_path / name / "run")
    except ValueError as error:
        refused = True
        assert re.search(r"has .* in its name, with which its checkpoints cannot be read back", str(error))
    assert refused == (not saved_and_read_back(tmp_path / name / "run" / "checkpoints"))
