"""Power-function averages: their profiles by quadrature, and reconstruction against averages that were kept."""

import jax.numpy as jnp
import numpy as np
import pytest

from cfd.posthoc_ema import MAX_SIGMA_REL, advance, coefficients, gamma_of, inner_products, sigma_rel_of

LENGTHS = (0.01, 0.05, 0.1, 0.2, 0.28, MAX_SIGMA_REL)


def profile(sigma_rel: float, step: float, tau: np.ndarray) -> np.ndarray:
    gamma = gamma_of(sigma_rel)
    return np.where(tau <= step, (gamma + 1) * (np.minimum(tau, step) / step) ** gamma / step, 0.0)


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_the_length_is_the_relative_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    gamma, t = gamma_of(sigma_rel), 7.0
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    tau, weights = (nodes + 1) / 2 * t, weights / 2 * t
    p = profile(sigma_rel, t, tau) * weights
    mean = p @ tau
    assert p.sum() == pytest.approx(1.0, rel=1e-6)
    assert np.sqrt(p @ (tau - mean) ** 2) / t == pytest.approx(sigma_rel, rel=1e-5)


def test_exponents_that_solve_the_cubic() -> None:
    """Solutions of (γ + 1) / ((γ + 2)² (γ + 3)) = σ²: γ = 1 gives 1/18, γ = 6 gives 7/576."""
    assert gamma_of(float(np.sqrt(1 / 18))) == pytest.approx(1.0, rel=1e-9)
    assert gamma_of(float(np.sqrt(7 / 576))) == pytest.approx(6.0, rel=1e-9)
    assert gamma_of(MAX_SIGMA_REL) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, 1.0, float("nan")])
def test_a_length_out_of_range_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"give a number in \(0, 0\.2887\]"):
        gamma_of(sigma_rel)


def test_inner_products_are_integrals() -> None:
    stored = [(0.05, 3.0), (0.2, 5.0), (0.1, 8.0), (0.1, 3.0)]
    gammas, steps = np.array([gamma_of(s) for s, _ in stored]), np.array([t for _, t in stored])
    products = inner_products(gammas, steps, gammas, steps)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    for i, (s, t) in enumerate(stored):
        for j, (r, u) in enumerate(stored):
            end = min(t, u)
            tau = (nodes + 1) / 2 * end
            integral = weights @ (profile(s, t, tau) * profile(r, u, tau)) * end / 2
            assert products[i, j] == pytest.approx(integral, rel=1e-6)


def kept_average(sigma_rel: float, thetas: np.ndarray) -> np.ndarray:
    """The average after all steps by its definition: each step has the integral of the profile over it."""
    gamma, t = gamma_of(sigma_rel), len(thetas)
    return np.diff((np.arange(t + 1) / t) ** (gamma + 1)) @ thetas


def walk(steps: int) -> np.ndarray:
    """Weights that drift, oscillate and jitter, [steps, 5]."""
    rng, t = np.random.default_rng(0), np.arange(steps)[:, None] / steps
    smooth = np.array([1.0, 0.3, -2.0, 5.0, 0.0]) + t * np.array([2.0, -1.0, 0.0, 3.0, 1.0]) + np.sin(5 * t)
    return smooth + 0.01 * rng.normal(size=(steps, 5)).cumsum(axis=0)


def test_an_average_step_by_step_is_the_integral_of_its_profile() -> None:
    thetas = walk(50)
    for sigma_rel in (0.05, 0.1, MAX_SIGMA_REL):
        average = {"x": jnp.full(5, 1e3)}  # of which nothing is left after the first step
        for step, theta in enumerate(thetas, 1):
            average = advance(average, {"x": jnp.asarray(theta, jnp.float32)}, jnp.int32(step), gamma_of(sigma_rel))
        np.testing.assert_allclose(average["x"], kept_average(sigma_rel, thetas), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(average["x"], thetas.mean(axis=0), rtol=2e-5, atol=2e-5)


STORED = [(s, t) for t in range(20, 641, 20) for s in (0.05, 0.1)]


@pytest.mark.parametrize("stored", [(0.05, 640), (0.1, 640), (0.05, 400), (0.1, 20)])
def test_an_average_that_is_stored_is_given_back(stored: tuple[float, int]) -> None:
    shares, error = coefficients([s for s in STORED if s[1] <= stored[1]], *stored)
    expected = [float(s == stored) for s in STORED if s[1] <= stored[1]]
    np.testing.assert_array_equal(shares, expected)
    assert error == 0.0
    # So do the least squares, at a length that is the same but for rounding.
    near, error = coefficients([s for s in STORED if s[1] <= stored[1]], stored[0] * (1 + 1e-12), stored[1])
    np.testing.assert_allclose(near, expected, atol=1e-6)
    assert error < 1e-6


def test_many_lengths_that_are_close_to_each_other_do_not_blow_up_rounding() -> None:
    stored = [(s, t) for t in range(3, 97, 3) for s in (0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)]
    for sigma_rel in (0.04, 0.12, 0.22):
        shares, error = coefficients(stored, sigma_rel, 96)
        assert np.abs(shares).sum() < 30 and error < 0.01


@pytest.mark.parametrize(("sigma_rel", "tolerance"), [(0.03, 1e-4), (0.075, 1e-5), (0.15, 1e-4), (0.25, 1e-3)])
def test_a_reconstruction_is_the_average_that_would_have_been_kept(sigma_rel: float, tolerance: float) -> None:
    thetas = walk(640)
    stored = np.stack([kept_average(s, thetas[:t]) for s, t in STORED])
    shares, error = coefficients(STORED, sigma_rel, 640)
    wanted = kept_average(sigma_rel, thetas)
    assert np.abs(shares @ stored - wanted).max() < tolerance * np.abs(thetas).max()
    assert shares.sum() == pytest.approx(1.0, abs=1e-9)
    # The error is that of the profile: a sum of those stored, by quadrature.
    tau = (np.arange(64_000) + 0.5) / 100
    p = profile(sigma_rel, 640, tau)
    made = sum(c * profile(s, t, tau) for c, (s, t) in zip(shares, STORED, strict=True))
    assert error == pytest.approx(np.linalg.norm(made - p) / np.linalg.norm(p), rel=0.02)


@pytest.mark.parametrize(("kept", "step"), [([], 5), ([(0.05, 0), (0.1, 10)], 10), ([(0.05, 10)], 0)])
def test_averages_of_no_step_are_refused(kept: list[tuple[float, int]], step: int) -> None:
    with pytest.raises(ValueError, match=r"kept is \[.*and step .*steps >= 1"):
        coefficients(kept, 0.07, step)


def test_no_other_shares_are_nearer() -> None:
    """The least squares are a minimum: a step along any direction that keeps the sum makes the profile worse."""
    stored, wanted = STORED[-8:], (0.15, 640)
    shares, error = coefficients(stored, *wanted)
    gammas, steps = np.array([gamma_of(s) for s, _ in stored]), np.array([float(t) for _, t in stored])
    products = inner_products(gammas, steps, gammas, steps)
    end = np.array([gamma_of(0.15)]), np.array([640.0])
    b, norm = inner_products(gammas, steps, *end)[:, 0], inner_products(*end, *end)[0, 0]

    def off(c: np.ndarray) -> float:
        return float(np.sqrt((norm - 2 * c @ b + c @ products @ c) / norm))

    assert off(shares) == pytest.approx(error, rel=1e-6)
    for direction in np.random.default_rng(0).normal(size=(20, len(stored))):
        direction -= direction.mean()
        assert off(shares + 1e-3 * direction) > error
