"""Algorithm 1 against closed forms: perfect, zero and Bayes-optimal predictors of Gaussian data."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax_settings import jax_setting
from mixtures import gaussian_eps
from recursion import jaxtyping_off
from scipy.integrate import quad

from cfd.guidance import NULL_LABEL
from cfd.losses import eps_loss
from cfd.process import cosine, eps_from_x

N = 20_000
LABELS = jnp.arange(N, dtype=jnp.int32)


def column(value: float) -> jax.Array:
    return jnp.full((N, 1), value, jnp.float32)


def logsnr_of(u: float) -> float:
    b = math.atan(math.exp(-10.0))
    return -2 * math.log(math.tan((math.pi / 2 - 2 * b) * u + b))


def seen_by_the_network(key, x, **kwargs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, λ and labels as eps_fn receives them, in float64."""
    seen = []

    def eps_fn(z, logsnr, labels):
        seen.extend(np.float64(value) for value in (z, logsnr, labels))
        return jnp.zeros_like(z)

    eps_loss(key, eps_fn, x, LABELS, **kwargs)
    z, logsnr, labels = seen
    return z, logsnr, labels


def test_a_perfect_predictor_has_no_loss():
    with jax.numpy_dtype_promotion("strict"):
        x = column(0.0)
        loss = eps_loss(jax.random.key(0), lambda z, logsnr, _: eps_from_x(z, x, logsnr), x, LABELS)
        assert loss.shape == () and loss.dtype == jnp.float32
        assert float(loss) < 1e-12
        # ε is recovered to the rounding of z over σ, and σ >= e^{-10}.
        x = column(0.7)
        assert float(eps_loss(jax.random.key(1), lambda z, s, _: eps_from_x(z, x, s), x, LABELS)) < 1e-5


def test_predicting_0_loses_the_variance_of_the_noise():
    loss = eps_loss(jax.random.key(2), lambda z, *_: jnp.zeros_like(z), column(1.0), LABELS)
    assert abs(float(loss) - 1) < 5 * math.sqrt(2 / N)


def test_the_loss_is_the_mean_over_batch_and_dimensions():
    """An error of exactly i at row i, the same in every dimension, costs the mean of i²."""
    x = jnp.zeros((4, 2, 3, 1))
    rows = jnp.arange(4.0)[:, None, None, None]
    loss = eps_loss(jax.random.key(3), lambda z, s, _: eps_from_x(z, x, s) + rows, x, LABELS[:4])
    np.testing.assert_allclose(loss, (0 + 1 + 4 + 9) / 4, rtol=1e-5)


def test_noise_levels_are_uniform_in_u():
    """λ maps back to u, whose empirical distribution is within the DKW bound of the uniform distribution."""
    _, logsnr, _ = seen_by_the_network(jax.random.key(4), column(0.0), schedule=cosine(-7.0))
    b = math.atan(math.exp(-10.0))
    a = math.atan(math.exp(3.5)) - b
    u = np.sort((np.arctan(np.exp(-0.5 * logsnr)) - b) / a)
    distance = np.max(np.abs(u - (np.arange(N) + 0.5) / N))
    assert distance < math.sqrt(math.log(2 / 1e-6) / (2 * N))
    assert u[0] > -1e-6 and u[-1] < 1 + 1e-6


def test_z_has_the_moments_of_the_process():
    """(z − α x)/σ is standard normal, independently of the noise level."""
    z, logsnr, _ = seen_by_the_network(jax.random.key(5), column(0.5))
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-logsnr)), 1 / np.sqrt(1 + np.exp(logsnr))
    eps = (z[:, 0] - alpha * 0.5) / sigma
    assert abs(eps.mean()) < 5 / math.sqrt(N)
    assert abs(eps.var() - 1) < 5 * math.sqrt(2 / N)
    assert abs(np.corrcoef(eps, logsnr)[0, 1]) < 5 / math.sqrt(N)
    assert abs(np.corrcoef(eps[:-1], eps[1:])[0, 1]) < 5 / math.sqrt(N)


