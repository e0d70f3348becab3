"""Schedules as functions, a grid in place of T, a given start, the course of x̃, steps towards noise, DDIM with η."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import gaussian_eps
from tiny import EMITTERS

from cfd.guidance import Interval
from cfd.losses import eps_loss
from cfd.networks.times import adm_logsnr, logsnr_table
from cfd.process import (
    alpha_sigma,
    cosine,
    cosine_logsnr,
    diffuse,
    forward,
    linear,
    posterior,
    tabulated,
    x_from_eps,
)
from cfd.sampling import ancestral, ddim, dpm_solver, grid, guided_sample, schedule

KEY = jax.random.key(7)
LABELS = jnp.arange(6, dtype=jnp.int32) % 3
MEANS = np.array([[-0.5, 0.2], [0.3, -0.1], [0.0, 0.6], [0.0, 0.0]], np.float32)
eps_fn = gaussian_eps(MEANS, np.array([0.2, 0.1, 0.3, 0.6], np.float32))


def sample(**options):
    return guided_sample(KEY, eps_fn, LABELS, (2,), **{"w": 0.5, "clip": False} | options)


# Schedules


def test_schedules_fall_from_the_clean_end_to_the_noisy_one() -> None:
    u = jnp.linspace(0.0, 1.0, 1000)
    np.testing.assert_array_equal(cosine(-9.0, 7.0)(u), cosine_logsnr(u, -9.0, 7.0))
    np.testing.assert_allclose(linear(-9.0, 7.0)(u), np.linspace(7.0, -9.0, 1000), atol=2e-6)
    assert linear(-9.1, 7.3)(jnp.array([0.0, 1.0], np.float32)).tolist() == [np.float32(7.3), np.float32(-9.1)]
    for name in ("linear", "cosine"):
        table = logsnr_table(name)
        np.testing.assert_array_equal(tabulated(table)(jnp.arange(1000) / 999.0)[::999], np.float32(table[::999]))
        np.testing.assert_allclose(tabulated(table)(u), adm_logsnr(999.0 * u, name), atol=2e-4)
    # DDPM's table: beta from 1e-4 to 0.02 in 1000 steps (arXiv:2006.11239). The first level is log((1 - β_1) / β_1).
    assert logsnr_table("linear")[0] == pytest.approx(math.log(0.9999 / 0.0001))


def test_the_grid_of_a_schedule_is_its_values_at_uniform_u_and_rises() -> None:
    np.testing.assert_array_equal(grid(9, linear(-4.0, 4.0)), np.arange(-4.0, 5.0))
    np.testing.assert_allclose(grid(32, cosine(-20.0, 20.0)), schedule(32), rtol=1e-6)
    assert grid(1, linear(-4.0, 4.0)).tolist() == [-4.0]


def test_schedules_and_grids_that_do_not_fit_are_refused() -> None:
    for wrong, message in (
        (lambda: linear(3.0, 3.0), "logsnr_min is 3.0 and logsnr_max 3.0"),
        (lambda: cosine(3.0, -3.0), "logsnr_min is 3.0 and logsnr_max -3.0"),
        (lambda: linear(-3.0, 3.0)(jnp.float32(1.5)), "u is 1.5; it is the time of the schedule"),
        (lambda: tabulated(np.array([1.0, 2.0], np.float32)), "logsnr is 2.0 at index 1; λ falls as noise grows"),
        (lambda: tabulated(np.array([1.0], np.float32)), r"logsnr has shape \(1,\); a table has two or more values"),
        (lambda: tabulated(np.array([1.0, np.nan], np.float32)), "logsnr is nan at index 1"),
        (
            lambda: sample(num_steps=np.array([1.0, 1.0], np.float32)),
            "num_steps is 1.0 at index 1; λ rises as noise falls",
        ),
        (lambda: sample(num_steps=np.array([3.0, -3.0], np.float32)), "num_steps is -3.0 at index 1; λ rises"),
        (lambda: sample(num_steps=np.array([1.0, 1.0 + 1e-12], np.float64)), "num_steps is .* at index 1; λ rises"),
        (lambda: sample(num_steps=np.array([-90.0, 3.0], np.float32)), "num_steps is -90.0 at index 0; λ rises"),
        (
            lambda: sample(num_steps=np.array([[1.0]], np.float32)),
            r"num_steps has shape \(1, 1\); give T, or a grid of λ",
        ),
        (lambda: sample(num_steps=np.array([], np.float32)), r"num_steps has shape \(0,\); give T"),
        (
            lambda: sample(num_steps=np.array([-3.0, 3.0], np.float32), w=Interval(1.0, 4.0, 5.0)),
            "none of the 2 steps falls into the interval.*nearest step is at λ = 3:",
        ),
        (lambda: sample(start=jnp.zeros((6, 3))), r"start has dtype float32 and shape \(6, 3\).*shape \(6, 2\)"),
        (lambda: sample(start=jnp.zeros((6, 2), jnp.int32)), "start has dtype int32"),
        (lambda: ddim(1.5), r"eta is 1.5; give one number in \[0, 1\]"),
        (
            lambda: forward(jnp.zeros(2), jnp.zeros(2), 1.0, 2.0),
            "logsnr_to is 2.0 and logsnr_from is 1.0; a step",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


# A grid, a start and the course of x̃


@pytest.mark.parametrize("sampler", [ancestral(0.3), ddim(), dpm_solver()])
def test_the_default_grid_given_as_an_array_gives_the_same_bits(sampler) -> None:
    expected = sample(sampler=sampler, num_steps=12, logsnr_min=-11.0, logsnr_max=9.0)
    levels = schedule(12, -11.0, 9.0)
    np.testing.assert_array_equal(sample(sampler=sampler, num_steps=levels), expected)
    np.testing.assert_array_equal(sample(sampler=sampler, num_steps=np.asarray(levels).tolist()), expected)


def test_the_network_is_asked_at_the_levels_of_the_grid_which_may_be_traced() -> None:
    asked = []

    def recorder(z, logsnr, labels):
        jax.debug.callback(lambda s: asked.append(float(s[0])), logsnr, ordered=True)
        return 0.0 * z

    traces = []

    @jax.jit
    def drawn(levels):
        traces.append(1)
        return guided_sample(KEY, recorder, LABELS, (2,), num_steps=levels)

    for levels in ([-5.0, 0.25, 3.0], [-7.0, -1.0, 6.5]):
        asked.clear()
        jax.block_until_ready(drawn(jnp.float32(levels)))
        jax.effects_barrier()
        assert asked == levels
    assert len(traces) == 1


def test_a_start_of_the_keys_own_noise_changes_no_bit() -> None:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(6))
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (2,)))(keys)
    np.testing.assert_array_equal(sample(num_steps=9, start=noise), sample(num_steps=9))


def test_a_chain_that_is_cut_and_started_again_ends_in_the_same_image() -> None:
    """DDIM by hand up to a level in the middle, and `guided_sample` from there, is DDIM in one go."""
    levels, rule = schedule(10, -8.0, 8.0), ddim()
    z = jax.random.normal(jax.random.key(3), (6, 2))
    whole = sample(sampler=rule, num_steps=levels, start=z, w=0.0)
    for logsnr, logsnr_next in itertools.pairwise(levels[:5]):
        x = x_from_eps(z, eps_fn(z, jnp.broadcast_to(logsnr, 6), LABELS), logsnr)
        z, _ = rule(z, x, logsnr, logsnr_next)
    np.testing.assert_allclose(sample(sampler=rule, num_steps=levels[4:], start=z, w=0.0), whole, atol=1e-5)


def test_the_course_ends_in_the_images_and_begins_at_the_mean_of_the_class() -> None:
    """At λ = −20, z says nothing about x: the best prediction is the mean. At λ = 20, it says everything."""
    images, course = sample(num_steps=16, trajectory=True, w=0.0)
    assert course.shape == (16, 6, 2)
    np.testing.assert_array_equal(images, sample(num_steps=16, w=0.0))
    np.testing.assert_array_equal(course[-1], images)
    np.testing.assert_allclose(course[0], MEANS[np.asarray(LABELS)], atol=2e-3)
    draw = partial(guided_sample, eps_fn=eps_fn, labels=LABELS, shape=(2,), w=4.0, num_steps=8, trajectory=True)
    both = (partial(draw, clip=lambda x: 0.1 * x), partial(draw, clip=False))
    clipped, unclipped = (jax.jit(f, compiler_options=EMITTERS)(KEY) for f in both)  # λ = −20 magnifies the rounding
    np.testing.assert_allclose(clipped[1][0], 0.1 * unclipped[1][0], rtol=1e-5)


def test_images_started_from_diffused_data_of_a_class_have_its_distribution() -> None:
    """Stochastic reconstruction: data of a class, diffused to λ = 0 and sampled from there, is data of the class."""
    n = 8_000
    keys = jax.random.split(jax.random.key(5), 3)
    labels, eps = jnp.ones(n, jnp.int32), jax.random.normal(keys[1], (n, 2))
    x = jnp.asarray(MEANS)[labels] + 0.1 * jax.random.normal(keys[0], (n, 2))
    levels = grid(512, linear(0.0, 16.0))
    y = guided_sample(
        keys[2], eps_fn, labels, (2,), num_steps=levels, start=diffuse(x, eps, 0.0), clip=False, sampler=ancestral(0.0)
    )
    np.testing.assert_allclose(y.mean(0), MEANS[1], atol=5 * 0.1 / math.sqrt(n) + 1e-3)
    np.testing.assert_allclose(y.std(0), 0.1, rtol=0.03)
    assert abs(np.corrcoef(x[:, 0], y[:, 0])[0, 1]) > 0.01  # and they remember the image that they came from


# Steps towards noise, and between DDIM and the ancestral sampler


@pytest.mark.parametrize(("clean", "noisy"), [(20.0, 13.0), (9.0, 8.999), (2.0, -3.0), (-13.0, -20.0), (20.0, -20.0)])
def test_a_step_towards_noise_composes_with_diffusion(clean: float, noisy: float) -> None:
    """Chapman-Kolmogorov: coefficients of x, ε and ε' of two steps, against those of one step in float64."""
    unit = jnp.eye(3)[:, :, None]
    z = forward(diffuse(unit[0], unit[1], clean), unit[2], clean, noisy)[:, 0]
    alpha, sigma = (np.sqrt(1.0 / (1.0 + np.exp(sign * np.float64(noisy)))) for sign in (-1, 1))
    np.testing.assert_allclose(z[0], alpha, rtol=1e-5)
    np.testing.assert_allclose(np.hypot(*np.asarray(z[1:], np.float64)), sigma, rtol=1e-5)


