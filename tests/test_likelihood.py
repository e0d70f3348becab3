"""The variational bound against closed forms: Gaussians, two points, decoders, the implicit classifier, best grids."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import gaussian_eps, log_densities, mixture_eps
from recursion import jaxtyping_off

from cfd.guidance import Interval
from cfd.likelihood import (
    best_grid,
    bound,
    class_scores,
    decoder_costs,
    gaussian_decoder,
    rate_distortion,
    softmax_decoder,
)
from cfd.process import alpha_sigma, cosine, diffuse, linear
from cfd.sampling import grid

MEAN, STD = 0.3, 0.5
eps_fn = gaussian_eps(np.array([[MEAN], [MEAN]], np.float32), np.array([STD, STD], np.float32))
N = 8_000
ZEROS = jnp.zeros(N, jnp.int32)


def data() -> jax.Array:
    return MEAN + STD * jax.random.normal(jax.random.key(1), (N, 1))


def exact_decoder(x, z, x_hat, logsnr):
    """−log p(x | z) of the Gaussian: N(x̂, s² / (1 + e^λ s²))."""
    variance = STD**2 / (1.0 + jnp.exp(logsnr) * STD**2)
    return 0.5 * (jnp.square(x - x_hat) / variance + jnp.log(2.0 * jnp.pi * variance))


def terms(num_steps=100, v=0.0, **options):
    levels = grid(num_steps, linear(-20.0, 13.3))
    chosen = {"logsnr": levels, "v": v, "clip": False, "decoder": exact_decoder} | options
    return jax.jit(lambda x: bound(jax.random.key(2), eps_fn, x, ZEROS, **chosen))(data())


def is_near(values, expected: float) -> None:
    """The mean of independent values is the expected one, within four standard errors."""
    values = np.asarray(values, np.float64)
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values)) + 1e-6


def test_the_errors_and_terms_of_a_gaussian_are_those_of_its_closed_form() -> None:
    """E (x − x̂)² = s² / (1 + e^λ s²), and KL_t is that of two Gaussians."""
    levels, made = np.asarray(grid(100, linear(-20.0, 13.3)), np.float64), terms()
    for t in (0, 40, 70, 99):
        is_near(made.squared_error[t], STD**2 / (1 + math.exp(levels[t]) * STD**2))
    # 6.98118 nats in 99 steps, 5.956856 in infinitely many.
    is_near(made.kl.sum(0) * math.log(2.0), 6.98118)
    assert (
        pytest.approx(0.5 * (math.log1p(math.exp(13.3) * STD**2) - math.log1p(math.exp(-20) * STD**2)), abs=1e-6)
        == 5.956856
    )
    np.testing.assert_allclose(made.prior, 0.0, atol=1e-7)  # all noise


@pytest.mark.parametrize(("v", "expected"), [(0.0, 0.8177), (0.3, 0.7690), (1.0, 0.7284)])
def test_the_bound_of_a_gaussian_is_its_entropy_and_what_the_steps_cost(v: float, expected: float) -> None:
    """½ log(2πe s²) = 0.725791 nats; the excess of 1,000 levels depends on v."""
    total = terms(1000, v).total * math.log(2.0)
    is_near(total, expected)
    assert np.mean(total) > 0.725791 - 4 * np.std(total) / math.sqrt(N)


def test_each_step_is_the_divergence_of_two_gaussians() -> None:
    """KL(N(m, a) ‖ N(n, b)) in float64 of the posterior with the data and with x̂, for one image."""
    levels = np.array([-2.0, -0.5, 0.3, 4.0])
    for v in (0.0, 0.3, 1.0):
        x = jnp.array([[0.7]], jnp.float32)
        wrong = jax.jit(
            lambda x, v=v: bound(
                jax.random.key(0), lambda z, *_: 0.0 * z, x, ZEROS[:1], logsnr=levels, v=v, decoder=exact_decoder
            )
        )(x)
        for t, (a, b) in enumerate(itertools.pairwise(levels)):
            added, noise, noise_next = -math.expm1(a - b), 1 / (1 + math.exp(a)), 1 / (1 + math.exp(b))
            alpha_next = math.sqrt(1 - noise_next)
            narrow, wide = added * noise_next, added * noise_next ** (1 - v) * noise**v
            shift = (added * alpha_next) ** 2 * float(wrong.squared_error[t, 0])
            nats = 0.5 * (math.log(wide / narrow) + (narrow + shift) / wide - 1)
            assert float(wrong.kl[t, 0]) * math.log(2.0) == pytest.approx(nats, rel=2e-5)


def test_the_bound_of_two_points_is_one_bit() -> None:
    """Data ±1 with the exact x̂ = tanh(e^λ z/α): prior, steps and the decoder of 256 values together."""

    def exact(z, logsnr, labels):
        alpha, sigma = alpha_sigma(logsnr[:, None])
        return (z - alpha * jnp.tanh(jnp.exp(logsnr[:, None]) * z / alpha)) / sigma

    x = jnp.where(jnp.arange(2000)[:, None] % 2 == 0, 1.0, -1.0)
    run = jax.jit(
        lambda v: bound(
            jax.random.key(3), exact, x, jnp.zeros(2000, jnp.int32), logsnr=grid(2000, linear(-20.0, 13.3)), v=v
        )
    )
    tight, loose = run(0.0), run(1.0)
    total = np.asarray(tight.total)
    assert 1.0 - 4 * total.std() / math.sqrt(2000) < total.mean() < 1.02 + 4 * total.std() / math.sqrt(2000)
    assert np.mean(loose.total) > total.mean()
    assert 0.0 < np.mean(tight.decoder) < 0.02


def test_the_bound_is_of_the_whole_image_and_its_mean_over_dimensions() -> None:
    """Two dimensions of one image cost as much per dimension as each alone, and an image's bits are its own."""
    x = jnp.round(127.5 * jnp.linspace(0.0, 2.0, 48).reshape(6, 4, 2)) / 127.5 - 1.0
    labels = jnp.zeros(6, jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(4), jnp.arange(6))

    def zero(z, *_):
        return 0.1 * z

    levels = grid(8, linear(-8.0, 8.0))
    whole = bound(jax.random.key(4), zero, x, labels, logsnr=levels)
    alone = bound(keys[3:4], zero, x[3:4], labels[3:4], logsnr=levels)
    np.testing.assert_allclose(alone.total[0], whole.total[3], rtol=1e-6)
    assert whole.kl.shape == (7, 6) and whole.squared_error.shape == (8, 6)


