"""Output that cannot end a run: a print to a pipe without a reader, to a closed terminal or to a full disk."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN)
"""Errors of a stream that will never be read again. After any other error, such as a full disk, it may recover."""


@contextlib.contextmanager
def lasting(report: Callable[[str], object]) -> Iterator[None]:
    """Within the block, no write to standard output or standard error fails.

    If the reader of a stream is gone, everything goes to /dev/null from then on, also what native code writes. After
    another error, the text is lost and the next one is tried. `report` gets one line per stream about the first error.
    Characters that the encoding of a stream lacks are written as escapes, and every line is flushed.
    """
    with contextlib.ExitStack() as at_end:
        for name in ("stdout", "stderr"):
            at_end.enter_context(_lasting(name, report))
        yield


@contextlib.contextmanager
def _lasting(name: str, report: Callable[[str], object]) -> Iterator[None]:
    stream: Any = getattr(sys, name)
    if stream is None:  # the process was started with this descriptor closed
        with open(os.devnull, "w") as nowhere:
            setattr(sys, name, nowhere)
            try:
                yield
            finally:
                setattr(sys, name, None)
        return
    reported = False

    def guarded(method: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            nonlocal reported
            try:
                return method(*arguments)
            except OSError as error:
                if error.errno in GONE:
                    _redirect(stream)
                if not reported:
                    reported = True
                    report(f"{name} cannot be written any more ({error.strerror}); the run goes on without it")
                return len(arguments[0]) if arguments else None

        return call

    # Replacing two methods, not the stream, keeps its identity: absl's logging handler compares streams.
    methods = {"write": stream.write, "flush": stream.flush}
    for method in methods:
        setattr(stream, method, guarded(methods[method]))
    before = {}
    if hasattr(stream, "reconfigure"):
        before = {"errors": stream.errors, "line_buffering": stream.line_buffering}
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        yield
    finally:
        for method in methods:
            delattr(stream, method)
        try:
            stream.reconfigure(**before) if before else stream.flush()
        except OSError:
            _redirect(stream)  # otherwise the interpreter fails at exit, with code 120


def _redirect(stream: Any) -> None:
    """Sends everything that is written to the stream's descriptor to /dev/null."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:  # the stream of a notebook has no descriptor
        os.dup2(nowhere.fileno(), stream.fileno())
