"""Checkpoints: one atomic Orbax step holds the state, the data position, the config and digests of every array.

A snapshot is a step that holds the EMA alone. No step is trusted because it is listed: its digests are computed again
from the arrays that were read. A checkpoint that fails this check is moved to checkpoints/quarantine/, and the one
before it is used.
"""

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from cfd.devices import parallel
from cfd.errors import UserError
from cfd.runs.access import check_run_path
from cfd.runs.digest import digests, leaves
from cfd.runs.files import fsync
from cfd.runs.reading import on_all, read_verified, reason_of, seal, some
from cfd.runs.workdir import CHECKPOINTS, SNAPSHOTS, abbreviate

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
    policy: Any
    orbax: ocp.CheckpointManager
    saving: int | None = None
    failed_saves: int = 0


def open_manager(workdir: str | os.PathLike[str], *, keep: int, keep_every: int = 0) -> Manager:
    """The checkpoints of a run: the newest `keep`, and for good those at multiples of `keep_every`, if it is not 0.

    Call it under `access.lock`, on every process. It removes the steps that a killed run left half written or half
    deleted.
    """
    kept = [ocp.checkpoint_managers.LatestN(keep)]
    kept += [ocp.checkpoint_managers.EveryNSteps(keep_every)] if keep_every else []
    return _open(workdir, CHECKPOINTS, ocp.checkpoint_managers.AnyPreservationPolicy(kept))


def open_snapshots(workdir: str | os.PathLike[str]) -> Manager:
    """The snapshots of a run, which are all kept. For the rest, it is like `open_manager`."""
    return _open(workdir, SNAPSHOTS, ocp.checkpoint_managers.LatestN(None))


def _open(workdir: str | os.PathLike[str], name: str, policy: Any) -> Manager:
    check_run_path(workdir)
    directory = Path(workdir).absolute() / name
    return Manager(directory, policy, _open_orbax(directory, policy))


def _open_orbax(directory: Path, policy: Any) -> ocp.CheckpointManager:
    _remove_litter(directory)
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            # Orbax renames an old step into this folder. If it deleted the step in place, a kill could leave a listed
            # step half deleted.
            todelete_subdir=TRASH,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=lambda: _fsync_unfinished(directory)),
            # A checkpoint and a snapshot may be written at the same time.
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name),
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
            logging.warning("%s was not deleted: %s", old, reason_of(e))


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
            f"the state of step {step} is not saved because it has NaN or Inf in {some(nonfinite)}. The last good "
            f"checkpoint in {manager.directory} is step {manager.orbax.latest_step()}; start again to resume from it"
        )
    meta = seal({"step": step, "arrays": arrays, "data_state": data_state, "config": config_json})
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
    if on_all(error is None):
        manager.failed_saves = 0
        _remove_litter(manager.directory)
        return
    manager.failed_saves += 1
    reason = reason_of(error) if error else "another process failed"
    logging.error("checkpoint of step %s was not written in %s: %s", step, manager.directory, reason)
    try:
        manager.orbax.close()
    except Exception as e:  # it closes what it can, and the next statement replaces it
        logging.info("closing after a failed save: %s", reason_of(e))
    manager.orbax = _open_orbax(manager.directory, manager.policy)
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
        logging.error(
            "checkpoint of step %s was not written in %s: %s", manager.saving, manager.directory, reason_of(e)
        )


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
        place = _step_directory(manager.directory, step)
        result = read_verified(place, lambda meta, step=step: _match(meta, abstract_state, step))
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


def _match(meta: dict[str, Any], abstract_state: Any, step: int) -> Any:
    """`abstract_state`, if the step holds exactly its arrays. Raises CheckpointError otherwise."""
    saved = {key: (tuple(shape), dtype) for key, (shape, dtype, _) in meta["arrays"].items()}
    wanted = {key: (tuple(x.shape), str(x.dtype)) for key, x in leaves(abstract_state)}
    if unsharded := [key for key, x in leaves(abstract_state) if x.sharding is None]:
        raise UserError(f"abstract_state has no sharding for {some(unsharded)}: give each ShapeDtypeStruct one")
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


def _step_directory(directory: Path, step: int) -> Path:
    return directory / str(step)
