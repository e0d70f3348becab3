"""Stopping on request: at one of SIGNALS, a run saves at the next step and exits with code 75.

SIGTERM is a preemption, SIGINT is Ctrl-C, and SIGHUP is a closed terminal. SLURM sends its tasks SIGUSR1, because
`srun` kills them when it receives SIGTERM itself. Other batch systems send SIGUSR2 or SIGXCPU before a time limit.
"""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from cfd.devices import watchdog

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run was stopped and has saved everything; the same command resumes it."""

_requested = threading.Event()
_calls = itertools.count(1)


class Stopped(Exception):
    """The run was asked to stop, saved everything and stopped. The same command resumes it."""


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

    Each call also tells the watchdog that the process is alive.
    """
    watchdog.alive()
    if jax.process_count() == 1:
        return _requested.is_set()
    # The processes agree on a step, and `jax.distributed` compares it by equality. Therefore the number of the call
    # serves as the step: it has no gap and no repetition.
    return multihost_utils.reached_preemption_sync_point(next(_calls))
