"""The end of a process that hangs: Python's own timer prints the stack of every thread and exits with code 1.

It needs no turn of the interpreter, so that a main thread stuck in a collective is ended as well.
"""

import faulthandler

SLOW_SECONDS = 1800
"""What may be taken on top by the start, a first step or batch, which compiles, and by the metrics of a sweep."""

_seconds = 0


def install(seconds: int) -> None:
    """From now on the process ends unless `alive` is called at least every `seconds`; 0 is never."""
    global _seconds
    _seconds = seconds
    alive(slow=True)


def alive(*, slow: bool = False) -> None:
    """The process goes on; what it does next may be slow."""
    if _seconds:
        faulthandler.dump_traceback_later(_seconds + SLOW_SECONDS * slow, exit=True)


def off() -> None:
    """The process may take its time."""
    global _seconds
    _seconds = 0
    faulthandler.cancel_dump_traceback_later()
