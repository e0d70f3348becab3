"""Starts tests/job.py in real processes, waits for its steps, and compares what two runs leave behind."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from job import init as network
from ports import free_port
from tiny import ROOT, flags_of, tiny_config

from cfd.modes.settings import optimizer_of
from cfd.modes.train_step import initial_state
from cfd.runs import checkpoint, files

HEARTBEAT = 10
"""Heartbeat timeout of jax.distributed, in seconds."""
STARTING = 120.0
"""Seconds that a process may take to start on a busy machine."""


class Job(NamedTuple):
    """The processes of one start."""

    folder: Path
    processes: list[subprocess.Popen]
    outputs: list[Path]

    def send(self, number: int, *which: int) -> None:
        for i in which or range(len(self.processes)):
            os.kill(self.processes[i].pid, number)

    def finish(self, seconds: float = STARTING) -> list[int]:
        """The exit codes. The test fails if a process runs for longer than `seconds`."""
        deadline = time.monotonic() + seconds
        return [p.wait(max(deadline - time.monotonic(), 0.01)) for p in self.processes]

    def text(self, which: int = 0) -> str:
        return self.outputs[which].read_text(errors="replace")

    def report(self) -> str:
        """The outputs of all processes, for the message of a failed assertion."""
        return "\n".join(f"--- process {i}\n{self.text(i)}" for i in range(len(self.outputs)))


Start = Callable[..., Job]


@contextmanager
def starting(cache: Path) -> Iterator[Start]:
    """`launch` with the compilation cache `cache`. At the end, it kills all processes that it started."""
    jobs: list[Job] = []

    def one(folder: Path, **keywords: Any) -> Job:
        jobs.append(launch(folder, cache, **keywords))
        return jobs[-1]

    yield one
    for process in (p for job in jobs for p in job.processes):
        process.kill()
        process.wait()


def references(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[[int, int], Path]:
    """(steps, devices) -> the folder of a run in one process that was never stopped.

    The process is given a coordinator. It then adds over its devices by Gloo, in the same order as several processes.
    JAX itself adds over the devices of one process in another order, which changes the last bit with more than two.
    """
    made: dict[tuple[int, int], Path] = {}

    def make(steps: int, devices: int) -> Path:
        if (steps, devices) not in made:
            folder = tmp_path_factory.mktemp("reference") / "run"
            job = launch(folder, cache, devices=devices, of=1, train__num_steps=steps)
            assert job.finish() == [0], job.report()
            made[steps, devices] = folder
        return made[steps, devices]

    return make


def command(folder: Path | str, cache: Path, mode: str, more: list[str], **changes: Any) -> list[str]:
    fields = dict(eval__weights=(), train__checkpoint_every_steps=10, xla__compilation_cache=str(cache)) | changes
    flags = [f"--mode={mode}", "--config=configs/digits.py", f"--workdir={folder}", *more, *flags_of(**fields)]
    return [sys.executable, str(ROOT / "tests" / "job.py"), *flags]


def environment(devices: int, **more: str) -> dict[str, str]:
    base = {k: v for k, v in os.environ.items() if not k.startswith(("CFD_", "JOB_", "XLA_FLAGS"))}
    ours = dict(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(devices), PYTHONPATH=str(ROOT))
    return base | ours | {"CFD_HEARTBEAT_TIMEOUT": str(HEARTBEAT), "CFD_SHUTDOWN_TIMEOUT": str(HEARTBEAT)} | more


def launch(
    folder: Path,
    cache: Path,
    *,
    mode: str = "train",
    processes: int = 1,
    devices: int = 1,
    of: int | None = None,
    env: dict[str, str] | None = None,
    more: tuple[str, ...] = (),
    workdir: str = "",
    prefix: tuple[str, ...] = (),
    **changes: Any,
) -> Job:
    """Start `processes` processes with `devices` devices each. With `of`, they are the first of that many processes.

    The run is in `folder`, or in the bucket's folder `workdir`, and then steps.jsonl alone is in `folder`. The command
    begins with `prefix`.
    """
    (folder if workdir else folder.parent).mkdir(parents=True, exist_ok=True)
    env = (env or {}) | ({"JOB_NOTES": str(folder)} if workdir else {})
    address, count, number = f"127.0.0.1:{free_port()}", of or processes, len(list(folder.parent.glob("*.log")))
    job = Job(folder, [], [])
    for i in range(processes):
        distributed = dict(CFD_COORDINATOR=address, CFD_NUM_PROCESSES=str(count), CFD_PROCESS_ID=str(i))
        variables = environment(devices, **(distributed if of or count > 1 else {}) | env)
        job.outputs.append(folder.parent / f"{number}.{i}.log")
        with open(job.outputs[-1], "w") as log:
            arguments = [*prefix, *command(workdir or folder, cache, mode, list(more), **changes)]
            job.processes.append(subprocess.Popen(arguments, cwd=ROOT, env=variables, stdout=log, stderr=log))
    return job


def noted(folder: Path, what: str) -> list[dict[str, Any]]:
    """The lines of steps.jsonl about steps ("step"), saves ("saved") or starts of loops ("started")."""
    path = folder / "steps.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    values = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [value for value in values if what in value]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The steps that were done; a step that was repeated is there twice."""
    return noted(folder, "step")


def wait_until(happened: Callable[[], Any], job: Job | None = None, seconds: float = STARTING) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert job is None or all(p.poll() is None for p in job.processes), job.report()
        assert time.monotonic() < deadline, job.report() if job else "timed out"
        time.sleep(0.005)


def wait_for_step(job: Job, step: int) -> None:
    wait_until(lambda: any(done["step"] >= step for done in steps_of(job.folder)), job)


def final_state(folder: Path | str) -> tuple[int, str]:
    """(step, SHA-256 of all arrays) of the newest checkpoint, which must have the correct digests."""
    manager = checkpoint.open_manager(folder, keep=100)
    optimizer = optimizer_of(tiny_config().train)
    abstract = jax.eval_shape(partial(initial_state, network, optimizer), jax.random.key(0))
    place = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract)
    newest = checkpoint.latest_step(manager)
    restored = checkpoint.restore(manager, abstract)
    checkpoint.close(manager)
    assert restored is not None and restored[0] == newest
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_flatten_with_path(restored[1])[0]:
        digest.update(f"{path} {x.dtype} {x.shape}".encode() + np.asarray(x).tobytes())
    return restored[0], digest.hexdigest()


def losses(folder: Path | str) -> list[float]:
    lines = [json.loads(line) for line in (files.read_bytes(files.place(folder, "metrics.jsonl")) or b"").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))  # no step is missing or present twice
    return [line["loss"] for line in lines]


def assert_same_run(folder: Path, other: Path, workdir: str = "") -> None:
    """Asserts the same final state, and the same loss at every step, also at those that were repeated.

    The first run is in `folder`, or in the bucket's folder `workdir` with its steps.jsonl in `folder`.
    """
    assert final_state(workdir or folder) == final_state(other)
    expected = losses(other)
    assert losses(workdir or folder) == expected
    assert all(done["loss"] == expected[done["step"] - 1] for done in steps_of(folder))
