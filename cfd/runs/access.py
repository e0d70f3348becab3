"""Whether this job may write to a folder: paths that cannot be a folder, permissions, and the lock of a run."""

import contextlib
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import jax

from cfd.devices import buckets, parallel, preemption
from cfd.devices.buckets import is_url
from cfd.errors import CommandError, InputError, UserError
from cfd.runs import files, lease
from cfd.runs.lease import LOCK, Lease

MOUNTS = "/proc/mounts"
LONGEST = "/".join(["x" * 63] * 4)
"""A path as long as those of the files in a run may become."""

_leases: list[Lease] = []
"""The leases that this process holds."""


def run_path(flag: str, path: str) -> str:
    """The folder that a flag gives: a local one with ~ expanded, or gs://BUCKET/FOLDER without a slash at its end.

    Raises CommandError if it is empty, a URL of another scheme or a malformed one, and if there is no such bucket, and
    UserError if the bucket cannot be read.
    """
    if not path:
        raise CommandError(f"{flag} is empty: name a folder, or leave the flag out")
    if not is_url(path):
        return os.path.expanduser(path)
    try:
        buckets.check(flag, path)
    except InputError as error:
        raise CommandError(str(error)) from error
    return "gs://" + "/".join(buckets.split(flag, path)).rstrip("/")


def check_run_path(folder: str | os.PathLike[str]) -> None:
    r"""Raises UserError if checkpoints in the folder could not be read back, or if its bucket cannot be read.

    Orbax takes the absolute path for a pattern, in which [ ] * ? have a meaning, and TensorStore takes \ for a slash.
    """
    run_path("the run's folder", os.fspath(folder))
    if is_url(folder):
        return
    path = str(Path(folder).absolute())
    if found := [mark for mark in r"\[]*?" if mark in path]:
        raise CommandError(
            f"{path} has {' '.join(found)} in its name, with which its checkpoints cannot be read back: give a "
            r"--workdir whose path has none of \ [ ] * ?"
        )


def check_file(name: str, path: str, remedy: str) -> None:
    """Raises UserError, which names the field or flag, if there is no file at `path`, or if it cannot be read.

    `remedy` is for a file that is missing.
    """
    if is_url(path):
        buckets.check(name, path)
    try:
        found = files.exists(path) and (is_url(path) or os.path.isfile(path))
    except OSError as error:
        raise UserError(
            f"{name} is {path!r}, which cannot be read ({error.strerror}): {files.how_to_allow(path)}"
        ) from error
    if not found:
        raise UserError(f"{name} is {path!r}, which is no file; {remedy}")


def check_writable(folder: str | os.PathLike[str], elsewhere: str) -> None:
    """Raises UserError, with the remedy `elsewhere`, unless this job may write to the folder, which may not exist yet.

    Nothing is left in the folder. Every process must call this; process 0 tries it for all.
    """
    problem = None
    if jax.process_index() == 0:
        try:
            if is_url(folder):
                _check_bucket(os.fspath(folder), elsewhere)
            else:
                place = _place_of(Path(folder))
                with tempfile.TemporaryFile(dir=place):
                    pass
        except OSError as error:
            problem = UserError(f"{os.fspath(folder)} cannot be written ({_reason(error)}): {elsewhere}")
        except UserError as error:
            problem = error
    if parallel.total(int(problem is not None)):
        raise problem or UserError(f"process 0 cannot write to {os.fspath(folder)}: {elsewhere}")


