"""Files of a run, in a local folder or in a bucket (gs://bucket/folder), and writing them whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
import tensorstore
from absl import logging
from etils import epath

from cfd.devices.buckets import is_url

AnyPath = Path | epath.Path

# gcsfs, by which epath and Orbax reach a bucket, would otherwise answer from listings that other processes made stale.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

_MEMORY = tensorstore.Context()
"""Holds the content of memory://, which lasts as long as this process."""


def place(path: str | os.PathLike[str], *parts: str) -> AnyPath:
    """The absolute path of a local file or folder, with ~ expanded, or the URL of one in a bucket."""
    text = os.fspath(path)
    first = epath.Path(text) if is_url(text) else Path(os.path.abspath(os.path.expanduser(text)))
    return first.joinpath(*parts)


def store(folder: str | os.PathLike[str]) -> Any:
    """TensorStore's key-value store of a folder: a key is the name of a file, with slashes if it lies deeper.

    It works alike for gs://, a local folder and memory://. It keeps nothing in a cache, and a write can be bound to the
    generation of the file that it replaces (`if_equal`). Its list of keys does not tell a refusal from an empty folder:
    use `names`.
    """
    text = (os.fspath(folder) if is_url(folder) else str(place(folder))).rstrip("/") + "/"
    spec = text if is_url(text) else {"driver": "file", "path": text}
    return _result(tensorstore.KvStore.open(spec, context=_MEMORY), folder)


def read_bytes(path: str | os.PathLike[str]) -> bytes | None:
    """The content of a file as it is now, or None if there is none. Raises OSError if it cannot be read."""
    path = place(path)
    if isinstance(path, Path):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    found = _result(store(path.parent).read(path.name), path)
    return found.value if found.state == "value" else None


def names(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the files and folders in a folder as it is now, sorted; [] if there is no such folder."""
    folder = place(folder)
    if isinstance(folder, Path):
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
    # TensorStore's list is empty if the service refuses to list.
    try:
        found = fsspec.filesystem("gcs").ls(os.fspath(folder), detail=False)
    except FileNotFoundError:
        return []
    except Exception as error:  # the exceptions of gcsfs have no common class
        raise _as_os_error(error, folder) from error
    above = os.fspath(folder).partition("://")[2].rstrip("/") + "/"
    return sorted(path.removeprefix(above) for path in found if path.startswith(above) and path != above)


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replaces the content of a file, and makes its folder if there is none.

    After a crash or a power cut at any moment, the file holds either all of the old content or all of the new. Two
    processes may write the same file at the same time.
    """
    path, data = place(path), content.encode() if isinstance(content, str) else content
    if not isinstance(path, Path):
        _result(store(path.parent).write(path.name, data), path)
        return
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(tmp, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)
    fsync(path.parent)


@contextlib.contextmanager
def uploaded(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A local file to write, which replaces the file `path` when the block ends. After an error, nothing is left."""
    path = place(path)
    if isinstance(path, Path):
        tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield tmp
            fsync(tmp)
            os.replace(tmp, path)
            fsync(path.parent)
        finally:
            tmp.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder, path.name)
        yield tmp
        epath.Path(tmp).copy(path, overwrite=True)


@contextlib.contextmanager
def downloaded(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A local file with the content of `path`: itself, or for one in a bucket a copy, which the block's end deletes.

    Raises FileNotFoundError if there is none.
    """
    path = place(path)
    if isinstance(path, Path):
        path.stat()
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        with path.open("rb") as there, open(copy, "wb") as here:
            shutil.copyfileobj(there, here, 2**24)
        yield copy


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


def _result(future: Any, path: str | os.PathLike[str]) -> Any:
    """The result of TensorStore's `future`."""
    try:
        return future.result()
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:  # they have no common class
        raise _as_os_error(error, path) from error


def _as_os_error(error: Exception, path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EIO, " ".join(str(error).split())[:300], os.fspath(path))
