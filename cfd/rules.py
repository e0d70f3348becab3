"""Guidance rules beyond the paper's linear mix, thresholds for x̃, and weights that depend on λ.

A rule says how the score of the class and that of the guide become one: `guided_sample(..., rule=apg(...))`. w is the
paper's weight everywhere: w = 0 is the conditional model, and the scale of other papers is 1 + w. A rule that is not
linear gives other images in the space of ε, x̃ or v. Therefore each docstring names its space. Norms, means and inner
products are over one image. The settings of a rule are single numbers, for all images. The w of a weight that depends
on λ is a number, or one per image, [B].
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, PyTree

from cfd.arguments import (
    EPS_FN,
    check_called,
    check_count,
    check_function,
    check_number,
    check_numbers,
    check_representable,
    check_same_shape,
    threefry,
)
from cfd.process import alpha_sigma, eps_from_x, per_example, x_from_eps

Number = int | float | np.number | Array

TINY = 1e-18
"""Keeps the quotient of two norms finite where both are 0. Its square is a normal number of float32."""


class Rule(NamedTuple):
    """How two predictions of the noise become one, with a state that is carried from step to step.

    `init(z) -> state` is called with the first z [B, ...]. `mix(z, eps_cond, eps_guide, logsnr, w, state)` returns
    (z, ε̃, state): the sampler's next step sees that z and that ε̃. logsnr is a scalar, w a scalar or [B]. Inside a
    caller's `shard_map`, the state must vary as z does, like `0.0 * z`.
    """

    init: Callable[[Array], Any]
    mix: Callable[[Array, Array, Array, Array, Array, Any], tuple[Array, Array, Any]]


def stateless(mix: Callable[[Array, Array, Array, Array, Array], tuple[Array, Array]]) -> Rule:
    """A rule without a state, of `mix(z, eps_cond, eps_guide, logsnr, w) -> (z, ε̃)`."""
    check_function("mix", mix, "(z, eps_cond, eps_guide, logsnr, w) -> (z, ε̃)")
    return _rule(lambda z: (), lambda *given: (*mix(*given[:-1]), given[-1]))


def _rule(init: Callable[[Array], Any], mix: Callable[..., Any]) -> Rule:
    """The rule of these functions. It raises ValueError for scores of another shape than z."""

    def checked(z: Array, eps_cond: Array, eps_guide: Array, *others: Any) -> Any:
        check_same_shape(z=z, eps_cond=eps_cond, eps_guide=eps_guide)
        return mix(z, eps_cond, eps_guide, *others)

    return Rule(init, checked)


def apg(eta: Number, norm: Number, momentum: Number) -> Rule:
    """Adaptive projected guidance: Sadat et al. (arXiv:2410.02416), in the space of x̃.

    Δ = x_c − x_g + momentum Δ_before is shortened to a length of at most `norm`. Of its part parallel to x_c, which
    saturates images, only the share eta stays. The paper's momentum is negative. Plain guidance is eta = 1, norm = inf,
    momentum = 0.
    """
    _check_one(eta=eta, momentum=momentum)
    _check_positive(norm=norm)
    eta, norm, momentum = map(_narrow, (eta, norm, momentum))

    def mix(z: Array, eps_cond: Array, eps_guide: Array, logsnr: Array, w: Array, before: Array) -> Any:
        x = x_from_eps(z, eps_cond, logsnr)
        delta = x - x_from_eps(z, eps_guide, logsnr) + momentum * before
        unlimited = jnp.isinf(norm)
        limit = jnp.where(unlimited, 1.0, norm)  # the gradient of an infinite quotient would be NaN
        kept = delta * jnp.where(unlimited, 1.0, jnp.minimum(1.0, limit / _norm(delta)))
        parallel = x * _dot(kept, x) / jnp.maximum(_dot(x, x), TINY)
        return z, eps_from_x(z, x + per_example(w, z) * (kept + (eta - 1.0) * parallel), logsnr), delta

    return _rule(lambda z: 0.0 * z, mix)


def cfgpp() -> Rule:
    """CFG++: Chung et al. (arXiv:2406.08070): x̃ is guided, and the noise of the next z is the guide's.

    x̃ = x_g + (1 + w) (x_c − x_g), and DDIM then gives z' = α' x̃ + σ' ε_g. The paper's λ in [0, 1] is 1 + w, so that its
    range is w in [−1, 0]. Clipping x̃ changes the noise.
    """

    def mix(z: Array, eps_cond: Array, eps_guide: Array, logsnr: Array, w: Array) -> tuple[Array, Array]:
        alpha, sigma = alpha_sigma(logsnr)
        x = x_from_eps(z, _linear(eps_cond, eps_guide, w), logsnr)
        return alpha * x + sigma * eps_guide, eps_guide

    return stateless(mix)


def cfg_zero_star(zero_until: Number) -> Rule:
    """CFG-Zero*: Fan et al. (arXiv:2503.18886), in the space of the velocity v = α ε − σ x.

    ṽ = (1 + w) v_c − w s v_g with s = ⟨v_c, v_g⟩ / ‖v_g‖², the best multiple of the guide's velocity. Where
    λ < zero_until, ṽ = 0. The paper does this in the first 4 % of its steps; −inf never does it.
    """
    _check_one(zero_until=zero_until, infinite=True)

    def mix(z: Array, eps_cond: Array, eps_guide: Array, logsnr: Array, w: Array) -> tuple[Array, Array]:
        alpha, sigma = alpha_sigma(logsnr)
        v_cond, v_guide = ((eps - sigma * z) / alpha for eps in (eps_cond, eps_guide))
        s = _dot(v_cond, v_guide) / jnp.maximum(_dot(v_guide, v_guide), TINY)
        v = jnp.where(logsnr < zero_until, 0.0, _linear(v_cond, s * v_guide, w))
        return z, alpha * v + sigma * z

    return stateless(mix)


def rescale(phi: Number) -> Rule:
    """Rescaled guidance: Lin et al. (arXiv:2305.08891), here in the space of x̃.

    x̃ ← φ x̃ std(x_c) / std(x̃) + (1 − φ) x̃: guidance no longer raises the contrast. Plain guidance is φ = 0.
    """
    _check_share(phi=phi)
    phi = _narrow(phi)

    def mix(z: Array, eps_cond: Array, eps_guide: Array, logsnr: Array, w: Array) -> tuple[Array, Array]:
        x_cond = x_from_eps(z, eps_cond, logsnr)
        x = x_from_eps(z, _linear(eps_cond, eps_guide, w), logsnr)
        factor = _std(x_cond) / _std(x)
        return z, eps_from_x(z, x * (phi * factor + (1.0 - phi)), logsnr)

    return stateless(mix)


def power_law(alpha: Number) -> Rule:
    """Power-law guidance: Pavasovic et al. (arXiv:2502.07849), in the space of ε.

    ε̃ = ε_c + w ‖Δ‖^α Δ with Δ = ε_c − ε_g. ‖Δ‖ grows with the number of pixels, and w must follow it. Plain guidance is
    α = 0. Below α = −1, the guidance of ever more similar scores would be without limit, and this is a ValueError.
    """
    remedy = "scores that are nearly equal would be guided without limit: give a number >= -1, finite in float32"
    check_number("alpha", alpha, lambda x: (x >= -1.0) & (x < np.inf), remedy)
    alpha = _narrow(alpha)

    def mix(z: Array, eps_cond: Array, eps_guide: Array, logsnr: Array, w: Array) -> tuple[Array, Array]:
        delta = eps_cond - eps_guide
        return z, eps_cond + per_example(w, z) * _norm(delta) ** alpha * delta

    return stateless(mix)


def feedback(pi: Number, temperature: Number, offset: Number, w_max: Number) -> Rule:
    """Feedback guidance: Koulischer et al. (arXiv:2506.06085): the weight follows from an estimate of log p(c | z).

    The learned conditional density is taken for π p(x | c) + (1 − π) p(x). The weight that undoes the mixture,
    (1 − π) / (p(c | z) − (1 − π)), is at most w_max. From z to z', the estimate changes by offset − temperature
    (‖z' − μ_c‖² − ‖z' − μ_g‖²) / (2 σ²), with the means and the variance of the ancestral step of v = 0. It is 0 at
    first, and at most 3, as in the authors' code. w is added to the weight. Plain guidance is π = 1.
    """
    _check_share(pi=pi)
    _check_one(temperature=temperature, offset=offset)
    _check_positive(w_max=w_max)
    pi, temperature, offset, w_max = map(_narrow, (pi, temperature, offset, w_max))
    lowest = jnp.log((1.0 - jnp.asarray(pi, jnp.float32)) * (1.0 + 1.0 / w_max))

    def zeros(z: Array) -> Array:
        return jnp.sum(0.0 * z, _axes(z))

    def init(z: Array) -> tuple[Array, ...]:
        return zeros(z), 0.0 * z, 0.0 * z, 0.0 * z, zeros(z) - jnp.inf

    def mix(z: Array, eps_cond: Array, eps_guide: Array, logsnr: Array, w: Array, state: Any) -> Any:
        log_p, y_before, x_before, delta_before, logsnr_before = state
        # In y = z / α = x + e^{−λ/2} ε, as in the paper: the mean of both steps, and the log-ratio of their densities.
        y, kept = z / alpha_sigma(logsnr)[0], jnp.exp(logsnr_before - logsnr)
        mean = per_example(kept, z) * y_before + per_example(1.0 - kept, z) * x_before
        ratio = jnp.exp(logsnr) * jnp.sum(delta_before * (y - mean), _axes(z))
        log_p += jnp.where(jnp.isfinite(logsnr_before), temperature * ratio + offset, 0.0)
        log_p = jnp.clip(log_p, lowest, 3.0)
        weight = w + jnp.minimum((1.0 - pi) / (jnp.exp(log_p) - (1.0 - pi)), w_max)
        x_cond, x_guide = (x_from_eps(z, eps, logsnr) for eps in (eps_cond, eps_guide))
        state = log_p, y, 0.5 * (x_cond + x_guide), x_cond - x_guide, zeros(z) + logsnr
        return z, _linear(eps_cond, eps_guide, weight), state

    return _rule(init, mix)


def tangential() -> Rule:
    """Tangential damping: Kwon et al. (arXiv:2503.18137), in the space of ε.

    The guide's ε is replaced by its projection on the first right singular vector of the two rows ε_c and ε_g.
    """

    def mix(z: Array, eps_cond: Array, eps_guide: Array, logsnr: Array, w: Array) -> tuple[Array, Array]:
        cc, cg, gg = _dot(eps_cond, eps_cond), _dot(eps_cond, eps_guide), _dot(eps_guide, eps_guide)
        # (cos θ, sin θ) is the first eigenvector of [[cc, cg], [cg, gg]], so the first singular vector's direction is
        # cos θ ε_c + sin θ ε_g, and sin θ times that is the projection of ε_g.
        angle = 0.5 * jnp.arctan2(2.0 * cg, cc - gg)
        projected = jnp.sin(angle) * (jnp.cos(angle) * eps_cond + jnp.sin(angle) * eps_guide)
        return z, _linear(eps_cond, projected, w)

    return stateless(mix)


def dynamic_threshold(percentile: Number) -> Callable[[Array], Array]:
    """A threshold for x̃, given as `clip`: Saharia et al. (Imagen, arXiv:2205.11487).

    x̃ is clipped to [−s, s] and divided by s, the percentile of |x̃| over the image, but at least 1. Percentile 0
    clips as `clip=True` does, unless all of the image lies beyond 1.
    """
    fits = lambda p: (p >= 0.0) & (p <= 100.0) & (p.ndim == 0)  # noqa: E731
    check_numbers("percentile", percentile, fits, "give one percentage, from 0 to 100")

    def threshold(x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
        s = jnp.maximum(jnp.percentile(jnp.abs(x), percentile, axis=_axes(x), keepdims=True), 1.0)
        return jnp.clip(x, -s, s) / s

    return threshold


def cads(
    eps_fn: Callable[[Array, Array, PyTree], Array], logsnr_lo: Number, logsnr_hi: Number, noise: Number, psi: Number
) -> Callable[[Array, Array, tuple[Array, Array]], Array]:
    """Condition-annealed sampling: Sadat et al. (arXiv:2310.17347), for labels that are embeddings.

    The result is an eps_fn whose labels are pairs: embeddings c [B, D], and a seed of each image, uint32 [B, 2]
    (`jax.random.key_data`). The null label is a pair too. c becomes √γ c + noise √(1 − γ) n with n ~ N(0, I), and the
    share psi of that is brought back to the mean and the standard deviation of c. γ rises from 0 at logsnr_lo to 1 at
    logsnr_hi, linearly in λ.
    """
    check_function("eps_fn", eps_fn, EPS_FN)
    _check_one(logsnr_lo=logsnr_lo, logsnr_hi=logsnr_hi, noise=noise)
    _check_width(logsnr_hi - logsnr_lo, "logsnr_lo < logsnr_hi")
    _check_share(psi=psi)

    def annealed(c: Array, seed: Array, logsnr: Array) -> Array:
        gamma = jnp.clip((logsnr - logsnr_lo) / (logsnr_hi - logsnr_lo), 0.0, 1.0)
        key = jax.random.fold_in(threefry(seed), jax.lax.bitcast_convert_type(logsnr, jnp.uint32))
        noised = jnp.sqrt(gamma) * c + noise * jnp.sqrt(1.0 - gamma) * jax.random.normal(key, c.shape, jnp.float32)
        rescaled = (noised - noised.mean()) / jnp.maximum(noised.std(), TINY) * c.std() + c.mean()
        return jnp.where(gamma < 1.0, psi * rescaled + (1.0 - psi) * noised, c)

    def guided(z: Array, logsnr: Array, labels: tuple[Array, Array]) -> Array:
        return eps_fn(z, logsnr, jax.vmap(annealed)(*labels, logsnr.astype(jnp.float32)))

    return guided


def other_labels(key: Array, labels: Int[Array, "b"], num_classes: int) -> Int[Array, "b"]:
    """A class for each image, uniform over the classes other than its own, to give as `null`.

    This is independent condition guidance: Sadat et al. (arXiv:2407.02687), which needs no network without classes.
    The key is as in `cfd.arguments.threefry`. Raises ValueError as that does, if num_classes is no integer >= 2, and if
    a concrete label is not one of 0 to num_classes − 1.
    """
    check_representable(labels)
    count, labels = check_count("num_classes", num_classes, 2), jnp.asarray(labels)
    remedy = f"another class takes its place: give integers from 0 to {count - 1}, or another num_classes"
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels have dtype {labels.dtype}; {remedy}")
    check_numbers("label", labels, lambda c: (c >= 0) & (c < count), remedy)
    others = jax.random.randint(threefry(key), labels.shape, 1, count, jnp.int32)
    moved = labels.astype(jnp.int32) - (count - others)  # the sum of both could exceed int32
    return jnp.where(moved < 0, moved + count, moved)


def constant(w: Number) -> Callable[[Array], Array]:
    """The same weight at every λ. It equals w, a number or one per image, [B], but always costs two evaluations."""
    _check(w=w)
    return lambda logsnr: jnp.zeros_like(logsnr) + w


def ramp(w: Number, logsnr_lo: Number, logsnr_hi: Number) -> Callable[[Array], Array]:
    """A weight that goes linearly in λ from 0 at logsnr_lo to w at logsnr_hi, and is constant beyond both.

    It rises if logsnr_lo < logsnr_hi, which Wang et al. (arXiv:2404.13040) recommend, and falls otherwise.
    """
    _check(w=w, logsnr_lo=logsnr_lo, logsnr_hi=logsnr_hi)
    _check_width(abs(logsnr_hi - logsnr_lo), "two different λ")
    return lambda logsnr: w * jnp.clip((logsnr - logsnr_lo) / (logsnr_hi - logsnr_lo), 0.0, 1.0)


def exponential(w: Number, rate: Number, logsnr: Number) -> Callable[[Array], Array]:
    """The weight w e^{min(rate (λ − logsnr), 0)}: it reaches w at `logsnr`, rising with λ if the rate is positive."""
    _check(w=w, rate=rate, logsnr=logsnr)
    end = logsnr
    return lambda logsnr: w * jnp.exp(jnp.minimum(rate * (logsnr - end), 0.0))


def negative_window(w: Number, w_inside: Number, logsnr_lo: Number, logsnr_hi: Number) -> Callable[[Array], Array]:
    """The weight w, but w_inside, which may be negative, for logsnr_lo <= λ <= logsnr_hi (arXiv:2602.00716)."""
    _check(w=w, w_inside=w_inside, logsnr_lo=logsnr_lo, logsnr_hi=logsnr_hi)
    _check_width(logsnr_hi - logsnr_lo, "logsnr_lo < logsnr_hi")
    return lambda logsnr: jnp.where((logsnr >= logsnr_lo) & (logsnr <= logsnr_hi), w_inside, w)


def middle(w: Number, logsnr_lo: Number, logsnr_hi: Number) -> Callable[[Array], Array]:
    """A weight that is 0 outside of logsnr_lo < λ < logsnr_hi, and inside a raised cosine with its top, w, halfway.

    `cfd.guidance.Interval` is its form with edges, which saves evaluations outside.
    """
    _check(w=w, logsnr_lo=logsnr_lo, logsnr_hi=logsnr_hi)
    _check_width(logsnr_hi - logsnr_lo, "logsnr_lo < logsnr_hi")

    def weight(logsnr: Array) -> Array:
        u = jnp.clip((logsnr - logsnr_lo) / (logsnr_hi - logsnr_lo), 0.0, 1.0)
        return w * 0.5 * (1.0 - jnp.cos(2.0 * jnp.pi * u))

    return weight


def _linear(cond: Array, guide: Array, w: Array) -> Array:
    """(1 + w) cond − w guide: Eq. 6 of the paper, in any space that is linear in ε at given z."""
    w = per_example(w, cond)
    return (1.0 + w) * cond - w * guide


def _axes(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _dot(a: Array, b: Array) -> Array:
    """⟨a, b⟩ of each image, [B, 1, ...]."""
    return jnp.sum(a * b, _axes(a), keepdims=True)


def _norm(x: Array) -> Array:
    """‖x‖ of each image, or a tiny number where that is 0: the gradient of the root would be NaN there."""
    return jnp.sqrt(jnp.maximum(_dot(x, x), TINY**2))


def _std(x: Array) -> Array:
    """The standard deviation of each image, or a tiny number, as `_norm`."""
    return jnp.sqrt(jnp.maximum(jnp.var(x, _axes(x), keepdims=True), TINY**2))


def _narrow(x: Number) -> Number:
    """The number in float32, unless it is one of Python's, which widens no array.

    Under `jax_enable_x64`, a float64 of NumPy would make the state of the sampler float64.
    """
    return x if type(x) in (int, float) else jnp.asarray(x, jnp.float32)


def _check(**numbers: Any) -> None:
    for name, number in numbers.items():
        check_called(name, number)
        if not isinstance(number, int | float | np.number | np.ndarray | Array):
            raise ValueError(f"{name} is {number!r}; give a number, or an array of shape (B,) with one per image")
        check_numbers(name, number, np.isfinite, "give a number that is finite in float32")


def _check_one(*, infinite: bool = False, **numbers: Any) -> None:
    for name, number in numbers.items():
        holds, remedy = np.isfinite, "give a number that is finite in float32"
        if infinite:
            holds, remedy = (lambda x: ~np.isnan(x)), "give a number, which may be infinite"
        check_number(name, number, holds, remedy)


def _check_width(width: Number, wanted: str) -> None:
    remedy = f"give {wanted}, with a difference that is finite and > 0 in float32"
    check_numbers("logsnr_hi - logsnr_lo", width, lambda x: (x > 0.0) & (x < math.inf), remedy)


def _check_positive(**numbers: Any) -> None:
    for name, number in numbers.items():
        check_number(name, number, lambda x: x > 0.0, "give a number that is positive in float32")


def _check_share(**numbers: Any) -> None:
    for name, number in numbers.items():
        check_number(name, number, lambda x: (x >= 0.0) & (x <= 1.0), "give a number in [0, 1]")
