"""Training: the state, one pure step, and a linear loop that resumes where it stopped."""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from cfd import checkpoint, data, generate, parallel, preemption, watchdog, workdir, xla
from cfd.classifier import Classifier, classifier_loss
from cfd.config import Config, describe
from cfd.layers import written
from cfd.losses import eps_loss
from cfd.unet import UNet

LossFn = Callable[[Array, Any, Array, Array], Array]
"""(key, params, x [B, H, W, C], labels [B]) -> scalar loss, the mean over the batch."""


class TrainState(NamedTuple):
    """All that a step changes. Float32 but for the counts, which are int32 scalars."""

    step: Array
    params: Any
    ema: Any
    opt_state: Any
    nonfinite_steps: Array
    nonfinite_in_a_row: Array


def initial_state(init: Callable[[Array], Any], optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """Step 0: fresh parameters, an EMA equal to them, an empty optimizer."""
    params = init(key)
    count = jnp.zeros((), jnp.int32)
    return TrainState(count, params, jax.tree.map(jnp.copy, params), optimizer.init(params), count, count)


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    key: Array,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    ema_warmup: bool,
    num_microbatches: int,
    replicated: bool,
    join_vectors: bool,
) -> tuple[TrainState, dict[str, Array]]:
    """One step on the mean loss of the global batch, its randomness `fold_in(key, step)`.

    A step whose loss or gradient is not finite leaves parameters, EMA and optimizer as they were, and is counted.
    With `ema_warmup` the EMA's decay at step t is at most (1 + t) / (10 + t), as in TensorFlow's
    ExponentialMovingAverage: in a short run it would else hold a part of the random start. `replicated` says that every
    device holds all parameters. `join_vectors` is for a CPU, see `joined`.
    """
    key = jax.random.fold_in(key, state.step)
    loss, grads = _loss_and_grads(state.params, batch, key, loss_fn, num_microbatches)
    grads = row_major(grads) if replicated else grads
    update = partial(_update, optimizer=optimizer, ema_decay=ema_decay, ema_warmup=ema_warmup)
    return joined(update, state, loss, grads) if join_vectors else update(state, loss, grads)


def _update(
    state: TrainState,
    loss: Array,
    grads: Any,
    *,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    ema_warmup: bool,
) -> tuple[TrainState, dict[str, Array]]:
    grad_norm = global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    finite = jax.lax.optimization_barrier(jnp.isfinite(loss) & jnp.isfinite(grad_norm))

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jax.lax.select(finite, n, o), new, old)

    # Behind the barriers `finite` and the new parameters are read; without them XLA computes them again for each array,
    # the parameters on a CPU only.
    params = written(keep(optax.apply_updates(state.params, updates), state.params))
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step)) if ema_warmup else ema_decay
    ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params)
    skipped = 1 - finite.astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=params,
        ema=keep(ema, state.ema),
        opt_state=keep(opt_state, state.opt_state),
        nonfinite_steps=state.nonfinite_steps + skipped,
        nonfinite_in_a_row=skipped * (state.nonfinite_in_a_row + 1),
    )
    metrics = dict(
        loss=loss,
        grad_norm=grad_norm,
        nonfinite_steps=state.nonfinite_steps,
        nonfinite_in_a_row=state.nonfinite_in_a_row,
    )
    return state, metrics


def joined(update: Callable[..., Any], state: TrainState, loss: Array, grads: Any) -> Any:
    """`update(state, loss, grads)`, with all vectors of the parameters in one, and so in the EMA and the optimizer.

    Two thirds of the arrays of a U-Net are vectors, and a thousandth of its parameters: one by one, their loops are a
    fifth of a training step's program on a CPU. On a GPU each would be copied by a kernel of its own, and arrays in
    parts would be gathered.
    """
    leaves, structure = jax.tree.flatten(state.params)
    ends = np.cumsum([x.size for x in leaves if x.ndim == 1], dtype=int)

    def is_like_params(part: Any) -> bool:
        return jax.tree.structure(part) == structure

    def join(part: Any) -> Any:
        if not is_like_params(part):
            return part
        arrays = jax.tree.leaves(part)
        vectors = [x for x in arrays if x.ndim == 1]
        return [written(jnp.concatenate([jnp.zeros(0, jnp.float32), *vectors])), *(x for x in arrays if x.ndim != 1)]

    def take_apart(part: Any) -> Any:
        if not isinstance(part, list):
            return part
        vectors, others = iter(jnp.split(written(part[0]), ends)), iter(part[1:])
        return jax.tree.unflatten(structure, [next(vectors if x.ndim == 1 else others) for x in leaves])

    state, grads = jax.tree.map(join, (state, grads), is_leaf=is_like_params)
    state, metrics = update(state, loss, grads)
    return jax.tree.map(take_apart, state, is_leaf=lambda part: isinstance(part, list)), metrics


