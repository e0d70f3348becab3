"""Sampling with classifier-free guidance: Algorithm 2 of Ho and Salimans (arXiv:2207.12598).

Importing this module is cheap: it pulls in jax, and nothing of the trainer, the data pipeline or the checkpoints.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Key, PyTree, Real, UInt32

from cfd import steps
from cfd.arguments import (
    EPS_FN,
    check_called,
    check_function,
    check_output,
    check_returned,
    check_shape,
    check_switch,
    if_traced,
    image_keys,
    is_zero,
    warn_of_wrong_rows,
)
from cfd.attributes import check_trained, is_student, joint_scores
from cfd.guidance import (
    NULL_LABEL,
    Interval,
    batch_size,
    check_reached,
    check_student_weight,
    check_weight,
    nulls_like,
    weight_at,
    weight_of,
)
from cfd.guidance import guide as linear_mix
from cfd.process import alpha_sigma, x_from_eps
from cfd.reuse import Reuse, check_reuse, empty, evaluated, is_due, rested, waited
from cfd.steps import (
    Langevin,
    LearnedVariance,
    SecondOrder,
    StepRule,
    ancestral,
    ddim,
    dpm_solver,
    euler_maruyama,
    grid,
    hold,
    is_grid,
    known_levels,
    schedule,
    sde_dpm_solver,
)

EpsFn = Callable[..., Any]
"""(z [B, ...], logsnr [B], labels [B]) -> eps [B, ...], or the pair (eps, v), both [B, ...], with a learned variance.

