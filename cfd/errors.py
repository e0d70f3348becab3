"""The errors that the user of the command can correct. Every other error is a fault of a program."""


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


def reason_of(error: Exception | str) -> str:
    """An error in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 200 else f"{text[:200]}...")
