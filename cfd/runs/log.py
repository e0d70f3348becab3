"""The metrics of a run: metrics.jsonl, with one object per line, and the same scalars and images for TensorBoard.

Nothing can be appended to an object in a bucket. There, a thread writes metrics.jsonl whole again, at most once per
second, and new lines are in memory until then. TensorBoard gets a new file with the events of each minute.
"""

import contextlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from cfd.devices import preemption
from cfd.runs import files
from cfd.runs.access import still_held
from cfd.runs.files import AnyPath
from cfd.runs.growing import GrowingFile, GrowingUpload

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
UPDATE_SECONDS = 1.0
"""Seconds between two updates of one object: buckets of Google Cloud Storage accept about one per second."""
EVENTS_SECONDS = 60.0
"""Seconds between two new files of TensorBoard in a bucket."""


class MetricsLog(NamedTuple):
    """The files that scalars and images go to. Only process 0 writes them; on the other processes both are None."""

    lines: GrowingFile | GrowingUpload | None
    board: GrowingFile | GrowingUpload | None


def metrics_log(workdir: str | os.PathLike[str], step: int) -> MetricsLog:
    """The log of a run that continues from `step`. `close` ends it.

    It first drops the lines of later steps, and a last line that was cut short. If the line of a step is written and
    flushed before the checkpoint of that step is saved, no step is ever missing or present twice.
    """
    if jax.process_index() != 0:
        return MetricsLog(None, None)
    path, folder = files.place(workdir, METRICS), files.place(workdir, TENSORBOARD)
    # In a bucket, this writes the file even if nothing is dropped: a job that lost its lease has the generation before,
    # and can then no longer write.
    content, generation = files.rewrite(path, lambda old: _truncated(path, old, step))
    # TensorBoard reads the files of a folder in the order of their names.
    name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{socket.gethostname()}"
    version = _record(0, file_version="brain.Event:2")
    # This event makes TensorBoard hide the later steps that an earlier start of the run wrote.
    start = _record(step + 1, session_log={"status": "START"})
    if isinstance(path, Path) and isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        lines, board = GrowingFile(path), GrowingFile(folder / name)
        board.write(version + start)
        return MetricsLog(lines, board)
    put = _rewriting(path, content, generation)
    lines = GrowingUpload(path, put, pause=UPDATE_SECONDS, shortest_pause=UPDATE_SECONDS)
    put = _numbering(folder / name, version)
    board = GrowingUpload(folder, put, pause=EVENTS_SECONDS, shortest_pause=0.0)
    board.write(start)
    return MetricsLog(lines, board)


def prepare() -> None:
    """Imports what a log needs, which takes 0.3 s. `metrics_log` does so otherwise."""
    if jax.process_index() == 0:
        _record(0)


def flush(log: MetricsLog) -> None:
    """Waits until all that was written is in the bucket, or until the service has refused it, which is logged.

    Lines that it refuses stay in memory and are tried again. On a disk, there is nothing to wait for.
    """
    for file in log:
        if isinstance(file, GrowingUpload):
            file.flush()


def close(log: MetricsLog) -> None:
    """Flushes the log, and ends the threads that write to a bucket. Nothing may be written to it any more.

    Raises Lost if another program has written metrics.jsonl.
    """
    with contextlib.ExitStack() as all_of_them:
        for file in log:
            if isinstance(file, GrowingUpload):
                all_of_them.callback(file.close)


def _rewriting(path: AnyPath, content: bytes, generation: Any) -> Callable[[bytes], None]:
    """A function that adds bytes to an object, which has this content and generation, by writing it whole again.

    If another job has written to the object, it is left alone, and this job is told that it has lost the run.
    """

    def put(data: bytes) -> None:
        nonlocal content, generation
        new = content + data
        while (written := files.replace_generation(path, new, generation)) is None:
            found, generation = files.read_generation(path)
            # An attempt of this job whose answer was lost has written more than `content`, and nothing but `new`.
            if len(found) <= len(content) or not found.startswith(content) or not new.startswith(found):
                with contextlib.suppress(OSError):
                    still_held(path)  # names the job that has the lock now
                reason = f"another program has written {path}: let only one job at a time write to a run"
                preemption.lose(reason)
                raise preemption.Lost(reason)
        content, generation = new, written

    return put


def _numbering(path: AnyPath, version: bytes) -> Callable[[bytes], None]:
    """A function that writes TensorBoard records to a new file on every call, after the record of the version."""
    number = 0

    def put(data: bytes) -> None:
        nonlocal number
        files.write_atomically(path.with_name(f"{path.name}.{number:06d}"), version + data)
        number += 1

    return put


def _record(step: int, **content: Any) -> bytes:
    """One TensorBoard record: length, checksum of the length, event, checksum of the event.

    `tensorboardX.SummaryWriter` is not used because it writes from a thread that dies when the disk is full: every
    later event would be lost.
    """
    # Imported here because tensorboardX imports PyTorch where that is installed, which takes 1.3 s and 190 MB.
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    protocol: Any = event_pb2  # protobuf creates its classes at import, where a type checker does not see them
    data = protocol.Event(wall_time=time.time(), step=step, **content).SerializeToString()
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(x)) for x in (length, data))
    return length + next(checksums) + data + next(checksums)


def _truncated(path: AnyPath, old: bytes, step: int) -> bytes:
    """The lines of `old`, the content of metrics.jsonl, up to `step`."""
    kept, later = [], 0
    for number, line in enumerate(old.splitlines(keepends=True), 1):
        try:
            if json.loads(line)["step"] > step:
                later += 1
            elif line.endswith(b"\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            logging.warning("%s: line %d is cut short or damaged and was dropped: %r", path, number, line[:80])
    if later:
        start = f"the newest checkpoint is step {step}" if step else "there is no checkpoint, training starts at step 0"
        print(f"{path}: {start}; dropped {later} lines of later steps.", flush=True)
    return b"".join(kept)


def write_metrics(log: MetricsLog, step: int, metrics: Mapping[str, float | int]) -> None:
    """Appends {"step": step, "time": seconds since 1970, **metrics} as one line of JSON.

    JSON has no NaN or Inf; they become null.
    """
    if log.lines is None or log.board is None:
        return
    from tensorboardX import summary

    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    line = {"step": step, "time": round(time.time(), 3), **finite}
    log.lines.write((json.dumps(line, allow_nan=False) + "\n").encode())
    values = [value for name, number in metrics.items() for value in summary.scalar(name, number).value]
    log.board.write(_record(step, summary={"value": values}))


def write_image(
    log: MetricsLog, step: int, name: str, image: UInt8[np.ndarray, "h w c"] | Float[np.ndarray, "h w c"]
) -> None:
    """Appends one image to the TensorBoard file: uint8, or float in [0, 1]."""
    if log.board is None:
        return
    from tensorboardX import summary

    log.board.write(_record(step, summary=summary.image(name, image, dataformats="HWC")))
