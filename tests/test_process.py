"""The process in float32 against mpmath and Bayes' rule, at every noise level from λ = −20 to 20."""

import math

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from recursion import jaxtyping_off

from cfd.process import alpha_sigma, check_ends, cosine_logsnr, diffuse, eps_from_x, posterior, x_from_eps
from cfd.steps import ancestral, known_levels

LOGSNRS = np.linspace(-20.0, 20.0, 81, dtype=np.float32)
PAIRS = [(-20.0, -19.9), (-20.0, 20.0), (-3.0, -1.0), (0.0, 0.01), (0.0, 20.0), (5.0, 6.0), (19.9, 20.0)]
EPS32 = float(np.finfo(np.float32).eps)

mp.mp.dps = 60


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def exact_alpha_sigma(logsnr):
    """(α, σ) to 60 digits."""
    snr = mp.exp(mp.mpf(float(logsnr)))
    return mp.sqrt(snr / (1 + snr)), mp.sqrt(1 / (1 + snr))


def exact_cosine(u: float, logsnr_min: float, logsnr_max: float) -> float:
    b = mp.atan(mp.exp(-mp.mpf(logsnr_max) / 2))
    a = mp.atan(mp.exp(-mp.mpf(logsnr_min) / 2)) - b
    return float(-2 * mp.log(mp.tan(a * mp.mpf(float(u)) + b)))


def exact_bayes(z, x, logsnr, logsnr_next):
    """Mean and variance of q(z' | z, x) ∝ q(z | z') q(z' | x), and the variance of q(z | z')."""
    (alpha, sigma), (alpha_next, sigma_next) = exact_alpha_sigma(logsnr), exact_alpha_sigma(logsnr_next)
    ratio = alpha / alpha_next
    forward = sigma**2 - ratio**2 * sigma_next**2
    precision = 1 / sigma_next**2 + ratio**2 / forward
    mean = (alpha_next * mp.mpf(x) / sigma_next**2 + ratio * mp.mpf(z) / forward) / precision
    return mean, 1 / precision, forward


ENDS = [(-20, 20), (-5, 20), (0, 20), (10, 20), (16, 20), (-20, -16), (30, 40), (70, 80), (-80, -70)]


@pytest.mark.parametrize(("logsnr_min", "logsnr_max"), ENDS)
def test_cosine_schedule_against_mpmath(logsnr_min, logsnr_max):
    near_ends = np.array([1e-7, 1e-6, 1e-4, 0.499999, 0.500001, 1 - 1e-4, 1 - 1e-6], np.float32)
    u = np.concatenate([np.linspace(0, 1, 101, dtype=np.float32), near_ends])
    expected = [exact_cosine(value, logsnr_min, logsnr_max) for value in u]
    got = cosine_logsnr(jnp.asarray(u), float(logsnr_min), float(logsnr_max))
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=3e-6)
    grid = [exact_cosine(1 - i / 4, logsnr_min, logsnr_max) for i in range(5)]
    levels = known_levels(5, logsnr_min, logsnr_max)
    assert levels is not None
    np.testing.assert_allclose(levels, grid, rtol=1e-14, atol=1e-13)


def test_cosine_schedule_falls_from_logsnr_max_to_logsnr_min():
    logsnr = np.asarray(cosine_logsnr(jnp.linspace(0, 1, 4097)))
    assert np.all(np.diff(logsnr) < 0)
    np.testing.assert_allclose(logsnr[[0, -1]], [20, -20], rtol=2 * EPS32)
    np.testing.assert_allclose(cosine_logsnr(0.5), 0.0, atol=1e-6)


def test_cosine_schedule_is_antisymmetric_about_its_middle():
    u = jnp.linspace(0, 1, 257)
    np.testing.assert_allclose(cosine_logsnr(u), -cosine_logsnr(1.0 - u), atol=1e-6)


