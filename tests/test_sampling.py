"""Algorithm 2 against exact linear-Gaussian recursions in float64, and its cost in network evaluations."""

import functools
import itertools
import math
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from mixtures import gaussian_eps, log_densities, mixture_eps

from cfd.guidance import Interval, shift_mean
from cfd.sampling import SecondOrder, ancestral, ddim, dpm_solver, guided_sample, schedule

# Two classes and ∅, the last row.
MEANS = np.array([[0.6, -0.4, 0.1], [-0.3, 0.5, 0.8], [0.1, 0.0, 0.4]])
STDS = np.array([0.3, 0.6, 0.9])
WEIGHTS = np.array([-1.0, 0.0, 0.3, 1.0, 4.0], np.float32)
ROUNDING = float(np.finfo(np.float32).eps)

KEY = jax.random.key(20)
LABELS = jnp.arange(8, dtype=jnp.int32) % 2
UNLABELLED = jnp.full_like(LABELS, -1)
MIXED = np.array([-1.0, 0.0, 0.1, 0.3, 1.0, 2.0, 3.0, 4.0], np.float32)
linear = gaussian_eps(MEANS, STDS)


def network(z, logsnr, labels):
    """A network that is neither linear nor elementwise; label −1 selects the zero row of its table."""
    table = jnp.sin(jnp.arange(4 * 6.0)).reshape(4, 6).at[-1].set(0.0)
    mix = jnp.cos(jnp.arange(18.0)).reshape(3, 6)
    hidden = jax.nn.silu(z @ mix + table[labels] + 0.1 * logsnr[:, None])
    return 0.5 * z + 0.3 * hidden @ mix.T


class Exact(NamedTuple):
    images: np.ndarray  # [B, d], from the given noise
    mean: np.ndarray  # [B, d], over the noise
    variance: np.ndarray  # [B]
    rounding: np.ndarray  # [B], a bound on the rounding error of float32


def exact_gaussian_samples(
    noise, classes, w, *, v, num_steps, null=-1, logsnr_min=-20.0, logsnr_max=20.0, clip=False, second_order=False
) -> Exact:
    """Algorithm 2 in float64 from the paper's Eqs. 1 to 6, with ε of `gaussian_eps`; v = None is DDIM.

    noise [B, >= num_steps, d] holds z_1 and then the noise of each step. Without clipping, z is affine in the noise, so
    the mean, the variance and the growth of the rounding error follow exactly. w is a function of λ that returns [B].
    With `second_order`, x̃ is D of arXiv:2211.01095, Algorithm 2, line 7, except in the first step and the last.
    """
    b = math.atan(math.exp(-logsnr_max / 2))
    a = math.atan(math.exp(-logsnr_min / 2)) - b
    u = [1 - (t - 1) / max(num_steps - 1, 1) for t in range(1, num_steps + 1)]
    logsnr = [-2 * math.log(math.tan(a * value + b)) for value in u]

    z, mean, parts = noise[:, 0], np.zeros_like(noise[:, 0]), np.zeros(noise.shape[:2])
    parts[:, 0] = 1  # coefficient of each noise in z
    rounding = x_error = np.zeros(len(noise))
    x_before = x_mean_before = x_parts_before = 0.0
    for t in range(num_steps):
        alpha, sigma = exact_alpha_sigma(logsnr[t])
        weight = w(logsnr[t])
        (slope_c, offset_c), (slope_0, offset_0) = (eps_line(alpha, sigma, label) for label in (classes, null))
        x_slope = (1 - sigma * ((1 + weight) * slope_c - weight * slope_0)) / alpha
        x_offset = -sigma / alpha * ((1 + weight)[:, None] * offset_c - weight[:, None] * offset_0)
        x = x_slope[:, None] * z + x_offset
        # x is the difference of these terms divided by α. Each term is rounded a few times.
        terms = 1 + sigma * (np.abs(1 + weight) * slope_c + np.abs(weight) * slope_0)
        terms = terms * (np.abs(z).max(axis=1) + alpha)
        x_rounding = 2 * ROUNDING * terms / alpha
        x = np.clip(x, -1, 1) if clip else x
        if t == num_steps - 1:
            x_rounding = x_rounding + np.abs(x_slope) * rounding
            variance = np.square(x_slope[:, None] * parts).sum(axis=1)
            return Exact(x, x_slope[:, None] * mean + x_offset, variance, x_rounding)

        alpha_next, sigma_next = exact_alpha_sigma(logsnr[t + 1])
        if v is None:
            from_z, std = sigma_next / sigma, 0.0
            from_x = alpha_next - from_z * alpha
        else:
            kept = math.exp(logsnr[t] - logsnr[t + 1])
            from_z, from_x = kept * alpha_next / alpha, (1 - kept) * alpha_next
            std = math.sqrt(((1 - kept) * sigma_next**2) ** (1 - v) * ((1 - kept) * sigma**2) ** v)
        extra = 0.0  # 1 / (2 r); r is the ratio of the previous gap in λ to this one
        if second_order and 0 < t < num_steps - 2:
            extra = 0.5 * (logsnr[t + 1] - logsnr[t]) / (logsnr[t] - logsnr[t - 1])
        x_mean, x_parts = x_slope[:, None] * mean + x_offset, x_slope[:, None] * parts
        z = from_z * z + from_x * ((1 + extra) * x - extra * x_before) + std * noise[:, t + 1]
        mean = from_z * mean + from_x * ((1 + extra) * x_mean - extra * x_mean_before)
        parts = from_z * parts + from_x * ((1 + extra) * x_parts - extra * x_parts_before)
        parts[:, t + 1] += std
        x_before, x_mean_before, x_parts_before = x, x_mean, x_parts
        added = (1 + extra) * x_rounding + extra * x_error
        x_error = x_rounding + np.abs(x_slope) * rounding
        slope = from_z + from_x * (1 + extra) * x_slope
        rounding = np.abs(slope) * rounding + from_x * added + 2 * ROUNDING * (np.abs(z).max(axis=1) + 1)
    raise AssertionError("num_steps >= 1")


