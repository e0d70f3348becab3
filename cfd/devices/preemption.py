"""Stopping on request: at SIGTERM (a preemption), SIGINT or SIGUSR1, a run saves at the next step and exits with 0.

SIGUSR1 is for SLURM: `srun` forwards it to its tasks, but kills its tasks when it receives SIGTERM itself.
"""

import itertools
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from cfd.devices import watchdog

_requested = threading.Event()
_calls = itertools.count(1)


class Stopped(Exception):
    """The run was asked to stop, saved everything and stopped. The same command resumes it."""


def install() -> None:
    """From now on, the first of these signals asks the run to stop. A second SIGINT stops it at once.

    With several processes, `jax.distributed` handles SIGTERM, because it makes all processes agree on the step. A
    process that receives one of the other signals sends itself SIGTERM.
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
    """Whether the run must stop now. All processes must call this equally often, and all of them stop at the same call.

    Each call also tells the watchdog that the process is alive.
    """
    watchdog.alive()
    if jax.process_count() == 1:
        return _requested.is_set()
    # The processes agree on a step, and `jax.distributed` compares it by equality. Therefore the number of the call
    # serves as the step: it has no gap and no repetition.
    return multihost_utils.reached_preemption_sync_point(next(_calls))
