"""The denoising diffusion GAN against closed forms: levels, pairs, one step, the losses, the penalty, the sampler."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from cfd.gan import losses
from cfd.gan.gaussians import CENTRES, STD, data, quality
from cfd.gan.losses import Networks

LOGSNR = losses.levels(4)
KEY = jax.random.key(3)
MEAN, SPREAD = 0.3, 0.5


def alpha_variance(logsnr: Any) -> tuple[Any, Any]:
    return np.sqrt(1 / (1 + np.exp(-np.float64(logsnr)))), 1 / (1 + np.exp(np.float64(logsnr)))


def test_the_levels_are_those_of_the_variance_preserving_sde() -> None:
    """log α² is minus the integral of β, by quadrature, at equal times."""
    for count in (1, 4):
        found = losses.levels(count)
        for k, logsnr in enumerate(found):
            t = 1e-3 + 0.999 * (count - k) / count
            s = np.linspace(0, t, 100_001)
            log_alpha_squared = -np.trapezoid(0.1 + 19.9 * s, s)
            assert math.log(alpha_variance(logsnr)[0] ** 2) == pytest.approx(log_alpha_squared, rel=1e-6)
    np.testing.assert_allclose(LOGSNR, [-10.05, -5.67, -2.46, 0.087], atol=0.02)


def test_pairs_have_the_moments_of_the_forward_process() -> None:
    """For N(m, s²): both marginals, and cov(z', z) = (α/α') var z', at each level. After the last level, z' is x."""
    x = MEAN + SPREAD * jax.random.normal(jax.random.key(1), (200_000, 1))
    found = jax.jit(losses.pairs)(KEY, x, jnp.asarray(LOGSNR, jnp.float32))
    z_next, z, here = (np.asarray(a, np.float64).ravel() for a in (found.z_next, found.z, found.logsnr))
    after = [*LOGSNR[1:], np.inf]
    for level, later in zip(LOGSNR, after, strict=True):
        at = np.isclose(here, level, atol=1e-5)
        assert abs(at.mean() - 0.25) < 0.005
        (a, s2), (a_next, s2_next) = alpha_variance(level), alpha_variance(later)
        variance, variance_next = a**2 * SPREAD**2 + s2, a_next**2 * SPREAD**2 + s2_next
        covariance = np.cov(z_next[at], z[at])
        np.testing.assert_allclose([z_next[at].mean(), z[at].mean()], [a_next * MEAN, a * MEAN], atol=0.02)
        expected = [[variance_next, a / a_next * variance_next], [a / a_next * variance_next, variance]]
        np.testing.assert_allclose(covariance, expected, atol=0.03)
    np.testing.assert_array_equal(z_next[at], np.asarray(x, np.float64).ravel()[at])


def test_the_true_data_give_true_pairs() -> None:
    """With x̂ = x, ẑ' is drawn from q(z' | z, x): the pairs (ẑ', z) then have the moments of (z', z)."""
    x = MEAN + SPREAD * jax.random.normal(jax.random.key(1), (200_000, 1))
    true = losses.pairs(KEY, x, jnp.asarray(LOGSNR[2:], jnp.float32))
    made = np.asarray(losses.denoise(jax.random.key(9), x, true), np.float64).ravel()
    for level in LOGSNR[2:]:
        at = np.isclose(np.asarray(true.logsnr), level, atol=1e-5)
        z_next, z = (np.asarray(a, np.float64).ravel()[at] for a in (true.z_next, true.z))
        np.testing.assert_allclose(np.cov(made[at], z), np.cov(z_next, z), atol=0.02)
        assert made[at].mean() == pytest.approx(z_next.mean(), abs=0.01)
    np.testing.assert_array_equal(made[at], np.asarray(x, np.float64).ravel()[at])  # the last step returns x̂


def loss_of(discriminate: Any, generate: Any = None, penalty: float = 0.0, **options: Any) -> Any:
    """The loss of one level whose fake z' is the generator's x̂, and its gradients."""
    networks = Networks(generate or (lambda g, z, latents, logsnr, labels: g + 0.0 * z), discriminate, 3)
    params = {"g": jnp.asarray(0.7), "d": jnp.asarray([0.4, -0.2])}
    x = MEAN + SPREAD * jax.random.normal(jax.random.key(1), (20_000, 1))
    labels = jnp.zeros(len(x), jnp.int32)

    def of(params: Any) -> Array:
        return losses.loss(KEY, networks, params, x, labels, logsnr=LOGSNR[3:], penalty=penalty, **options)

    return jax.value_and_grad(of)(params)


def linear(d: Array, z_next: Array, z: Array, logsnr: Array, labels: Array) -> Array:
    return d[0] * z_next[:, 0] + d[1]


def test_each_network_gets_the_gradient_of_its_own_loss() -> None:
    """D(z') = a z' + b on true x ~ N(m, s²) and x̂ = 0.7, by Gauss-Hermite quadrature in float64."""
    value, grads = loss_of(linear)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x, weights = MEAN + SPREAD * nodes, weights / weights.sum()
    a, b, g = 0.4, -0.2, 0.7
    sigmoid = lambda u: 1 / (1 + np.exp(-u))  # noqa: E731
    true, fake = a * x + b, a * g + b
    of_g = np.log1p(np.exp(-fake))
    assert value == pytest.approx(weights @ np.log1p(np.exp(-true)) + np.log1p(np.exp(fake)) + of_g, abs=0.003)
    by_a = -weights @ (sigmoid(-true) * x) + sigmoid(fake) * g
    by_b = -weights @ sigmoid(-true) + sigmoid(fake)
    np.testing.assert_allclose(grads["d"], [by_a, by_b], atol=0.006)
    np.testing.assert_allclose(grads["g"], -sigmoid(-fake) * a, rtol=1e-5)


def test_the_best_discriminator_is_the_log_ratio_of_the_densities() -> None:
    """At D = log p(z') / q(z') the gradient by D is 0, and L_D = 2 log 2 − 2 JS, of x and x̂ = 0.7 + s ξ_1."""
    generate = lambda g, z, latents, logsnr, labels: g + SPREAD * latents[:, :1]  # noqa: E731
    # log N(x; m, s²) − log N(x; g, s²) is linear in x.
    best = jnp.asarray([(MEAN - 0.7) / SPREAD**2, (0.7**2 - MEAN**2) / (2 * SPREAD**2)], jnp.float32)
    exact = lambda d, *pair: linear(best + (d - jnp.asarray([0.4, -0.2])), *pair)  # noqa: E731
    value, grads = loss_of(exact, generate)
    np.testing.assert_allclose(grads["d"], [0, 0], atol=0.01)
    x = np.linspace(-4, 5, 20_001)
    p, q = (np.exp(-0.5 * ((x - m) / SPREAD) ** 2) / (SPREAD * math.sqrt(2 * math.pi)) for m in (MEAN, 0.7))
    js = 0.5 * np.trapezoid(p * np.log(2 * p / (p + q)) + q * np.log(2 * q / (p + q)), x)
    of_g = np.trapezoid(q * np.log((p + q) / p), x)
    assert value == pytest.approx(2 * math.log(2) - 2 * js + of_g, abs=0.01)


def test_the_penalty_is_the_squared_slope_in_the_true_next_z() -> None:
    """Of D = ½ a ‖z'‖² + b · z', the gradient is a z' + b. Of a linear D, the loss grows by ½ penalty ‖slope‖²."""
    z = jax.random.normal(KEY, (50, 4, 4, 2))
    b = jax.random.normal(jax.random.key(5), (4, 4, 2))
    found = losses.gradient_penalty(
        lambda z: 0.25 * jnp.sum(jnp.square(z), (1, 2, 3)) + jnp.sum(z * b[None], (1, 2, 3)), z
    )
    assert float(found) == pytest.approx(float(np.square(0.5 * z + b[None]).sum() / 50), rel=1e-5)
    without, with_it = loss_of(linear)[0], loss_of(linear, penalty=3.0)[0]
    assert float(with_it - without) == pytest.approx(0.5 * 3.0 * 0.4**2, rel=1e-4)
    grads = loss_of(linear, penalty=3.0)[1]["d"] - loss_of(linear)[1]["d"]
    np.testing.assert_allclose(grads, [3.0 * 0.4, 0.0], atol=1e-5)


def test_a_rare_penalty_is_taken_at_its_rate() -> None:
    networks = Networks(lambda g, z, *_: z, linear, 1)
    params = {"g": jnp.zeros(()), "d": jnp.asarray([0.4, -0.2])}
    x, labels = jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32)

    def extra(key: Array) -> Array:
        one, two = (
            losses.loss(key, networks, params, x, labels, logsnr=LOGSNR, penalty=p, penalty_every=5) for p in (0.0, 2.0)
        )
        return two - one

    found = jax.jit(jax.vmap(extra))(jax.random.split(KEY, 2000))
    np.testing.assert_allclose(np.unique(np.round(found, 4)), [0.0, 0.16], atol=1e-4)
    assert abs(np.mean(found > 0.1) - 0.2) < 0.03


