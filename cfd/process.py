"""The variance-preserving process in log-SNR λ: z = α x + σ ε, α² = sigmoid(λ), σ² = sigmoid(−λ).

Ho and Salimans, Classifier-Free Diffusion Guidance (arXiv:2207.12598), Section 2. Every function takes λ as a scalar or
as [B], one value per row, and broadcasts it over the trailing axes of z. The formulas are arranged to keep float32
precision at both ends, λ = ±20, where 1 − sigmoid(λ) would round to 0.

Numbers of any type are checked where they are concrete: a λ that is NaN is a ValueError. Traced numbers are not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import log_sigmoid
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from cfd.arguments import check_numbers


def cosine_logsnr(
    u: Real[ArrayLike, "*b"],
    logsnr_min: Real[ArrayLike, ""] = -20.0,
    logsnr_max: Real[ArrayLike, ""] = 20.0,
) -> Float[Array, "*b"]:
    """λ(u) = −2 log tan(a u + b) for u in [0, 1]: the cosine schedule, Section 2. λ(0) is logsnr_max.

    The angle is measured from the nearer end of the schedule, because tan near π/2 loses 1e-3 of λ in float32.
    Raises ValueError if u is outside [0, 1], and as `check_ends` does.
    """
    check_ends(logsnr_min, logsnr_max)
    check_numbers("u", u, lambda x: (x >= 0.0) & (x <= 1.0), "it is the time of the schedule: give values in [0, 1]")
    u = jnp.asarray(u, jnp.float32)
    b_clean = jnp.arctan(jnp.exp(-0.5 * jnp.asarray(logsnr_max, jnp.float32)))
    b_noise = jnp.arctan(jnp.exp(0.5 * jnp.asarray(logsnr_min, jnp.float32)))
    a = 0.5 * jnp.pi - b_clean - b_noise
    clean_half = u < 0.5
    angle = jnp.where(clean_half, a * u + b_clean, a * (1.0 - u) + b_noise)
    return jnp.where(clean_half, -2.0, 2.0) * jnp.log(jnp.tan(angle))


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
    """z = α x + σ ε, a sample of q(z | x) if ε is standard normal: Eq. 1."""
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

    The mean has the shape of z. The standard deviation has the broadcast shape of λ, λ' and v, with trailing axes of 1.
    Raises ValueError if λ' < λ or if v is outside [0, 1].
    """
    remedy = "an ancestral step goes to less noise: give logsnr_next >= logsnr"
    start = check_numbers("logsnr", logsnr, lambda x: ~np.isnan(x), remedy)
    end = check_numbers("logsnr_next", logsnr_next, lambda x: ~np.isnan(x), remedy)
    if start is not None and end is not None and np.any(np.float32(end) < np.float32(start)):
        raise ValueError(f"logsnr is {logsnr} and logsnr_next {logsnr_next}; {remedy}")
    check_v(v)
    logsnr, logsnr_next, v = per_example(logsnr, z), per_example(logsnr_next, z), per_example(v, z)
    log_alpha, log_alpha_next = 0.5 * log_sigmoid(logsnr), 0.5 * log_sigmoid(logsnr_next)
    step = logsnr - logsnr_next
    kept, added = jnp.exp(step), -jnp.expm1(step)
    mean = kept * jnp.exp(log_alpha_next - log_alpha) * z + added * jnp.exp(log_alpha_next) * x
    log_variance = (1.0 - v) * log_sigmoid(-logsnr_next) + v * log_sigmoid(-logsnr)
    return mean, jnp.sqrt(added) * jnp.exp(0.5 * log_variance)


def check_v(v: Real[ArrayLike, "*v"]) -> None:
    """Raises ValueError if v is outside [0, 1]. Traced numbers are not checked."""
    check_numbers(
        "v", v, lambda x: (x >= 0.0) & (x <= 1.0), "it interpolates between two variances: give a value in [0, 1]"
    )


def per_example(value: Real[ArrayLike, "*b"], like: Array) -> Float[Array, "..."]:
    """The value as a scalar, or as [B, 1, ..., 1] so that it broadcasts over `like` [B, ...]."""
    value = jnp.asarray(value, jnp.float32)
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (like.ndim - value.ndim))
