"""Ends a process that hangs: a timer of `faulthandler` prints the stack of every thread and exits with code 1.

The timer does not need the interpreter lock. Therefore it also ends a process whose main thread is stuck in a
collective.
"""

import faulthandler

SLOW_SECONDS = 1800
"""Extra time allowed for slow phases: startup, the first step or batch (which compiles), and the metrics of a sweep."""

_seconds = 0


def install(seconds: int) -> None:
    """From now on, the process ends unless `alive` is called at least every `seconds`. 0 turns the watchdog off."""
    global _seconds
    _seconds = seconds
    alive(slow=True)


def alive(*, slow: bool = False) -> None:
    """Restarts the timer. `slow` allows SLOW_SECONDS more until the next call."""
    if _seconds:
        faulthandler.dump_traceback_later(_seconds + SLOW_SECONDS * slow, exit=True)


def off() -> None:
    """Turns the watchdog off."""
    global _seconds
    _seconds = 0
    faulthandler.cancel_dump_traceback_later()
