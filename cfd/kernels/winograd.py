"""3x3 convolutions in float32 for a CPU, in two forms that are faster there than XLA's: im2col and Winograd.

im2col is for inputs that are smaller than the kernel. It consists of matrix products that read the kernel in its own
memory layout, whereas XLA's form would transpose the kernel for the gradients.

Otherwise, use Winograd convolution as in Lavin and Gray (arXiv:1509.09308), which needs one half to one third of the
multiplications. Along the width it is F(4, 3): four outputs of a row are sums of six products, each of a sum of the six
inputs and a sum of the three taps. Its points are 0, ±√½, ±√2 and ∞. The usual points 0, ±1, ±2 and ∞ would double the
rounding error. The values at p and −p are the sum and the difference of an even and an odd part, which are computed
once. Along the height, the three taps are summed directly, or F(2, 3) is nested, with the points 0, ±1 and ∞. Errors
are 1.5 to 2.8 times those of the direct sum (root mean square, 64 to 768 channels). The errors of the kernel's gradient
are 1.1 times those of the direct sum.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

A, B = 0.5**0.5, 2.0**0.5
LAYOUT = ("NHWC", "HWIO", "NHWC")
PADDING = ((0, 0), (1, 1), (1, 1), (0, 0))


def pays(x: Array, kernel: Array) -> bool:
    """Whether `convolve` is faster than XLA's form, by measurement: for im2col, and for large inputs made of tiles."""
    b, height, width, _ = x.shape
    tiled = height % 2 == 0 and width % 4 == 0 and min(kernel.shape[2:]) >= 64 and b * height * width >= 512
    return x.dtype == jnp.float32 and (tiled or _takes_im2col(x, kernel.shape[3]))


def _takes_im2col(x: Array, outputs: int) -> bool:
    """Whether reading the kernel is most of the work, because there are few positions and many channels."""
    positions = x.size // x.shape[3]
    return positions < 512 and positions <= min(x.shape[3], outputs)


@jax.custom_vjp
def convolve(x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c k"]) -> Float32[Array, "b h w k"]:
    """The convolution with padding 1: im2col for few positions, otherwise Winograd on tiles of 2x4.

    Raises ValueError if Winograd's tiles do not divide the image: h must be a multiple of 2, and w of 4.
    """
    if (x.shape[1] % 2 or x.shape[2] % 4) and not _takes_im2col(x, kernel.shape[3]):
        raise ValueError(
            f"x is {x.shape[1]}x{x.shape[2]}, which tiles of 2x4 do not divide: call this only if `pays(x, kernel)`"
        )
    return _convolve(x, kernel, False)


@partial(jax.jit, static_argnums=2)
def _convolve(x: Float32[Array, "b h w c"], kernel: Array, transposed: bool) -> Float32[Array, "b h w k"]:
    """The convolution with a kernel [3, 3, c, k]; if `transposed`, with a kernel [3, 3, k, c] rotated by 180°.

    The gradient of x is the transposed convolution of the output's gradient.
    """
    if _takes_im2col(x, kernel.shape[2 if transposed else 3]):
        return _im2col(x, kernel, transposed)
    if x.shape[3] >= 192:  # by measurement: with fewer channels, the matrix products are too small
        return _f43_f23(x, kernel, transposed)
    return _f43(x, kernel[::-1, ::-1].swapaxes(2, 3) if transposed else kernel)


def _im2col(x: Float32[Array, "b h w c"], kernel: Array, transposed: bool) -> Float32[Array, "b h w k"]:
    """One matrix product with the nine neighbours of each position. If `transposed`, the sum of nine products."""
    taps = kernel.reshape(9, *kernel.shape[2:])
    if transposed:
        outputs = sum(
            (v @ tap.T for v, tap in zip(_neighbours(x), taps[::-1], strict=True)), start=jnp.zeros((), jnp.float32)
        )
    else:
        outputs = jnp.concatenate(_neighbours(x), axis=1) @ taps.reshape(-1, taps.shape[2])
    return outputs.reshape(*x.shape[:3], -1)


def _neighbours(x: Float32[Array, "b h w c"]) -> list[Float32[Array, "n c"]]:
    """For each of the nine taps, the inputs that it multiplies, for all positions."""
    rows = _windows(1, 1, jnp.pad(x, PADDING), 3)
    return [v.reshape(-1, x.shape[3]) for row in rows for v in _windows(1, 2, row, 3)]


def _f43(x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c k"]) -> Float32[Array, "b h w k"]:
    """F(4, 3) along the width: six 3x1 convolutions on a quarter of the width, with half of the multiplications."""
    along_height = partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding=((1, 1), (0, 0)), dimension_numbers=LAYOUT
    )
    columns = _f43_inputs(*_windows(4, 2, jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0))), 6))
    taps = _f43_taps(*(kernel[:, i : i + 1] for i in range(3)))
    return jnp.stack(_f43_outputs(*map(along_height, columns, taps)), axis=3).reshape(*x.shape[:3], -1)


