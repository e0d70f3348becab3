"""errors.log, in the folder that a start writes to: what ended the start or went wrong in it, with whole tracebacks."""

import datetime
import os
import socket
from pathlib import Path

ERRORS = "errors.log"


def append_error(folder: str | os.PathLike[str], who: str, text: str, *, process: int = 0) -> Path | None:
    """Appends an entry to errors.log, or to errors.N.log on process N > 0, and returns the file.

    The entry begins with the time, `who`, the process and the host. If there is no such folder, nothing is written and
    the result is None. Raises OSError if the file cannot be written.
    """
    if not os.path.isdir(folder):
        return None
    path = Path(folder, f"errors.{process}.log" if process else ERRORS)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = f"{now} {who}, process {process}, pid {os.getpid()} on {socket.gethostname()}\n{text.rstrip()}\n\n"
    # One write in append mode: entries of several programs do not mix.
    with open(path, "ab", buffering=0) as file:
        file.write(entry.encode(errors="backslashreplace"))
    return path
