"""The grid of log-SNRs λ, and step rules: from z at λ and a prediction x̃ of the data to z at λ' > λ."""

from collections.abc import Callable
from typing import NamedTuple, SupportsIndex

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from cfd.arguments import check_count
from cfd.process import alpha_sigma, check_ends, check_v, cosine_logsnr, eps_from_x, posterior

StepRule = Callable[[Array, Array, Array, Array], tuple[Array, Array | None]]
"""(z, x̃, λ, λ') -> mean and standard deviation of z at λ'. The standard deviation is None for a deterministic rule."""


def schedule(
    num_steps: SupportsIndex, logsnr_min: Real[ArrayLike, ""] = -20.0, logsnr_max: Real[ArrayLike, ""] = 20.0
) -> Float[Array, "t"]:
    """The grid λ_1 = logsnr_min < … < λ_T = logsnr_max, [T], with uniformly spaced u: Section 2.

    Raises ValueError if num_steps is no integer >= 1, and as `check_ends` does.
    """
    num_steps = check_count("num_steps", num_steps)
    check_ends(logsnr_min, logsnr_max)
    u = 1.0 - jnp.arange(num_steps, dtype=jnp.float32) / max(num_steps - 1, 1)
    # The ends are set to the bit. Rounded, the last could lie outside an Interval that ends at logsnr_max.
    first, last = jnp.asarray(logsnr_min, jnp.float32), jnp.asarray(logsnr_max, jnp.float32)
    return cosine_logsnr(u, first, last).at[-1].set(last).at[0].set(first)


def ancestral(v: Real[ArrayLike, "*v"] = 0.3) -> StepRule:
    """The paper's sampler: z' ~ q(z' | z, x̃), Eqs. 3 and 4 of Ho and Salimans (arXiv:2207.12598).

    v in [0, 1], a scalar or [B], interpolates the log-variance between its lower (v = 0) and upper bound (v = 1).
    Raises ValueError for a concrete number outside [0, 1], of any type.
    """
    check_v(v)
    return lambda z, x, logsnr, logsnr_next: posterior(z, x, logsnr, logsnr_next, v)


def ddim() -> StepRule:
    """The deterministic sampler z' = α' x̃ + σ' ε: Song et al. (arXiv:2010.02502), Eq. 12 with σ_t = 0."""

    def step(z: Array, x: Array, logsnr: Array, logsnr_next: Array) -> tuple[Array, None]:
        alpha, sigma = alpha_sigma(logsnr_next)
        return alpha * x + sigma * eps_from_x(z, x, logsnr), None

    return step


class SecondOrder(NamedTuple):
    """A second-order sampler: `rule` with x̃ extrapolated in λ to the middle of the step.

    The extrapolation uses the current and the previous evaluation. `SecondOrder(ddim())` is DPM-Solver++(2M) and
    `SecondOrder(ancestral(0.0))` its SDE form: Lu et al. (arXiv:2211.01095). Their λ is half of this one, which does
    not matter because only ratios of steps in λ occur. Two steps are of first order: the first, because no evaluation
    precedes it, and the last, because it is too long in λ to extrapolate over.
    """

    rule: StepRule


def reach(logsnr: Float[Array, "t"], logsnr_next: Float[Array, "t"]) -> Float[Array, "t"]:
    """The factors by which a second-order sampler extrapolates x̃; each multiplies its change since the step before."""
    t, gap = jnp.arange(1, len(logsnr) + 1), logsnr_next - logsnr
    return jnp.where((t > 1) & (t < len(logsnr) - 1), 0.5 * gap / jnp.roll(gap, 1), 0.0)


def dpm_solver() -> SecondOrder:
    """The deterministic sampler for few steps, DPM-Solver++(2M): Lu et al. (arXiv:2211.01095), Algorithm 2."""
    return SecondOrder(ddim())
