"""The layers of the U-Net, each with its equation: convolution, bias, attention, group normalisation.

Every layer has a plain form, and with `fast` (the default) the forms of `cfd.kernels` for some platforms, among which
`cfd.platforms` chooses. They all compute the same function up to rounding. The fast forms have
hand-written gradients, which JAX can use in reverse mode only: `jax.jvp`, `jax.jacfwd` and `jax.linearize` need
`fast=False`. Functions that many layers call are jitted: JAX then traces each once per shape, which saves three tenths
of the time to trace a training step.

While Flax initialises parameters, which depend on no value, `Conv`, `Dense` and `unet.Norm` give zeros of the right
shape. An `init` is then traced in half the time. `init_with_output` gives no output of the network.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cfd.kernels import cpu, direct, gpu, tpu, winograd
from cfd.kernels import group_norm as group_norm_kernel
from cfd.platforms import by_platform

GROUPS = 32
EPSILON = 1e-5


class Conv(nn.Module):
    """A convolution and its bias: 3x3 with padding 1, or 1x1.

    With `zero`, the kernel is initialised to 0, as ADM does at the end of each residual branch.
    """

    channels: int
    dtype: str
    size: int = 3
    stride: int = 1
    zero: bool = False
    fast: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 k"]:
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        window = (self.size, self.size) if self.size > 1 else ()
        kernel = self.param("kernel", init, (*window, x.shape[-1], self.channels), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        if self.is_initializing():
            height, width = (-(-size // self.stride) for size in x.shape[1:3])
            return jnp.zeros((x.shape[0], height, width, self.channels), self.dtype)
        x = x.astype(self.dtype)
        if not self.fast:
            y = convolve(x, kernel.astype(self.dtype), self.stride, fast=False).astype(jnp.float32)
            return (y + bias[None, None, None]).astype(self.dtype)
        return convolve(x, kernel, self.stride, bias)


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "... c k"],
    stride: int,
    bias: Float[Array, "k"] | None = None,
    *,
    fast: bool = True,
) -> Float[Array, "b h2 w2 k"]:
    """y[i, j, k] = Σ_{u, v, c} x[s·i + u − 1, s·j + v − 1, c] · kernel[u, v, c, k] + bias[k], with stride s, padding 1.

    A kernel of shape [c, k] is 1x1, without padding and stride: y[i, j, k] = Σ_c x[i, j, c] · kernel[c, k] + bias[k].
    Kernel and bias are rounded to the dtype of x. The gradient of the bias is summed in float32.
    """
    parameters = (kernel,) if bias is None else (kernel, bias)
    if fast:
        return _convolve(stride, *cast_varying(x, *parameters))
    y = _rounded(_plain_convolution(stride, kernel), x, kernel)
    return y if bias is None else y + bias.astype(x.dtype)[None, None, None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(stride: int, x: Float[Array, "b h w c"], *parameters: Array) -> Float[Array, "b h2 w2 k"]:
    return _output(stride, x, *parameters)


@partial(jax.jit, static_argnums=0)
def _output(stride: int, x: Float[Array, "b h w c"], kernel: Array, *bias: Array) -> Float[Array, "b h2 w2 k"]:
    y: Array = _by_platform({name: form.output for name, form in _forms(stride, x, kernel).items()}, x, kernel)
    return y + bias[0].astype(x.dtype)[None, None, None] if bias else y


@partial(jax.jit, static_argnums=0)
def _gradients(stride: int, residuals: tuple[Array, ...], g: Float[Array, "b h2 w2 k"]) -> tuple[Array, ...]:
    """The gradients of x and of the parameters."""
    x, kernel, *bias = residuals
    x, g = cpu.materialize_on_cpu((x, g))
    forms = {name: form.gradients for name, form in _forms(stride, x, kernel).items()}
    gradients = _by_platform(forms, x, kernel, g)
    return cpu.materialize_on_cpu((*gradients, cpu.bias_gradient(g)) if bias else gradients)


_convolve.defvjp(lambda stride, *arrays: (_output(stride, *arrays), arrays), _gradients)


class Form(NamedTuple):
    """Functions of one platform for the convolution of x and a kernel, and for its gradients."""

    output: Callable[[Array, Array], Array]
    """(x, kernel) -> y."""
    gradients: Callable[[Array, Array, Array], tuple[Array, Array]]
    """(x, kernel, the gradient of y) -> the gradients of x and of the kernel."""


def _forms(stride: int, x: Float[Array, "b h w c"], kernel: Float[Array, "... c k"]) -> dict[str, Form]:
    """{platform: form} for convolutions of these shapes and dtypes. All platforms without a form take "default"."""
    plain = _plain_convolution(stride, kernel)
    rounded = partial(_rounded, plain)
    forms = {"default": Form(rounded, lambda x, kernel, g: jax.vjp(rounded, x, kernel)[1](g))}
    if kernel.dtype != x.dtype:
        forms["tpu"] = Form(rounded, partial(tpu.linear_gradients, plain))
    elif kernel.ndim == 2 and x.dtype == jnp.float32:
        forms["cpu"] = Form(plain, _product_gradients)
    elif stride == 1 and kernel.ndim == 4 and direct.pays(x, kernel):
        forms["cpu"] = Form(direct.convolve, direct.gradients)
    elif stride == 1 and kernel.ndim == 4 and winograd.pays(x, kernel):
        forms["cpu"] = Form(winograd.convolve, winograd.gradients)
    return forms


def _by_platform(functions: dict[str, Callable[..., Any]], *arrays: Array) -> Any:
    if len(functions) == 1:
        return functions["default"](*arrays)
    return by_platform(*arrays, **functions)


def _plain_convolution(stride: int, kernel: Float[Array, "... c k"]) -> Callable[[Array, Array], Array]:
    if kernel.ndim == 2:
        return product
    return partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=winograd.LAYOUT,
    )


def _product_gradients(
    x: Float[Array, "b h w c"], kernel: Float[Array, "c k"], g: Float[Array, "b h w k"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "c k"]]:
    dx, dkernel = cpu.product_gradients(x.reshape(-1, x.shape[-1]), kernel, g.reshape(-1, g.shape[-1]))
    return dx.reshape(x.shape), dkernel


def product(
    x: Float[Array, "*b c"], kernel: Float[Array, "c k"], of_rows: Callable[[Array, Array], Array] = jnp.matmul
) -> Float[Array, "*b k"]:
    """Σ_c x[..., c] · kernel[c, k], a 1x1 convolution. `of_rows` computes it for x with two axes."""
    # The product has two axes, because XLA:CPU would copy the transpose of a 4-axis x for the kernel's gradient.
    return of_rows(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


class Dense(nn.Module):
    """y = x · kernel + bias along the last axis, in `dtype`. With `zero`, the kernel is initialised to 0.

    It differs from `flax.linen.Dense` in gradients alone. On a TPU, those of a network in bfloat16 are float32 sums. On
    a CPU, those of x with three axes or more have the same bits on any number of threads.
    """

    channels: int
    dtype: str
    use_bias: bool = True
    zero: bool = False
    fast: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b k"]:
        init = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], self.channels), jnp.float32)
        x, bias = x.astype(self.dtype), None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        if self.is_initializing():
            return jnp.zeros((*x.shape[:-1], self.channels), self.dtype)
        return dense(x, kernel, bias, fast=self.fast)


def dense(
    x: Float[Array, "*b c"], kernel: Float[Array, "c k"], bias: Float[Array, "k"] | None, *, fast: bool = True
) -> Float[Array, "*b k"]:
    """y[..., k] = Σ_c x[..., c] · kernel[c, k] + bias[k]. Kernel and bias are rounded to the dtype of x.

    On a TPU, the bias is not rounded, but its sum with the product is.
    """

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))

    def rounded(x: Array, kernel: Array, *bias: Array, product: Callable[[Array, Array], Array] = plain) -> Array:
        y = _rounded(product, x, kernel)
        return y + bias[0].astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,)) if bias else y

    parameters = (kernel,) if bias is None else (kernel, bias)
    if not fast or (kernel.dtype == x.dtype and (x.ndim == 2 or x.dtype != jnp.float32)):
        return rounded(x, *parameters)
    x, *parameters = cast_varying(x, *parameters)
    if kernel.dtype == x.dtype:
        on_cpu = partial(rounded, product=partial(product, of_rows=cpu.product))
        return by_platform(x, *parameters, cpu=on_cpu, default=rounded)
    on_tpu = partial(tpu.linear if bias is None else tpu.dense, plain)
    return by_platform(x, *parameters, tpu=on_tpu, default=rounded)


def _rounded(plain: Callable[[Array, Array], Array], x: Array, kernel: Array) -> Array:
    return plain(x, kernel.astype(x.dtype))


@partial(jax.jit, static_argnames="fast")
def attention(
    q: Float[Array, "b t n d"], k: Float[Array, "b s n d"], v: Float[Array, "b s n d"], *, fast: bool = True
) -> Float[Array, "b t n d"]:
    """softmax(q kᵀ / √d) v for each of n heads: Vaswani et al. (arXiv:1706.03762), Eq. 1. The softmax is float32."""
    plain = partial(jax.nn.dot_product_attention, implementation="xla")
    if not fast:
        return plain(*(x.astype(jnp.float32) for x in (q, k, v))).astype(q.dtype)
    cudnn = {"cuda": gpu.attention} if gpu.cudnn_takes(q) else {}
    on_tpu = tpu.attention if tpu.pays(q.shape[1], k.shape[1]) else plain
    # JAX's attention itself promotes 16 bits to float32, which `jax_numpy_dtype_promotion="strict"` would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return by_platform(q, k, v, cpu=cpu.attention, tpu=on_tpu, default=plain, **cudnn)


@partial(jax.jit, static_argnames="fast")
def self_attention(qkv: Float[Array, "b t 3 n d"], *, fast: bool = True) -> Float[Array, "b t n d"]:
    """`attention` of the queries, keys and values of n heads, with each other."""

    def plain(qkv: Array) -> Array:
        return attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], fast=fast)

    if not fast or not tpu.pays(qkv.shape[1], qkv.shape[1]):
        return plain(qkv)
    return by_platform(qkv, tpu=tpu.self_attention, default=plain)


def group_norm(
    x: Float[Array, "b h w c"], gain: Float[Array, "b c"], shift: Float[Array, "b c"], *, silu: bool, fast: bool = True
) -> Float[Array, "b h w c"]:
    """gain · (x − μ) / sqrt(σ² + ε) + shift over 32 groups, then SiLU if asked: Wu and He (arXiv:1803.08494).

    Computed in float32 and returned in the dtype of x. Raises ValueError if the groups do not divide the channels.
    """
    b, height, width, channels = x.shape
    if channels % GROUPS:
        raise ValueError(
            f"{channels} channels do not divide into {GROUPS} groups: choose base_channels as a multiple of {GROUPS}"
        )
    if fast:
        x, gain, shift = cast_varying(x, gain, shift)
        rows = x.reshape(b, height * width, channels)
        y: Array = group_norm_kernel.group_norm(rows, gain, shift, GROUPS, EPSILON, silu)
        return y.reshape(x.shape)
    groups = x.astype(jnp.float32).reshape(b, height, width, GROUPS, channels // GROUPS)
    centred = groups - groups.mean((1, 2, 4), keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 2, 4), keepdims=True) + EPSILON)
    y = normal.reshape(x.shape) * gain[:, None, None] + shift[:, None, None]
    return (jax.nn.silu(y) if silu else y).astype(x.dtype)


def concatenate(
    x: Float[Array, "b h w c"], skip: Float[Array, "b h w k"], *, fast: bool = True
) -> Float[Array, "b h w c+k"]:
    """[x, skip] along the channels."""
    if not fast:
        return jnp.concatenate((x, skip), -1)
    return gpu.materialize_on_gpu(jnp.concatenate(cpu.barrier_gradients((x, skip)), -1))


def cast_varying(*arrays: Array) -> tuple[Array, ...]:
    """The arrays. Inside a caller's `shard_map`, all become device-varying along the axes along which any of them is.

    A hand-written gradient must have the type of its input. JAX then sums the gradient of a replicated parameter over
    the devices itself.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    of_all = jax.lax.stop_gradient(
        sum((x.ravel()[0].astype(jnp.float32) for x in arrays), start=jnp.zeros((), jnp.float32))
    )
    return tuple(jnp.where(True, x, of_all.astype(x.dtype)) for x in arrays)
