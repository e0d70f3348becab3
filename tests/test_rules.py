"""Guidance rules: identities with plain guidance, and each formula against NumPy in float64 or a closed form."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from mixtures import mixture_eps
from tiny import EMITTERS, QUICK

from cfd import rules
from cfd.guidance import Interval, guide
from cfd.process import alpha_sigma, eps_from_x, x_from_eps
from cfd.sampling import ancestral, ddim, dpm_solver, guided_sample, schedule

KEY = jax.random.key(0)
MEANS = np.array([[2.0, 0.0, 1.0], [-1.0, 1.5, 0.0], [0.0, -2.0, -1.0]])
STDS = np.array([0.5, 0.7, 0.4])
LABELS = jnp.array([0, 1, 2, 0, 1, 2])
exact = mixture_eps(MEANS, STDS)
sample = partial(guided_sample, KEY, exact, LABELS, (3,), num_steps=16, clip=False)
NEUTRAL = {
    "apg": rules.apg(eta=1.0, norm=math.inf, momentum=0.0),
    "rescale": rules.rescale(0.0),
    "power_law": rules.power_law(0.0),
    "feedback": rules.feedback(pi=1.0, temperature=1.0, offset=0.1, w_max=5.0),
}
OTHERS = {
    "apg": rules.apg(eta=0.3, norm=1.5, momentum=-0.4),
    "cfgpp": rules.cfgpp(),
    "cfg_zero_star": rules.cfg_zero_star(zero_until=-8.0),
    "rescale": rules.rescale(0.7),
    "power_law": rules.power_law(0.5),
    "feedback": rules.feedback(pi=0.9, temperature=0.3, offset=-0.05, w_max=5.0),
    "tangential": rules.tangential(),
}


# Identities


@pytest.mark.parametrize("sampler", [ancestral(0.3), ddim(), dpm_solver()], ids=["ancestral", "ddim", "dpm_solver"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_are_plain_guidance_up_to_rounding(name, sampler):
    w = jnp.array([0.0, 0.5, 3.0, -0.5, 1.0, 2.0])
    plain, ours = (sample(w=w, sampler=sampler, rule=rule) for rule in (None, NEUTRAL[name]))
    np.testing.assert_allclose(ours, plain, rtol=2e-3, atol=2e-3)


def test_autoguidance_by_the_unconditional_model_is_classifier_free_guidance():
    def unconditional(z, logsnr, labels):
        return exact(z, logsnr, jnp.full_like(labels, -1))

    weights = (2.0, Interval(2.0, -4.0, 4.0), lambda logsnr: 0.1 * logsnr)
    for w, rule in zip(itertools.cycle(weights), (None, None, None, *OTHERS.values()), strict=False):
        np.testing.assert_array_equal(sample(w=w, guide=unconditional, rule=rule), sample(w=w, rule=rule))


@pytest.mark.parametrize(
    "to, back", [(x_from_eps, eps_from_x), (lambda z, eps, _: 3.0 * eps - z, lambda z, y, _: (y + z) / 3)]
)
def test_a_linear_rule_is_the_same_in_every_space(to, back):
    """Written by a caller, with the fields of a Rule and nothing else."""

    class Linear:
        @staticmethod
        def init(z):
            return ()

        @staticmethod
        def mix(z, eps_cond, eps_guide, logsnr, w, state):
            cond, guide = to(z, eps_cond, logsnr), to(z, eps_guide, logsnr)
            return z, back(z, cond + w * (cond - guide), logsnr), state

    np.testing.assert_allclose(sample(w=1.5, rule=Linear), sample(w=1.5), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", OTHERS)
def test_every_image_has_its_own_weight_and_state(name):
    keys = jax.random.split(KEY, 6)
    w = jnp.array([0.0, -0.5, 1.0, 2.0, 3.0, 0.5])
    draw = partial(guided_sample, eps_fn=exact, shape=(3,), num_steps=8, rule=OTHERS[name])
    together = draw(keys, labels=LABELS, w=w)
    for i in (0, 1, 4):
        alone = draw(keys[i : i + 1], labels=LABELS[i : i + 1], w=w[i : i + 1])
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_one_program_serves_all_weights_and_both_networks_are_evaluated_where_guidance_is():
    counts = {"traced": 0, "model": 0, "guide": 0}

    def counting(name, label):
        def eps_fn(z, logsnr, labels):
            counts["traced"] += 1
            jax.debug.callback(lambda: counts.update({name: counts[name] + 1}))
            return exact(z, logsnr, labels if label is None else jnp.full_like(labels, label))

        return eps_fn

    @jax.jit
    def draw(w, rate):
        weight = Interval(w, -3.0, 3.0) if rate is None else w
        return guided_sample(
            KEY,
            counting("model", None),
            LABELS,
            (3,),
            w=weight,
            guide=counting("guide", -1),
            rule=OTHERS["apg"],
            num_steps=16,
        )

    inside = int(np.sum(np.abs(np.asarray(schedule(16))) <= 3.0))
    assert 0 < inside < 16
    for w in (0.5, 3.0):
        draw(w, None).block_until_ready()
    jax.effects_barrier()
    assert (counts["model"], counts["guide"]) == (2 * 16, 2 * inside)
    traced = counts["traced"]
    draw(7.0, None)
    assert counts["traced"] == traced


def test_an_unguided_start_leaves_the_state_as_it_was():
    """Outside of an Interval there is no rule: with an interval of the last steps, APG begins with no momentum."""
    rule = rules.apg(eta=1.0, norm=math.inf, momentum=-0.5)
    late = sample(w=Interval(1.0, 18.0, 20.0), rule=rule)
    np.testing.assert_allclose(late, sample(w=Interval(1.0, 18.0, 20.0)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_are_finite_where_the_two_scores_are_equal(name):
    """There, norms of differences are 0, and with x̃ = 0 standard deviations too: the gradient of a root is infinite."""
    rule, logsnr = OTHERS[name], jnp.float32(0.5)
    eps = jax.random.normal(KEY, (6, 3))
    for z in (jnp.ones((6, 3)), alpha_sigma(logsnr)[1] * eps):

        def mixed(w, cond, z=z):
            return jnp.sum(rule.mix(z, cond, eps, logsnr, w, rule.init(z))[1])

        of_w, of_cond = jax.grad(mixed, argnums=(0, 1))(jnp.float32(1.0), eps)
        assert np.isfinite(of_w) and np.isfinite(of_cond).all()
        if name in ("apg", "power_law"):
            assert of_w == 0.0  # w multiplies the difference


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_have_the_gradients_of_plain_guidance(name):
    rule, logsnr = NEUTRAL[name], jnp.float32(0.5)
    z, *scores = jax.random.normal(KEY, (3, 6, 3))

    def gradients(mix):
        return jax.grad(lambda *given: jnp.sum(jnp.sin(mix(*given))), argnums=(0, 1, 2))(*scores, jnp.float32(1.5))

    ours = gradients(lambda cond, other, w: rule.mix(z, cond, other, logsnr, w, rule.init(z))[1])
    for gradient, plain in zip(ours, gradients(guide), strict=True):
        np.testing.assert_allclose(gradient, plain, rtol=1e-4, atol=1e-5)


def test_a_null_for_each_image_guides_each_away_from_its_own():
    keys, nulls = jax.random.split(KEY, 6), jnp.array([1, 2, 0, -1, -1, 1])
    draw = partial(guided_sample, eps_fn=exact, shape=(3,), num_steps=8, w=1.0)
    together = draw(keys, labels=LABELS, null=nulls)
    for i in range(6):
        alone = draw(keys[i : i + 1], labels=LABELS[i : i + 1], null=int(nulls[i]))
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"null has shape \(5,\); it must be that of one label, \(\), or of all, \(6,\)"
    ):
        draw(keys, labels=LABELS, null=jnp.zeros(5, jnp.int32))


def test_other_labels_are_uniform_over_the_other_classes():
    labels = jnp.tile(jnp.arange(4), 3000)
    others = np.asarray(rules.other_labels(KEY, labels, 4))
    counts = np.zeros((4, 4))
    np.add.at(counts, (np.asarray(labels), others), 1)
    assert np.all(np.diag(counts) == 0)
    assert np.all(np.abs(counts[~np.eye(4, dtype=bool)] - 1000) < 5 * math.sqrt(1000 * 2 / 3))
    count = 2**31 - 1  # the sum of a label and its shift is not in int32
    shifts = np.asarray(jax.random.randint(KEY, (9,), 1, count), np.int64)
    many = rules.other_labels(KEY, jnp.full(9, count - 1), count)
    np.testing.assert_array_equal(many, (count - 1 + shifts) % count)


def test_rules_work_inside_shard_map():
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    keys = jax.random.split(KEY, 6)
    for rule in OTHERS.values():
        sampler = partial(guided_sample, eps_fn=exact, shape=(3,), num_steps=4, w=1.0, rule=rule)

        def draw(k, c, sampler=sampler):
            return sampler(k, labels=c)

        spread = jax.shard_map(draw, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))
        ours, expected = (jax.jit(f, compiler_options=QUICK | EMITTERS)(keys, LABELS) for f in (spread, draw))
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


# Thresholds, conditions and weights


def test_dynamic_threshold_clips_at_a_percentile_and_divides_by_it():
    x = np.random.default_rng(0).normal(0, 2.0, (3, 6, 6, 1)).astype(np.float32)
    x[1] *= 0.05
    s = np.maximum(np.percentile(np.abs(x), 90.0, axis=(1, 2, 3), keepdims=True), 1.0)
    ours = rules.dynamic_threshold(90.0)(jnp.asarray(x))
    np.testing.assert_allclose(ours, np.clip(x, -s, s) / s, rtol=1e-5)
    np.testing.assert_array_equal(ours[1], x[1])
    images = sample(w=4.0, clip=rules.dynamic_threshold(50.0))
    assert np.abs(images).max() <= 1.0 and np.abs(np.asarray(sample(w=4.0))).max() > 1.0
    np.testing.assert_array_equal(sample(w=4.0, clip=lambda x: jnp.clip(x, -1.0, 1.0)), sample(w=4.0, clip=True))


def test_cads_noises_the_condition_early_and_leaves_it_alone_late():
    seen = {}

    def eps_fn(z, logsnr, c):
        seen[float(logsnr[0])] = np.asarray(c)
        return z

    c = jnp.asarray(np.random.default_rng(1).normal(1.0, 2.0, (2, 4000)), jnp.float32)
    seeds = jax.vmap(jax.random.key_data)(jax.random.split(KEY, 2))
    for psi, logsnr in ((0.0, -5.0), (0.0, 0.0), (0.0, 5.0), (1.0, -5.5)):
        rules.cads(eps_fn, -4.0, 4.0, 0.5, psi)(jnp.zeros((2, 1)), jnp.full(2, logsnr), (c, seeds))
    np.testing.assert_array_equal(seen[5.0], c)
    np.testing.assert_allclose(seen[-5.0].std(axis=1), 0.5, rtol=0.05)
    assert np.abs(np.corrcoef(seen[-5.0][0], c[0])[0, 1]) < 0.06
    rest = seen[0.0] - math.sqrt(0.5) * np.asarray(c)
    np.testing.assert_allclose(rest.std(axis=1), 0.5 * math.sqrt(0.5), rtol=0.05)
    np.testing.assert_allclose(seen[-5.5].mean(axis=1), c.mean(axis=1), rtol=1e-3)
    np.testing.assert_allclose(seen[-5.5].std(axis=1), c.std(axis=1), rtol=1e-3)
    assert np.abs(np.corrcoef(seen[-5.0][0], seen[-5.0][1])[0, 1]) < 0.06  # each image has its own noise


def test_cads_samples_with_seeds_in_the_labels():
    text = jax.random.normal(KEY, (6, 3))

    def eps_fn(z, logsnr, c):
        alpha, sigma = (x[:, None] for x in alpha_sigma(logsnr))
        return (z - alpha * c) * sigma

    seeds = jax.vmap(jax.random.key_data)(jax.random.split(KEY, 6))
    draw = partial(
        guided_sample, KEY, labels=(text, seeds), shape=(3,), null=(jnp.zeros(3), jnp.zeros(2, jnp.uint32)), clip=False
    )
    plain = guided_sample(KEY, eps_fn, text, (3,), null=jnp.zeros(3), w=1.0, num_steps=8, clip=False)
    quiet = draw(eps_fn=rules.cads(eps_fn, -30.0, -25.0, 1.0, 0.5), w=1.0, num_steps=8)
    np.testing.assert_array_equal(quiet, plain)
    assert (
        np.abs(np.asarray(draw(eps_fn=rules.cads(eps_fn, -5.0, 5.0, 1.0, 0.5), w=1.0, num_steps=8) - plain)).max()
        > 0.01
    )


@pytest.mark.parametrize(
    "weight, values",
    [
        (rules.constant(1.5), {-20: 1.5, 0: 1.5, 20: 1.5}),
        (rules.ramp(2.0, -4.0, 4.0), {-20: 0.0, -2: 0.5, 0: 1.0, 20: 2.0}),
        (rules.ramp(2.0, 4.0, -4.0), {-20: 2.0, -2: 1.5, 0: 1.0, 20: 0.0}),
        (rules.exponential(2.0, 0.5, 4.0), {0: 2.0 * math.exp(-2.0), 4: 2.0, 20: 2.0}),
        (rules.exponential(2.0, -0.5, 4.0), {0: 2.0, 4: 2.0, 6: 2.0 * math.exp(-1.0)}),
        (rules.negative_window(2.0, -0.5, -1.0, 3.0), {-2: 2.0, -1: -0.5, 3: -0.5, 4: 2.0}),
        (rules.middle(2.0, -2.0, 6.0), {-3: 0.0, -2: 0.0, 0: 1.0, 2: 2.0, 4: 1.0, 7: 0.0}),
    ],
)
def test_weights_that_depend_on_the_noise_level(weight, values):
    for logsnr, value in values.items():
        np.testing.assert_allclose(weight(jnp.float32(logsnr)), value, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(sample(w=weight)))


@pytest.mark.parametrize(
    "weight",
    [
        rules.constant,
        lambda w: rules.ramp(w, -4.0, 4.0),
        lambda w: rules.exponential(w, 0.5, 4.0),
        lambda w: rules.negative_window(w, -0.5, -1.0, 3.0),
        lambda w: rules.middle(w, -2.0, 6.0),
    ],
    ids=["constant", "ramp", "exponential", "negative_window", "middle"],
)
def test_a_weight_that_depends_on_the_noise_level_may_differ_from_image_to_image(weight):
    w = jnp.array([0.0, 0.5, 3.0, -0.5, 1.0, 2.0])
    for logsnr in (-3.0, 1.0, 8.0):
        each = [weight(float(one))(jnp.float32(logsnr)) for one in w]
        np.testing.assert_array_equal(weight(w)(jnp.float32(logsnr)), each)
        np.testing.assert_array_equal(weight(w)(jnp.full(6, logsnr)), each)  # as `classifier_guidance` asks


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: rules.apg(math.nan, 1.0, 0.0), "eta is nan"),
        (lambda: rules.apg(0.0, 0.0, 0.0), "norm is 0.0; give a number that is positive"),
        (lambda: rules.rescale(1.2), r"phi is 1.2; give a number in \[0, 1\]"),
        (lambda: rules.feedback(0.9, 1.0, 0.0, -1.0), "w_max is -1.0"),
        (lambda: rules.feedback(-0.1, 1.0, 0.0, 1.0), "pi is -0.1"),
        (lambda: rules.power_law(math.inf), "alpha is inf"),
        (lambda: rules.power_law(-1.5), "alpha is -1.5; .*give a number >= -1"),
        (lambda: rules.cfg_zero_star(np.nan), "zero_until is nan"),
        (lambda: rules.dynamic_threshold(101.0), "percentile is 101.0; give one percentage, from 0 to 100"),
        (lambda: rules.dynamic_threshold(jnp.full(6, 90.0)), "percentile is 90.0 at index 0; give one percentage"),
        (lambda: rules.ramp(1.0, 2.0, 2.0), "logsnr_hi - logsnr_lo is 0.0; give two different λ"),
        (lambda: rules.middle(1.0, 3.0, 2.0), "logsnr_hi - logsnr_lo is -1.0; give logsnr_lo < logsnr_hi"),
        (lambda: rules.other_labels(KEY, LABELS, 1), "num_classes is 1; it is a count: give an integer"),
        (lambda: rules.other_labels(KEY, LABELS, 2), "label is 2 at index 2; .*give integers from 0 to 1"),
        (lambda: rules.other_labels(KEY, LABELS - 1, 3), "label is -1 at index 0; .*give integers from 0 to 2"),
        (lambda: sample(w=1.0, guide=lambda *_: jnp.zeros(3)), "guide returned shape"),
        (lambda: sample(guide=exact, doubled=True), "leave one out"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
