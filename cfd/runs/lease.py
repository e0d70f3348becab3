"""The lock of a run in a bucket: a lease, which one job at a time holds and renews.

The lease is the object `lock` in the folder of the run, with a random id of its holder. Every write of it is bound to
the generation that it replaces. The holder renews it three times per CFD_LEASE_SECONDS. Another job takes it over after
it has seen the same generation for that long by its own clock: no two clocks are compared.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging

from cfd.devices import preemption
from cfd.errors import UserError
from cfd.runs import files

LOCK = "lock"
SECONDS = "CFD_LEASE_SECONDS"
DEFAULT_SECONDS = 60
START_SECONDS = 60.0
"""How long the first requests may take, because TensorStore asks a busy service again and again."""


@dataclasses.dataclass
class Lease:
    """A lease that this process wants or holds.

    It is mutable because a thread renews it: `generation` is that of the last accepted write, and `renewed` is when
    this process sent it.
    """

    folder: str
    elsewhere: str
    seconds: float
    id: str
    content: bytes
    store: Any
    generation: bytes = b""
    renewed: float = -math.inf


def lease_seconds() -> float:
    """The duration of a lease that the environment sets. Raises UserError if it is no positive number."""
    text = os.environ.get(SECONDS, str(DEFAULT_SECONDS))
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise UserError(f"{SECONDS} is {text!r} in the environment; expected a number of seconds > 0: set it, or unset it")


def this_job() -> dict[str, Any]:
    """The name of this job, as a lock records it."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "start_time": started}


def describe_holder(text: bytes) -> str:
    """Who holds a lock with this content, in words."""
    try:
        holder = json.loads(text)
        return f"locked by pid {holder['pid']} on {holder['host']} since {holder['start_time']}"
    except (ValueError, KeyError, TypeError):
        return "locked by another job that is just starting or stopping"


def refusal(folder: str | os.PathLike[str], holder: bytes, elsewhere: str) -> UserError:
    """The error of a job that finds the folder locked."""
    return UserError(
        f"{os.fspath(folder)} is {describe_holder(holder)}: two jobs cannot write to one folder; stop the other job or "
        f"{elsewhere}"
    )


@contextlib.contextmanager
def leased(folder: str, elsewhere: str) -> Iterator[Lease]:
    """Holds the lease of a folder, and renews it from a thread.

    If another job holds it, this one waits until the other renews it, and then raises UserError, or until it has stood
    still for one lease, and then takes it over. If this job loses it, the thread calls `preemption.lose`.
    """
    seconds, number = lease_seconds(), uuid.uuid4().hex
    content = json.dumps({**this_job(), "id": number, "lease_seconds": seconds}).encode()
    lease = Lease(folder, elsewhere, seconds, number, content, files.store(folder))
    stop = threading.Event()
    renewing = threading.Thread(target=_keep, args=(lease, stop), name="cfd-lease", daemon=True)
    try:
        _acquire(lease)
        renewing.start()
        yield lease
    finally:
        stop.set()
        if renewing.ident is not None:
            renewing.join()
        _release(lease)


def problem(lease: Lease) -> str:
    """The reason why the lease is no longer this job's, as read now, or "". Raises OSError if it cannot be read."""
    return _loss(lease, _read(lease, lease.seconds / 3))


def stands(lease: Lease) -> bool:
    """Whether no other job can have taken the lease over yet, because it was renewed within its duration."""
    return time.monotonic() - lease.renewed < lease.seconds


