"""The layers of the U-Net whose plain form is slow: group normalisation, convolution, attention.

The network is correct with any other form. On a CPU, sums over positions are matrix products with ones, many times
faster than XLA's reductions, and the softmax of attention runs over an axis that is not the last. On a GPU, attention
is cuDNN's, and what can be computed again from 16-bit arrays is not kept in float32. What many layers call is jitted,
so that it is traced once a shape: it spares three tenths of the time to trace a training step. Gradients are in reverse
mode alone, as their own are written out: `jax.jvp` of the network is a TypeError.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cfd import convolution

GROUPS = 32
EPSILON = 1e-5


class Conv(nn.Module):
    """A 3x3 convolution with padding 1, or 1x1; `zero` starts its kernel at 0, as ADM does at the end of a branch."""

    channels: int
    dtype: str
    size: int = 3
    stride: int = 1
    zero: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 k"]:
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        window = (self.size, self.size) if self.size > 1 else ()
        kernel = self.param("kernel", init, (*window, x.shape[-1], self.channels), jnp.float32).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        x, kernel, bias = jointly(alike(x.astype(self.dtype), kernel, bias))
        return add_bias(convolve(x, kernel, self.stride), bias)


def alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays; in a caller's `shard_map`, of types that vary over the same devices.

    A gradient of our own must have the type of its input: JAX then sums that of a replicated parameter itself.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    of_all = jax.lax.stop_gradient(
        sum((x.ravel()[0].astype(jnp.float32) for x in arrays), start=jnp.zeros((), jnp.float32))
    )
    return tuple(jnp.where(True, x, of_all.astype(x.dtype)) for x in arrays)


@jax.custom_vjp
def jointly(tree: Any) -> Any:
    """`tree`, whose gradients are `written` before one of them is used."""
    return tree


def written(arrays: Any) -> Any:
    """`arrays`, all of them in memory before one is used; on a CPU.

    The layers do this with the gradients that they take and give: XLA's CPU compiler would put those of kernels off,
    to keep what they are made of meanwhile, and compute one that is read in several places in each of them.
    """
    return jax.lax.platform_dependent(arrays, cpu=jax.lax.optimization_barrier, default=lambda a: a)


jointly.defvjp(lambda tree: (tree, None), lambda _, g: (written(g),))


def stored(x: Array) -> Array:
    """x, in memory once and in its dtype; on a GPU.

    XLA's GPU compiler would join what is concatenated in each operation that reads it, and keep what a 16-bit array is
    rounded from for those that compute in float32.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(x, cuda=barrier, rocm=barrier, default=lambda x: x)


def convolve(x: Float[Array, "b h w c"], kernel: Float[Array, "... c k"], stride: int) -> Float[Array, "b h2 w2 k"]:
    """The convolution of x with a kernel [3, 3, c, k], padding 1, or [c, k]."""
    if kernel.ndim == 2:  # in two axes: XLA's CPU compiler would copy the transpose of four for the kernel's gradient
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)
    strides, padding = (stride, stride), ((1, 1), (1, 1))
    plain = partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, dimension_numbers=convolution.LAYOUT
    )
    if stride > 1 or not convolution.pays(x, kernel):
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=convolution.convolve, default=plain)


@jax.custom_vjp
def add_bias(x: Float[Array, "b h w c"], bias: Float[Array, "c"]) -> Float[Array, "b h w c"]:
    """x + bias, in the dtype of x."""
    return x + bias.astype(x.dtype)[None, None, None]


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, None]:
    return add_bias(x, bias), None


def _add_bias_backward(_: None, g: Array) -> tuple[Array, Array]:
    b, height, width, channels = g.shape
    g = written(g)
    means = _channel_means(g.reshape(b, height * width, channels).astype(jnp.float32))
    return g, height * width * means.sum(axis=0)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.jit
def attention(
    q: Float[Array, "b t n d"], k: Float[Array, "b s n d"], v: Float[Array, "b s n d"]
) -> Float[Array, "b t n d"]:
    """softmax(q kᵀ / √d) v for each of n heads: Vaswani et al. (arXiv:1706.03762), Eq. 1. The softmax is float32.

    On a CUDA device, in 16 bits, it is cuDNN's, which keeps no [t, s] in memory, if cuDNN takes heads of that size.
    """
    plain = partial(jax.nn.dot_product_attention, implementation="xla")
    on_gpu = {"cuda": partial(jax.nn.dot_product_attention, implementation="cudnn")} if _cudnn_takes(q) else {}
    return jax.lax.platform_dependent(q, k, v, cpu=_attention_on_cpu, default=plain, **on_gpu)


