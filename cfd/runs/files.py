"""Writing files so that neither a crash nor a full disk leaves them half written."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from absl import logging


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the content of a file, and makes its folder if there is none.

    After a crash or a power cut at any moment, the file holds either all of the old content or all of the new. Two
    processes may write the same file at the same time.
    """
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(tmp, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flushes a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def despite_a_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Logs the OSError of a full disk, an exhausted quota or a file that reached its size limit, and continues.

    Every other exception is raised. `path` is the file that the message names.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        logging.error("%s was not written: %s", path, e.strerror)
