"""3x3 convolutions by half as many multiplications, in float32 on a CPU: Lavin and Gray (arXiv:1509.09308), Section 4.

F(4, 3) along the width: four outputs of a row are sums of six products of sums of six inputs and sums of three taps,
so that six convolutions over the height alone make a quarter of the width each. Its points are 0, ±√½, ±√2 and ∞, with
which it rounds about as the plain sum does; with the usual 0, ±1, ±2 and ∞ it rounds twice as coarsely.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

A, B = 0.5**0.5, 2.0**0.5
INPUT = (
    (1.0, 0.0, -2.5, 0.0, 1.0, 0.0),
    (0.0, -B, -2.0, A, 1.0, 0.0),
    (0.0, B, -2.0, -A, 1.0, 0.0),
    (0.0, -A, -0.5, B, 1.0, 0.0),
    (0.0, A, -0.5, -B, 1.0, 0.0),
    (0.0, 1.0, 0.0, -2.5, 0.0, 1.0),
)
KERNEL = (
    (1.0, 0.0, 0.0),
    (-2.0 / 3.0, -2.0 / 3.0 * A, -1.0 / 3.0),
    (-2.0 / 3.0, 2.0 / 3.0 * A, -1.0 / 3.0),
    (1.0 / 6.0, 1.0 / 6.0 * B, 1.0 / 3.0),
    (1.0 / 6.0, -1.0 / 6.0 * B, 1.0 / 3.0),
    (0.0, 0.0, 1.0),
)
OUTPUT = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, A, -A, B, -B, 0.0),
    (0.0, 0.5, 0.5, 2.0, 2.0, 0.0),
    (0.0, 0.5 * A, -0.5 * A, 2.0 * B, -2.0 * B, 1.0),
)

LAYOUT = ("NHWC", "HWIO", "NHWC")


def pays(x: Array, kernel: Array) -> bool:
    """Whether it is the faster form, by measurement: the width divides by 4, kernels are wide, positions are many."""
    b, height, width, _ = x.shape
    return x.dtype == jnp.float32 and width % 4 == 0 and min(kernel.shape[2:]) >= 64 and b * height * width >= 512


@jax.custom_vjp
def convolve(x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c k"]) -> Float32[Array, "b h w k"]:
    """The convolution with padding 1; w is a multiple of 4."""
    padding = ((1, 1), (0, 0))
    products = [
        jax.lax.conv_general_dilated(v, u[:, None], (1, 1), padding, dimension_numbers=LAYOUT)
        for v, u in zip(_input(x, 0), _combine(KERNEL, [kernel[:, i] for i in range(3)]), strict=True)
    ]
    return jnp.stack(_combine(OUTPUT, products), axis=3).reshape(*x.shape[:3], -1)


def _convolve_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel), (x, kernel)


def _convolve_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    return convolve(g, kernel[::-1, ::-1].swapaxes(2, 3)), _kernel_gradient(x, g)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _kernel_gradient(x: Float32[Array, "b h w c"], g: Float32[Array, "b h w k"]) -> Float32[Array, "3 3 c k"]:
    """The gradient of the kernel: the same sums, transposed."""
    if x.shape[0] >= 16:  # XLA's own form adds over images in its innermost loop: hard to beat with many of them
        padding = ((1, 1), (1, 1))
        layout = ("CHWN", "IHWO", "HWNC")
        return jax.lax.conv_general_dilated(x, g, (1, 1), padding, dimension_numbers=layout)
    height, positions = x.shape[1], x.shape[0] * x.shape[1] * x.shape[2] // 4

    def product(v: Array, u: Array) -> Array:
        rows = jnp.concatenate([v[:, i : i + height] for i in range(3)], axis=3)
        return (rows.reshape(positions, -1).T @ u.reshape(positions, -1)).reshape(3, x.shape[3], -1)

    inputs, outputs = _input(x, 1), _combine(_transpose(OUTPUT), [g[:, :, i::4] for i in range(4)])
    taps = [product(v, u) for v, u in zip(inputs, outputs, strict=True)]
    return jnp.stack(_combine(_transpose(KERNEL), taps), axis=1)


def _input(x: Float32[Array, "b h w c"], rows: int) -> list[Float32[Array, "b h2 w4 c"]]:
    """The six inputs of every four columns of x, combined; `rows` of zeros are added above and below."""
    padded = jnp.pad(x, ((0, 0), (rows, rows), (1, 1), (0, 0)))
    return _combine(INPUT, [padded[:, :, i : i + x.shape[2] - 3 : 4] for i in range(6)])


def _transpose(matrix: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    return tuple(zip(*matrix, strict=True))


def _combine(matrix: Sequence[Sequence[float]], arrays: Sequence[Array]) -> list[Array]:
    """The product of a small constant matrix with a vector of arrays."""
    return [jnp.asarray(sum(c * a for c, a in zip(row, arrays, strict=True) if c)) for row in matrix]
