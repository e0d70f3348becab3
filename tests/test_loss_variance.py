"""Noise levels of low discrepancy, and the schedule with which the loss of `linear` has the least variance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from mixtures import gaussian_eps
from recursion import jaxtyping_off

from cfd.likelihood import bound
from cfd.losses import eps_loss, lowest_variance
from cfd.process import eps_from_x, linear
from cfd.sampling import grid

X = jnp.zeros((64, 1))
LABELS = jnp.zeros(64, jnp.int32)


def levels_of(seeds: int, **options) -> np.ndarray:
    """λ of each row, as eps_fn receives it: [seeds, 64]."""

    def of(key):
        seen = []
        eps_loss(key, lambda z, s, c: seen.append(s) or z, X, LABELS, schedule=linear(0.0, 1.0), **options)
        return seen[0]

    return np.asarray(jax.jit(jax.vmap(of))(jax.random.split(jax.random.key(0), seeds)), np.float64)


def error_of(z, logsnr, labels):
    """A network whose ε̂ errs by exactly 1 / (1 + λ²) in every dimension, for x = 0."""
    return eps_from_x(z, jnp.zeros_like(z), logsnr) + (1.0 / (1.0 + jnp.square(logsnr)))[:, None]


def test_levels_of_low_discrepancy_are_evenly_spaced_from_a_uniform_start() -> None:
    u = (1.0 - levels_of(200, low_discrepancy=True)) % 1.0
    np.testing.assert_allclose((u - u[:, :1] + 1e-5) % 1.0, np.tile(np.arange(64) / 64, (200, 1)), atol=2e-5)
    assert abs(np.mean(u[:, 0]) - 0.5) < 5 / math.sqrt(12 * 200) and np.ptp(u[:, 0]) > 0.9
    independent = np.sort(levels_of(1)[0])
    assert np.ptp(np.diff(independent)) > 1 / 64


def test_low_discrepancy_lowers_the_variance_of_the_loss_and_keeps_its_mean() -> None:
    def losses(low: bool) -> np.ndarray:
        of = lambda key: eps_loss(key, error_of, X, LABELS, schedule=linear(-3.0, 3.0), low_discrepancy=low)  # noqa: E731
        return np.asarray(jax.jit(jax.vmap(of))(jax.random.split(jax.random.key(1), 200)), np.float64)

    # The mean of 1 / (1 + λ²)² over [−3, 3] is (λ / (1 + λ²) + arctan λ) / 2 at 3, over 3.
    mean = (0.3 + math.atan(3.0)) / 6.0
    low, independent = losses(True), losses(False)
    assert abs(independent.mean() - mean) < 5 * independent.std() / math.sqrt(200)
    assert abs(low.mean() - mean) < 1e-3 and low.std() < 0.02 * independent.std()


def test_the_rows_of_all_devices_are_counted() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, key = jnp.linspace(-1.0, 1.0, 64)[:, None], jax.random.key(2)
    loss = jax.jit(lambda x: eps_loss(key, error_of, x, LABELS, low_discrepancy=True))
    np.testing.assert_allclose(loss(jax.device_put(x, jax.NamedSharding(mesh, P("data")))), loss(x), rtol=1e-5)


def test_the_schedule_of_least_variance_leaves_none_where_the_error_is_known() -> None:
    """Without spread at a given λ, every draw of the weighted loss is the same: the mean over uniform λ."""
    levels = np.linspace(-3.0, 3.0, 2001)
    squared = (1 + levels[:, None] ** 2) ** -2.0 * np.ones((1, 3))
    schedule, weight = lowest_variance(levels, squared)
    u = jnp.linspace(0.0, 1.0, 20_001)
    logsnr, mean = np.asarray(schedule(u), np.float64), (0.3 + math.atan(3.0)) / 6.0
    assert logsnr[0] == 3.0 and logsnr[-1] == -3.0 and np.all(np.diff(logsnr) <= 0)
    weighted = np.asarray(weight(jnp.float32(logsnr))) * (1 + logsnr**2) ** -2.0
    # Within a cell, the error changes and p does not: most of all in the cells at the ends.
    np.testing.assert_allclose(weighted[300:-300], mean, rtol=0.15)
    assert weighted.mean() == pytest.approx(mean, rel=1e-3)
    loss = jax.jit(lambda key: eps_loss(key, error_of, X, LABELS, schedule=schedule, weight=weight))
    assert float(loss(jax.random.key(3))) == pytest.approx(mean, rel=0.01)


def test_the_weight_undoes_any_schedule_exactly() -> None:
    """E weight(λ) f(λ) is the mean of f over uniform λ, also for errors that have nothing to do with f."""
    levels = np.linspace(-8.0, 12.0, 40)
    rough = np.random.default_rng(0).uniform(0.0, 1.0, (40, 5)) ** 4
    rough[10:20] = 0.0
    schedule, weight = lowest_variance(levels, rough)
    logsnr = schedule((jnp.arange(400_000) + 0.5) / 400_000)
    weights = np.float64(weight(logsnr))
    for f, mean in ((lambda s: 1.0 + 0.0 * s, 1.0), (lambda s: s, 2.0), (np.square, (12.0**3 + 8.0**3) / 60.0)):
        assert np.mean(weights * f(np.float64(logsnr))) == pytest.approx(mean, rel=2e-3)


@pytest.mark.slow
def test_the_bound_of_a_model_gives_its_schedule() -> None:
    """Trained where the error is, a Gaussian's loss over [−10, 10] varies less than with uniform λ."""
    eps_fn = gaussian_eps(np.array([[0.1]]), np.array([0.5]))
    levels = grid(64, linear(-10.0, 10.0))
    x = 0.1 + 0.5 * jax.random.normal(jax.random.key(4), (64, 1))
    terms = bound(jax.random.key(5), eps_fn, x, LABELS, logsnr=levels, clip=False, decoder=lambda x, *_: x)
    schedule, weight = lowest_variance(levels, jnp.exp(levels)[:, None] * terms.squared_error)

    def spread(**options) -> tuple[float, float]:
        of = lambda key: eps_loss(key, eps_fn, x, LABELS, p_uncond=0.0, **options)  # noqa: E731
        losses = np.float64(jax.jit(jax.vmap(of))(jax.random.split(jax.random.key(6), 500)))
        return losses.mean(), losses.std()

    (mean, std), (expected, uniform) = spread(schedule=schedule, weight=weight), spread(schedule=linear(-10.0, 10.0))
    assert abs(mean - expected) < 5 * (std + uniform) / math.sqrt(500)
    assert std < 0.9 * uniform


def test_bad_errors_are_refused() -> None:
    levels, errors = np.array([-1.0, 0.0, 1.0]), np.ones((3, 2))
    for arguments, message in (
        ((levels[::-1], errors), r"logsnr is 0\.0 at index 1.*|logsnr is 1\.0.*each larger than the one before"),
        ((levels, -errors), r"squared_error is -1\.0 at index 0, 0.*\[T, B\] with T = 3"),
        ((levels, errors * math.nan), "squared_error is nan"),
        ((levels, errors[:2]), r"squared_error has shape \(2, 2\) for logsnr of shape \(3,\); give"),
        ((levels[:1], errors[:1]), "squared_error has shape"),
        ((levels, 0.0 * errors), r"squared_error is 0\.0; no error is left"),
    ):
        with jaxtyping_off(), pytest.raises(ValueError, match=message):
            lowest_variance(*arguments)
