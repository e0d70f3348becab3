"""The mean of a step as a prediction, weights of the loss, and log-normal noise, against closed forms in float64."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recursion import jaxtyping_off
from scipy.integrate import quad
from scipy.stats import norm
from tiny import QUICK

from cfd.losses import eps_loss, mean_weight, sigmoid_weight, v_weight, x_weight
from cfd.networks.times import logsnr_table
from cfd.process import cosine, diffuse, from_mean, from_v, from_x, linear, log_normal, tabulated
from cfd.steps import grid

T = 1000
BETA = np.linspace(1e-4, 0.02, T)
ALPHA_BAR = np.cumprod(1.0 - BETA)
LEVELS = logsnr_table("linear")[::-1]
RANDOM = np.random.default_rng(0)
quick = functools.partial(jax.jit, compiler_options=QUICK)


def ddpm_mean(x0: np.ndarray, x_t: np.ndarray, t: int) -> np.ndarray:
    """μ̃_t of Ho et al. (arXiv:2006.11239), Eq. 7, of DDPM's own β, in float64. At the first step, it is x0."""
    if t == 0:
        return x0
    before = ALPHA_BAR[t - 1]
    scale = 1.0 - ALPHA_BAR[t]
    return (np.sqrt(before) * BETA[t] * x0 + np.sqrt(1.0 - BETA[t]) * (1.0 - before) * x_t) / scale


def test_one_network_as_eps_x_v_or_mean_is_the_same_network() -> None:
    """Each predicts its own quantity of the same x̂, at levels of DDPM's table from its first to its last."""
    times = np.array([0, 1, 2, 40, 250, 500, 998, 999])
    x = RANDOM.normal(size=(len(times), 3)) * 0.5
    z = RANDOM.normal(size=(len(times), 3))
    alpha, sigma = np.sqrt(ALPHA_BAR[times])[:, None], np.sqrt(1.0 - ALPHA_BAR[times])[:, None]
    eps = (z - alpha * x) / sigma
    outputs = {
        from_x: x,
        from_v: alpha * eps - sigma * x,
        lambda fn: from_mean(fn, LEVELS): np.stack([ddpm_mean(*row) for row in zip(x, z, times.tolist(), strict=True)]),
    }
    logsnr = jnp.asarray(LEVELS[::-1][times], jnp.float32)

    @quick
    def read(z: jax.Array) -> list[jax.Array]:
        fns = [adapter(lambda *_, out=out: jnp.asarray(out, jnp.float32)) for adapter, out in outputs.items()]
        return [eps_fn(z, logsnr, jnp.zeros(len(times), jnp.int32)) for eps_fn in fns]

    # The error of μ̃ in float32 grows by 1 / (1 − e^{λ−λ'}), which is 100 at the table's smallest steps.
    for found in read(jnp.asarray(z, jnp.float32)):
        np.testing.assert_allclose(found, eps, atol=2e-4, rtol=2e-4)


def test_the_next_level_is_counted_from_the_nearest_one() -> None:
    """A λ that is rounded to just below its level has the next one, and not its own, as its next level."""
    levels = np.array([-2.0, 0.0, 1.0, 4.0])
    z, x = jnp.ones((5, 1)), jnp.full((5, 1), 0.25)
    logsnr = np.array([-0.9, -1e-6, 1e-6, 1.0, 3.9])

    def mean(z, logsnr, _):
        ahead = np.array([1.0, 1.0, 1.0, 4.0, np.inf])
        kept = np.exp(logsnr - ahead) * np.sqrt((1.0 + np.exp(-logsnr)) / (1.0 + np.exp(-ahead)))
        added = -np.expm1(logsnr - ahead) / np.sqrt(1.0 + np.exp(-ahead))
        return jnp.asarray(kept[:, None] * z + added[:, None] * x, jnp.float32)

    eps = from_mean(mean, levels)(z, jnp.asarray(logsnr, jnp.float32), None)
    np.testing.assert_allclose(diffuse(x, eps, jnp.asarray(logsnr, jnp.float32)), z, rtol=1e-5)
    with pytest.raises(ValueError, match="levels has shape"), jaxtyping_off():
        from_mean(mean, 4.0)  # pyright: ignore[reportArgumentType]