def test_guidance_is_part_of_the_chain() -> None:
    """w, a function of λ and an interval over all λ give the same bound; w = 0 and ∅ those of one evaluation."""
    both = mixture_eps(np.array([[0.5], [-0.4]], np.float32), np.array([0.3, 0.2], np.float32))
    x, labels = jnp.round(127.5 * jnp.linspace(-0.9, 0.9, 16)[:, None]) / 127.5, jnp.arange(16) % 2
    x = jnp.round((x + 1.0) * 127.5) / 127.5 - 1.0

    def total(w, labels=labels):
        levels = np.array([-4.0, 2.0])
        return jax.jit(lambda x: bound(jax.random.key(5), both, x, labels, logsnr=levels, w=w).total)(x)

    guided = total(0.7)
    np.testing.assert_allclose(total(lambda s: jnp.full_like(s, 0.7)), guided, rtol=1e-5)
    np.testing.assert_allclose(total(Interval(0.7, -9.0, 9.0)), guided, rtol=1e-5)
    np.testing.assert_allclose(total(jnp.full(16, 0.7)), guided, rtol=1e-5)
    np.testing.assert_allclose(total(Interval(0.7, 8.5, 9.0)), total(0.0), rtol=1e-5)
    np.testing.assert_allclose(total(-1.0), total(0.0, jnp.full(16, -1)), rtol=1e-5)


# Decoders


def every_value() -> jax.Array:
    return jnp.arange(256) / 127.5 - 1.0


