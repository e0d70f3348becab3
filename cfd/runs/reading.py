"""Reading a step of a run that is not trusted: its metadata are sealed, and its arrays must have their digests.

Every process calls these functions, and all of them come to the same result. Each file is read by one process, which
sends its content to the others.
"""

import contextlib
import gc
import hashlib
import json
import logging as python_logging
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from cfd.devices import parallel
from cfd.errors import UserError, reason_of
from cfd.runs import files, steps
from cfd.runs.digest import leaves, wrong_digests
from cfd.runs.files import AnyPath
from cfd.runs.steps import steps_of
from cfd.runs.workdir import CHECKPOINTS, SNAPSHOTS, abbreviate

READ_BYTES = 2**30
"""A process reads arrays of up to this many bytes at a time, or a larger one alone."""
SENT_BYTES = 2**26
"""Arrays are sent to the other processes in groups of up to this many bytes."""
CONTEXT = {
    "cache_pool#nodes": {"total_bytes_limit": 10**8},  # of the index of the arrays, which each array needs
    "gcs_request_retries": {"max_retries": 10},  # about 3 minutes
}
"""TensorStore's settings for reading."""


def read_verified(place: AnyPath, template: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any]] | str:
    """(arrays, metadata) of the step in the folder `place`, or a string that says how it is damaged.

    `template` makes, from the metadata, the pytree of ShapeDtypeStructs to read; its exceptions are raised. Either all
    processes get arrays, or all of them get a string. Raises UserError if a bucket refuses to be read.
    """
    result = _read_step(place, template)
    if isinstance(place, Path) or not isinstance(result, str):
        return result
    # A service that does not answer is not a damaged step, which would be moved away.
    refusal = None
    try:
        steps.check_readable(place)
    except Exception as e:  # the exceptions of gcsfs and TensorStore have no common class
        refusal = e
    if not on_all(refusal is None):
        reason = reason_of(refusal) if refusal else "another process could not read it"
        raise UserError(f"{place} cannot be read: {reason}. Nothing was changed: start again when the bucket answers")
    return _read_step(place, template)


def _read_step(place: AnyPath, template: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any]] | str:
    meta = _attempt(lambda: _unseal(_json(place / "meta" / "metadata")))
    if isinstance(meta, _Damage):
        return meta.reason
    if not _same_on_all(_sha256(meta)):
        return "another process read other metadata"
    tree = _read(place / "state", template(meta))
    if isinstance(tree, _Damage):
        return tree.reason
    wrong = wrong_digests(tree, meta["arrays"])
    if not on_all(not wrong):
        return f"wrong digest of {some(wrong)}" if wrong else "another process read other bytes"
    return tree, meta


def find(workdir: AnyPath, step: int | None, passed_over: Collection[AnyPath]) -> AnyPath | None:
    """The folder of a checkpoint: of the newest, or of `step`, which may also be a snapshot of the EMA.

    Folders in `passed_over` are not considered. None if there is no other. The answer is that of process 0, because a
    job that trains the run may be adding and deleting steps.
    """
    kinds = (CHECKPOINTS,) if step is None else (CHECKPOINTS, SNAPSHOTS)

    def first() -> list[int]:
        for kind, name in enumerate(kinds):
            for number in reversed(steps_of(workdir / name)):
                if step in (None, number) and workdir / name / str(number) not in passed_over:
                    return [kind, number]
        return []

    found = from_process_0(first)
    return workdir / kinds[found[0]] / str(found[1]) if found else None


def is_gone(place: AnyPath) -> bool:
    """Whether a step no longer exists: the job that trains the run has deleted it."""
    return from_process_0(lambda: [int(steps.is_committed(place))]) == [0]


def from_process_0(numbers: Callable[[], Sequence[int]]) -> list[int]:
    """The integers that `numbers` returns on process 0, which alone calls it. Raises OSError everywhere if it fails."""
    if jax.process_count() == 1:
        return list(numbers())
    found, failure = [], None
    if jax.process_index() == 0:
        try:
            found = list(numbers())
        except Exception as e:  # the exceptions of gcsfs and TensorStore have no common class
            failure = e
    count = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if failure else len(found))))
    if count < 0:
        raise OSError(f"process 0 failed: {reason_of(failure)}" if failure else "see process 0")
    padded = np.array(found or [0] * count, np.int32)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tolist() if count else []


class _Damage(NamedTuple):
    reason: str


