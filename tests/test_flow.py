"""The probability flow of Gaussians and mixtures: its exact map both ways, its order, its density."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import gaussian_eps, mixture_eps

from cfd.flow import flow, log_likelihood
from cfd.guidance import Interval
from cfd.process import alpha_sigma, linear
from cfd.sampling import grid

MEANS, STDS = np.array([[0.3, 0.0], [-0.5, 0.4]], np.float32), np.array([0.5, 0.2], np.float32)
eps_fn = gaussian_eps(MEANS, STDS)
LABELS = jnp.arange(6, dtype=jnp.int32) % 2


def exact(z, first: float, last: float):
    """z(λ2) = α2 m + sqrt(V2 / V1) (z1 − α1 m), with V = α² s² + σ²."""
    (a1, a2), (v1, v2) = zip(*[(np.sqrt(1 / (1 + np.exp(-s))), s) for s in (first, last)], strict=True)
    s, m = STDS.astype(np.float64)[np.asarray(LABELS), None], MEANS.astype(np.float64)[np.asarray(LABELS)]
    v1, v2 = (a**2 * s**2 + 1 / (1 + np.exp(lam)) for a, lam in ((a1, v1), (a2, v2)))
    return a2 * m + np.sqrt(v2 / v1) * (np.asarray(z, np.float64) - a1 * m)


def noise():
    return jax.random.normal(jax.random.key(0), (6, 2))


def test_the_flow_of_a_gaussian_is_of_second_order() -> None:
    errors = []
    for count in (32, 64, 128):
        z = flow(eps_fn, noise(), LABELS, logsnr=grid(count + 1, linear(-20.0, 13.3)))
        errors.append(np.abs(z - exact(noise(), -20.0, 13.3)).max())
    assert errors[0] < 1e-2 and errors[0] / errors[1] > 3.0 and errors[1] / errors[2] > 3.0


def test_the_way_back_returns_to_the_same_image() -> None:
    levels = grid(201, linear(-20.0, 13.3))
    z = flow(eps_fn, noise(), LABELS, logsnr=levels)
    np.testing.assert_allclose(flow(eps_fn, z, LABELS, logsnr=levels[::-1]), noise(), atol=2e-3)


def test_guidance_of_gaussians_of_one_width_is_the_flow_of_a_shifted_one() -> None:
    """For equal widths, ε̃ is the ε of the mean (1 + w) m_c − w m_∅."""
    alike = gaussian_eps(np.array([[0.3], [0.1]], np.float32), np.array([0.4, 0.4], np.float32))
    shifted = gaussian_eps(np.array([[0.3 + 2.0 * 0.2]], np.float32), np.array([0.4], np.float32))
    z, labels, levels = noise()[:, :1], jnp.zeros(6, jnp.int32), grid(65, linear(-12.0, 8.0))
    guided = flow(alike, z, labels, logsnr=levels, w=2.0)
    np.testing.assert_allclose(guided, flow(shifted, z, labels, logsnr=levels), atol=1e-5)


def test_the_density_of_a_gaussian() -> None:
    """log N(x; m, s² + e^{−λ_max}) is −0.945790 at x = 0.9. Heun's steps err by 8e-4 with 50, and 1e-5 with 400."""
    one = gaussian_eps(np.array([[0.3]], np.float32), np.array([0.5], np.float32))
    x, label = jnp.array([[0.9]], jnp.float32), jnp.zeros(1, jnp.int32)
    assert pytest.approx(-0.5 * (0.36 / (0.25 + math.exp(-13.3)) + math.log(2 * math.pi * 0.25)), abs=2e-5) == -0.945790

    def nats(count: int) -> float:
        log_p, z = log_likelihood(jax.random.key(1), one, x, label, logsnr_min=-20.0, logsnr_max=13.3, num_steps=count)
        assert z.shape == (1, 1)
        return float(log_p[0])

    assert nats(50) == pytest.approx(-0.9450, abs=2e-4)
    assert nats(100) == pytest.approx(-0.94567, abs=5e-5)
    assert nats(400) == pytest.approx(-0.94580, abs=3e-5)


