"""A run's folder: its lock, its config.json, its metrics.jsonl and TensorBoard files.

    config.json             the whole config, class names and conventions
    checkpoints/<step>/     cfd.checkpoint
    metrics.jsonl           one object a line, by rising step
    tensorboard/            the same scalars, and images

The folder lies on a file system that all processes of the run see, with atomic renames and `flock`.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Float, UInt8

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
LOCK = "lock"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

FREE_FIELDS = (
    "data.path",
    "data.num_workers",
    "data.on_bad_image",
    "data.in_memory",
    "train.num_steps",
    "train.nonfinite_limit",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.log_every_steps",
    "train.sample_every_steps",
    "train.watchdog_seconds",
    "classifier_train.num_steps",
    "mesh",
    "sample",
    "eval",
    "xla",
)
"""What may change between restarts of a run: the state at a step is a function of all the other fields. (`data.path`
is where the data set lies, not which one it is; `on_bad_image` and `nonfinite_limit` say whether a step is reached, not
what it gives; `mesh` moves last bits and no more: of a float32, or of a bfloat16 with that `model.dtype`.)"""


@contextlib.contextmanager
def lock(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the folder for this job: at most one writes there at a time.

    Process 0 locks for all processes of a job, so every process calls it. The operating system frees the lock of a
    process that died. Raises ValueError at once if another live job holds it.
    """
    path = Path(workdir) / LOCK
    held = None
    holder = ""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = open(path, "a+")  # noqa: SIM115  not "w": the file is the holder's until the lock is ours
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            holder = held.read()
            held.close()
            held = None
        except OSError as e:
            held.close()
            raise ValueError(
                f"{path} cannot be locked ({e.strerror}): mount its file system with flock (Lustre: -o flock), or give "
                "another --workdir"
            ) from e
    if not _from_process_0(held is not None):
        raise ValueError(
            f"{os.fspath(workdir)} is {_describe_holder(holder)}: two jobs cannot write to one workdir; stop the other "
            "or give another --workdir"
        )
    try:
        if held is not None:
            held.truncate(0)
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "start_time": started}, held)
            held.flush()
        yield
    finally:
        if held is not None:
            held.truncate(0)
            held.close()


def _describe_holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"locked by pid {holder['pid']} on {holder['host']} since {holder['start_time']}"
    except (ValueError, KeyError, TypeError):
        return "locked by another job that has just started or stops just now"


def _from_process_0(value: bool) -> bool:
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def write_config(workdir: str | os.PathLike[str], config_json: Mapping[str, Any]) -> None:
    """Writes config.json if there is none; otherwise checks that this is the same run.

    Fields of FREE_FIELDS may differ from the file's, which is then rewritten, and all fields in a run that has neither
    a checkpoint nor metrics yet. Every process calls it. Raises ValueError if another field differs, if there are
    checkpoints without a config.json, and if the file of process 0 is not seen by the other processes.
    """
    path = Path(workdir) / CONFIG
    new = json.loads(json.dumps(config_json, allow_nan=False))
    has_steps = any(step.name.isdigit() for step in (Path(workdir) / CHECKPOINTS).glob("*"))
    if jax.process_index() == 0 and not path.exists() and not has_steps:
        write_atomically(path, json.dumps(new, indent=2) + "\n")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("cfd.workdir.write_config")
    if not path.exists() and has_steps:
        raise ValueError(
            f"{os.fspath(workdir)} has checkpoints and no {CONFIG}: put it back, from {CHECKPOINTS}/<step>/meta or a "
            "backup, or give another --workdir"
        )
    if not path.exists():
        raise ValueError(f"{path} was written by process 0 and is not seen here: the workdir must be on a shared disk")
    metrics = Path(workdir) / METRICS
    has_begun = has_steps or (metrics.exists() and metrics.stat().st_size > 0)
    old = check_config(workdir, new) if has_begun else read_config(workdir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("cfd.workdir.write_config.compared")
    if jax.process_index() == 0 and new != old:
        if differences := config_differences(old, new):
            print(
                f"{os.fspath(workdir)} has no checkpoint yet and takes this config: {_some(differences)}.", flush=True
            )
        write_atomically(path, json.dumps(new, indent=2) + "\n")


def check_config(workdir: str | os.PathLike[str], config_json: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json. Raises ValueError if a field outside of FREE_FIELDS differs from `config_json`."""
    old = read_config(workdir)
    if differences := config_differences(old, json.loads(json.dumps(config_json))):
        raise ValueError(
            f"{Path(workdir) / CONFIG} is another run's: {_some(differences)}. Give another --workdir, "
            f"or the same config (only {', '.join(FREE_FIELDS)} may change)"
        )
    return old


def check_images(workdir: str | os.PathLike[str], data: Any) -> None:
    """Raises ValueError unless the run there has images of the size, channels and classes that `config.data` says."""
    there = read_config(workdir)["config"]["data"]
    for name in ("image_size", "channels", "num_classes"):
        if there[name] != data[name]:
            raise ValueError(
                f"{os.fspath(workdir)} was trained with data.{name} = {there[name]}, not {data[name]}: give the config "
                "of its run, or move it away and train it again"
            )


def _some(differences: list[str]) -> str:
    return "; ".join(differences[:4]) + (f" and {len(differences) - 4} more" if len(differences) > 4 else "")


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of config.json. JSON only: no file of a run's folder is ever executed. Raises ValueError."""
    path = Path(workdir) / CONFIG
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: {os.fspath(workdir)} is not the folder of a run") from None
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}): restore it from {CHECKPOINTS}/<step>/meta or a backup") from None
    parts = {"kind": str, "config": dict, "class_names": list}
    content = content if isinstance(content, dict) else {}
    if wrong := [f'"{name}"' for name, kind in parts.items() if not isinstance(content.get(name), kind)]:
        raise ValueError(
            f"{path} has no sound {', '.join(wrong)}: restore it from {CHECKPOINTS}/<step>/meta or a backup"
        )
    return content


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """ "field: old -> new" for every field, outside of FREE_FIELDS, in which two contents of config.json differ."""
    free = tuple(f"config.{field}" for field in FREE_FIELDS)
    a, b = _flatten(old), _flatten(new)
    return [
        f"{name.removeprefix('config.')}: {a.get(name, 'absent')} there, {b.get(name, 'absent')} here"
        for name in (a | b)
        if a.get(name, "absent") != b.get(name, "absent") and not f"{name}.".startswith(tuple(f"{f}." for f in free))
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value)
    return flat


