"""The numbers that a seed draws, and the programs that compile, under settings of JAX for a whole program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import jax_setting

from cfd import distillation, flow, likelihood, losses, process, reuse, rules, sampling, score_matching, tilt
from cfd.gan import losses as gan_losses

LABELS = np.array([0, 1, 2, 1], np.int32)
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).uniform(-1.0, 1.0, (4, 3)), jnp.float32)

PIXELS = np.round((np.asarray(X, np.float64) + 1.0) * 127.5) / 127.5 - 1.0


def eps_fn(z, logsnr, labels):
    """Not linear, with a Jacobian that is not diagonal: every probe gives another trace."""
    shift = 0.1 * labels.astype(jnp.float32)[:, None]
    return jnp.tanh(z + shift) * jnp.roll(z, 1, axis=1)


def with_v(z, logsnr, labels):
    return eps_fn(z, logsnr, labels), jax.nn.sigmoid(z)


def wide_eps(z, logsnr, labels):
    """An ε in float64 under `jax_enable_x64`, from a network that is asked in float32."""
    assert z.dtype == logsnr.dtype == jnp.float32
    return np.float64(1.0) * eps_fn(z, logsnr, labels)


def student(z, logsnr, labels, w):
    return eps_fn(z, logsnr, labels) + w[:, None]


DRAWS: dict[str, Any] = {
    "eps_loss": lambda key: losses.eps_loss(key, eps_fn, X, LABELS, low_discrepancy=True),
    "variance_loss": lambda key: losses.variance_loss(key, with_v, X, LABELS, logsnr=[-5.0, -1.0, 2.0, 5.0]),
    "distillation_loss": lambda key: distillation.distillation_loss(
        key, student, eps_fn, X, LABELS, weights=(0.0, 4.0)
    ),
    "halving_loss": lambda key: distillation.halving_loss(
        key, student, student, X, LABELS, num_steps=4, weights=(0.0, 4.0), schedule=process.linear(-4.0, 4.0)
    ),
    "implicit_score_matching": lambda key: score_matching.implicit_score_matching(key, eps_fn, X, LABELS, logsnr=0.0),
    "sliced_score_matching": lambda key: score_matching.sliced_score_matching(key, eps_fn, X, LABELS, logsnr=0.0),
    "conservativeness": lambda key: score_matching.conservativeness(key, eps_fn, X, LABELS, logsnr=0.0),
    "log_likelihood": lambda key: flow.log_likelihood(
        key, eps_fn, X, LABELS, logsnr_min=-2.0, logsnr_max=2.0, num_steps=2
    )[0],
    "tilted_sample": lambda key: tilt.tilted_sample(
        key, eps_fn, np.int32(0), (3,), w=1.0, num_particles=4, num_steps=3, logsnr_min=-2.0, logsnr_max=2.0
    ),
    "other_labels": lambda key: rules.other_labels(key, jnp.asarray(LABELS), 5),
    "cads": lambda key: rules.cads(lambda z, logsnr, c: c, -2.0, 2.0, 0.5, 1.0)(
        jnp.zeros((4, 3)), jnp.zeros(4), (X, jax.random.key_data(jax.random.split(key, 4)))
    ),
    "gan_pairs": lambda key: gan_losses.pairs(key, X, jnp.array([-4.0, 0.0, 4.0], jnp.float32)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_seed_draws_the_same_numbers_under_x64(name):
    ours = jax.jit(DRAWS[name])(jax.random.key(3))
    with jax_setting("jax_enable_x64", True):
        wide = jax.jit(DRAWS[name])(jax.random.key(3))
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(ours), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rests", [reuse.every(2), reuse.extrapolated(2), reuse.similar(0.5, 2)])
def test_reuse_under_strict_promotion(rests):
    with jax.numpy_dtype_promotion("strict"):
        images = jax.eval_shape(
            lambda key: sampling.guided_sample(key, eps_fn, LABELS, (3,), w=1.0, num_steps=4, reuse=rests),
            jax.random.key(0),
        )
    assert images.dtype == jnp.float32


RULES: dict[str, Any] = {
    "apg": lambda n: rules.apg(n(0.5), n(2.5), n(-0.5)),
    "cfg_zero_star": lambda n: rules.cfg_zero_star(n(-4.0)),
    "rescale": lambda n: rules.rescale(n(0.7)),
    "power_law": lambda n: rules.power_law(n(0.9)),
    "feedback": lambda n: rules.feedback(n(0.95), n(0.01), n(0.0), n(5.0)),
    "own": lambda n: rules.stateless(lambda z, cond, other, logsnr, w: (z, n(0.5) * cond + n(0.5) * other)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("number", [np.float64, jnp.asarray])
def test_numbers_of_numpy_are_those_of_python_under_x64(name, number):
    def images(of_type):
        rule = RULES[name](of_type)
        return jax.jit(lambda key: sampling.guided_sample(key, eps_fn, LABELS, (3,), w=1.0, num_steps=4, rule=rule))(
            jax.random.key(0)
        )

    ours = images(float)
    with jax_setting("jax_enable_x64", True):
        wide = images(number)
    assert wide.dtype == ours.dtype == jnp.float32
    np.testing.assert_allclose(wide, ours, rtol=1e-4, atol=1e-5)


def test_losses_stay_float32_under_x64():
    """With weights that are float64 there, and with those that the losses of this package make."""
    errors, levels = np.ones((5, 2)), np.linspace(-2.0, 2.0, 5)
    with jax_setting("jax_enable_x64", True):
        _, least = losses.lowest_variance(levels, errors)
        weights = (least, lambda logsnr: np.float64(2.0) * logsnr, losses.sigmoid_weight(process.cosine(), 1.0))
        for w in weights:
            loss = jax.eval_shape(lambda key, w=w: losses.eps_loss(key, eps_fn, X, LABELS, weight=w), jax.random.key(0))
            assert loss.dtype == jnp.float32
        for number in (0.001, np.float64(0.001)):
            loss = jax.eval_shape(
                lambda key, number=number: losses.variance_loss(key, with_v, X, LABELS, logsnr=levels, weight=number),
                jax.random.key(0),
            )
            assert loss.dtype == jnp.float32
        assert least(jnp.array([0.0], jnp.float32)).dtype == jnp.float32


DATA: dict[str, Any] = {
    "eps_loss": lambda x: losses.eps_loss(KEY, wide_eps, x, LABELS),
    "learned_loss": lambda x: losses.learned_loss(KEY, wide_eps, x, LABELS, schedule=process.linear(-4.0, 4.0)),
    "variance_loss": lambda x: losses.variance_loss(KEY, with_v, x, LABELS, logsnr=[-5.0, -1.0, 2.0, 5.0]),
    "distillation_loss": lambda x: distillation.distillation_loss(
        KEY, student, wide_eps, x, LABELS, weights=(0.0, 4.0)
    ),
    "halving_loss": lambda x: distillation.halving_loss(
        KEY, student, student, x, LABELS, num_steps=4, weights=(0.0, 4.0), schedule=process.linear(-4.0, 4.0)
    ),
    "sliced_score_matching": lambda x: score_matching.sliced_score_matching(KEY, wide_eps, x, LABELS, logsnr=0.0),
    "bound": lambda x: likelihood.bound(KEY, wide_eps, x, LABELS, logsnr=[-4.0, 0.0, 4.0]),
    "decoder_costs": lambda x: likelihood.decoder_costs(KEY, x, logsnr=[-4.0, 0.0, 4.0]),
    "flow": lambda x: flow.flow(wide_eps, x, LABELS, logsnr=[-1.0, 0.0, 1.0]),
    "log_likelihood": lambda x: flow.log_likelihood(
        KEY, wide_eps, x, LABELS, logsnr_min=-2.0, logsnr_max=2.0, num_steps=2
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data_of_float64_means_the_same_under_x64(name):
    """x / 127.5 - 1 of NumPy's uint8 is float64, and so is a network that multiplies by one of its numbers."""
    ours = jax.jit(lambda: DATA[name](jnp.asarray(PIXELS, jnp.float32)))()
    with jax_setting("jax_enable_x64", True):
        wide = jax.jit(lambda: DATA[name](jnp.asarray(PIXELS)))()
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(ours), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["variance_loss", "halving_loss", "bound", "decoder_costs", "log_likelihood"])
def test_without_jit_the_numbers_are_the_same(name):
    x = jnp.asarray(PIXELS, jnp.float32)
    with jax.disable_jit():
        slow = DATA[name](x)
    for a, b in zip(jax.tree.leaves(slow), jax.tree.leaves(jax.jit(DATA[name])(x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["halving_loss", "bound", "feedback", "cfg_zero_star"])
def test_debugging_of_nans_finds_none_between_the_numbers(name):
    """The states of rules and the last level of `halving_loss` begin with infinite numbers."""

    def draw():
        if name in DATA:
            return DATA[name](jnp.asarray(PIXELS, jnp.float32))
        settings: Any = {"rule": RULES[name](float), "reuse": reuse.extrapolated(2), "w": 1.0, "num_steps": 4}
        return sampling.guided_sample(KEY, eps_fn, LABELS, (3,), **settings)

    with jax_setting("jax_debug_nans", True):
        checked = draw()
    for a, b in zip(jax.tree.leaves(checked), jax.tree.leaves(draw()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_tables_and_particles_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_allclose(process.tabulated([2.0, 0.0, -4.0])(jnp.array([0.25, 0.75])), [1.0, -2.0])
        jax.eval_shape(DRAWS["tilted_sample"], jax.random.key(0))
        levels = np.linspace(-2.0, 2.0, 5, dtype=np.float32)
        schedule, weight = losses.lowest_variance(levels, np.ones((5, 2), np.float32))
        np.testing.assert_allclose(schedule(jnp.array([0.0, 0.5, 1.0])), [2.0, 0.0, -2.0], atol=1e-6)
        np.testing.assert_allclose(weight(jnp.array([-1.0, 1.0])), 1.0, rtol=1e-5)
