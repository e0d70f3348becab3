"""The metrics of a run: metrics.jsonl, with one object per line, and the same scalars and images for TensorBoard."""

import dataclasses
import json
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from cfd.runs.files import despite_a_full_disk, write_atomically

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


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


class MetricsLog(NamedTuple):
    """The files that scalars and images go to. Only process 0 writes them; on the other processes both are None."""

    lines: GrowingFile | None
    board: GrowingFile | None


def metrics_log(workdir: str | os.PathLike[str], step: int) -> MetricsLog:
    """The log of a run that continues from `step`.

    It first drops the lines of later steps, and a last line that was cut short. If the line of a step is written before
    the checkpoint of that step is saved, no step is ever missing or present twice.
    """
    if jax.process_index() != 0:
        return MetricsLog(None, None)
    workdir = Path(workdir)
    _truncate(workdir / METRICS, step)
    os.makedirs(workdir / TENSORBOARD, exist_ok=True)
    # TensorBoard reads the files of a folder in the order of their names.
    name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{socket.gethostname()}"
    board = GrowingFile(workdir / TENSORBOARD / name)
    _write_event(board, 0, file_version="brain.Event:2")
    # This event makes TensorBoard hide the later steps that an earlier start of the run wrote.
    _write_event(board, step + 1, session_log={"status": "START"})
    return MetricsLog(GrowingFile(workdir / METRICS), board)


def _write_event(board: GrowingFile, step: int, **content: Any) -> None:
    """Appends one TensorBoard record: length, checksum of the length, event, checksum of the event.

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
    board.write(length + next(checksums) + data + next(checksums))


def _truncate(path: Path, step: int) -> None:
    old = path.read_bytes() if path.exists() else None
    kept, later = [], 0
    for number, line in enumerate((old or b"").splitlines(keepends=True), 1):
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
    new = b"".join(kept)
    if new != old:
        write_atomically(path, new.decode())


def write_metrics(log: MetricsLog, step: int, metrics: Mapping[str, float | int]) -> None:
    """Appends {"step": step, **metrics} as one line of JSON. JSON has no NaN or Inf; they become null."""
    if log.lines is None or log.board is None:
        return
    from tensorboardX import summary

    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    log.lines.write((json.dumps({"step": step, **finite}, allow_nan=False) + "\n").encode())
    values = [value for name, number in metrics.items() for value in summary.scalar(name, number).value]
    _write_event(log.board, step, summary={"value": values})


def write_image(
    log: MetricsLog, step: int, name: str, image: UInt8[np.ndarray, "h w c"] | Float[np.ndarray, "h w c"]
) -> None:
    """Appends one image to the TensorBoard file: uint8, or float in [0, 1]."""
    if log.board is None:
        return
    from tensorboardX import summary

    _write_event(log.board, step, summary=summary.image(name, image, dataformats="HWC"))