def write_atomically(path: Path, text: str) -> None:
    """The file holds the whole text or what it held before, also after a power cut."""
    tmp = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(tmp, "w") as file:
        file.write(text)
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
    """An OSError of a disk, quota or file that is full is logged, and the run goes on; any other one is raised."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        logging.error("%s was not written: %s", path, e.strerror)


@dataclasses.dataclass
class GrowingFile:
    """A file that only grows. What does not fit on a full disk is kept, and written as soon as there is space."""

    path: Path
    unwritten: bytes = b""

    def write(self, data: bytes) -> None:
        self.unwritten += data
        with despite_a_full_disk(self.path), open(self.path, "ab", buffering=0) as file:
            while self.unwritten:
                self.unwritten = self.unwritten[file.write(self.unwritten) :]


class MetricsLog(NamedTuple):
    """Where scalars and images go. Open on process 0, and a sink without files on the others."""

    lines: GrowingFile | None
    board: GrowingFile | None


def metrics_log(workdir: str | os.PathLike[str], step: int) -> MetricsLog:
    """The log of a run that goes on from `step`: lines of later steps, and a torn last line, are dropped first.

    With a line written before the checkpoint of its step is saved, no step is ever missing or there twice.
    """
    if jax.process_index() != 0:
        return MetricsLog(None, None)
    workdir = Path(workdir)
    _truncate(workdir / METRICS, step)
    os.makedirs(workdir / TENSORBOARD, exist_ok=True)
    name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{socket.gethostname()}"  # TensorBoard reads them in order
    board = GrowingFile(workdir / TENSORBOARD / name)
    _write_event(board, 0, file_version="brain.Event:2")
    # TensorBoard then hides what an earlier start wrote of later steps.
    _write_event(board, step + 1, session_log={"status": "START"})
    return MetricsLog(GrowingFile(workdir / METRICS), board)


def _write_event(board: GrowingFile, step: int, **content: Any) -> None:
    """One record of TensorBoard's: length, check sum, event, check sum. Written at once, unlike by a `SummaryWriter`,
    whose thread dies when a disk is full."""
    # It imports PyTorch where that is installed: 1.3 s and 190 MB.
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    protocol: Any = event_pb2  # its classes are made when it is imported
    data = protocol.Event(wall_time=time.time(), step=step, **content).SerializeToString()
    length = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", masked_crc32c(x)) for x in (length, data))
    board.write(length + next(sums) + data + next(sums))


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
            logging.warning("%s: line %d is torn, dropped: %r", path, number, line[:80])
    if later:
        start = (
            f"the newest checkpoint is of step {step}" if step else "there is no checkpoint, training starts at step 0"
        )
        print(f"{path}: {start}; {later} lines of later steps are dropped.", flush=True)
    new = b"".join(kept)
    if new != old:
        write_atomically(path, new.decode())


def write_metrics(log: MetricsLog, step: int, metrics: Mapping[str, float | int]) -> None:
    """Appends {"step": step, **metrics} as one line of JSON. NaN and Inf, which JSON has not, become null."""
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
    """One image for TensorBoard, uint8 or in [0, 1]."""
    if log.board is None:
        return
    from tensorboardX import summary

    _write_event(log.board, step, summary=summary.image(name, image, dataformats="HWC"))