@pytest.mark.parametrize("p_uncond", [0.0, 0.1, 0.5, 1.0])
def test_labels_reach_the_network_dropped_with_probability_p_uncond(p_uncond):
    z, logsnr, given = seen_by_the_network(jax.random.key(6), column(0.0), p_uncond=p_uncond)
    dropped = given == NULL_LABEL
    np.testing.assert_array_equal(given[~dropped], LABELS[~dropped])
    assert abs(dropped.mean() - p_uncond) <= 5 * math.sqrt(p_uncond * (1 - p_uncond) / N)
    if 0 < p_uncond < 1:
        assert abs(np.corrcoef(dropped, logsnr)[0, 1]) < 5 / math.sqrt(N)
        assert abs(np.corrcoef(dropped, z[:, 0])[0, 1]) < 5 / math.sqrt(N)


def test_labels_may_be_embeddings():
    """Rows of a table with its own ∅ give the same loss as the labels that would look them up."""
    table = jnp.float32([[0.5, 1.0], [-1.0, 2.0], [0.1, -3.0]])

    def eps_fn(z, logsnr, rows):
        return rows[:, :1] * z + rows[:, 1:]

    x, key = column(0.3), jax.random.key(8)
    by_label = eps_loss(key, lambda z, logsnr, labels: eps_fn(z, logsnr, table[labels]), x, LABELS % 2, p_uncond=0.5)
    assert eps_loss(key, eps_fn, x, table[LABELS % 2], null=table[-1], p_uncond=0.5) == by_label


def test_the_loss_of_gaussian_predictors_is_that_of_quadrature():
    """For x ~ N(m, s²) and ε̂ = E[ε | z], the loss is the integral over u of E(ε − ε̂)² = α² s² / (α² s² + σ²).

    Rows with a dropped label get the Bayes predictor of a Gaussian of standard deviation 3, whose excess error is
    known.
    """
    m, s, wrong, n = 0.3, 0.5, 3.0, 400_000

    def bayes(u: float) -> float:
        sigma2 = 1 / (1 + math.exp(logsnr_of(u)))
        return (1 - sigma2) * s**2 / ((1 - sigma2) * s**2 + sigma2)

    def mismatched(u: float) -> float:
        """ε̂ = k (z − α m) errs by k α (x − m) + (k σ − 1) ε."""
        sigma2 = 1 / (1 + math.exp(logsnr_of(u)))
        k = math.sqrt(sigma2) / ((1 - sigma2) * wrong**2 + sigma2)
        return k**2 * (1 - sigma2) * s**2 + (k * math.sqrt(sigma2) - 1) ** 2

    def moment(power: int, p_uncond: float) -> float:
        """Mean over u and over dropping of the error variance to a power."""
        kept, dropped = quad(lambda u: bayes(u) ** power, 0, 1)[0], quad(lambda u: mismatched(u) ** power, 0, 1)[0]
        return (1 - p_uncond) * kept + p_uncond * dropped

    eps_fn = gaussian_eps(np.array([[m], [m]]), np.array([s, wrong]))

    @jax.jit
    def loss(p_uncond):
        x = m + s * jax.random.normal(jax.random.key(7), (n, 1))
        return eps_loss(jax.random.key(8), eps_fn, x, jnp.zeros(n, jnp.int32), p_uncond=p_uncond)

    for p_uncond in (0.0, 0.4, 1.0):
        expected = moment(1, p_uncond)
        # The error is Gaussian at each λ, so its fourth moment is 3 times the squared variance.
        deviation = math.sqrt((3 * moment(2, p_uncond) - expected**2) / n)
        assert abs(float(loss(p_uncond)) - expected) < 4 * deviation


def test_gradient_of_a_linear_predictor():
    """The loss of ε̂ = θ z is a parabola in θ, so its derivative equals the central difference."""

    @jax.jit
    def loss(theta):
        return eps_loss(jax.random.key(9), lambda z, *_: theta * z, jnp.ones((64, 3)), LABELS[:64])

    theta, step = jnp.float32(0.4), 0.25
    difference = (float(loss(theta + step)) - float(loss(theta - step))) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(theta), difference, rtol=1e-4)


def test_a_key_is_reproducible_under_jit():
    def loss(key, p_uncond):
        return eps_loss(
            key, lambda z, s, c: jnp.where(c < 0, 0.0, z[:, 0])[:, None], column(0.5), LABELS, p_uncond=p_uncond
        )

    eager, jitted = loss(jax.random.key(11), 0.3), jax.jit(loss)
    np.testing.assert_allclose(eager, jitted(jax.random.key(11), 0.3), rtol=1e-6)
    assert float(jitted(jax.random.key(12), 0.3)) != float(eager)