def _acquire(lease: Lease) -> None:
    watched, since, limit = None, 0.0, 0.0
    while True:
        before = time.monotonic()
        try:
            found = _read(lease, START_SECONDS)
            # The answer to an accepted write can be lost. TensorStore then reports it as refused.
            if _id(found.value) == lease.id:
                lease.generation = found.stamp.generation
                return
            # A lock without content was copied from a disk, where the lock of a run that has ended is empty.
            if found.state == "missing" or not found.value:
                if _write(lease, lease.content, found.stamp.generation, START_SECONDS):
                    return
                continue
            if watched is None:
                watched, since, limit = found.stamp.generation, time.monotonic(), _seconds_of(found.value, lease)
                print(
                    f"{lease.folder} is {describe_holder(found.value)}. Waiting for up to {limit:g} s to see whether "
                    f"that job still renews its lock.",
                    flush=True,
                )
            elif found.stamp.generation != watched:
                raise refusal(lease.folder, found.value, lease.elsewhere)
            elif before - since >= limit:
                if _write(lease, lease.content, watched, START_SECONDS):
                    print(f"That job has not renewed its lock for {limit:g} s. This one takes it over.", flush=True)
                    return
                continue
        except OSError as error:
            raise UserError(f"{lease.folder} cannot be written ({error.strerror}): {lease.elsewhere}") from error
        time.sleep(min(limit / 20, 1.0))


def _keep(lease: Lease, stop: threading.Event) -> None:
    """Renews the lease until `stop` is set or the lease is lost. A service that does not answer is asked again."""
    warned = False
    while not stop.wait(lease.seconds / 3):
        try:
            if not _write(lease, lease.content, lease.generation, lease.seconds / 3):
                found = _read(lease, lease.seconds / 3)
                if reason := _loss(lease, found):
                    if not stop.is_set():
                        preemption.lose(reason)
                    return
                # The answer to the last accepted write was lost.
                _write(lease, lease.content, found.stamp.generation, lease.seconds / 3)
            warned = False
        except OSError as error:
            if not warned and not stands(lease):
                logging.warning("the lock of %s could not be renewed: %s", lease.folder, error.strerror)
                warned = True


def _release(lease: Lease) -> None:
    """Deletes the lease if it is this job's."""
    try:
        found = _read(lease, lease.seconds)
        if _id(found.value) == lease.id:
            _ask(lease.store.write(LOCK, None, if_equal=found.stamp.generation), lease.seconds)
    except OSError as error:
        logging.warning(
            "the lock of %s was not deleted (%s): the next job waits %g s for it",
            lease.folder,
            error.strerror,
            lease.seconds,
        )


def _loss(lease: Lease, found: Any) -> str:
    """The reason why the lease, of which `found` was read, is no longer this job's, or ""."""
    if _id(found.value) == lease.id:
        return ""
    if found.state == "missing":
        return (
            f"the lock of {lease.folder} was deleted while this job held it, and another job may have written there: "
            f"this job stopped without saving; start it again, or {lease.elsewhere}"
        )
    return (
        f"{lease.folder} is {describe_holder(found.value)}, and no longer by this job, which had not renewed its lock "
        f"in time: it stopped without saving; stop the other job and start this one again, or {lease.elsewhere}"
    )


def _id(content: bytes | None) -> str | None:
    try:
        return json.loads(content or b"null")["id"]
    except (ValueError, KeyError, TypeError):
        return None


def _seconds_of(content: bytes, lease: Lease) -> float:
    """The duration that the holder of a lease promised to keep."""
    try:
        return max(lease.seconds, float(json.loads(content)["lease_seconds"]))
    except (ValueError, KeyError, TypeError):
        return lease.seconds


def _read(lease: Lease, seconds: float) -> Any:
    return _ask(lease.store.read(LOCK), seconds)


def _write(lease: Lease, content: bytes, replaced: bytes, seconds: float) -> bool:
    """Writes the lease in place of a generation of it. Returns whether the write was accepted, as far as is known."""
    sent = time.monotonic()
    generation = _ask(lease.store.write(LOCK, content, if_equal=replaced), seconds).generation
    if generation:
        lease.generation, lease.renewed = generation, sent
    return bool(generation)


def _ask(future: Any, seconds: float) -> Any:
    """The result of TensorStore's `future`. Raises OSError if it fails or takes longer than `seconds`."""
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        future.cancel()
        raise OSError(None, f"no answer within {seconds:g} s") from None
    except Exception as error:  # the exceptions of TensorStore have no common class
        raise OSError(None, " ".join(str(error).split())[:300]) from error
