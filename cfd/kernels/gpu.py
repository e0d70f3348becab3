"""Forms of the layers for a GPU: cuDNN's attention, means in two stages, and a barrier for XLA:GPU.

Attention is cuDNN's. Values that can be recomputed from 16-bit arrays are not kept in float32. XLA:GPU is XLA's
compiler for GPUs.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cfd.platforms import by_platform


def materialize_on_gpu(x: Array) -> Array:
    """x unchanged. On a GPU, a barrier: XLA writes x to memory once, in its own dtype.

    Otherwise XLA:GPU repeats a concatenation in each operation that reads its result, and keeps the float32 values that
    a 16-bit array was rounded from, for the operations that compute in float32.
    """
    barrier = jax.lax.optimization_barrier
    return by_platform(x, cuda=barrier, rocm=barrier, default=lambda x: x)


def means_in_two_stages(
    make: Callable[..., tuple[Array, ...]], *arrays: Float[Array, "b n c"]
) -> tuple[Float[Array, "b c"], ...]:
    """Means over positions of the arrays that `make` computes from `arrays`. Each of `arrays` is read once.

    `make` is applied to parts of the positions. XLA:GPU is slow at a reduction whose terms take long to compute.
    Therefore sums of eight terms (fewer where eight does not divide n) are written to memory first, and then added up.
    """
    b, n, c = arrays[0].shape
    parts = [jnp.split(x, math.gcd(8, n), axis=1) for x in arrays]
    sums = (sum(terms, start=jnp.zeros((), jnp.float32)) for terms in zip(*map(make, *parts), strict=True))
    # Reshape to two axes: XLA would transpose an array of three axes for the reduction.
    sums = jax.lax.optimization_barrier(tuple(x.reshape(-1, c) for x in sums))
    return tuple(x.reshape(b, -1, c).sum(axis=1) / n for x in sums)


def cudnn_takes(q: Float[Array, "b t n d"]) -> bool:
    """Whether `attention` runs with queries like q: 16 bits, d a multiple of 8 up to 128, compute capability >= 8.0."""
    device = jax.devices()[0]
    return (
        "cuda" in device.client.platform_version
        and float(device.compute_capability) >= 8.0
        and q.dtype.itemsize == 2
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
    )


def attention(
    q: Float[Array, "b t n d"], k: Float[Array, "b s n d"], v: Float[Array, "b s n d"]
) -> Float[Array, "b t n d"]:
    """softmax(q kᵀ / √d) v for each of n heads: cuDNN's fused attention, which keeps no [t, s] array in memory."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
