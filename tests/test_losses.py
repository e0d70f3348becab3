"""Algorithm 1 against closed forms: perfect, zero and Bayes-optimal predictors of Gaussian data."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from cfd.guidance import NULL_LABEL
from cfd.losses import eps_loss
from cfd.process import eps_from_x
from mixtures import gaussian_eps

LABELS = jnp.zeros(64, jnp.int32)


def logsnr_of(u: float, logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> float:
    b = math.atan(math.exp(-logsnr_max / 2))
    a = math.atan(math.exp(-logsnr_min / 2)) - b
    return -2 * math.log(math.tan(a * u + b))


def sigma_squared(logsnr: float) -> float:
    return 1 / (1 + math.exp(logsnr))


def capture(seen: list):
    """An eps_fn that keeps what it is given and predicts 0."""

    def eps_fn(z, logsnr, labels):
        seen.append((np.asarray(z), np.asarray(logsnr), np.asarray(labels)))
        return jnp.zeros_like(z)

    return eps_fn


def test_a_perfect_predictor_has_no_loss():
    with jax.numpy_dtype_promotion("strict"):
        loss = eps_loss(
            jax.random.key(0), lambda z, logsnr, _: eps_from_x(z, jnp.zeros_like(z), logsnr), jnp.zeros((64, 5)), LABELS
        )
        assert loss.shape == () and loss.dtype == jnp.float32
        assert float(loss) < 1e-12
        x = jnp.full((64, 5), 0.7)
        # ε is recovered to the rounding of z over σ, and σ >= e^{-10}.
        assert float(eps_loss(jax.random.key(1), lambda z, s, _: eps_from_x(z, x, s), x, LABELS)) < 1e-5


def test_predicting_nothing_loses_the_variance_of_the_noise():
    x = jnp.ones((1000, 10, 10, 1))
    loss = eps_loss(jax.random.key(2), lambda z, *_: jnp.zeros_like(z), x, jnp.zeros(1000, jnp.int32))
    assert abs(float(loss) - 1) < 5 * math.sqrt(2 / x.size)


def test_noise_levels_are_uniform_in_u():
    """Every λ maps back to u, and the empirical distribution of u stays within the DKW bound of the uniform one."""
    seen, n = [], 20_000
    eps_loss(jax.random.key(3), capture(seen), jnp.zeros((n, 1)), jnp.zeros(n, jnp.int32), logsnr_min=-7.0)
    b = math.atan(math.exp(-10.0))
    a = math.atan(math.exp(3.5)) - b
    u = np.sort((np.arctan(np.exp(-0.5 * np.float64(seen[0][1]))) - b) / a)
    distance = np.max(np.abs(u - (np.arange(n) + 0.5) / n))
    assert distance < math.sqrt(math.log(2 / 1e-6) / (2 * n))
    assert u[0] > -1e-6 and u[-1] < 1 + 1e-6


def test_z_has_the_moments_of_the_process():
    """(z − α x)/σ is standard normal at every noise level, and independent of it."""
    seen, n = [], 20_000
    eps_loss(jax.random.key(4), capture(seen), jnp.full((n, 1), 0.5), jnp.zeros(n, jnp.int32))
    z, logsnr, _ = (np.float64(value) for value in seen[0])
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-logsnr)), 1 / np.sqrt(1 + np.exp(logsnr))
    eps = (z[:, 0] - alpha * 0.5) / sigma
    assert abs(eps.mean()) < 5 / math.sqrt(n)
    assert abs(eps.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(np.corrcoef(eps, logsnr)[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize("p_uncond", [0.0, 0.1, 0.5, 1.0])
def test_dropped_labels_reach_the_network_at_the_asked_rate(p_uncond):
    seen, n = [], 20_000
    labels = jnp.arange(n, dtype=jnp.int32)
    eps_loss(jax.random.key(5), capture(seen), jnp.zeros((n, 1)), labels, p_uncond=p_uncond)
    z, logsnr, given = seen[0]
    dropped = given == NULL_LABEL
    np.testing.assert_array_equal(given[~dropped], labels[~dropped])
    assert abs(dropped.mean() - p_uncond) <= 5 * math.sqrt(p_uncond * (1 - p_uncond) / n)
    if 0 < p_uncond < 1:
        assert abs(np.corrcoef(dropped, logsnr)[0, 1]) < 5 / math.sqrt(n)
        assert abs(np.corrcoef(dropped, z[:, 0])[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize("p_uncond", [0.0, 0.4])
def test_the_bayes_predictor_loses_the_posterior_variance(p_uncond):
    """For x ~ N(m, s²) and ε̂ = E[ε | z], E(ε − ε̂)² = α² s² / (α² s² + σ²) at each λ: quadrature over u.

    Dropped rows see the Bayes predictor of a Gaussian of standard deviation 3, which is wrong for x by a known excess.
    """
    m, s, wrong, n = 0.3, 0.5, 3.0, 400_000
    x = m + s * jax.random.normal(jax.random.key(6), (n, 1))
    eps_fn = gaussian_eps(np.array([[m], [m]]), np.array([s, wrong]))

    def error(u: float, assumed: float) -> float:
        """Error variance of ε̂ = σ (z − α m)/(α² assumed² + σ²), ε̂ − ε being linear in x and ε."""
        var = sigma_squared(logsnr_of(u))
        k = math.sqrt(var) / ((1 - var) * assumed**2 + var)
        return k**2 * (1 - var) * s**2 + (k * math.sqrt(var) - 1) ** 2

    def bayes(u: float) -> float:
        var = sigma_squared(logsnr_of(u))
        return (1 - var) * s**2 / ((1 - var) * s**2 + var)

    optimal, second = (quad(lambda u, k=k: bayes(u) ** k, 0, 1)[0] for k in (1, 2))
    mismatched, mismatched_second = (quad(lambda u, k=k: error(u, wrong) ** k, 0, 1)[0] for k in (1, 2))
    expected = (1 - p_uncond) * optimal + p_uncond * mismatched
    # The error is Gaussian at each λ, so its fourth moment is 3 times the squared variance.
    fourth = 3 * ((1 - p_uncond) * second + p_uncond * mismatched_second)
    loss = eps_loss(jax.random.key(7), eps_fn, x, jnp.zeros(n, jnp.int32), p_uncond=p_uncond)
    assert abs(float(loss) - expected) < 4 * math.sqrt((fourth - expected**2) / n)


def test_gradient_of_a_linear_predictor():
    """The loss of ε̂ = θ z is a parabola in θ: its derivative is the central difference, exactly."""
    x = jax.random.normal(jax.random.key(8), (64, 3))

    def loss(theta):
        return eps_loss(jax.random.key(9), lambda z, *_: theta * z, x, LABELS)

    theta, step = jnp.float32(0.4), 0.25
    difference = (float(loss(theta + step)) - float(loss(theta - step))) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(theta), difference, rtol=1e-4)


def test_a_key_is_reproducible_and_the_batch_may_be_jitted():
    x = jax.random.normal(jax.random.key(10), (64, 2, 2, 1))

    def loss(key, p_uncond):
        return eps_loss(key, lambda z, s, c: jnp.tanh(z) * (1.0 + c.reshape(-1, 1, 1, 1)), x, LABELS, p_uncond=p_uncond)

    eager, jitted = loss(jax.random.key(11), 0.3), jax.jit(loss)(jax.random.key(11), jnp.float32(0.3))
    np.testing.assert_allclose(eager, jitted, rtol=1e-6)
    assert float(loss(jax.random.key(12), 0.3)) != float(eager)


def test_float32_under_x64():
    with jax.enable_x64(True):
        loss = eps_loss(jax.random.key(13), lambda z, *_: z, jnp.zeros((64, 2), jnp.float32), LABELS)
    assert loss.dtype == jnp.float32


def test_bad_arguments_are_refused():
    x = jnp.zeros((64, 3))
    with pytest.raises(ValueError, match=r"eps_fn returned shape \(64, 1\).*\(64, 3\)"):
        eps_loss(jax.random.key(0), lambda z, *_: z[:, :1], x, LABELS)
    with pytest.raises(ValueError, match="p_uncond is 2.0"):
        eps_loss(jax.random.key(0), lambda z, *_: z, x, LABELS, p_uncond=2.0)
