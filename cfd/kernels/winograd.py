"""3x3 convolutions in float32 for a CPU: Winograd convolution, as in Lavin and Gray (arXiv:1509.09308).

It needs one third of the multiplications of the direct sum: F(2, 3) along the height, nested in F(4, 3) along the
width. In F(4, 3), four outputs of a row are sums of six products, each of a sum of the six inputs and a sum of the
three taps. Its points are 0, ±√½, ±√2 and ∞. The usual points 0, ±1, ±2 and ∞ would double the rounding error. The
points of F(2, 3) are 0, ±1 and ∞. Errors are 1.6 to 3.8 times those of the direct sum (root mean square, 64 to 768
channels), and those of the kernel's gradient are 1.4 to 3.9 times as large (128 to 4,096 positions).

Results have the same bits on any number of threads: see `kernels.cpu.transposed_product`.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from cfd.kernels.cpu import transposed_product

LAYOUT = ("NHWC", "HWIO", "NHWC")
PADDING = ((0, 0), (1, 1), (1, 1), (0, 0))


def pays(x: Array, kernel: Array) -> bool:
    """Whether `convolve` takes x, and is as fast as XLA's form: by measurement, from 32 inputs and outputs."""
    return x.dtype == jnp.float32 and min(kernel.shape[2:]) >= 32


def convolve(x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c k"]) -> Float32[Array, "b h w k"]:
    """The convolution with padding 1.

    With at most 64 inputs and outputs, and fewer than 64 of one of them, only the kernel's gradient is Winograd's. The
    tiles are 2x4. Zeros are added to an image that they do not divide, below and on the right.
    """
    return _convolve(_whole_tiles(x), kernel, False)[:, : x.shape[1], : x.shape[2]]


def gradients(
    x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c k"], g: Float32[Array, "b h w k"]
) -> tuple[Float32[Array, "b h w c"], Float32[Array, "3 3 c k"]]:
    """The gradients of x and of the kernel, given g, that of the output."""
    padded = _whole_tiles(g)
    dx = _convolve(padded, kernel, True)[:, : x.shape[1], : x.shape[2]]
    return dx, _kernel_gradient(_whole_tiles(x), padded)


def _whole_tiles(x: Float32[Array, "b h w c"]) -> Float32[Array, "b h2 w2 c"]:
    height, width = x.shape[1:3]
    if height % 2 or width % 4:
        return jnp.pad(x, ((0, 0), (0, -height % 2), (0, -width % 4), (0, 0)))
    return x


@partial(jax.jit, static_argnums=2)
def _convolve(x: Float32[Array, "b h w c"], kernel: Array, transposed: bool) -> Float32[Array, "b h w k"]:
    """The convolution with a kernel [3, 3, c, k]; if `transposed`, with a kernel [3, 3, k, c] rotated by 180°.

    There are 24 products over an eighth of the positions, one for each pair of a point of F(4, 3) and one of F(2, 3).
    The gradient of x is the transposed convolution of the output's gradient.
    """
    if min(kernel.shape[2:]) < 64 >= max(kernel.shape[2:]):
        # With few channels, the gain is smaller than the time that the transforms take to compile. XLA:CPU's form has
        # the same bits on one core and on two for 32 to 64 channels, but not for 96.
        kernel = kernel[::-1, ::-1].swapaxes(2, 3) if transposed else kernel
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), PADDING[1:3], dimension_numbers=LAYOUT)
    taps = ((TAPS[:, ::-1] if transposed else TAPS) @ kernel.reshape(9, -1)).reshape(24, *kernel.shape[2:])
    products = _tile_inputs(x) @ (taps.mT if transposed else taps)
    tiles = x.shape[0], x.shape[1] // 2, x.shape[2] // 4
    outputs = (OUTPUTS @ products.reshape(24, -1)).reshape(4, 2, *tiles, -1)
    return outputs.transpose(2, 3, 1, 4, 0, 5).reshape(*x.shape[:3], -1)