def test_the_sampler_is_the_ancestral_chain_of_the_generator() -> None:
    """With x̂ = E[x | z], linear in z, images are those of a recursion in float64; each step has latents of its own."""
    shape, labels = (2, 2, 1), jnp.zeros(6, jnp.int32)

    def generate(_: Any, z: Array, latents: Array, logsnr: Array, labels: Array) -> Array:
        alpha, variance = (jnp.asarray(a, jnp.float32)[:, None, None, None] for a in split(logsnr))
        return (alpha * SPREAD**2 * z + variance * MEAN) / (alpha**2 * SPREAD**2 + variance)

    def split(logsnr: Array) -> tuple[Array, Array]:
        return jnp.sqrt(jax.nn.sigmoid(logsnr)), jax.nn.sigmoid(-logsnr)

    found = losses.sample(KEY, Networks(generate, linear, 3), None, labels, shape, logsnr=LOGSNR)
    z = np.stack([noise(i, 0, shape) for i in range(6)])
    for t, (level, later) in enumerate(zip(LOGSNR, [*LOGSNR[1:], None], strict=True), 1):
        a, s2 = alpha_variance(level)
        x = (a * SPREAD**2 * z + s2 * MEAN) / (a**2 * SPREAD**2 + s2)
        if later is None:
            break
        a_next, s2_next = alpha_variance(later)
        kept = np.exp(level - later)
        eps = np.stack([noise(i, t, shape) for i in range(6)])
        z = kept * a_next / a * z + (1 - kept) * a_next * x + np.sqrt((1 - kept) * s2_next) * eps
    np.testing.assert_allclose(found, x, atol=2e-4)

    def echo(_: Any, z: Array, latents: Array, logsnr: Array, labels: Array) -> Array:
        return jnp.broadcast_to(latents[:, :1, None, None] + 10.0 * (logsnr[0] > 0.0), z.shape)

    images = losses.sample(KEY, Networks(echo, linear, 3), None, labels, shape, logsnr=LOGSNR)
    latents = [
        jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, i), losses.LATENTS), (4, 3)) for i in range(6)
    ]
    np.testing.assert_allclose(images[:, 0, 0, 0], [float(x[3, 0]) + 10.0 for x in latents], atol=1e-4)


def noise(image: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, image), step), shape), np.float64)


def test_the_quality_of_real_samples_of_the_25_gaussians() -> None:
    """The share within three standard deviations in the plane is 1 − e^{−9/2}."""
    found = quality(np.asarray(data(KEY, 50_000)))
    assert found.modes == 25 and found.good == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    one = quality(CENTRES[:1] + STD * np.random.default_rng(0).normal(size=(1000, 2)))
    assert one.modes == 1
    assert quality(CENTRES + 4 * STD).good == 0.0 and quality(CENTRES + 4 * STD).modes == 0
