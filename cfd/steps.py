"""The grid of log-SNRs λ, and step rules: from z at λ and a prediction x̃ of the data to z at λ' > λ."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsIndex, overload

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import log_sigmoid
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from cfd.arguments import (
    check_called,
    check_count,
    check_number,
    check_returned,
    check_switch,
    concrete,
    is_zero,
    levels_at,
)
from cfd.process import Schedule, alpha_sigma, check_ends, check_grid, check_v, cosine_logsnr, eps_from_x, posterior

StepRule = Callable[[Array, Array, Array, Array], tuple[Array, Array | None]]
"""(z, x̃, λ, λ') -> mean and standard deviation of z at λ'. The standard deviation is None for a deterministic rule."""


def schedule(
    num_steps: SupportsIndex | Sequence[float] | Real[ArrayLike, "..."],
    logsnr_min: Real[ArrayLike, ""] = -20.0,
    logsnr_max: Real[ArrayLike, ""] = 20.0,
) -> Float[Array, "t"]:
    """The grid λ_1 = logsnr_min < … < λ_T = logsnr_max, [T], with uniformly spaced u: Section 2.

    An array [T] in place of num_steps is the grid itself, and the ends are not used. `grid` makes one of any schedule.
    Raises ValueError if num_steps is no integer >= 1, and as `check_ends` and `check_grid` do.
    """
    if callable(num_steps):
        raise ValueError("num_steps is a function; give T, or, for a schedule, its levels: grid(T, schedule)")
    if is_grid(num_steps):
        check_grid(num_steps)
        return jnp.asarray(num_steps, jnp.float32)
    count = check_count("num_steps", num_steps)
    check_ends(logsnr_min, logsnr_max)
    # The ends are set to the bit. Rounded, the last could lie outside an Interval that ends at logsnr_max.
    first, last = jnp.asarray(logsnr_min, jnp.float32), jnp.asarray(logsnr_max, jnp.float32)
    return cosine_logsnr(_uniform(count), first, last).at[-1].set(last).at[0].set(first)


def grid(num_steps: SupportsIndex, schedule: Schedule, *, clean_end: bool = True) -> Float[Array, "t"]:
    """The rising grid λ_1 … λ_T, [T], of a schedule at uniformly spaced u, for `guided_sample(num_steps=grid(...))`.

    u falls from 1 to 0. Without `clean_end`, it falls to 1/T: the x̃ of that level is then the image, and no evaluation
    is spent where z has hardly any noise. Every second level of such a grid is that of half as many steps.

    Raises ValueError if num_steps is no integer >= 1, if schedule is no function or returns another shape, and unless
    clean_end is True or False.
    """
    count = check_count("num_steps", num_steps)
    check_switch("clean_end", clean_end)
    return levels_at(schedule, _uniform(count) if clean_end else _uniform(count + 1)[:-1])


def _uniform(count: int) -> Float[Array, "t"]:
    """u from 1 down to 0."""
    return 1.0 - jnp.arange(count, dtype=jnp.float32) / max(count - 1, 1)


def is_grid(num_steps: Any) -> bool:
    """Whether `num_steps` is a grid of λ, and no number of steps."""
    return np.ndim(num_steps) > 0


def known_levels(num_steps: Any, logsnr_min: Any, logsnr_max: Any) -> Float[np.ndarray, " t"] | None:
    """The levels of `schedule` in float64, or None if they are traced.

    They are computed in NumPy, because JAX traces arrays under `jit`.
    """
    if is_grid(num_steps):
        return concrete(num_steps)
    known = concrete(logsnr_min), concrete(logsnr_max)
    if known[0] is None or known[1] is None:
        return None
    first, last = float(known[0]), float(known[1])
    factor = -0.5 if first + last >= 0.0 else 0.5  # angles near 0, where they are precise
    angles = np.arctan(np.exp(factor * first)), np.arctan(np.exp(factor * last))
    levels = np.log(np.tan(np.linspace(*angles, operator.index(num_steps)))) / factor
    levels[-1], levels[0] = last, first
    return levels


class LearnedVariance(NamedTuple):
    """A step rule that also takes v [B, ...], which the network returns with ε: (z, x̃, λ, λ', v) -> as a `StepRule`."""

    rule: Callable[[Array, Array, Array, Array, Array], tuple[Array, Array | None]]


@overload
def ancestral(v: None) -> LearnedVariance: ...
@overload
def ancestral(v: Real[ArrayLike, "*v"] = 0.3) -> StepRule: ...
def ancestral(v: Real[ArrayLike, "*v"] | None = 0.3) -> StepRule | LearnedVariance:
    """The paper's sampler: z' ~ q(z' | z, x̃), Eqs. 3 and 4 of Ho and Salimans (arXiv:2207.12598).

    v in [0, 1], a scalar or [B], interpolates the log-variance between its lower (v = 0) and upper bound (v = 1). None
    takes the v of a network that returns (ε, v), one value per pixel: Nichol and Dhariwal (arXiv:2102.09672), Eq. 15.
    Raises ValueError for a concrete number outside [0, 1], of any type.
    """
    if v is None:
        return LearnedVariance(posterior)
    check_v(v)
    return lambda z, x, logsnr, logsnr_next: posterior(z, x, logsnr, logsnr_next, v)


def ddim(eta: Real[ArrayLike, ""] = 0.0) -> StepRule:
    """DDIM, z' = α' x̃ + sqrt(σ'² − η² σ̃²) ε + η σ̃ n: Song et al. (arXiv:2010.02502), Eqs. 12 and 16.

    σ̃² = (1 − e^{λ−λ'}) σ'² is the variance of `ancestral(0.0)`, which η = 1 is. With η = 0, the rule is deterministic.
    Raises ValueError unless η, one number, is in [0, 1].
    """
    check_number("eta", eta, lambda x: (x >= 0.0) & (x <= 1.0), "give one number in [0, 1]")
    deterministic = is_zero(eta)

    def step(z: Array, x: Array, logsnr: Array, logsnr_next: Array) -> tuple[Array, Array | None]:
        alpha, sigma = alpha_sigma(logsnr_next)
        eps = eps_from_x(z, x, logsnr)
        if deterministic:
            return alpha * x + sigma * eps, None
        share = jnp.square(jnp.asarray(eta, jnp.float32))
        kept = (1.0 - share) + share * jnp.exp(logsnr - logsnr_next)
        return alpha * x + sigma * jnp.sqrt(kept) * eps, sigma * jnp.sqrt(-share * jnp.expm1(logsnr - logsnr_next))

    return step


def euler_maruyama() -> StepRule:
    """Euler-Maruyama's step of the reverse SDE: Song et al. (arXiv:2011.13456), with h = λ' − λ.

    z' = z + h (½ σ² z − σ ε) + σ sqrt(h) n, with ε of x̃. `ancestral(0.0)` is this step to first order in h, and exact
    for constant x̃. Where σ is near 1, a step multiplies z by 1 − h/2, and a chain with h > 4 diverges. The first gap of
    the cosine grid is 14 for T = 32, and z then has a standard deviation of 7 instead of 1. Give a grid that is uniform
    in λ, with h of at most about 0.5: `num_steps=grid(81, linear(-20.0, 20.0))`.

    The Ornstein-Uhlenbeck chain X' = (1 − γ) X + sqrt(2γ) n has the grid λ = −log(expm1(2t)), where t is the sum of its
    step sizes γ, from the data on: to first order, h σ² = 2γ.
    """

    def step(z: Array, x: Array, logsnr: Array, logsnr_next: Array) -> tuple[Array, Array]:
        h, (_, sigma) = logsnr_next - logsnr, alpha_sigma(logsnr)
        return z + h * sigma * (0.5 * sigma * z - eps_from_x(z, x, logsnr)), sigma * jnp.sqrt(h)

    return step


def hold() -> StepRule:
    """The step rule that keeps z/α where it is: z' = (α'/α) z. Of the network, only a `Langevin` corrector makes use.

    With a corrector of many steps, this is annealed Langevin dynamics: Song and Ermon (arXiv:1907.05600), Algorithm 1.
    """
    return _held


def _held(z: Array, x: Array, logsnr: Array, logsnr_next: Array) -> tuple[Array, None]:
    return z * jnp.exp(0.5 * (log_sigmoid(logsnr_next) - log_sigmoid(logsnr))), None


class Langevin(NamedTuple):
    """A corrector: steps of Langevin dynamics at each λ before the network's evaluation there.

    `steps` times, z ← z − c σ ε̃(z, λ) + σ sqrt(2c) n: Song et al. (arXiv:2011.13456). Repeated, this draws from the
    density whose score is −ε̃/σ, with an error that grows with c: of a Gaussian, a variance V becomes
    V / (1 − c σ² / (2V)). c is the step size in units of σ², for every λ. It must be below 2, and with guidance below
    about 2 / (1 + w), because z diverges otherwise. The signal-to-noise ratio r of their code means c = 2 r²: its 0.16
    is c = 0.05. Unlike theirs, this step size does not depend on the other images of the batch.

    w is the corrector's own guidance weight, of any kind that `guided_sample` takes; None is that of the sampler. A
    sampler with w = 0 and a corrector with w > 0 are predictor-corrector guidance, Bradley and Nakkiran
    (arXiv:2408.09000). Its images come much closer to the density p(x|c)^{1+w} p(x)^{−w} than those of a guided
    sampler. Measured with exact scores and about 510 evaluations per image: the (sliced) W1 distance to that density
    for w = 1 / 3; for the digits, divided by that of as many exact samples.

                                                             outer of three   middle of three
                                                             Gaussians        Gaussians         digits, 64 dimensions
        ddim(), T = 256                                      0.169 / 0.362    0.084 / 0.112     4.3 / 10
        ancestral(0.0), T = 256                              0.073 / 0.123    0.033 / 0.034     3.0 / 5.9
        ddim(), w = 0, with Langevin(0.2, 2, w), T = 102     0.016 / 0.029    0.002 / 0.004     1.1 / 1.5
        ancestral(0.0), likewise                             0.007 / 0.013    0.003 / 0.003     1.0 / 1.3

    A corrector costs `steps` more guided evaluations per step. c and w may be traced; a new `steps` compiles again.
    """

    c: Real[ArrayLike, ""] = 0.05
    steps: SupportsIndex = 1
    w: Any = None


def check_corrector(corrector: Langevin) -> None:
    """Raises ValueError unless c is one number in (0, 2) and `steps` a count. A traced c is not checked."""
    check_called("corrector", corrector)
    if not isinstance(corrector, Langevin):
        raise ValueError(f"corrector is {corrector!r}; give Langevin(c, steps), or None")
    remedy = "Langevin dynamics with larger steps diverge: give one number c with 0 < c < 2, such as 0.05"
    check_number("c", corrector.c, lambda x: (x > 0.0) & (x < 2.0), remedy)
    check_count("steps", corrector.steps)


class SecondOrder(NamedTuple):
    """A second-order sampler: `rule` with x̃ extrapolated in λ to the middle of the step.

    The extrapolation uses the current and the previous evaluation. `SecondOrder(ddim())` is DPM-Solver++(2M) and
    `SecondOrder(ancestral(0.0))` its SDE form: Lu et al. (arXiv:2211.01095). Their λ is half of this one, which does
    not matter because only ratios of steps in λ occur. Two steps are of first order: the first, because no evaluation
    precedes it, and the last, because it is too long in λ to extrapolate over.
    """

    rule: StepRule | LearnedVariance


def rule_of(sampler: Any) -> Any:
    """The `StepRule` or `LearnedVariance` of a sampler.

    Raises ValueError for anything else, such as `ddim`, and for `hold()` of second order, because it does not use the x̃
    that is extrapolated.
    """
    rule = sampler.rule if isinstance(sampler, SecondOrder) else sampler
    check_called("sampler", rule)
    if not (callable(rule) or isinstance(rule, LearnedVariance)):
        raise ValueError(f"sampler is {sampler!r}; give a step rule, such as the result of ancestral(v) or ddim()")
    if isinstance(sampler, SecondOrder) and rule is _held:
        raise ValueError("sampler is SecondOrder(hold()), and hold() uses no x̃ to extrapolate: give hold() alone")
    return rule


def with_v(rule: Any) -> Callable[[Array, Array, Array, Array, Array | None], tuple[Array, Array | None]]:
    """A rule as a function of v too, which may be None. Only a `LearnedVariance` uses it, and needs it."""
    if not isinstance(rule, LearnedVariance):
        return lambda z, x, logsnr, logsnr_next, v: rule(z, x, logsnr, logsnr_next)

    def learned(z: Array, x: Array, logsnr: Array, logsnr_next: Array, v: Array | None) -> tuple[Array, Array | None]:
        if v is None:
            raise ValueError(
                "sampler is ancestral(v=None), which takes the v of the network, and eps_fn returned ε alone: give "
                "ancestral(v) with v in [0, 1], or an eps_fn that returns (ε, v), as cfd.loading.load(..., "
                "variance=True) does for a model with a learned variance"
            )
        return rule.rule(z, x, logsnr, logsnr_next, v)

    return learned


def checked_step(returned: Any, z: Array) -> tuple[Array, Any]:
    """(mean, std), what a step rule returned. Raises ValueError unless they fit z."""
    meaning = "(mean, standard deviation of z at the next λ)"
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ValueError(f"the step rule returned no pair; it must return {meaning}, or (mean, None)")
    mean, std = returned
    check_returned("the step rule", mean, z.shape, meaning)
    fits = all(a in (1, b) for a, b in zip(np.shape(std)[::-1], z.shape[::-1], strict=False))
    if std is not None and (np.ndim(std) > z.ndim or not fits):
        raise ValueError(f"the step rule returned a std of shape {np.shape(std)}; give [B, 1, ...], or {z.shape}")
    return mean.astype(jnp.float32), std


def reach(logsnr: Float[Array, "t"], logsnr_next: Float[Array, "t"]) -> Float[Array, "t"]:
    """The factors by which a second-order sampler extrapolates x̃; each multiplies its change since the step before."""
    t, gap = jnp.arange(1, len(logsnr) + 1), logsnr_next - logsnr
    return jnp.where((t > 1) & (t < len(logsnr) - 1), 0.5 * gap / jnp.roll(gap, 1), 0.0)


def dpm_solver() -> SecondOrder:
    """The deterministic sampler for few steps, DPM-Solver++(2M): Lu et al. (arXiv:2211.01095), Algorithm 2."""
    return SecondOrder(ddim())


def sde_dpm_solver(v: Real[ArrayLike, "*v"] = 0.0) -> SecondOrder:
    """The ancestral sampler of second order; with v = 0, SDE-DPM-Solver++(2M): Lu et al. (arXiv:2211.01095).

    It costs what `ancestral(v)` does. v is as there.
    """
    return SecondOrder(ancestral(v))