@pytest.mark.parametrize("x_hat", [-1.2, -1.0, -0.31, 0.0, 0.9999, 1.0])
def test_the_probabilities_of_all_values_sum_to_one(x_hat: float) -> None:
    value, mean = every_value(), jnp.full(256, x_hat, jnp.float32)
    for variance in (1e-5, 5.45e-5, 0.01, 1.0):
        nats = gaussian_decoder(variance)(value, mean, mean, jnp.float32(9.0))
        assert float(jnp.exp(-nats).sum()) == pytest.approx(1.0, abs=1e-5)
    for logsnr in (-3.0, 6.0, 9.21, 13.3, 20.0):
        alpha, _ = alpha_sigma(logsnr)
        nats = softmax_decoder(value, alpha * mean, mean, jnp.float32(logsnr))
        assert float(jnp.exp(-nats).sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(gaussian_decoder(1e-5)(jnp.float32([1.0]), mean[:1], jnp.float32([-1.0]), jnp.float32(9.0))[0]) > 1e4


@pytest.mark.parametrize(("logsnr", "bits"), [(6, 4.71), (7, 3.99), (8, 3.27), (9.21, 2.40), (10, 1.83), (11, 1.11)])
def test_the_cost_of_a_value_in_the_middle(logsnr: float, bits: float) -> None:
    x = jnp.full(20_000, 128 / 127.5 - 1.0)
    z = diffuse(x, jax.random.normal(jax.random.key(6), x.shape), jnp.float32(logsnr))
    cost = np.asarray(jax.jit(softmax_decoder)(x, z, x, jnp.float32(logsnr))) / math.log(2.0)
    assert abs(cost.mean() - bits) < 0.005 + 4 * cost.std() / math.sqrt(len(cost))


# Consequences of the bound


def test_rate_and_distortion_add_up() -> None:
    made = terms(50)
    rate, distortion = rate_distortion(made)
    assert rate.shape == distortion.shape == (50,)
    assert float(rate[0]) == pytest.approx(float(made.prior.mean()), abs=1e-6)
    assert float(rate[-1]) == pytest.approx(float((made.prior + made.kl.sum(0)).mean()), rel=1e-5)
    assert float(distortion[0]) == pytest.approx(127.5 * STD, rel=0.03)  # x̂ is the mean of the data
    assert (np.diff(rate) >= 0).all()


def test_the_implicit_classifier_of_a_mixture_is_bayes_rule() -> None:
    """At a fine grid, the difference of two bounds is the difference of the two log-densities."""
    means, stds = np.array([[0.5], [-0.1]], np.float32), np.array([0.3, 0.25], np.float32)
    both = mixture_eps(means, stds)
    x = jnp.linspace(-0.8, 0.8, 9)[:, None]

    def decoder(x, z, x_hat, logsnr):  # the same for all classes
        return 0.0 * x

    scores = jax.jit(
        lambda key: class_scores(
            key, both, x, 2, logsnr=grid(400, linear(-14.0, 9.0)), v=1.0, clip=False, decoder=decoder
        )
    )
    drawn = np.mean([scores(jax.random.key(seed)) for seed in range(150)], axis=0)
    exact = np.asarray(log_densities(x, jnp.full(9, 30.0), jnp.asarray(means), jnp.asarray(stds)))
    np.testing.assert_allclose(drawn[:, 0] - drawn[:, 1], exact[:, 0] - exact[:, 1], atol=0.3)


def test_the_best_grid_is_that_of_an_exhaustive_search_and_of_the_gaussian() -> None:
    random = np.random.default_rng(0)
    levels = np.sort(random.uniform(-5, 5, 8))
    error = np.sort(random.uniform(0, 1, 8))[::-1]

    def cost(chosen: tuple[int, ...]) -> float:
        return sum(0.5 * error[i] * (math.exp(levels[j]) - math.exp(levels[i])) for i, j in itertools.pairwise(chosen))

    for count in (2, 4, 8):
        inner = itertools.combinations(range(1, 7), count - 2)
        best = min(((0, *chosen, 7) for chosen in inner), key=cost)
        np.testing.assert_array_equal(best_grid(error, levels, count), levels[list(best)])

    # s = ½ on [−10, 10]: ten steps cost 6.84 nats at best, 12.16 if uniform in λ, 268.5 on the cosine grid.
    fine = np.linspace(-10.0, 10.0, 401)

    def nats(levels: np.ndarray) -> float:
        return 0.5 * float(np.sum(np.diff(np.exp(levels)) * 0.25 / (1 + 0.25 * np.exp(levels[:-1]))))

    assert nats(best_grid(0.25 / (1 + 0.25 * np.exp(fine)), fine, 11)) == pytest.approx(6.84, abs=0.02)
    assert nats(np.linspace(-10.0, 10.0, 11)) == pytest.approx(12.16, abs=0.005)
    assert nats(np.asarray(grid(11, cosine(-10.0, 10.0)), np.float64)) == pytest.approx(268.5, rel=0.002)
    with pytest.raises(ValueError, match="num_steps is 9: give one error per level, and num_steps from 2 to their"):
        best_grid(error, levels, 9)


def test_what_does_not_fit_is_refused() -> None:
    x, labels = jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32)
    levels = np.array([-3.0, 3.0])
    for wrong, message in (
        (
            lambda: bound(jax.random.key(0), eps_fn, x, labels, logsnr=levels),
            "x is 0.0 at index 0, 0; the decoder knows",
        ),
        (
            lambda: bound(jax.random.key(0), eps_fn, x - 1.0, labels, logsnr=levels[::-1]),
            "logsnr is -3.0 at index 1",
        ),
        (lambda: bound(jax.random.key(0), eps_fn, x - 1.0, labels, logsnr=levels, v=2.0), "v is 2.0"),
        (lambda: bound(jax.random.key(0), eps_fn, x - 1.0, labels[:1], logsnr=levels), r"x has shape \(2, 1\) for"),
        (
            lambda: bound(jax.random.split(jax.random.key(0), 3), eps_fn, x - 1.0, labels, logsnr=levels),
            r"key has batch shape \(3,\) for 2 images",
        ),
        (lambda: gaussian_decoder(0.0), "variance is 0.0; give a finite number > 0"),
        (
            lambda: bound(jax.random.key(0), eps_fn, x - 1.0, labels, logsnr=levels, v=np.full(3, 0.5)),
            r"\(3,\) numbers for an array of shape \(2,\)",
        ),
        (lambda: decoder_costs(jax.random.key(0), x, logsnr=levels), "x is 0.0 at index 0, 0; the decoder knows"),
        (lambda: decoder_costs(jax.random.key(0), x - 1.0, logsnr=levels, first=-1), "first is -1; it is a count"),
        (lambda: decoder_costs(jax.random.key(0), x - 1.0, logsnr=levels, first=0.5), "first is 0.5; it is a count"),  # pyright: ignore
        (lambda: decoder_costs(jax.random.key(0), x - 1.0, logsnr=levels, first=2), "first is 2; it is one of 2"),
        (lambda: best_grid(np.array([1.0, np.nan]), levels, 2), "squared_error is nan at index 1; give a finite mean"),
        (lambda: best_grid(np.array([-1.0, 1.0]), levels, 2), "squared_error is -1.0 at index 0"),
    ):
        with jaxtyping_off(), pytest.raises(ValueError, match=message):
            wrong()