@jax.jit
def _kernel_gradient(x: Float32[Array, "b h w c"], g: Float32[Array, "b h w k"]) -> Float32[Array, "3 3 c k"]:
    """The gradient of the kernel: the transpose of `_convolve` as a linear map of the kernel.

    Gain 1.02; digits 1.05. XLA:CPU's form has other bits on one core than on two.
    """
    tiles = g.reshape(g.shape[0], g.shape[1] // 2, 2, g.shape[2] // 4, 4, -1).transpose(4, 2, 0, 1, 3, 5)
    sums = OUTPUTS.T @ _written(tiles.reshape(8, -1))
    products = transposed_product(_tile_inputs(x), sums.reshape(24, -1, g.shape[3]))
    return (TAPS.T @ products.reshape(24, -1)).reshape(3, 3, x.shape[3], g.shape[3])


def _tile_inputs(x: Float32[Array, "b h w c"]) -> Float32[Array, "24 n c"]:
    """The transformed inputs of the 24 products, for n tiles of 2x4."""
    columns = _written(_combine(F43.inputs, 0, _windows(4, 2, jnp.pad(x, PADDING), 6)))
    return _written(_combine(F23.inputs, 1, _windows(2, 2, columns, 4))).reshape(24, -1, x.shape[3])


def _written(x: Array) -> Array:
    """x, written to memory. Without the barrier, XLA would recompute x in each consumer."""
    return jax.lax.optimization_barrier(x)


def _windows(step: int, axis: int, x: Array, window: int) -> list[Array]:
    """For windows that begin every `step` along `axis`: the first value of each, the second of each, and so on."""
    count = (x.shape[axis] - window) // step
    return [jax.lax.slice_in_dim(x, i, i + step * count + 1, step, axis) for i in range(window)]


class Bilinear(NamedTuple):
    """F(m, 3): m outputs are `outputs` @ (`inputs` @ x · `taps` @ k), for m + 2 inputs x and three taps k."""

    inputs: Float32[np.ndarray, "n n"]
    taps: Float32[np.ndarray, "n 3"]
    outputs: Float32[np.ndarray, "m n"]


def _bilinear(points: Sequence[float]) -> Bilinear:
    """F(m, 3) of m + 1 finite points and ∞ (Lavin and Gray, Section 4; the algorithm of Cook and Toom, transposed).

    Taps are the values of k0 + k1 x + k2 x² at each point. Inputs are multiplied by the coefficients of ∏ (x − r), the
    product over the other finite points r. Output j is the sum of pʲ / ∏ (p − r) times the product at p.
    """
    finite = np.asarray(points)
    others = [np.delete(finite, i) for i in range(len(finite))]
    weights = np.array([1.0 / np.prod(p - r) for p, r in zip(finite, others, strict=True)])
    inputs = np.stack([*(np.append(np.poly(r)[::-1], 0.0) for r in others), np.poly(finite)[::-1]])
    taps = np.vstack([finite[:, None] ** range(3), [0.0, 0.0, 1.0]])
    outputs = np.column_stack([weights * finite**j for j in range(len(finite) - 1)])
    outputs = np.vstack([outputs, np.eye(len(finite) - 1)[-1]]).T
    return Bilinear(*(x.astype(np.float32) for x in (inputs, taps, outputs)))


F43, F23 = _bilinear((0.0, 0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5))), _bilinear((0.0, 1.0, -1.0))
TAPS = np.einsum("pj,qi->pqij", F43.taps, F23.taps).reshape(24, 9)
"""The transform of the nine taps for the 24 products. As a matrix product it needs no compiled loop."""
OUTPUTS = np.einsum("jp,iq->jipq", F43.outputs, F23.outputs).reshape(8, 24)
"""The transform of the 24 products into the 4x2 outputs of a tile, by column and row. It needs no compiled loop."""


def _combine(matrix: Float32[np.ndarray, "m n"], axis: int, terms: Sequence[Array]) -> Array:
    """`matrix` @ `terms`, with the rows along a new axis.

    XLA:CPU takes several times as long to compile a concatenation of the rows, once for each loop that reads it.
    """
    column = [-1 if i == axis else 1 for i in range(terms[0].ndim + 1)]
    products = [jnp.asarray(c).reshape(column) * jnp.expand_dims(x, axis) for c, x in zip(matrix.T, terms, strict=True)]
    return sum(products, start=jnp.zeros((), jnp.float32))
