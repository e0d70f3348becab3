"""Forms of the layers for a CPU: sums over positions as matrix products, attention, and barriers for XLA:CPU.

Sums over positions are matrix products with ones, many times faster than XLA's reductions. The softmax of attention
runs over an axis that is not the last. XLA:CPU is XLA's compiler for CPUs. The functions that choose by platform may be
called on any: `materialize_on_cpu`, `barrier_gradients`, `channel_means`, `group_means`, `bias_gradient`.

A form's gain is the CPU time without it / with it, of the loss and its gradient, in `cfd.benchmark`'s small network
and in that of the config digits.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cfd.platforms import by_platform


def materialize_on_cpu(arrays: Any) -> Any:
    """`arrays` unchanged. On a CPU, a barrier: XLA writes all of them to memory before any of them is used.

    Layers apply this to incoming and outgoing gradients. Otherwise XLA:CPU defers kernel gradients, keeps their inputs
    alive, and recomputes any gradient that has several consumers. All barriers together gain 1.14; digits 1.43.
    """
    return by_platform(arrays, cpu=jax.lax.optimization_barrier, default=lambda a: a)


@jax.custom_vjp
def barrier_gradients(tree: Any) -> Any:
    """`tree` unchanged. Its gradients all pass through `materialize_on_cpu` together.

    It saves no time (gain 0.99; digits 1.02). Without it, a step with `remat` keeps what `remat` should not: 27.4
    instead of 20.0 MB in a network of 6 blocks per side and 32 channels.
    """
    return tree


barrier_gradients.defvjp(lambda tree: (tree, None), lambda _, g: (materialize_on_cpu(g),))


def transposed_product(x: Float[Array, "*b n c"], g: Float[Array, "*b n k"]) -> Float[Array, "*b c k"]:
    """xᵀ g. In a program with the options of `devices.xla`, it has the same bits on any number of threads.

    The outer barrier makes XLA:CPU write xᵀ to memory. Without the inner one, it would copy an x that was reshaped
    first. The product is then one for its YNN library, which computes each sum in the same order on any number of
    threads, and is faster. With x in its own memory layout, the product would be one for Eigen. Eigen divides n into
    parts whose size differs between one thread and several. With few rows and columns, it also divides n among the
    threads.
    """
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(x).mT) @ g


@jax.custom_vjp
def product(x: Float[Array, "*b n c"], kernel: Float[Array, "*b c k"]) -> Float[Array, "*b n k"]:
    """x · kernel, with `product_gradients`."""
    return x @ kernel


def product_gradients(
    x: Float[Array, "*b n c"], kernel: Float[Array, "*b c k"], g: Float[Array, "*b n k"]
) -> tuple[Float[Array, "*b n c"], Float[Array, "*b c k"]]:
    """The gradients of x and of the kernel, given g, that of x · kernel. The latter is a `transposed_product`."""
    return g @ kernel.mT, transposed_product(x, g)


product.defvjp(
    lambda x, kernel: (x @ kernel, (x, kernel)), lambda residuals, g: product_gradients(residuals[0], residuals[1], g)
)


@partial(jax.jit, static_argnames="fold")
def channel_means(x: Float[Array, "b n c"], fold: bool = False) -> Float[Array, "b c"]:
    """Means over positions. On a CPU, a product with ones, faster than XLA's reduction: gain 1.07 in both networks.

    With `fold`, the CPU's form first adds up to eight blocks of positions. XLA:CPU does so in the loop that computes x,
    and does not write x itself to memory.

    The ones have two rows, of which the result is the first: XLA:CPU calls a library for a product of matrices, but
    compiles a loop of its own for each product of a vector with a matrix, which takes as long to run.
    """

    def product(x: Array) -> Array:
        if fold:
            blocks = math.gcd(8, x.shape[1])
            x = sum(jnp.split(x, blocks, axis=1), start=jnp.zeros((), jnp.float32)) / blocks
        return jnp.matmul(jnp.full((x.shape[0], 2, x.shape[1]), 1.0 / x.shape[1]), x)[:, 0]

    return by_platform(x, cpu=product, default=partial(jnp.mean, axis=1))


@partial(jax.jit, static_argnames="num_groups")
def group_means(x: Float[Array, "b c"], num_groups: int) -> Float[Array, "b c"]:
    """The mean over the channels of each group, repeated for every channel of the group."""
    size = x.shape[1] // num_groups
    # Without the barrier, XLA:CPU repeats groups into channels inside the loop that reads them, and cannot vectorise
    # that loop. Gain 1.05; digits 1.02.
    return materialize_on_cpu(jnp.repeat(x.reshape(-1, num_groups, size).mean(axis=2), size, axis=1))


def moments(x: Float[Array, "b n c"], num_groups: int) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """The mean and the variance of each channel's group, from two passes over x: mean, then squared differences.

    It takes as long as one pass (0.99 times; digits 1.01), and subtracts no large squares.
    """
    x = x.astype(jnp.float32)
    mean = group_means(channel_means(x), num_groups)
    return mean, group_means(channel_means(jnp.square(x - mean[:, None]), fold=True), num_groups)


def bias_gradient(g: Float[Array, "b h w c"]) -> Float[Array, "c"]:
    """The gradient of a bias: g summed over images and positions, in float32.

    It is built from `channel_means`, and is therefore a matrix product on a CPU. Gain 1.07; digits 1.04.
    """
    b, height, width, channels = g.shape
    means = channel_means(g.reshape(b, height * width, channels).astype(jnp.float32))
    return height * width * means.sum(axis=0)


def attention(
    q: Float[Array, "b t n d"], k: Float[Array, "b s n d"], v: Float[Array, "b s n d"]
) -> Float[Array, "b t n d"]:
    """softmax(q kᵀ / √d) v for each of n heads. The softmax is float32.

    From 512 · 512 scores per head, heads are computed one at a time: the scores of one head fit in the cache. They are
    recomputed for the gradient. The small network's forward pass gains 1.07, and digits nothing.
    """
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
    if q.shape[2] * k.shape[2] < 512 * 512:
        out = _softmax_product(q, k, v)
    else:
        head = jax.checkpoint(lambda qkv: _softmax_product(*qkv), prevent_cse=False)
        heads = jax.lax.map(head, tuple(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)))
        out = heads.reshape(*q.shape[:2], *heads.shape[1:])
    return jnp.moveaxis(out, 3, 1)


def _softmax_product(
    q: Float[Array, "*n t d"], k: Float[Array, "*n s d"], v: Float[Array, "*n s d"]
) -> Float[Array, "*n d t"]:
    """vᵀ times the softmax of k qᵀ over s."""
    scores = product(k, q.mT) if k.dtype == jnp.float32 else jnp.matmul(k, q.mT, preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-2, keepdims=True))).astype(v.dtype)
    # Rows of ones below vᵀ make the same product also add up the weights. Without the barrier, XLA:CPU reads v in its
    # original memory layout, and a product with a transposed array is slower.
    rows = materialize_on_cpu(jnp.concatenate([v.mT, jnp.ones((*v.shape[:-2], 8, v.shape[-2]), v.dtype)], axis=-2))
    out = jnp.matmul(rows, weights, preferred_element_type=jnp.float32)
    return (out[..., :-8, :] / out[..., -1:, :]).astype(v.dtype)
