"""Checkpoints: one atomic Orbax step holds the state, the data position, the config and a digest of every array.

No step is trusted because it is listed: its digests are computed again from the arrays that were read. A step that
fails this check is moved to checkpoints/quarantine/, and the step before it is used.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from cfd.devices import parallel
from cfd.errors import UserError
from cfd.runs.digest import digests, leaves
from cfd.runs.files import fsync
from cfd.runs.workdir import CHECKPOINTS, abbreviate

QUARANTINE = "quarantine"
TRASH = "trash"
UNFINISHED = f"*{ocp.path.atomicity_types.TMP_DIR_SUFFIX}*"
MAX_FAILED_SAVES = 3


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message says what to do about it."""


@dataclasses.dataclass
class Manager:
    """An Orbax manager and the state of its saves.

    It is mutable because a save continues after the call that began it: `saving` is the step that is being written, and
    `failed_saves` counts the saves in a row that failed.
    """

    directory: Path
    keep: int
    orbax: ocp.CheckpointManager
    saving: int | None = None
    failed_saves: int = 0


def open_manager(workdir: str | os.PathLike[str], *, keep: int) -> Manager:
    """The checkpoints of a run, of which the newest `keep` are kept. Call it under `workdir.lock`, on every process.

    It removes the steps that a killed run left half written or half deleted.
    """
    directory = Path(workdir).absolute() / CHECKPOINTS
    return Manager(directory, keep, _open_orbax(directory, keep))


def _open_orbax(directory: Path, keep: int) -> ocp.CheckpointManager:
    _remove_litter(directory)
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            # Orbax renames an old step into this folder. If it deleted the step in place, a kill could leave a listed
            # step half deleted.
            todelete_subdir=TRASH,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=lambda: _fsync_unfinished(directory)),
        ),
    )


def _fsync_unfinished(directory: Path) -> None:
    """Flushes the files of a step to the disk. Orbax calls this just before the rename that makes the step visible.

    Orbax itself syncs the arrays but not the small files: after a power cut, the newest step could have empty metadata.
    """
    for step in directory.glob(UNFINISHED):
        for path in (*step.rglob("*"), step):
            fsync(path)


def _remove_litter(directory: Path) -> None:
    """Deletes half-written steps, and old steps from the trash. Call it while no save is in progress.

    Orbax empties neither its trash nor, until it is opened again, the folders of failed saves, which would keep a full
    disk full.
    """
    if jax.process_index() != 0:
        return
    for old in (*directory.glob(UNFINISHED), *(directory / TRASH).glob("*")):
        try:
            # The folder is renamed first because a failed save may still be adding files to it. If that save makes the
            # folder again, it is deleted before the next save, or when the checkpoints are next opened.
            renamed = old.with_name(f"{old.name}.{time.time_ns()}")
            old.rename(renamed)
            shutil.rmtree(renamed)
        except OSError as e:  # the next call tries again
            logging.warning("%s was not deleted: %s", old, _reason(e))


def save(manager: Manager, step: int, state: Any, *, data_state: dict[str, Any], config_json: dict[str, Any]) -> None:
    """Begins to write a step. The state is copied before this returns. A step that exists already is left unchanged.

    A save that fails, for example because the disk is full, is logged, at the latest by the next call, and the run
    continues. Raises CheckpointError after MAX_FAILED_SAVES failures in a row. It also does so for a state with NaN or
    Inf, which is never written.
    """
    wait(manager)
    if step in manager.orbax.all_steps():
        return
    arrays, nonfinite = digests(state)
    if nonfinite:
        raise CheckpointError(
            f"the state of step {step} is not saved because it has NaN or Inf in {_some(nonfinite)}. The last good "
            f"checkpoint in {manager.directory} is step {manager.orbax.latest_step()}; start again to resume from it"
        )
    meta = _seal({"step": step, "arrays": arrays, "data_state": data_state, "config": config_json})
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    if manager.failed_saves:
        _remove_litter(manager.directory)  # files that the failed save wrote after its folder was removed
    manager.saving = step
    try:
        manager.orbax.save(step, args=args, force=True)
    except Exception as e:  # the exceptions of Orbax and TensorStore have no common class
        _finish(manager, e)


def latest_step(manager: Manager) -> int | None:
    """The newest step on the disk, or None. Waits for the save in progress."""
    wait(manager)
    return manager.orbax.latest_step()