def _f43_f23(x: Float32[Array, "b h w c"], kernel: Array, transposed: bool) -> Float32[Array, "b h w k"]:
    """F(2, 3) nested in F(4, 3): 6 · 4 products over an eighth of the positions, a third of the multiplications."""
    padded = jnp.pad(x, PADDING)
    order = -1 if transposed else 1  # reverses lists of slices, because a reversed array would be written to memory

    def rows(input_row: Array, tap_row: Array) -> Array:
        column = _weighted_sum(tap_row, jnp.unstack(kernel, axis=1)[::order])
        taps = _f23_taps(*jnp.unstack(column)[::order])
        inputs = _tile_inputs(padded, input_row)
        products = [v @ (k.T if transposed else k) for v, k in zip(inputs, taps, strict=True)]
        return jnp.stack(_f23_outputs(*products), axis=2)

    products = [p.reshape(*x.shape[:2], -1, p.shape[4]) for p in _at_each_point(rows, F43_INPUTS, F43_TAPS)]
    return jnp.stack(_f43_outputs(*products), axis=3).reshape(*x.shape[:3], -1)


def _convolve_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel), (x, kernel)


def _convolve_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    return _convolve(g, kernel, True), _kernel_gradient(x, g)


convolve.defvjp(_convolve_forward, _convolve_backward)


@jax.jit
def _kernel_gradient(x: Float32[Array, "b h w c"], g: Float32[Array, "b h w k"]) -> Float32[Array, "3 3 c k"]:
    """The gradient of the kernel: the transpose, as a linear map of the kernel, of `_im2col` or of `_f43_f23`."""
    channels, outputs = x.shape[3], g.shape[3]
    if _takes_im2col(x, outputs):
        neighbours = jnp.concatenate(_neighbours(x), axis=1)
        return (neighbours.T @ g.reshape(-1, outputs)).reshape(3, 3, channels, outputs)
    padded = jnp.pad(x, PADDING)

    def gradients(input_row: Array, output_column: Array) -> tuple[Array, ...]:
        sums = _windows(2, 1, _weighted_sum(output_column, _windows(4, 2, g, 4)), 2)
        products = [
            v.reshape(-1, channels).T @ u.reshape(-1, outputs)
            for v, u in zip(_tile_inputs(padded, input_row), _transpose(_f23_outputs, 4, sums), strict=True)
        ]
        return _transpose(_f23_taps, 3, products)

    rows = _at_each_point(gradients, F43_INPUTS, F43_OUTPUTS.T)
    return jnp.stack([jnp.stack(_transpose(_f43_taps, 3, jnp.unstack(row))) for row in rows])


def _tile_inputs(padded: Float32[Array, "b h2 w2 c"], input_row: Float32[Array, "6"]) -> tuple[Array, ...]:
    """The transformed inputs [b, h/2, w/4, c] of the four products at one of F(4, 3)'s points."""
    return _f23_inputs(*_windows(2, 1, _weighted_sum(input_row, _windows(4, 2, padded, 6)), 4))


def _windows(step: int, axis: int, x: Array, window: int) -> list[Array]:
    """For windows that begin every `step` along `axis`: the first value of each, the second of each, and so on."""
    count = (x.shape[axis] - window) // step
    return [jax.lax.slice_in_dim(x, i, i + step * count + 1, step, axis) for i in range(window)]


