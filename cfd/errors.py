"""The errors that the user of the command can correct. Every other error is a fault of a program."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

RESTORE = 'restore it from a backup, or from "config" in checkpoints/<step>/meta/metadata, which is JSON'
"""The remedy for a config.json that is damaged or missing."""


class UserError(ValueError):
    """An error whose message names a value, what was expected, and a remedy.

    `cfd.main` prints the message in a line or two, without a traceback. Rooms that meet files, flags, configs and
    devices raise it. The mathematics and the networks raise a plain ValueError, whose traceback shows the caller's
    mistake.
    """


class CommandError(UserError):
    """An error of the flags or of the config, by themselves or beside the config of the run in the folder.

    Every start of the same command ends with it. An error about other files, devices or a network is none, because a
    later start may find them otherwise.
    """


class InputError(UserError):
    """An error about data or a run that the command names: nothing is there, or it does not fit the config.

    Every start of a new run ends with it. A run with a config.json has found its inputs before, and a later start may
    find them again, for example when a disk is mounted.
    """


class PassingError(UserError):
    """An error of a bucket or of its credentials that a later start may not meet, because the service is away."""


@contextlib.contextmanager
def about_inputs() -> Iterator[None]:
    """Within the block, a UserError is raised as an InputError, except for CommandError and errors that may pass.

    Those that may pass are PassingError, and the errors that an OSError has caused: the system could not read what is
    there. A missing file is not one of these.
    """
    try:
        yield
    except UserError as error:
        if isinstance(error, CommandError | InputError) or _may_pass(error):
            raise
        raise InputError(str(error)) from error


def _may_pass(error: BaseException | None) -> bool:
    if error is None:
        return False
    passes = isinstance(error, PassingError) or (isinstance(error, OSError) and not is_missing(error))
    return passes or _may_pass(error.__context__)


def is_missing(error: OSError) -> bool:
    """Whether an error says that there is no such file or folder. Others say that the system could not look."""
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return missing or error.errno in (errno.ENAMETOOLONG, errno.ELOOP)


def reason_of(error: BaseException | str) -> str:
    """An error in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 200 else f"{text[:200]}...")


def os_error_of(error: BaseException | None) -> OSError | None:
    """The error of the operating system that an exception is, that caused it, or that TensorStore names in its text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return OSError(int(found[1]), os.strerror(int(found[1])))
        error = error.__cause__ or error.__context__
    return None


def root_reason(error: BaseException) -> str:
    """The reason of the operating system that the text of a library's exception hides, or the exception in one line."""
    cause = None if isinstance(error, OSError) else os_error_of(error)
    return (cause and cause.strerror) or reason_of(error)
