"""Averages of weights over training whose length is chosen afterwards: Karras et al. (arXiv:2312.02696), Section 3.

An average with a power function as its profile gives the weights of time τ a share that grows as τ^γ. Its length is
measured by the standard deviation of that profile relative to the training time, σ_rel. Two averages of different
lengths, stored now and then, suffice to reconstruct one of any other length, by least squares of the profiles.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float64, Int

RIDGE = 1e-12
"""Added to the squared norms of profiles, which are 1: profiles of close steps and lengths are nearly dependent."""
MAX_SIGMA_REL = 12**-0.5
"""σ_rel of the plain mean over all steps, γ = 0. A longer average would prefer the early weights."""


def gamma_of(sigma_rel: float) -> float:
    """The exponent γ >= 0 of the profile with this relative standard deviation, the inverse of `sigma_rel_of`.

    It is the largest root of the cubic γ³ + 7γ² + (16 − s)γ + 12 − s, s = σ_rel^−2. Raises ValueError unless σ_rel is
    in (0, 12^−1/2].
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ValueError(
            f"sigma_rel is {sigma_rel}; give a number in (0, {MAX_SIGMA_REL:.4f}], of which the last is the mean over "
            "all steps"
        )
    s = sigma_rel**-2.0
    return max(float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max()), 0.0)


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation, relative to t, of the profile (γ + 1) τ^γ / t^(γ + 1) on [0, t]."""
    return float(np.sqrt(gamma + 1.0) / ((gamma + 2.0) * np.sqrt(gamma + 3.0)))


def advance(average: Any, params: Any, step: Int[Array, ""], gamma: float) -> Any:
    """The average at step t >= 1 from that at t − 1: β θ̂ + (1 − β) θ, with β = (1 − 1/t)^(γ + 1), for pytrees.

    Step s of t then has the share (s^(γ + 1) − (s − 1)^(γ + 1)) / t^(γ + 1), the integral of the profile from s − 1 to
    s. At t = 1, β is 0: what the average was before does not matter.
    """
    share = -jnp.expm1((gamma + 1.0) * jnp.log1p(-1.0 / jnp.asarray(step, jnp.float32)))
    return jax.tree.map(lambda mean, x: mean + share * (x - mean), average, params)


def inner_products(
    gammas: Float64[np.ndarray, " a"],
    steps: Float64[np.ndarray, " a"],
    other_gammas: Float64[np.ndarray, " b"],
    other_steps: Float64[np.ndarray, " b"],
) -> Float64[np.ndarray, "a b"]:
    """∫ p(τ) q(τ) dτ of the profiles p of (γ, t) with the profiles q of (γ', t').

    With p the one that ends first, at t <= t', it is (γ + 1)(γ' + 1) / (γ + γ' + 1) · (t / t')^γ' / t'.
    """
    a, b, t, u = gammas[:, None], other_gammas[None], steps[:, None], other_steps[None]
    first, last = np.minimum(t, u), np.maximum(t, u)
    return (a + 1) * (b + 1) / (a + b + 1) * (first / last) ** np.where(t <= u, b, a) / last


def coefficients(
    kept: Sequence[tuple[float, int]], sigma_rel: float, step: int
) -> tuple[Float64[np.ndarray, " n"], float]:
    """The shares of stored averages in the average of length σ_rel at `step`, and how far off its profile is.

    `kept` has the (σ_rel, step) of each stored average, none twice. One that is stored is given back. Otherwise, the
    shares c minimise ∫ (Σ c_i p_i(τ) − p(τ))² dτ among those whose sum is 1. The paper leaves the sum free; with it,
    weights that do not change are reconstructed exactly. The second result is the square root of this minimum relative
    to ∫ p(τ)² dτ. Raises ValueError if no average is stored, or if a step is not at least 1.
    """
    if not kept or min(step, *(at for _, at in kept)) < 1:
        raise ValueError(f"kept is {kept} and step {step}; give the (sigma_rel, step) of stored averages, steps >= 1")
    if (sigma_rel, step) in kept:
        return np.array([float(one == (sigma_rel, step)) for one in kept]), 0.0
    gammas, steps = np.array([gamma_of(s) for s, _ in kept]), np.array([t for _, t in kept], np.float64)
    gamma, end = np.array([gamma_of(sigma_rel)]), np.array([step], np.float64)
    products = inner_products(gammas, steps, gammas, steps)
    norms = np.sqrt(np.diag(products))  # profiles of unit norm, for the condition of the system
    gram = products / norms[:, None] / norms[None]
    squared_norm = inner_products(gamma, end, gamma, end)[0, 0]
    wanted = inner_products(gammas, steps, gamma, end)[:, 0] / norms
    free, of_sum = np.linalg.solve(gram + RIDGE * np.eye(len(kept)), np.stack([wanted, 1.0 / norms], axis=1)).T
    total, of_one = (free / norms).sum(), (of_sum / norms).sum()
    shares = free + of_sum * (1.0 - total) / of_one
    distance = squared_norm - 2.0 * shares @ wanted + shares @ gram @ shares
    return shares / norms, float(np.sqrt(max(distance, 0.0) / squared_norm))