def exact_alpha_sigma(logsnr):
    snr = math.exp(logsnr)
    return math.sqrt(snr / (1 + snr)), math.sqrt(1 / (1 + snr))


def eps_line(alpha, sigma, label):
    """(slope, offset) of ε(z, label) = slope z + offset; slope is [B] or a scalar, offset is [B, d] or [d]."""
    slope = np.asarray(sigma / (alpha**2 * STDS[label] ** 2 + sigma**2))
    return slope, -slope[..., None] * alpha * MEANS[label]


def constant(w):
    return lambda logsnr: np.full(8, w)


@functools.cache
def noise_of_images(count=8, num_steps=16):
    """The noise of the images of KEY, [B, T, 3] in float64; step t of image i uses fold_in(fold_in(KEY, i), t)."""

    @jax.vmap
    def draw(key):
        keys = jax.vmap(lambda t: jax.random.fold_in(key, t))(jnp.arange(num_steps))
        return jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)

    return np.asarray(jax.jit(lambda: draw(image_keys(count)))(), np.float64)


@functools.partial(jax.jit, static_argnums=0)
def image_keys(count):
    return jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(count))


def sampler_of(eps_fn, **kwargs):
    """One compiled sampler of `eps_fn`: (keys, labels, w) -> images."""
    settings: dict[str, Any] = {"num_steps": 8} | kwargs
    return jax.jit(lambda keys, labels, w: guided_sample(keys, eps_fn, labels, (3,), w=w, **settings))


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


# Shared by many tests; each compiles one program per shape of w.
sample, sample_doubled = sampler_of(network), sampler_of(network, doubled=True)
conditional = jax.jit(lambda keys, labels: guided_sample(keys, network, labels, (3,), num_steps=8))


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
    """The images are equal to the bit, although w is traced."""
    keys = image_keys(8)
    np.testing.assert_array_equal(guided(keys, LABELS, np.zeros(8, np.float32)), conditional(keys, LABELS))
    np.testing.assert_array_equal(guided(keys, LABELS, np.full(8, -1, np.float32)), conditional(keys, UNLABELLED))


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
    [(0, True, [8]), (0.0, False, [8]), (0.5, False, [8, 8]), (-1, False, [8, 8]), (0.5, True, [16])],
)
def test_evaluations_in_the_loop(w, doubled, batches):
    """Guidance evaluates two batches of B, or one of 2B if doubled."""
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


# Transformations


