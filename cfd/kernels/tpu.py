"""Forms of the layers for a TPU: attention by blocks of queries, and float32 gradients of kernels and biases.

They consist of JAX's own operations. Therefore they run on every platform, and are divided over devices as their inputs
are. The figures are counted in programs compiled for v5e chips, in bfloat16; no TPU has run them. Bytes are those that
pass through the chip's main memory in a training step, per chip. `cfd/benchmark/README.md` has more of them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

ROWS = 128
"""The number of queries that attention takes at a time."""


def pays(queries: int, keys: int) -> bool:
    """Whether `attention` takes so many queries, and moves less data than XLA: from 256 x 256 scores per head."""
    return queries % ROWS == 0 and queries * keys >= 256 * 256


def attention(
    q: Float[Array, "b t n d"], k: Float[Array, "b s n d"], v: Float[Array, "b s n d"]
) -> Float[Array, "b t n d"]:
    """softmax(q kᵀ / √d) v for each of n heads. The softmax is float32. See `_by_head`."""
    q, k, v = (jnp.transpose(x, (2, 3, 0, 1)) for x in (q, k, v))
    return jnp.transpose(_by_head((q, k, v)), (2, 3, 0, 1))


def self_attention(qkv: Float[Array, "b t 3 n d"]) -> Float[Array, "b t n d"]:
    """`layers.self_attention`, by `_by_head`.

    The positions are the last axis. With the 64 channels of a head as the last axis, XLA pads them to 128.
    """
    b, t, _, n, d = qkv.shape
    # In two axes, the channels are those of the convolution: XLA removes the caller's reshape, which would pad them.
    heads = jnp.moveaxis(jnp.transpose(qkv.reshape(b, t, -1), (2, 0, 1)).reshape(3, n, d, b, t), 1, 0)
    return jnp.transpose(_by_head(heads).reshape(n * d, b, t), (1, 2, 0)).reshape(b, t, n, d)


def _by_head(
    heads: Float[Array, "n 3 d b t"] | tuple[Float[Array, "n d b t"], Float[Array, "n d b s"], Float[Array, "n d b s"]],
) -> Float[Array, "n d b t"]:
    """Attention of the queries, keys and values of n heads.

    A step of ADM-64 with 32 images moves 54.8 instead of 109.8 GB, and takes 6.5 instead of 10.3 GB of temporary
    memory.

    One head and ROWS queries at a time, of which there must be a multiple. Their scores stay in the chip's vector
    memory, and are recomputed for the gradient. XLA's form writes all scores to the chip's main memory, and reads them
    back several times.
    """

    @partial(jax.checkpoint, prevent_cse=False)
    def rows(q: Array, k: Array, v: Array) -> Array:
        scores = jnp.einsum("dbt,dbs->bts", q, k, preferred_element_type=jnp.float32)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        out = jnp.einsum("bts,dbs->dbt", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / weights.sum(axis=-1)[None]).astype(v.dtype)

    @partial(jax.checkpoint, prevent_cse=False)  # without it, XLA keeps a second copy of the queries
    def head(arrays: Any) -> Array:
        q, k, v = arrays
        scaled = q * jnp.asarray(1.0 / math.sqrt(q.shape[0]), q.dtype)
        blocks = jnp.moveaxis(scaled.reshape(*q.shape[:2], -1, ROWS), 2, 0)
        return jnp.moveaxis(jax.lax.map(lambda q: rows(q, k, v), blocks), 0, 2).reshape(q.shape)

    return jax.lax.map(head, heads)


def dense(
    plain: Callable[[Array, Array], Array],
    x: Float[Array, "*b c"],
    kernel: Float[Array, "c k"],
    bias: Float[Array, "k"],
) -> Float[Array, "*b k"]:
    """`linear(plain, x, kernel)` plus the float32 bias, rounded once to the dtype of x.

    It gives no speed. The gradient of the bias is a float32 sum over the images of all chips.
    """
    y: Array = linear(plain, x, kernel)
    return (y.astype(jnp.float32) + bias.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(
    plain: Callable[[Array, Array], Array], x: Float[Array, "*b c"], kernel: Float[Array, "*window c k"]
) -> Float[Array, "*b2 k"]:
    """`plain(x, kernel)` in the dtype of x, for a float32 kernel, whose gradient is then a float32 sum.

    It gives no speed: a step of the benchmark's small network on four chips moves 1.5 % more bytes, and sums 0.034
    instead of 0.017 GB over the chips.

    `plain` is a function that is linear in each argument: a convolution or a product. With a kernel of 16 bits, the
    gradient would be rounded to 16 bits on each chip before the chips add theirs up.
    """
    return plain(x, kernel.astype(x.dtype))


def _linear_forward(plain: Callable[[Array, Array], Array], x: Array, kernel: Array) -> tuple[Array, tuple]:
    return linear(plain, x, kernel), (x, kernel)


def linear_gradients(
    plain: Callable[[Array, Array], Array], x: Float[Array, "*b c"], kernel: Float[Array, "*window c k"], g: Array
) -> tuple[Array, Array]:
    """The gradients of x and of the kernel, given g, that of `linear(plain, x, kernel)`."""
    # A float32 product on a TPU rounds its operands to bfloat16, which they are already, and its sum is float32.
    (dx,) = jax.linear_transpose(lambda x: plain(x, kernel.astype(x.dtype)), x)(g)
    (dkernel,) = jax.linear_transpose(lambda k: plain(x.astype(jnp.float32), k), kernel)(g.astype(jnp.float32))
    return dx, dkernel


linear.defvjp(_linear_forward, lambda plain, residuals, g: linear_gradients(plain, residuals[0], residuals[1], g))
