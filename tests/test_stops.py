"""Real processes that are asked to stop, by signals: they save and end soon, and the same command resumes."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import (
    Job,
    Start,
    assert_same_run,
    final_state,
    noted,
    references,
    starting,
    steps_of,
    wait_for_step,
    wait_until,
)

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of compiled programs, which all tests share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[[int, int], Path]:
    return references(tmp_path_factory, cache)


@pytest.fixture
def start(cache: Path) -> Iterator[Start]:
    with starting(cache) as start:
        yield start


def interrupted(job: Job, number: int, which: int) -> float:
    """Seconds from the signal to exit code 0 of every process."""
    sent = time.monotonic()
    job.send(number, which)
    assert job.finish(30) == [0] * len(job.processes), job.report()
    assert all("; the same command resumes." in job.text(i) for i in range(len(job.processes))), job.report()
    return time.monotonic() - sent


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "processes, which, number, every",
    [
        pytest.param(1, 0, signal.SIGTERM, 1000, id="one-SIGTERM", marks=slow),
        pytest.param(1, 0, signal.SIGINT, 1000, id="one-SIGINT", marks=slow),
        pytest.param(1, 0, signal.SIGUSR1, 1000, id="one-SIGUSR1", marks=slow),
        pytest.param(1, 0, signal.SIGTERM, 1, id="one-SIGTERM-in-a-save", marks=slow),
        pytest.param(2, 0, signal.SIGTERM, 1000, id="two-SIGTERM-to-0", marks=slow),
        pytest.param(2, 1, signal.SIGTERM, 1000, id="two-SIGTERM-to-1", marks=slow),
        pytest.param(2, 1, signal.SIGINT, 1000, id="two-SIGINT-to-1", marks=slow),
        pytest.param(2, 1, signal.SIGUSR1, 1000, id="two-SIGUSR1-to-1", marks=slow),
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


@slow
@pytest.mark.timeout(120)
def test_a_second_interrupt_stops_at_once(start: Start, tmp_path: Path) -> None:
    job = start(tmp_path / "run", env={"JOB_STEP_SECONDS": "20"}, train__num_steps=10)
    wait_until(lambda: (tmp_path / "run" / "tensorboard").exists(), job)
    time.sleep(5)  # until it is in its first step
    job.send(signal.SIGINT)
    time.sleep(1)
    assert job.processes[0].poll() is None
    sent = time.monotonic()
    job.send(signal.SIGINT)
    assert job.finish(10)[0] != 0
    assert "KeyboardInterrupt" in job.text() and time.monotonic() - sent < 10


@slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_in_sampling_and_in_the_sweep(processes: int, start: Start, reference: Any, tmp_path: Path) -> None:
    """The processes end with code 0, and no cell is measured twice."""
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
