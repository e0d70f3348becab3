"""Forms of the layers for a TPU: attention by blocks of queries, and float32 gradients of kernels.

They consist of JAX's own operations. Therefore they run on every platform, and are divided over devices as their inputs
are. The figures are counted in programs compiled for v5e chips, and no TPU has run them. Bytes are those that pass
through the chip's main memory, in bfloat16, gradient included.

- `attention`: with its projection to q, k and v, at 32x32 positions and 6 heads, 0.08 GB instead of 4.18 for 16 images,
  and no temporary memory instead of 0.84 GB; JAX's Pallas flash attention moves 1.39 GB in the same place. With 32
  images per chip, it is 0.93 GB. At 16x16 positions and 9 heads, 0.04 GB instead of 0.52 (32 images).
- `convolve`: it saves nothing; the gradients of convolutions are summed over the chips in float32, unlike those of the
  dense layers of the embedding. The bytes of a residual block at 64x64 with 192 channels change by 0.01 % (32 images
  per chip, four chips).
- Both, in the training step of the benchmark's small network (64 images per chip): see `cfd/benchmark/README.md`.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

ROWS = 128
"""The number of queries that `attention` takes at a time."""


def pays(q: Float[Array, "b t n d"], k: Float[Array, "b s n d"]) -> bool:
    """Whether `attention` takes the queries, and moves less data than XLA's form: from 256 x 256 scores per head."""
    return q.shape[1] % ROWS == 0 and q.shape[1] * k.shape[1] >= 256 * 256


def attention(
    q: Float[Array, "b t n d"], k: Float[Array, "b s n d"], v: Float[Array, "b s n d"]
) -> Float[Array, "b t n d"]:
    """softmax(q kᵀ / √d) v for each of n heads. The softmax is float32.

    One head and ROWS queries at a time, of which there must be a multiple. Their scores stay in the chip's vector
    memory, and are recomputed for the gradient. XLA's form writes all scores to the chip's main memory, and reads them
    back several times.
    """
    b, t, _, d = q.shape

    @partial(jax.checkpoint, prevent_cse=False)
    def rows(q: Array, k: Array, v: Array) -> Array:
        scores = jnp.einsum("btd,bsd->bts", q, k, preferred_element_type=jnp.float32)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        out = jnp.einsum("bts,bsd->btd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)

    def head(arrays: tuple[Array, Array, Array]) -> Array:
        q, k, v = arrays
        blocks = jnp.moveaxis(q.reshape(b, t // ROWS, ROWS, d), 1, 0)
        return jnp.moveaxis(jax.lax.map(lambda q: rows(q, k, v), blocks), 0, 1).reshape(b, t, d)

    scaled = q * jnp.asarray(1.0 / math.sqrt(d), q.dtype)
    return jnp.moveaxis(jax.lax.map(head, tuple(jnp.moveaxis(x, 2, 0) for x in (scaled, k, v))), 0, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(
    plain: Callable[[Array, Array], Array], x: Float[Array, "b h w c"], kernel: Float[Array, "... c k"]
) -> Float[Array, "b h2 w2 k"]:
    """`plain(x, kernel)` in the dtype of x, for a float32 kernel, whose gradient is then a float32 sum.

    `plain` is a function that is linear in each argument. With a kernel of 16 bits, the gradient would be rounded to 16
    bits on each chip before the chips add theirs up.
    """
    return plain(x, kernel.astype(x.dtype))


def _convolve_forward(plain: Callable[[Array, Array], Array], x: Array, kernel: Array) -> tuple[Array, tuple]:
    return convolve(plain, x, kernel), (x, kernel)


def _convolve_backward(
    plain: Callable[[Array, Array], Array], residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    # A float32 product on a TPU rounds its operands to bfloat16, which they are already, and its sum is float32.
    (dx,) = jax.linear_transpose(lambda x: plain(x, kernel.astype(x.dtype)), x)(g)
    (dkernel,) = jax.linear_transpose(lambda k: plain(x.astype(jnp.float32), k), kernel)(g.astype(jnp.float32))
    return dx, dkernel


convolve.defvjp(_convolve_forward, _convolve_backward)
