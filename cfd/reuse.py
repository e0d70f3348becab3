"""When the guide is evaluated, and the difference of the two scores that stands for its score at the other steps.

At a step at which the guide rests, ε_g = ε_c − Δ, where Δ is that of the last step at which both were evaluated. Each
image has its own Δ and its own rests, and its guide is evaluated if that of any image in the batch is due. An image is
therefore the same in every batch, and what it costs is not.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from cfd.arguments import check_called, check_count, check_number, check_switch
from cfd.process import per_example

Number = int | float | np.number


class Reuse(NamedTuple):
    """After an evaluation, the guide rests for k − 1 steps if the cosine of the two scores is at least `cosine`.

    With `extrapolate`, Δ goes on linearly in λ, through those of the last two evaluations.
    """

    k: int
    cosine: float = -1.0
    extrapolate: bool = False


class Memory(NamedTuple):
    """The state of each image: the steps for which its guide still rests, and Δ at λ = `at` with its slope dΔ/dλ.

    `at` is infinite before the first evaluation. Without extrapolation, `slope` is None.
    """

    rest: Int[Array, "b"]
    delta: Float[Array, "b ..."]
    at: Float[Array, "b"]
    slope: Float[Array, "b ..."] | None


def every(k: Number) -> Reuse:
    """The guide at every k-th step; its difference stays as it is in between. k = 1 is plain guidance."""
    return Reuse(_count(k))


def extrapolated(k: Number) -> Reuse:
    """`every`, with a difference that goes on linearly in λ. At the second evaluation, its slope is known."""
    return Reuse(_count(k), extrapolate=True)


def similar(cosine: Number, k: Number) -> Reuse:
    """The guide at every k-th step while the two scores are similar, and at every step while they are not.

    They are similar if their cosine, over one image, is at least `cosine`. Castillo et al. (arXiv:2312.12487) then
    leave the second score out; here, the difference stays, and is measured again after k steps.
    """
    _check_cosine(cosine)
    return Reuse(_count(k), float(cosine))


def empty(reuse: Reuse, z: Float[Array, "b ..."]) -> Memory:
    """The memory before the first step, of which z is an example."""
    none = jnp.sum(0.0 * z, tuple(range(1, z.ndim)))  # inside a caller's `shard_map`, it varies as z does
    return Memory(none.astype(jnp.int32), 0.0 * z, none + jnp.inf, 0.0 * z if reuse.extrapolate else None)


def is_due(memory: Memory) -> Bool[Array, "b"]:
    """The images whose guide is to be evaluated."""
    return memory.rest <= 0


def waited(memory: Memory) -> Memory:
    """The memory after a step without guidance, at which neither score is mixed. The rests go on."""
    return memory._replace(rest=memory.rest - 1)


def rested(
    memory: Memory, eps_cond: Float[Array, "b ..."], logsnr: Float[Array, ""]
) -> tuple[Float[Array, "b ..."], Memory]:
    """The score that stands for the guide's at a step at which it rests, and the memory after that step."""
    delta = memory.delta
    if memory.slope is not None:
        since = jnp.where(jnp.isfinite(memory.at), logsnr - memory.at, 0.0)
        delta = delta + per_example(since, delta) * memory.slope
    return eps_cond - delta, waited(memory)


def evaluated(
    reuse: Reuse,
    memory: Memory,
    eps_cond: Float[Array, "b ..."],
    eps_guide: Float[Array, "b ..."],
    logsnr: Float[Array, ""],
) -> tuple[Float[Array, "b ..."], Memory]:
    """The guide's score and the memory after a step at which it was evaluated; images that are not due rest."""
    due, delta = is_due(memory), eps_cond - eps_guide
    standing, later = rested(memory, eps_cond, logsnr)
    norms = jnp.sqrt(_dot(eps_cond, eps_cond) * _dot(eps_guide, eps_guide))
    may_rest = (_dot(eps_cond, eps_guide) >= reuse.cosine * norms) | (reuse.cosine <= -1.0)
    slope = None
    if memory.slope is not None:
        twice = jnp.isfinite(memory.at)
        step = jnp.where(twice, logsnr - memory.at, 1.0)
        slope = per_example(jnp.where(twice, 1.0 / step, 0.0), delta) * (delta - memory.delta)
    now = Memory(
        jnp.where(may_rest, jnp.int32(reuse.k - 1), jnp.int32(0)),
        delta,
        0.0 * memory.rest.astype(jnp.float32) + logsnr,
        slope,
    )

    def chosen(ours: Array, theirs: Array) -> Array:
        return jnp.where(due.reshape(-1, *[1] * (ours.ndim - 1)), ours, theirs)

    kept = Memory(
        chosen(now.rest, later.rest),
        chosen(now.delta, later.delta),
        chosen(now.at, later.at),
        None if slope is None or later.slope is None else chosen(slope, later.slope),
    )
    return chosen(eps_guide, standing), kept


def evaluations(reuse: Reuse | None, steps: int) -> int:
    """Evaluations of the guide in that many guided steps; at most so many for `similar`, which depend on the images."""
    return steps if reuse is None or reuse.cosine > -1.0 else -(-steps // reuse.k)


def check_reuse(reuse: Any) -> None:
    """Raises ValueError unless `reuse` is of this file."""
    check_called("reuse", reuse)
    if not isinstance(reuse, Reuse):
        raise ValueError(f"reuse is {reuse!r}; give every(k), extrapolated(k) or similar(cosine, k), or None")
    check_count("k", reuse.k)
    check_switch("extrapolate", reuse.extrapolate)
    _check_cosine(reuse.cosine)


def _check_cosine(cosine: Any) -> None:
    check_number("cosine", cosine, lambda x: (x >= -1.0) & (x <= 1.0), "it is a cosine: give a number in [-1, 1]")


def _count(k: Number) -> int:
    return check_count("k", int(k) if isinstance(k, float | np.floating) and float(k).is_integer() else k)


def _dot(a: Array, b: Array) -> Float[Array, "b"]:
    return jnp.sum(a * b, tuple(range(1, a.ndim)))
