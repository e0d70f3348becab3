"""The forms of a convolution on a CPU against float64 and against the plain one, gradients included.

They are chosen by shape: positions that are no more than the channels take matrix products with their neighbours, and
of the others 192 is the first number of channels that takes the second of Winograd's forms.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jaxtyping import Float, Float64
from scipy.signal import correlate

from cfd import convolution
from cfd.layers import convolve


def operands(b: int, height: int, width: int, channels: int, outputs: int) -> tuple[Array, Array, Array]:
    """x, kernel and a cotangent, each of about unit size."""
    x, kernel, g = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate(
            [(b, height, width, channels), (3, 3, channels, outputs), (b, height, width, outputs)]
        )
    )
    return x, kernel / (9 * channels) ** 0.5, g


def plain(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c k"]) -> Float[Array, "b h w k"]:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def float64(x: Array, kernel: Array) -> Float64[np.ndarray, "b h w k"]:
    """By SciPy's correlation, channel by channel."""
    wide, taps = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    y = np.zeros((*x.shape[:3], kernel.shape[3]))
    for image in range(x.shape[0]):
        for c in range(x.shape[3]):
            for k in range(kernel.shape[3]):
                y[image, :, :, k] += correlate(wide[image, :, :, c], taps[:, :, c, k], "same", "direct")
    return y


@pytest.mark.parametrize(
    "height, width, channels, outputs",
    [
        *((height, width, channels, 4) for channels in (6, 192) for height, width in ((2, 4), (8, 8), (4, 12))),
        (3, 5, 32, 30),
        (1, 1, 2, 3),
    ],
)
def test_values_are_those_of_float64(height: int, width: int, channels: int, outputs: int) -> None:
    x, kernel, _ = operands(2, height, width, channels, outputs)
    np.testing.assert_allclose(convolution.convolve(x, kernel), float64(x, kernel), rtol=0, atol=4e-6)


@pytest.mark.parametrize("channels", [64, 192])
def test_it_rounds_about_as_the_plain_sum_does(channels: int) -> None:
    """Root mean squares of the errors, over enough channels that both are those of long sums."""
    x, kernel, _ = operands(2, 8, 8, channels, 8)
    exact = float64(x, kernel)

    def error(y: Array) -> float:
        return float(np.sqrt(np.mean((np.asarray(y, np.float64) - exact) ** 2)))

    assert error(convolution.convolve(x, kernel)) < 4 * error(plain(x, kernel))


@pytest.mark.parametrize(
    "shape, outputs",
    [((3, 6, 8, 6), 4), ((3, 6, 8, 6), 192), ((3, 6, 8, 192), 4), ((2, 3, 5, 30), 32), ((1, 2, 2, 6), 4)],
)
def test_gradients_are_those_of_the_plain_form(shape: tuple[int, int, int, int], outputs: int) -> None:
    """Few outputs and many take different forms of the gradient of x."""
    x, kernel, g = operands(*shape, outputs)
    expected = jax.vjp(plain, x, kernel)[1](g)
    for ours, theirs in zip(jax.vjp(convolution.convolve, x, kernel)[1](g), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("size", [(7, 8), (8, 6)])
def test_an_image_that_is_not_of_tiles_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"x is {size[0]}x{size[1]}, not of tiles of 2x4"):
        convolution.convolve(jnp.ones((1, *size, 4)), jnp.ones((3, 3, 4, 4)))


def test_a_constant_image_and_kernel_give_the_count_of_the_taps() -> None:
    """9 inside, 6 at an edge and 4 in a corner."""
    y = convolution.convolve(jnp.ones((1, 8, 8, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0]
    inside = np.full(8, 3.0)
    inside[[0, -1]] = 2.0
    np.testing.assert_allclose(y, np.outer(inside, inside), rtol=1e-6)


@pytest.mark.parametrize(
    "shape, outputs, dtype, convolutions, products",
    [
        ((2, 16, 16, 64), 64, "float32", 6, 0),
        ((2, 16, 16, 192), 64, "float32", 0, 4),
        ((2, 16, 16, 64), 64, "bfloat16", 1, 0),
        ((2, 16, 16, 64), 3, "float32", 1, 0),
        ((2, 16, 16, 32), 64, "float32", 1, 0),
        ((2, 16, 18, 64), 64, "float32", 1, 0),
        ((2, 17, 16, 64), 64, "float32", 1, 0),
        ((2, 8, 8, 64), 128, "float32", 1, 0),
        ((2, 8, 8, 128), 64, "float32", 1, 0),
        ((2, 8, 8, 128), 128, "float32", 0, 1),
        ((2, 8, 8, 128), 128, "bfloat16", 1, 0),
        ((8, 8, 8, 512), 512, "float32", 0, 4),
    ],
)
def test_the_network_takes_what_pays(
    shape: tuple[int, ...], outputs: int, dtype: str, convolutions: int, products: int
) -> None:
    """Six convolutions of height alone in the program for a CPU, or matrix products; one of both axes elsewhere."""
    arguments = jnp.zeros(shape, dtype), jnp.zeros((3, 3, shape[3], outputs), dtype)
    assert convolution.pays(*arguments) == (convolutions != 1)
    traced = jax.jit(lambda x, kernel: convolve(x, kernel, 1)).trace(*arguments)
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert on_cpu.count("stablehlo.convolution") == convolutions
    assert on_cpu.count("stablehlo.dot_general") == products
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.convolution") == 1
