"""Algorithm 2 against exact linear-Gaussian recursions in float64, and its cost in network evaluations."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import log_densities, mixture_eps
from recursion import (
    KEY,
    LABELS,
    MEANS,
    STDS,
    constant,
    exact_gaussian_samples,
    image_keys,
    linear,
    network,
    noise_of_images,
    sample,
    sample_doubled,
    sampler_of,
)

from cfd.guidance import Interval
from cfd.sampling import SecondOrder, ancestral, ddim, dpm_solver, guided_sample, schedule

WEIGHTS = np.array([-1.0, 0.0, 0.3, 1.0, 4.0], np.float32)
MIXED = np.array([-1.0, 0.0, 0.1, 0.3, 1.0, 2.0, 3.0, 4.0], np.float32)
UNLABELLED = jnp.full_like(LABELS, -1)

conditional = jax.jit(lambda keys, labels: guided_sample(keys, network, labels, (3,), num_steps=8))


def traces_and_evaluations():
    """(counts, eps_fn): counts how often eps_fn is traced and how often it runs."""
    counts = {"traced": 0, "evaluated": 0}

    def ran():
        counts["evaluated"] += 1

    def eps_fn(z, logsnr, labels):
        counts["traced"] += 1
        jax.debug.callback(ran)
        return network(z, logsnr, labels)

    return counts, eps_fn


# The closed-form scores themselves


def test_the_scores_are_the_gradients_of_the_densities():
    """ε = −σ ∇_z log q(z | c) for a class and −σ ∇_z log q(z) for ∅, by automatic differentiation."""
    means, stds = jnp.float32(MEANS), jnp.float32(STDS)
    z = jnp.float32(np.random.default_rng(0).normal(size=(12, 3)))
    logsnr, labels = jnp.linspace(-8, 8, 12), jnp.arange(12, dtype=jnp.int32) % 4 - 1

    def log_density(z, logsnr, label):
        of_classes = log_densities(z[None], logsnr[None], means, stds)[0]
        return jnp.where(label < 0, jax.nn.logsumexp(of_classes), of_classes[label])

    sigma = jnp.sqrt(jax.nn.sigmoid(-logsnr))[:, None]
    expected = -sigma * jax.jit(jax.vmap(jax.grad(log_density)))(z, logsnr, labels)
    np.testing.assert_allclose(jax.jit(mixture_eps(MEANS, STDS))(z, logsnr, labels), expected, rtol=2e-4, atol=2e-5)


# Exact images, means and variances


@pytest.mark.parametrize("second_order", [False, True], ids=["first order", "second order"])
@pytest.mark.parametrize(
    ("rule", "num_steps"), [*itertools.product(["ancestral", "ddim"], [2, 16, 64]), ("ancestral", 1)]
)
def test_guided_gaussians_follow_the_exact_recursion(rule, num_steps, second_order):
    """For every class, w and v, compare each image to float32 rounding, and the moments over independent images."""
    count = 1000
    w, classes = np.tile(WEIGHTS, 2 * count), np.tile(np.repeat([0, 1], len(WEIGHTS)), count)
    noise = noise_of_images(len(w), 64)

    @jax.jit
    def draw(v):
        rule_of_v = ancestral(v) if rule == "ancestral" else ddim()
        rule_of_v = SecondOrder(rule_of_v) if second_order else rule_of_v
        labels = jnp.asarray(classes, jnp.int32)
        return guided_sample(KEY, linear, labels, (3,), w=w, num_steps=num_steps, sampler=rule_of_v, clip=False)

    for v in (0.0, 0.3, 1.0) if rule == "ancestral" else (None,):
        exact = exact_gaussian_samples(noise, classes, lambda _: w, v=v, num_steps=num_steps, second_order=second_order)
        images = np.asarray(draw(0.0 if v is None else v), np.float64)
        error = np.abs(images - exact.images).max(axis=1)
        assert np.all(error <= exact.rounding), (v, (error / exact.rounding).max())

        if num_steps >= 16:  # With fewer steps, the spread of the images is below the rounding error of x at λ = −20.
            images, mean, std = images.reshape(count, 10, 3), exact.mean[:10], exact.variance[:10] ** 0.5
            assert np.all(np.median(exact.rounding.reshape(count, 10), axis=0) < 0.05 * std + 1e-4)
            assert np.all(np.abs(images.mean(axis=0) - mean) < 5 * std[:, None] / math.sqrt(count))
            variance = np.square(images - mean).mean(axis=(0, 2))
            np.testing.assert_allclose(variance, std**2, rtol=5 * math.sqrt(2 / (3 * count)))


def test_many_steps_reach_the_data():
    """Without guidance, DDIM converges to the probability flow, which maps the noise n of z_1 to m + s n."""
    images = sampler_of(linear, num_steps=1000, sampler=ddim(), clip=False)(image_keys(8), LABELS, 0.0)
    noise = noise_of_images()[:, 0]
    np.testing.assert_allclose(images, MEANS[LABELS] + STDS[LABELS, None] * noise, atol=0.01)


def test_dpm_solver_is_of_second_order():
    """Four times the steps divide the distance to the probability flow by 4 for DDIM, by more than 7 for dpm_solver.

    The second factor is not 16, because gaps in λ at both ends of the schedule do not shrink with T. With 16 steps,
    dpm_solver is closer than DDIM with 48.
    """
    exact = MEANS[LABELS] + STDS[LABELS, None] * noise_of_images()[:, 0]

    def distance(sampler, num_steps):
        draw = sampler_of(linear, num_steps=num_steps, sampler=sampler, clip=False)
        return np.sqrt(np.square(draw(image_keys(8), LABELS, 0.0) - exact).mean())

    first, second = ({n: distance(rule, n) for n in (16, 48, 128, 512)} for rule in (ddim(), dpm_solver()))
    assert 3.5 < first[128] / first[512] < 4.5, first
    assert second[128] / second[512] > 7, second
    assert second[16] < first[48]


def test_other_ends_of_the_schedule_another_null_and_clipping():
    """Guidance away from class 1 over a shorter schedule, with x̃ clipped at every step."""
    settings = {"logsnr_min": -6.0, "logsnr_max": 9.0, "num_steps": 5, "null": 1, "clip": True}
    images = sampler_of(linear, **settings)(image_keys(8), jnp.zeros_like(LABELS), 2.0)
    clipped, free = (
        exact_gaussian_samples(noise_of_images(), np.zeros(8, int), constant(2.0), v=0.3, **settings | {"clip": clip})
        for clip in (True, False)
    )
    np.testing.assert_allclose(images, clipped.images, atol=1e-4)
    assert np.all(np.abs(images) <= 1) and np.any(np.abs(free.images) > 1)


def test_the_schedule_rises_and_the_last_evaluation_returns_its_x():
    """A network that implies x = 0.25 at λ_T determines the image, whatever it returned before."""
    seen = []

    def eps_fn(z, logsnr, labels):
        jax.debug.callback(lambda value: seen.append(np.asarray(value)), logsnr, ordered=True)
        logsnr = logsnr[:, None, None, None]
        alpha, sigma = (jnp.sqrt(jax.nn.sigmoid(sign * logsnr)) for sign in (1.0, -1.0))
        return jnp.where(logsnr > 19.99, (z - 0.25 * alpha) / sigma, 0.5 * z)

    images = jax.jit(lambda: guided_sample(KEY, eps_fn, LABELS, (2, 2, 1), num_steps=9))()
    np.testing.assert_allclose(images, np.full((8, 2, 2, 1), 0.25), atol=1e-6)
    jax.effects_barrier()
    logsnr = np.stack(seen)
    assert logsnr.shape == (9, 8) and np.all(logsnr == logsnr[:, :1]) and np.all(np.diff(logsnr[:, 0]) > 0)
    np.testing.assert_allclose(logsnr[[0, 4, 8], 0], [-20, 0, 20], atol=4e-6)


@pytest.mark.parametrize("num_steps", [2, 9, 64, 256, 1000])
@pytest.mark.parametrize("ends", [(-20.0, 20.0), (-6.0, 4.0), (-8.0, 9.0)])
def test_the_schedule_has_exactly_the_ends_that_are_given(num_steps, ends):
    """This also holds under jit, so an Interval that ends at logsnr_max contains the last evaluation."""
    logsnr = jax.jit(schedule, static_argnums=(0, 1, 2))(num_steps, *ends)
    assert (logsnr[0], logsnr[-1]) == ends and np.all(np.diff(logsnr) > 0)


def test_v_may_differ_per_image():
    v = jnp.linspace(0.0, 1.0, 8)
    rules = [ancestral(v), *map(ancestral, v)]
    together, *alone = (sampler_of(network, sampler=rule)(image_keys(8), LABELS, 1.0) for rule in rules)
    np.testing.assert_allclose(together, [images[i] for i, images in enumerate(alone)], rtol=1e-5, atol=1e-6)


def test_guidance_moves_the_mass_of_a_mixture_away_from_the_other_classes():
    """Fig. 2 of the paper, three Gaussians in the plane: for every class, p(c | x) of the samples rises with w."""
    angles = 2 * np.pi * np.arange(3) / 3
    means = jnp.asarray(0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1), jnp.float32)
    stds, labels = jnp.full(3, 0.35), jnp.arange(600, dtype=jnp.int32) % 3
    eps_fn = mixture_eps(means, stds)

    @jax.jit
    def log_posteriors(w):
        x = guided_sample(KEY, eps_fn, labels, (2,), w=w, num_steps=32, clip=False)
        of_classes = log_densities(x, jnp.full(600, 20.0), means, stds)
        return jax.nn.log_softmax(of_classes, axis=1)[jnp.arange(600), labels]

    measured = np.stack([log_posteriors(w) for w in (0.0, 0.5, 1.0, 2.0, 4.0)])
    of_class = measured.reshape(5, 200, 3).mean(axis=1)
    assert np.all(np.diff(of_class, axis=0) > 0)
    astray = np.mean(np.exp(measured) < 0.5, axis=1)
    assert np.all(np.diff(astray) <= 0) and astray[0] > 0.05 and astray[-1] == 0


# w


@pytest.mark.parametrize("guided", [sample, sample_doubled], ids=["two passes", "doubled"])
def test_w_0_is_the_conditional_and_minus_1_the_unconditional_sampler(guided):
    """Two passes give images that are equal to the bit, although w is traced.

    XLA may round the scores of a doubled batch in another way: jaxlib 0.7.2 on a CPU does.
    """
    keys = image_keys(8)
    for w, labels in ((0, LABELS), (-1, UNLABELLED)):
        images, expected = guided(keys, LABELS, np.full(8, w, np.float32)), conditional(keys, labels)
        np.testing.assert_allclose(images, expected, rtol=0, atol=1e-6 if guided is sample_doubled else 0)


def test_a_scalar_w_of_0_or_minus_1_is_exact_too():
    keys = image_keys(8)
    np.testing.assert_array_equal(sample(keys, LABELS, 0.0), conditional(keys, LABELS))
    np.testing.assert_array_equal(sample(keys, LABELS, -1.0), conditional(keys, UNLABELLED))


def test_a_batch_of_mixed_w_equals_the_separate_runs():
    mixed = sample(image_keys(8), LABELS, MIXED)
    for i, w in enumerate(MIXED):
        np.testing.assert_array_equal(mixed[i], sample(image_keys(8), LABELS, float(w))[i])


def test_fourteen_weights_compile_once():
    counts, eps_fn = traces_and_evaluations()
    counting = sampler_of(eps_fn)
    weights = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0)
    images = [np.asarray(counting(image_keys(8), LABELS, w)) for w in weights]
    jax.effects_barrier()
    assert counts == {"traced": 2, "evaluated": 14 * 2 * 8}
    assert len({image.tobytes() for image in images}) == 14


def test_a_python_0_costs_one_evaluation_per_step():
    counts, eps_fn = traces_and_evaluations()
    jax.jit(lambda: guided_sample(KEY, eps_fn, LABELS, (3,), w=0, num_steps=5))().block_until_ready()
    jax.effects_barrier()
    assert counts == {"traced": 1, "evaluated": 5}


@pytest.mark.parametrize(
    ("w", "doubled", "batches"),
    [
        (0, True, [8]),
        (0.0, False, [8]),
        (np.float32(0), True, [8]),
        (jnp.zeros(()), False, [8]),
        (0.5, False, [8, 8]),
        (-1, False, [8, 8]),
        (0.5, True, [16]),
    ],
)
def test_evaluations_in_the_loop(w, doubled, batches):
    """Guidance evaluates two batches of B, or one of 2B if doubled; a concrete 0 of any type, one of B."""
    seen = []

    def eps_fn(z, logsnr, labels):
        assert z.shape[:1] == logsnr.shape == labels.shape
        seen.append(len(z))
        return network(z, logsnr, labels)

    jax.eval_shape(lambda key: guided_sample(key, eps_fn, LABELS, (3,), w=w, num_steps=5, doubled=doubled), KEY)
    assert seen == batches


def test_w_may_be_a_function_of_logsnr():
    def w_of(logsnr, xp=jnp):
        return (2.0 + xp.tanh(0.3 * logsnr)) * xp.linspace(0.5, 1, 8)

    exact = exact_gaussian_samples(noise_of_images(), LABELS, lambda logsnr: w_of(logsnr, np), v=0.3, num_steps=12)
    images = jax.jit(lambda: guided_sample(KEY, linear, LABELS, (3,), w=w_of, num_steps=12, clip=False))()
    assert np.all(np.abs(images - exact.images).max(axis=1) <= exact.rounding)


def test_an_interval_costs_the_second_evaluation_only_inside():
    counts, eps_fn = traces_and_evaluations()
    limited = sampler_of(eps_fn, num_steps=16)
    u, b = 1 - np.arange(16) / 15, math.atan(math.exp(-10.0))
    logsnr = -2 * np.log(np.tan((math.atan(math.exp(10.0)) - b) * u + b))

    @jax.jit
    def masked(lo, hi):
        def w_of(logsnr):
            return jnp.where((logsnr >= lo) & (logsnr <= hi), MIXED, 0.0)

        return guided_sample(KEY, network, LABELS, (3,), w=w_of, num_steps=16)

    for lo, hi in [(-3.1, 1.7), (-30.0, 30.0), (0.7, 0.6), (-1.0, 25.0), (-25.0, -2.0)]:
        counts["evaluated"] = 0
        images = limited(image_keys(8), LABELS, Interval(jnp.asarray(MIXED), lo, hi))
        jax.effects_barrier()
        assert counts["evaluated"] == 16 + np.sum((logsnr >= lo) & (logsnr <= hi))
        np.testing.assert_allclose(images, masked(lo, hi), rtol=1e-5, atol=1e-6)
    assert counts["traced"] == 3


def test_one_doubled_batch_equals_two_passes():
    one, two = (draw(image_keys(8), LABELS, MIXED) for draw in (sample_doubled, sample))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


# Keys, labels and ∅


def test_an_image_depends_on_its_key_and_not_on_its_batch():
    """The exact recursions test the case of one key, because their noise is that of fold_in(KEY, i)."""
    keys, order = image_keys(8), np.array([5, 2, 7, 0, 1, 6, 3, 4])
    together = np.asarray(sample(keys, LABELS, 1.5))
    assert len(np.unique(together[:, 0])) == 8
    np.testing.assert_array_equal(sample(keys[order], LABELS[order], 1.5), together[order])
    np.testing.assert_allclose(sample(keys[6:7], LABELS[6:7], 1.5), together[6:7], rtol=1e-5, atol=1e-6)


def test_raw_keys_are_keys():
    for keys in (KEY, image_keys(8)):
        np.testing.assert_array_equal(sample(jax.random.key_data(keys), LABELS, 0.5), sample(keys, LABELS, 0.5))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_a_seed_gives_the_same_images_whatever_the_implementation_of_its_key(impl):
    expected = sample(KEY, LABELS, 0.5)
    with jax.default_prng_impl(impl):
        for key in (jax.random.key(20), jax.random.PRNGKey(20), jax.random.key_data(KEY)):
            np.testing.assert_array_equal(sample(key, LABELS, 0.5), expected)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_an_image_of_any_implementation_depends_on_its_key_and_not_on_its_row(impl):
    key, order = jax.random.key(20, impl=impl), np.array([5, 2, 7, 0, 1, 6, 3, 4])
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(8))
    together = np.asarray(sample(keys, LABELS, 0.5))
    assert len(np.unique(together[:, 0])) == 8
    if impl == "rbg":
        np.testing.assert_array_equal(together, sample(image_keys(8), LABELS, 0.5))
    for given in (keys, jax.random.key_data(keys)):
        np.testing.assert_array_equal(sample(given[order], LABELS[order], 0.5), together[order])


def test_labels_may_be_embeddings():
    """Rows of a table, given as a pytree with its own ∅, give the images of the labels that would look them up."""
    means, stds = jnp.asarray(MEANS, jnp.float32), jnp.asarray(STDS, jnp.float32)

    def eps_fn(z, logsnr, text):
        alpha, sigma = (jnp.sqrt(jax.nn.sigmoid(sign * logsnr))[:, None] for sign in (1.0, -1.0))
        variance = jnp.square(alpha * text["std"][:, None]) + jnp.square(sigma)
        return sigma / variance * (z - alpha * text["mean"])

    text, null = {"mean": means[LABELS], "std": stds[LABELS]}, {"mean": means[-1], "std": stds[-1]}
    exact = exact_gaussian_samples(noise_of_images(), LABELS, constant(1.0), v=0.3, num_steps=8)
    images = sampler_of(eps_fn, null=null, doubled=True, clip=False)(image_keys(8), text, 1.0)
    assert np.all(np.abs(images - exact.images).max(axis=1) <= exact.rounding)


def test_without_guidance_embeddings_need_no_null():
    def eps_fn(z, logsnr, text):
        return network(z, logsnr, text[:, 0].astype(jnp.int32))

    text = jnp.stack([LABELS.astype(jnp.float32)] * 4, axis=1)
    images = sampler_of(eps_fn, null=jnp.zeros(4))(image_keys(8), text, jnp.float32(0.0))
    plain = guided_sample(image_keys(8), eps_fn, text, (3,), num_steps=8)
    np.testing.assert_allclose(plain, images, rtol=1e-5, atol=1e-6)


def test_numpy_labels_and_weights_are_arrays():
    def eps_fn(z, logsnr, labels):
        assert isinstance(labels, jax.Array) and labels.dtype == jnp.int32
        return network(z, logsnr, labels)

    labels, w = np.arange(8) % 2, np.full(8, 0.5)
    images = jax.eval_shape(lambda key: guided_sample(key, eps_fn, labels, (3,), w=w, num_steps=2), KEY)
    assert images.shape == (8, 3) and images.dtype == jnp.float32
