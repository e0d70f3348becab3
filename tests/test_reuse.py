"""The guide at some of the steps: which ones, the score that stands for it at the others, exactness in the limit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from meshes import mesh_of
from mixtures import gaussian_eps, mixture_eps
from recursion import jaxtyping_off

from cfd.guidance import Interval
from cfd.reuse import every, extrapolated, similar
from cfd.rules import apg
from cfd.sampling import Langevin, ddim, guided_sample

MEANS, STDS = np.array([[-0.7, 0.2], [0.1, 0.4], [0.7, -0.5]]), np.array([0.25, 0.2, 0.3])
MIXTURE = mixture_eps(MEANS, STDS)
LABELS = jnp.array([0, 1, 2, 2], jnp.int32)
KEY = jax.random.key(0)
SAMPLE: Any = functools.partial(guided_sample, KEY, labels=LABELS, shape=(2,), clip=False)


def counting(eps_fn):
    """eps_fn, and the labels of its first image at each call."""
    seen = []

    def counted(z, logsnr, labels):
        jax.debug.callback(lambda label: seen.append(int(label)), labels[0], ordered=True)
        return eps_fn(z, logsnr, labels)

    return seen, counted


def test_a_guide_at_every_step_is_plain_guidance_to_the_bit():
    plain = SAMPLE(MIXTURE, w=2.0, num_steps=8)
    for reuse in (every(1), similar(0.5, 1)):
        np.testing.assert_array_equal(SAMPLE(MIXTURE, w=2.0, num_steps=8, reuse=reuse), plain)


@pytest.mark.parametrize(("reuse", "extrapolates"), [(every(3), False), (extrapolated(3), True)])
def test_samples_of_gaussians_follow_the_recursion(reuse, extrapolates):
    """Against a loop in float64 over DDIM's steps, with the guide's difference kept or continued in λ."""
    means, stds, w = np.array([[0.6], [-0.4]]), np.array([0.3, 0.5]), 1.5
    levels = np.linspace(-5.0, 6.0, 11)

    def eps(z, logsnr, c):
        alpha, sigma = np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))
        return sigma * (z - alpha * means[c][0]) / (alpha**2 * stds[c] ** 2 + sigma**2)

    z = start = np.array([-1.2, 0.1, 0.9])
    known = []  # (λ, Δ) where both scores are evaluated
    for t, logsnr in enumerate(levels):
        alpha, sigma = np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))
        cond = eps(z, logsnr, 0)
        if t % 3 == 0:
            known.append((logsnr, cond - eps(z, logsnr, 1)))
        at, delta = known[-1]
        if extrapolates and len(known) > 1:
            before, delta_before = known[-2]
            delta = delta + (logsnr - at) * (delta - delta_before) / (at - before)
        mixed = cond + w * delta
        x = (z - sigma * mixed) / alpha
        if t + 1 < len(levels):
            after = levels[t + 1]
            z = np.sqrt(1 / (1 + np.exp(-after))) * x + np.sqrt(1 / (1 + np.exp(after))) * mixed
    ours = guided_sample(
        jax.random.key(0),
        gaussian_eps(means, stds),
        jnp.zeros(3, jnp.int32),
        (1,),
        w=w,
        reuse=reuse,
        num_steps=jnp.asarray(levels, jnp.float32),
        sampler=ddim(),
        clip=False,
        start=jnp.asarray(start[:, None], jnp.float32),
    )
    np.testing.assert_allclose(ours[:, 0], x, atol=2e-5)


@pytest.mark.slow
def test_the_error_of_reuse_falls_with_the_steps_and_that_of_extrapolation_faster():
    errors = {}
    for num_steps in (40, 160):
        draw = functools.partial(SAMPLE, MIXTURE, w=1.0, sampler=ddim(), num_steps=np.linspace(-6, 6, num_steps))
        plain = draw()
        for reuse in (every(2), extrapolated(2)):
            errors[reuse, num_steps] = np.abs(draw(reuse=reuse) - plain).max()
    assert errors[every(2), 160] < 0.4 * errors[every(2), 40]
    assert errors[extrapolated(2), 160] < 0.15 * errors[extrapolated(2), 40]
    assert errors[extrapolated(2), 160] < 0.5 * errors[every(2), 160]


@pytest.mark.parametrize(
    ("reuse", "w", "expected"),
    [
        (every(3), 1.0, 4),
        (similar(-1.0, 3), 1.0, 4),
        (similar(1.0, 3), 1.0, 10),
        (every(2), Interval(1.0, -2.0, 1.0), 2),
    ],
    ids=["every third", "always similar", "never similar", "interval"],
)
def test_the_guide_is_evaluated_at_these_steps_alone(reuse, w, expected):
    """The levels are −4.5, −3.5, ..., 4.5: three lie in the interval. The cosine of different classes is below 1."""
    seen, network = counting(gaussian_eps(MEANS[::2], STDS[::2]))
    two = jnp.zeros(4, jnp.int32)
    SAMPLE(network, labels=two, w=w, null=1, reuse=reuse, num_steps=np.linspace(-4.5, 4.5, 10)).block_until_ready()
    jax.effects_barrier()
    assert (seen.count(0), seen.count(1)) == (10, expected)


@pytest.mark.parametrize(
    ("w", "expected"),
    [
        # With w = 0, the sampler evaluates no guide. Both steps of the corrector have it at every third level.
        (0.0, [[0, 1, 0, 1, 0], [0, 0, 0], [0, 0, 0]] * 2),
        # Inside, the sampler's own evaluation counts. After it, the corrector's does.
        (
            Interval(1.0, -3.0, -2.0),
            [[0, 1, 0, 1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0], [0, 0, 0]],
        ),
    ],
    ids=["unguided sampler", "interval"],
)
def test_a_corrector_rests_where_the_sampler_is_not_guided(w, expected):
    seen, network = counting(gaussian_eps(MEANS[::2], STDS[::2]))
    SAMPLE(
        network,
        labels=jnp.zeros(4, jnp.int32),
        null=1,
        w=w,
        corrector=Langevin(0.1, 2, 1.0),
        reuse=every(3),
        num_steps=np.linspace(-3.0, 2.0, 6),
    ).block_until_ready()
    jax.effects_barrier()
    assert seen == [label for level in expected for label in level]


def test_a_corrector_without_a_guided_sampler_keeps_the_difference_of_its_last_step():
    """Between classes of one width, Δ is the same for all z: at a rest it is that of the level before, in float64."""
    means, std, c, w = np.array([0.6, -0.4]), 0.3, 0.1, 2.0
    levels, keys = np.array([-2.0, -0.5, 1.0, 2.0]), jax.vmap(functools.partial(jax.random.fold_in, KEY))(jnp.arange(3))
    start = np.array([-1.2, 0.1, 0.9])

    def noise(t, k):
        fold = functools.partial(jax.random.fold_in, data=1 + k)
        at = jax.vmap(lambda key: jax.random.normal(fold(jax.random.fold_in(key, t)), (1,)))(keys)
        return np.asarray(at, np.float64)[:, 0]

    def eps(z, alpha, sigma, mean):
        return sigma * (z - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    z, delta = start, 0.0
    for t, logsnr in enumerate(levels):
        alpha, sigma = np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))
        if t % 2 == 0:
            delta = eps(0.0, alpha, sigma, means[0]) - eps(0.0, alpha, sigma, means[1])
        for k in range(2):
            guided = eps(z, alpha, sigma, means[0]) + w * delta
            z = z - c * sigma * guided + sigma * np.sqrt(2 * c) * noise(t + 1, k)
        e = eps(z, alpha, sigma, means[0])
        x = (z - sigma * e) / alpha
        if t + 1 < len(levels):
            after = levels[t + 1]
            z = np.sqrt(1 / (1 + np.exp(-after))) * x + np.sqrt(1 / (1 + np.exp(after))) * e
    ours = guided_sample(
        KEY,
        gaussian_eps(means[:, None], np.full(2, std)),
        jnp.zeros(3, jnp.int32),
        (1,),
        w=0.0,
        null=1,
        corrector=Langevin(c, 2, w),
        reuse=every(2),
        num_steps=levels,
        sampler=ddim(),
        clip=False,
        start=jnp.asarray(start[:, None], jnp.float32),
    )
    np.testing.assert_allclose(ours[:, 0], x, atol=2e-5)


def test_an_image_is_the_same_in_every_batch():
    """Images of a batch rest at different steps, and are drawn alone as they are together."""
    keys = jax.random.split(jax.random.key(3), 4)
    draw: Any = functools.partial(
        guided_sample, eps_fn=MIXTURE, shape=(2,), w=3.0, reuse=similar(0.9, 4), num_steps=16, clip=False
    )
    together = draw(keys, labels=LABELS)
    for i in (1, 3):
        np.testing.assert_allclose(draw(keys[i : i + 1], labels=LABELS[i : i + 1])[0], together[i], atol=1e-5)


@pytest.mark.slow
def test_it_goes_with_a_guide_a_rule_a_corrector_and_shards():
    guide = mixture_eps(MEANS, np.array([0.4, 0.3, 0.5]))
    options = dict(w=1.0, guide=guide, rule=apg(0.0, 2.0, -0.3), corrector=Langevin(0.1, 1), num_steps=6)
    draw: Any = functools.partial(guided_sample, eps_fn=MIXTURE, shape=(2,), clip=False, **options)
    keys, reuse = jax.random.split(jax.random.key(4), 4), extrapolated(2)
    ours = draw(keys, labels=LABELS, reuse=reuse)
    assert np.isfinite(ours).all() and np.abs(ours - draw(keys, labels=LABELS)).max() > 1e-3
    spec = PartitionSpec("data")
    shards = jax.shard_map(
        lambda keys, labels: draw(keys, labels=labels, reuse=reuse),
        mesh=mesh_of(2),
        in_specs=(spec, spec),
        out_specs=spec,
    )
    np.testing.assert_allclose(jax.jit(shards)(keys, LABELS), ours, atol=1e-5)


@pytest.mark.parametrize("k", [0, -2, 1.5, float("nan"), float("inf"), "4", None])
def test_k_is_a_count(k):
    for made in (every, extrapolated, functools.partial(similar, 0.5)):
        with jaxtyping_off(), pytest.raises(ValueError, match=r"^k is .*: give an integer k >= 1"):
            made(k)


@pytest.mark.parametrize("cosine", [1.5, -1.01, float("nan")])
def test_a_cosine_lies_between_its_bounds(cosine):
    with pytest.raises(ValueError, match=r"^cosine is .* give a number in \[-1, 1\]"):
        similar(cosine, 2)
