"""Stopping on request: at one of SIGNALS, a run saves at the next step and exits with code 75.

SIGTERM is a preemption, SIGINT is Ctrl-C, and SIGHUP is a closed terminal. SLURM sends its tasks SIGUSR1, because
`srun` kills them when it receives SIGTERM itself. Other batch systems send SIGUSR2 or SIGXCPU before a time limit.

A job that loses the lock of its run's folder to another job stops in the same way, but without saving.
"""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from cfd.devices import parallel, watchdog
from cfd.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run was stopped and has saved everything; the same command resumes it."""

_requested = threading.Event()
_calls = itertools.count(1)
_lost = ""
_verify: Callable[[], str] | None = None


class Stopped(Exception):
    """The run was asked to stop and did, in a sentence: where it stopped, and how the same command goes on."""

    def __init__(self, where: str, then: str = "the same command resumes"):
        super().__init__(f"{where}; {then}.")


class Lost(UserError):
    """Another job has taken over the lock of the run's folder. This run must not write there any more."""


@contextlib.contextmanager
def stopping_on_request() -> Iterator[None]:
    """Within the block, the first of SIGNALS asks the run to stop. A second SIGINT stops it at once.

    SIGHUP stays ignored if it was ignored, as it is under `nohup`. With several processes, `jax.distributed` handles
    SIGTERM, because it makes all processes agree on the step. A process that receives one of the other signals sends
    itself SIGTERM.
    """
    alone = jax.process_count() == 1
    before = {number: signal.getsignal(number) for number in SIGNALS if alone or number != signal.SIGTERM}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def request(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if alone:
            _requested.set()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    for number in before:
        signal.signal(number, request)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _requested.clear()


def requested() -> bool:
    """Whether the run must stop now. All processes must call this equally often, and all of them stop at the same call.

    Each call also tells the watchdog that the process is alive. Raises Lost, on every process, if the run must stop
    because it has lost its lock.
    """
    watchdog.alive()
    if jax.process_count() == 1:
        stop = _requested.is_set()
    else:
        # The processes agree on a step, and `jax.distributed` compares it by equality. Therefore the number of the call
        # serves as the step: it has no gap and no repetition.
        stop = multihost_utils.reached_preemption_sync_point(next(_calls))
    if stop:
        check_held()
    return stop


@contextlib.contextmanager
def holding(verify: Callable[[], str]) -> Iterator[None]:
    """Within the block, the run holds a lock that it can lose. Every process must enter it.

    `verify()` returns the reason why this process knows now that the lock is lost, or "".
    """
    global _verify, _lost
    _verify, _lost = verify, ""
    try:
        yield
    finally:
        if _lost:
            _requested.clear()
        _verify, _lost = None, ""


def lose(reason: str) -> None:
    """Asks the run to stop without saving, because it has lost its lock, if it holds one. Any thread may call this."""
    global _lost
    if _verify is None:
        return
    _lost = reason
    if jax.process_count() == 1:
        _requested.set()
    else:
        os.kill(os.getpid(), signal.SIGTERM)


def check_held() -> None:
    """Raises Lost, on every process, if any process has lost the lock. Every process must call this."""
    if _verify is None:
        return
    reason = _lost or _verify()
    if parallel.total(int(bool(reason))):
        raise Lost(reason or "process 0 has lost the lock of the run's folder, and says why")