def test_cosine_schedule_has_the_hyperbolic_secant_density():
    """p(λ) = sech(λ/2) / (4 a) on the truncated range: the paper's Section 2, and dλ/du = −1/p(λ)."""
    u = jnp.linspace(0.001, 0.999, 51)
    slope = jax.vmap(jax.grad(cosine_logsnr))(u)
    a = np.arctan(np.exp(10.0)) - np.arctan(np.exp(-10.0))
    density = 1 / np.cosh(np.float64(cosine_logsnr(u)) / 2) / (4 * a)
    np.testing.assert_allclose(-1 / slope, density, rtol=1e-4)


def test_cosine_schedule_takes_traced_ends():
    got = jax.jit(cosine_logsnr)(jnp.float32(0.25), jnp.float32(-10), jnp.float32(12))
    np.testing.assert_allclose(got, exact_cosine(0.25, -10, 12), rtol=1e-6)


def test_alpha_sigma_against_mpmath():
    alpha, sigma = alpha_sigma(jnp.asarray(LOGSNRS))
    expected = np.array([exact_alpha_sigma(logsnr) for logsnr in LOGSNRS], np.float64)
    np.testing.assert_allclose(alpha, expected[:, 0], rtol=4 * EPS32)
    np.testing.assert_allclose(sigma, expected[:, 1], rtol=4 * EPS32)
    np.testing.assert_allclose(jnp.square(alpha) + jnp.square(sigma), np.ones_like(LOGSNRS), rtol=2 * EPS32)


def test_alpha_sigma_define_the_logsnr():
    alpha, sigma = alpha_sigma(jnp.asarray(LOGSNRS))
    np.testing.assert_allclose(2 * (np.log(np.float64(alpha)) - np.log(np.float64(sigma))), LOGSNRS, atol=2e-6)


def test_diffuse_against_float64():
    x, eps = np.float32(0.7), np.float32(-1.3)
    z = diffuse(jnp.full(81, x), jnp.full(81, eps), jnp.asarray(LOGSNRS))
    alpha, sigma = np.array([exact_alpha_sigma(logsnr) for logsnr in LOGSNRS], np.float64).T
    np.testing.assert_allclose(z, alpha * float(x) + sigma * float(eps), rtol=0, atol=4 * EPS32)


def test_round_trips_lose_only_the_rounding_of_z():
    """(z − σ ε)/α recovers x to the rounding error of z divided by α; (z − α x)/σ recovers ε to that error over σ."""
    x, eps = np.random.default_rng(0).normal(size=(2, 81, 5)).astype(np.float32)
    x, eps = jnp.asarray(x), jnp.asarray(eps)
    logsnr = jnp.asarray(LOGSNRS)
    alpha, sigma = (np.asarray(value)[:, None] for value in alpha_sigma(logsnr))
    z = diffuse(x, eps, logsnr)
    rounding = 4 * EPS32 * (np.abs(x) * alpha + np.abs(eps) * sigma + np.abs(z))
    assert np.all(np.abs(x_from_eps(z, eps, logsnr) - x) <= rounding / alpha)
    assert np.all(np.abs(eps_from_x(z, x, logsnr) - eps) <= rounding / sigma)


@pytest.mark.parametrize(("logsnr", "logsnr_next"), PAIRS)
def test_posterior_is_bayes_rule(logsnr, logsnr_next):
    z, x = jnp.float32([-1.5, 0.2, 1.0]), jnp.float32([0.9, -0.4, 1.0])
    lo, hi = float(np.float32(logsnr)), float(np.float32(logsnr_next))
    exact = [exact_bayes(float(zi), float(xi), lo, hi) for zi, xi in zip(z, x, strict=True)]
    mean, std = posterior(z, x, jnp.float32(lo), jnp.float32(hi), 0.0)
    np.testing.assert_allclose(mean, [float(m) for m, _, _ in exact], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.square(np.float64(std)), float(exact[0][1]), rtol=1e-5)


@pytest.mark.parametrize(("logsnr", "logsnr_next"), PAIRS)
@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_posterior_variance_interpolates_in_the_exponent(logsnr, logsnr_next, v):
    """The variance is that of q(z' | z, x) at v = 0 and that of the forward step q(z | z') at v = 1."""
    lo, hi = float(np.float32(logsnr)), float(np.float32(logsnr_next))
    _, backward, forward = exact_bayes(0.0, 0.0, lo, hi)
    _, std = posterior(jnp.zeros(2), jnp.zeros(2), jnp.float32(lo), jnp.float32(hi), v)
    expected = mp.exp((1 - mp.mpf(v)) * mp.log(backward) + mp.mpf(v) * mp.log(forward))
    np.testing.assert_allclose(np.square(np.float64(std)), float(expected), rtol=1e-5)