def _place_of(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists.

    Raises OSError if the file system there does not take one of the names below it, or a file in the folder, because a
    name or the whole path is too long.
    """
    path = folder.absolute()
    place = next(above for above in (path, *path.parents) if os.path.lexists(above))
    for probe in (path / LONGEST, *(place / name for name in path.relative_to(place).parts)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(probe)
    return place


def _reason(error: OSError) -> str:
    """The reason why a folder cannot be made or written: also that it, or one above it, is a file or a broken link."""
    path = Path(str(error.filename or ""))
    for place in (path, *path.parents):
        if os.path.islink(place) and not os.path.exists(place):
            return f"{place} is a link to {os.readlink(place)}, which is not there"
        if isinstance(error, FileExistsError | NotADirectoryError) and os.path.isfile(place):
            return f"{place} is a file"
    return str(error.strerror)


def _check_bucket(folder: str, elsewhere: str) -> None:
    """Raises UserError, with the remedy `elsewhere` among others, unless the folder in a bucket can be written."""
    try:
        buckets.check("the folder", folder, write=True)
    except UserError as error:
        raise UserError(f"{error}; or {elsewhere}") from error


@contextlib.contextmanager
def lock(folder: str | os.PathLike[str], elsewhere: str = "give another --workdir") -> Iterator[None]:
    """Locks the folder for this job, so that only one job at a time writes to it, and makes it if there is none.

    Process 0 holds the lock for all processes of the job, and every process must call this. The operating system
    releases the lock of a process that died. A folder that the job made and left empty is removed. In a bucket, the
    lock is a lease, which another job takes over when it is not renewed: see `cfd.runs.lease`. Raises UserError, with
    the remedy `elsewhere`, if another live job holds the lock, or if the folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        problem = None
        if jax.process_index() == 0:
            try:
                held.enter_context(
                    _leased(os.fspath(folder), elsewhere) if is_url(folder) else _flocked(folder, elsewhere)
                )
            except UserError as error:
                problem = error
        if parallel.total(int(problem is not None)):
            raise problem or UserError(f"process 0 could not lock {os.fspath(folder)}, and says why")
        if is_url(folder):
            held.enter_context(preemption.holding(_lost))
        yield


def still_held(path: str | os.PathLike[str]) -> None:
    """Raises unless the lease of the folder that holds `path` is this process's now, if this process took it.

    Any thread may call this. It raises `preemption.Lost` if another job has taken the lease over, and OSError if the
    lease cannot be read and was not renewed in time.
    """
    for held in _leases:
        if not os.fspath(path).startswith(f"{held.folder}/"):
            continue
        try:
            reason = lease.problem(held)
        except OSError:
            if not lease.stands(held):
                raise
            continue
        if reason:
            raise preemption.Lost(reason)


def _lost() -> str:
    """The reason why a lease of this process is lost, or "". One that cannot be read may be its own still."""
    for held in _leases:
        with contextlib.suppress(OSError):
            if reason := lease.problem(held):
                return reason
    return ""


@contextlib.contextmanager
def _leased(folder: str, elsewhere: str) -> Iterator[None]:
    _check_bucket(folder, elsewhere)
    with lease.leased(folder.rstrip("/"), elsewhere) as held:
        _leases.append(held)
        try:
            yield
        finally:
            _leases.remove(held)


@contextlib.contextmanager
def _flocked(folder: str | os.PathLike[str], elsewhere: str) -> Iterator[None]:
    path = Path(folder)
    _refuse_gcsfuse(path, elsewhere)
    made = [place for place in (path, *path.parents) if not os.path.lexists(place)]
    with _locked(path, elsewhere) as file:
        try:
            file.truncate(0)
            file.write(json.dumps(lease.this_job()).encode())
        except OSError as e:
            _remove_if_empty(made)
            raise UserError(
                f"{path / LOCK} cannot be written ({e.strerror}): {files.how_to_write(e)}, or {elsewhere}"
            ) from e
        try:
            yield
        finally:
            file.truncate(0)
            _remove_if_empty(made)


def _remove_if_empty(made: Sequence[Path]) -> None:
    """Removes folders, each in the next one, if the first holds nothing but a lock, which this process must hold."""
    with contextlib.suppress(OSError):  # another job has made something there, or removed it
        if made and os.listdir(made[0]) == [LOCK]:
            (made[0] / LOCK).unlink()
            for place in made:
                place.rmdir()


def _refuse_gcsfuse(folder: Path, elsewhere: str) -> None:
    """Raises UserError if a bucket is mounted there by gcsfuse, which neither locks nor renames folders."""
    try:
        lines = Path(MOUNTS).read_text(errors="replace").splitlines()
    except OSError:  # other systems than Linux have no such file
        return
    mounts = [line.split()[:3] for line in lines]
    place = os.path.realpath(folder)
    above = {}
    for source, escaped, kind in mounts:
        at = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), escaped)
        if Path(place).is_relative_to(at):
            above[at] = (source, kind)
    source, kind = above[max(above, key=len)] if above else ("", "")
    # The driver of GKE mounts it without the name of the program, from the bucket.
    on_gke = kind == "fuse" and "/" not in source and "KUBERNETES_SERVICE_HOST" in os.environ
    if kind == "fuse.gcsfuse" or on_gke:
        raise UserError(
            f"{folder} is on gcsfuse (bucket {source}), which neither locks files nor renames folders: give the bucket "
            f"itself, as gs://{source}/FOLDER, or {elsewhere}"
        )


def _locked(folder: Path, elsewhere: str) -> BinaryIO:
    """The open lock file, which this process holds."""
    path = folder / LOCK
    with contextlib.ExitStack() as on_error:
        try:
            _place_of(folder)
            folder.mkdir(parents=True, exist_ok=True)
            # Mode "w" would erase what the holder wrote before this process knows whether the lock is free. Without a
            # buffer, nothing is left to write when the file is closed on a full disk.
            file = on_error.enter_context(open(path, "ab+", buffering=0))
        except OSError as e:
            raise UserError(f"{folder} cannot be written ({_reason(e)}): {elsewhere}") from e
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise lease.refusal(folder, file.read(), elsewhere) from None
        except OSError as e:
            raise UserError(
                f"{path} cannot be locked ({e.strerror}): mount its file system with flock (Lustre: -o flock), or "
                f"{elsewhere}"
            ) from e
        try:
            is_there = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
        except FileNotFoundError:
            is_there = False
        if not is_there:
            return _locked(folder, elsewhere)  # its holder has just removed the folder, and others find another file
        on_error.pop_all()
    return file
