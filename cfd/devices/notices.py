"""Warnings: those of the package as lines of the command's output, and those that absl logs switched off in a block.

Tracebacks that other packages log, for example of a checkpoint that a full disk refuses, go to a file.
"""

import contextlib
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from logging import ERROR, WARNING, LogRecord
from pathlib import Path
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

from cfd.errors import reason_of, root_reason

PACKAGE = str(Path(__file__).parents[1])


@contextlib.contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Within the block, a warning of this package is one line on standard error, which process 0 prints.

    A message that the package logs by absl is such a line too, of every process, because it may be about this process
    alone. Warnings and messages of other packages keep their form, which names the place in the code.
    """
    default, logger = warnings.showwarning, logging.get_absl_logger()

    def show(message: Any, category: Any, filename: str, *rest: Any, **named: Any) -> None:
        if not issubclass(category, UserWarning) or not filename.startswith(PACKAGE):
            default(message, category, filename, *rest, **named)
        elif jax.process_index() == 0:
            tqdm.write(f"warning: {message}", file=sys.stderr)  # above a progress bar, not into it

    def show_own(record: LogRecord) -> bool:
        if not record.pathname.startswith(PACKAGE):
            return True
        word = "error" if record.levelno >= ERROR else "warning" if record.levelno >= WARNING else "note"
        tqdm.write(f"{word}: {record.getMessage()}", file=sys.stderr)
        return False

    logger.addFilter(show_own)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeFilter(show_own)


@contextlib.contextmanager
def tracebacks_in_a_file(append: Callable[[str], object]) -> Iterator[None]:
    """Within the block, a message with a traceback is one line on standard error, and all of it goes to a file.

    It may be a message of any package, or one of Python about an exception that no program can catch. `append` adds a
    text to the file, and returns the file. If it returns None, there is no file, and the message keeps its form. If it
    raises OSError, for example because a disk is full, the text is added with the next one. At the end of the block,
    texts that are in no file are printed. The same reason has one line, however many messages give it. A message of
    this package has the line that `warnings_in_lines` makes of it, which must be entered later.
    """
    handler, unraisable, lock = logging.get_absl_handler(), sys.unraisablehook, threading.Lock()
    waiting: list[str] = []
    said: set[str] = set()

    def kept(text: str, line: str) -> bool:
        """Whether the text is in the file, or waits for space. If not, it has to be printed."""
        with lock:
            try:
                file = append("\n\n".join([*waiting, text.rstrip()]))
            except OSError as error:
                waiting.append(text.rstrip())
                where = f"the traceback follows later, as it cannot be written now ({error.strerror})"
            else:
                if file is None:
                    return False
                waiting.clear()
                where = f"the traceback is in {file}"
            if line and line not in said:
                said.add(line)
                tqdm.write(f"error: {line}; {where}", file=sys.stderr)
        return True

    def keep_own(record: LogRecord) -> bool:
        if record.exc_info and record.pathname.startswith(PACKAGE):
            kept(handler.format(record), "")
        return True

    def show_other(record: LogRecord) -> bool:
        error = record.exc_info and record.exc_info[1]
        return not (error and kept(handler.format(record), f"{_package(record)}: {root_reason(error)}"))

    def show_unraisable(args: Any) -> None:
        where = (args.err_msg or "Exception ignored in") + ("" if args.object is None else f": {args.object!r}")
        text = "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
        if not kept(f"{where}\n{text}", f"{where}: {reason_of(args.exc_value or args.exc_type.__name__)}"):
            unraisable(args)

    handler.addFilter(show_other)
    logging.get_absl_logger().addFilter(keep_own)
    sys.unraisablehook = show_unraisable
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        logging.get_absl_logger().removeFilter(keep_own)
        handler.removeFilter(show_other)
        with contextlib.suppress(OSError):
            if waiting and append("\n\n".join(waiting)) is not None:
                waiting.clear()
        for text in waiting:
            print(text, file=sys.stderr)


def _package(record: LogRecord) -> str:
    """The name of the package that logs a message."""
    _, mark, place = record.pathname.replace("\\", "/").rpartition("/site-packages/")
    return place.partition("/")[0] if mark else record.name


@contextlib.contextmanager
def absl_errors_only() -> Iterator[None]:
    """Within the block, absl logs errors, and no warnings. Its verbosity stays."""
    logger = logging.get_absl_logger()

    def is_error(record: LogRecord) -> bool:
        return record.levelno >= ERROR

    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)
