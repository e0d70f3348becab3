"""The training loop of both networks: build, restore, compile, then fetch, step, log, save and draw."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

from cfd.data.batches import batches
from cfd.data.dataset import Dataset
from cfd.devices import memory, parallel, preemption, progress, seeds, watchdog, xla
from cfd.errors import UserError
from cfd.fields import BEFORE
from cfd.modes.train_step import LossFn, TrainState, initial_state, train_step
from cfd.posthoc_ema import gamma_of
from cfd.runs import checkpoint, log, workdir

CHECK_EVERY = 16
"""Steps from one look at the results of earlier steps to the next. Only there does the host wait for the devices."""
LAG = 8
"""A look leaves out this many of the newest steps, which are the work of the devices in the meantime."""
SLOW_STEP = 0.1
"""From this many seconds per step on, the host stays one step ahead of the devices.

A run that is asked to stop finishes all steps in the queue before it saves, and each of them holds a batch in memory.
"""


class Diverged(UserError, FloatingPointError):
    """Training met too many non-finite steps in a row."""


class Training(NamedTuple):
    """How training proceeds: fields of a config's `train` group, the seed, and how the batches are read."""

    seed: int
    num_steps: int
    batch_size: int
    num_microbatches: int
    ema_decay: float
    ema_warmup: bool
    nonfinite_limit: int
    checkpoint_every_steps: int
    keep_checkpoints: int
    keep_every_steps: int
    snapshot_every_steps: int
    posthoc_ema: tuple[float, ...]
    posthoc_every_steps: int
    log_every_steps: int
    sample_every_steps: int
    flip: bool
    num_workers: int