def wait(manager: Manager) -> None:
    """Waits until the save in progress, if any, is on the disk or has failed."""
    if manager.saving is None:
        return
    try:
        manager.orbax.wait_until_finished()
        error = None if _step_directory(manager.directory, manager.saving).is_dir() else "no step was written"
    except Exception as e:  # no common class, as in `save`
        error = e
    _finish(manager, error)


def _finish(manager: Manager, error: Exception | str | None) -> None:
    step, manager.saving = manager.saving, None
    if _on_all(error is None):
        manager.failed_saves = 0
        _remove_litter(manager.directory)
        return
    manager.failed_saves += 1
    reason = _reason(error) if error else "another process failed"
    logging.error("checkpoint of step %s was not written in %s: %s", step, manager.directory, reason)
    try:
        manager.orbax.close()
    except Exception as e:  # it closes what it can, and the next statement replaces it
        logging.info("closing after a failed save: %s", _reason(e))
    manager.orbax = _open_orbax(manager.directory, manager.keep)
    if manager.failed_saves >= MAX_FAILED_SAVES:
        raise CheckpointError(
            f"{manager.failed_saves} saves in a row failed in {manager.directory}, the last one that of step {step}: "
            f"{reason}. The last good checkpoint is step {manager.orbax.latest_step()}; free space and start again"
        )


def close(manager: Manager) -> None:
    """Waits for the save in progress, then closes the manager. Raises CheckpointError if that last save failed."""
    last = manager.saving
    wait(manager)
    failed = manager.failed_saves > 0 and last is not None
    manager.orbax.close()
    if failed:
        raise CheckpointError(f"the last checkpoint, step {last}, was not written in {manager.directory}: see the log")


def abandon(manager: Manager) -> None:
    """Closes the manager after an error that perhaps only this process has. A failure of the last save is only logged.

    `close` would deadlock: it waits for all processes to agree on the last save, while they wait for this one.
    """
    try:
        manager.orbax.close()
    except Exception as e:  # no common class, as in `save`
        logging.error("checkpoint of step %s was not written in %s: %s", manager.saving, manager.directory, _reason(e))


def restore(
    manager: Manager, abstract_state: Any, *, allow_fresh_start: bool = False
) -> tuple[int, Any, dict[str, Any]] | None:
    """(step, state, data_state) of the newest step whose digests are correct, or None if there is no step at all.

    `abstract_state` is the pytree of the state with a ShapeDtypeStruct, including a sharding, for every array; the mesh
    may differ from the one that saved. Damaged steps newer than the one returned are moved to checkpoints/quarantine/.
    Raises CheckpointError, and moves nothing, if all steps are damaged, or if structure, shapes or dtypes differ from
    `abstract_state`. With `allow_fresh_start`, if all steps are damaged, all are moved and the result is None.
    """
    wait(manager)
    damaged: list[tuple[int, str]] = []
    found = None
    for step in sorted(manager.orbax.all_steps(), reverse=True):
        result = read_verified(manager.directory, step, lambda meta, step=step: _match(meta, abstract_state, step))
        if isinstance(result, str):
            logging.warning("checkpoint of step %d in %s is damaged and skipped: %s", step, manager.directory, result)
            damaged.append((step, result))
        else:
            found = (step, *result)
            break
    if damaged and found is None and not allow_fresh_start:
        raise CheckpointError(
            f"all checkpoints in {manager.directory} are damaged ("
            + "; ".join(f"step {step}: {reason}" for step, reason in damaged)
            + "). Restore the folder from a copy, or start again from step 0 with --allow_fresh_start"
        )
    for step, _ in damaged:
        _quarantine(manager.directory, step)
    if damaged:
        parallel.barrier("cfd.checkpoint.quarantine")
        manager.orbax.reload()
    if found is None:
        return None
    step, state, meta = found
    return step, state, meta["data_state"]


def _quarantine(directory: Path, step: int) -> None:
    if jax.process_index() != 0:
        return
    place = directory / QUARANTINE
    place.mkdir(exist_ok=True)
    number = 0
    while (target := place / f"{step}.{number}").exists():
        number += 1
    os.rename(_step_directory(directory, step), target)


