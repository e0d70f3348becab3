"""Checkpoints: one atomic step of Orbax holds the state, the data iterator, the config and a digest of every array.

A step is never trusted because it is there: its digests are computed again from what was read. A step that fails is
set aside, in checkpoints/quarantine/, and the one before it is taken.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Float, Int

from cfd.guidance import without_null
from cfd.unet import UNet
from cfd.workdir import CHECKPOINTS, config_differences, fsync, read_config

QUARANTINE = "quarantine"
TRASH = "trash"
MAX_FAILED_SAVES = 3


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or read, and what to do about it."""


@dataclasses.dataclass
class Manager:
    """An Orbax manager and what is known of its saves. It changes, because a save ends after the call that began it."""

    directory: Path
    keep: int
    orbax: ocp.CheckpointManager
    saving: int | None = None
    failed_saves: int = 0


def open_manager(workdir: str | os.PathLike[str], *, keep: int) -> Manager:
    """The checkpoints of a run, of which the newest `keep` are kept. Call it under `workdir.lock`, on every process.

    What a killed run left half written or half deleted is removed.
    """
    directory = Path(workdir).absolute() / CHECKPOINTS
    return Manager(directory, keep, _open_orbax(directory, keep))


def _open_orbax(directory: Path, keep: int) -> ocp.CheckpointManager:
    _remove_litter(directory)
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            todelete_subdir=TRASH,  # a rename: a kill never leaves a listed step half deleted
            async_options=ocp.options.AsyncOptions(post_finalization_callback=lambda: _fsync_unfinished(directory)),
        ),
    )


def _fsync_unfinished(directory: Path) -> None:
    """Just before the rename that makes a step: Orbax syncs its arrays, and not its small files."""
    for step in directory.glob("*.orbax-checkpoint-tmp*"):
        for path in (*step.rglob("*"), step):
            fsync(path)


def _remove_litter(directory: Path) -> None:
    """Half-written and old steps. Call it while no save is in progress."""
    if jax.process_index() != 0:
        return
    for old in (*directory.glob("*.orbax-checkpoint-tmp*"), *(directory / TRASH).glob("*")):
        try:
            # Under a name of its own first: a failed save may still be writing, and add files to the old one, or make
            # it anew. What is made later goes before the next save, or when the folder is next opened.
            renamed = old.with_name(f"{old.name}.{time.time_ns()}")
            old.rename(renamed)
            shutil.rmtree(renamed)
        except OSError as e:  # it is tried again after the next save
            logging.warning("%s was not deleted: %s", old, _reason(e))


def save(manager: Manager, step: int, state: Any, *, data_state: dict[str, Any], config_json: dict[str, Any]) -> None:
    """Begins to write a step; the state is copied before it returns. A step that is there already is left as it is.

    A save that fails (disk full) is logged, at the latest by the next call, and the run goes on; after
    MAX_FAILED_SAVES in a row it raises CheckpointError. So does a state with NaN or Inf, which is never written.
    """
    wait(manager)
    if step in manager.orbax.all_steps():
        return
    arrays, nonfinite = _describe(state)
    if nonfinite:
        raise CheckpointError(
            f"the state of step {step} is not saved: NaN or Inf in {_some(nonfinite)}. The last good checkpoint of "
            f"{manager.directory} is step {manager.orbax.latest_step()}"
        )
    meta = _seal({"step": step, "arrays": arrays, "data_state": data_state, "config": config_json})
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    if manager.failed_saves:
        _remove_litter(manager.directory)  # what the failed save still wrote when it had been removed
    manager.saving = step
    try:
        manager.orbax.save(step, args=args, force=True)
    except Exception as e:  # Orbax and TensorStore have no common class
        _finish(manager, e)


def latest_step(manager: Manager) -> int | None:
    """The newest step on the disk; waits for the save in progress."""
    wait(manager)
    return manager.orbax.latest_step()


def wait(manager: Manager) -> None:
    """Blocks until the save in progress, if any, is on the disk or has failed."""
    if manager.saving is None:
        return
    try:
        manager.orbax.wait_until_finished()
        error = None if _step_directory(manager.directory, manager.saving).is_dir() else "no step was written"
    except Exception as e:  # as above
        error = e
    _finish(manager, error)


def _finish(manager: Manager, error: Exception | str | None) -> None:
    step, manager.saving = manager.saving, None
    if _all_agree(error is None):
        manager.failed_saves = 0
        _remove_litter(manager.directory)
        return
    manager.failed_saves += 1
    reason = _reason(error) if error else "another process failed"
    logging.error("checkpoint of step %s was not written, %s: %s", step, manager.directory, reason)
    try:
        manager.orbax.close()
    except Exception as e:  # it closes what it can; it is replaced by the next line
        logging.info("closing after a failed save: %s", _reason(e))
    manager.orbax = _open_orbax(manager.directory, manager.keep)
    if manager.failed_saves >= MAX_FAILED_SAVES:
        raise CheckpointError(
            f"{manager.failed_saves} saves in a row failed in {manager.directory}, the last of step {step}: {reason}. "
            f"The last good checkpoint is step {manager.orbax.latest_step()}; free space and start again"
        )