def test_a_weighted_loss_is_the_loss_of_that_prediction() -> None:
    """For the same key, the loss of ε times its weight is E‖x̂ − x‖², E‖v̂ − v‖² or E‖μ̃̂ − μ̃‖², in float64."""
    count, schedule = 64, tabulated(LEVELS[::-1])
    x = jnp.asarray(RANDOM.uniform(-1, 1, size=(count, 2)), jnp.float32)

    @quick
    def losses(key: jax.Array) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
        seen = []

        def eps_fn(z: jax.Array, logsnr: jax.Array, _: jax.Array) -> jax.Array:
            seen.append((z, logsnr))
            return 0.7 * z

        given: Any = key, eps_fn, x, jnp.zeros(count, jnp.int32)
        weights = (None, x_weight, v_weight, mean_weight(LEVELS))
        return [eps_loss(*given, schedule=schedule, weight=weight) for weight in weights], seen[0]

    (plain, of_x, of_v, of_mean), seen = losses(jax.random.key(0))
    z, logsnr = np.asarray(seen[0], np.float64), np.asarray(seen[1], np.float64)[:, None]
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-logsnr)), 1 / np.sqrt(1 + np.exp(logsnr))
    eps = (z - alpha * np.float64(x)) / sigma
    error = 0.7 * z - eps
    x_error = (z - sigma * 0.7 * z) / alpha - np.float64(x)
    v_error = alpha * error - sigma * x_error
    nearest = np.abs(LEVELS - logsnr).argmin(1)
    ahead = LEVELS[np.minimum(nearest + 1, T - 1)][:, None]
    added = np.where(nearest[:, None] == T - 1, 1.0, -np.expm1(logsnr - ahead) / np.sqrt(1 + np.exp(-ahead)))
    np.testing.assert_allclose(plain, np.mean(error**2), rtol=1e-4)
    np.testing.assert_allclose(of_x, np.mean(x_error**2), rtol=1e-4)
    np.testing.assert_allclose(of_v, np.mean(v_error**2), rtol=1e-4)
    np.testing.assert_allclose(of_mean, np.mean((added * x_error) ** 2), rtol=1e-3)


def test_log_normal_noise_has_the_quantiles_of_its_distribution() -> None:
    """ln ς of uniform u against SciPy's truncated normal, at both ends of float32, and the ends themselves."""
    cases = ((-20.0, 20.0, -1.2, 1.2), (-80.0, 80.0, -1.2, 1.2), (-3.0, 6.0, -0.4, 1.0))
    u = np.array([0.0, 1e-6, 1e-3, 0.25, 0.5, 0.75, 0.999, 1.0 - 2.0**-20, 1.0])

    @quick
    def schedules(u: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        return [log_normal(*case)(u) for case in cases], grid(256, log_normal(-20.0, 20.0))

    found, levels = schedules(jnp.asarray(u, jnp.float32))
    assert np.all(np.diff(levels) > 0)
    for (low, high, mean, std), logsnr in zip(cases, map(np.asarray, found), strict=True):
        first, last = ((-0.5 * end - mean) / std for end in (high, low))  # of ln ς, rising with u
        share = np.where(
            u < 0.5,
            norm.ppf(norm.cdf(first) + u * (norm.cdf(last) - norm.cdf(first))),
            norm.isf(norm.sf(last) + (1 - u) * (norm.sf(first) - norm.sf(last))),
        )
        np.testing.assert_allclose(logsnr[1:-1], -2.0 * (mean + std * share[1:-1]), rtol=2e-4, atol=2e-3)
        assert (logsnr[0], logsnr[-1]) == (high, low)
    with pytest.raises(ValueError, match=r"std is .*give a finite number > 0"):
        log_normal(-20.0, 20.0, std=0.0)
    with pytest.raises(ValueError, match="time of the schedule"):
        log_normal(-20.0, 20.0)(jnp.float32(1.5))


def test_the_sigmoid_weight_gives_every_schedule_the_same_loss() -> None:
    """E over p(λ) of weight times g(λ) is ∫ sigmoid(bias − λ) g(λ) dλ over the same with g = 1, by quadrature."""
    schedules, biases = (cosine(-4.0, 7.0), linear(-4.0, 7.0), log_normal(-4.0, 7.0)), (0.0, -3.0)

    @quick
    def weighted(u: jax.Array) -> list[tuple[jax.Array, list[jax.Array]]]:
        return [(schedule(u), [sigmoid_weight(schedule, b)(schedule(u)) for b in biases]) for schedule in schedules]

    for logsnr, of_biases in weighted((jnp.arange(2**16, dtype=jnp.float32) + 0.5) / 2**16):
        for bias, weights in zip(biases, map(np.float64, of_biases), strict=True):
            assert np.mean(weights) == pytest.approx(1.0, rel=2e-3)
            for g in (lambda s: 1.0 / (1.0 + 4.0 * np.exp(-s)), lambda s: np.exp(0.2 * s)):
                expected = integral(g, bias) / integral(lambda _: 1.0, bias)
                assert np.mean(weights * g(np.float64(logsnr))) == pytest.approx(expected, rel=3e-3)


def integral(g: Callable[[float], float], bias: float) -> float:
    """∫ sigmoid(bias − λ) g(λ) dλ from −4 to 7."""
    return quad(lambda s: g(s) / (1.0 + math.exp(s - bias)), -4.0, 7.0, limit=200)[0]


def test_the_sigmoid_weight_of_a_uniform_density_is_the_sigmoid() -> None:
    """log(1 + e^{bias − λ}) is the integral of the sigmoid, which the mean of 1 divides by."""
    logsnr = jnp.linspace(-9.9, 9.9, 7)
    total = np.logaddexp(0, 11.0) - np.logaddexp(0, -9.0)
    expected = 20.0 / (1.0 + np.exp(np.float64(logsnr) - 1.0)) / total
    np.testing.assert_allclose(sigmoid_weight(linear(-10.0, 10.0), 1.0)(logsnr), expected, rtol=2e-3)
