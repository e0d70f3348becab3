"""Files that are read in parts, on a disk or in a bucket, without a copy of the whole."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cfd.runs import files

PIECE_BYTES = 2**22
"""Bytes that one request reads, at least."""


class RemoteFile:
    """A file in a bucket, open for reading: the methods of a binary file that `zipfile` calls.

    `read` raises OSError if the service refuses, and if the file has been replaced since it was first read.
    """

    def __init__(self, path: files.AnyPath) -> None:
        self._path, self._size, self._generation = path, files.size_of(path), None
        self._at = self._piece_at = 0
        self._piece = b""

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:  # `zipfile` expects this of a file that is too short for an archive
            raise OSError(errno.EINVAL, "a position before its start", os.fspath(self._path))
        self._at = at
        return at

    def read(self, count: int = -1) -> bytes:
        end = self._size if count < 0 else min(self._size, self._at + count)
        parts = []
        while self._at < end:
            if not self._piece_at <= self._at < self._piece_at + len(self._piece):
                self._fetch(min(self._size, max(end, self._at + PIECE_BYTES)))
            part = self._piece[self._at - self._piece_at : end - self._piece_at]
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def _fetch(self, end: int) -> None:
        self._piece, generation = files.read_range(self._path, self._at, end)
        self._piece_at = self._at
        if self._generation not in (None, generation):
            raise OSError(errno.ESTALE, "it was replaced while it was read", os.fspath(self._path))
        self._generation = generation


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO | Any]:
    """The file `path`, open for reading. Raises FileNotFoundError if there is none, and OSError if it is refused."""
    path = files.place(path)
    if isinstance(path, Path):
        with open(path, "rb") as file:
            yield file
    else:
        yield RemoteFile(path)