def fit(
    training: Training,
    folder: str,
    mesh: Mesh,
    dataset: Dataset,
    config_json: dict[str, Any],
    init: Callable[[Array], Any],
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    draw: Callable[[int, Any], np.ndarray | None] | None,
    *,
    allow_fresh_start: bool = False,
    start_from: Callable[[Any], Any] | None = None,
    project: Callable[[Any], Any] | None = None,
    frozen: tuple[Any, ...] = (),
) -> None:
    """Train in the run folder `folder` until `training.num_steps`, or resume there.

    `draw(step, ema)` returns a picture, every `sample_every_steps`; None from it means that it was asked to stop. The
    step is saved before its picture is drawn. A picture that a stop or an error cuts short is not drawn again.
    `start_from(params)` makes the parameters at step 0 of the fresh ones, and the EMA begins equal to them. `project`
    and `frozen` are those of `train_step`.

    Raises ValueError if a run is resumed on other data or with another PRNG and as `seeds.check` does,
    FloatingPointError after `nonfinite_limit` consecutive non-finite steps, `preemption.Stopped` when asked to stop,
    and `preemption.Lost`, without saving, when another job has taken the folder over. After FloatingPointError and
    Stopped, the same call resumes from the newest checkpoint.

    The goodput that is logged is the share of the wall time since the call that was spent in steps. Building,
    restoring, waiting for data, drawing and saving are not part of it, nor is the first step, which compiles.
    """
    started = time.perf_counter()

    # Build: the shapes and shardings of the state, without its arrays.
    group = "distill" if frozen else "classifier_train" if config_json["kind"] == "classifier" else "train"
    name = f"{group}.batch_size" + (" / train.num_microbatches" if training.num_microbatches > 1 else "")
    parallel.check_batch(name, training.batch_size // training.num_microbatches, mesh)
    parallel.say_copies(name, training.batch_size // training.num_microbatches, mesh)
    division = parallel.divide(mesh, training.batch_size, training.num_microbatches)
    key_init, key_steps = jax.random.split(seeds.key(training.seed))
    workdir.write_config(folder, config_json, BEFORE)
    init_state = partial(initial_state, init, optimizer, num_posthoc=len(training.posthoc_ema))
    abstract = parallel.with_shardings(mesh, xla.shapes(init_state, key_init))
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    # Restore: the newest good checkpoint, if there is one.
    manager = checkpoint.open_manager(folder, keep=training.keep_checkpoints, keep_every=training.keep_every_steps)
    restored = checkpoint.restore(manager, abstract, allow_fresh_start=allow_fresh_start)
    start, state, skipped = 0, None, 0
    if restored is not None:
        start, state, data_state = restored
        skipped = data_state["skipped_images"]
        check_same_data(folder, config_json["kind"], data_state, dataset)
        check_same_prng(folder, data_state)
        if jax.process_index() == 0:
            print(f"Resuming {folder} at step {start} of {training.num_steps}.", flush=True)
        progress.report(f"step {start}")
        if start > training.num_steps and jax.process_index() == 0:
            print(f"The run is past {group}.num_steps = {training.num_steps}: nothing is left to train.", flush=True)
        if start >= training.num_steps:
            checkpoint.close(manager)
            return
    if jax.process_index() == 0:
        print(f"{sum(x.size for x in jax.tree.leaves(abstract.params)):,} parameters.", flush=True)

    # Compile: before a new state exists, because the compiler needs gigabytes of its own. A thread compiles the program
    # of the new state while JAX traces the step on one core, and then imports what the log needs.
    with ThreadPoolExecutor(1) as thread:
        making = None
        if state is None:
            making = thread.submit(xla.lowered(init_state, key_init, once=True, out_shardings=shardings).compile)
        thread.submit(log.prepare)
        step_fn = compile_step(
            training, mesh, division, dataset, abstract, shardings, key_steps, loss_fn, optimizer, project, frozen
        )
    if making is not None:
        state, making = making.result()(key_init), None
        if start_from is not None:
            params = start_from(state.params)
            state = state._replace(params=params, ema=jax.tree.map(jnp.copy, params))

    # Train.
    stream = batches(
        dataset,
        seed=training.seed,
        batch_size=training.batch_size,
        flip=training.flip,
        start_step=start,
        rows=division.rows,
        counted=division.counted,
        num_workers=training.num_workers,
    )
    unchecked: deque[tuple[int, dict[str, Any]]] = deque()
    last_logged, clock, waited, productive = start, time.perf_counter(), 0.0, 0.0
    checked, slow = clock, True
    step, stop = start, False
    metrics_log = log.metrics_log(folder, start)
    with closing(stream), closing_manager(manager), ExitStack() as at_end:
        at_end.callback(log.close, metrics_log)
        stores = open_stores(training, folder, at_end)
        for step in tqdm(range(start + 1, training.num_steps + 1), "train", unit="step", disable=None):
            # Fetch a batch.
            watchdog.alive(slow=step == start + 1)
            before = time.perf_counter()
            batch = parallel.global_batch(division, next(stream))
            fetched = time.perf_counter()
            # A wait for data matters only if the devices have meanwhile finished all steps.
            idle = not unchecked or unchecked[-1][1]["loss"].is_ready()
            waited += fetched - before if idle else 0.0

            # Step. The host runs ahead of the devices, so that they have work while it waits for data or is slow.
            state, metrics = step_fn(state, batch, key_steps, frozen)
            if step == start + 1:
                at_end.enter_context(memory.frozen_objects())
            if slow and unchecked:
                jax.block_until_ready(unchecked[-1][1]["loss"])
            unchecked.append((step, metrics))
            if step % CHECK_EVERY == 0:
                check_finite(unchecked, LAG, training.nonfinite_limit, manager)
                now = time.perf_counter()
                slow = step - CHECK_EVERY < start or now - checked > SLOW_STEP * CHECK_EVERY
                checked = now

            # Decide what follows this step.
            stop = preemption.requested()
            last = step == training.num_steps
            is_logged = last or step % training.log_every_steps == 0
            is_drawn = draw is not None and (last or step % training.sample_every_steps == 0)
            is_kept = training.keep_every_steps > 0 and step % training.keep_every_steps == 0
            is_saved = stop or last or is_drawn or is_kept or step % training.checkpoint_every_steps == 0
            due = [store for store in stores if step % store.every_steps == 0]
            if is_logged or is_saved or due:
                check_finite(unchecked, 1, training.nonfinite_limit, manager)
            values = {name: value.item() for name, value in jax.device_get(metrics).items()} if is_logged else {}
            now = time.perf_counter()
            productive += now - (fetched if idle else before) if step > start + 1 else 0.0
            skipped_images = skipped + parallel.total(stream.skipped) if is_logged or is_saved else 0

            # Log.
            if is_logged:
                values["images_per_second"] = (step - last_logged) * training.batch_size / (now - clock)
                values["data_wait"] = waited / (now - clock)
                values["goodput"] = productive / (now - started)
                values["skipped_images"] = skipped_images
                log.write_metrics(metrics_log, step, values)
                last_logged, clock, waited = step, time.perf_counter(), 0.0

            # Save. A checkpoint waits for the snapshots up to its step, because a run that resumes from it would not
            # write them again.
            if is_saved or due:
                check_finite(unchecked, 0, training.nonfinite_limit, manager)
            for store in due:
                preemption.check_held()
                part, of_data = {store.part: getattr(state, store.part)}, {"data": dataset.identity}
                checkpoint.save(store.manager, step, part, data_state=of_data, config_json=config_json)
            if is_saved:
                for store in stores:
                    checkpoint.wait(store.manager)
                log.flush(metrics_log)
                preemption.check_held()
                data_state = data_state_of(dataset, step, skipped_images)
                checkpoint.save(manager, step, state, data_state=data_state, config_json=config_json)
                if jax.process_index() == 0:
                    tqdm.write(f"Saving step {step} of {training.num_steps}.")
                progress.report(f"step {step}")

            # Draw.
            if draw is not None and is_drawn and not stop:
                picture = draw(step, state.ema)
                memory.trim()  # the memory of the sampler
                if picture is None:
                    stop = True
                else:
                    log.write_image(metrics_log, step, "samples", picture)

            # Stop.
            if stop:
                break
        watchdog.alive(slow=True)
    if step > start and jax.process_index() == 0:
        seconds = time.perf_counter() - started
        print(f"{step - start} steps in {seconds:.1f} s, goodput {productive / seconds:.1%}.", flush=True)
    if stop:
        raise preemption.Stopped(f"Stopped at step {step} of {training.num_steps}, saved in {folder}")


class Store(NamedTuple):
    """Snapshots of a part of the state, such as the EMA, and the steps from one to the next."""

    part: str
    every_steps: int
    manager: checkpoint.Manager


def open_stores(training: Training, folder: str, at_end: ExitStack) -> list[Store]:
    """The snapshots that a run writes, which `at_end` closes."""
    stores = []
    if every_steps := training.snapshot_every_steps:
        stores.append(Store("ema", every_steps, checkpoint.open_snapshots(folder)))
        at_end.enter_context(closing_manager(stores[-1].manager))
    if training.posthoc_ema:
        stores.append(Store("posthoc", posthoc_every_steps(training), checkpoint.open_posthoc(folder)))
        at_end.enter_context(closing_manager(stores[-1].manager))
    return stores


def posthoc_every_steps(training: Any) -> int:
    """The steps from one snapshot of the averages to the next, for a `Training` or a config's group `train`."""
    return training.posthoc_every_steps or -(-training.num_steps // 32)


def compile_step(
    training: Training,
    mesh: Mesh,
    division: parallel.Division,
    dataset: Dataset,
    abstract: TrainState,
    shardings: Any,
    key: Array,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    project: Callable[[Any], Any] | None = None,
    frozen: tuple[Any, ...] = (),
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The compiled step (state, batch, key, frozen) -> (state, metrics), which takes over the memory of the state."""
    replicated = mesh.shape["fsdp"] == 1
    step_fn = partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        ema_decay=training.ema_decay,
        ema_warmup=training.ema_warmup,
        num_microbatches=training.num_microbatches,
        replicated=replicated,
        join_small=replicated and mesh.devices.flat[0].platform == "cpu",
        project=project,
        posthoc_gammas=tuple(map(gamma_of, training.posthoc_ema)),
    )
    batch = parallel.batch_shapes(division, (dataset.image_size, dataset.image_size, dataset.channels))
    return xla.compiled(step_fn, abstract, batch, key, frozen, donate_argnums=0, out_shardings=(shardings, None))


def data_state_of(dataset: Dataset, step: int, skipped_images: int) -> dict[str, Any]:
    """The part of a checkpoint that says where the batches and the noise of the next step come from."""
    return {
        "next_step": step,
        "skipped_images": skipped_images,
        "num_images": len(dataset),
        "data": dataset.identity,
        "prng": seeds.PRNG,
    }


def check_same_data(folder: str, kind: str, data_state: dict[str, Any], dataset: Dataset) -> None:
    """Raises ValueError if a run is resumed on other data, as far as its checkpoint says what it was trained on.

    Checkpoints of earlier versions record only the number of images, or not even that.
    """
    num_images = data_state.get("num_images", len(dataset))
    identity = data_state.get("data", dataset.identity)
    if num_images != len(dataset):
        other = f"{num_images:,} images, and the data set now has {len(dataset):,}"
    elif identity != dataset.identity:
        other = (
            f"another data set of the same {num_images:,} images in number: names, sizes or labels of its files differ "
            f"(identity {identity[:12]} there, {dataset.identity[:12]} here)"
        )
    else:
        return
    begin = f"give another --workdir, which --init_from={folder} lets begin with the weights of this run"
    again = f"move {folder} away and train the {kind} again"
    raise UserError(
        f"{folder} was trained on {other}. Resume on the same data (data.path), or "
        + (begin if kind == "diffusion" else again)
    )


def check_same_prng(folder: str, data_state: dict[str, Any]) -> None:
    """Raises ValueError if a run drew its noise with another PRNG. Checkpoints of earlier versions do not record it.

    Those versions drew with JAX's default. If that is now another PRNG, a line says that the noise changes.
    """
    prng, default = data_state.get("prng"), jax.config.jax_default_prng_impl  # pyright: ignore[reportAttributeAccessIssue]
    if prng not in (None, seeds.PRNG):
        raise UserError(
            f"{folder} was trained with the PRNG {prng}, and this version draws with {seeds.PRNG}: resume with the "
            "version of cfd that began it, or give another --workdir"
        )
    if prng is None and default != seeds.PRNG["impl"] and jax.process_index() == 0:
        print(
            f"{folder} is of an earlier version, which drew with JAX's default PRNG, here {default!r}. From this step "
            f"on, its noise is drawn with {seeds.PRNG['impl']!r}.",
            flush=True,
        )


@contextmanager
def closing_manager(manager: checkpoint.Manager) -> Iterator[None]:
    """Waits for the last save when the block ends, and raises if that save failed, unless an error ended the block."""
    try:
        yield
    except BaseException:
        checkpoint.abandon(manager)
        raise
    checkpoint.close(manager)


def check_finite(
    unchecked: deque[tuple[int, dict[str, Any]]], newest: int, limit: int, manager: checkpoint.Manager
) -> None:
    """Looks at all steps of `unchecked` but the `newest` newest, for whose results it waits, and removes them.

    All processes must call this at the same steps. Raises FloatingPointError at the first of `limit` or more
    consecutive non-finite steps, and names the last good checkpoint.
    """
    due = [unchecked.popleft() for _ in range(len(unchecked) - newest)]
    in_a_row = jax.device_get([metrics["nonfinite_in_a_row"] for _, metrics in due])
    for (step, metrics), count in zip(due, in_a_row, strict=True):
        if count >= limit:
            good = checkpoint.latest_step(manager)
            raise Diverged(
                f"the loss or its gradient is not finite at step {step} (loss {float(metrics['loss'])}), {limit} in a "
                f"row; the last good checkpoint is {'none' if good is None else f'step {good}'} of "
                f"{manager.directory}: look at the data, or start a new --workdir with a lower train.learning_rate"
            )
