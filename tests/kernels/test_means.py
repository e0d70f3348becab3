"""The sums over positions of CPUs: means, and the gradients that are built from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from cfd.devices import seeds, xla
from cfd.kernels import cpu


@pytest.mark.parametrize("positions", [1, 49, 64])
@pytest.mark.parametrize("fold", [False, True])
def test_means_and_their_gradients_are_those_of_float64(positions: int, fold: bool) -> None:
    x = 3.0 + jax.random.normal(seeds.key(0), (3, positions, 32))
    g = jax.random.normal(seeds.key(1), (3, 32))

    @xla.jit
    def means_and_gradient(x: Array) -> tuple[Array, Array]:
        means, gradient = jax.vjp(lambda x: cpu.channel_means(x, fold), x)
        return means, gradient(g)[0]

    means, gradient = means_and_gradient(x)
    np.testing.assert_allclose(means, np.mean(np.asarray(x), axis=1, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.broadcast_to(np.asarray(g)[:, None] / positions, x.shape), rtol=1e-6)


def test_the_means_of_an_image_are_the_same_bits_in_every_batch() -> None:
    x = jax.random.normal(seeds.key(0), (5, 64, 32))
    means = xla.jit(cpu.channel_means)
    one_by_one = jnp.concatenate([means(row[None]) for row in x])
    np.testing.assert_array_equal(means(x), one_by_one)
    np.testing.assert_array_equal(means(x[1:4]), one_by_one[1:4])


def test_a_bias_gradient_is_the_sum_of_the_gradient() -> None:
    g = jax.random.normal(seeds.key(0), (2, 4, 6, 32))
    of_bias = xla.jit(cpu.bias_gradient)(g)
    np.testing.assert_allclose(of_bias, np.sum(np.asarray(g), axis=(0, 1, 2), dtype=np.float64), rtol=1e-5, atol=1e-5)