def read_verified(
    directory: Path, step: int, template: Callable[[dict[str, Any]], Any]
) -> tuple[Any, dict[str, Any]] | str:
    """(arrays, metadata) of a step, or a string that says how it is damaged.

    `template` makes, from the metadata, the pytree of ShapeDtypeStructs to read; its exceptions are raised. Every
    process must call this. Either all of them get arrays, or all of them get a string.
    """
    # Orbax's handlers are called directly because the restore of its manager has barriers, which a process that cannot
    # read a file would never reach.
    path = _step_directory(directory, step)
    meta = _attempt(lambda: _unseal(ocp.JsonCheckpointHandler().restore(epath.Path(path / "meta"))))
    if isinstance(meta, _Damage):
        return meta.reason
    wanted = template(meta)
    handler = ocp.PyTreeCheckpointHandler()
    args = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    tree = _attempt(lambda: handler.restore(epath.Path(path / "state"), args=args))
    if isinstance(tree, _Damage):
        return tree.reason
    arrays, _ = digests(tree)
    wrong = [key for key, value in arrays.items() if value != meta["arrays"][key]]
    if not _on_all(not wrong):
        return f"wrong digest of {_some(wrong)}" if wrong else "another process read other bytes"
    return tree, meta


class _Damage(NamedTuple):
    reason: str


def _attempt(read: Callable[[], Any]) -> Any:
    with _late_reads_logged():
        try:
            result = read()
        except (MemoryError, jax.errors.JaxRuntimeError):  # a fault of this machine, not of the file
            raise
        except Exception as e:  # JSON, TensorStore and Orbax raise ValueError, KeyError, OSError, TypeError ...
            result = _Damage(_reason(e))
            time.sleep(0.1)  # until the other reads have failed too
    if not _on_all(not isinstance(result, _Damage)):
        return result if isinstance(result, _Damage) else _Damage("another process could not read it")
    return result


@contextlib.contextmanager
def _late_reads_logged() -> Iterator[None]:
    """Logs, at level debug, the tracebacks of reads that fail because an earlier read failed.

    When an array is unreadable, Orbax closes its event loop while other reads are using it. Each of them then prints a
    traceback, and the one line that matters would be lost among hundreds.
    """
    hook = sys.unraisablehook

    def log(e: Any) -> None:
        if str(e.exc_value) == "Event loop is closed":
            logging.debug("a read after the first failed one: %s", e.exc_value)
        else:
            hook(e)

    sys.unraisablehook = log
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _match(meta: dict[str, Any], abstract_state: Any, step: int) -> Any:
    """`abstract_state`, if the step holds exactly its arrays. Raises CheckpointError otherwise."""
    saved = {key: (tuple(shape), dtype) for key, (shape, dtype, _) in meta["arrays"].items()}
    wanted = {key: (tuple(x.shape), str(x.dtype)) for key, x in leaves(abstract_state)}
    if unsharded := [key for key, x in leaves(abstract_state) if x.sharding is None]:
        raise UserError(f"abstract_state has no sharding for {_some(unsharded)}: give each ShapeDtypeStruct one")
    differ = sorted(key for key in wanted.keys() & saved.keys() if wanted[key] != saved[key])
    faults = [
        *(f"{key} is {_text(saved[key])} in the checkpoint and {_text(wanted[key])} in the state" for key in differ),
        *(f"{key} is not in the checkpoint" for key in sorted(wanted.keys() - saved.keys())),
        *(f"{key} of the checkpoint is not in the state" for key in sorted(saved.keys() - wanted.keys())),
    ]
    if faults:
        raise CheckpointError(
            f"step {step} was written by another model or optimizer: {abbreviate(faults, limit=3)}. Use the config "
            "that wrote it, or another --workdir"
        )
    return abstract_state


def _text(shape_dtype: tuple[tuple[int, ...], str]) -> str:
    return f"{shape_dtype[1]}{list(shape_dtype[0])}"


def _seal(meta: dict[str, Any]) -> dict[str, Any]:
    meta = json.loads(json.dumps(meta, allow_nan=False))
    return meta | {"sha256": _sha256(meta)}


def _unseal(meta: Mapping[str, Any]) -> dict[str, Any]:
    content = {name: value for name, value in meta.items() if name != "sha256"}
    if meta["sha256"] != _sha256(content):
        raise UserError("wrong SHA-256 of the metadata")
    return content


def _sha256(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _step_directory(directory: Path, step: int) -> Path:
    return directory / str(step)


def _on_all(value: bool) -> bool:
    """Whether `value` is true on every process."""
    return parallel.total(int(value)) == jax.process_count()


def _reason(error: Exception | str) -> str:
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 200 else f"{text[:200]}...")


def _some(keys: list[str]) -> str:
    return abbreviate(keys, separator=", ", limit=3)