def test_eta_joins_ddim_and_the_ancestral_sampler() -> None:
    z, x = jax.random.normal(jax.random.key(1), (2, 5, 3))
    for logsnr, logsnr_next in ((-20.0, -6.0), (-1.0, 0.5), (6.0, 20.0)):
        levels = jnp.float32(logsnr), jnp.float32(logsnr_next)
        both = zip(ddim(1.0)(z, x, *levels), ancestral(0.0)(z, x, *levels), strict=True)
        for given, expected in both:
            np.testing.assert_allclose(np.asarray(given), np.asarray(expected), rtol=2e-4, atol=1e-6)
        np.testing.assert_array_equal(ddim(0.0)(z, x, *levels)[0], ddim()(z, x, *levels)[0])
        assert ddim()(z, x, *levels)[1] is None
        # z' keeps the variance σ'² of x̃'s noise: what η adds as noise is taken from ε.
        alpha, sigma = alpha_sigma(levels[1])
        eps = (np.asarray(z) - np.sqrt(1 / (1 + np.exp(-logsnr))) * np.asarray(x)) * np.sqrt(1 + np.exp(logsnr))
        mean, std = ddim(0.6)(z, x, *levels)
        assert std is not None
        kept = np.vdot(mean - alpha * x, eps) / np.vdot(eps, eps)
        assert float(kept**2 + std**2) == pytest.approx(float(sigma**2), rel=1e-3)


