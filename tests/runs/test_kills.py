"""Jobs that are killed while they save, and jobs that compete for one folder.

Real processes are killed. Nothing of Orbax is replaced.
"""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest
from checkpoints import abstract, litter, make_state, opened, same_bits, save, steps

from cfd.runs import access, checkpoint

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "cfd.runs.checkpoint"])


def count_to(folder: str, said: Any, steps: int, go_on: Any, rows: int) -> None:
    """A job that saves one step after the other and reports what it does. Its state is a function of the step.

    After the first save it waits for the event `go_on`, if it is given.
    """
    template = abstract(make_state(0, rows))
    with access.lock(folder), opened(Path(folder)) as manager:
        restored = checkpoint.restore(manager, template)
        said.put(("resumed", 0 if restored is None else restored[0], litter(Path(folder))))
        assert restored is None or same_bits(restored[1], make_state(restored[0], rows))
        start = 0 if restored is None else restored[0]
        for step in range(start + 1, start + 1 + steps):
            state = make_state(step, rows)
            said.put(("saving", step))
            save(manager, step, state)
            checkpoint.wait(manager)
            said.put(("saved", step))
            if go_on is not None:
                go_on.wait()
    said.put(("done",))


@contextmanager
def job(folder: Path, steps: int, go_on: Any = None, rows: int = 64) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """`count_to` in a process of its own, and a function that returns its next report."""
    said = CONTEXT.SimpleQueue()
    process = CONTEXT.Process(target=count_to, args=(str(folder), said, steps, go_on, rows))
    process.start()

    def listen() -> Any:
        end = time.monotonic() + 120
        while said.empty():
            if not process.is_alive() and said.empty():
                return ("ended", process.exitcode)
            assert time.monotonic() < end, "the job is stuck"
            time.sleep(0.002)
        return said.get()

    try:
        yield process, listen
    finally:
        process.kill()
        process.join()


def test_a_second_job_costs_the_first_no_save(tmp_path: Path) -> None:
    go_on = CONTEXT.Event()
    with job(tmp_path, steps=8, go_on=go_on) as (first, listen):
        assert listen() == ("resumed", 0, [])
        assert listen() == ("saving", 1)
        with job(tmp_path, steps=8) as (second, listen_to_second):
            assert listen_to_second() == ("ended", 1)
        go_on.set()
        heard = [("saving", 1), *(listen() for _ in range(16))]
        assert heard == [*((what, step) for step in range(1, 9) for what in ("saving", "saved")), ("done",)]
        first.join()
        assert first.exitcode == 0 and second.pid != first.pid
    assert steps(tmp_path) == [7, 8] and not litter(tmp_path)


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_while_it_saves(tmp_path: Path, kills: int) -> None:
    """SIGKILL within 0.4 s of the start of a save of 50 MB, `kills` times in the same folder.

    Every job resumes from a finished save, and the last one leaves no litter.
    """
    rng = random.Random(0)
    saved = 0
    for _ in range(kills):
        with job(tmp_path, steps=1000, rows=14_000) as (process, listen):
            heard = listen()
            assert heard[0] == "resumed" and heard[1] >= saved and not heard[2], (heard, saved)
            for _ in range(rng.randrange(1, 3)):
                while (heard := listen())[0] != "saving":
                    saved = heard[1]
            time.sleep(rng.uniform(0.0, 0.4))
            process.kill()
            process.join()
            while (heard := listen())[0] != "ended":
                saved = heard[1] if heard[0] == "saved" else saved
            assert heard == ("ended", -signal.SIGKILL)
    with job(tmp_path, steps=0, rows=14_000) as (process, listen):
        assert listen()[1] >= saved and listen() == ("done",)
        process.join()
        assert process.exitcode == 0
    assert not litter(tmp_path) and len(steps(tmp_path)) <= 2
    size = sum(x.nbytes for x in jax.tree.leaves(make_state(0, 14_000)))
    used = sum(p.stat().st_size for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    assert used <= 3 * size
    assert not (tmp_path / "checkpoints" / "quarantine").exists()


def save_and_die(folder: str, said: Any, deadly: int) -> None:
    """Saves step 3 in a folder with steps 1 and 2; killed just before its `deadly`-th change of the file system."""
    manager = checkpoint.open_manager(folder, keep=2)
    lock, changes = threading.Lock(), [0]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, args: tuple[Any, ...]) -> None:
        opened_to_write = event == "open" and isinstance(args[2], int) and args[2] & writing
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or opened_to_write:
            if folder not in str(args[0]) and event not in ("os.remove", "os.rmdir"):
                return
            with lock:
                changes[0] += 1
                if changes[0] == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(manager, 3, make_state(3))
    checkpoint.close(manager)
    said.put(changes[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_every_change_of_the_file_system(two_steps: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One save that also deletes the oldest step.

    The audit hook does not see the calls of TensorStore, which change only the unfinished step: the test above kills
    during those.
    """
    template = abstract(make_state(0))
    newest = []
    for deadly in itertools.count(1):
        folder = tmp_path_factory.mktemp("run")
        shutil.copytree(two_steps, folder, dirs_exist_ok=True)
        said = CONTEXT.SimpleQueue()
        process = CONTEXT.Process(target=save_and_die, args=(str(folder), said, deadly))
        process.start()
        process.join()
        with opened(folder) as manager:
            assert not litter(folder)
            listed = steps(folder)
            assert listed in ([1, 2], [1, 2, 3], [2, 3]), (deadly, listed)
            newest.append(listed[-1])
            for step in reversed(listed):
                restored = checkpoint.restore(manager, template)
                assert restored is not None and restored[0] == step and same_bits(restored[1], make_state(step)), deadly
                shutil.rmtree(folder / "checkpoints" / str(step))
                manager.orbax.reload()
        if process.exitcode == 0:
            assert said.get() == deadly - 1
            break
        assert process.exitcode == -signal.SIGKILL
        shutil.rmtree(folder)
    assert len(newest) > 10 and newest == sorted(newest) and newest[-1] == 3
    print(f"killed at {len(newest) - 1} points")
