"""The state of training and one pure step: gradient, clipping, AdamW, moving average."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Float, UInt8

from cfd.kernels.cpu import materialize_on_cpu
from cfd.platforms import by_platform
from cfd.posthoc_ema import advance

SMALL = 2**16
"""`global_norm` adds up arrays of at most so many elements together with others."""
RARE = 2**17
"""A step on a CPU joins arrays of a shape that has at most so many elements in all."""

LossFn = Callable[[Array, Any, Array, Array], Array]
"""(key, params, x [B, H, W, C], labels [B]) -> scalar loss, averaged over the batch."""


class TrainState(NamedTuple):
    """Everything that a step changes: float32 arrays, and counts as int32 scalars.

    `posthoc` has the averages of `cfd.posthoc_ema` that a run keeps.
    """

    step: Array
    params: Any
    ema: Any
    opt_state: Any
    nonfinite_steps: Array
    nonfinite_in_a_row: Array
    posthoc: tuple[Any, ...] = ()


def initial_state(
    init: Callable[[Array], Any], optimizer: optax.GradientTransformation, key: Array, *, num_posthoc: int = 0
) -> TrainState:
    """The state at step 0: fresh parameters, an EMA equal to them, and the optimizer's initial state.

    The `num_posthoc` averages are 0, because the first step replaces them whole.
    """
    params = init(key)
    count = jnp.zeros((), jnp.int32)
    posthoc = tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(num_posthoc))
    return TrainState(count, params, jax.tree.map(jnp.copy, params), optimizer.init(params), count, count, posthoc)


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    key: Array,
    frozen: tuple[Any, ...] = (),
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    ema_warmup: bool,
    num_microbatches: int,
    replicated: bool,
    join_small: bool,
    project: Callable[[Any], Any] | None = None,
    posthoc_gammas: tuple[float, ...] = (),
) -> tuple[TrainState, dict[str, Array]]:
    """One step on the mean loss of the global batch, with the key `fold_in(key, step)`.

    `batch` is {"image": uint8 [B, H, W, C], "label": int32 [B]}; the loss gets the images as `to_float` makes them.
    A step whose loss or gradient is not finite leaves parameters, EMA and optimizer unchanged, and is counted. With
    `ema_warmup`, the decay of the EMA at step t is at most (1 + t) / (10 + t), as in TensorFlow's
    ExponentialMovingAverage. Without it, the EMA of a short run still contains a part of the random initialisation.
    `frozen` are the first arguments of loss_fn, before the key: arrays that no step changes, such as a teacher's.
    `replicated` says that every device holds all parameters. `join_small` is for CPUs; see `with_small_arrays_joined`.
    `project(params)` is applied to the updated parameters, array by array, before the EMA takes them. It leaves vectors
    unchanged. `posthoc_gammas` are the exponents of the averages in `state.posthoc`, in which a step that is not finite
    counts as any other.
    """
    key = jax.random.fold_in(key, state.step)
    loss_fn = partial(loss_fn, *frozen) if frozen else loss_fn
    loss, grads = _loss_and_grads(state.params, batch, key, loss_fn, num_microbatches)
    grads = row_major(grads) if replicated else grads
    ema = dict(ema_decay=ema_decay, ema_warmup=ema_warmup, posthoc_gammas=posthoc_gammas)
    update = partial(_update, optimizer=optimizer, project=project, **ema)
    if not join_small:
        return update(state, loss, grads)
    return with_small_arrays_joined(update, state, loss, grads, vectors_alone=project is not None)


def _update(
    state: TrainState,
    loss: Array,
    grads: Any,
    *,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    ema_warmup: bool,
    project: Callable[[Any], Any] | None,
    posthoc_gammas: tuple[float, ...],
) -> tuple[TrainState, dict[str, Array]]:
    grad_norm = global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    finite = jax.lax.optimization_barrier(jnp.isfinite(loss) & jnp.isfinite(grad_norm))

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jax.lax.select(finite, n, o), new, old)

    # The barriers make XLA read `finite` and, on a CPU, the new parameters. Without them, XLA recomputes `finite` for
    # each array, and XLA:CPU recomputes the parameters.
    params = optax.apply_updates(state.params, updates)
    params = params if project is None else project(params)
    params = materialize_on_cpu(keep(params, state.params))
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step)) if ema_warmup else ema_decay
    ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params)
    posthoc = zip(state.posthoc, posthoc_gammas, strict=True)
    skipped = 1 - finite.astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=params,
        ema=keep(ema, state.ema),
        opt_state=keep(opt_state, state.opt_state),
        nonfinite_steps=state.nonfinite_steps + skipped,
        nonfinite_in_a_row=skipped * (state.nonfinite_in_a_row + 1),
        posthoc=tuple(advance(average, params, state.step + 1, gamma) for average, gamma in posthoc),
    )
    metrics = dict(
        loss=loss,
        grad_norm=grad_norm,
        nonfinite_steps=state.nonfinite_steps,
        nonfinite_in_a_row=state.nonfinite_in_a_row,
    )
    return state, metrics


def with_small_arrays_joined(
    update: Callable[..., Any], state: TrainState, loss: Array, grads: Any, *, vectors_alone: bool
) -> Any:
    """`update(state, loss, grads)` with small parameters, and their EMA and optimizer slots, in one array.

    Those are all vectors, and unless `vectors_alone`, the arrays of any other shape that has at most RARE elements in
    all. They are hundreds of arrays in a U-Net, with a small part of its parameters. XLA:CPU compiles four loops for
    each shape that is updated by itself. On a GPU, joining would copy each array with a kernel of its own, and it would
    gather arrays that are divided over devices.
    """
    leaves, structure = jax.tree.flatten(state.params)
    totals: Counter[tuple[int, ...]] = Counter()
    for x in leaves:
        totals[x.shape] += x.size
    small = [x.ndim == 1 or (not vectors_alone and totals[x.shape] <= RARE) for x in leaves]
    sizes = np.array([x.size for x, joined in zip(leaves, small, strict=True) if joined], np.uint32)
    # XLA:CPU cannot see these numbers. Otherwise it would compile a loop for each array instead of one for each size.
    starts = materialize_on_cpu(list(np.cumsum(sizes, dtype=np.uint32) - sizes))

    def is_like_params(part: Any) -> bool:
        return jax.tree.structure(part) == structure

    def join(part: Any) -> Any:
        if not is_like_params(part):
            return part
        arrays = list(zip(jax.tree.leaves(part), small, strict=True))
        vectors = [x.ravel() for x, joined in arrays if joined]
        return [
            materialize_on_cpu(jnp.concatenate([jnp.zeros(0, jnp.float32), *vectors])),
            *(x for x, joined in arrays if not joined),
        ]

    def take_apart(part: Any) -> Any:
        if not isinstance(part, list):
            return part
        all_joined, others = materialize_on_cpu(part[0]), iter(part[1:])
        vectors = (jax.lax.dynamic_slice_in_dim(all_joined, *at) for at in zip(starts, sizes.tolist(), strict=True))
        arrays = (next(vectors if joined else others) for joined in small)
        return jax.tree.unflatten(structure, [new.reshape(x.shape) for new, x in zip(arrays, leaves, strict=True)])

    state, grads = jax.tree.map(join, (state, grads), is_leaf=is_like_params)
    state, metrics = update(state, loss, grads)
    return jax.tree.map(take_apart, state, is_leaf=lambda part: isinstance(part, list)), metrics


def row_major(grads: Any) -> Any:
    """`grads`, with the layout of the parameters on a GPU.

    cuDNN returns gradients of kernels in another layout. XLA would compute the optimizer in that layout, and transpose
    each of the optimizer's arrays back and forth. Do not use this for arrays that are divided over devices, because the
    constraint gathers them.
    """

    def one(g: Array) -> Array:
        return with_layout_constraint(g, Layout(tuple(range(g.ndim))))

    return by_platform(grads, cuda=partial(jax.tree.map, one), default=lambda grads: grads)


def _loss_and_grads(
    params: Any, batch: dict[str, Array], key: Array, loss_fn: LossFn, num_microbatches: int
) -> tuple[Array, Any]:
    def loss_of_pixels(key: Array, params: Any, images: Array, labels: Array) -> Array:
        return loss_fn(key, params, to_float(images), labels)  # inside, so that only the bytes are kept

    value_and_grad = jax.value_and_grad(loss_of_pixels, argnums=1)
    if num_microbatches == 1:
        return value_and_grad(key, params, batch["image"], batch["label"])
    # Microbatch i takes every num_microbatches-th row, so that each device works on rows that it already holds.
    split = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]), 1, 0), batch
    )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_microbatches))

    def add(total: Any, at: tuple[Array, dict[str, Array]]) -> tuple[Any, None]:
        one = value_and_grad(at[0], params, at[1]["image"], at[1]["label"])
        return jax.tree.map(lambda t, g: t + g / num_microbatches, total, one), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, (keys, split))[0]


def to_float(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Pixels 0 to 255 as float32 in [-1, 1], to exactly the bits of NumPy's `images.astype(float32) / 127.5 - 1`."""
    # XLA would replace a division by a product with the rounded reciprocal, which gives other bits. The first part of
    # the reciprocal has 9 bits, so that the first product is exact, and the sum rounds as the quotient does.
    x, first = images.astype(jnp.float32), 257 / 2**15
    return x * first + x * (1 / 127.5 - first) - 1.0


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    adam_b1: float,
    adam_b2: float,
    weight_decay: float,
    grad_clip: float,
    num_steps: int = 0,
) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with a linear warm-up to a constant learning rate.

    With `num_steps`, the learning rate then falls linearly, to 0 at that step.
    """
    rate = optax.linear_schedule(0.0, learning_rate, warmup_steps) if warmup_steps else learning_rate
    if num_steps:
        rise = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
        fall = optax.linear_schedule(learning_rate, 0.0, max(num_steps - warmup_steps, 1))
        rate = optax.join_schedules([rise, fall], [warmup_steps])

    def clip(grads: Any, _: Any) -> Any:
        # One factor, where Optax divides and multiplies, spares XLA a clipped copy of the gradient.
        factor = grad_clip / jnp.maximum(global_norm(grads), grad_clip)
        return jax.tree.map(lambda g: factor * g, grads)

    adam = optax.adamw(rate, b1=adam_b1, b2=adam_b2, weight_decay=weight_decay)
    return optax.chain(optax.stateless(clip), adam)


@jax.jit
def global_norm(tree: Any) -> Array:
    """The square root of the sum of the squares of all elements, like `optax.tree.norm`.

    On a CPU, all squares are added up in one array, because XLA:CPU compiles several loops for each sum of a new
    length. It writes all squares of an array to memory before it adds them, but adds rows of squares directly, which
    leave an eighth of a large array. Elsewhere, small arrays of equal shape are added up before they are reduced.
    Otherwise, each of hundreds of sums is a kernel of its own on a GPU.
    """

    def on_cpu(leaves: list[Array]) -> Array:
        zero = jnp.zeros((), jnp.float32)
        squares = [
            jax.lax.square(x.ravel())
            if x.size <= SMALL or x.size % 8
            else sum(map(jax.lax.square, x.reshape(8, -1)), start=zero)
            for x in leaves
        ]
        # Without the barrier, XLA would divide the sum of the one array into sums of its parts.
        return jnp.sqrt(jnp.sum(materialize_on_cpu(jnp.concatenate(squares))))

    def elsewhere(leaves: list[Array]) -> Array:
        squares: dict[Any, Array] = {}
        for i, x in enumerate(leaves):
            group = x.shape if x.size <= SMALL else i
            squares[group] = squares.get(group, 0.0) + jax.lax.square(x)
        return jnp.sqrt(sum(map(jnp.sum, squares.values())))

    return by_platform(jax.tree.leaves(tree), cpu=on_cpu, default=elsewhere)