def test_eight_devices_equal_one():
    """In a caller's own pmap and shard_map, the loss and its gradient are the means of those of the devices."""
    x, labels = jnp.linspace(-1.0, 1.0, 8 * 3 * 5).reshape(8, 3, 5), jnp.arange(24, dtype=jnp.int32).reshape(8, 3)
    keys = jax.random.split(jax.random.key(14), 8)

    def loss(theta, key, x, labels):
        return eps_loss(key, lambda z, logsnr, labels: theta * z + 0.01 * labels[:, None], x, labels, p_uncond=0.3)

    theta = jnp.float32(0.4)
    value_and_grad = jax.value_and_grad(loss)
    losses, gradients = jax.vmap(value_and_grad, in_axes=(None, 0, 0, 0))(theta, keys, x, labels)
    mapped = jax.pmap(value_and_grad, in_axes=(None, 0, 0, 0))(theta, keys, x, labels)
    np.testing.assert_allclose(mapped, (losses, gradients), rtol=1e-5)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def mean_loss(theta, keys, x, labels):
        return jax.lax.pmean(loss(theta, keys[0], x[0], labels[0]), "data")

    specs = (P(), P("data"), P("data"), P("data"))
    sharded = jax.jit(jax.value_and_grad(jax.shard_map(mean_loss, mesh=mesh, in_specs=specs, out_specs=P())))
    np.testing.assert_allclose(sharded(theta, keys, x, labels), (np.mean(losses), np.mean(gradients)), rtol=1e-5)


def test_float32_under_x64():
    x = column(0.0)
    with jax_setting("jax_enable_x64", True):
        loss = jax.eval_shape(lambda key: eps_loss(key, lambda z, *_: z, x, LABELS), jax.random.key(13))
    assert loss.dtype == jnp.float32


def test_the_implementation_of_a_key_does_not_matter():
    losses = {
        float(eps_loss(key, lambda z, *_: 0.3 * z, column(0.5), LABELS, p_uncond=0.5))
        for impl in ("threefry2x32", "rbg", "unsafe_rbg")
        for key in (jax.random.key(15, impl=impl), jax.random.key_data(jax.random.key(15, impl=impl)))
    }
    assert len(losses) == 1


@pytest.mark.parametrize("returned", [lambda z: (z, z, z), lambda z: {"sample": z}, lambda z: None, lambda z: 1j * z])
def test_an_output_that_is_not_the_noise_is_refused(returned):
    with pytest.raises(ValueError, match=r"eps_fn returned .*must return the noise of z, one .*\(20000, 1\)"):
        eps_loss(jax.random.key(0), lambda z, *_: returned(z), column(0.0), LABELS)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"eps_fn returned shape \(20000,\).*\(20000, 1\)"):
        eps_loss(jax.random.key(0), lambda z, *_: z[:, 0], column(0.0), LABELS)
    with pytest.raises(ValueError, match="p_uncond is 2"):
        eps_loss(jax.random.key(0), lambda z, *_: z, column(0.0), LABELS, p_uncond=2.0)
    valid: dict[str, Any] = {"key": jax.random.key(0), "eps_fn": lambda z, *_: z, "x": column(0.0), "labels": LABELS}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"p_uncond": np.float32(2.0)}, "p_uncond is 2.0"),
        ({"schedule": lambda u: u[0]}, r"schedule returned shape \(\); it must return λ for each u"),
        ({"weight": lambda logsnr: 1.0}, "weight returned a float; it must return one weight per row"),
        ({"x": jnp.zeros((N, 1), jnp.uint8)}, r"x has dtype uint8.*x / 127\.5 - 1"),
        ({"x": np.zeros((N, 1)).tolist()}, r"x is a list; give one array of float32"),
        ({"x": column(0.0)[:1]}, r"x has shape \(1, 1\) for labels of shape \(20000,\)"),
    ]
    for arguments, message in cases:
        with jaxtyping_off(), pytest.raises(ValueError, match=message):
            eps_loss(**valid | arguments)