def _read(place: AnyPath, wanted: Any) -> Any:
    """The arrays of a pytree of ShapeDtypeStructs, or _Damage.

    Each array is read as a whole by one process, whatever its sharding. The parts in which it was saved are then read
    once, and need not be those in which it is wanted.
    """
    named = leaves(wanted)
    arrays = [x for _, x in named]
    sizes = [x.size * x.dtype.itemsize for x in arrays]
    result: list[Any] = [None] * len(named)
    for number, x in enumerate(arrays):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # NumPy has no such type
            result[number] = _attempt(lambda number=number: _key(place, wanted, number))
            if isinstance(result[number], _Damage):
                return result[number]
    others = [number for number, x in enumerate(result) if x is None]
    for batch in _groups(others, sizes, READ_BYTES * jax.process_count()):
        owners = _owners(batch, sizes)
        own = {number: named[number] for number in batch if owners[number] == jax.process_index()}
        read = _attempt(lambda own=own: _contents(place, own))
        if isinstance(read, _Damage):
            return read
        for group in _groups(batch, sizes, SENT_BYTES):
            mine = {at: read.pop(number) for at, number in enumerate(group) if number in read}
            for number, value in zip(group, parallel.united([arrays[n] for n in group], mine), strict=True):
                x = arrays[number]
                result[number] = jax.make_array_from_callback(x.shape, x.sharding, value.__getitem__)
    return jax.tree.unflatten(jax.tree.structure(wanted), result)


def _key(place: AnyPath, wanted: Any, number: int) -> jax.Array:
    """The typed PRNG key that is leaf `number` of a pytree."""
    arrays, structure = jax.tree.flatten(wanted)
    tree = jax.tree.unflatten(structure, [x if at == number else None for at, x in enumerate(arrays)])
    kinds = ocp.checkpoint_utils.construct_restore_args(tree)
    args = ocp.args.PyTreeRestore(tree, restore_args=kinds, partial_restore=True)
    # Orbax's handler is called directly because the restore of its manager has barriers, which a process that cannot
    # read a file would never reach.
    return jax.tree.leaves(ocp.PyTreeCheckpointHandler().restore(epath.Path(place), args=args))[0]


def _contents(place: AnyPath, own: Mapping[int, tuple[str, Any]]) -> dict[int, np.ndarray]:
    """{number: content} of arrays, given as {number: (key, ShapeDtypeStruct)}, as they are in the files of Orbax.

    Orbax itself would read the gaps between the arrays too, up to 1 MB each, which are the arrays of other processes.
    """
    if not own:
        return {}
    driver = "zarr3" if _json(place / "_METADATA").get("use_zarr3") else "zarr"
    context = tensorstore.Context(CONTEXT)
    nodes = {"driver": "ocdbt", "base": files.store(place).spec().to_json(), "cache_pool": "cache_pool#nodes"}
    opened = {
        number: tensorstore.open(
            {"driver": driver, "kvstore": {**nodes, "path": key.replace("/", ".") + "/"}}, read=True, context=context
        )
        for number, (key, _) in own.items()
    }
    read = {}
    for number, future in opened.items():
        array, (key, wanted) = future.result(), own[number]
        if (array.shape, array.dtype.numpy_dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"{key} is {array.dtype.numpy_dtype}{list(array.shape)} in the files")
        read[number] = array.read()
    return {number: future.result() for number, future in read.items()}


def _groups(numbers: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive groups of the numbers. The sum of the sizes of a group is up to `limit`, unless it has one member."""
    groups, total = [], limit
    for number in numbers:
        if total + sizes[number] > limit:
            groups.append([])
            total = 0
        groups[-1].append(number)
        total += sizes[number]
    return groups


def _owners(numbers: Sequence[int], sizes: Sequence[int]) -> dict[int, int]:
    """{number: process that reads it}, the same on every process: the largest first, to the process with the least."""
    loads = [0] * jax.process_count()
    owners = {}
    for number in sorted(numbers, key=lambda number: -sizes[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += sizes[number]
    return owners


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
    fsspec logs each exception that it raises three times.
    """
    hook, prefetcher = sys.unraisablehook, python_logging.getLogger("fsspec.prefetcher")

    def log(e: Any) -> None:
        if str(e.exc_value) == "Event loop is closed" or isinstance(e.exc_value.__cause__, GeneratorExit):
            logging.debug("a read after the first failed one: %s", e.exc_value)
        else:
            hook(e)

    sys.unraisablehook = log
    prefetcher.disabled = True
    try:
        yield
    finally:
        prefetcher.disabled = False
        sys.unraisablehook = hook


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
    """JSON with its own SHA-256, for the metadata of a step."""
    content = json.loads(json.dumps(meta, allow_nan=False))
    return content | {"sha256": _sha256(content)}


def _json(path: AnyPath) -> Any:
    if (content := files.read_bytes(path)) is None:
        raise FileNotFoundError(f"there is no {path}")
    return json.loads(content)


def _unseal(meta: Mapping[str, Any]) -> dict[str, Any]:
    content = {name: value for name, value in meta.items() if name != "sha256"}
    if meta["sha256"] != _sha256(content):
        raise UserError("wrong SHA-256 of the metadata")
    return content


def _sha256(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _same_on_all(digest: str) -> bool:
    """Whether every process has the same SHA-256."""
    if jax.process_count() == 1:
        return True
    rows = np.asarray(multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8)))
    return bool((rows == rows[0]).all())


def on_all(value: bool) -> bool:
    """Whether `value` is true on every process."""
    return parallel.total(int(value)) == jax.process_count()


def some(keys: list[str]) -> str:
    """The first three keys, and the number of the others."""
    return abbreviate(keys, separator=", ", limit=3)
