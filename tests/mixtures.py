"""Exact ε under the VP process for class-conditional Gaussians x | c ~ N(m_c, s_c² I). Label −1 is ∅."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def gaussian_eps(means: ArrayLike, stds: ArrayLike) -> Callable[[Array, Array, Array], Array]:
    """ε(z, c) = σ (z − α m_c) / (α² s_c² + σ²), linear in z. means [C, d], stds [C]; label −1 is the last row."""
    m, s = jnp.asarray(means, jnp.float32), jnp.asarray(stds, jnp.float32)

    def eps_fn(z: Array, logsnr: Array, labels: Array) -> Array:
        alpha, sigma = _alpha_sigma(logsnr)
        return (sigma / _variance(logsnr, s[labels]))[:, None] * (z - alpha[:, None] * m[labels])

    return eps_fn


def mixture_eps(means: ArrayLike, stds: ArrayLike) -> Callable[[Array, Array, Array], Array]:
    """`gaussian_eps` for labels 0 .. C−1; label −1 is the mixture of the C classes with equal weights."""
    m, s = jnp.asarray(means, jnp.float32), jnp.asarray(stds, jnp.float32)
    conditional = gaussian_eps(means, stds)

    def eps_fn(z: Array, logsnr: Array, labels: Array) -> Array:
        classes = jnp.arange(len(m))
        eps = jax.vmap(lambda c: conditional(z, logsnr, jnp.full(labels.shape, c)), out_axes=1)(classes)  # [B, C, d]
        posterior = jax.nn.softmax(log_densities(z, logsnr, m, s), axis=1)[:, :, None]
        return jnp.where(labels[:, None] < 0, jnp.sum(posterior * eps, axis=1), conditional(z, logsnr, labels))

    return eps_fn


def log_densities(z: Array, logsnr: Array, means: Array, stds: Array) -> Array:
    """log q(z | c) for every class, [B, C], of z [B, d], without the constant −d/2 log 2π."""
    alpha, _ = _alpha_sigma(logsnr)
    variance = _variance(logsnr[:, None], stds[None])
    squared = jnp.sum(jnp.square(z[:, None] - alpha[:, None, None] * means[None]), axis=-1)
    return -0.5 * (squared / variance + z.shape[1] * jnp.log(variance))


def _alpha_sigma(logsnr: Array) -> tuple[Array, Array]:
    return jax.lax.rsqrt(1.0 + jnp.exp(-logsnr)), jax.lax.rsqrt(1.0 + jnp.exp(logsnr))


def _variance(logsnr: Array, std: Array) -> Array:
    """The variance of z: α² s² + σ²."""
    alpha, sigma = _alpha_sigma(logsnr)
    return jnp.square(alpha * std) + jnp.square(sigma)
