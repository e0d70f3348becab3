"""The variance-preserving process in log-SNR λ: z = α x + σ ε, α² = sigmoid(λ), σ² = sigmoid(−λ).

Ho and Salimans, Classifier-Free Diffusion Guidance (arXiv:2207.12598), Section 2. Every function takes λ as a scalar or
as [B], one value per row, and broadcasts it over the trailing axes of z. The formulas keep float32 precision at both
ends, λ = ±20, where 1 − sigmoid(λ) would round to 0.

Numbers of any type are checked where they are concrete: a λ that is NaN is a ValueError. Traced numbers are not.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import log_sigmoid
from jax.scipy.special import ndtr, ndtri
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from cfd.arguments import EPS_FN, check_floating, check_function, check_number, check_numbers, check_returned

Schedule = Callable[[Any], Array]
"""u in [0, 1] -> λ, falling: u = 0 is the clean end. With uniform u it is the density p(λ) of training."""

Prediction = Callable[[Array, Array, Any], Any]
"""(z [B, ...], λ [B], labels) -> ε, or something else that a network predicts, of the shape of z."""

INCREASING = "λ rises as noise falls: give finite values in [-80, 80], each larger than the one before"


def cosine_logsnr(
    u: Real[ArrayLike, "*b"], logsnr_min: Real[ArrayLike, ""] = -20.0, logsnr_max: Real[ArrayLike, ""] = 20.0
) -> Float[Array, "*b"]:
    """λ(u) = −2 log tan(a u + b) for u in [0, 1]: the cosine schedule, Section 2. λ(0) is logsnr_max.

    The angle is measured from the nearer of 0 and π/2, because tan near π/2 loses 1e-3 of λ in float32.
    Raises ValueError if u is outside [0, 1], and as `check_ends` does.
    """
    check_ends(logsnr_min, logsnr_max)
    u = as_time(u)
    first, last = 0.5 * jnp.asarray(logsnr_max, jnp.float32), 0.5 * jnp.asarray(logsnr_min, jnp.float32)
    b_clean, b_noise = jnp.arctan(jnp.exp(-first)), jnp.arctan(jnp.exp(last))
    # If both λ have one sign, all angles are measured from one of the two: their difference would cancel otherwise.
    clean, noisy = last > 0.0, first < 0.0
    a = jnp.where(noisy, jnp.arctan(jnp.exp(first)) - b_noise, 0.5 * jnp.pi - b_clean - b_noise)
    a = jnp.where(clean, jnp.arctan(jnp.exp(-last)) - b_clean, a)
    clean_half = (clean | (u < 0.5)) & ~noisy
    angle = jnp.where(clean_half, a * u + b_clean, a * (1.0 - u) + b_noise)
    return jnp.where(clean_half, -2.0, 2.0) * jnp.log(jnp.tan(angle))


def cosine(logsnr_min: Real[ArrayLike, ""] = -20.0, logsnr_max: Real[ArrayLike, ""] = 20.0) -> Schedule:
    """The schedule `cosine_logsnr` between these ends: p(λ) ∝ 1 / cosh(λ/2), Section 2.

    Raises ValueError as `check_ends` does.
    """
    check_ends(logsnr_min, logsnr_max)
    return lambda u: cosine_logsnr(u, logsnr_min, logsnr_max)


def linear(logsnr_min: Real[ArrayLike, ""], logsnr_max: Real[ArrayLike, ""]) -> Schedule:
    """λ = logsnr_max − (logsnr_max − logsnr_min) u: uniform p(λ), with which `eps_loss` is the variational bound.

    Kingma et al., Variational Diffusion Models (arXiv:2107.00630). Raises ValueError as `check_ends` does.
    """
    check_ends(logsnr_min, logsnr_max)

    def schedule(u: Real[ArrayLike, "..."]) -> Array:
        u = as_time(u)
        return (1.0 - u) * jnp.asarray(logsnr_max, jnp.float32) + u * jnp.asarray(logsnr_min, jnp.float32)

    return schedule


def log_normal(
    logsnr_min: Real[ArrayLike, ""], logsnr_max: Real[ArrayLike, ""], mean: float = -1.2, std: float = 1.2
) -> Schedule:
    """The schedule whose noise level ς = e^{−λ/2} is log-normal, ln ς ~ N(mean, std²), truncated to these ends.

    Karras et al. (arXiv:2206.00364), Table 1, whose P_mean and P_std are the defaults. λ is then N(−2 mean, 4 std²).
    Raises ValueError unless std > 0 and mean is finite, and as `check_ends` does.
    """
    check_ends(logsnr_min, logsnr_max)
    check_number("mean", mean, np.isfinite, "it is that of ln ς: give a number that is finite in float32")
    check_number("std", std, lambda x: (x > 0.0) & (x < np.inf), "it is that of ln ς: give a finite number > 0")
    centre, width = -2.0 * mean, 2.0 * std

    def schedule(u: Real[ArrayLike, "..."]) -> Array:
        u = as_time(u)
        low, high = jnp.asarray(logsnr_min, jnp.float32), jnp.asarray(logsnr_max, jnp.float32)
        first, last = (low - centre) / width, (high - centre) / width
        # The probabilities below and above λ. The smaller one keeps its relative precision in float32.
        below = (1.0 - u) * ndtr(last) + u * ndtr(first)
        above = (1.0 - u) * ndtr(-last) + u * ndtr(-first)
        deviation = jnp.where(below < above, ndtri(jnp.minimum(below, 0.5)), -ndtri(jnp.minimum(above, 0.5)))
        inside = jnp.clip(centre + width * deviation, low, high)
        # The tails are steep. XLA may compute the u of an end as 6e-8 or as 1 − 6e-8, or even outside of [0, 1].
        return jnp.where(u <= 2.0**-23, high, jnp.where(u >= 1.0 - 2.0**-23, low, inside))

    return schedule


def tabulated(logsnr: Sequence[float] | Real[ArrayLike, "..."]) -> Schedule:
    """The schedule with these λ, falling, at u = 0, 1/(n−1), ..., 1, and linear in λ between them.

    With `cfd.networks.times.logsnr_table`, it is ADM's or DDPM's. Raises ValueError unless there are at least two
    values, falling and in [−80, 80]. A traced table is not checked.
    """
    if np.ndim(logsnr) != 1 or len(logsnr) < 2:  # pyright: ignore[reportArgumentType]
        raise ValueError(f"logsnr has shape {np.shape(logsnr)}; a table has two or more values λ: give shape (n,)")
    falling = "λ falls as noise grows: give finite values in [-80, 80], each smaller than the one before"
    known = check_numbers("logsnr", logsnr, lambda x: abs(x) <= 80.0, falling)
    if known is not None:
        check_numbers("logsnr", known, lambda x: np.append(True, np.diff(x) < 0.0), falling)
    table = jnp.asarray(logsnr, jnp.float32)

    def schedule(u: Real[ArrayLike, "..."]) -> Array:
        places = as_time(u) * (len(table) - 1)
        # By the integer and the fractional part: `jnp.interp` divides by differences of u, which costs precision.
        low = jnp.clip(jnp.floor(places), 0, len(table) - 2).astype(jnp.int32)
        fraction = places - low.astype(jnp.float32)
        return (1.0 - fraction) * table[low] + fraction * table[low + 1]

    return schedule


def as_time(u: Real[ArrayLike, "*b"]) -> Float[Array, "*b"]:
    """The time u of a schedule, in float32. Raises ValueError if a concrete one is outside [0, 1]."""
    check_numbers("u", u, lambda x: (x >= 0.0) & (x <= 1.0), "it is the time of the schedule: give values in [0, 1]")
    return jnp.asarray(u, jnp.float32)


def check_grid(logsnr: Any, name: str = "num_steps") -> None:
    """Raises ValueError unless a grid of λ is [T], rising in float32, and in [−80, 80]. A traced one is not checked."""
    if np.ndim(logsnr) != 1 or len(logsnr) < 1:
        count = "T, or " if name == "num_steps" else ""
        raise ValueError(f"{name} has shape {np.shape(logsnr)}; give {count}a grid of λ of shape (T,) with T >= 1")
    known = check_numbers(name, logsnr, lambda x: abs(x) <= 80.0, INCREASING)
    if known is not None:
        check_numbers(name, known, lambda x: np.append(True, np.diff(x) > 0.0), INCREASING)


def check_ends(logsnr_min: Real[ArrayLike, ""], logsnr_max: Real[ArrayLike, ""]) -> None:
    """Raises ValueError unless −80 <= logsnr_min < logsnr_max <= 80. A traced end is not checked."""
    ends = (("logsnr_min", logsnr_min), ("logsnr_max", logsnr_max))
    known = [check_numbers(name, end, lambda x: ~np.isnan(x), "give a number in [-80, 80]") for name, end in ends]
    numbers = [end for end in known if end is not None]
    scalars = all(end.shape == () and abs(end) <= 80.0 for end in numbers)
    if not scalars or (len(numbers) == 2 and numbers[0] >= numbers[1]):
        raise ValueError(
            f"logsnr_min is {logsnr_min} and logsnr_max {logsnr_max}: give logsnr_min < logsnr_max, both in [-80, 80], "
            "because α or σ becomes 0 in float32 not far outside"
        )


def alpha_sigma(logsnr: Real[ArrayLike, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """The pair (α, σ) at λ, with α² + σ² = 1: Section 2."""
    check_numbers("logsnr", logsnr, lambda x: ~np.isnan(x), "give a log-SNR λ")
    logsnr = jnp.asarray(logsnr, jnp.float32)
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def diffuse(x: Float[Array, "..."], eps: Float[Array, "..."], logsnr: Real[ArrayLike, "*b"]) -> Float[Array, "..."]:
    """z = α x + σ ε, a sample of q(z | x) if ε is standard normal: Eq. 1. Raises ValueError for an x of integers."""
    check_floating(x)
    alpha, sigma = alpha_sigma(per_example(logsnr, x))
    return alpha * x + sigma * eps


def x_from_eps(z: Float[Array, "..."], eps: Float[Array, "..."], logsnr: Real[ArrayLike, "*b"]) -> Float[Array, "..."]:
    """x = (z − σ ε) / α: the data that z and ε imply, Section 2."""
    alpha, sigma = alpha_sigma(per_example(logsnr, z))
    return (z - sigma * eps) / alpha


def eps_from_x(z: Float[Array, "..."], x: Float[Array, "..."], logsnr: Real[ArrayLike, "*b"]) -> Float[Array, "..."]:
    """ε = (z − α x) / σ: the noise that z and x imply. The inverse of `x_from_eps`."""
    alpha, sigma = alpha_sigma(per_example(logsnr, z))
    return (z - alpha * x) / sigma


def from_x(x_fn: Prediction) -> Prediction:
    """The eps_fn of a network that predicts the data: ε = (z − α x̂) / σ, of `x_fn(z, logsnr, labels) -> x`.

    For a denoiser D(y, ς, c) of y = x + ς ε, such as EDM's (arXiv:2206.00364), it is
    `from_x(variance_exploding(lambda y, logsnr, c: D(y, jnp.exp(-0.5 * logsnr), c)))`.

    The functions that all adapters return keep `logsnr_range`, and raise ValueError if a network returns another shape.
    """
    return _adapted(x_fn, "x_fn", "the data", eps_from_x)


def from_v(v_fn: Prediction) -> Prediction:
    """The eps_fn of a network that predicts v = α ε − σ x: ε = σ z + α v, Salimans and Ho (arXiv:2202.00512)."""

    def eps(z: Array, v: Array, logsnr: Array) -> Array:
        alpha, sigma = alpha_sigma(per_example(logsnr, z))
        return sigma * z + alpha * v

    return _adapted(v_fn, "v_fn", "v of z", eps)


def from_mean(mean_fn: Prediction, levels: Sequence[float] | Real[ArrayLike, "..."]) -> Prediction:
    """The eps_fn of a network that predicts the mean of the next step, DDPM's μ̃: Ho et al. (arXiv:2006.11239), Eq. 7.

    `levels` [T] are the λ of its chain, rising. The factors of μ̃ = kept z + added x are those of `mean_factors`, and
    ε = (z − α x̂) / σ with x̂ = (μ̃ − kept z) / added. Raises ValueError as `check_grid` does.
    """
    check_grid(levels, "levels")

    def eps(z: Array, mean: Array, logsnr: Array) -> Array:
        kept, added = (per_example(factor, z) for factor in mean_factors(logsnr, levels))
        return eps_from_x(z, (mean - kept * z) / added, logsnr)

    return _adapted(mean_fn, "mean_fn", "the mean of the next z", eps)


def mean_factors(
    logsnr: Real[ArrayLike, "*b"], levels: Sequence[float] | Real[ArrayLike, "..."]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """(kept, added) of the mean of an ancestral step from λ, kept z + added x: e^{λ−λ'} α'/α and (1 − e^{λ−λ'}) α'.

    λ' is the level, of `levels` [T], rising, that follows the one nearest to λ. At the last level there is no step, and
    the factors are 0 and 1: DDPM's chain ends with x̂.
    """
    levels, logsnr = jnp.asarray(levels, jnp.float32), jnp.asarray(logsnr, jnp.float32)
    # By the nearest level. Counted from λ, a level that is rounded to just above λ would be its own next one.
    at = jnp.searchsorted(0.5 * (levels[1:] + levels[:-1]), logsnr, side="right")
    logsnr_next = levels[jnp.minimum(at + 1, len(levels) - 1)]
    log_alpha_next = 0.5 * log_sigmoid(logsnr_next)
    kept = jnp.exp(logsnr - logsnr_next + log_alpha_next - 0.5 * log_sigmoid(logsnr))
    added = -jnp.expm1(logsnr - logsnr_next) * jnp.exp(log_alpha_next)
    last = at == len(levels) - 1
    return jnp.where(last, 0.0, kept), jnp.where(last, 1.0, added)


def from_score(score_fn: Prediction) -> Prediction:
    """The eps_fn of a network that predicts the score, s = ∇_z log p(z): ε = −σ s.

    The score of y = z / α is α s. For its network s_y, it is `variance_exploding(lambda y, logsnr, c: -ς s_y(y, ς, c))`
    with ς = `jnp.exp(-0.5 * logsnr)`, per row.
    """
    return _adapted(score_fn, "score_fn", "the score", lambda z, s, logsnr: -alpha_sigma(per_example(logsnr, z))[1] * s)


def from_velocity(velocity_fn: Prediction) -> Prediction:
    """The eps_fn of a flow-matching network: `velocity_fn(y, t, labels)` -> ε − x at y = (1 − t) x + t ε.

    y = z / (α + σ), t = σ / (α + σ) [B], and ε = y + (1 − t) u: Lipman et al. (arXiv:2210.02747), Liu et al.
    (arXiv:2209.03003). A network with the data at t = 1 is `from_velocity(lambda y, t, c: -u(y, 1.0 - t, c))`.
    """
    check_function("velocity_fn", velocity_fn, "(y, t, labels) -> ε − x")

    def velocity(z: Array, logsnr: Array, labels: Any) -> Array:
        # t = σ / (α + σ) = sigmoid(−λ/2).
        alpha, sigma = alpha_sigma(per_example(logsnr, z))
        return velocity_fn(z / (alpha + sigma), jax.nn.sigmoid(-0.5 * logsnr), labels)

    def eps(z: Array, u: Array, logsnr: Array) -> Array:
        alpha, sigma = alpha_sigma(per_example(logsnr, z))
        return (z + alpha * u) / (alpha + sigma)

    return _adapted(velocity, "velocity_fn", "ε − x", eps, velocity_fn)


def rescaled(eps_fn: Prediction, scale: Callable[[Array], Array]) -> Prediction:
    """The eps_fn of a network that was trained on scale(λ) z in place of z, for another Gaussian process.

    With z_p = α_p x + σ_p ε and the log-SNR λ = log(α_p² / σ_p²), scale is sqrt(α_p² + σ_p²), [B] of λ [B]. Kingma et
    al. (arXiv:2107.00630): at equal λ, all such processes have the same bound, flow and ancestral steps. A network that
    predicts the data of that process is `from_x(rescaled(x_fn, scale))`.
    """
    check_function("eps_fn", eps_fn, EPS_FN)
    check_function("scale", scale, "of λ [B]")
    return functools.wraps(eps_fn)(lambda z, logsnr, labels: eps_fn(per_example(scale(logsnr), z) * z, logsnr, labels))


def variance_exploding(eps_fn: Prediction) -> Prediction:
    """The eps_fn of a network for the variance-exploding process y = x + ς ε, with ς = e^{−λ/2}: y = z / α.

    Song et al. (arXiv:2011.13456). ς from 0.01 to 50 is λ from 9.21 to −7.82.
    """
    return rescaled(eps_fn, lambda logsnr: jnp.exp(-0.5 * log_sigmoid(logsnr)))


def sub_vp(eps_fn: Prediction) -> Prediction:
    """The eps_fn of a network for the sub-VP process, y = α_s x + (1 − α_s²) ε, Song et al. (arXiv:2011.13456).

    α_s / (1 − α_s²) = e^{λ/2} has the root α_s = 2 e^{λ/2} / (1 + sqrt(1 + 4 e^λ)), and the scale is
    2 sqrt(1 + e^λ) / (1 + sqrt(1 + 4 e^λ)).
    """

    def scale(logsnr: Array) -> Array:
        snr = jnp.exp(logsnr)
        return 2.0 * jnp.sqrt(1.0 + snr) / (1.0 + jnp.sqrt(1.0 + 4.0 * snr))

    return rescaled(eps_fn, scale)


def _adapted(
    predict: Prediction, name: str, meaning: str, eps_of: Callable[[Array, Array, Array], Array], given: Any = None
) -> Prediction:
    """(z, λ, labels) -> eps_of(z, prediction, λ). It keeps the attribute `logsnr_range` of the network."""
    check_function(name, predict, f"(z, logsnr, labels) -> {meaning}")

    def eps_fn(z: Array, logsnr: Array, labels: Any) -> Array:
        prediction = predict(z, logsnr, labels)
        check_returned(name, prediction, z.shape, meaning)
        return eps_of(z, prediction.astype(jnp.float32), logsnr)

    return functools.wraps(given or predict)(eps_fn)


def forward(
    z: Float[Array, "..."],
    eps: Float[Array, "..."],
    logsnr_from: Real[ArrayLike, "*b"],
    logsnr_to: Real[ArrayLike, "*b"],
) -> Float[Array, "..."]:
    """One step towards noise, from λ to λ' < λ: Eq. 2. A sample of q(z' | z) if ε is standard normal.

    z' = (α'/α) z + sqrt(1 − e^{λ'−λ}) σ' ε. Of `diffuse(x, ..., λ)` it has the distribution of `diffuse(x, ..., λ')`.
    Raises ValueError if λ' > λ.
    """
    remedy = "a step towards noise goes to a smaller λ: give logsnr_to <= logsnr_from"
    _check_order(remedy, logsnr_to=logsnr_to, logsnr_from=logsnr_from)
    logsnr, logsnr_to = per_example(logsnr_from, z), per_example(logsnr_to, z)
    kept = jnp.exp(0.5 * (log_sigmoid(logsnr_to) - log_sigmoid(logsnr)))
    return kept * z + jnp.sqrt(-jnp.expm1(logsnr_to - logsnr)) * jnp.exp(0.5 * log_sigmoid(-logsnr_to)) * eps


def posterior(
    z: Float[Array, "..."],
    x: Float[Array, "..."],
    logsnr: Real[ArrayLike, "*b"],
    logsnr_next: Real[ArrayLike, "*b"],
    v: Real[ArrayLike, "*v"],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Mean and standard deviation of one ancestral step from λ to λ' > λ: Eqs. 3 and 4.

    The mean is e^{λ−λ'} (α'/α) z + (1 − e^{λ−λ'}) α' x. The variance is (σ̃²_{λ'|λ})^{1−v} (σ²_{λ|λ'})^v, with
    σ̃²_{λ'|λ} = (1 − e^{λ−λ'}) σ'² at v = 0 and σ²_{λ|λ'} = (1 − e^{λ−λ'}) σ² at v = 1.

    v is a scalar, [B], or of the shape of z: one value per pixel, as a network with a learned variance gives it. The
    mean has the shape of z. The standard deviation has the broadcast shape of λ, λ' and v, with trailing axes of 1.
    Raises ValueError if λ' < λ or if v, unless it is per pixel, is outside [0, 1].
    """
    remedy = "an ancestral step goes to less noise: give logsnr_next >= logsnr"
    _check_order(remedy, logsnr=logsnr, logsnr_next=logsnr_next)
    if np.ndim(v) <= 1:  # a network's v is not bounded
        check_v(v)
    logsnr, logsnr_next, v = per_example(logsnr, z), per_example(logsnr_next, z), per_example(v, z)
    log_alpha, log_alpha_next = 0.5 * log_sigmoid(logsnr), 0.5 * log_sigmoid(logsnr_next)
    step = logsnr - logsnr_next
    kept, added = jnp.exp(step), -jnp.expm1(step)
    mean = kept * jnp.exp(log_alpha_next - log_alpha) * z + added * jnp.exp(log_alpha_next) * x
    log_variance = (1.0 - v) * log_sigmoid(-logsnr_next) + v * log_sigmoid(-logsnr)
    return mean, jnp.sqrt(added) * jnp.exp(0.5 * log_variance)


def _check_order(remedy: str, **levels: Real[ArrayLike, "*b"]) -> None:
    """Raises ValueError if the first of two λ is larger than the second, or if one is NaN."""
    low, high = (check_numbers(name, level, lambda x: ~np.isnan(x), remedy) for name, level in levels.items())
    if low is not None and high is not None and np.any(low > high):
        raise ValueError(" and ".join(f"{name} is {level}" for name, level in levels.items()) + f"; {remedy}")


def step_divergence(
    squared_error: Float[Array, "..."],
    logsnr: Real[ArrayLike, "*b"],
    logsnr_next: Real[ArrayLike, "*b"],
    v: Real[ArrayLike, "*v"],
) -> Float[Array, "..."]:
    """KL of q(z' | z, x) from an ancestral step with (x − x̂)² and v, per dimension, in nats: a term of the bound.

    ½ r (e^{λ'} − e^λ) (x − x̂)² + ½ (r − 1 − log r) with r = (σ'² / σ²)^v, the ratio of the variances: Ho et al.
    (arXiv:2006.11239), Eqs. 8 and 12, where v = 0 is β̃ and v = 1 is β. The shapes are as in `posterior`.
    """
    logsnr, logsnr_next = per_example(logsnr, squared_error), per_example(logsnr_next, squared_error)
    log_r = per_example(v, squared_error) * (log_sigmoid(-logsnr_next) - log_sigmoid(-logsnr))
    rise = jnp.exp(logsnr) * jnp.expm1(logsnr_next - logsnr)
    return 0.5 * jnp.exp(log_r) * rise * squared_error + 0.5 * (jnp.expm1(log_r) - log_r)


def check_v(v: Real[ArrayLike, "*v"]) -> None:
    """Raises ValueError if v is outside [0, 1]. Traced numbers are not checked."""
    remedy = "it interpolates between two variances: give a value in [0, 1]"
    check_numbers("v", v, lambda x: (x >= 0.0) & (x <= 1.0), remedy)


def per_example(value: Real[ArrayLike, "*b"], like: Array) -> Float[Array, "..."]:
    """The value as a scalar, or as [B, 1, ..., 1] to broadcast over `like` [B, ...]. ValueError for other rows."""
    value = jnp.asarray(value, jnp.float32)
    if any(1 not in (a, b) and a != b for a, b in zip(value.shape, np.shape(like), strict=False)):
        raise ValueError(f"{value.shape} numbers for an array of shape {np.shape(like)}: give one, or one per row, [B]")
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (like.ndim - value.ndim))
