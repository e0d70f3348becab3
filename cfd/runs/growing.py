"""Files that only grow: a disk appends to them at once, and a thread uploads what is new to a bucket."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging

from cfd.runs.files import despite_a_full_disk

LONGEST_PAUSE = 60.0
"""Seconds between two uploads, at most, if the service does not fail."""
WAIT_SECONDS = 60.0
"""How long somebody waits for an upload. TensorStore tries for a quarter of an hour before it fails."""


@dataclasses.dataclass
class GrowingFile:
    """A file that is only appended to. Bytes that a full disk refuses stay in memory until there is space again."""

    path: Path
    unwritten: bytes = b""

    def write(self, data: bytes) -> None:
        """Appends `data`, after any bytes that an earlier call could not write."""
        self.unwritten += data
        with despite_a_full_disk(self.path), open(self.path, "ab", buffering=0) as file:
            while self.unwritten:
                self.unwritten = self.unwritten[file.write(self.unwritten) :]


class GrowingUpload:
    """Bytes that a thread uploads to a bucket by `put(data)`, where `data` is what no earlier call has uploaded.

    If `put` raises OSError, the bytes stay in memory and are tried again. Any other exception is logged, and nothing is
    uploaded any more. The next call of a method raises it; with several processes, only `close` does, because the other
    processes would wait for this one. Uploads are `pause` seconds apart, or more if they take long, and
    `shortest_pause` seconds if somebody waits for them. `path` is what messages name.
    """

    def __init__(
        self, path: str | os.PathLike[str], put: Callable[[bytes], None], *, pause: float, shortest_pause: float
    ) -> None:
        self.path, self.put, self.pause, self.shortest_pause = os.fspath(path), put, pause, shortest_pause
        self._changed = threading.Condition()
        self._unwritten = b""
        self._waiting = self._attempts = 0
        self._busy = self._closed = False
        self._failure = ""
        self._error: Exception | None = None
        self._ended, self._took = time.monotonic(), 0.0
        self._thread = threading.Thread(target=self._upload, name=f"uploads {self.path}", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Adds `data`, without waiting for anything."""
        self._raise_if_alone()
        with self._changed:
            if not self._closed:
                self._unwritten += data
                self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all bytes are uploaded, until an attempt that includes them has failed, or for WAIT_SECONDS.

        The last two are logged, and the bytes stay in memory.
        """
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            enough = self._attempts + 1 + self._busy
            done = self._changed.wait_for(lambda: not self._unwritten or self._attempts >= enough, WAIT_SECONDS)
            self._waiting -= 1
        if not done:
            logging.error("%s is not written yet: the service has not answered for %g s", self.path, WAIT_SECONDS)
        self._raise_if_alone()

    def close(self) -> None:
        """Flushes, and ends the thread. Bytes that the service does not take by then are lost, which is logged."""
        try:
            self.flush()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._thread.join(WAIT_SECONDS)
        if self._unwritten:
            logging.error("%s: %d bytes were lost", self.path, len(self._unwritten))
        self._raise_error()

    def _raise_if_alone(self) -> None:
        """Raises the exception that ended the uploads, unless other processes would wait for this one."""
        if jax.process_count() == 1:
            self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _pause(self) -> float:
        """Seconds until the next upload is due."""
        usual = max(self.pause, min(LONGEST_PAUSE, 9 * self._took))  # a tenth of the time for uploads
        return self._ended + (self.shortest_pause if self._waiting else usual) - time.monotonic()

    def _due(self) -> bytes:
        """Waits for the next upload, and returns its bytes, or b"" at the end."""
        with self._changed:
            while not self._closed and (not self._unwritten or self._pause() > 0):
                self._changed.wait(self._pause() if self._unwritten else None)
            self._busy = not self._closed
            return b"" if self._closed else self._unwritten

    def _upload(self) -> None:
        while data := self._due():
            began, failure = time.monotonic(), ""
            try:
                self.put(data)
            except OSError as error:
                failure = error.strerror or str(error)
            except Exception as error:  # raised again in the thread that calls the methods
                logging.error("%s is no longer written: %s", self.path, error)
                with self._changed:
                    self._error, self._closed, self._unwritten = error, True, b""
                    self._changed.notify_all()
                return
            if failure and not self._failure:
                logging.error("%s was not written, and will be tried again: %s", self.path, failure)
            elif self._failure and not failure:
                logging.warning("%s is written again", self.path)
            with self._changed:
                self._unwritten = self._unwritten if failure else self._unwritten[len(data) :]
                self._failure, self._busy, self._attempts = failure, False, self._attempts + 1
                self._ended = time.monotonic()
                self._took = 0.0 if failure else self._ended - began
                self._changed.notify_all()