def test_v_may_be_given_for_each_pixel() -> None:
    z, x = jax.random.normal(jax.random.key(2), (2, 4, 3, 3, 1))
    v = jax.random.uniform(jax.random.key(3), z.shape)
    mean, std = posterior(z, x, -1.0, 2.0, v)
    for place in ((0, 0, 0, 0), (3, 2, 1, 0)):
        one = posterior(z, x, -1.0, 2.0, v[place])
        np.testing.assert_allclose(mean[place], one[0][place], rtol=1e-6)
        np.testing.assert_allclose(std[place], one[1], rtol=1e-6)


# The loss


def test_the_weight_multiplies_the_error_and_the_schedule_gives_the_density() -> None:
    x, labels = jnp.zeros((40_000, 2)), jnp.zeros(40_000, jnp.int32)

    def loss(**options) -> float:
        return float(eps_loss(jax.random.key(4), lambda z, *_: 0.0 * z, x, labels, **options))

    # E e^{−λ} for λ uniform on [−1, 1] is sinh(1).
    assert loss(schedule=linear(-1.0, 1.0), weight=lambda s: jnp.exp(-s)) == pytest.approx(math.sinh(1.0), rel=0.02)
    assert loss(weight=lambda s: 3.0 * jnp.ones_like(s)) == pytest.approx(3.0 * loss(), rel=1e-5)
    # All rows at one of two levels, of which only one counts.
    assert loss(schedule=lambda u: jnp.where(u < 0.25, 2.0, -2.0), weight=jax.nn.relu) == pytest.approx(0.5, rel=0.05)


def test_the_weight_that_makes_the_error_that_of_the_data() -> None:
    """e^{−λ} ‖ε̂ − ε‖² = ‖x̂ − x‖²: a network that predicts a constant x̂ has the error of that constant."""
    x = jnp.linspace(-1.0, 1.0, 400).reshape(100, 4)

    def constant(z, logsnr, labels):
        alpha, sigma = alpha_sigma(logsnr[:, None])
        return (z - alpha * 0.25) / sigma

    loss = eps_loss(
        jax.random.key(6),
        constant,
        x,
        jnp.zeros(100, jnp.int32),
        schedule=linear(-4.0, 4.0),
        weight=lambda s: jnp.exp(-s),
    )
    np.testing.assert_allclose(loss, np.mean((np.asarray(x) - 0.25) ** 2), rtol=1e-4)
