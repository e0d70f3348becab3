"""Guidance at the cost of one evaluation, and then in fewer steps: Meng et al. (arXiv:2210.03142).

A student ε_η(z, λ, c, w) has the guidance weight as an input. In stage one, `distillation_loss`, it learns the guided
score of a teacher for all weights of a range. In stage two, `halving_loss`, the student of a student learns to do in
one DDIM step what its teacher does in two, and takes half as many steps. Stage two can be repeated down to one step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key, PyTree, UInt32

from cfd.arguments import (
    EPS_FN,
    check_count,
    check_examples,
    check_function,
    check_numbers,
    check_output,
    check_switch,
    levels_at,
    row_weights,
    threefry,
)
from cfd.attributes import is_student
from cfd.guidance import NULL_LABEL, batch_size, guide, nulls_like
from cfd.process import Schedule, cosine, diffuse, per_example, x_from_eps
from cfd.steps import ddim, grid

StudentFn = Callable[[Array, Array, Any, Array], Array]
"""(z [B, ...], logsnr [B], labels [B], w float32 [B]) -> eps [B, ...]: the guided score for the weight w."""
WITH_W = "(z, logsnr, labels, w) -> eps"


def distillation_loss(
    key: Key[Array, ""] | UInt32[Array, "2"] | UInt32[Array, "4"],
    student_fn: StudentFn,
    teacher_fn: Callable[[Array, Array, Any], Any],
    x: Float[Array, "b ..."],
    labels: PyTree,
    *,
    weights: Sequence[float],
    null: PyTree = NULL_LABEL,
    schedule: Schedule = cosine(-20.0, 20.0),
    weight: Callable[[Array], Array] | None = None,
) -> Float[Array, ""]:
    """E ‖ε_η(z_λ, λ, c, w) − (1 + w) ε(z_λ, c) + w ε(z_λ, ∅)‖² / (0.1 + |w|)², the mean over dimensions: stage one.

    x [B, ...] is data in [−1, 1], and z = α x + σ n with standard normal n. w lies in `weights` = (lo, hi), and
    log(1 + w − lo) is uniform, because errors at small w count most: for (0, 4), half of the w are below 1.24. The
    teacher ε is an eps_fn, evaluated twice; no gradient goes through it. `labels` and `null` are as in `guided_sample`.
    `schedule` gives p(λ), and `weight(logsnr) -> [B]` multiplies the squared error of each row, as in `eps_loss`.

    A student learns the difference of two scores, whose multiple w is in its output. The divisor makes the loss count
    the error of the difference, at nearly all w alike. Meng et al. do not divide: large w then count most.

    The rows have evenly spread λ and w: row i of B has (u_0 + i / B) mod 1 and (r_0 + i φ) mod 1 as its uniform
    numbers, with the golden ratio φ, and u_0 and r_0 drawn once. This makes the loss vary less.

    The key is as in `threefry`. Raises ValueError unless lo < hi, both finite and >= −1, if shapes do not agree, and if
    the teacher is a student itself, which has no score for ∅.
    """
    lo, hi = _checked_range(weights)
    check_function("student_fn", student_fn, WITH_W)
    check_function("teacher_fn", teacher_fn, EPS_FN)
    x = check_examples(x, (batch_size(labels),))
    if is_student(teacher_fn):
        raise ValueError(
            "teacher_fn is a student, which has no unconditional score to mix: give the network that it learned from, "
            "or halve its steps by halving_loss"
        )
    key_u, key_noise, key_w = jax.random.split(threefry(key), 3)
    rows = jnp.arange(len(x), dtype=jnp.float32)
    logsnr = levels_at(schedule, (jax.random.uniform(key_u, (), jnp.float32) + rows / len(x)) % 1.0)
    w = _spread(key_w, rows, lo, hi)
    z = diffuse(x, jax.random.normal(key_noise, x.shape, jnp.float32), logsnr)
    nulls = nulls_like(jax.tree.map(jnp.asarray, labels), null)
    eps_cond, eps_uncond = (check_output("teacher_fn", teacher_fn(z, logsnr, c), z.shape)[0] for c in (labels, nulls))
    target = jax.lax.stop_gradient(guide(eps_cond, eps_uncond, w))
    error = (_student_eps(student_fn, z, logsnr, labels, w) - target) / per_example(0.1 + jnp.abs(w), z)
    return jnp.mean(_weighted(jnp.square(error), weight, logsnr))


def halving_loss(
    key: Key[Array, ""] | UInt32[Array, "2"] | UInt32[Array, "4"],
    student_fn: StudentFn,
    teacher_fn: StudentFn,
    x: Float[Array, "b ..."],
    labels: PyTree,
    *,
    num_steps: SupportsIndex,
    weights: Sequence[float],
    schedule: Schedule = cosine(-20.0, 20.0),
    weight: Callable[[Array], Array] | None = None,
    clip: bool = True,
) -> Float[Array, ""]:
    """E ‖ε_η(z_λ, λ, c, w) − ε̄‖², where one DDIM step with ε̄ goes where two of the teacher go: stage two.

    The student takes N = `num_steps` steps, at the levels of `grid(N, schedule, clean_end=False)`, and the teacher 2 N.
    λ is one of the student's levels, with equal probability, and ε̄ is that of the x̃ of `two_steps`. Salimans and Ho
    (arXiv:2202.00512), Algorithm 2. For N = 1, the only level is the end of the schedule, where ε says nothing about x:
    the student must be a network that predicts x or v, and `weight` must be that of x or v (`cfd.losses.v_weight`).

    The teacher takes w as the student does. The other arguments, and what is raised, are as in `distillation_loss`.
    """
    lo, hi = _checked_range(weights)
    check_function("student_fn", student_fn, WITH_W)
    check_function("teacher_fn", teacher_fn, WITH_W)
    count = check_count("num_steps", num_steps)
    x = check_examples(x, (batch_size(labels),))
    key_i, key_noise, key_w = jax.random.split(threefry(key), 3)
    levels = jnp.append(grid(2 * count, schedule, clean_end=False), jnp.inf)
    i = 2 * jax.random.randint(key_i, x.shape[:1], 0, count, jnp.int32)
    logsnr, middle, after = levels[i], levels[i + 1], levels[i + 2]
    w = _spread(key_w, jnp.arange(len(x), dtype=jnp.float32), lo, hi)
    z = diffuse(x, jax.random.normal(key_noise, x.shape, jnp.float32), logsnr)

    def teacher(z: Array, logsnr: Array) -> Array:
        return check_output("teacher_fn", teacher_fn(z, logsnr, labels, w), z.shape)[0]

    target = jax.lax.stop_gradient(two_steps(teacher, z, logsnr, middle, after, clip=clip))
    x_student = x_from_eps(z, _student_eps(student_fn, z, logsnr, labels, w), logsnr)
    # ‖ε − ε̄‖² = e^λ ‖x̂ − x̃‖². In x, rounding near λ = −20 does not count.
    squared = jnp.exp(per_example(logsnr, z)) * jnp.square(x_student - target)
    return jnp.mean(_weighted(squared, weight, logsnr))


def two_steps(
    eps_fn: Callable[[Array, Array], Array],
    z: Float[Array, "b ..."],
    logsnr: Float[Array, "b"],
    middle: Float[Array, "b"],
    after: Float[Array, "b"],
    *,
    clip: bool = True,
) -> Float[Array, "b ..."]:
    """The x̃ with which one DDIM step from λ to λ'' goes where two go, by way of λ': λ < λ' < λ'' <= ∞.

    With κ = e^{λ/2} = α/σ, a DDIM step is z'/σ' = z/σ + (κ' − κ) x̃. Therefore x̃ is the mean of the two steps' own x̃,
    with the shares (κ' − κ) / (κ'' − κ) of the first and (κ'' − κ') / (κ'' − κ) of the second: the formula of Salimans
    and Ho (arXiv:2202.00512), Algorithm 2, without its difference of nearly equal numbers. λ'' = ∞ stands for the last
    step of sampling, which returns the second x̃ itself. With `clip`, both are clipped to [−1, 1], as when sampling.

    Raises ValueError unless clip is True or False.
    """
    check_switch("clip", clip)

    def data(z: Array, logsnr: Array) -> Array:
        x = x_from_eps(z, eps_fn(z, logsnr), logsnr)
        return jnp.clip(x, -1.0, 1.0) if clip else x

    first = data(z, logsnr)
    z_middle, _ = ddim()(z, first, per_example(logsnr, z), per_example(middle, z))
    second = data(z_middle, middle)
    share = per_example(jnp.expm1(0.5 * (middle - logsnr)) / jnp.expm1(0.5 * (after - logsnr)), z)
    return share * first + (1.0 - share) * second


def _spread(key: Key[Array, ""], rows: Float[Array, "b"], lo: float, hi: float) -> Float[Array, "b"]:
    """w in [lo, hi] with log(1 + w − lo) uniform, which any consecutive rows spread evenly."""
    golden = 0.5 * (math.sqrt(5.0) - 1.0)
    uniform = (jax.random.uniform(key, (), jnp.float32) + golden * rows) % 1.0
    return lo + jnp.expm1(uniform * math.log1p(hi - lo))


def _student_eps(student_fn: StudentFn, z: Array, logsnr: Array, labels: Any, w: Array) -> Array:
    return check_output("student_fn", student_fn(z, logsnr, labels, w), z.shape)[0]


def _weighted(squared: Array, weight: Callable[[Array], Array] | None, logsnr: Array) -> Array:
    return squared if weight is None else per_example(row_weights(weight, logsnr), squared) * squared


def _checked_range(weights: Sequence[float]) -> tuple[float, float]:
    remedy = "give the range of w as (lo, hi), two finite numbers >= -1"
    if np.ndim(weights) != 1 or len(weights) != 2:
        raise ValueError(f"weights is {weights}; {remedy}")
    lo, hi = (check_numbers("weights", end, lambda x: np.isfinite(x) & (x >= -1.0), remedy) for end in weights)
    if lo is not None and hi is not None and lo >= hi:
        raise ValueError(f"weights is {weights}; give the range of w as (lo, hi) with lo < hi")
    return weights[0], weights[1]
