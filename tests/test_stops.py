"""Real processes that are asked to stop, by signals: they save and end soon, and the same command resumes.

Others whose output nobody reads any more go on without it.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import (
    STARTING,
    Job,
    Start,
    assert_same_run,
    command,
    environment,
    final_state,
    losses,
    noted,
    steps_of,
    wait_for_step,
    wait_until,
)
from tiny import ROOT

from cfd import main
from cfd.devices import preemption

slow = pytest.mark.slow


def interrupted(job: Job, number: int, which: int) -> float:
    """Seconds from the signal to exit code 75 of every process. Process 0 alone says what it did."""
    sent = time.monotonic()
    job.send(number, which)
    assert job.finish() == [75] * len(job.processes), job.report()
    said = ["; the same command " in job.text(i) for i in range(len(job.processes))]
    assert said == [i == 0 for i in range(len(said))], job.report()
    return time.monotonic() - sent


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "processes, which, number, every",
    [
        pytest.param(1, 0, signal.SIGTERM, 1000, id="one-SIGTERM", marks=slow),
        pytest.param(1, 0, signal.SIGINT, 1000, id="one-SIGINT", marks=slow),
        pytest.param(1, 0, signal.SIGUSR1, 1000, id="one-SIGUSR1", marks=slow),
        pytest.param(1, 0, signal.SIGHUP, 1000, id="one-SIGHUP", marks=slow),
        pytest.param(1, 0, signal.SIGTERM, 1, id="one-SIGTERM-in-a-save", marks=slow),
        pytest.param(2, 0, signal.SIGTERM, 1000, id="two-SIGTERM-to-0", marks=slow),
        pytest.param(2, 1, signal.SIGTERM, 1000, id="two-SIGTERM-to-1", marks=slow),
        pytest.param(2, 1, signal.SIGINT, 1000, id="two-SIGINT-to-1", marks=slow),
        pytest.param(2, 1, signal.SIGUSR1, 1000, id="two-SIGUSR1-to-1", marks=slow),
        pytest.param(2, 1, signal.SIGHUP, 1000, id="two-SIGHUP-to-1", marks=slow),
        pytest.param(2, 0, signal.SIGTERM, 1, id="two-SIGTERM-in-a-save", marks=slow),
    ],
)
def test_stopped_in_training(
    processes: int, which: int, number: int, every: int, start: Start, reference: Any, tmp_path: Path
) -> None:
    """A signal to any one process saves the step that all have reached; the resumed run is as if never stopped."""
    folder = tmp_path / "run"
    env = {"JOB_STEP_SECONDS": "0.05"}
    fields = dict(train__num_steps=200, train__checkpoint_every_steps=every)
    job = start(folder, processes=processes, env=env, **fields)
    wait_for_step(job, 7)
    seconds = interrupted(job, number, which)
    step = int(re.findall(r"Stopped at step (\d+) of 200", job.text())[0])
    print(f"stopped at step {step}, {seconds:.2f} s after the signal")
    assert steps_of(folder)[-1]["step"] == step == final_state(folder)[0]  # no step is lost
    job = start(folder, processes=processes, **fields)
    assert job.finish() == [0] * processes, job.report()
    assert f"at step {step} of 200" in job.text()
    assert len(steps_of(folder)) == 200
    assert_same_run(folder, reference(200, processes))


@pytest.mark.parametrize("mode", ["train", "train_classifier", "distill", "sample", "sweep", "likelihood"])
def test_a_mode_that_looks_for_a_request_to_stop_receives_it(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "MODE", SimpleNamespace(value=mode))
    with main.stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested()
    assert not preemption.requested()


@slow
@pytest.mark.timeout(600)
def test_a_second_interrupt_stops_at_once(start: Start, tmp_path: Path) -> None:
    """The first one waits for the end of a step that takes longer than the test may."""
    job = start(tmp_path / "run", env={"JOB_STEP_SECONDS": "600"}, train__num_steps=10)
    wait_until(lambda: noted(tmp_path / "run", "started"), job)
    job.send(signal.SIGINT)
    time.sleep(1)
    assert job.processes[0].poll() is None
    job.send(signal.SIGINT)
    assert job.finish() == [1]
    assert job.text().splitlines()[-1].startswith("error: interrupted at once, without saving: the same command")
    assert "Traceback" not in job.text()
    assert "KeyboardInterrupt" in (tmp_path / "run" / "errors.log").read_text()


@slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_in_sampling_and_in_the_sweep(processes: int, start: Start, reference: Any, tmp_path: Path) -> None:
    """No cell is measured twice."""
    folder = tmp_path / "run"
    fields = dict(processes=processes, eval__num_samples=64, sample__num_steps=4, sample__batch_size=2 * processes)
    job = start(folder, train__num_steps=3, **fields)
    assert job.finish() == [0] * processes, job.report()

    weights = tuple(range(60))  # more than can be measured before the signal
    env = {"JOB_STEP_SECONDS": "0.1"}
    job = start(folder, mode="sweep", env=env, **fields, eval__weights=weights)
    rows = folder / "sweep.csv"
    wait_until(lambda: rows.exists() and rows.read_text().count("\n") >= 3, job)
    print(f"sweep of {processes}: {interrupted(job, signal.SIGTERM, processes - 1):.2f} s")
    measured = rows.read_text().splitlines()
    assert 3 <= len(measured) < 61
    job = start(folder, mode="sweep", **fields, eval__weights=weights[: len(measured)])
    assert job.finish() == [0] * processes, job.report()
    assert rows.read_text().splitlines()[:-1] == measured

    before = len(noted(folder, "started"))
    job = start(folder, mode="sample", env={"JOB_STEP_SECONDS": "1"}, **fields, sample__seeds=tuple(range(100)))
    wait_until(lambda: len(noted(folder, "started")) > before, job)
    print(f"sampling of {processes}: {interrupted(job, signal.SIGTERM, 0):.2f} s")


def launched(
    folder: Path,
    cache: Path,
    env: dict[str, str],
    prefix: tuple[str, ...] = (),
    num_steps: int = 100_000,
    **keywords: Any,
) -> Any:
    """The job in one process whose output is not a file."""
    fields = dict(train__num_steps=num_steps, train__checkpoint_every_steps=1000)
    line = [*prefix, *command(folder, cache, "train", [], **fields)]
    return subprocess.Popen(line, cwd=ROOT, env=environment(1, **env), **keywords)


def wait_for_step_of(process: subprocess.Popen, folder: Path, step: int) -> None:
    wait_until(lambda: process.poll() is not None or any(done["step"] >= step for done in steps_of(folder)))
    assert process.poll() is None, process.returncode


@pytest.mark.timeout(600)
def test_a_run_whose_reader_goes_away_is_trained_to_the_end(cache: Path, tmp_path: Path) -> None:
    """As with `| head`, or when the program that collects logs dies. errors.log says so."""
    folder, closed = tmp_path / "run", tmp_path / "closed"
    pipe: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = launched(folder, cache, {"JOB_WAIT": f"10:{closed}"}, num_steps=60, **pipe)
    wait_for_step_of(process, folder, 3)
    process.stdout.close()
    closed.touch()
    assert process.wait(STARTING) == 0
    assert len(losses(folder)) == 60 and final_state(folder)[0] == 60
    assert (
        "stdout cannot be written any more (Broken pipe); the run goes on without it"
        in (folder / "errors.log").read_text()
    )


@slow
@pytest.mark.timeout(600)
def test_an_interrupt_with_tee_is_a_stop(cache: Path, tmp_path: Path) -> None:
    """The terminal gives SIGINT to both, and `tee` is gone before the run has saved."""
    folder = tmp_path / "run"
    pipe: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    job = launched(folder, cache, {"JOB_STEP_SECONDS": "0.1"}, process_group=0, **pipe)
    tee = subprocess.Popen(["tee", str(tmp_path / "log")], stdin=job.stdout, process_group=job.pid)
    job.stdout.close()
    wait_for_step_of(job, folder, 3)
    os.killpg(job.pid, signal.SIGINT)
    assert tee.wait(STARTING) == -signal.SIGINT and job.wait(STARTING) == 75
    assert final_state(folder)[0] == len(losses(folder)) >= 3


TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
IN_TERMINAL = (sys.executable, "-c", TAKE_TERMINAL)
"""A command that begins with this runs in the terminal of its standard input."""
SUPERVISE = (sys.executable, str(ROOT / "launch" / "supervise.py"), "--")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("prefix", [pytest.param((), id="alone", marks=slow), pytest.param(SUPERVISE, id="supervised")])
def test_a_closed_terminal_is_a_stop(prefix: tuple[str, ...], cache: Path, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and every write to the terminal fails. The supervisor waits until the run has saved."""
    folder = tmp_path / "run"
    master, slave = os.openpty()
    process = launched(
        folder,
        cache,
        {"JOB_STEP_SECONDS": "0.1"},
        (*IN_TERMINAL, *prefix),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    wait_for_step_of(process, folder, 3)
    os.close(master)
    assert process.wait(STARTING) == 75
    assert final_state(folder)[0] == len(losses(folder)) >= 3
    assert (folder / "lock").read_bytes() == b""  # no process is left that holds it


@pytest.mark.timeout(600)
def test_an_error_of_the_program_has_its_traceback(start: Start, tmp_path: Path) -> None:
    """On the screen, whatever the verbosity, and in errors.log, with the mode and the process."""
    folder = tmp_path / "run"
    job = start(folder, env={"JOB_HANG": "error:3"}, more=("--verbosity=-1",), train__num_steps=5)
    assert job.finish() == [1]
    entry = (folder / "errors.log").read_text()
    assert "--mode=train, process 0, pid" in entry
    for text in (job.text(), entry):
        assert "Traceback (most recent call last)" in text and "ValueError: image 7 is bad" in text
        assert re.search(r'job\.py", line \d+, in __next__', text) and "error: " not in text
