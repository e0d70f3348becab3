"""Reading a step of a run that is not trusted: its metadata are sealed, and its arrays must have their digests.

Every process calls these functions, and all of them come to the same result.
"""

import contextlib
import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from cfd.devices import parallel
from cfd.errors import UserError
from cfd.runs.digest import wrong_digests
from cfd.runs.workdir import CHECKPOINTS, SNAPSHOTS, abbreviate


def read_verified(place: Path, template: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any]] | str:
    """(arrays, metadata) of the step in the folder `place`, or a string that says how it is damaged.

    `template` makes, from the metadata, the pytree of ShapeDtypeStructs to read; its exceptions are raised. Either all
    processes get arrays, or all of them get a string.
    """
    # Orbax's handlers are called directly because the restore of its manager has barriers, which a process that cannot
    # read a file would never reach.
    meta = _attempt(lambda: _unseal(ocp.JsonCheckpointHandler().restore(epath.Path(place / "meta"))))
    if isinstance(meta, _Damage):
        return meta.reason
    wanted = template(meta)
    handler = ocp.PyTreeCheckpointHandler()
    args = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    tree = _attempt(lambda: handler.restore(epath.Path(place / "state"), args=args))
    if isinstance(tree, _Damage):
        return tree.reason
    wrong = wrong_digests(tree, meta["arrays"])
    if not on_all(not wrong):
        return f"wrong digest of {some(wrong)}" if wrong else "another process read other bytes"
    return tree, meta


def find(workdir: Path, step: int | None, passed_over: Collection[Path]) -> Path | None:
    """The folder of a checkpoint: of the newest, or of `step`, which may also be a snapshot of the EMA.

    Folders in `passed_over` are not considered. None if there is no other. The answer is that of process 0, because a
    job that trains the run may be adding and deleting steps.
    """
    kinds = (CHECKPOINTS,) if step is None else (CHECKPOINTS, SNAPSHOTS)
    found = [
        (kind, number)
        for kind, name in enumerate(kinds)
        for number in reversed(steps_of(workdir / name))
        if step in (None, number) and workdir / name / str(number) not in passed_over
    ]
    kind, number = _of_process_0(found[0] if found else (-1, -1))
    return workdir / kinds[kind] / str(number) if number >= 0 else None


def is_gone(place: Path) -> bool:
    """Whether the folder of a step no longer exists: the job that trains the run has deleted it."""
    return _of_process_0((place.is_dir(), 0))[0] == 0


def steps_of(directory: Path) -> list[int]:
    """The steps in a folder of checkpoints or snapshots, in ascending order."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


def _of_process_0(pair: tuple[int, int]) -> tuple[int, int]:
    if jax.process_count() == 1:
        return pair
    first, second = np.asarray(multihost_utils.broadcast_one_to_all(np.array(pair, np.int32))).tolist()
    return first, second


class _Damage(NamedTuple):
    reason: str


def _attempt(read: Callable[[], Any]) -> Any:
    with _late_reads_logged():
        try:
            result = read()
        except (MemoryError, jax.errors.JaxRuntimeError):  # a fault of this machine, not of the file
            raise
        except Exception as e:  # JSON, TensorStore and Orbax raise ValueError, KeyError, OSError, TypeError ...
            result = _Damage(reason_of(e))
            time.sleep(0.1)  # until the other reads have failed too
        if isinstance(result, _Damage):
            gc.collect()  # reads that never ended complain when they are collected: not in the midst of later work
    if not on_all(not isinstance(result, _Damage)):
        return result if isinstance(result, _Damage) else _Damage("another process could not read it")
    return result


@contextlib.contextmanager
def _late_reads_logged() -> Iterator[None]:
    """Logs, at level debug, the tracebacks of reads that fail because an earlier read failed.

    When an array is unreadable, Orbax closes its event loop while other reads are using it. Each of them then prints a
    traceback, some only when they are collected as garbage, and the one line that matters would be lost among hundreds.
    """
    hook = sys.unraisablehook

    def log(e: Any) -> None:
        if str(e.exc_value) == "Event loop is closed" or isinstance(e.exc_value.__cause__, GeneratorExit):
            logging.debug("a read after the first failed one: %s", e.exc_value)
        else:
            hook(e)

    sys.unraisablehook = log
    try:
        yield
    finally:
        sys.unraisablehook = hook


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
    """JSON with its own SHA-256, for the metadata of a step."""
    content = json.loads(json.dumps(meta, allow_nan=False))
    return content | {"sha256": _sha256(content)}


def _unseal(meta: Mapping[str, Any]) -> dict[str, Any]:
    content = {name: value for name, value in meta.items() if name != "sha256"}
    if meta["sha256"] != _sha256(content):
        raise UserError("wrong SHA-256 of the metadata")
    return content


def _sha256(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def on_all(value: bool) -> bool:
    """Whether `value` is true on every process."""
    return parallel.total(int(value)) == jax.process_count()


def reason_of(error: Exception | str) -> str:
    """An error in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 200 else f"{text[:200]}...")


def some(keys: list[str]) -> str:
    """The first three keys, and the number of the others."""
    return abbreviate(keys, separator=", ", limit=3)
