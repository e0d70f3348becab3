"""The variance-preserving process in log-SNR λ: z = α x + σ ε, α² = sigmoid(λ), σ² = sigmoid(−λ).

Ho and Salimans, Classifier-Free Diffusion Guidance (arXiv:2207.12598), Section 2. Every function takes λ as a scalar or
as [B], one value per row, and broadcasts it over the trailing axes of z. The formulas are arranged to keep float32
precision at both ends, λ = ±20, where 1 − sigmoid(λ) would round to 0.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid
from jaxtyping import Float


def cosine_logsnr(
    u: Float[Array, "*b"] | float,
    logsnr_min: Float[Array, ""] | float = -20.0,
    logsnr_max: Float[Array, ""] | float = 20.0,
) -> Float[Array, "*b"]:
    """λ(u) = −2 log tan(a u + b) for u in [0, 1]: the cosine schedule, Section 2. λ(0) is logsnr_max.

    The angle is measured from the nearer end of the schedule, because tan near π/2 loses 1e-3 of λ in float32.
    """
    u = jnp.asarray(u, jnp.float32)
    b_clean = jnp.arctan(jnp.exp(-0.5 * jnp.asarray(logsnr_max, jnp.float32)))
    b_noise = jnp.arctan(jnp.exp(0.5 * jnp.asarray(logsnr_min, jnp.float32)))
    a = 0.5 * jnp.pi - b_clean - b_noise
    clean_half = u < 0.5
    angle = jnp.where(clean_half, a * u + b_clean, a * (1.0 - u) + b_noise)
    return jnp.where(clean_half, -2.0, 2.0) * jnp.log(jnp.tan(angle))


def alpha_sigma(logsnr: Float[Array, "*b"] | float) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """The pair (α, σ) at λ, with α² + σ² = 1: Section 2."""
    logsnr = jnp.asarray(logsnr, jnp.float32)
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def diffuse(
    x: Float[Array, "..."], eps: Float[Array, "..."], logsnr: Float[Array, "*b"] | float
) -> Float[Array, "..."]:
    """z = α x + σ ε, a sample of q(z | x) if ε is standard normal: Eq. 1."""
    alpha, sigma = alpha_sigma(per_example(logsnr, x))
    return alpha * x + sigma * eps


def x_from_eps(
    z: Float[Array, "..."], eps: Float[Array, "..."], logsnr: Float[Array, "*b"] | float
) -> Float[Array, "..."]:
    """x = (z − σ ε) / α: the data that z and ε imply, Section 2."""
    alpha, sigma = alpha_sigma(per_example(logsnr, z))
    return (z - sigma * eps) / alpha


def eps_from_x(
    z: Float[Array, "..."], x: Float[Array, "..."], logsnr: Float[Array, "*b"] | float
) -> Float[Array, "..."]:
    """ε = (z − α x) / σ: the noise that z and x imply. The inverse of `x_from_eps`."""
    alpha, sigma = alpha_sigma(per_example(logsnr, z))
    return (z - alpha * x) / sigma


def posterior(
    z: Float[Array, "..."],
    x: Float[Array, "..."],
    logsnr: Float[Array, "*b"] | float,
    logsnr_next: Float[Array, "*b"] | float,
    v: Float[Array, "*v"] | float,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Mean and standard deviation of one ancestral step from λ to λ' > λ: Eqs. 3 and 4.

    The mean is e^{λ−λ'} (α'/α) z + (1 − e^{λ−λ'}) α' x. The variance is (σ̃²_{λ'|λ})^{1−v} (σ²_{λ|λ'})^v, with
    σ̃²_{λ'|λ} = (1 − e^{λ−λ'}) σ'² at v = 0 and σ²_{λ|λ'} = (1 − e^{λ−λ'}) σ² at v = 1.

    The mean has the shape of z. The standard deviation has the broadcast shape of λ, λ' and v, with trailing axes of 1.
    """
    logsnr, logsnr_next, v = per_example(logsnr, z), per_example(logsnr_next, z), per_example(v, z)
    log_alpha, log_alpha_next = 0.5 * log_sigmoid(logsnr), 0.5 * log_sigmoid(logsnr_next)
    step = logsnr - logsnr_next
    kept, added = jnp.exp(step), -jnp.expm1(step)
    mean = kept * jnp.exp(log_alpha_next - log_alpha) * z + added * jnp.exp(log_alpha_next) * x
    log_variance = (1.0 - v) * log_sigmoid(-logsnr_next) + v * log_sigmoid(-logsnr)
    return mean, jnp.sqrt(added) * jnp.exp(0.5 * log_variance)


def per_example(value: Float[Array, "*b"] | float, like: Array) -> Float[Array, "..."]:
    """The value as a scalar, or as [B, 1, ..., 1] so that it broadcasts over `like` [B, ...]."""
    value = jnp.asarray(value, jnp.float32)
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (like.ndim - value.ndim))