def row_major(grads: Any) -> Any:
    """`grads`, on a GPU in the layout of the parameters.

    cuDNN's gradients of kernels have another, in which XLA would also compute the optimizer: each of its arrays would
    be transposed, and transposed back. Not for arrays in parts: the constraint gathers them.
    """

    def one(g: Array) -> Array:
        return with_layout_constraint(g, Layout(tuple(range(g.ndim))))

    return jax.lax.platform_dependent(grads, cuda=partial(jax.tree.map, one), default=lambda grads: grads)


def _loss_and_grads(
    params: Any, batch: dict[str, Array], key: Array, loss_fn: LossFn, num_microbatches: int
) -> tuple[Array, Any]:
    value_and_grad = jax.value_and_grad(loss_fn, argnums=1)
    if num_microbatches == 1:
        return value_and_grad(key, params, batch["image"], batch["label"])
    # Microbatch i takes every num_microbatches-th row, so that each device works on rows it already holds.
    split = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]), 1, 0), batch
    )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_microbatches))

    def add(total: Any, at: tuple[Array, dict[str, Array]]) -> tuple[Any, None]:
        one = value_and_grad(at[0], params, at[1]["image"], at[1]["label"])
        return jax.tree.map(lambda t, g: t + g / num_microbatches, total, one), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, (keys, split))[0]


