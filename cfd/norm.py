"""Group normalisation, its gain and shift, and SiLU as one operation with its own gradient.

The network is correct with any other form. This one keeps x alone for the gradient, and is fast on a CPU: sums over
positions are made for each channel, and what is particular to a group stays in arrays of [b, c].
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

GROUPS = 32
EPSILON = 1e-5


def group_norm(
    x: Float[Array, "b h w c"], gain: Float[Array, "b c"], shift: Float[Array, "b c"], *, silu: bool
) -> Float[Array, "b h w c"]:
    """gain · (x − μ) / sqrt(σ² + ε) + shift over 32 groups, then SiLU if asked: Wu and He (arXiv:1803.08494).

    Computed in float32 and returned in the dtype of x. Raises ValueError if the groups do not divide the channels.
    """
    b, height, width, channels = x.shape
    if channels % GROUPS:
        raise ValueError(f"{channels} channels do not divide into {GROUPS} groups: change base_channels")
    y: Array = _group_norm(x.reshape(b, height * width, channels), gain, shift, silu)
    return y.reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _group_norm(x: Array, gain: Array, shift: Array, silu: bool) -> Array:
    return _forward(x, gain, shift, silu)[0]


def _forward(x: Array, gain: Array, shift: Array, silu: bool) -> tuple[Array, tuple[Array, ...]]:
    mean = _group_mean(_channel_means(x.astype(jnp.float32)))
    centred = x.astype(jnp.float32) - mean[:, None]
    rstd = jax.lax.rsqrt(_group_mean(_channel_means(jnp.square(centred))) + EPSILON)
    y = centred * (rstd * gain)[:, None] + shift[:, None]
    if silu:
        # A quotient, not a product with the sigmoid: XLA's CPU compiler recomputes a product at every copy that
        # `upsample` makes of it.
        y = y / (1.0 + jnp.exp(-y))
    return y.astype(x.dtype), (x, mean, rstd, gain, shift)


def _backward(silu: bool, kept: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, mean, rstd, gain, shift = kept
    centred = x.astype(jnp.float32) - mean[:, None]
    g = g.astype(jnp.float32)
    if silu:
        y = centred * (rstd * gain)[:, None] + shift[:, None]
        sigmoid = 1.0 / (1.0 + jnp.exp(-y))
        g = g * sigmoid * (1.0 + y * (1.0 - sigmoid))
    along_one, along_x = _channel_means(g), _channel_means(g * centred) * rstd
    constant, slope = rstd * _group_mean(gain * along_one), rstd * rstd * _group_mean(gain * along_x)
    dx = g * (rstd * gain)[:, None] - constant[:, None] - centred * slope[:, None]
    return dx.astype(x.dtype), x.shape[1] * along_x, x.shape[1] * along_one


_group_norm.defvjp(_forward, _backward)


def _channel_means(x: Float[Array, "b n c"]) -> Float[Array, "b c"]:
    """Means over positions. On a CPU a product with ones, which XLA does several times faster than a reduction."""
    ones = jnp.full((x.shape[0], 1, x.shape[1]), 1.0 / x.shape[1])
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: jnp.matmul(ones, x)[:, 0],
        default=lambda x: jnp.mean(x, axis=1),
    )


def _group_mean(x: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """The mean over the channels of each group, at every channel of it.

    Two thin products: were groups repeated into channels inside the loop over x, that loop would not be vectorised.
    """
    member: Any = jnp.repeat(jnp.eye(GROUPS), x.shape[1] // GROUPS, axis=0)
    mean = jnp.matmul(x, member * (GROUPS / x.shape[1]), precision="highest")
    return jnp.matmul(mean, member.T, precision="highest")