def close(manager: Manager) -> None:
    """Waits for the save in progress and closes. Raises CheckpointError if that last save failed."""
    last = manager.saving
    wait(manager)
    failed = manager.failed_saves > 0 and last is not None
    manager.orbax.close()
    if failed:
        raise CheckpointError(f"the last checkpoint, step {last}, was not written in {manager.directory}: see the log")


def abandon(manager: Manager) -> None:
    """Closes after an error that may be of this process alone: the last save is waited for, its failure only logged.

    `close` would wait for the other processes to agree on it, which they never do while they wait for this one.
    """
    try:
        manager.orbax.close()
    except Exception as e:  # Orbax and TensorStore have no common class
        logging.error("checkpoint of step %s was not written, %s: %s", manager.saving, manager.directory, _reason(e))


def restore(
    manager: Manager, abstract_state: Any, *, allow_fresh_start: bool = False
) -> tuple[int, Any, dict[str, Any]] | None:
    """(step, state, data_state) of the newest step whose digests are right; None if there is no step at all.

    `abstract_state` is the state's pytree with a ShapeDtypeStruct and a sharding for every array: any mesh will do.
    Damaged steps newer than the one taken are moved to checkpoints/quarantine/. Raises CheckpointError if all steps
    are damaged (unless `allow_fresh_start`: then they are all moved, and the result is None), or if the state is of
    another structure, shape or dtype than the template; then nothing is moved.
    """
    wait(manager)
    damaged: list[tuple[int, str]] = []
    found = None
    for step in sorted(manager.orbax.all_steps(), reverse=True):
        result = _read_verified(manager.directory, step, lambda meta, step=step: _match(meta, abstract_state, step))
        if isinstance(result, str):
            logging.warning("checkpoint of step %d in %s is damaged, skipped: %s", step, manager.directory, result)
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
        _sync("cfd.checkpoint.quarantine")
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


def _read_verified(
    directory: Path, step: int, template: Callable[[dict[str, Any]], Any]
) -> tuple[Any, dict[str, Any]] | str:
    """(arrays, meta) of a step, or the reason for which it is damaged: the same kind of answer on every process.

    `template` makes the pytree to read from the meta data; what it raises is raised. Handlers are used in place of
    the manager, whose restore has barriers that a process with an unreadable file would never reach.
    """
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
    arrays, _ = _describe(tree)
    wrong = [key for key, value in arrays.items() if value != meta["arrays"][key]]
    if not _all_agree(not wrong):
        return f"the digest of {_some(wrong)} is not the one saved" if wrong else "damaged as another process reads it"
    return tree, meta


class _Damage(NamedTuple):
    reason: str


def _attempt(read: Callable[[], Any]) -> Any:
    with _late_reads_logged():
        try:
            result = read()
        except (MemoryError, jax.errors.JaxRuntimeError):  # of this machine, not of the file
            raise
        except Exception as e:  # JSON, TensorStore and Orbax raise ValueError, KeyError, OSError, TypeError ...
            result = _Damage(_reason(e))
            time.sleep(0.1)  # for the reads that are still to fail
    if not _all_agree(not isinstance(result, _Damage)):
        return result if isinstance(result, _Damage) else _Damage("not readable by another process")
    return result


@contextlib.contextmanager
def _late_reads_logged() -> Iterator[None]:
    """At the first unreadable array Orbax closes its event loop under the other reads, each of which then prints a
    traceback that says so, hundreds of lines beside the one that matters: logged for debugging instead."""
    hook = sys.unraisablehook

    def log(e: Any) -> None:
        if str(e.exc_value) == "Event loop is closed":
            logging.debug("a read after the first that failed: %s", e.exc_value)
        else:
            hook(e)

    sys.unraisablehook = log
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _match(meta: dict[str, Any], abstract_state: Any, step: int) -> Any:
    """The template, if the step holds exactly its arrays."""
    held = {key: (tuple(shape), dtype) for key, (shape, dtype, _) in meta["arrays"].items()}
    wanted = {key: (tuple(x.shape), str(x.dtype)) for key, x in _leaves(abstract_state)}
    if unplaced := [key for key, x in _leaves(abstract_state) if x.sharding is None]:
        raise ValueError(f"abstract_state has no sharding for {_some(unplaced)}: give each ShapeDtypeStruct one")
    differ = sorted(key for key in wanted.keys() & held.keys() if wanted[key] != held[key])
    faults = [
        *(f"{key} is {_text(held[key])} in the checkpoint and {_text(wanted[key])} in the state" for key in differ),
        *(f"{key} is not in the checkpoint" for key in sorted(wanted.keys() - held.keys())),
        *(f"{key} of the checkpoint is not in the state" for key in sorted(held.keys() - wanted.keys())),
    ]
    if faults:
        raise CheckpointError(
            f"step {step} is of another model or optimizer: {_some(faults, '; ')}. Use the config that wrote it, or "
            "another --workdir"
        )
    return abstract_state


