"""3x3 convolutions in float32 on a CPU, in forms that are faster there than XLA's.

Where kernels are larger than what they meet: matrix products with the kernel as it lies in memory, which XLA's form
would transpose for the gradients.

Else by a half or a third of the multiplications, as Lavin and Gray (arXiv:1509.09308) do it. F(4, 3) along the width:
four outputs of a row are sums of six products of sums of six inputs and sums of three taps. Its points are 0, ±√½, ±√2
and ∞; with the usual 0, ±1, ±2 and ∞ it rounds twice as coarsely. The values at p and −p are the sum and the difference
of two halves: what is shared is written once. Along the height, three taps are summed as they are, or F(2, 3) is
nested, with the points 0, ±1 and ∞. Errors are 1.5 to 2.8 times those of the plain sum (root mean square, 64 to 768
channels), and those of the kernel's gradient 1.1 times.
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
    """Whether `convolve` is faster than XLA's form, by measurement: `_few`, or tiles fit a large image and kernel."""
    b, height, width, _ = x.shape
    tiled = height % 2 == 0 and width % 4 == 0 and min(kernel.shape[2:]) >= 64 and b * height * width >= 512
    return x.dtype == jnp.float32 and (tiled or _few(x, kernel.shape[3]))


def _few(x: Array, outputs: int) -> bool:
    """Whether positions are so few, and channels so many, that reading the kernel is most of the work."""
    positions = x.size // x.shape[3]
    return positions < 512 and positions <= min(x.shape[3], outputs)


@jax.custom_vjp
def convolve(x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c k"]) -> Float32[Array, "b h w k"]:
    """The convolution with padding 1. Raises ValueError unless positions are few, or h is a multiple of 2, w of 4."""
    if (x.shape[1] % 2 or x.shape[2] % 4) and not _few(x, kernel.shape[3]):
        raise ValueError(f"x is {x.shape[1]}x{x.shape[2]}, not of tiles of 2x4: take XLA's form where not `pays`")
    return _convolve(x, kernel, False)


@partial(jax.jit, static_argnums=2)
def _convolve(x: Float32[Array, "b h w c"], kernel: Array, turned: bool) -> Float32[Array, "b h w k"]:
    """By a kernel [3, 3, c, k], or [3, 3, k, c] that is `turned` by 180°, as the gradient of x takes it."""
    if _few(x, kernel.shape[2 if turned else 3]):
        return _gathered(x, kernel, turned)
    if x.shape[3] >= 192:  # by measurement: products over fewer channels are too small
        return _nested(x, kernel, turned)
    return _along_width(x, kernel[::-1, ::-1].swapaxes(2, 3) if turned else kernel)


def _gathered(x: Float32[Array, "b h w c"], kernel: Array, turned: bool) -> Float32[Array, "b h w k"]:
    """One matrix product with the nine neighbours of each position, or, where it is turned, the sum of nine."""
    taps = kernel.reshape(9, *kernel.shape[2:])
    if turned:
        outputs = sum(
            (v @ tap.T for v, tap in zip(_neighbours(x), taps[::-1], strict=True)), start=jnp.zeros((), jnp.float32)
        )
    else:
        outputs = jnp.concatenate(_neighbours(x), axis=1) @ taps.reshape(-1, taps.shape[2])
    return outputs.reshape(*x.shape[:3], -1)


def _neighbours(x: Float32[Array, "b h w c"]) -> list[Float32[Array, "n c"]]:
    """What each of the nine taps multiplies, for all positions."""
    rows = _every(1, 1, jnp.pad(x, PADDING), 3)
    return [v.reshape(-1, x.shape[3]) for row in rows for v in _every(1, 2, row, 3)]


def _along_width(x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c k"]) -> Float32[Array, "b h w k"]:
    """Six convolutions over the height, each of a quarter of the width: a half of the multiplications."""
    along_height = partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding=((1, 1), (0, 0)), dimension_numbers=LAYOUT
    )
    columns = _of_six_inputs(*_every(4, 2, jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0))), 6))
    taps = _of_three_taps(*(kernel[:, i : i + 1] for i in range(3)))
    return jnp.stack(_of_six_products(*map(along_height, columns, taps)), axis=3).reshape(*x.shape[:3], -1)


def _nested(x: Float32[Array, "b h w c"], kernel: Array, turned: bool) -> Float32[Array, "b h w k"]:
    """Six times four matrix products, each over an eighth of the positions: a third of the multiplications."""
    padded = jnp.pad(x, PADDING)
    order = -1 if turned else 1  # of what has been taken apart: an array that is turned would be written to memory

    def rows(of_inputs: Array, of_taps: Array) -> Array:
        column = _sum(of_taps, jnp.unstack(kernel, axis=1)[::order])
        taps = _of_three_taps_of_two(*jnp.unstack(column)[::order])
        products = [v @ (k.T if turned else k) for v, k in zip(_inputs(padded, of_inputs), taps, strict=True)]
        return jnp.stack(_of_four_products(*products), axis=2)

    products = [p.reshape(*x.shape[:2], -1, p.shape[4]) for p in _at_each_point(rows, OF_INPUTS, OF_TAPS)]
    return jnp.stack(_of_six_products(*products), axis=3).reshape(*x.shape[:3], -1)


def _convolve_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel), (x, kernel)


def _convolve_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    return _convolve(g, kernel, True), _kernel_gradient(x, g)


convolve.defvjp(_convolve_forward, _convolve_backward)


