"""Checkpoints: one atomic Orbax step holds the state, the data position, the config and digests of every array.

A snapshot is a step that holds the EMA alone, or the averages of `cfd.runs.posthoc`. No step is trusted because it is
listed: its digests are computed again from the arrays that were read. A checkpoint that fails this check is moved to
checkpoints/quarantine/, and the one before it is used.

A step on a disk becomes visible by a rename. For a step in a bucket, see `cfd.runs.steps`. There, the job that holds
the lease of the run keeps the list of its steps itself, because Orbax's manager would ask every process for listings.
"""

import contextlib
import dataclasses
import gc
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from cfd.devices import parallel, watchdog
from cfd.errors import UserError, os_error_of, reason_of, root_reason
from cfd.runs import files, steps
from cfd.runs.access import check_run_path, still_held
from cfd.runs.digest import digests, leaves
from cfd.runs.files import AnyPath
from cfd.runs.reading import from_process_0, on_all, read_verified, seal, some
from cfd.runs.workdir import CHECKPOINTS, POSTHOC, SNAPSHOTS, abbreviate

MAX_FAILED_SAVES = 3
SAVE_SECONDS = 600
"""A save to a bucket that takes longer has failed. TensorStore asks a busy service again for about 15 minutes."""
RELEASE_MS = 60_000
"""How long process 0 waits for the other processes to hear that a save has failed."""


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message says what to do about it."""


@dataclasses.dataclass
class Manager:
    """An Orbax manager and the state of its saves.

    It is mutable because a save continues after the call that began it: `saving` is the step that is being written, and
    `failed_saves` counts the saves in a row that failed. `failure` says why the last one did, and what to do. For a
    bucket, `orbax` only saves. `bucket_steps` are the steps that count, `litter` are steps to be deleted, and `failed`
    those of failed saves, which may still add files. All of this is the same on every process. `reached` are the
    barriers that the save has reached on this process.
    """

    directory: AnyPath
    keep: int | None
    keep_every: int
    orbax: Any
    saving: int | None = None
    failed_saves: int = 0
    failure: str = ""
    bucket_steps: list[int] = dataclasses.field(default_factory=list)
    litter: set[int] = dataclasses.field(default_factory=set)
    failed: set[int] = dataclasses.field(default_factory=set)
    reached: set[str] = dataclasses.field(default_factory=set)


def open_manager(workdir: str | os.PathLike[str], *, keep: int, keep_every: int = 0) -> Manager:
    """The checkpoints of a run: the newest `keep`, and for good those at multiples of `keep_every`, if it is not 0.

    Call it under `access.lock`, on every process. It removes the steps that a killed run left half written or half
    deleted.
    """
    return _open(workdir, CHECKPOINTS, keep, keep_every)


def open_snapshots(workdir: str | os.PathLike[str]) -> Manager:
    """The snapshots of a run, which are all kept. For the rest, it is like `open_manager`."""
    return _open(workdir, SNAPSHOTS, None, 0)


def open_posthoc(workdir: str | os.PathLike[str]) -> Manager:
    """The stored averages of a run, from which `cfd.runs.posthoc` reconstructs others; like `open_snapshots`."""
    return _open(workdir, POSTHOC, None, 0)


def _open(workdir: str | os.PathLike[str], name: str, keep: int | None, keep_every: int) -> Manager:
    check_run_path(workdir)
    directory = files.place(workdir, name)
    if isinstance(directory, Path):
        steps.remove_unfinished(directory)
        return Manager(directory, keep, keep_every, _open_orbax(directory, keep, keep_every, set()))
    try:
        there = from_process_0(lambda: steps.cleaned(directory))
    except Exception as e:  # the exceptions of gcsfs and TensorStore have no common class
        raise CheckpointError(f"{directory} cannot be read: {reason_of(e)}") from e
    reached = set()
    orbax = _open_orbax(directory, keep, keep_every, reached)
    return Manager(directory, keep, keep_every, orbax, reached=reached, bucket_steps=there)


def _open_orbax(directory: AnyPath, keep: int | None, keep_every: int, reached: set[str]) -> Any:
    # A checkpoint and a snapshot may be written at the same time.
    processes = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name)
    if not isinstance(directory, Path):
        sync = ocp.multihost.get_barrier_sync_fn()

        def reach(*, key: str, timeout_ms: int) -> None:
            reached.add(key)
            sync(key=key, timeout_ms=timeout_ms)

        in_background = ocp.options.AsyncOptions(
            timeout_secs=SAVE_SECONDS,
            barrier_sync_fn=reach,
            # Orbax calls this just before it writes the commit file.
            post_finalization_callback=lambda: still_held(directory),
        )
        composite = ocp.CompositeOptions(multiprocessing_options=processes, async_options=in_background)
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler("state", "meta", composite_options=composite),
            async_options=in_background,
            multiprocessing_options=processes,
        )
    kept = [ocp.checkpoint_managers.LatestN(keep)]
    kept += [ocp.checkpoint_managers.EveryNSteps(keep_every)] if keep_every else []
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(kept),
            # Orbax renames an old step into this folder. If it deleted the step in place, a kill could leave a listed
            # step half deleted.
            todelete_subdir=steps.TRASH,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=lambda: steps.sync_unfinished(directory)),
            multiprocessing_options=processes,
        ),
    )


def _tidy(manager: Manager) -> None:
    """Deletes what is no longer needed. Call it on every process, while no save is in progress."""
    directory = manager.directory
    if isinstance(directory, Path):
        steps.remove_unfinished(directory)
        return
    if manager.litter or manager.failed:
        # A step may be there although its last request, or its deletion, seemed to fail.
        try:
            manager.bucket_steps = from_process_0(lambda: steps.steps_of(directory))
        except Exception as e:  # no common class, as in `_open`; the next call tries again
            logging.warning("%s was not read: %s", directory, reason_of(e))
            return
    there, keep = manager.bucket_steps, manager.keep
    kept = [
        step
        for number, step in enumerate(there)
        if keep is None or number >= len(there) - keep or (manager.keep_every and step % manager.keep_every == 0)
    ]
    manager.bucket_steps = kept
    manager.litter = {*manager.litter, *there} - {*kept}
    unwanted = sorted(manager.litter | (manager.failed - {*kept}))

    def delete() -> list[int]:
        still_held(directory)  # a job that has lost its lease would delete what the next job writes
        return steps.deleted(directory, unwanted)

    try:
        manager.litter -= {*(from_process_0(delete) if unwanted else ())}
    except Exception as e:  # no common class, as in `_open`
        logging.warning("nothing was deleted in %s: %s", directory, reason_of(e))


def save(manager: Manager, step: int, state: Any, *, data_state: dict[str, Any], config_json: dict[str, Any]) -> None:
    """Begins to write a step. The state is copied before this returns. A step that exists already is left unchanged.

    A save that fails, for example because the disk is full, is logged, at the latest by the next call, and the run
    continues. Raises CheckpointError after MAX_FAILED_SAVES failures in a row. It also does so for a state with NaN or
    Inf, which is never written.
    """
    wait(manager)
    if step in _steps(manager):
        return
    arrays, nonfinite = digests(state)
    if nonfinite:
        raise CheckpointError(
            f"the state of step {step} is not saved because it has NaN or Inf in {some(nonfinite)}. The last good "
            f"checkpoint in {manager.directory} is {_newest_in_words(manager)}; start again to resume from it"
        )
    meta = seal({"step": step, "arrays": arrays, "data_state": data_state, "config": config_json})
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    manager.saving = step
    manager.reached.clear()
    try:
        if isinstance(manager.directory, Path):
            if manager.failed_saves:  # it may have written files after its folder was removed
                steps.remove_unfinished(manager.directory)
            manager.orbax.save(step, args=args, force=True)
        else:
            from_process_0(lambda: _prepare(manager, step))
            manager.orbax.save(manager.directory / str(step), args=args, force=True)
    except Exception as e:  # the exceptions of Orbax and TensorStore have no common class
        _finish(manager, step, e)


def _prepare(manager: Manager, step: int) -> list[int]:
    still_held(manager.directory)
    return steps.make_room(manager.directory, step, step in manager.failed)


def latest_step(manager: Manager) -> int | None:
    """The newest step that is written, or None. Waits for the save in progress."""
    wait(manager)
    return _newest(manager)


def _newest(manager: Manager) -> int | None:
    return max(_steps(manager), default=None)


def _newest_in_words(manager: Manager) -> str:
    newest = _newest(manager)
    return "none" if newest is None else f"step {newest}"


def _steps(manager: Manager) -> list[int]:
    """The steps that are written."""
    return list(manager.orbax.all_steps()) if isinstance(manager.directory, Path) else manager.bucket_steps


def wait(manager: Manager) -> None:
    """Waits until the save in progress, if any, is written or has failed."""
    if (step := manager.saving) is None:
        return
    is_local = isinstance(manager.directory, Path)
    if not is_local:
        watchdog.alive(slow=True)
    try:
        _wait_orbax(manager, step)
        looks = is_local or jax.process_index() == 0
        is_there = not looks or steps.is_committed(manager.directory / str(step))
        error = None if is_there else OSError("no step was written")
    except Exception as e:  # no common class, as in `save`
        error = e
    _finish(manager, step, error)


def _wait_orbax(manager: Manager, step: int) -> None:
    """Waits for the save in progress. If it fails in a bucket on process 0, the other processes need not wait longer.

    Process 0 goes to the barriers of Orbax that it has not reached, which it may because it alone commits a step.
    """
    try:
        manager.orbax.wait_until_finished()
    except Exception:
        if not isinstance(manager.directory, Path) and jax.process_index() == 0:
            for name in ("async_write_complete", "async_commit_complete"):
                key = f"{manager.directory.name}_{name}.{step}"
                if key not in manager.reached:
                    with contextlib.suppress(jax.errors.JaxRuntimeError):  # it only saves time
                        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=RELEASE_MS)
        raise


def _finish(manager: Manager, step: int, error: Exception | None) -> None:
    manager.saving = None
    if on_all(error is None):
        manager.failed_saves = 0
        if not isinstance(manager.directory, Path):
            manager.bucket_steps = sorted({*manager.bucket_steps, step})
        _tidy(manager)
        return
    manager.failed_saves += 1
    reason = root_reason(error) if error else "another process failed"
    logging.error("checkpoint of step %s was not written in %s: %s", step, manager.directory, reason, exc_info=error)
    try:
        manager.orbax.close()
    except Exception as e:  # it closes what it can, and the next statement replaces it
        logging.info("closing after a failed save: %s", reason_of(e))
    manager.failed.add(step)
    _tidy(manager)
    manager.orbax = _open_orbax(manager.directory, manager.keep, manager.keep_every, manager.reached)
    gc.collect()  # writes that never ended complain when they are collected: not in the midst of later work
    on_disk, good = isinstance(manager.directory, Path), _newest_in_words(manager)
    remedy = files.how_to_write(os_error_of(error)) if on_disk else "let this job write to the bucket"
    manager.failure = f"{reason}. The last good checkpoint is {good}; {remedy} and start again"
    if manager.failed_saves >= MAX_FAILED_SAVES:
        failed = f"{manager.failed_saves} saves in a row failed in {manager.directory}"
        raise CheckpointError(f"{failed}, the last one that of step {step}: {manager.failure}")


def close(manager: Manager) -> None:
    """Waits for the save in progress, then closes the manager. Raises CheckpointError if that last save failed."""
    last = manager.saving
    wait(manager)
    failed = manager.failed_saves > 0 and last is not None
    manager.orbax.close()
    if failed:
        failed = f"the last checkpoint, step {last}, was not written in {manager.directory}"
        raise CheckpointError(f"{failed}: {manager.failure}")


def abandon(manager: Manager) -> None:
    """Closes the manager after an error that perhaps only this process has. A failure of the last save is only logged.

    `close` would deadlock: it waits for all processes to agree on the last save, while they wait for this one.
    """
    try:
        if manager.saving is not None:
            _wait_orbax(manager, manager.saving)
        manager.orbax.close()
    except Exception as e:  # no common class, as in `save`
        logging.error(
            "checkpoint of step %s was not written in %s: %s", manager.saving, manager.directory, root_reason(e)
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
    for step in sorted(_steps(manager), reverse=True):
        place = manager.directory / str(step)
        result = read_verified(place, lambda meta, step=step: _match(meta, abstract_state, step))
        if isinstance(result, str):
            logging.warning("checkpoint of step %d in %s is damaged and skipped: %s", step, manager.directory, result)
            damaged.append((step, result))
        else:
            found = (step, *result)
            break
    if found is None and not allow_fresh_start:
        if damaged:
            raise CheckpointError(
                f"all checkpoints in {manager.directory} are damaged ("
                + "; ".join(f"step {step}: {reason}" for step, reason in damaged)
                + "). Restore the folder from a copy, or start again from step 0 with --allow_fresh_start"
            )
        # Steps in a bucket that do not count would be hidden by a fresh start.
        if others := from_process_0(lambda: steps.uncommitted(manager.directory)):
            raise CheckpointError(
                f"{steps.about_uncommitted(manager.directory, others)}; or start again from step 0 with "
                "--allow_fresh_start"
            )
    if damaged:
        _quarantine(manager, [step for step, _ in damaged])
    if found is None:
        return None
    step, state, meta = found
    return step, state, meta["data_state"]


def _quarantine(manager: Manager, damaged: list[int]) -> None:
    def move() -> list[int]:
        still_held(manager.directory)
        for step in damaged:
            steps.set_aside(manager.directory, step)
        return []

    try:
        from_process_0(move)
    except Exception as e:  # no common class, as in `_open`
        raise CheckpointError(
            f"steps {damaged} in {manager.directory} are damaged and were not moved to {steps.QUARANTINE}: "
            f"{reason_of(e)}. Move or delete them, and start again"
        ) from e
    if isinstance(manager.directory, Path):
        parallel.barrier("cfd.checkpoint.quarantine")
        manager.orbax.reload()
    else:
        manager.bucket_steps = [step for step in manager.bucket_steps if step not in damaged]


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
