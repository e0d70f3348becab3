"""3x3 convolutions by half as many multiplications, in float32 on a CPU: Lavin and Gray (arXiv:1509.09308), Section 4.

F(4, 3) along the width: four outputs of a row are sums of six products of sums of six inputs and sums of three taps,
so that six convolutions over the height alone make a quarter of the width each. Its points are 0, ±√½, ±√2 and ∞, with
which it rounds about as the plain sum does; with the usual 0, ±1, ±2 and ∞ it rounds twice as coarsely. The values at p
and −p are the sum and the difference of two halves: what is shared is written once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

A, B = 0.5**0.5, 2.0**0.5
LAYOUT = ("NHWC", "HWIO", "NHWC")


def pays(x: Array, kernel: Array) -> bool:
    """Whether it is the faster form, by measurement: the width divides by 4, kernels are wide, positions are many."""
    b, height, width, _ = x.shape
    return x.dtype == jnp.float32 and width % 4 == 0 and min(kernel.shape[2:]) >= 64 and b * height * width >= 512


@jax.custom_vjp
@jax.jit
def convolve(x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c k"]) -> Float32[Array, "b h w k"]:
    """The convolution with padding 1; w is a multiple of 4."""
    along_height = partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding=((1, 1), (0, 0)), dimension_numbers=LAYOUT
    )
    taps = _of_kernel(*(kernel[:, i : i + 1] for i in range(3)))
    columns = _of_products(*map(along_height, _of_input(*_columns(x)), taps))
    return jnp.stack(columns, axis=3).reshape(*x.shape[:3], -1)


def _convolve_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel), (x, kernel)


def _convolve_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    return convolve(g, kernel[::-1, ::-1].swapaxes(2, 3)), _kernel_gradient(x, g)


convolve.defvjp(_convolve_forward, _convolve_backward)


@jax.jit
def _kernel_gradient(x: Float32[Array, "b h w c"], g: Float32[Array, "b h w k"]) -> Float32[Array, "3 3 c k"]:
    """The gradient of the kernel: the same sums, transposed."""
    if x.shape[0] >= 16:  # XLA's own form adds over images in its innermost loop: hard to beat with many of them
        padding = ((1, 1), (1, 1))
        layout = ("CHWN", "IHWO", "HWNC")
        return jax.lax.conv_general_dilated(x, g, (1, 1), padding, dimension_numbers=layout)
    positions = x.shape[0] * x.shape[1] * x.shape[2] // 4

    def product(v: Array, u: Array) -> Array:
        padded = jnp.pad(v, ((0, 0), (1, 1), (0, 0), (0, 0)))
        rows = jnp.concatenate([padded[:, i : i + x.shape[1]] for i in range(3)], axis=3)
        return (rows.reshape(positions, -1).T @ u.reshape(positions, -1)).reshape(3, x.shape[3], -1)

    outputs = _transposed(_of_products, 6, [g[:, :, i::4] for i in range(4)])
    taps = [product(v, u) for v, u in zip(_of_input(*_columns(x)), outputs, strict=True)]
    return jnp.stack(_transposed(_of_kernel, 3, taps), axis=1)


def _columns(x: Float32[Array, "b h w c"]) -> list[Float32[Array, "b h w4 c"]]:
    """The six inputs of every four columns."""
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    return [padded[:, :, i : i + x.shape[2] - 3 : 4] for i in range(6)]


def _of_input(x0: Array, x1: Array, x2: Array, x3: Array, x4: Array, x5: Array) -> tuple[Array, ...]:
    """At a point, the coefficients of the product of (x − r) over the other finite points r, times the inputs."""
    return (
        x0 - 2.5 * x2 + x4,
        *_pair(x4 - 2.0 * x2, A * (x3 - 2.0 * x1)),
        *_pair(x4 - 0.5 * x2, B * (x3 - 0.5 * x1)),
        x1 - 2.5 * x3 + x5,
    )


def _of_kernel(k0: Array, k1: Array, k2: Array) -> tuple[Array, ...]:
    """k0 + p k1 + p² k2 at each point p; k2 alone at ∞."""
    return k0, *_pair(k0 + 0.5 * k2, A * k1), *_pair(k0 + 2.0 * k2, B * k1), k2


def _of_products(m0: Array, m1: Array, m2: Array, m3: Array, m4: Array, m5: Array) -> tuple[Array, ...]:
    """Output j sums pʲ times the product at p, times 1 / ∏ (p − r): 1 at 0, −⅔ at ±√½, ⅙ at ±√2."""
    (even_a, odd_a), (even_b, odd_b) = _pair(m1, m2), _pair(m3, m4)
    even_a, odd_a, even_b, odd_b = -2.0 / 3.0 * even_a, -2.0 / 3.0 * odd_a, even_b / 6.0, odd_b / 6.0
    return (
        m0 + even_a + even_b,
        A * odd_a + B * odd_b,
        0.5 * even_a + 2.0 * even_b,
        0.5 * A * odd_a + 2.0 * B * odd_b + m5,
    )


def _pair(even: Array, odd: Array) -> tuple[Array, Array]:
    return even + odd, even - odd


def _transposed(fun: Callable[..., Any], inputs: int, cotangents: Sequence[Array]) -> Any:
    """The transpose of a linear map of so many arrays of one shape, at `cotangents`."""
    like = jax.ShapeDtypeStruct(cotangents[0].shape, cotangents[0].dtype)
    return jax.linear_transpose(fun, *[like] * inputs)(tuple(cotangents))
