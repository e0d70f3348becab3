"""The monotone network: falling, exact at its ends, nearly linear at first, and able to learn the best density."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mixtures import gaussian_eps

from cfd.losses import eps_loss, learned_loss
from cfd.networks.monotone import SCHEDULE, initial_schedule, monotone
from cfd.process import eps_from_x, linear

ENDS = (-5.0, 13.3)
X, LABELS = jnp.zeros((64, 2)), jnp.zeros(64, jnp.int32)


def random_schedule(seed: int) -> dict[str, jax.Array]:
    """Parameters of both signs, far from the initial ones."""
    rng = np.random.default_rng(seed)
    return {name: jnp.float32(rng.normal(size=x.shape) * (1 + abs(x))) for name, x in initial_schedule().items()}


def test_it_falls_and_is_exact_at_both_ends() -> None:
    u = jnp.linspace(0.0, 1.0, 257)
    levels = jax.jit(lambda params, u: monotone(params, *ENDS)(u))
    for seed in range(3):
        logsnr = np.asarray(levels(random_schedule(seed), u))
        assert (logsnr[0], logsnr[-1]) == (np.float32(ENDS[1]), np.float32(ENDS[0]))
        assert (np.diff(logsnr) < 0).all()
        assert float(monotone(random_schedule(seed), *ENDS)(0.5)) == pytest.approx(logsnr[128], abs=1e-5)


def test_it_is_nearly_linear_at_first() -> None:
    u = jnp.linspace(0.0, 1.0, 257)
    gap = np.abs(monotone(initial_schedule(), *ENDS)(u) - linear(*ENDS)(u))
    assert gap.max() < 0.03 * (ENDS[1] - ENDS[0])


def test_a_time_or_an_end_out_of_range_is_refused() -> None:
    for ends in ((1.0, 1.0), (-90.0, 0.0)):
        with pytest.raises(ValueError, match="give logsnr_min < logsnr_max"):
            monotone(initial_schedule(), *ends)
    with pytest.raises(ValueError, match=r"u is 1\.5.*in \[0, 1\]"):
        monotone(initial_schedule(), *ENDS)(1.5)


def of_error(size):
    """A network whose ε̂ errs by exactly sqrt(size(λ)) in every dimension, for x = 0."""

    def eps_fn(z, logsnr, labels):
        return eps_from_x(z, jnp.zeros_like(z), logsnr) + jnp.sqrt(size(logsnr))[:, None]

    return eps_fn


def error(logsnr):
    """A mean squared error that rises from 0 to 1, as those of networks do."""
    return 0.01 + 0.99 * jax.nn.sigmoid(logsnr - 6.0)


def mean_error() -> float:
    """∫ error dλ over the ends, divided by their distance: softplus is the integral of the sigmoid."""
    low, high = ENDS
    return 0.01 + 0.99 * (np.logaddexp(0, high - 6.0) - np.logaddexp(0, low - 6.0)) / (high - low)


def test_the_expected_loss_is_that_of_uniform_levels_for_every_schedule() -> None:
    @jax.jit
    @jax.vmap
    def loss(key: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        schedule = monotone(params, *ENDS)
        return learned_loss(key, of_error(error), X, LABELS, schedule=schedule, low_discrepancy=True)

    keys = jax.random.split(jax.random.key(0), 100)
    for seed in range(3):
        params = {name: jnp.broadcast_to(x, (100, *x.shape)) for name, x in random_schedule(seed).items()}
        losses = np.float64(loss(keys, params))
        assert losses.mean() == pytest.approx(mean_error(), abs=max(4 * losses.std() / 10, 2e-3))


def test_with_a_linear_schedule_it_is_the_loss_of_eps() -> None:
    key, eps_fn = jax.random.key(1), of_error(error)
    choices: Any = (dict(), dict(low_discrepancy=True, weight=lambda logsnr: jnp.exp(-0.1 * logsnr)))
    for options in choices:
        plain = eps_loss(key, eps_fn, X, LABELS, schedule=linear(*ENDS), **options)
        learned = learned_loss(key, eps_fn, X, LABELS, schedule=linear(*ENDS), **options)
        assert float(learned) == pytest.approx(float(plain), rel=1e-5)


def test_its_gradient_is_that_of_the_variance_and_the_networks_that_of_the_loss() -> None:
    """With an error that is known at each λ, E L̂² is an integral over u, whose gradient needs no draw."""
    times = jnp.linspace(0.0, 1.0, 2001)

    def second_moment(params):
        schedule = monotone(params, *ENDS)
        logsnr, slope = jax.jvp(schedule, (times,), (jnp.ones_like(times),))
        return jnp.trapezoid(jnp.square(slope / (ENDS[1] - ENDS[0]) * error(logsnr)), times)

    def loss(both, key):
        schedule = monotone(both[SCHEDULE], *ENDS)
        eps_fn = of_error(lambda logsnr: both["net"] * error(logsnr))
        x, labels = jnp.zeros((1024, 1)), jnp.zeros(1024, jnp.int32)
        return learned_loss(key, eps_fn, x, labels, schedule=schedule, low_discrepancy=True)

    params = initial_schedule()
    expected = jax.jit(jax.grad(second_moment))(params)
    both = {"net": jnp.ones(()), SCHEDULE: params}
    found = jax.jit(jax.grad(loss))(both, jax.random.key(2))
    assert float(found["net"]) == pytest.approx(mean_error(), rel=2e-3)
    for name, gradient in expected.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(found[SCHEDULE][name], gradient, atol=0.03 * scale, err_msg=name)


def test_training_finds_the_density_of_least_variance() -> None:
    """p(λ) ∝ the root of E‖ε − ε̂‖⁴. For a Gaussian of variance s² and its exact ε̂, that is e^λ s² / (1 + e^λ s²).

    L̂ then has the same mean at every λ. Uniform λ is where training begins.
    """
    optimizer, eps_fn = optax.adam(3e-3), gaussian_eps(np.full((1, 8), 0.1), np.array([0.5]))
    level = -np.log(0.25)

    def step(carry, keys):
        (params, state), (key_x, key) = carry, keys
        x = 0.1 + 0.5 * jax.random.normal(key_x, (64, 8))
        of = lambda params: learned_loss(  # noqa: E731
            key, eps_fn, x, LABELS, schedule=monotone(params, *ENDS), p_uncond=0.0, low_discrepancy=True
        )
        updates, state = optimizer.update(jax.grad(of)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = initial_schedule()
    keys = jax.random.split(jax.random.key(3), (600, 2))
    (params, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), keys))()

    u = jnp.linspace(0.0, 1.0, 2001)

    def estimates(params):
        """The mean of L̂ in 2000 intervals of u, and the λ in their middle."""
        logsnr = np.asarray(monotone(params, *ENDS)(u), np.float64)
        middle = 0.5 * (logsnr[1:] + logsnr[:-1])
        slope = np.diff(logsnr) / np.diff(np.asarray(u, np.float64)) / (ENDS[0] - ENDS[1])
        return middle, slope / (1.0 + np.exp(level - middle))

    before, (middle, after) = estimates(start)[1], estimates(params)
    low, high = ENDS
    expected = (np.logaddexp(0.0, high - level) - np.logaddexp(0.0, low - level)) / (high - low)
    assert before.mean() == pytest.approx(expected, rel=0.01) and after.mean() == pytest.approx(expected, rel=0.01)
    assert after.std() < 0.35 * before.std()
    # L̂ is flat in the times whose levels the loss is about.
    assert np.abs(after[middle > level] / expected - 1.0).max() < 0.25
