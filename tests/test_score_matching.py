"""Losses without noise against those with it, and the share of a field's Jacobian that is no gradient's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import gaussian_eps, mixture_eps
from recursion import jaxtyping_off

from cfd.guidance import Interval
from cfd.process import alpha_sigma, diffuse
from cfd.score_matching import conservativeness, implicit_score_matching, sliced_score_matching

N = 100_000
LABELS = jnp.zeros(N, jnp.int32)
KEY = jax.random.key(3)
MEANS = np.array([[0.5, 0.1], [-0.4, 0.3], [0.0, -0.6]], np.float32)
STDS = np.array([0.3, 0.1, 0.2], np.float32)
mixture = mixture_eps(MEANS, STDS)


def turned(z, logsnr, labels):
    """A field that is the gradient of nothing, and not linear."""
    x, y = z[:, :1], z[:, 1:]
    return jnp.concatenate([jnp.tanh(x + 2.0 * y) + 0.1 * logsnr[:, None], x * y - jnp.sin(x)], axis=1)


def pairs(logsnr: float, count: int = N):
    """(z, ε) of data in two dimensions."""
    of_x, of_eps = jax.random.split(KEY)
    x, eps = jax.random.uniform(of_x, (count, 2), minval=-1.0), jax.random.normal(of_eps, (count, 2))
    return diffuse(x, eps, logsnr), eps


@pytest.mark.parametrize("logsnr", [-2.0, 1.0, 4.0])
def test_half_the_denoising_loss_is_ism_plus_half_the_dimension(logsnr: float) -> None:
    """For a field that is no score of any density, and for random signs as they come."""
    z, eps = pairs(logsnr)
    squared = np.square(turned(z, jnp.full(N, logsnr), LABELS) - eps).sum(1)
    expected, sigma = 0.5 * np.mean(np.float64(squared)) - 1.0, alpha_sigma(logsnr)[1]
    implicit, sliced = (
        float(jax.jit(lambda z, f=f: f(KEY, turned, z, LABELS, logsnr=logsnr))(z))
        for f in (implicit_score_matching, sliced_score_matching)
    )
    spread = 5.0 / math.sqrt(N)  # of z, times a standard deviation of about 1
    assert implicit == pytest.approx(expected, abs=2.0 * spread)
    assert sliced == pytest.approx(implicit, abs=3.0 * spread)
    # With the exact divergence instead: ∂/∂x tanh(x + 2 y) + ∂/∂y (x y − sin x).
    x, y = np.asarray(z, np.float64).T
    divergence = 1 - np.tanh(x + 2 * y) ** 2 + x
    field = np.float64(turned(z, jnp.full(N, logsnr), LABELS))
    assert implicit == pytest.approx(
        np.mean(0.5 * np.square(field).sum(1) - float(sigma) * divergence), abs=float(sigma) * spread * 2.0
    )


@pytest.mark.parametrize("loss", [implicit_score_matching, sliced_score_matching])
def test_a_linear_field_of_one_factor_is_exact_to_its_minimum(loss) -> None:
    """For ε̂ = a z, vᵀ J v = a d is exact, and ISM has its minimum at a = σ d / E‖z‖²: the Gaussian's own score."""
    z, _ = pairs(1.0, 4000)
    labels, sigma, squared = LABELS[:4000], alpha_sigma(1.0)[1], float(jnp.square(z).sum(1).mean())
    of = lambda a: loss(KEY, lambda z, *_: a * z, z, labels, logsnr=1.0)  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(of))(0.7)
    if loss is implicit_score_matching:
        assert float(value) == pytest.approx(0.5 * 0.49 * squared - float(sigma) * 0.7 * 2, rel=1e-5)
        assert float(gradient) == pytest.approx(0.7 * squared - float(sigma) * 2, rel=1e-4)
    else:
        assert float(gradient) == pytest.approx(0.7 * squared - float(sigma) * 2, abs=0.1)


def test_one_level_per_row_and_the_mean_over_rows() -> None:
    z, levels = jnp.ones((3, 2, 2, 1)), jnp.array([-3.0, 0.0, 5.0])
    given = implicit_score_matching(KEY, lambda z, s, c: 0.5 * z, z, LABELS[:3], logsnr=levels)
    expected = np.mean([0.5 * 0.25 * 4 - 0.5 * 4 / math.sqrt(1 + math.exp(s)) for s in levels])
    assert given.shape == () and float(given) == pytest.approx(expected, rel=1e-5)


def test_scores_of_densities_and_their_guided_sums_are_conservative() -> None:
    z, labels = pairs(2.0, 500)[0], jnp.arange(500) % 3
    difference = lambda z, s, c: mixture(z, s, c) - mixture(z, s, 0 * c - 1)  # noqa: E731

    @jax.jit
    def shares(z, w):
        guided = conservativeness(KEY, mixture, z, labels, logsnr=2.0, w=Interval(w, 1.0, 2.5))
        return guided, conservativeness(KEY, difference, z, labels, logsnr=jnp.full(500, 2.0))

    assert all(float(share) < 1e-11 for w in (0.0, 3.0) for share in shares(z, w))


