"""Warnings: those of the package as lines of the command's output, and those that absl logs switched off in a block."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from logging import ERROR, WARNING, LogRecord
from pathlib import Path
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

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