It may say the range of λ on which it was trained, by an attribute `logsnr_range = (lo, hi)`. `guided_sample` then
refuses to evaluate it outside. With an attribute `weight_range = (lo, hi)`, it is a student, which takes the guidance
weight as a fourth input, float32 [B], and is evaluated once per step. An attribute `scores` gives the scores of two
labels in one call (`cfd.attributes`); the sampler then asks for both at once.
"""

__all__ = [
    "EpsFn",
    "Langevin",
    "SecondOrder",
    "StepRule",
    "ancestral",
    "ddim",
    "dpm_solver",
    "euler_maruyama",
    "grid",
    "guided_sample",
    "hold",
    "schedule",
    "sde_dpm_solver",
]


def guided_sample(
    key: Key[Array, "*b"] | UInt32[Array, "*b 2"] | UInt32[Array, "*b 4"],
    eps_fn: EpsFn,
    labels: PyTree,
    shape: tuple[int, ...],
    *,
    w: Any = 0.0,
    null: PyTree = NULL_LABEL,
    guide: EpsFn | None = None,
    rule: Any = None,
    reuse: Reuse | None = None,
    num_steps: SupportsIndex | Sequence[float] | Real[ArrayLike, "..."] = 256,
    sampler: StepRule | LearnedVariance | SecondOrder = ancestral(v=0.3),
    corrector: Langevin | None = None,
    logsnr_min: Real[ArrayLike, ""] = -20.0,
    logsnr_max: Real[ArrayLike, ""] = 20.0,
    clip: bool | Callable[[Array], Array] = True,
    start: Array | None = None,
    trajectory: bool = False,
    doubled: bool = False,
) -> Any:
    """Draw one image per label with guidance weight w: Algorithm 2, Ho and Salimans. Pure: jit, vmap or shard_map it.

    Args:
      key: one PRNG key, from which image i takes `fold_in(key, i)`, or [B] keys, one per image. A key of "rbg" draws as
        the threefry key of its seed does. Inside `shard_map` and `pmap`, i is the row on its own device: with one
        replicated key, all devices draw the same noise. There, the key, the labels or w must vary over every mesh axis
        over which the result of eps_fn varies. A mesh for `jit` needs Auto axes.
      eps_fn: `(z, logsnr, labels) -> eps`, or -> (eps, v). `ancestral(v=None)` needs v, and no other sampler uses it.
      labels: int32 [B], or any pytree of arrays with a leading batch axis.
      shape: the shape of one image, without the batch axis: integers >= 1. A number n means (n,).
      w: the guidance weight of Eq. 6: a number, an array (scalar or [B]), a function of λ that returns either, or
        an `Interval`. It is traced: a new value never recompiles. A concrete scalar 0, such as 0.0 or np.float32(0),
        costs one network evaluation per step instead of two. The weights of a function are not checked: where they are
        NaN, so are the images. A student (`EpsFn`) is evaluated once per step with its w, which is 0 outside of an
        `Interval`; numbers outside of its range are refused.
      null: the label ∅ of the unconditional score, with the structure and shape of one label, or one for each label.
        Another class in its place guides away from that class. It is not used if w is a concrete 0.
      guide: the eps_fn that guidance leads away from, given the same labels: a smaller or less trained network, which
        is autoguidance (arXiv:2406.02507), or a closure over the same weights with dropout or fewer blocks, or one
        that chooses by λ. By default, it is eps_fn with the label ∅: classifier-free guidance. It is evaluated exactly
        where the unconditional score would be. It takes no `null`.
      rule: how the two scores become one, such as `cfd.rules.apg(...)`, or any value with the functions of
        `cfd.rules.Rule`; by default, Eq. 6. A rule gets both scores at every step, or at those inside an `Interval`,
        whatever w is.
      reuse: the steps at which the guide's score is evaluated, such as `cfd.reuse.every(2)`; at the others, it follows
        from the difference of the two scores at the last such step. By default, it is evaluated at every step.
      num_steps: T, the number of steps from λ_1 = logsnr_min to λ_T = logsnr_max; or the grid itself, [T], rising: the
        λ at which the network is evaluated. A grid may be traced. The ends below are then not used.
      sampler: the step rule: `ancestral(v)`, `ddim(eta)`, `dpm_solver()`, `sde_dpm_solver(v)`, or another of
        `cfd.steps`. `ancestral(v=None)` takes the v that eps_fn returns for the label; its v for ∅ and that of `guide`
        are not used.
      corrector: `Langevin(c, steps)` corrects z at each λ before the step's own evaluation. It uses the guide and the
        rule of the sampler, and its own w if it has one. It does not clip x̃. The state of a rule advances only at the
        step's own evaluation.
      logsnr_min, logsnr_max: the first and the last λ, in [−80, 80].
      clip: clip x̃ to [−1, 1] at every step; or a function of x̃, such as `cfd.rules.dynamic_threshold(99.5)`.
      start: z [B, *shape] at the first λ, in place of the key's noise. The noise of the steps stays that of the key.
        `diffuse(x, eps, logsnr_min)` starts from images x: with another label and w > 0, this edits them.
      trajectory: also return x̃ of every step, as `clip` leaves it: the predictions of the image. They take T times the
        memory of the images.
      doubled: evaluate both scores in one batch of 2B instead of two batches of B. The images are the same up to
        rounding. It needs one network for both, so no `guide`.

    Returns: float32 [B, *shape]; with `trajectory`, the pair of that and x̃, float32 [T, B, *shape].

    Raises: ValueError on concrete numbers out of range, on labels that a cast would change, on λ outside the
    `logsnr_range` of eps_fn, on an Interval that no step falls into, on arguments of another kind or whose shapes do
    not agree, and on a student with a null, a guide, a rule, a reuse or doubled.
    """
    batch, shape = batch_size(labels), check_shape(shape)
    check_switch("trajectory", trajectory)
    check_switch("doubled", doubled)
    warn_of_wrong_rows(2 * batch if doubled else batch)
    check_weight(w, batch)
    levels = schedule(num_steps, logsnr_min, logsnr_max)
    ends = (num_steps[0], num_steps[-1]) if is_grid(num_steps) else (logsnr_min, logsnr_max)  # pyright: ignore
    for network in filter(None, (eps_fn, guide)):
        check_trained(network, *ends)
    if guide is not None and is_student(guide):
        raise ValueError("guide is a student, whose score depends on w: give the network that it learned from")
    if doubled and guide is not None:
        raise ValueError("doubled evaluates one network on both labels, and guide is another network: leave one out")
    if null is not NULL_LABEL and guide is not None:
        raise ValueError(
            f"null is {null!r}, and guide, which takes the place of eps_fn with that label, is given the same labels: "
            "leave one out, or give a guide that ignores its label, lambda z, logsnr, _: guide(z, logsnr, other)"
        )
    known = known_levels(num_steps, logsnr_min, logsnr_max)
    check_reached(w, known)
    labels = jax.tree.map(jnp.asarray, labels)
    keys = image_keys(key, batch)
    _check_functions(rule, clip, eps_fn=eps_fn, guide=guide)
    if reuse is not None:
        check_reuse(reuse)
        reuse = None if reuse.k == 1 else reuse
    step_rule = steps.with_v(steps.rule_of(sampler))
    guided_eps = _guided(eps_fn, guide, rule, reuse, labels, null, w, batch, doubled)
    if corrector is not None:
        steps.check_corrector(corrector)
        own_w = w if corrector.w is None else corrector.w
        check_weight(own_w, batch)
        check_reached(own_w, known)
        corrector_eps = _guided(eps_fn, guide, rule, reuse, labels, null, own_w, batch, doubled)
    if start is not None:
        expected = f"it is z at the first λ: give float32 of shape {(batch, *shape)}"
        if not isinstance(start, Array | np.ndarray | list | tuple):
            raise ValueError(f"start is {start!r}; {expected}")
        start = jnp.asarray(start)
        if start.shape != (batch, *shape) or not jnp.issubdtype(start.dtype, jnp.floating):
            raise ValueError(f"start has dtype {start.dtype} and shape {start.shape}; {expected}")
    # The last λ' is never reached. A step of zero length there would make the gradients of some rules NaN.
    levels_next = jnp.concatenate([levels[1:], levels[-1:] + 1.0])
    reach = steps.reach(levels, levels_next) if isinstance(sampler, SecondOrder) else None

    def threshold(x: Array) -> Array:
        if not callable(clip):
            return jnp.clip(x, -1.0, 1.0) if clip else x
        clipped = clip(x)
        check_returned("clip", clipped, x.shape, "x̃ after its threshold")
        return clipped.astype(jnp.float32)

    def unguided_memory(state: Any) -> Any:
        return () if reuse is None else waited(state[1])

    def noise(*at: Array | int) -> Array:
        def of_image(key: Array) -> Array:
            return jax.random.normal(functools.reduce(jax.random.fold_in, at, key), shape, jnp.float32)

        return jax.vmap(of_image)(keys)

    # The second is the memory of `reuse` after a step at which the sampler itself is not guided.
    correct = (
        (lambda z, t, logsnr, state: (z, unguided_memory(state)))
        if corrector is None
        else _correction(corrector, corrector_eps, noise, unguided_memory)
    )

    def step(carry: tuple[Array, Array, Any], at: tuple[Array, Array, Array, Any]) -> tuple[Any, Any]:
        (z, x_before, state), (t, logsnr, logsnr_next, reach) = carry, at
        z, memory = correct(z, t, logsnr, state)
        z, eps, v, state = guided_eps(z, logsnr, state, memory)
        x = threshold(x_from_eps(z, eps, logsnr))
        x_middle = x if reach is None else x + reach * (x - x_before)
        mean, std = steps.checked_step(step_rule(z, x_middle, logsnr, logsnr_next, v), z)
        z_next = mean if std is None else mean + std * noise(t)
        return (jnp.where(t == len(levels), x, z_next), x, state), x if trajectory else None

    z = _varying_like(noise(0) if start is None else start.astype(jnp.float32), labels, w, corrector)
    state = () if rule is None else rule.init(z), () if reuse is None else empty(reuse, z)
    (z, *_), xs = jax.lax.scan(step, (z, z, state), (jnp.arange(1, len(levels) + 1), levels, levels_next, reach))
    return (z, xs) if trajectory else z


def _correction(corrector: Langevin, eps_of: Any, noise: Any, unguided_memory: Any) -> Callable[..., Any]:
    """The function (z, t, λ, state) -> (z, memory of `reuse`) that takes the steps of a corrector."""
    c = jnp.asarray(corrector.c, jnp.float32)

    def correct(z: Array, t: Array, logsnr: Array, state: Any) -> tuple[Array, Any]:
        sigma, memory = alpha_sigma(logsnr)[1], unguided_memory(state)

        def langevin(k: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            z, _ = carry
            # If a rule moves z, the score follows from the x̃ that its z and ε imply: σ ε = z − α x̃.
            moved, eps, _, (_, after) = eps_of(z, logsnr, state, memory)
            return z - c * (z - moved + sigma * eps) + sigma * jnp.sqrt(2.0 * c) * noise(t, 1 + k), after

        return jax.lax.fori_loop(0, operator.index(corrector.steps), langevin, (z, memory))

    return correct


def _check_functions(rule: Any, clip: Any, **networks: Any) -> None:
    """Raises ValueError for a rule without its functions, for a clip of another kind, and for what is no network."""
    for name, network in networks.items():
        if network is not None or name == "eps_fn":
            check_function(name, network, EPS_FN)
    check_called("rule", rule)
    check_called("clip", clip)
    if rule is not None and not (callable(getattr(rule, "init", None)) and callable(getattr(rule, "mix", None))):
        raise ValueError(f"rule is {rule!r}; give the result of a function of cfd.rules, such as cfgpp(), or None")
    if not (callable(clip) or isinstance(clip, bool | np.bool_)):
        wanted = "give True, False, or a function of x̃, such as dynamic_threshold(99.5)"
        raise ValueError(f"clip is {clip!r}; {wanted}{if_traced(clip)}")


def _guided(
    eps_fn: EpsFn,
    guide: EpsFn | None,
    rule: Any,
    reuse: Reuse | None,
    labels: PyTree,
    null: PyTree,
    w: Any,
    batch: int,
    doubled: bool,
) -> Callable[[Array, Array, Any, Any], tuple[Array, Array, Array | None, Any]]:
    """The function (z, λ, state, memory) -> (z, ε̃, v, state) of one or two networks.

    The state is that of the rule, and the memory of `reuse`. Where no guide is due by w, `memory` becomes its memory.
    """
    student = is_student(eps_fn)
    if student:
        second = {"null": null is not NULL_LABEL, "guide": guide is not None, "rule": rule is not None}
        check_student_weight(eps_fn, w, reuse=reuse is not None, doubled=doubled, **second)
    unguided = rule is None and not isinstance(w, Interval) and is_zero(w)
    joint = None if guide is not None or doubled else joint_scores(eps_fn)
    one_score = student or unguided or guide is not None
    guide_labels = labels if one_score and null is NULL_LABEL else nulls_like(labels, null, batched=True)

    def evaluate(network: EpsFn, z: Array, logsnr: Array, *inputs: PyTree) -> tuple[Array, Array | None]:
        output = network(z, jnp.broadcast_to(logsnr, z.shape[:1]), *inputs)
        return check_output("eps_fn" if network is eps_fn else "guide", output, z.shape)

    def one(z: Array, logsnr: Array, state: Any, memory: Any) -> tuple[Array, Array, Array | None, Any]:
        return z, *evaluate(eps_fn, z, logsnr, labels), (state[0], memory)

    def scores(z: Array, logsnr: Array) -> tuple[tuple[Array, Array | None], Array]:
        if joint is not None:
            pair = joint(z, jnp.broadcast_to(logsnr, z.shape[:1]), labels, guide_labels)
            given, null_given = (check_output("scores of eps_fn", output, z.shape) for output in pair)
            return given, null_given[0]
        if not doubled:
            return evaluate(eps_fn, z, logsnr, labels), evaluate(guide or eps_fn, z, logsnr, guide_labels)[0]
        # The two rows of a pair are adjacent, so that a sharded batch keeps both on one device.
        z_pairs, label_pairs = jax.tree.map(_interleave, (z, labels), (z, guide_labels))
        pairs = evaluate(eps_fn, z_pairs, logsnr, label_pairs)
        eps, v = jax.tree.map(lambda a: a.reshape(batch, 2, *z.shape[1:]), pairs)
        return (eps[:, 0], None if v is None else v[:, 0]), eps[:, 1]

    def remembered(z: Array, logsnr: Array, memory: Any) -> tuple[tuple[Array, Array | None], Array, Any]:
        if reuse is None:
            return *scores(z, logsnr), memory
        remember = functools.partial(evaluated, reuse)

        def fresh(z: Array, memory: Any) -> Any:
            (eps_cond, v), eps_guide = scores(z, logsnr)
            return (eps_cond, v), *remember(memory, eps_cond, eps_guide, logsnr)

        def resting(z: Array, memory: Any) -> Any:
            eps_cond, v = evaluate(eps_fn, z, logsnr, labels)
            return (eps_cond, v), *rested(memory, eps_cond, logsnr)

        return jax.lax.cond(jnp.any(is_due(memory)), fresh, resting, z, memory)

    def both(z: Array, logsnr: Array, state: Any, weight: Any) -> tuple[Array, Array, Array | None, Any]:
        weight = jnp.asarray(weight, jnp.float32)
        mixing, memory = state
        (eps_cond, v), eps_guide, memory = remembered(z, logsnr, memory)
        if rule is None:
            return z, linear_mix(eps_cond, eps_guide, weight), v, (mixing, memory)
        mixed = rule.mix(z, eps_cond, eps_guide, logsnr, weight, mixing)
        if not isinstance(mixed, tuple) or len(mixed) != 3:
            raise ValueError("rule.mix returned no triple; it must return (z, ε̃, state)")
        for array in mixed[:2]:
            check_returned("rule.mix", array, z.shape, "(z, ε̃, state), z and ε̃ each")
        return *(array.astype(jnp.float32) for array in mixed[:2]), v, (mixed[2], memory)

    if student:
        return lambda z, logsnr, state, _: (z, *evaluate(eps_fn, z, logsnr, labels, weight_at(w, logsnr, batch)), state)
    if isinstance(w, Interval):
        return lambda z, logsnr, state, memory: jax.lax.cond(
            w.contains(logsnr),
            lambda z, state, _: both(z, logsnr, state, w.w),
            lambda z, state, memory: one(z, logsnr, state, memory),
            z,
            state,
            memory,
        )
    if callable(w):
        return lambda z, logsnr, state, _: both(z, logsnr, state, weight_of(w, logsnr, batch))
    if unguided:
        return one
    return lambda z, logsnr, state, _: both(z, logsnr, state, w)


def _interleave(a: Array, b: Array) -> Array:
    """The rows of two arrays [B, ...] in turn, [2B, ...]: a_0, b_0, a_1, b_1, ..."""
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


def _varying_like(z: Array, *inputs: PyTree) -> Array:
    """z. Inside a caller's `shard_map`, it is marked as varying over the same mesh axes as the inputs.

    `scan` requires the carry to have the same type on entry and exit, and noise drawn from a replicated key does not
    vary over devices.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return z
    for x in jax.tree.leaves(inputs):
        z = z if callable(x) else jnp.where(True, z, jnp.sum(jnp.ravel(x)[:1]).astype(z.dtype))
    return z