def _cudnn_takes(q: Array) -> bool:
    device = jax.devices()[0]
    return (
        "cuda" in device.client.platform_version
        and float(device.compute_capability) >= 8.0
        and q.dtype.itemsize == 2
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
    )


def _attention_on_cpu(q: Array, k: Array, v: Array) -> Array:
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
    if q.shape[2] * k.shape[2] < 512 * 512:
        mixed = _mixed(q, k, v)
    else:  # one head at a time, so that its scores stay in the cache; they are computed again for the gradient
        head = jax.checkpoint(lambda qkv: _mixed(*qkv), prevent_cse=False)
        heads = jax.lax.map(head, tuple(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)))
        mixed = heads.reshape(*q.shape[:2], *heads.shape[1:])
    return jnp.moveaxis(mixed, 3, 1)


def _mixed(q: Float[Array, "*n t d"], k: Float[Array, "*n s d"], v: Float[Array, "*n s d"]) -> Float[Array, "*n d t"]:
    """softmax(k qᵀ) over s, times v."""
    scores = jnp.matmul(k, q.mT, preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-2, keepdims=True))).astype(v.dtype)
    # Rows of ones below v, so that the product also adds up the weights. Written, as XLA's CPU compiler would take v as
    # it lies in memory, and its product with a transposed array is slower.
    rows = written(jnp.concatenate([v.mT, jnp.ones((*v.shape[:-2], 8, v.shape[-2]), v.dtype)], axis=-2))
    mixed = jnp.matmul(rows, weights, preferred_element_type=jnp.float32)
    return (mixed[..., :-8, :] / mixed[..., -1:, :]).astype(v.dtype)


def group_norm(
    x: Float[Array, "b h w c"], gain: Float[Array, "b c"], shift: Float[Array, "b c"], *, silu: bool
) -> Float[Array, "b h w c"]:
    """gain · (x − μ) / sqrt(σ² + ε) + shift over 32 groups, then SiLU if asked: Wu and He (arXiv:1803.08494).

    Computed in float32 and returned in the dtype of x. Raises ValueError if the groups do not divide the channels.
    """
    b, height, width, channels = x.shape
    if channels % GROUPS:
        raise ValueError(f"{channels} channels do not divide into {GROUPS} groups: change base_channels")
    x, gain, shift = alike(x, gain, shift)
    y: Array = _group_norm(x.reshape(b, height * width, channels), gain, shift, silu)
    return y.reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _group_norm(x: Array, gain: Array, shift: Array, silu: bool) -> Array:
    return _forward(x, gain, shift, silu)[0]


@partial(jax.jit, static_argnums=3)
def _forward(x: Array, gain: Array, shift: Array, silu: bool) -> tuple[Array, tuple[Array, ...]]:
    mean, variance = jax.lax.platform_dependent(x, cpu=_moments_on_cpu, default=_moments)
    rstd = jax.lax.rsqrt(variance + EPSILON)
    y = (x.astype(jnp.float32) - mean[:, None]) * (rstd * gain)[:, None] + shift[:, None]
    if silu:
        # A quotient, not a product with the sigmoid: XLA's CPU compiler recomputes a product at every copy that
        # `upsample` makes of it.
        y = y / (1.0 + jnp.exp(-y))
    return y.astype(x.dtype), (x, mean, rstd, gain, shift)


def _moments_on_cpu(x: Float[Array, "b n c"]) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """The mean and the variance of the group of each channel."""
    x = x.astype(jnp.float32)
    mean = _group_mean(_channel_means(x))
    return mean, _group_mean(_channel_means(jnp.square(x - mean[:, None]), fold=True))


