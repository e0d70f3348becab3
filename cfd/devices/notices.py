"""Warnings: those of the package as lines of the command's output, and those that absl logs switched off in a block."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from logging import ERROR, LogRecord
from pathlib import Path
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

PACKAGE = str(Path(__file__).parents[1])


@contextlib.contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Within the block, a warning of this package is one line on standard error, which process 0 prints.

    Warnings of other packages keep their form, which names the place in the code.
    """
    default = warnings.showwarning

    def show(message: Any, category: Any, filename: str, *rest: Any, **named: Any) -> None:
        if not issubclass(category, UserWarning) or not filename.startswith(PACKAGE):
            default(message, category, filename, *rest, **named)
        elif jax.process_index() == 0:
            tqdm.write(f"warning: {message}", file=sys.stderr)  # above a progress bar, not into it

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


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
