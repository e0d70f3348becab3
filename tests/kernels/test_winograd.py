"""The forms of a convolution for a CPU against float64 and against XLA's form, gradients included.

They are Winograd convolution, and one matrix product for all taps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jaxtyping import Float, Float64
from scipy.signal import correlate

from cfd.kernels import direct, winograd
from cfd.networks.layers import convolve


def operands(b: int, height: int, width: int, channels: int, outputs: int) -> tuple[Array, Array, Array]:
    """x, a kernel and a cotangent. x, the convolution and the cotangent have about unit variance."""
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
    """The convolution in float64, by SciPy's correlation of each pair of channels."""
    wide, taps = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    y = np.zeros((*x.shape[:3], kernel.shape[3]))
    for image in range(x.shape[0]):
        for c in range(x.shape[3]):
            for k in range(kernel.shape[3]):
                y[image, :, :, k] += correlate(wide[image, :, :, c], taps[:, :, c, k], "same", "direct")
    return y


@pytest.mark.parametrize("form", [winograd.F43, winograd.F23])
def test_the_bilinear_forms_are_correlations(form: winograd.Bilinear) -> None:
    noise = np.random.default_rng(0)
    x, taps = noise.standard_normal(form.inputs.shape[1]), noise.standard_normal(3)
    outputs = form.outputs @ ((form.inputs @ x) * (form.taps @ taps))
    np.testing.assert_allclose(outputs, np.correlate(x, taps, "valid"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", [winograd.convolve, direct.convolve])
@pytest.mark.parametrize(
    "height, width, channels, outputs",
    [(2, 4, 6, 4), (7, 6, 3, 12), (4, 13, 192, 64), (8, 8, 64, 64)],
)
def test_values_are_those_of_float64(
    form: Callable[[Array, Array], Array], height: int, width: int, channels: int, outputs: int
) -> None:
    """Tiles of 2x4 do not divide all of the images."""
    x, kernel, _ = operands(2, height, width, channels, outputs)
    np.testing.assert_allclose(form(x, kernel), float64(x, kernel), rtol=0, atol=4e-6)


@pytest.mark.parametrize("channels", [64, 192])
def test_its_rounding_error_is_close_to_that_of_the_plain_form(channels: int) -> None:
    """Compares the root mean squares of the errors, with enough channels for both forms to add up long sums."""
    x, kernel, _ = operands(2, 8, 8, channels, 64)
    exact = float64(x, kernel)

    def error(y: Array) -> float:
        return float(np.sqrt(np.mean((np.asarray(y, np.float64) - exact) ** 2)))

    assert error(winograd.convolve(x, kernel)) < 4 * error(plain(x, kernel))


@pytest.mark.parametrize("form", [winograd.gradients, direct.gradients])
@pytest.mark.parametrize("shape, outputs", [((3, 6, 8, 6), 4), ((3, 5, 7, 3), 12), ((2, 5, 6, 192), 64)])
def test_gradients_are_those_of_the_plain_form(
    form: Callable[[Array, Array, Array], tuple[Array, Array]], shape: tuple[int, int, int, int], outputs: int
) -> None:
    """The direct form has one way for few outputs, and another one for the rest."""
    x, kernel, g = operands(*shape, outputs)
    expected = jax.vjp(plain, x, kernel)[1](g)
    for ours, theirs in zip(form(x, kernel, g), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * float(jnp.abs(theirs).max()))


def test_a_constant_image_and_kernel_count_the_taps_inside_the_image() -> None:
    """9 taps in the interior, 6 at an edge and 4 in a corner."""
    y = winograd.convolve(jnp.ones((1, 8, 8, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0]
    inside = np.full(8, 3.0)
    inside[[0, -1]] = 2.0
    np.testing.assert_allclose(y, np.outer(inside, inside), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape, outputs", [((2, 16, 16, 64), 64), ((2, 17, 16, 64), 64), ((1, 8, 8, 64), 3)])
def test_the_layer_is_the_plain_convolution_and_one_operation_on_a_tpu(
    shape: tuple[int, int, int, int], outputs: int, dtype: str
) -> None:
    """Whichever form the CPU takes, the values agree, and programs for TPUs contain the plain form alone."""
    b, height, width, channels = shape
    x, kernel, _ = (a.astype(dtype) for a in operands(b, height, width, channels, outputs))
    layer = jax.jit(lambda x, kernel: convolve(x, kernel, 1))
    expected = np.asarray(plain(x.astype(jnp.float32), kernel.astype(jnp.float32)))
    np.testing.assert_allclose(
        np.asarray(layer(x, kernel), np.float32), expected, rtol=0, atol=1e-5 if dtype == "float32" else 0.05
    )
    on_tpu = layer.trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
    assert on_tpu.count("stablehlo.convolution") == 1
    assert on_tpu.count("stablehlo.dot_general") == 0
