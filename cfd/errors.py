"""The errors that the user of the command can correct. Every other error is a fault of a program."""


class UserError(ValueError):
    """An error whose message names a value, what was expected, and a remedy.

    `cfd.main` prints the message in a line or two, without a traceback. Rooms that meet files, flags, configs and
    devices raise it. The mathematics and the networks raise a plain ValueError, whose traceback shows the caller's
    mistake.
    """