def test_the_density_of_a_mixture_in_one_dimension() -> None:
    """In one dimension the probe's estimate of the divergence is exact: v² = 1."""
    means, stds = np.array([[-0.7], [0.1], [0.7]], np.float32), np.array([0.2, 0.1, 0.25], np.float32)
    x = jnp.linspace(-0.9, 0.9, 7)[:, None]
    log_p, _ = log_likelihood(
        jax.random.key(2),
        mixture_eps(means, stds),
        x,
        jnp.full(7, -1),
        logsnr_min=-20.0,
        logsnr_max=9.0,
        num_steps=200,
    )
    variance = np.float64(stds) ** 2 + math.exp(-9.0)
    exponents = -0.5 * ((np.asarray(x, np.float64) - means.T) ** 2 / variance + np.log(2 * math.pi * variance))
    np.testing.assert_allclose(log_p, np.log(np.exp(exponents).mean(1)), atol=2e-3)


def test_the_probe_is_unbiased_and_belongs_to_the_image() -> None:
    """For a field that turns z by a matrix, the divergence is its trace; images of one key keep it in any batch."""
    matrix = np.array([[0.5, 0.3, 0.0], [-0.2, 0.1, 0.4], [0.1, 0.0, 0.9]], np.float32)

    def turned(z, logsnr, labels):
        return z @ matrix.T

    x, labels = jnp.zeros((4000, 3)), jnp.zeros(4000, jnp.int32)
    options = {"logsnr_min": -6.0, "logsnr_max": 6.0, "num_steps": 32}
    log_p, _ = jax.jit(lambda x: log_likelihood(jax.random.key(3), turned, x, labels, **options))(x)
    levels = np.linspace(-6.0, 6.0, 20_001)
    integral = 0.5 * np.trace(matrix) * np.trapezoid(1 / np.sqrt(1 + np.exp(levels)), levels)
    expected = -1.5 * math.log(2 * math.pi) - 1.5 * math.log1p(math.exp(6.0)) + integral
    assert abs(np.mean(log_p) - expected) < 4 * np.std(log_p) / math.sqrt(4000) + 2e-3
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(4000))
    alone, _ = log_likelihood(keys[7:8], turned, x[7:8], labels[7:8], **options)
    assert float(alone[0]) == pytest.approx(float(log_p[7]), abs=1e-4)


def test_a_weight_must_be_one_for_all_or_one_per_image() -> None:
    levels = np.array([-1.0, 1.0])
    for w, words in (
        (lambda logsnr: jnp.ones(3), r"w has shape \(3,\); give a scalar or one weight per label"),
        (lambda logsnr: Interval(1.0, -1.0, 1.0), r"w is a function that returned Interval"),
    ):
        with pytest.raises(ValueError, match=words):
            flow(eps_fn, noise(), LABELS, logsnr=levels, w=w)


def test_no_images_have_no_likelihood() -> None:
    log_p, z = log_likelihood(
        jax.random.key(0), eps_fn, noise()[:0], LABELS[:0], logsnr_min=-2.0, logsnr_max=2.0, num_steps=1
    )
    assert log_p.shape == (0,) and z.shape == noise()[:0].shape


def test_grids_that_turn_round_are_refused() -> None:
    for wrong in ([0.0, 1.0, 0.5], [1.0, 1.0], [1.0], [0.0, 90.0], [0.0, math.nan]):
        with pytest.raises(ValueError, match="a flow goes one way: give a grid"):
            flow(eps_fn, noise(), LABELS, logsnr=np.array(wrong))
    with pytest.raises(ValueError, match="logsnr is 64; a flow goes one way: give a grid"):
        flow(eps_fn, noise(), LABELS, logsnr=64)
    alpha, _ = alpha_sigma(2.0)
    with pytest.raises(ValueError, match=r"logsnr_min is 3\.0 and logsnr_max 2\.0"):
        log_likelihood(jax.random.key(0), eps_fn, alpha * noise(), LABELS, logsnr_min=3.0, logsnr_max=2.0)
