"""Stopping on request: SIGTERM (a preemption), SIGINT or SIGUSR1 ends a run at the next step, saved, with exit code 0.

SIGUSR1 is SLURM's: `srun` passes it on to its tasks, which it kills when it gets a SIGTERM itself.
"""

import itertools
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from cfd import watchdog

_requested = threading.Event()
_calls = itertools.count(1)


class Stopped(Exception):
    """The run was asked to stop and did, with everything saved; the same command resumes it."""


def install() -> None:
    """From now on the first of these signals asks the run to stop; a second SIGINT stops it at once.

    With several processes SIGTERM is left to jax.distributed, which makes all of them agree on the step; the others, to
    one of them, are passed on as SIGTERM.
    """
    _requested.clear()

    def request(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() == 1:
            _requested.set()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, request)
    signal.signal(signal.SIGUSR1, request)
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, request)


def requested() -> bool:
    """Whether the run must stop now. Every process must ask equally often: all of them stop at the same call.

    A loop that asks goes on: the watchdog hears of it.
    """
    watchdog.alive()
    if jax.process_count() == 1:
        return _requested.is_set()
    # jax.distributed agrees on a number and compares by equality: count the calls, with no gap and no repetition.
    return multihost_utils.reached_preemption_sync_point(next(_calls))
