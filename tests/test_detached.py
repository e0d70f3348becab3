"""launch/detached.py: a command that outlives the connection that started it; small commands instead of training."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import ROOT

DETACHED = str(ROOT / "launch" / "detached.py")


def detached(action: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, DETACHED, action, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    detached("end", tmp_path / "run", "--grace-seconds=0")


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("ends, code", [("exit 0", 0), ("exit 75", 75), ("exit 3", 76), ("kill -9 $$", 76)])
def test_the_end_of_a_command_is_told_by_its_exit_code(folder: Path, ends: str, code: int) -> None:
    assert detached("start", folder, "--", "bash", "-c", f"echo out; echo error >&2; {ends}").returncode == 0
    done = detached("follow", folder)
    assert (done.returncode, done.stdout) == (code, "out\nerror\n")
    assert detached("state", folder, "--", "bash").stdout == "cfd: idle\n"


def test_a_command_whose_machine_is_restarted_is_lost_until_the_next_start(folder: Path) -> None:
    ready = shlex.quote(str(folder / "ready"))
    detached("start", folder, "--", "bash", "-c", f"trap '' TERM; touch {ready}; sleep 600")
    until((folder / "ready").exists)
    detached("end", folder, "--grace-seconds=0")
    until(lambda: detached("state", folder, "--", "true").stdout == "cfd: lost\n")  # it does not wait for its kill
    assert detached("follow", folder).returncode == 77
    detached("start", folder, "--", "true")
    assert detached("follow", folder).returncode == 0
    assert detached("state", folder, "--", "true").stdout == "cfd: idle\n"


def test_only_the_end_of_the_output_is_repeated(folder: Path) -> None:
    detached("start", folder, "--", "seq", "250")
    assert detached("follow", folder).returncode == 0
    assert detached("follow", folder).stdout.split() == [str(number) for number in range(151, 251)]


def test_a_command_that_runs_is_not_started_twice(folder: Path) -> None:
    command = ["bash", "-c", "touch ready.$$; sleep 600", "it's"]
    folder.mkdir()
    for _ in range(2):
        done = subprocess.run([sys.executable, DETACHED, "start", str(folder), "--", *command], cwd=folder)
        assert done.returncode == 0
        assert detached("state", folder, "--", *command).stdout == "cfd: running\n"
    other = detached("start", folder, "--", "true")
    assert other.returncode == 1
    assert detached("state", folder, "--", "true").stdout == f"cfd: other: {shlex.join(command)}\n"
    until(lambda: list(folder.glob("ready.*")))
    assert len(list(folder.glob("ready.*"))) == 1


def test_a_command_is_stopped_by_sigterm_and_ignores_a_closed_terminal(folder: Path) -> None:
    ready = folder.parent / "ready"
    program = f"trap 'echo saved; exit 75' TERM; touch {ready}; while :; do sleep 0.1; done"
    detached("start", folder, "--", "bash", "-c", program)
    until(ready.exists)
    until((folder / "pid").exists)
    os.kill(int((folder / "pid").read_text()), signal.SIGHUP)
    assert detached("state", folder, "--", "other").stdout.startswith("cfd: other")
    assert detached("stop", folder).returncode == 0
    done = detached("follow", folder)
    assert done.returncode == 75 and done.stdout.endswith("saved\n")


def test_a_command_that_is_lost_leaves_nothing_behind(folder: Path) -> None:
    """A child in a session of its own, as the supervisor's are, would keep the accelerators from the next start."""
    child = folder.parent / "child"
    detached("start", folder, "--", "bash", "-c", f"setsid bash -c 'echo $$ > {child}; sleep 600' & sleep 600")
    until(lambda: child.exists() and child.read_text().endswith("\n"))
    until((folder / "pid").exists)
    pid = int((folder / "pid").read_text())
    runner = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(runner, signal.SIGKILL)
    assert detached("end", folder, "--grace-seconds=0").returncode == 0
    assert detached("follow", folder).returncode == 77
    until(lambda: all(child.read_text().strip() != process.name for process in running()))


def running() -> list[Path]:
    """The processes that are not zombies."""
    alive = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                alive.append(process)
        except OSError:
            continue
    return alive


def test_a_command_that_does_not_exist_is_named(folder: Path) -> None:
    detached("start", folder, "--", "no-such-command")
    done = detached("follow", folder)
    assert done.returncode == 76
    assert done.stdout == "no-such-command cannot be started: No such file or directory\n"


def test_there_may_be_no_job(folder: Path) -> None:
    assert detached("stop", folder).returncode == 0 and detached("end", folder).returncode == 0
    done = detached("follow", folder)
    assert done.returncode == 77 and done.stdout == "There is no job.\n"