def test_the_sampler_is_one_loop():
    def loops(jaxpr) -> list[str]:
        found = []
        for eqn in jaxpr.eqns:
            found += [eqn.primitive.name] * (eqn.primitive.name in ("scan", "while"))
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    found += loops(getattr(inner, "jaxpr", inner))
        return found

    for w in (0.0, 1.0, Interval(1.0, -3.0, 3.0)):
        closed = jax.make_jaxpr(lambda key, w=w: guided_sample(key, network, LABELS, (3,), w=w, num_steps=64))(KEY)
        assert loops(closed.jaxpr) == ["scan"]


def test_vmap_over_keys():
    keys = jax.random.split(KEY, 3)
    many = jax.jit(jax.vmap(sample, (0, None, None)))(keys, LABELS, 0.5)
    assert many.shape == (3, 8, 3)
    for key, images in zip(keys, many, strict=True):
        np.testing.assert_allclose(images, sample(key, LABELS, 0.5), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_recursion():
    """d(sum of the images) / d(w, v, λ_max) in reverse mode equals central differences of the float64 recursion."""

    def total(w, v, logsnr_max):
        sampler = {"sampler": ancestral(v), "logsnr_max": logsnr_max}
        return jnp.sum(guided_sample(KEY, linear, LABELS, (3,), w=w, num_steps=16, clip=False, **sampler))

    def exact(w, v, logsnr_max):
        settings = {"v": v, "logsnr_max": logsnr_max, "num_steps": 16}
        return exact_gaussian_samples(noise_of_images(), LABELS, constant(w), **settings).images.sum()

    at, h = np.array([0.5, 0.3, 12.0]), 1e-4
    difference = [(exact(*(at + h * axis)) - exact(*(at - h * axis))) / (2 * h) for axis in np.eye(3)]
    with jaxtyping_off():
        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*at.tolist())
    np.testing.assert_allclose(gradient, difference, rtol=2e-3)