def _moments(x: Float[Array, "b n c"]) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """The same from one reading of x: of differences from each channel's first value, so that squares cancel little."""
    first = x[:, 0].astype(jnp.float32)
    apart = x.astype(jnp.float32) - first[:, None]
    offset, square = _channel_means(apart), _channel_means(jnp.square(apart))
    mean = _group_mean(first + offset)
    return mean, _group_mean(square - jnp.square(offset) + jnp.square(first + offset - mean))


@partial(jax.jit, static_argnums=0)
def _backward(silu: bool, kept: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    # Else XLA's CPU compiler would keep the exponentials of `_forward` for here.
    x, mean, rstd, gain, shift = written(kept)

    def centred_and_gradient(x: Array, g: Array) -> tuple[Array, Array]:
        centred = x.astype(jnp.float32) - mean[:, None]
        g = g.astype(jnp.float32)
        if silu:
            y = centred * (rstd * gain)[:, None] + shift[:, None]
            sigmoid = 1.0 / (1.0 + jnp.exp(-y))
            g = g * sigmoid * (1.0 + y * (1.0 - sigmoid))
        return centred, g

    def terms(x: Array, g: Array) -> tuple[Array, Array]:
        centred, g_in = centred_and_gradient(x, g)
        return g_in, g_in * centred

    def means(x: Array, g: Array) -> tuple[Array, ...]:
        along_one, along_x = terms(x, g)
        return x, g, _channel_means(along_one), _channel_means(along_x, fold=True)

    def means_on_gpu(x: Array, g: Array) -> tuple[Array, ...]:
        # The barrier keeps apart what is computed again below: XLA's GPU compiler would write it once, in float32.
        return jax.lax.optimization_barrier((x, g, *_means_by_eight(terms, x, g)))

    x, g, along_one, along_x = jax.lax.platform_dependent(x, g, cuda=means_on_gpu, rocm=means_on_gpu, default=means)
    centred, g_in = centred_and_gradient(x, g)
    along_x = along_x * rstd
    constant, slope = rstd * _group_mean(gain * along_one), rstd * rstd * _group_mean(gain * along_x)
    dx = g_in * (rstd * gain)[:, None] - constant[:, None] - centred * slope[:, None]
    return written((stored(dx.astype(x.dtype)), x.shape[1] * along_x, x.shape[1] * along_one))


_group_norm.defvjp(_forward, _backward)


@partial(jax.jit, static_argnames="fold")
def _channel_means(x: Float[Array, "b n c"], fold: bool = False) -> Float[Array, "b c"]:
    """Means over positions. On a CPU a product with ones, which XLA does several times faster than a reduction.

    There `fold` adds up to eight blocks of positions in the loop that makes x: x itself is not written to memory.
    """

    def product(x: Array) -> Array:
        if fold:
            blocks = math.gcd(8, x.shape[1])
            x = sum(jnp.split(x, blocks, axis=1), start=jnp.zeros((), jnp.float32)) / blocks
        return jnp.matmul(jnp.full((x.shape[0], 1, x.shape[1]), 1.0 / x.shape[1]), x)[:, 0]

    return jax.lax.platform_dependent(x, cpu=product, default=partial(jnp.mean, axis=1))


def _means_by_eight(
    make: Callable[..., tuple[Array, ...]], *arrays: Float[Array, "b n c"]
) -> tuple[Float[Array, "b c"], ...]:
    """Means over positions of the arrays that `make` computes from parts of `arrays`, each of which is read once.

    Sums of eight are written, and then added: XLA's GPU compiler is slow at a reduction whose terms take long to make.
    """
    b, n, c = arrays[0].shape
    parts = [jnp.split(x, math.gcd(8, n), axis=1) for x in arrays]
    sums = (sum(terms, start=jnp.zeros((), jnp.float32)) for terms in zip(*map(make, *parts), strict=True))
    # In two axes, else XLA would transpose them for the reduction.
    sums = jax.lax.optimization_barrier(tuple(x.reshape(-1, c) for x in sums))
    return tuple(x.reshape(b, -1, c).sum(axis=1) / n for x in sums)


@jax.jit
def _group_mean(x: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """The mean over the channels of each group, at every channel of it."""
    size = x.shape[1] // GROUPS
    # Were groups repeated into channels inside the loop over x, XLA's CPU compiler would not vectorise that loop.
    return written(jnp.repeat(x.reshape(-1, GROUPS, size).mean(axis=2), size, axis=1))