def _text(shape_dtype: tuple[tuple[int, ...], str]) -> str:
    return f"{shape_dtype[1]}{list(shape_dtype[0])}"


class Loaded(NamedTuple):
    """A trained model, ready to sample from."""

    eps_fn: Callable[[Float[Array, "b h w c"], Float[Array, "b"], Int[Array, "b"]], Float[Array, "b h w c"]]
    params: Any
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    config: dict[str, Any]
    step: int


def load(workdir: str | os.PathLike[str], step: int | None = None, *, sharding: Sharding | None = None) -> Loaded:
    """The model of a run's folder, with the EMA weights of its newest good step, or of `step`.

    `eps_fn(z, logsnr, labels)` is a `jax.tree_util.Partial`: it can also be an argument of a jitted function, its
    weights then being arguments too. It raises ValueError for labels that are not below the number of classes, and
    for ∅ where the model never saw it (p_uncond = 0; under `jit` the rows of ∅ are then NaN).
    The weights are on one device unless `sharding` says otherwise. Of several processes every one must call it. Raises
    ValueError (no run, no such step) and CheckpointError (damage).
    """
    params, config_json, step = load_ema(workdir, "diffusion", step, sharding=sharding)
    config = config_json["config"]
    num_classes = config["model"]["num_classes"]
    model: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in config["model"].items()}
    net = UNet(**model)
    channels = config["data"]["channels"]
    always_labelled = num_classes > 0 and config["train"]["p_uncond"] == 0

    def eps_fn(params: Any, z: Array, logsnr: Array, labels: Array) -> Array:
        if not isinstance(labels, Tracer) and np.max(np.asarray(labels), initial=-1) >= num_classes:
            raise ValueError(
                f"label {np.max(np.asarray(labels))} is not below the number of classes, {num_classes}; -1 is no class"
            )

        def eps(z: Array, logsnr: Array, labels: Array) -> Array:
            outputs: Any = net.apply({"params": params}, z, logsnr, labels)
            return outputs[..., :channels]  # what follows is a learned variance, kept at import

        return (without_null(eps) if always_labelled else eps)(z, logsnr, labels)

    size = config["data"]["image_size"]
    return Loaded(
        eps_fn=jax.tree_util.Partial(eps_fn, params),
        params=params,
        image_shape=(size, size, channels),
        num_classes=num_classes,
        class_names=tuple(config_json["class_names"]),
        config=config,
        step=step,
    )


def load_ema(
    workdir: str | os.PathLike[str], kind: str, step: int | None = None, *, sharding: Sharding | None = None
) -> tuple[Any, dict[str, Any], int]:
    """(EMA weights, content of config.json, step) of a run whose "kind" is `kind`; reads only, and only the EMA.

    A damaged newest step is passed over with a warning; one that is asked for raises CheckpointError.
    """
    workdir = os.path.expanduser(workdir)
    config_json = read_config(workdir)
    if config_json["kind"] != kind:
        opened_by = {"diffusion": "cfd.checkpoint.load", "classifier": "cfd.classifier.load_classifier"}
        raise ValueError(
            f"{workdir} holds a {config_json['kind']} run; a {kind} run was expected: give its "
            f"folder, or open this one with {opened_by.get(config_json['kind'], 'the program that wrote it')}"
        )
    directory = Path(workdir).absolute() / CHECKPOINTS
    steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal())
    if not steps or (step is not None and step not in steps):
        raise ValueError(f"{directory} has no step{'' if step is None else f' {step}'}; its steps are {steps}")
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])

    def template(meta: dict[str, Any]) -> Any:
        if differences := config_differences(meta["config"], config_json):
            raise ValueError(f"step {meta['step']} was not written with {workdir}/config.json: {_some(differences)}")
        ema = {
            tuple(key.split("/")): jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for key, (shape, dtype, _) in meta["arrays"].items()
            if key.startswith("ema/")
        }
        return unflatten_dict(ema)

    damaged = []
    for candidate in reversed(steps) if step is None else [step]:
        result = _read_verified(directory, candidate, template)
        if not isinstance(result, str):
            tree, _ = result
            return tree["ema"], config_json, candidate
        logging.warning("checkpoint of step %d in %s is damaged, passed over: %s", candidate, directory, result)
        damaged.append(f"step {candidate}: {result}")
    raise CheckpointError(f"no undamaged checkpoint in {directory} ({'; '.join(damaged)})")


