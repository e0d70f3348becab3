"""Training a conditional and an unconditional model jointly: Algorithm 1 of arXiv:2207.12598."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Key, PyTree, Real, UInt32

from cfd.arguments import (
    EPS_FN,
    check_examples,
    check_function,
    check_number,
    check_numbers,
    check_output,
    check_returned,
    check_switch,
    eps_and_v,
    levels_at,
    row_weights,
    threefry,
)
from cfd.guidance import NULL_LABEL, batch_size, drop_labels
from cfd.process import (
    Schedule,
    check_grid,
    cosine,
    diffuse,
    mean_factors,
    per_example,
    step_divergence,
    tabulated,
    x_from_eps,
)


def eps_loss(
    key: Key[Array, ""] | UInt32[Array, "2"] | UInt32[Array, "4"],
    eps_fn: Callable[[Array, Array, Any], Any],
    x: Float[Array, "b ..."],
    labels: PyTree,
    *,
    null: PyTree = NULL_LABEL,
    p_uncond: Real[ArrayLike, "*b"] = 0.1,
    schedule: Schedule = cosine(-20.0, 20.0),
    weight: Callable[[Array], Array] | None = None,
    low_discrepancy: bool = False,
) -> Float[Array, ""]:
    """E ‖ε_θ(z_λ, c) − ε‖², averaged over batch and dimensions: Eq. 5 and Algorithm 1, Ho and Salimans.

    x [B, ...] is data in [−1, 1]. `labels` and `null` are as in `guided_sample`. `eps_fn(z, logsnr, labels) -> eps`
    receives `null` for each label that was dropped, with probability p_uncond. It may return (eps, v) too.

    `schedule` gives p(λ), as λ of uniform u: `cfd.process.cosine`, `linear`, or `tabulated`. `weight(logsnr) -> [B]`
    multiplies the squared error of each row. Without it, `linear` is the variational bound up to a constant, and
    `tabulated` with DDPM's table is L_simple (arXiv:2006.11239, Eq. 14). `x_weight`, `v_weight` and `mean_weight` make
    the error that of x̃, of v and of the mean of a step. `sigmoid_weight` has the same loss for every schedule.

    `low_discrepancy` draws one u_0 and gives row i of B the u = (u_0 + i / B) mod 1, which makes the loss vary less:
    Kingma et al. (arXiv:2107.00630). i counts the rows of x, under `jit` those of all devices.

    The key is as in `threefry`.

    Raises ValueError as `drop_labels` does, if x and labels are empty or do not agree, and if eps_fn returns no array
    of the shape of z, or schedule or weight none of shape [B].
    """
    x = check_examples(x, (batch_size(labels),))
    key_u, key_eps, key_drop = jax.random.split(threefry(key), 3)
    labels = drop_labels(key_drop, labels, p_uncond, null)
    logsnr = levels_at(schedule, _times(key_u, len(x), low_discrepancy))
    squared = _squared_error(key_eps, eps_fn, x, logsnr, labels)
    if weight is not None:
        squared = per_example(row_weights(weight, logsnr), x) * squared
    return jnp.mean(squared)


def learned_loss(
    key: Key[Array, ""] | UInt32[Array, "2"] | UInt32[Array, "4"],
    eps_fn: Callable[[Array, Array, Any], Any],
    x: Float[Array, "b ..."],
    labels: PyTree,
    *,
    schedule: Schedule,
    null: PyTree = NULL_LABEL,
    p_uncond: Real[ArrayLike, "*b"] = 0.1,
    weight: Callable[[Array], Array] | None = None,
    low_discrepancy: bool = False,
) -> Float[Array, ""]:
    """The loss of `linear`, estimated by a schedule that learns to make the estimate vary less. Section 5 of VDM.

    Kingma et al., Variational Diffusion Models (arXiv:2107.00630): the expectation of L̂ = −λ'(u) ‖ε_θ(z_λ, c) − ε‖²,
    divided by λ(0) − λ(1) and by the number of dimensions, is the same for every schedule λ(u) between the same ends.
    The gradient of the returned value is that of E L̂ in what eps_fn depends on, and that of E L̂² in what `schedule`
    depends on, such as the parameters of `cfd.networks.monotone`. The best density is p(λ) ∝ sqrt(E‖ε_θ − ε‖⁴).

    VDM's gradient is 2 L̂ ∂L̂/∂η, which goes back through the network to λ. This one is an estimate of the same
    expectation that does not: with λ in place of u, E L̂² = ∫ −λ'(u) E‖ε_θ − ε‖⁴ dλ, where only λ'(u) depends on η.

    `schedule` is strictly falling and differentiable. The other arguments, and what is raised, are as in `eps_loss`.
    """
    x = check_examples(x, (batch_size(labels),))
    key_u, key_eps, key_drop = jax.random.split(threefry(key), 3)
    labels = drop_labels(key_drop, labels, p_uncond, null)
    u = _times(key_u, len(x), low_discrepancy)

    def slope_at(u: Array) -> Array:
        return jax.jvp(schedule, (u,), (jnp.ones_like(u),))[1]

    level = levels_at(schedule, u)
    logsnr, slope, ends = jax.lax.stop_gradient((level, slope_at(u), schedule(jnp.array([0.0, 1.0]))))
    squared = _squared_error(key_eps, eps_fn, x, logsnr, labels)
    rows = slope / (ends[1] - ends[0]) * jnp.mean(squared.reshape(len(x), -1), axis=1)
    if weight is not None:
        rows = rows * row_weights(weight, logsnr)
    loss = jnp.mean(rows)
    # The value is u. The gradient is that of the time at which the schedule has this λ.
    u_of_level = u - (level - logsnr) / slope
    variance = jnp.mean(jax.lax.stop_gradient(jnp.square(rows)) * jnp.log(-slope_at(u_of_level)))
    return loss + variance - jax.lax.stop_gradient(variance)


def _times(key: Array, rows: int, low_discrepancy: bool) -> Float[Array, "b"]:
    """u of each row, as `eps_loss` says. Raises ValueError unless low_discrepancy is True or False."""
    check_switch("low_discrepancy", low_discrepancy)
    if low_discrepancy:
        return (jax.random.uniform(key, (), jnp.float32) + jnp.arange(rows, dtype=jnp.float32) / rows) % 1.0
    return jax.random.uniform(key, (rows,), jnp.float32)


def _squared_error(
    key: Array, eps_fn: Callable[[Array, Array, Any], Any], x: Float[Array, "b ..."], logsnr: Array, labels: PyTree
) -> Float[Array, "b ..."]:
    """(ε_θ(z_λ, c) − ε)² for one draw of ε."""
    check_function("eps_fn", eps_fn, EPS_FN)
    eps = jax.random.normal(key, x.shape, jnp.float32)
    z = diffuse(x, eps, logsnr)
    eps_hat, _ = eps_and_v(eps_fn(z, logsnr, labels))
    check_returned("eps_fn", eps_hat, eps.shape, "the noise of z")
    return jnp.square(eps_hat.astype(jnp.float32) - eps)


def x_weight(logsnr: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """e^{−λ}: the squared error of ε times this is that of x, because ε̂ − ε = (α/σ) (x − x̂)."""
    return jnp.exp(-logsnr)


def v_weight(logsnr: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """1 + e^{−λ} = 1/α²: the squared error of ε times this is that of v = α ε − σ x, because ε̂ − ε = α (v̂ − v).

    Salimans and Ho (arXiv:2202.00512), who call it the weight "SNR + 1" of the error of x.
    """
    return 1.0 + jnp.exp(-logsnr)


def mean_weight(levels: Sequence[float] | Real[ArrayLike, "..."]) -> Callable[[Array], Array]:
    """((1 − e^{λ−λ'}) α')² e^{−λ}: the squared error of ε times this is that of the mean that `from_mean` converts.

    `levels` are those of `from_mean`. Ho et al. (arXiv:2006.11239), Section 3.2, with an unweighted error of μ̃.
    """
    check_grid(levels, "levels")
    return lambda logsnr: jnp.square(mean_factors(logsnr, levels)[1]) * jnp.exp(-logsnr)


def sigmoid_weight(schedule: Schedule, bias: float = 0.0) -> Callable[[Array], Array]:
    """sigmoid(bias − λ) / p(λ), with a mean of 1 under p(λ), the density of `schedule`.

    The loss is then ∫ sigmoid(bias − λ) E‖ε̂ − ε‖² dλ, up to a constant, for every schedule: Kingma and Gao
    (arXiv:2303.00848); Hoogeboom et al. (arXiv:2410.19324), in x: e^bias sigmoid(λ − bias) ‖x̂ − x‖². p is constant in
    4096 cells of equal probability, which bounds the weights: the loss is approximate in the two outermost cells.
    Weights are large where p is small, and equal to the sigmoid, up to a constant, for `linear`.

    Raises ValueError unless bias, a λ, is in [−80, 80].
    """
    check_number("bias", bias, lambda x: abs(x) <= 80.0, "it is a log-SNR λ: give a number in [-80, 80]")
    edges = levels_at(schedule, jnp.linspace(0.0, 1.0, 4097, dtype=jnp.float32))[::-1]
    widths = jnp.diff(edges)
    total = jnp.sum(jax.nn.softplus(bias - edges[:-1]) - jax.nn.softplus(bias - edges[1:]))

    def weight(logsnr: Array) -> Array:
        cell = jnp.clip(jnp.searchsorted(edges, logsnr, side="right") - 1, 0, len(widths) - 1)
        return jax.nn.sigmoid(bias - logsnr) * len(widths) * widths[cell] / total

    return weight


def variance_loss(
    key: Key[Array, ""] | UInt32[Array, "2"] | UInt32[Array, "4"],
    eps_fn: Callable[[Array, Array, Any], tuple[Array, Array]],
    x: Float[Array, "b ..."],
    labels: PyTree,
    *,
    logsnr: Any,
    null: PyTree = NULL_LABEL,
    p_uncond: Real[ArrayLike, "*b"] = 0.1,
    weight: Real[ArrayLike, ""] = 0.001,
) -> Float[Array, ""]:
    """L_simple + weight · L_vlb of a network that returns (ε, v): Nichol and Dhariwal (arXiv:2102.09672), Eq. 16.

    Each row has one of the T levels `logsnr`, rising, such as DDPM's or `grid(1000, cosine())`. L_vlb is the sum over
    the T − 1 steps between them, in bits per dimension, of the divergence of `ancestral(v)`'s step. It trains v alone:
    no gradient goes through x̂. v at the last level, which no step leaves, stays untrained.

    The other arguments, and what is raised, are as in `eps_loss`. Also raises ValueError as `check_grid` does, if
    eps_fn returns no v, and if weight is negative or not finite.
    """
    check_function("eps_fn", eps_fn, "(z, logsnr, labels) -> (eps, v)")
    x = check_examples(x, (batch_size(labels),))
    check_grid(logsnr, "logsnr")
    remedy = "it multiplies L_vlb: give one number >= 0 that is finite in float32"
    check_number("weight", weight, lambda x: (x >= 0.0) & (x < np.inf), remedy)
    key_t, key_eps, key_drop = jax.random.split(threefry(key), 3)
    labels = drop_labels(key_drop, labels, p_uncond, null)
    levels = jnp.asarray(logsnr, jnp.float32)
    t = jax.random.randint(key_t, x.shape[:1], 0, len(levels), jnp.int32)
    here, ahead = levels[t], levels[jnp.minimum(t + 1, len(levels) - 1)]
    eps = jax.random.normal(key_eps, x.shape, jnp.float32)
    z = diffuse(x, eps, here)
    eps_hat, v = check_output("eps_fn", eps_fn(z, here, labels), x.shape)
    if v is None:
        raise ValueError("eps_fn returned ε alone; there is no variance to train: return (ε, v), or use eps_loss")
    error = jnp.square(x - jax.lax.stop_gradient(x_from_eps(z, eps_hat, here)))
    bits = step_divergence(error, here, ahead, v) / math.log(2.0)
    # Under `jax_enable_x64`, a weight of NumPy's float64 would widen the loss.
    return (jnp.mean(jnp.square(eps_hat - eps)) + weight * len(levels) * jnp.mean(bits)).astype(jnp.float32)


def lowest_variance(
    logsnr: Real[ArrayLike, "t"], squared_error: Real[ArrayLike, "t b"]
) -> tuple[Schedule, Callable[[Array], Array]]:
    """The schedule and the weight with which `eps_loss` estimates the loss of `linear` with the least variance.

    `squared_error` [T, B] is ‖ε − ε̂‖² of B images at each of the levels `logsnr` [T], rising, which become the ends of
    the schedule. From `cfd.likelihood.bound` it is `jnp.exp(logsnr)[:, None] * bound.squared_error`. The density is
    p(λ) ∝ sqrt(E‖ε − ε̂‖⁴), and the weight 1 / p(λ), with a mean of 1. p is constant in 256 cells of equal probability,
    for which the weight is exact. A share of 1e-3 of it is uniform, because an error of 0 may have been luck.

    The learned schedule of Kingma et al. (arXiv:2107.00630), Section 5, minimizes the same variance.

    Raises ValueError as `check_grid` does, with fewer than two levels, and for errors that are negative, not
    finite, or all 0.
    """
    check_grid(logsnr, "logsnr")
    remedy = f"give ‖ε − ε̂‖² as [T, B] with T = {len(logsnr)} >= 2 levels"  # pyright: ignore[reportArgumentType]
    check_numbers("squared_error", squared_error, lambda x: (x >= 0.0) & (x < np.inf), remedy)
    errors = jnp.asarray(squared_error, jnp.float32)
    levels = jnp.asarray(logsnr, jnp.float32)
    if len(levels) < 2 or errors.ndim != 2 or len(errors) != len(levels):
        raise ValueError(f"squared_error has shape {errors.shape} for logsnr of shape {levels.shape}; {remedy}")
    check_numbers("squared_error", jnp.max(errors), lambda x: x > 0.0, f"no error is left to weigh; {remedy}")
    density = jnp.sqrt(jnp.mean(jnp.square(errors), axis=1))
    gaps, between = jnp.diff(levels), 0.5 * (density[1:] + density[:-1])
    share = gaps * between
    share = 0.999 * share / jnp.sum(share) + 0.001 * gaps / jnp.sum(gaps)
    cumulative = jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(share)])
    knots = jnp.interp(jnp.linspace(0.0, cumulative[-1], 257), cumulative, levels).at[0].set(levels[0])
    knots = knots.at[-1].set(levels[-1])
    widths = jnp.diff(knots)

    def weight(logsnr: Array) -> Array:
        cell = jnp.clip(jnp.searchsorted(knots, logsnr, side="right") - 1, 0, len(widths) - 1)
        return widths[cell] / jnp.mean(widths)

    return tabulated(knots[::-1]), weight