def test_eight_devices_equal_one():
    """In a caller's own pmap and shard_map with one image per device, and in jit with sharded arguments."""
    keys = image_keys(8)
    expected = sample(keys, LABELS, 0.7)

    mapped = jax.pmap(sample, in_axes=(0, 0, None))(keys[:, None], LABELS[:, None], 0.7)
    assert len(mapped.sharding.device_set) == 8
    np.testing.assert_allclose(mapped[:, 0], expected, rtol=1e-5, atol=1e-6)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), P("data"), P())
    sharded = jax.jit(jax.shard_map(sample, mesh=mesh, in_specs=specs, out_specs=P("data")))
    everywhere = Interval(jnp.float32(0.7), jnp.float32(-30), jnp.float32(30))
    np.testing.assert_allclose(sharded(keys, LABELS, everywhere), expected, rtol=1e-5, atol=1e-6)

    on_mesh = jax.device_put((keys, LABELS), jax.NamedSharding(mesh, P("data")))
    np.testing.assert_allclose(sample(*on_mesh, 0.7), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", [ancestral(0.3), dpm_solver()], ids=["ancestral", "dpm_solver"])
@pytest.mark.parametrize("specs", [(P(), P("data"), P()), (P(), P(), P("data"))], ids=["labels", "w"])
def test_a_replicated_key_in_shard_map(specs, sampler):
    """If only the labels, or only w, are divided over the devices, each device samples as it would alone."""

    @jax.jit
    def four(key, labels, w):
        return guided_sample(key, network, labels[:4], (3,), w=w[:4], num_steps=4, sampler=sampler)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    arguments = (KEY, LABELS.at[:4].set(-1), jnp.linspace(0.0, 3.0, 8))
    images = jax.jit(jax.shard_map(four, mesh=mesh, in_specs=specs, out_specs=P("data")))(*arguments)
    for rows in (slice(4), slice(4, 8)):
        own = [x[rows] if spec == P("data") else x for x, spec in zip(arguments, specs, strict=True)]
        np.testing.assert_allclose(images[rows], four(*own), rtol=1e-5, atol=1e-6)


def test_strict_promotion_and_float32_under_x64():
    for w in (0.0, 0.5, Interval(0.5, -1.0, 1.0)):
        for rule in (ancestral(0.3), ddim(), dpm_solver()):
            with jax.numpy_dtype_promotion("strict"):
                images = jax.eval_shape(sampler_of(network, sampler=rule), KEY, LABELS, w)
            assert images.dtype == jnp.float32
    with jax.enable_x64(True):
        images = jax.eval_shape(lambda key: guided_sample(key, network, LABELS, (3,), w=0.5, num_steps=2), KEY)
    assert images.dtype == jnp.float32


def test_a_bfloat16_network_gives_float32_images():
    def half(z, logsnr, labels):
        return network(z, logsnr, labels).astype(jnp.bfloat16)

    for w in (0.0, 0.5):
        images = jax.eval_shape(lambda key, w=w: guided_sample(key, half, LABELS, (3,), w=w, num_steps=2), KEY)
        assert images.dtype == jnp.float32


# Bad input


class jaxtyping_off:
    """Within it, calls are as in user code; otherwise the suite's shape checks would refuse these arguments first."""

    def __enter__(self):
        jaxtyping.config.update("jaxtyping_disable", True)

    def __exit__(self, *_):
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0.*num_steps >= 1"),
        ({"num_steps": -3}, "num_steps is -3"),
        ({"num_steps": 2.5}, "num_steps is 2.5.*give an integer"),
        ({"logsnr_min": 20.0, "logsnr_max": -20.0}, "logsnr_min is 20.0 and logsnr_max -20.0"),
        ({"logsnr_min": -math.inf}, r"logsnr_min is -inf.*in \[-80, 80\]"),
        ({"logsnr_max": 90.0}, r"logsnr_max 90.0.*in \[-80, 80\]"),
        ({"w": math.nan}, "w is nan.*finite"),
        ({"w": Interval(1.0, 3.0, -3.0)}, r"logsnr_lo=3.0.*give logsnr_lo <= logsnr_hi"),
        ({"w": jnp.ones(3)}, r"w has shape \(3,\).*\(8,\)"),
        ({"w": jnp.ones((8, 1))}, r"w has shape \(8, 1\)"),
        ({"w": lambda logsnr: jnp.ones(2)}, r"w has shape \(2,\)"),
        ({"w": Interval(jnp.ones(5), -1.0, 1.0)}, r"w has shape \(5,\)"),
        ({"labels": [0, 1]}, r"labels have leading shapes .*\[B, \.\.\.\].*jnp\.array\(\[0, 1\]\)"),
        ({"labels": 3}, "labels have leading shapes"),
        ({"labels": {}}, "labels have leading shapes"),
        ({"labels": {"a": jnp.zeros(2), "b": jnp.zeros(3)}}, r"labels have leading shapes \[\(2,\), \(3,\)\]"),
        ({"key": jax.random.split(KEY, 3)}, r"key has batch shape \(3,\) for 8 labels"),
        ({"key": 0}, r"key is 0.*jax\.random\.key\(0\)"),
        ({"sampler": "ddim"}, r"sampler is 'ddim'.*such as the result of ancestral\(v\) or ddim\(\)"),
        ({"sampler": ddim}, r"sampler is <function ddim.*give a step rule, such as the result of"),
        ({"sampler": SecondOrder(dpm_solver())}, "sampler is SecondOrder.*give a step rule"),  # pyright: ignore
        ({"null": {"text": jnp.zeros(4)}}, "null is .*must have the structure of labels"),
        ({"labels": {"text": jnp.zeros((8, 4))}}, "null is -1.*must have the structure of labels"),
        ({"labels": jnp.zeros((8, 4))}, r"null has shape \(\).*one label, \(4,\)"),
        ({"labels": LABELS.astype(jnp.uint8)}, "null is -1, which labels of dtype uint8 cannot represent.*int32"),
        ({"eps_fn": lambda z, *_: z[:, :1]}, r"eps_fn returned shape \(8, 1\).*\(8, 3\)"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    arguments = {"key": KEY, "eps_fn": network, "labels": LABELS, "shape": (3,), "w": 0.5, "num_steps": 2} | arguments
    with jaxtyping_off(), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: guided_sample(**arguments))


@pytest.mark.parametrize("v", [-0.1, 1.1, math.nan])
def test_v_outside_0_to_1_is_refused(v):
    with pytest.raises(ValueError, match=rf"v is {v}.*\[0, 1\]"):
        ancestral(v)


def test_the_import_is_light():
    heavy = ("tensorflow", "orbax", "grain", "tensorflow_datasets", "flax", "optax", "matplotlib", "sklearn")
    code = f"import sys, cfd.sampling; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_shift_mean_takes_a_step_rule():
    with jaxtyping_off(), pytest.raises(ValueError, match=r"sampler is SecondOrder.*give ancestral\(v\)"):
        shift_mean(dpm_solver(), lambda z, logsnr: z, LABELS, 1.0)  # pyright: ignore[reportArgumentType]
