"""Sampling with classifier-free guidance: Algorithm 2 of Ho and Salimans (arXiv:2207.12598).

Importing this module is cheap: it pulls in jax, and nothing of the trainer, the data pipeline or the checkpoints.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key, PyTree, UInt32

from cfd.guidance import NULL_LABEL, Interval, batch_size, check_interval, guide, nulls_like
from cfd.process import cosine_logsnr, x_from_eps
from cfd.steps import SecondOrder, StepRule, ancestral, ddim, dpm_solver

EpsFn = Callable[[Array, Array, Any], Array]
"""(z [B, ...], logsnr [B], labels [B]) -> eps [B, ...]."""

__all__ = ["EpsFn", "SecondOrder", "StepRule", "ancestral", "ddim", "dpm_solver", "guided_sample", "schedule"]


def guided_sample(
    key: Key[Array, "*b"] | UInt32[Array, "*b 2"],
    eps_fn: EpsFn,
    labels: PyTree,
    shape: tuple[int, ...],
    *,
    w: Any = 0.0,
    null: PyTree = NULL_LABEL,
    num_steps: int = 256,
    sampler: StepRule | SecondOrder = ancestral(v=0.3),
    logsnr_min: float = -20.0,
    logsnr_max: float = 20.0,
    clip: bool = True,
    doubled: bool = False,
) -> Float[Array, "b ..."]:
    """Draw one image per label with guidance weight w: Algorithm 2, Ho and Salimans. Pure: jit, vmap or shard_map it.

    Args:
      key: one PRNG key, from which image i takes `fold_in(key, i)`, or [B] keys, one per image. Inside `shard_map` and
        `pmap`, i is the row on its own device: with one replicated key, all devices draw the same noise. There, the
        key, the labels or w must vary over every mesh axis over which the result of eps_fn varies. A mesh for `jit`
        needs Auto axes.
      eps_fn: `(z, logsnr, labels) -> eps`.
      labels: int32 [B], or any pytree of arrays with a leading batch axis.
      shape: the shape of one image, without the batch axis.
      w: the guidance weight of Eq. 6: a number, an array (scalar or [B]), a function of λ that returns either, or
        an `Interval`. It is traced: a new value never recompiles. A Python 0 costs one network evaluation per step
        instead of two.
      null: the label ∅ of the unconditional score, with the structure and shape of one label. Another class in its
        place guides away from that class.
      num_steps: T, the number of steps from λ_1 = logsnr_min to λ_T = logsnr_max.
      sampler: the step rule: `ancestral(v)`, `ddim()`, or `dpm_solver()`.
      logsnr_min, logsnr_max: the first and the last λ, in [−80, 80].
      clip: clip x̃ to [−1, 1] at every step.
      doubled: evaluate both scores in one batch of 2B instead of two batches of B. The images are the same up to
        rounding.

    Returns: float32 [B, *shape].

    Raises: ValueError on numbers out of range and on arguments whose shapes do not agree.
    """
    _check_numbers(num_steps, logsnr_min, logsnr_max, w)
    batch = batch_size(labels)
    labels = jax.tree.map(jnp.asarray, labels)
    keys = _image_keys(key, batch)
    guided_eps = _guided(eps_fn, labels, null, w, batch, doubled)

    logsnr = schedule(num_steps, logsnr_min, logsnr_max)
    # The last λ' is never reached. A step of zero length there would make the gradients of some rules NaN.
    logsnr_next = jnp.concatenate([logsnr[1:], logsnr[-1:] + 1.0])
    rule, reach = _extrapolation(sampler, logsnr, logsnr_next)

    def noise(t: Array | int) -> Array:
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, t), shape, jnp.float32))(keys)

    def step(carry: tuple[Array, Array], at: tuple[Array, Array, Array, Any]) -> tuple[tuple[Array, Array], None]:
        (z, x_before), (t, logsnr, logsnr_next, reach) = carry, at
        x = x_from_eps(z, guided_eps(z, logsnr), logsnr)
        x = jnp.clip(x, -1.0, 1.0) if clip else x
        mean, std = rule(z, x if reach is None else x + reach * (x - x_before), logsnr, logsnr_next)
        z_next = mean if std is None else mean + std * noise(t)
        return (jnp.where(t == num_steps, x, z_next), x), None

    z = _varying_like(noise(0), labels, w)
    (z, _), _ = jax.lax.scan(step, (z, z), (jnp.arange(1, num_steps + 1), logsnr, logsnr_next, reach))
    return z


def schedule(num_steps: int, logsnr_min: Any = -20.0, logsnr_max: Any = 20.0) -> Float[Array, "t"]:
    """The grid λ_1 = logsnr_min < … < λ_T = logsnr_max, [T], with uniformly spaced u: Section 2."""
    u = 1.0 - jnp.arange(num_steps, dtype=jnp.float32) / max(num_steps - 1, 1)
    # The ends are set to the bit. Rounded, the last could lie outside an Interval that ends at logsnr_max.
    first, last = jnp.asarray(logsnr_min, jnp.float32), jnp.asarray(logsnr_max, jnp.float32)
    return cosine_logsnr(u, first, last).at[-1].set(last).at[0].set(first)


def _check_numbers(num_steps: Any, logsnr_min: Any, logsnr_max: Any, w: Any) -> None:
    """Raises ValueError for numbers that would give NaN or no guidance. Arrays and traced values are not checked."""

    def numbers(*values: Any) -> bool:
        return all(isinstance(value, (int, float)) for value in values)

    try:
        enough = operator.index(num_steps) >= 1
    except TypeError:
        enough = False
    if not enough:
        raise ValueError(f"num_steps is {num_steps}; it counts steps: give an integer num_steps >= 1")
    if numbers(logsnr_min, logsnr_max) and not -80.0 <= logsnr_min < logsnr_max <= 80.0:
        raise ValueError(
            f"logsnr_min is {logsnr_min} and logsnr_max {logsnr_max}: give logsnr_min < logsnr_max, both in [-80, 80], "
            "because α or σ becomes 0 in float32 not far outside"
        )
    if numbers(w) and not math.isfinite(w):
        raise ValueError(f"w is {w}; give a finite guidance weight")
    if isinstance(w, Interval):
        check_interval(w)


def _extrapolation(sampler: Any, logsnr: Array, logsnr_next: Array) -> tuple[Any, Array | None]:
    """The step rule and the factors [T] by which x̃ is extrapolated; None for a first-order rule.

    The factor multiplies the change of x̃ since the previous evaluation.
    """
    second_order = isinstance(sampler, SecondOrder)
    rule = sampler.rule if second_order else sampler
    if not callable(rule) or rule in (ancestral, ddim, dpm_solver):
        raise ValueError(f"sampler is {sampler!r}; give a step rule, such as the result of ancestral(v) or ddim()")
    if not second_order:
        return rule, None
    t, gap = jnp.arange(1, len(logsnr) + 1), logsnr_next - logsnr
    return rule, jnp.where((t > 1) & (t < len(logsnr) - 1), 0.5 * gap / jnp.roll(gap, 1), 0.0)


def _guided(
    eps_fn: EpsFn, labels: PyTree, null: PyTree, w: Any, batch: int, doubled: bool
) -> Callable[[Array, Array], Array]:
    """The function (z, λ) -> ε̃, which evaluates the network once or twice."""
    unguided = isinstance(w, (int, float)) and w == 0
    nulls = labels if unguided else nulls_like(labels, null)

    def evaluate(z: Array, logsnr: Array, labels: PyTree) -> Array:
        eps = eps_fn(z, jnp.broadcast_to(logsnr, z.shape[:1]), labels)
        if eps.shape != z.shape:
            raise ValueError(f"eps_fn returned shape {eps.shape}; it must return the noise of z, shape {z.shape}")
        return eps.astype(jnp.float32)

    def one(z: Array, logsnr: Array) -> Array:
        return evaluate(z, logsnr, labels)

    def both(z: Array, logsnr: Array, weight: Any) -> Array:
        weight = jnp.asarray(weight, jnp.float32)
        if weight.shape not in ((), (batch,)):
            raise ValueError(f"w has shape {weight.shape}; give a scalar or one weight per label, shape ({batch},)")
        if not doubled:
            return guide(evaluate(z, logsnr, labels), evaluate(z, logsnr, nulls), weight)
        # The two rows of a pair are adjacent, so that a sharded batch keeps both on one device.
        z_pairs, label_pairs = jax.tree.map(_interleave, (z, labels), (z, nulls))
        eps = evaluate(z_pairs, logsnr, label_pairs).reshape(batch, 2, *z.shape[1:])
        return guide(eps[:, 0], eps[:, 1], weight)

    if isinstance(w, Interval):
        inside, lo, hi = w
        return lambda z, logsnr: jax.lax.cond(
            (logsnr >= lo) & (logsnr <= hi), lambda z: both(z, logsnr, inside), lambda z: one(z, logsnr), z
        )
    if callable(w):
        return lambda z, logsnr: both(z, logsnr, w(logsnr))
    if unguided:
        return one
    return lambda z, logsnr: both(z, logsnr, w)


def _interleave(a: Array, b: Array) -> Array:
    """The rows of two arrays [B, ...] in turn, [2B, ...]: a_0, b_0, a_1, b_1, ..."""
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


def _varying_like(z: Array, *inputs: PyTree) -> Array:
    """z, marked inside a caller's `shard_map` as varying over the same mesh axes as the inputs.

    `scan` requires the carry to have the same type on entry and exit, and noise drawn from a replicated key does not
    vary over devices.
    """
    for x in jax.tree.leaves(inputs):
        z = z if callable(x) else jnp.where(True, z, jnp.sum(x).astype(z.dtype))
    return z


def _image_keys(key: Array, batch: int) -> Array:
    """Keys [B], one per image. From a single key, image i takes `fold_in(key, i)`."""
    if isinstance(key, int):
        raise ValueError(f"key is {key}; give a PRNG key, jax.random.key({key})")
    shape = key.shape if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key.shape[:-1]
    if shape == ():
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if shape != (batch,):
        raise ValueError(f"key has batch shape {shape} for {batch} labels; give one key, or one per label")
    return key
