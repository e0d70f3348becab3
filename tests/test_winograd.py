"""Winograd's convolution against float64 and against the plain one, gradients included.

Its two forms are for few channels and for many: 192 is the first number that takes the second.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jaxtyping import Float, Float64
from scipy.signal import correlate

from cfd import winograd
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


@pytest.mark.parametrize("channels", [6, 192])
@pytest.mark.parametrize("height, width", [(2, 4), (8, 8), (4, 12)])
def test_values_are_those_of_float64(height: int, width: int, channels: int) -> None:
    x, kernel, _ = operands(2, height, width, channels, 4)
    np.testing.assert_allclose(winograd.convolve(x, kernel), float64(x, kernel), rtol=0, atol=4e-6)


@pytest.mark.parametrize("channels", [64, 192])
def test_it_rounds_about_as_the_plain_sum_does(channels: int) -> None:
    """Root mean squares of the errors, over enough channels that both are those of long sums."""
    x, kernel, _ = operands(2, 8, 8, channels, 8)
    exact = float64(x, kernel)

    def error(y: Array) -> float:
        return float(np.sqrt(np.mean((np.asarray(y, np.float64) - exact) ** 2)))

    assert error(winograd.convolve(x, kernel)) < 4 * error(plain(x, kernel))


@pytest.mark.parametrize("channels, outputs", [(6, 4), (6, 192), (192, 4)])
def test_gradients_are_those_of_the_plain_form(channels: int, outputs: int) -> None:
    """Few outputs and many take different forms of the gradient of x."""
    x, kernel, g = operands(3, 6, 8, channels, outputs)
    for ours, theirs in zip(jax.vjp(winograd.convolve, x, kernel)[1](g), jax.vjp(plain, x, kernel)[1](g), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * float(jnp.abs(theirs).max()))


def test_a_constant_image_and_kernel_give_the_count_of_the_taps() -> None:
    """9 inside, 6 at an edge and 4 in a corner."""
    y = winograd.convolve(jnp.ones((1, 8, 8, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0]
    inside = np.full(8, 3.0)
    inside[[0, -1]] = 2.0
    np.testing.assert_allclose(y, np.outer(inside, inside), rtol=1e-6)


@pytest.mark.parametrize(
    "shape, outputs, dtype, convolutions",
    [
        ((2, 16, 16, 64), 64, "float32", 6),
        ((2, 16, 16, 192), 64, "float32", 0),
        ((2, 16, 16, 64), 64, "bfloat16", 1),
        ((2, 16, 16, 64), 3, "float32", 1),
        ((2, 16, 16, 32), 64, "float32", 1),
        ((2, 16, 18, 64), 64, "float32", 1),
        ((2, 17, 16, 64), 64, "float32", 1),
        ((1, 8, 8, 64), 64, "float32", 1),
    ],
)
def test_the_network_takes_it_where_it_pays(
    shape: tuple[int, ...], outputs: int, dtype: str, convolutions: int
) -> None:
    """Six convolutions of height alone in the program for a CPU, or matrix products; one of both axes elsewhere."""
    arguments = jnp.zeros(shape, dtype), jnp.zeros((3, 3, shape[3], outputs), dtype)
    assert winograd.pays(*arguments) == (convolutions != 1)
    traced = jax.jit(lambda x, kernel: convolve(x, kernel, 1)).trace(*arguments)
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert on_cpu.count("stablehlo.convolution") == convolutions
    assert on_cpu.count("stablehlo.dot_general") == (4 if convolutions == 0 else 0)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.convolution") == 1
