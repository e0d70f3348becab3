"""errors.log, in the folder that a start writes to: what ended the start or went wrong in it, with whole tracebacks."""

import datetime
import os
import socket

from cfd.runs import files
from cfd.runs.files import AnyPath

ERRORS = "errors.log"


def append_error(folder: str | os.PathLike[str], who: str, text: str, *, process: int = 0) -> AnyPath | None:
    """Appends an entry to errors.log, or to errors.N.log on process N > 0, and returns the file.

    The entry begins with the time, `who`, the process and the host. If there is no such folder, or nothing in a folder
    of a bucket, nothing is written and the result is None. Raises OSError if the file cannot be written.
    """
    in_bucket = files.is_url(folder)
    if not (files.names(folder) if in_bucket else os.path.isdir(folder)):
        return None
    path = files.place(folder, f"errors.{process}.log" if process else ERRORS)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = f"{now} {who}, process {process}, pid {os.getpid()} on {socket.gethostname()}\n{text.rstrip()}\n\n"
    data = entry.encode(errors="backslashreplace")
    if in_bucket:
        files.rewrite(path, lambda old: old if old.endswith(data) else old + data)
        return path
    # One write in append mode: entries of several programs do not mix. What a full disk leaves out raises the error.
    with open(path, "ab", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
    return path
