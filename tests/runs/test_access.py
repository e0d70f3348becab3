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
from gcs import FakeGcs
from permissions import obeyed

from cfd.runs import access


def hold_lock(folder: str, ready: Any) -> None:
    with access.lock(folder):
        ready.set()
        time.sleep(600)


def test_second_job_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    first = context.Process(target=hold_lock, args=(str(tmp_path), ready))
    first.start()
    assert ready.wait(100)
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
    """It belongs to another user, or it or one above it is a file, a broken link or closed for new folders."""
    closed, file, link = tmp_path / "closed", tmp_path / "file", tmp_path / "link"
    closed.mkdir()
    (closed / "lock").touch()
    (closed / "lock").chmod(0o444)
    closed.chmod(0o555)
    link.symlink_to("gone")
    file.touch()
    with obeyed():
        for folder, reason in (
            (closed, "Permission denied"),
            (closed / "new", "Permission denied"),
            (file, f"{file} is a file"),
            (file / "new", f"{file} is a file"),
            (link, f"{link} is a link to gone, which is not there"),
            (link / "new", f"{link} is a link to gone, which is not there"),
        ):
            message = rf"{folder} cannot be written \({reason}\): give --out=DIR"
            with pytest.raises(ValueError, match=message), access.lock(folder, "give --out=DIR"):
                pass
            with pytest.raises(ValueError, match=message):
                access.check_writable(folder, "give --out=DIR")
        access.check_writable(tmp_path / "a" / "b", "")  # the remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "file", "link"]


def test_names_and_paths_that_are_too_long_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    """The file system says which: a file in the folder must fit too."""
    longest = os.pathconf(tmp_path, "PC_PATH_MAX") - len(str(tmp_path))
    deep = Path(*["y" * 99] * (longest // 100))
    for name in ("n" * 256, Path("a", "n" * 256, "run"), Path("new", "ü" * 128), deep):
        for refused in (lambda f: access.check_writable(f, "give --out=DIR"), lambda f: enter(f, "give --out=DIR")):
            with pytest.raises(ValueError, match=r"cannot be written \(File name too long\): give --out=DIR"):
                refused(tmp_path / name)
    assert not list(tmp_path.iterdir())
    for name in ("n" * 255, Path("new", "ü" * 127), Path(*deep.parts[:-3])):
        access.check_writable(tmp_path / name, "")
        enter(tmp_path / name, "")
    assert not list(tmp_path.iterdir())


def enter(folder: Path, elsewhere: str) -> None:
    with access.lock(folder, elsewhere):
        assert folder.is_dir()


def test_folders_that_a_job_made_and_left_empty_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(KeyError), access.lock("runs/a/b"):
        raise KeyError
    assert not list(Path("runs").iterdir())
    with access.lock("runs/a/b"):
        Path("runs/a/other").touch()
    assert [path.name for path in Path("runs/a").iterdir()] == ["other"]
    with access.lock("runs/a/b"):
        Path("runs/a/b/config.json").touch()
    assert sorted(os.listdir("runs/a/b")) == ["config.json", "lock"]


def test_a_lock_that_its_holder_removes_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a third job would lock another file of the same name."""
    folder, flock, calls = tmp_path / "run", fcntl.flock, []

    def late(file: Any, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            (folder / "lock").unlink()
            folder.rmdir()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with access.lock(folder):
        assert len(calls) == 2 and json.loads((folder / "lock").read_text())["pid"] == os.getpid()
        with pytest.raises(ValueError, match="locked by pid"), access.lock(folder):
            pass


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


def test_paths_that_name_no_folder_are_refused_by_the_name_of_their_flag(tmp_path: Path) -> None:
    for url in ("s3://bucket/run", "https://host/run", "file:///tmp/run", "GS://bucket/run", "gs:/bucket/run", "gs://"):
        with pytest.raises(ValueError, match=f"--out is '{url}'.*: (give|correct it)"):
            access.run_path("--out", url)
        with pytest.raises(ValueError, match=f"the run's folder is '{url}'"):
            access.check_run_path(url)
    with pytest.raises(ValueError, match="--runs is empty: name a folder"):
        access.run_path("--runs", "")
    assert access.run_path("--workdir", "~/run") == os.path.expanduser("~/run")


def test_folders_in_a_bucket_have_one_name(bucket: FakeGcs) -> None:
    for end in ("", "/", "/run", "/run/", "/a b/ü:1"):
        assert access.run_path("--workdir", bucket.url + end) == (bucket.url + end).rstrip("/")
    with pytest.raises(ValueError, match="--init_from is 'gs://nobodys/run', and there is no bucket gs://nobodys"):
        access.run_path("--init_from", "gs://nobodys/run")
    access.check_writable(f"{bucket.url}/run", "give --out=DIR")
    assert bucket.names() == []
    bucket.fail = lambda request: 403 if request.method == "POST" else None
    with pytest.raises(ValueError, match=r"no permission to write objects there.*; or give --out=DIR"):
        access.check_writable(f"{bucket.url}/run", "give --out=DIR")


@pytest.mark.parametrize("kind", ["fuse.gcsfuse", "fuse"])
def test_gcsfuse_is_refused_with_the_bucket_that_it_mounts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no locks. The mount nearest to the folder counts; a blank in its path is written as \\040.

    On GKE, the type of the mount is "fuse".
    """
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    (tmp_path / "a b" / "disk").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a b")
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/sda1 / ext4 rw 0 0\nmy-bucket {tmp_path}/a\\040b {kind} rw 0 0\n"
        f"/dev/sdb1 {tmp_path}/a\\040b/disk ext4 rw 0 0\n"
    )
    monkeypatch.setattr(access, "MOUNTS", str(mounts))
    for folder in (tmp_path / "a b" / "deep" / "run", tmp_path / "link" / "run"):
        refused = r"on gcsfuse \(bucket my-bucket\).*as gs://my-bucket/FOLDER, or give another --workdir"
        with pytest.raises(ValueError, match=refused), access.lock(folder):
            pass
        assert not folder.parent.joinpath("run").exists()
    for folder in (tmp_path / "a b" / "disk" / "run", tmp_path / "run"):  # the second remedy
        with access.lock(folder):
            pass
    monkeypatch.setattr(access, "MOUNTS", str(tmp_path / "other systems have none"))
    with access.lock(tmp_path / "a b" / "run"):
        pass


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