@pytest.mark.parametrize(("first", "middle", "last"), [(-20, -5, 3), (-2, 0, 2), (3, 10, 20), (-20, 0, 20)])
def test_two_steps_are_one_step(first, middle, last):
    """Chapman-Kolmogorov: at v = 0 and given x, q(z'' | z, x) = ∫ q(z'' | z', x) q(z' | z, x) dz'."""
    z, x = jnp.float32([1.1, -0.3]), jnp.float32([0.5, -0.9])
    first, middle, last = jnp.float32(first), jnp.float32(middle), jnp.float32(last)
    mean_1, std_1 = posterior(z, x, first, middle, 0.0)
    mean_2, std_2 = posterior(mean_1, x, middle, last, 0.0)
    slope = jax.grad(lambda z: posterior(z, jnp.float32(0), middle, last, 0.0)[0])(jnp.float32(0))
    mean, std = posterior(z, x, first, last, 0.0)
    np.testing.assert_allclose(mean_2, mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jnp.square(slope * std_1) + jnp.square(std_2), jnp.square(std), rtol=1e-5)


def test_posterior_keeps_the_marginal():
    """If z ~ q(z | x) and z' ~ q(z' | z, x), then z' ~ q(z' | x), with mean α' x and variance σ'²."""
    x = jnp.float32(0.8)
    for lo, hi in PAIRS:
        alpha, sigma = alpha_sigma(lo)
        alpha_next, sigma_next = alpha_sigma(hi)
        mean, std = posterior(alpha * x, x, lo, hi, 0.0)
        slope = posterior(jnp.float32(1), jnp.float32(0), lo, hi, 0.0)[0]
        np.testing.assert_allclose(mean, alpha_next * x, rtol=1e-5)
        np.testing.assert_allclose(jnp.square(slope * sigma) + jnp.square(std), jnp.square(sigma_next), rtol=2e-5)


def test_posterior_of_a_step_of_zero_length_is_z_and_of_a_full_step_is_x():
    z, x = jnp.float32([1.5, -0.2]), jnp.float32([0.3, 0.6])
    mean, std = posterior(z, x, jnp.float32(2), jnp.float32(2), 0.3)
    np.testing.assert_array_equal(mean, z)
    assert std == 0
    mean, std = posterior(z, x, jnp.float32(-20), jnp.float32(20), 0.0)
    np.testing.assert_allclose(mean, x, atol=1e-6)
    assert 0 < std < 5e-5


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 1)])
def test_one_logsnr_for_all_rows_or_one_per_row(shape):
    """A scalar λ applies to every row; λ of shape [B] gives each row its own."""
    z, x = jnp.asarray(np.random.default_rng(1).normal(size=(2, *shape)), jnp.float32)
    lo, hi = jnp.float32([-20, -1, 0, 19]), jnp.float32([-19, 0, 20, 20])

    def everything(z, x, lo, hi):
        mean, std = posterior(z, x, lo, hi, 0.3)
        return diffuse(z, x, lo), x_from_eps(z, x, lo), eps_from_x(z, x, lo), mean, jnp.broadcast_to(std, z.shape)

    together = jax.jit(everything)(z, x, lo, hi)
    rows = jax.jit(jax.vmap(everything))(z, x, lo, hi)
    for a, b in zip(together, rows, strict=True):
        assert a.shape == shape and a.dtype == jnp.float32
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    one = everything(z, x, lo[1], hi[1])
    for a, b in zip(together, one, strict=True):
        np.testing.assert_allclose(b[1], a[1], rtol=1e-6, atol=1e-7)


# Numbers that are not Python's

TYPES = [float, np.float32, np.float64, np.asarray, jnp.float32, lambda x: jnp.asarray([x, 0.5])]
X = jnp.ones((2, 3))


