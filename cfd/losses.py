"""Training a conditional and an unconditional model jointly: Algorithm 1 of arXiv:2207.12598."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Key, PyTree, Real, UInt32

from cfd.arguments import check_data, check_returned, threefry
from cfd.guidance import NULL_LABEL, batch_size, drop_labels
from cfd.process import cosine_logsnr, diffuse


def eps_loss(
    key: Key[Array, ""] | UInt32[Array, "2"] | UInt32[Array, "4"],
    eps_fn: Callable[[Array, Array, Any], Array],
    x: Float[Array, "b ..."],
    labels: PyTree,
    *,
    null: PyTree = NULL_LABEL,
    p_uncond: Real[ArrayLike, "*b"] = 0.1,
    logsnr_min: Real[ArrayLike, ""] = -20.0,
    logsnr_max: Real[ArrayLike, ""] = 20.0,
) -> Float[Array, ""]:
    """E ‖ε_θ(z_λ, c) − ε‖², averaged over batch and dimensions: Eq. 5 and Algorithm 1, Ho and Salimans.

    x [B, ...] is data in [−1, 1]. `labels` and `null` are as in `guided_sample`. `eps_fn(z, logsnr, labels) -> eps`
    receives `null` for each label that was dropped, with probability p_uncond.

    The key is as in `threefry`.

    Raises ValueError as `drop_labels` and `cosine_logsnr` do, if x and labels do not agree, and if eps_fn returns no
    array of the shape of z.
    """
    check_data(x, (batch_size(labels),))
    key_u, key_eps, key_drop = jax.random.split(threefry(key), 3)
    labels = drop_labels(key_drop, labels, p_uncond, null)
    u = jax.random.uniform(key_u, x.shape[:1], jnp.float32)
    logsnr = cosine_logsnr(u, logsnr_min, logsnr_max)
    eps = jax.random.normal(key_eps, x.shape, jnp.float32)
    z = diffuse(x, eps, logsnr)
    eps_hat = eps_fn(z, logsnr, labels)
    check_returned("eps_fn", eps_hat, eps.shape, "the noise of z")
    return jnp.mean(jnp.square(eps_hat - eps))