def _describe(tree: Any) -> tuple[dict[str, list[Any]], list[str]]:
    """{key: [shape, dtype, digest]} of every array, and the keys of those with NaN or Inf.

    Each process sums over its own shards, then all add up: no array is gathered.
    """
    leaves = _leaves(tree)
    for key, x in leaves:
        if not isinstance(x, Array):
            raise ValueError(f"{key} of the state is a {type(x).__name__}; a state is made of jax arrays")
    sums = jax.device_get([_shard_sums(x) for _, x in leaves])
    totals = np.stack([np.sum(np.reshape(s, (-1, 3)), axis=0, dtype=np.uint32) for s in sums])
    if jax.process_count() > 1:
        everywhere = np.asarray(multihost_utils.process_allgather(totals)).sum(axis=0, dtype=np.uint32)
        local = np.array([[x.is_fully_addressable] for _, x in leaves])
        totals = np.where(local, totals, everywhere)
    arrays = {
        key: [list(x.shape), str(x.dtype), f"{h:08x}{g:08x}"]
        for (key, x), (h, g, _) in zip(leaves, totals, strict=True)
    }
    return arrays, [key for (key, _), (*_, nonfinite) in zip(leaves, totals, strict=True) if nonfinite]


def _shard_sums(x: Array) -> list[Any]:
    """`_sums` of every shard that is this process's to save, not yet fetched from the device."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype.itemsize > 4:
        raise ValueError(f"an array of the state is {x.dtype}; digests are of types of up to 32 bits")
    strides = np.array([math.prod(x.shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)], np.uint32)
    sums = []
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            offsets = np.array([span.start or 0 for span in shard.index], np.uint32)
            if shard.device.platform == "cpu":  # the same bits without a compilation for every shape
                with np.errstate(invalid="ignore"):  # bfloat16 warns of the NaN that is looked for
                    sums.append(_sums(np.asarray(shard.data), offsets, strides, np))
            else:
                sums.append(_sums_on_device(shard.data, offsets, strides))
    return sums


def _sums(x: Any, offsets: Any, strides: Any, xp: Any) -> Any:
    """Two sums of mixed (bits, position in the global array) over a shard, and the number of NaN and Inf; uint32 [3].

    Sums modulo 2^32 are the same in any order, hence for any sharding. Each term of each sum is a bijection of the
    value's bits, so that a change of one value is always seen.
    """
    nonfinite = xp.sum(~xp.isfinite(x), dtype=xp.uint32) if jnp.issubdtype(x.dtype, jnp.inexact) else xp.uint32(0)
    v = x.view({1: xp.uint8, 2: xp.uint16, 4: xp.uint32}[x.dtype.itemsize]).astype(xp.uint32).reshape(-1)
    i = xp.zeros(x.shape, xp.uint32)
    for axis, size in enumerate(x.shape):
        along = (xp.arange(size, dtype=xp.uint32) + offsets[axis]) * strides[axis]
        i = i + along.reshape([size if a == axis else 1 for a in range(x.ndim)])
    i = i.reshape(-1)
    h = (v ^ (i * xp.uint32(0x9E3779B1))) * xp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * xp.uint32(0xC2B2AE35)
    g = (v + i) * xp.uint32(0x27D4EB2F)
    g = (g ^ (g >> 15)) * xp.uint32(0x165667B1)
    return xp.stack([xp.sum(h ^ (h >> 16), dtype=xp.uint32), xp.sum(g ^ (g >> 12), dtype=xp.uint32), nonfinite])


_sums_on_device = jax.jit(partial(_sums, xp=jnp))


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """(key, leaf) of a pytree; the key is "ema/conv_in/kernel", the same for a NamedTuple and a dict."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def _seal(meta: dict[str, Any]) -> dict[str, Any]:
    meta = json.loads(json.dumps(meta, allow_nan=False))
    return meta | {"sha256": _sha256(meta)}


def _unseal(meta: Mapping[str, Any]) -> dict[str, Any]:
    content = {name: value for name, value in meta.items() if name != "sha256"}
    if meta["sha256"] != _sha256(content):
        raise ValueError("the SHA-256 of its meta data is not the one saved")
    return content


def _sha256(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _step_directory(directory: Path, step: int) -> Path:
    return directory / str(step)


def _all_agree(yes: bool) -> bool:
    """Whether it is so on every process."""
    if jax.process_count() == 1:
        return yes
    return bool(np.all(multihost_utils.process_allgather(np.int32(yes))))


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _reason(error: Exception | str) -> str:
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 200 else f"{text[:200]}...")


def _some(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return separator.join(names[:3]) + more
