"""Whether this job may write to a folder: paths that cannot be a folder, permissions, and the lock of a run."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import jax

from cfd.devices import parallel
from cfd.errors import UserError

LOCK = "lock"


def local_path(flag: str, path: str) -> str:
    """The path that a flag gives, with ~ expanded. Raises UserError if it is empty or a URL."""
    if not path:
        raise UserError(f"{flag} is empty: name a folder, or leave the flag out")
    if "://" in path:
        raise UserError(
            f"{flag} is {path!r}, a URL; a run needs a file system with locks and renames: mount one, such as a "
            "network disk, and give a path there"
        )
    return os.path.expanduser(path)


def check_run_path(folder: str | os.PathLike[str]) -> None:
    r"""Raises UserError if checkpoints in the folder could not be read back.

    Orbax takes the absolute path for a pattern, in which [ ] * ? have a meaning, and TensorStore takes \ for a slash.
    """
    local_path("the run's folder", os.fspath(folder))
    path = str(Path(folder).absolute())
    if found := [mark for mark in r"\[]*?" if mark in path]:
        raise UserError(
            f"{path} has {' '.join(found)} in its name, with which its checkpoints cannot be read back: give a "
            r"--workdir whose path has none of \ [ ] * ?"
        )


def check_writable(folder: str | os.PathLike[str], elsewhere: str) -> None:
    """Raises UserError, with the remedy `elsewhere`, unless this job may write to the folder, which may not exist yet.

    Nothing is left in the folder. Every process must call this; process 0 tries it for all.
    """
    problem = ""
    if jax.process_index() == 0:
        try:
            place = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            problem = f"{os.fspath(folder)} cannot be written ({error.strerror}): {elsewhere}"
    if parallel.total(int(bool(problem))):
        raise UserError(problem or f"process 0 cannot write to {os.fspath(folder)}: {elsewhere}")


@contextlib.contextmanager
def lock(folder: str | os.PathLike[str], elsewhere: str = "give another --workdir") -> Iterator[None]:
    """Locks the folder for this job, so that only one job at a time writes to it, and makes it if there is none.

    Process 0 holds the lock for all processes of the job, and every process must call this. The operating system
    releases the lock of a process that died. Raises UserError, with the remedy `elsewhere`, if another live job holds
    the lock, or if the folder cannot be written.
    """
    file, problem = None, None
    if jax.process_index() == 0:
        try:
            file = _locked(Path(folder), elsewhere)
        except UserError as error:
            problem = error
    if not parallel.total(int(file is not None)):
        raise problem or UserError(f"process 0 could not lock {os.fspath(folder)}, and says why")
    try:
        yield
    finally:
        if file is not None:
            file.truncate(0)
            file.close()


def _locked(folder: Path, elsewhere: str) -> BinaryIO:
    """The open lock file, which this process holds and in which its name is written."""
    path = folder / LOCK
    with contextlib.ExitStack() as on_error:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Mode "w" would erase what the holder wrote before this process knows whether the lock is free. Without a
            # buffer, nothing is left to write when the file is closed on a full disk.
            file = on_error.enter_context(open(path, "ab+", buffering=0))
        except OSError as e:
            raise UserError(f"{folder} cannot be written ({e.strerror}): {elsewhere}") from e
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is {_describe_holder(file.read())}: two jobs cannot write to one folder; stop the other "
                f"job or {elsewhere}"
            ) from None
        except OSError as e:
            raise UserError(
                f"{path} cannot be locked ({e.strerror}): mount its file system with flock (Lustre: -o flock), or "
                f"{elsewhere}"
            ) from e
        try:
            file.truncate(0)
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "start_time": started}
            file.write(json.dumps(holder).encode())
        except OSError as e:
            raise UserError(f"{path} cannot be written ({e.strerror}): free space, or {elsewhere}") from e
        on_error.pop_all()
    return file


def _describe_holder(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"locked by pid {holder['pid']} on {holder['host']} since {holder['start_time']}"
    except (ValueError, KeyError, TypeError):
        return "locked by another job that is just starting or stopping"