@pytest.mark.parametrize("kind", TYPES)
def test_noise_levels_that_are_no_number_are_refused_in_any_type(kind):
    nan = kind(math.nan)
    with jaxtyping_off():
        for call in (
            lambda: alpha_sigma(nan),
            lambda: diffuse(X, X, nan),
            lambda: x_from_eps(X, X, nan),
            lambda: eps_from_x(X, X, nan),
            lambda: posterior(X, X, nan, 3.0, 0.3),
            lambda: posterior(X, X, -3.0, nan, 0.3),
        ):
            with pytest.raises(ValueError, match=r"logsnr(_next)? is nan"):
                call()


@pytest.mark.parametrize("kind", TYPES)
def test_steps_towards_noise_and_v_outside_0_to_1_are_refused_in_any_type(kind):
    with jaxtyping_off():
        with pytest.raises(ValueError, match=r"logsnr is .*logsnr_next.*give logsnr_next >= logsnr"):
            posterior(X, X, kind(3.0), kind(-3.0), 0.3)
        for v in (-0.1, 1.5, math.nan):
            for call in (lambda v=v: posterior(X, X, -3.0, 3.0, kind(v)), lambda v=v: ancestral(kind(v))):
                with pytest.raises(ValueError, match=rf"v is {str(v)[:3]}.*in \[0, 1\]"):
                    call()


@pytest.mark.parametrize("kind", TYPES[:-1])
def test_schedules_that_run_backwards_are_refused_in_any_type(kind):
    with jaxtyping_off():
        for lo, hi in (
            (20.0, -20.0),
            (5.0, 5.0),
            (-math.inf, 20.0),
            (-20.0, 90.0),
            (math.nan, 20.0),
            (-20.0, math.nan),
        ):
            with pytest.raises(ValueError, match=r"logsnr_m(in|ax).*in \[-80, 80\]"):
                cosine_logsnr(0.5, kind(lo), kind(hi))
        for u in (-0.1, 1.5, math.nan):
            with pytest.raises(ValueError, match=rf"u is {str(u)[:3]}.*in \[0, 1\]"):
                cosine_logsnr(kind(u))
    with pytest.raises(ValueError, match="logsnr_min is True"):
        check_ends(True, 20.0)


@pytest.mark.parametrize("kind", TYPES[:-1])
def test_numbers_of_any_type_mean_the_same(kind):
    expected = jnp.stack([*posterior(X, X, -1.0, 1.5, 0.25)[:1], diffuse(X, X, 1.5)])
    given = jnp.stack([*posterior(X, X, kind(-1.0), kind(1.5), kind(0.25))[:1], diffuse(X, X, kind(1.5))])
    np.testing.assert_array_equal(given, expected)
    np.testing.assert_array_equal(cosine_logsnr(kind(0.25), kind(-8.0), kind(9.0)), cosine_logsnr(0.25, -8.0, 9.0))


def test_numbers_for_another_number_of_rows_and_images_of_integers_are_refused():
    x = jnp.zeros((4, 2, 3, 1))
    words = r"numbers for an array of shape \(4, 2, 3, 1\): give one, or one per row, \[B\]"
    with jaxtyping_off():
        for function in (diffuse, x_from_eps, eps_from_x):
            with pytest.raises(ValueError, match=rf"\(3,\) {words}"):
                function(x, x, jnp.zeros(3))
        with pytest.raises(ValueError, match=rf"\(2, 3, 1\) {words}"):
            posterior(x, x, 0.0, 1.0, jnp.full((2, 3, 1), 0.3))
        with pytest.raises(ValueError, match=r"x has dtype uint8.*x / 127\.5 - 1"):
            diffuse(x.astype(jnp.uint8), x, 0.0)


def test_traced_noise_levels_are_not_checked():
    assert np.all(np.isnan(jax.jit(lambda logsnr: diffuse(X, X, logsnr))(math.nan)))
    assert np.all(np.isnan(jax.jit(lambda a, b: posterior(X, X, a, b, 0.3)[1])(3.0, -3.0)))