@jax.jit
def _kernel_gradient(x: Float32[Array, "b h w c"], g: Float32[Array, "b h w k"]) -> Float32[Array, "3 3 c k"]:
    """The gradient of the kernel: the sums of `_gathered` or of `_nested`, transposed."""
    channels, outputs = x.shape[3], g.shape[3]
    if _few(x, outputs):
        neighbours = jnp.concatenate(_neighbours(x), axis=1)
        return (neighbours.T @ g.reshape(-1, outputs)).reshape(3, 3, channels, outputs)
    padded = jnp.pad(x, PADDING)

    def gradients(of_inputs: Array, of_products: Array) -> tuple[Array, ...]:
        sums = _every(2, 1, _sum(of_products, _every(4, 2, g, 4)), 2)
        products = [
            v.reshape(-1, channels).T @ u.reshape(-1, outputs)
            for v, u in zip(_inputs(padded, of_inputs), _transposed(_of_four_products, 4, sums), strict=True)
        ]
        return _transposed(_of_three_taps_of_two, 3, products)

    rows = _at_each_point(gradients, OF_INPUTS, OF_PRODUCTS.T)
    return jnp.stack([jnp.stack(_transposed(_of_three_taps, 3, jnp.unstack(row))) for row in rows])


def _inputs(padded: Float32[Array, "b h2 w2 c"], of_inputs: Float32[Array, "6"]) -> tuple[Array, ...]:
    """What the four products at a point of the width multiply: each [b, h/2, w/4, c]."""
    return _of_four_inputs(*_every(2, 1, _sum(of_inputs, _every(4, 2, padded, 6)), 4))


def _every(step: int, axis: int, x: Array, window: int) -> list[Array]:
    """The values of each place in windows that begin at every so many along the axis."""
    count = (x.shape[axis] - window) // step
    return [jax.lax.slice_in_dim(x, i, i + step * count + 1, step, axis) for i in range(window)]


def _of_six_inputs(x0: Any, x1: Any, x2: Any, x3: Any, x4: Any, x5: Any) -> tuple[Any, ...]:
    """F(4, 3), at a point: the coefficients of the product of (x − r) over the other finite points r, times inputs."""
    return (
        x0 - 2.5 * x2 + x4,
        *_pair(x4 - 2.0 * x2, A * (x3 - 2.0 * x1)),
        *_pair(x4 - 0.5 * x2, B * (x3 - 0.5 * x1)),
        x1 - 2.5 * x3 + x5,
    )


def _of_three_taps(k0: Any, k1: Any, k2: Any) -> tuple[Any, ...]:
    """F(4, 3): k0 + p k1 + p² k2 at each point p; k2 alone at ∞."""
    return k0, *_pair(k0 + 0.5 * k2, A * k1), *_pair(k0 + 2.0 * k2, B * k1), k2


def _of_six_products(m0: Any, m1: Any, m2: Any, m3: Any, m4: Any, m5: Any) -> tuple[Any, ...]:
    """F(4, 3): output j sums pʲ times the product at p, times 1 / ∏ (p − r): 1 at 0, −⅔ at ±√½, ⅙ at ±√2."""
    (even_a, odd_a), (even_b, odd_b) = _pair(m1, m2), _pair(m3, m4)
    even_a, odd_a, even_b, odd_b = -2.0 / 3.0 * even_a, -2.0 / 3.0 * odd_a, even_b / 6.0, odd_b / 6.0
    return (
        m0 + even_a + even_b,
        A * odd_a + B * odd_b,
        0.5 * even_a + 2.0 * even_b,
        0.5 * A * odd_a + 2.0 * B * odd_b + m5,
    )


def _of_four_inputs(x0: Any, x1: Any, x2: Any, x3: Any) -> tuple[Any, ...]:
    """F(2, 3): the inputs of two outputs, likewise at 0, ±1 and ∞."""
    return x0 - x2, *_pair(x2, x1), x3 - x1


def _of_three_taps_of_two(k0: Any, k1: Any, k2: Any) -> tuple[Any, ...]:
    """F(2, 3)."""
    return k0, *_pair(k0 + k2, k1), k2


def _of_four_products(m0: Any, m1: Any, m2: Any, m3: Any) -> tuple[Any, ...]:
    """F(2, 3): 1 / ∏ (p − r) is 1 at 0 but for the sign, which the inputs have, and ½ at ±1."""
    even, odd = _pair(0.5 * m1, 0.5 * m2)
    return m0 + even, odd + m3


def _pair(even: Any, odd: Any) -> tuple[Any, Any]:
    return even + odd, even - odd


def _matrix(fun: Callable[..., tuple[Any, ...]], inputs: int) -> np.ndarray:
    """The matrix of a linear map of so many numbers."""
    return np.stack(fun(*np.eye(inputs, dtype=np.float32)))


# F(4, 3) as matrices, so that one loop over its points can take a row at a time.
OF_INPUTS, OF_TAPS, OF_PRODUCTS = _matrix(_of_six_inputs, 6), _matrix(_of_three_taps, 3), _matrix(_of_six_products, 6)


def _at_each_point(fun: Callable[..., Any], *matrices: np.ndarray) -> Any:
    """`fun` of the rows of the matrices, in a loop: written out, it would be six times as much to compile."""
    return jax.lax.map(lambda rows: fun(*rows), matrices)


def _sum(coefficients: Array, terms: Sequence[Array]) -> Array:
    """The sum of coefficients times terms, in memory: what is made of it would compute it again."""
    products = [c * x for c, x in zip(coefficients, terms, strict=True)]
    return jax.lax.optimization_barrier(sum(products, start=jnp.zeros((), jnp.float32)))


def _transposed(fun: Callable[..., Any], inputs: int, cotangents: Sequence[Array]) -> Any:
    """The transpose of a linear map of so many arrays of one shape, at `cotangents`."""
    like = jax.ShapeDtypeStruct(cotangents[0].shape, cotangents[0].dtype)
    return jax.linear_transpose(fun, *[like] * inputs)(tuple(cotangents))
