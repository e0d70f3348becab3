"""Files of a run, in a local folder or in a bucket (gs://bucket/folder), and writing them whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
import tensorstore
from absl import logging
from etils import epath

from cfd.devices.buckets import is_url
from cfd.errors import is_missing

AnyPath = Path | epath.Path

# gcsfs, by which epath and Orbax reach a bucket, would otherwise answer from listings that other processes made stale.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, of an exhausted quota, and of a file that has reached its size limit."""
_AWAY = "look whether its disk works and is mounted"
REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space, or ask for a larger quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "mount its file system so that it can be written",
    errno.EACCES: "let this job write there, by chmod or chown",
    errno.EPERM: "let this job write there, by chmod or chown",
    **dict.fromkeys((errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT), _AWAY),
}
"""The remedies for errors of writing a file on a disk, as the end of a message."""

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


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file now. For folders in a bucket, use `names`.

    Raises OSError if a bucket or a disk does not say, for example a network disk whose server does not answer.
    """
    path = place(path)
    if isinstance(path, Path):
        try:
            os.stat(path)
        except OSError as error:
            if not is_missing(error):
                raise
            return False
        return True
    return _result(store(path.parent).read(path.name, byte_range=slice(0, 0)), path).state == "value"


def size_of(path: str | os.PathLike[str]) -> int:
    """The size of a file in bytes. Raises FileNotFoundError if there is none."""
    path = place(path)
    if isinstance(path, Path):
        return path.stat().st_size
    if not exists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    try:
        return fsspec.filesystem("gcs").info(os.fspath(path))["size"]
    except Exception as error:  # the exceptions of gcsfs have no common class
        raise _as_os_error(error, path) from error


def read_range(path: str | os.PathLike[str], start: int, end: int) -> tuple[bytes, Any]:
    """Bytes `start` to `end` of a file in a bucket, and its generation. Raises OSError if it has not so many."""
    path = place(path)
    found = _result(store(path.parent).read(path.name, byte_range=slice(start, end)), path)
    return found.value, found.stamp.generation


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
    with uploaded(path) as tmp:
        tmp.write_bytes(data)


def rewrite(path: str | os.PathLike[str], change: Callable[[bytes], bytes]) -> tuple[bytes, Any]:
    """Replaces the content of a file by `change(content)`, where a missing file has the content b"".

    In a bucket, nothing that another program writes at the same time is overwritten: `change` is then called again with
    the new content. If the answer of the service is lost, `change` is called with its own result. Returns the new
    content and the generation of the file, which is None for a local one.
    """
    path = place(path)
    if isinstance(path, Path):
        old = read_bytes(path)
        if (new := change(old or b"")) != old:
            write_atomically(path, new)
        return new, None
    while True:
        old, generation = read_generation(path)
        new = change(old)
        if (generation := replace_generation(path, new, generation)) is not None:
            return new, generation


def read_generation(path: str | os.PathLike[str]) -> tuple[bytes, Any]:
    """The content of a file in a bucket, and its generation. That there is no file is a generation too, with b""."""
    path = place(path)
    found = _result(store(path.parent).read(path.name), path)
    return found.value, found.stamp.generation


def replace_generation(path: str | os.PathLike[str], content: bytes, generation: Any) -> Any:
    """Writes a file in a bucket if it still has `generation`. Returns its new generation, or None if it has another.

    After a lost answer, the result is None although the file was written: read it back.
    """
    path = place(path)
    return _result(store(path.parent).write(path.name, content, if_equal=generation), path).generation or None


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
        except OSError as error:
            if error.filename in (None, os.fspath(tmp)):
                error.filename = os.fspath(path)
            raise
        finally:
            tmp.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder, path.name)
        yield tmp
        try:
            epath.Path(tmp).copy(path, overwrite=True)
        except Exception as error:  # the exceptions of gcsfs have no common class
            raise _as_os_error(error, path) from error


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


def how_to_allow(path: str | os.PathLike[str]) -> str:
    """The remedy, as the end of a message, if a file exists and cannot be read."""
    if is_url(path):
        return "the owner of the bucket can allow it, by the role Storage Object Viewer (roles/storage.objectViewer)"
    return "its owner can allow it, by chmod -R a+rX"


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

    For a file in a bucket, it logs every OSError. Every other exception is raised. `path` is the file that the message
    names.
    """
    try:
        yield
    except OSError as e:
        if not is_url(path) and e.errno not in FULL:
            raise
        logging.error("%s was not written: %s", path, e.strerror)


def how_to_write(error: OSError | None) -> str:
    """The remedy for an error of writing a file on a disk."""
    return REMEDIES.get((error and error.errno) or 0, "remove the cause")


def reason_of_storage(error: OSError, folder: str) -> str:
    """The message about a disk or a bucket that refuses or does not answer; "" for another error.

    `folder` is the one that the program writes to. Of an error that names no file, it takes only those of FULL.
    """
    if is_url(str(error.filename)):
        return f"{error.filename} was not read or written ({error.strerror}): start again when the bucket allows it"
    if error.errno in FULL or (error.errno in REMEDIES and error.filename is not None):
        action = "written" if error.errno in (*FULL, errno.EROFS) else "read or written"
        name = folder if error.filename is None else error.filename
        return f"{name} cannot be {action} ({error.strerror}): {how_to_write(error)}, and start again"
    return ""


def _result(future: Any, path: str | os.PathLike[str]) -> Any:
    """The result of TensorStore's `future`."""
    try:
        return future.result()
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:  # they have no common class
        raise _as_os_error(error, path) from error


def _as_os_error(error: Exception, path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EIO, " ".join(str(error).split())[:300], os.fspath(path))