def test_an_antisymmetric_field_is_4_and_others_have_their_share() -> None:
    """‖A − Aᵀ‖² / ‖A‖², which is 4 for an antisymmetric A, and 4 a² / (s² + a²) for the sum of both kinds."""
    rng = np.random.default_rng(0)
    b = rng.normal(size=(5, 5))
    symmetric, antisymmetric = b + b.T, b - b.T
    z = jnp.asarray(rng.normal(size=(20_000, 5)), jnp.float32)
    for matrix in (antisymmetric, symmetric, symmetric + antisymmetric, np.eye(5) + 0.1 * antisymmetric):
        m = jnp.asarray(matrix, jnp.float32)
        expected = np.square(matrix - matrix.T).sum() / np.square(matrix).sum()
        given = conservativeness(KEY, lambda z, *_, m=m: z @ m.T, z, LABELS[:20_000], logsnr=0.0)
        assert float(given) == pytest.approx(expected, rel=0.04, abs=1e-11)
    assert float(conservativeness(KEY, lambda z, *_: 0.0 * z, z, LABELS[:20_000], logsnr=0.0)) == 0.0
    np.testing.assert_allclose(np.square(antisymmetric - antisymmetric.T).sum(), 4 * np.square(antisymmetric).sum())


def test_guidance_by_an_antisymmetric_difference_grows_with_w() -> None:
    """ε̃ = z + w (c-dependent turn): the share is 4 w² ‖A‖² / (d + w² ‖A‖²), 0 at w = 0 for the label."""
    a = jnp.array([[0.0, 0.6], [-0.6, 0.0]])
    eps_fn = lambda z, s, c: z - jnp.where(c[:, None] < 0, 1.0, 0.0) * (z @ a.T)  # noqa: E731
    z = pairs(0.0, 20_000)[0]
    for w, share in ((0.0, 0.0), (1.0, 4 * 0.72 / 2.72), (4.0, 4 * 16 * 0.72 / (2 + 16 * 0.72))):
        given = conservativeness(KEY, eps_fn, z, LABELS[:20_000], logsnr=0.0, w=jnp.float32(w))
        assert float(given) == pytest.approx(share, rel=0.05, abs=1e-11)


@pytest.mark.parametrize("function", [implicit_score_matching, sliced_score_matching, conservativeness])
def test_bad_arguments_are_refused(function) -> None:
    def known(z, logsnr, labels):
        return z

    known.logsnr_range = (-10.0, 9.0)  # pyright: ignore[reportFunctionMemberAccess]
    z, labels = jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32)
    good = {"eps_fn": known, "z": z, "labels": labels, "logsnr": 1.0}
    for wrong, message in (
        ({"logsnr": math.nan}, r"logsnr is nan; it is the λ of z: give a number in \[-80, 80\]"),
        ({"logsnr": np.zeros(3)}, r"logsnr is 0\.0.*or shape \(4,\)"),
        ({"logsnr": 12.0}, r"trained on λ in \[-10\.0, 9\.0\]"),
        ({"labels": labels[:3]}, r"x has shape \(4, 2\) for labels of shape \(3,\)"),
        ({"z": z.astype(jnp.int32)}, "x has dtype int32"),
        ({"eps_fn": lambda z, *_: z[:, :1]}, r"eps_fn returned shape \(4, 1\)"),
        ({"key": 0}, r"key is 0.*jax\.random\.key\(0\)"),
    ):
        arguments = {"key": KEY} | good | wrong
        rest = {name: arguments.pop(name) for name in ("logsnr",)}
        with jaxtyping_off(), pytest.raises(ValueError, match=message):
            function(*(arguments[name] for name in ("key", "eps_fn", "z", "labels")), **rest)
    assert np.isfinite(function(KEY, known, z, labels, logsnr=np.float32(1.0)))


def test_the_conditional_gaussians_own_loss_is_lower_than_any_other() -> None:
    """The minimum of ISM over fields is at the exact ε: half the error of denoising, less d/2."""
    eps_fn = gaussian_eps(MEANS, STDS)
    labels = jnp.arange(N) % 3
    x = jnp.asarray(MEANS)[labels] + jnp.asarray(STDS)[labels, None] * jax.random.normal(KEY, (N, 2))
    z = diffuse(x, jax.random.normal(jax.random.key(4), x.shape), 2.0)
    best = float(implicit_score_matching(KEY, eps_fn, z, labels, logsnr=2.0))
    alpha, sigma = map(float, alpha_sigma(2.0))
    variance = alpha**2 * np.float64(STDS) ** 2 + sigma**2
    # At the exact ε, E‖ε̂‖² = σ² d / V and the divergence is σ d / V: ISM = −½ σ² d / V of each class.
    assert best == pytest.approx(-np.mean(sigma**2 / variance), abs=5 / math.sqrt(N))
    worse = implicit_score_matching(KEY, lambda *given: 1.1 * eps_fn(*given), z, labels, logsnr=2.0)
    assert float(worse) > best