def make_optimizer(train: Config) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW with a linear warm-up to a constant rate."""
    rate = (
        optax.linear_schedule(0.0, train.learning_rate, train.warmup_steps)
        if train.warmup_steps
        else train.learning_rate
    )

    def clip(grads: Any, _: Any) -> Any:
        # One factor, where Optax divides and multiplies: XLA keeps no clipped copy of the gradient.
        factor = train.grad_clip / jnp.maximum(global_norm(grads), train.grad_clip)
        return jax.tree.map(lambda g: factor * g, grads)

    adam = optax.adamw(rate, b1=train.adam_b1, b2=train.adam_b2, weight_decay=train.weight_decay)
    return optax.chain(optax.stateless(clip), adam)


@jax.jit
def global_norm(tree: Any) -> Array:
    """The square root of the sum of the squares of all elements, as `optax.tree.norm`.

    XLA's CPU compiler would write every square to memory before it adds them; rows of squares it adds at once. Small
    arrays of one shape are added up first: each sum of hundreds would be a kernel of its own on a GPU, and on a CPU
    three loops.
    """

    def square_rows(x: Array) -> Array:
        if x.size < 2**16 or x.size % 8:
            return jax.lax.square(x)
        return sum(map(jax.lax.square, x.reshape(8, -1)), start=jnp.zeros((), jnp.float32))

    def norm(leaves: list[Array], square: Callable[[Array], Array]) -> Array:
        squares: dict[Any, Array] = {}
        for i, x in enumerate(leaves):
            alike = x.shape if x.size < 2**16 else i
            squares[alike] = squares.get(alike, 0.0) + square(x)
        return jnp.sqrt(sum(map(jnp.sum, squares.values())))

    return jax.lax.platform_dependent(
        jax.tree.leaves(tree), cpu=partial(norm, square=square_rows), default=partial(norm, square=jax.lax.square)
    )


def diffusion(config: Config) -> tuple[Callable[[Array], Any], LossFn]:
    """(key -> initial parameters, loss) of the diffusion model: the joint training of Algorithm 1."""
    net = UNet(**config.model)
    shape = (1, config.data.image_size, config.data.image_size, config.data.channels)

    def init(key: Array) -> Any:
        return net.init(key, jnp.zeros(shape), jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]

    def loss_fn(key: Array, params: Any, x: Array, labels: Array) -> Array:
        key_loss, key_dropout = jax.random.split(key)

        def eps_fn(z: Array, logsnr: Array, labels: Array) -> Any:
            return net.apply({"params": params}, z, logsnr, labels, train=True, rngs={"dropout": key_dropout})

        return eps_loss(key_loss, eps_fn, x, labels, p_uncond=config.train.p_uncond, **config.process)

    return init, loss_fn


def train(config: Config, folder: str, *, allow_fresh_start: bool = False) -> None:
    """Train the diffusion model of `config` in the run folder `folder`, or resume it there.

    If all its checkpoints are damaged: CheckpointError, or with `allow_fresh_start` from step 0 again.
    """
    mesh = parallel.make_mesh(**config.mesh)
    dataset = data.from_config(config.data, config.data.split)
    init, loss_fn = diffusion(config)
    config_json = describe("diffusion", config, dataset.class_names)
    draw = generate.preview(config, mesh, folder, dataset.class_names) if config.train.sample_every_steps else None
    fit(
        config.train,
        folder,
        mesh,
        dataset,
        config_json,
        init,
        loss_fn,
        draw,
        seed=config.seed,
        loading=config.data,
        allow_fresh_start=allow_fresh_start,
    )


def train_classifier(config: Config, folder: str, *, allow_fresh_start: bool = False) -> None:
    """Train the noisy classifier of classifier guidance in `folder`/classifier, a run folder of its own, or resume it.

    `config.classifier` is the network, `config.classifier_train` what differs from `config.train`.
    """
    mesh = parallel.make_mesh(**config.mesh)
    dataset = data.from_config(config.data, config.data.split)
    if os.path.exists(os.path.join(folder, workdir.CONFIG)):  # of the diffusion model that it is to guide
        workdir.check_images(folder, config.data)
        names = workdir.read_config(folder)["class_names"]
        data.check_classes(names, f"the run {folder}", dataset.class_names, f"data.split {config.data.split!r}")
    net = Classifier(**config.classifier)
    shape = (1, config.data.image_size, config.data.image_size, config.data.channels)

    def init(key: Array) -> Any:
        return net.init(key, jnp.zeros(shape), jnp.zeros(1))["params"]

    def loss_fn(key: Array, params: Any, x: Array, labels: Array) -> Array:
        key_loss, key_dropout = jax.random.split(key)

        def classifier_fn(z: Array, logsnr: Array) -> Any:
            return net.apply({"params": params}, z, logsnr, train=True, rngs={"dropout": key_dropout})

        return classifier_loss(key_loss, classifier_fn, x, labels, **config.process)

    settings = {**config.train.to_dict(), **config.classifier_train.to_dict()}
    fit(
        ConfigDict(settings),
        os.path.join(folder, "classifier"),
        mesh,
        dataset,
        describe("classifier", config, dataset.class_names),
        init,
        loss_fn,
        None,
        seed=config.seed,
        loading=config.data,
        allow_fresh_start=allow_fresh_start,
    )


def fit(
    settings: Config,
    folder: str,
    mesh: Mesh,
    dataset: data.Dataset,
    config_json: dict[str, Any],
    init: Callable[[Array], Any],
    loss_fn: LossFn,
    draw: Callable[[int, Any], np.ndarray | None] | None,
    *,
    seed: int,
    loading: Config,
    allow_fresh_start: bool = False,
) -> None:
    """Build, restore, then batch, step, log, save and draw until `settings.num_steps`.

    `settings` is a config's `train` group and `loading` its `data` group; `draw(step, ema)` makes a picture every
    `sample_every_steps`, or None if it was asked to stop; its step is saved before, and a picture that a stop or an
    error cut short is not drawn again. Raises ValueError where a run is resumed on another number of images,
    FloatingPointError after `nonfinite_limit` non-finite steps in a row, and `preemption.Stopped` when asked to stop;
    after the last two the same call resumes from the newest checkpoint.

    Goodput is the share of the wall time since the call that went into steps, the first of which, with its compilation,
    is not counted: what building, restoring, waiting for data, drawing and saving leave.
    """
    started = time.perf_counter()
    group = "train" if config_json["kind"] == "diffusion" else "classifier_train"
    parallel.check_batch(
        f"{group}.batch_size / train.num_microbatches", settings.batch_size // settings.num_microbatches, mesh
    )
    workdir.write_config(folder, config_json)
    key_init, key_steps = jax.random.split(jax.random.key(seed))
    optimizer = make_optimizer(settings)
    init_state = partial(initial_state, init, optimizer)
    abstract = parallel.placed(mesh, jax.eval_shape(init_state, key_init))
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    manager = checkpoint.open_manager(folder, keep=settings.keep_checkpoints)
    restored = checkpoint.restore(manager, abstract, allow_fresh_start=allow_fresh_start)
    if restored is None:
        start, state, skipped = 0, None, 0
    else:
        start, state, data_state = restored
        # Checkpoints of earlier versions do not say how many images there were.
        skipped, num_images = data_state["skipped_images"], data_state.get("num_images", len(dataset))
        if num_images != len(dataset):
            raise ValueError(
                f"{folder} was trained on {num_images:,} images, and data.path {loading.path!r} has {len(dataset):,}, "
                "whose order would be another: resume it on the same data, or give another --workdir"
            )
        print(f"Resuming {folder} at step {start} of {settings.num_steps}.", flush=True)
        if start > settings.num_steps:
            print(f"{group}.num_steps = {settings.num_steps} was passed already: nothing is left to train.", flush=True)
        if start >= settings.num_steps:
            checkpoint.close(manager)
            return

    if jax.process_index() == 0:
        print(f"{parameter_overview.count_parameters(abstract.params):,} parameters.", flush=True)

    replicated = mesh.shape["fsdp"] == 1
    step_fn = partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        ema_decay=settings.ema_decay,
        ema_warmup=settings.ema_warmup,
        num_microbatches=settings.num_microbatches,
        replicated=replicated,
        join_vectors=replicated and mesh.devices.flat[0].platform == "cpu",
    )
    # Before there is a state, if it is a new one: compilers need gigabytes of their own.
    shapes = parallel.batch_shapes(
        mesh, settings.batch_size, (dataset.image_size, dataset.image_size, dataset.channels)
    )
    step_fn = xla.compiled(step_fn, abstract, shapes, key_steps, donate_argnums=0, out_shardings=(shardings, None))
    if state is None:
        state = jax.jit(init_state, out_shardings=shardings)(key_init)
    batches = data.batches(
        dataset,
        seed=seed,
        batch_size=settings.batch_size,
        flip=loading.flip,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=loading.num_workers,
    )
    unchecked: tuple[int, dict[str, Array]] | None = None
    last_logged, clock, waited, productive = start, time.perf_counter(), 0.0, 0.0
    step, stop = start, False
    log = workdir.metrics_log(folder, start)
    with closing(batches), closing_manager(manager), ExitStack() as ended:
        for step in tqdm(range(start + 1, settings.num_steps + 1), "train", unit="step", disable=None):
            watchdog.alive(slow=step == start + 1)
            before = time.perf_counter()
            batch = parallel.global_batch(mesh, next(batches))
            fetched = time.perf_counter()
            waited += fetched - before
            state, metrics = step_fn(state, batch, key_steps)
            if step == start + 1:
                # What tracing has left, Python's full collections would look through again, for 0.2 s each.
                gc.freeze()
                ended.callback(gc.unfreeze)
            # One step late, so that the device always has a step queued while the host waits.
            check_finite(unchecked, settings.nonfinite_limit, manager)
            unchecked = step, metrics

            stop = preemption.requested()
            last = step == settings.num_steps
            logged = last or step % settings.log_every_steps == 0
            drawn = draw is not None and (last or step % settings.sample_every_steps == 0)
            saved = stop or last or drawn or step % settings.checkpoint_every_steps == 0
            values = {name: value.item() for name, value in jax.device_get(metrics).items()} if logged else {}
            now = time.perf_counter()
            productive += now - fetched if step > start + 1 else 0.0
            skipped_images = skipped + parallel.total(batches.skipped) if logged or saved else 0
            if logged:
                values["images_per_second"] = (step - last_logged) * settings.batch_size / (now - clock)
                values["data_wait"] = waited / (now - clock)
                values["goodput"] = productive / (now - started)
                values["skipped_images"] = skipped_images
                workdir.write_metrics(log, step, values)
                last_logged, clock, waited = step, time.perf_counter(), 0.0
            if saved:
                check_finite(unchecked, settings.nonfinite_limit, manager)
                data_state = {"next_step": step, "skipped_images": skipped_images, "num_images": len(dataset)}
                checkpoint.save(manager, step, state, data_state=data_state, config_json=config_json)
                if jax.process_index() == 0:
                    tqdm.write(f"Saving step {step} of {settings.num_steps}.")
                    sys.stdout.flush()  # a supervisor reads it
            if draw is not None and drawn and not stop:
                picture = draw(step, state.ema)
                if picture is None:
                    stop = True
                else:
                    workdir.write_image(log, step, "samples", picture)
            if stop:
                break
        watchdog.alive(slow=True)
    if step > start and jax.process_index() == 0:
        seconds = time.perf_counter() - started
        print(f"{step - start} steps in {seconds:.1f} s, goodput {productive / seconds:.1%}.", flush=True)
    if stop:
        raise preemption.Stopped(f"Stopped at step {step} of {settings.num_steps}, saved in {folder}")


@contextmanager
def closing_manager(manager: checkpoint.Manager) -> Iterator[None]:
    """Waits for the last save, also when the block is left by an error; otherwise raises if that save failed."""
    try:
        yield
    except BaseException:
        checkpoint.abandon(manager)
        raise
    checkpoint.close(manager)


def check_finite(unchecked: tuple[int, dict[str, Array]] | None, limit: int, manager: checkpoint.Manager) -> None:
    """Raises FloatingPointError after `limit` non-finite steps in a row, naming the last good checkpoint."""
    if unchecked is None:
        return
    step, metrics = unchecked
    if int(metrics["nonfinite_in_a_row"]) >= limit:
        good = checkpoint.latest_step(manager)
        raise FloatingPointError(
            f"the loss or its gradient is not finite at step {step} (loss {float(metrics['loss'])}), {limit} in a row; "
            f"the last good checkpoint is {'none' if good is None else f'step {good}'} of {manager.directory}: "
            "look at the data, or start a new --workdir with a lower train.learning_rate"
        )