def _f43_inputs(x0: Any, x1: Any, x2: Any, x3: Any, x4: Any, x5: Any) -> tuple[Any, ...]:
    """F(4, 3) at a point: inputs times the coefficients of ∏ (x − r), the product over the other finite points r."""
    return (
        x0 - 2.5 * x2 + x4,
        *_sum_and_difference(x4 - 2.0 * x2, A * (x3 - 2.0 * x1)),
        *_sum_and_difference(x4 - 0.5 * x2, B * (x3 - 0.5 * x1)),
        x1 - 2.5 * x3 + x5,
    )


def _f43_taps(k0: Any, k1: Any, k2: Any) -> tuple[Any, ...]:
    """F(4, 3): k0 + p k1 + p² k2 at each point p; k2 alone at ∞."""
    return k0, *_sum_and_difference(k0 + 0.5 * k2, A * k1), *_sum_and_difference(k0 + 2.0 * k2, B * k1), k2


def _f43_outputs(m0: Any, m1: Any, m2: Any, m3: Any, m4: Any, m5: Any) -> tuple[Any, ...]:
    """F(4, 3): output j sums pʲ times the product at p, times 1 / ∏ (p − r): 1 at 0, −⅔ at ±√½, ⅙ at ±√2."""
    (even_a, odd_a), (even_b, odd_b) = _sum_and_difference(m1, m2), _sum_and_difference(m3, m4)
    even_a, odd_a, even_b, odd_b = -2.0 / 3.0 * even_a, -2.0 / 3.0 * odd_a, even_b / 6.0, odd_b / 6.0
    return (
        m0 + even_a + even_b,
        A * odd_a + B * odd_b,
        0.5 * even_a + 2.0 * even_b,
        0.5 * A * odd_a + 2.0 * B * odd_b + m5,
    )


def _f23_inputs(x0: Any, x1: Any, x2: Any, x3: Any) -> tuple[Any, ...]:
    """F(2, 3): the inputs of two outputs, as in `_f43_inputs`, at the points 0, ±1 and ∞."""
    return x0 - x2, *_sum_and_difference(x2, x1), x3 - x1


def _f23_taps(k0: Any, k1: Any, k2: Any) -> tuple[Any, ...]:
    """F(2, 3): the three taps, as in `_f43_taps`."""
    return k0, *_sum_and_difference(k0 + k2, k1), k2


def _f23_outputs(m0: Any, m1: Any, m2: Any, m3: Any) -> tuple[Any, ...]:
    """F(2, 3): 1 / ∏ (p − r) is ½ at ±1. At 0 it is −1, but the inputs already carry that sign."""
    even, odd = _sum_and_difference(0.5 * m1, 0.5 * m2)
    return m0 + even, odd + m3


def _sum_and_difference(even: Any, odd: Any) -> tuple[Any, Any]:
    return even + odd, even - odd


def _matrix(fun: Callable[..., tuple[Any, ...]], inputs: int) -> np.ndarray:
    """The matrix of a linear map of `inputs` numbers."""
    return np.stack(fun(*np.eye(inputs, dtype=np.float32)))


# F(4, 3) as matrices, so that one loop over its points can take a row at a time.
F43_INPUTS, F43_TAPS, F43_OUTPUTS = _matrix(_f43_inputs, 6), _matrix(_f43_taps, 3), _matrix(_f43_outputs, 6)


def _at_each_point(fun: Callable[..., Any], *matrices: np.ndarray) -> Any:
    """`fun` of each row of the matrices, in a loop. Unrolled, there would be six times as much to compile."""
    return jax.lax.map(lambda rows: fun(*rows), matrices)


def _weighted_sum(coefficients: Array, terms: Sequence[Array]) -> Array:
    """Σ coefficient · term, written to memory. Without the barrier, XLA would recompute the sum in each consumer."""
    products = [c * x for c, x in zip(coefficients, terms, strict=True)]
    return jax.lax.optimization_barrier(sum(products, start=jnp.zeros((), jnp.float32)))


def _transpose(fun: Callable[..., Any], inputs: int, cotangents: Sequence[Array]) -> Any:
    """The transpose of a linear map of `inputs` arrays of one shape, applied to `cotangents`."""
    like = jax.typeof(cotangents[0])  # includes the axes over which it varies inside a caller's shard_map
    return jax.linear_transpose(fun, *[like] * inputs)(tuple(cotangents))
