"""Training a conditional and an unconditional model jointly: Algorithm 1 of arXiv:2207.12598."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key, PyTree, UInt32

from cfd.guidance import NULL_LABEL, drop_labels
from cfd.process import cosine_logsnr, diffuse


def eps_loss(
    key: Key[Array, ""] | UInt32[Array, "2"],
    eps_fn: Callable[[Array, Array, Any], Array],
    x: Float[Array, "b ..."],
    labels: PyTree,
    *,
    null: PyTree = NULL_LABEL,
    p_uncond: Float[Array, ""] | float = 0.1,
    logsnr_min: float = -20.0,
    logsnr_max: float = 20.0,
) -> Float[Array, ""]:
    """E ‖ε_θ(z_λ, c) − ε‖², averaged over batch and dimensions: Eq. 5 and Algorithm 1, Ho and Salimans.

    x [B, ...] is data in [−1, 1]. `labels` and `null` are as in `guided_sample`. `eps_fn(z, logsnr, labels) -> eps`
    receives `null` for each label that was dropped, with probability p_uncond.

    Raises ValueError as `drop_labels` does, and if eps_fn returns another shape than that of z.
    """
    key_u, key_eps, key_drop = jax.random.split(key, 3)
    labels = drop_labels(key_drop, labels, p_uncond, null)
    u = jax.random.uniform(key_u, x.shape[:1], jnp.float32)
    logsnr = cosine_logsnr(u, logsnr_min, logsnr_max)
    eps = jax.random.normal(key_eps, x.shape, jnp.float32)
    z = diffuse(x, eps, logsnr)
    eps_hat = eps_fn(z, logsnr, labels)
    if eps_hat.shape != eps.shape:
        raise ValueError(f"eps_fn returned shape {eps_hat.shape}; it must return the noise of z, shape {eps.shape}")
    return jnp.mean(jnp.square(eps_hat - eps))
