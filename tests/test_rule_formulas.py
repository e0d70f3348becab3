"""The formulas of the guidance rules, against NumPy in float64 and closed forms."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import gaussian_eps
from test_rules import KEY, LABELS, exact, sample

from cfd import rules
from cfd.process import alpha_sigma
from cfd.sampling import ancestral, ddim, guided_sample, schedule


def gaussian(mean, std):
    """The ε of one Gaussian in one dimension, whatever the label 0 says."""
    return gaussian_eps(np.array([[mean]]), np.array([std]))


def mixed(rule, logsnr, w, seed=0, state=None):
    """(z, ε_c, ε_g) at λ, and what the rule makes of them: z, ε̃ and its state; all but the state in float64."""
    z, eps_cond, eps_guide = (jax.random.normal(jax.random.key(seed + i), (4, 5, 3)) for i in range(3))
    state = rule.init(z) if state is None else state
    z_new, eps, state = rule.mix(z, eps_cond, eps_guide, jnp.float32(logsnr), jnp.float32(w), state)
    return [np.asarray(x, np.float64) for x in (z, eps_cond, eps_guide, z_new, eps)], state


def predictions(logsnr, z, *noises):
    """x of several ε, in float64."""
    alpha, sigma = (np.float64(x) for x in alpha_sigma(logsnr))
    return [(z - sigma * eps) / alpha for eps in noises]


def first_noise(batch, size):
    """The noise that the images of KEY begin with, in float64."""
    keys = jax.vmap(partial(jax.random.fold_in, KEY))(jnp.arange(batch))
    return np.asarray(jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), (size,)))(keys), np.float64)


def inner(a, b):
    return np.sum(a * b, axis=(1, 2))


def test_autoguidance_between_gaussians_follows_the_recursion_in_float64():
    """Both networks are linear in z, and so is DDIM: the image is a z_1 + b, with a and b of the recursion."""
    model, guide, w = gaussian(1.0, 0.5), gaussian(0.4, 0.9), 1.5
    labels, grid = jnp.zeros(9, jnp.int32), np.asarray(schedule(32), np.float64)
    given = guided_sample(KEY, model, labels, (1,), w=w, guide=guide, sampler=ddim(), num_steps=32, clip=False)
    images = first_noise(9, 1)
    for i, logsnr in enumerate(grid):
        alpha, sigma = 1 / np.sqrt(1 + np.exp(-logsnr)), 1 / np.sqrt(1 + np.exp(logsnr))
        noises = [sigma / (alpha**2 * s**2 + sigma**2) * (images - alpha * m) for m, s in ((1.0, 0.5), (0.4, 0.9))]
        eps = noises[0] + w * (noises[0] - noises[1])
        x = (images - sigma * eps) / alpha
        after = grid[min(i + 1, 31)]
        images = x if i == 31 else x / np.sqrt(1 + np.exp(-after)) + eps / np.sqrt(1 + np.exp(after))
    np.testing.assert_allclose(given, images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("logsnr", [-6.0, 0.0, 5.0])
def test_apg_shortens_and_turns_the_difference(logsnr):
    rule, w, norm, eta, momentum = rules.apg(0.25, 1.5, -0.5), 2.0, 1.5, 0.25, -0.5
    (z, cond, guide, z_new, eps), state = mixed(rule, logsnr, w)
    x, x_guide, x_new = predictions(logsnr, z, cond, guide, eps)
    np.testing.assert_array_equal(z_new, z)
    np.testing.assert_allclose(state, x - x_guide, rtol=1e-3, atol=1e-3)
    shortened = state * np.minimum(1.0, norm / np.sqrt(inner(state, state)))[:, None, None]
    change = (x_new - x) / w
    scale = np.abs(x).max()
    # Along x_c, a quarter is left; across, all; no longer than `norm`.
    np.testing.assert_allclose(inner(change, x), eta * inner(shortened, x), atol=2e-4 * scale**2)
    across = [d - x * (inner(d, x) / inner(x, x))[:, None, None] for d in (change, np.asarray(shortened))]
    np.testing.assert_allclose(across[0], across[1], atol=2e-4 * scale)
    assert np.all(np.sqrt(inner(change, change)) <= norm + 1e-3 * scale)
    # The next step adds the difference that this one found, before it was shortened.
    (z, cond, guide, *_), after = mixed(rule, logsnr, w, seed=7, state=state)
    x, x_guide = predictions(logsnr, z, cond, guide)
    np.testing.assert_allclose(after, x - x_guide + momentum * np.asarray(state), rtol=1e-3, atol=1e-3)


def test_cfgpp_renoises_with_the_guides_noise():
    """Chung et al.'s update, run in float64, equals DDIM with the rule."""
    w, classes = -0.4, np.asarray(LABELS)
    grid = np.asarray(schedule(16), np.float64)
    given = sample(w=w, sampler=ddim(), rule=rules.cfgpp())
    z = x = first_noise(6, 3)
    for i, logsnr in enumerate(grid):
        at = jnp.full(6, logsnr, jnp.float32)
        cond, guide = (
            np.asarray(exact(jnp.asarray(z, jnp.float32), at, jnp.asarray(c)), np.float64)
            for c in (classes, 0 * classes - 1)
        )
        x_cond, x_guide = predictions(jnp.float32(logsnr), z, cond, guide)
        x = x_guide + (1 + w) * (x_cond - x_guide)
        after = grid[min(i + 1, 15)]
        z = x / np.sqrt(1 + np.exp(-after)) + guide / np.sqrt(1 + np.exp(after))
    np.testing.assert_allclose(given, x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("logsnr", [-4.0, 0.0, 3.0])
def test_cfg_zero_star_takes_the_best_multiple_of_the_guides_velocity(logsnr):
    w = 1.5
    (z, cond, guide, z_new, eps), _ = mixed(rules.cfg_zero_star(-math.inf), logsnr, w)
    alpha, sigma = (np.float64(x) for x in alpha_sigma(logsnr))
    noises = (cond, guide, eps)
    v_cond, v_guide, v = (alpha * e - sigma * x for e, x in zip(noises, predictions(logsnr, z, *noises), strict=True))
    multiple = ((1 + w) * v_cond - v) / w  # s v_g
    size = inner(v_guide, v_guide)
    np.testing.assert_allclose(inner(multiple, v_guide) ** 2, inner(multiple, multiple) * size, rtol=1e-4)  # parallel
    np.testing.assert_allclose(inner(v_cond - multiple, v_guide) / size, 0.0, atol=1e-4)  # the rest is orthogonal
    np.testing.assert_array_equal(z_new, z)


def test_cfg_zero_star_moves_nothing_before_its_start():
    (z, *_, eps), _ = mixed(rules.cfg_zero_star(-2.0), -2.5, 1.5)
    alpha, sigma = (np.float64(x) for x in alpha_sigma(-2.5))
    (x,) = predictions(-2.5, z, eps)
    np.testing.assert_allclose(alpha * eps - sigma * x, 0.0, atol=1e-6)
    (z, *_, later), _ = mixed(rules.cfg_zero_star(-2.0), -1.5, 1.5)
    assert np.abs(later - z * np.float64(alpha_sigma(-1.5)[1])).max() > 0.1


@pytest.mark.parametrize("phi", [1.0, 0.6])
def test_rescale_restores_the_standard_deviation_of_the_conditional_prediction(phi):
    w, logsnr = 3.0, 1.0
    (z, cond, guide, _, eps), _ = mixed(rules.rescale(phi), logsnr, w)
    x_cond, x_guide, x = predictions(logsnr, z, cond, guide, eps)
    plain = x_cond + w * (x_cond - x_guide)
    wanted = phi * x_cond.std(axis=(1, 2)) + (1 - phi) * plain.std(axis=(1, 2))
    np.testing.assert_allclose(x.std(axis=(1, 2)), wanted, rtol=1e-4)
    cosine = inner(x, plain) / np.sqrt(inner(x, x) * inner(plain, plain))
    np.testing.assert_allclose(cosine, 1.0, atol=1e-6)


@pytest.mark.parametrize("alpha", [-0.5, 1.0])
def test_power_law_scales_with_the_length_of_the_difference(alpha):
    (_, cond, guide, _, eps), _ = mixed(rules.power_law(alpha), 0.0, 0.5)
    delta = cond - guide
    length = np.sqrt(inner(delta, delta))[:, None, None]
    np.testing.assert_allclose(eps, cond + 0.5 * length**alpha * delta, rtol=1e-4, atol=1e-5)
    z = jnp.ones((2, 3))
    same, _ = rules.power_law(alpha).mix(z, z, z, jnp.float32(0.0), jnp.float32(2.0), ())[1:]
    np.testing.assert_array_equal(same, z)


def test_tangential_projects_on_the_first_singular_vector():
    w = 2.0
    (_, cond, guide, _, eps), _ = mixed(rules.tangential(), 0.0, w)
    for i in range(len(cond)):
        rows = np.stack([cond[i].ravel(), guide[i].ravel()])
        first = np.linalg.svd(rows, full_matrices=False)[2][0]
        projected = (rows[1] @ first * first).reshape(cond[i].shape)
        np.testing.assert_allclose(eps[i], (1 + w) * cond[i] - w * projected, rtol=1e-4, atol=1e-4)


def test_feedback_estimates_the_log_posterior_along_the_path():
    """With exact scores and small steps, the estimate is log p(c | z) / p(c): here, of Gaussians in one dimension."""
    (mean, std), (mean_all, std_all) = (0.8, 0.6), (0.0, 1.1)
    rule = rules.feedback(pi=1.0, temperature=1.0, offset=0.0, w_max=5.0)
    model, guide = gaussian(mean, std), gaussian(mean_all, std_all)
    seen = []

    class Watched:
        init = rule.init

        @staticmethod
        def mix(z, eps_cond, eps_guide, logsnr, w, state):
            z, eps, state = rule.mix(z, eps_cond, eps_guide, logsnr, w, state)
            jax.debug.callback(lambda *x: seen.append([np.asarray(i) for i in x]), z, logsnr, state[0], ordered=True)
            return z, eps, state

    guided_sample(
        KEY,
        model,
        jnp.zeros(64, jnp.int32),
        (1,),
        guide=guide,
        rule=Watched,
        num_steps=1500,
        sampler=ancestral(0.0),
        clip=False,
    ).block_until_ready()
    jax.effects_barrier()
    middle = [entry for entry in seen if abs(entry[1]) < 4.0][::50]
    assert len(middle) > 5
    for z, logsnr, estimate in middle:
        alpha, sigma = 1 / np.sqrt(1 + np.exp(-logsnr)), 1 / np.sqrt(1 + np.exp(logsnr))
        logs = []
        for m, s in ((mean, std), (mean_all, std_all)):
            variance = alpha**2 * s**2 + sigma**2
            logs.append(-0.5 * (z[:, 0] - alpha * m) ** 2 / variance - 0.5 * np.log(variance))
        np.testing.assert_allclose(np.minimum(logs[0] - logs[1], 3.0), estimate, atol=0.25)


def test_feedback_turns_the_estimate_into_a_weight_of_at_most_w_max():
    pi, w_max = 0.9, 4.0
    rule = rules.feedback(pi=pi, temperature=0.0, offset=-0.5, w_max=w_max)
    log_p, state = 0.0, None
    for step, logsnr in enumerate((-3.0, -1.0, 1.0, 3.0, 5.0, 7.0)):
        (_, cond, guide, _, eps), state = mixed(rule, logsnr, 0.25, seed=step, state=state)
        weight = 0.25 + min((1 - pi) / (math.exp(log_p) - (1 - pi)) if log_p > math.log(1 - pi) else math.inf, w_max)
        np.testing.assert_allclose(eps, cond + weight * (cond - guide), rtol=1e-3, atol=1e-3)
        log_p -= 0.5
    assert weight == 0.25 + w_max
