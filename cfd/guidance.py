"""Guidance: the null label, the label dropout that trains it, and the mix of two scores; also guidance by a classifier.

Ho and Salimans, Classifier-Free Diffusion Guidance (arXiv:2207.12598), Sections 3.2 and 3.1. w is the paper's weight:
w = 0 is the conditional model and w = −1 the unconditional one. Other code has a `guidance_scale` s = 1 + w.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Int, Key, PyTree, UInt32

from cfd.process import alpha_sigma, per_example

NULL_LABEL = -1
"""∅, the label of the unconditional model: "input zeros for the class identifier" (Section 3.2)."""


def drop_labels(
    key: Key[Array, ""] | UInt32[Array, "2"],
    labels: PyTree,
    p_uncond: Float[Array, ""] | float,
    null: PyTree = NULL_LABEL,
) -> PyTree:
    """The labels, each replaced by ∅ with probability p_uncond, independently: Algorithm 1, line 3.

    `labels` and `null` are as in `guided_sample`: int32 [B] and NULL_LABEL, or a pytree (text embeddings) and its ∅.
    Raises ValueError if p_uncond is a number outside [0, 1] or if labels share no batch axis. Unless p_uncond is a
    Python 0, also raises ValueError as `nulls_like` does.
    """
    number = isinstance(p_uncond, (int, float))
    if number and not 0.0 <= p_uncond <= 1.0:
        raise ValueError(f"p_uncond is {p_uncond}; it is a probability: give a value in [0, 1]")
    batch, labels = batch_size(labels), jax.tree.map(jnp.asarray, labels)
    if number and p_uncond == 0:
        return labels
    dropped = jax.random.bernoulli(key, p_uncond, (batch,))
    return jax.tree.map(
        lambda c, n: jnp.where(dropped.reshape(-1, *[1] * (c.ndim - 1)), n, c), labels, nulls_like(labels, null)
    )


def nulls_like(labels: PyTree, null: PyTree) -> PyTree:
    """One ∅ per label: `null`, which has no batch axis, repeated along the batch axis of `labels`.

    Raises ValueError if `null` does not have the structure and shape of one label, or if it is negative and labels are
    unsigned.
    """
    if jax.tree.structure(null) != jax.tree.structure(labels):
        raise ValueError(f"null is {null!r}; it must have the structure of labels, {jax.tree.structure(labels)}")

    def repeated(n: Any, c: Array) -> Array:
        if jnp.shape(n) != c.shape[1:]:
            raise ValueError(f"null has shape {jnp.shape(n)}; it must be that of one label, {c.shape[1:]}")
        if c.dtype.kind in "ub" and not isinstance(n, Tracer) and np.any(np.asarray(n) < 0):
            raise ValueError(f"null is {n!r}, which labels of dtype {c.dtype} cannot represent: give labels as int32")
        return jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape)

    return jax.tree.map(repeated, null, labels)


def batch_size(labels: PyTree) -> int:
    """The length B of the batch axis of a pytree of arrays [B, ...]. Raises ValueError if they do not share one."""
    leading = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(labels)}
    if len(leading) != 1 or leading == {()}:
        raise ValueError(
            f"labels have leading shapes {sorted(leading)}; give arrays that share one batch axis, [B, ...], such as "
            "jnp.array([0, 1])"
        )
    return leading.pop()[0]


def guide(
    eps_cond: Float[Array, "..."], eps_uncond: Float[Array, "..."], w: Float[Array, "*b"] | float
) -> Float[Array, "..."]:
    """ε̃ = (1 + w) ε(z, c) − w ε(z): Eq. 6. w is a scalar or [B]. The result is exact at w = 0 and at w = −1."""
    w = per_example(w, eps_cond)
    return (1.0 + w) * eps_cond - w * eps_uncond


class Interval(NamedTuple):
    """Guidance of weight w for logsnr_lo <= λ <= logsnr_hi, and no guidance outside.

    Kynkäänniemi et al., Applying Guidance in a Limited Interval (arXiv:2404.07724). All three fields are traced: new
    values never recompile. Outside the interval, the sampler evaluates the network once per step instead of twice.
    """

    w: Float[Array, "*b"] | float
    logsnr_lo: Float[Array, ""] | float
    logsnr_hi: Float[Array, ""] | float


def classifier_guidance(
    eps_fn: Callable[[Array, Array, Array], Array], classifier_fn: Callable[[Array, Array], Array], w: Any
) -> Callable[[Array, Array, Array], Array]:
    """The eps_fn of ε̃ = ε(z, c) − w σ ∇_z log p(c | z): Section 3.1; with `ddim()`, Algorithm 2 of arXiv:2105.05233.

    `classifier_fn(z, logsnr) -> logits [B, K]`. w is a number, an array (scalar or [B]), a function of λ [B] that
    returns either, or an `Interval`. The classifier is not evaluated at steps where w is 0 for all images. Images with
    the label ∅ are not guided.

    The result is an eps_fn like any other. Pass it to `guided_sample`, whose own w then adds classifier-free guidance.
    To guide an unconditional model, ignore the label:
    `lambda z, logsnr, c: eps_fn(z, logsnr, 0 * c - 1)`.

    The returned function raises ValueError if w has another shape, or is an `Interval` that contains no λ.
    """
    if isinstance(w, (int, float)) and w == 0:
        return eps_fn

    def guided(z: Array, logsnr: Array, labels: Array) -> Array:
        _, sigma = alpha_sigma(logsnr)
        return eps_fn(z, logsnr, labels) - per_example(sigma, z) * _weighted_gradient(
            classifier_fn, w, z, logsnr, labels
        )

    return guided


def shift_mean(
    sampler: Callable[[Array, Array, Array, Array], tuple[Array, Array | None]],
    classifier_fn: Callable[[Array, Array], Array],
    labels: Int[Array, "b"],
    w: Any,
) -> Callable[[Array, Array, Array, Array], tuple[Array, Array]]:
    """The step rule `sampler` with its mean shifted by w Σ ∇_z log p(c | z): Algorithm 1 of arXiv:2105.05233.

    `sampler` is `ancestral(v)` and Σ its variance. The other arguments are as in `classifier_guidance`. The shift is
    applied after x̃ is clipped. `classifier_guidance` shifts the same mean by (1 − e^{λ−λ'}) (α'/α) σ² w ∇. That shift
    is larger by α'/α at v = 1 and by (α/α') e^{λ'−λ} at v = 0. The two agree in the limit of small steps.

    Raises ValueError if `sampler` is not a step rule that adds noise.
    """

    if not callable(sampler):
        raise ValueError(f"sampler is {sampler!r}; it must be a step rule that adds noise: give ancestral(v)")

    def step(z: Array, x: Array, logsnr: Array, logsnr_next: Array) -> tuple[Array, Array]:
        mean, std = sampler(z, x, logsnr, logsnr_next)
        if std is None:
            raise ValueError("the sampler adds no noise, so there is no Σ to shift by: use classifier_guidance")
        logsnr = jnp.broadcast_to(logsnr, labels.shape)
        return mean + jnp.square(std) * _weighted_gradient(classifier_fn, w, z, logsnr, labels), std

    return step


def class_gradient(
    classifier_fn: Callable[[Array, Array], Array],
    z: Float[Array, "b ..."],
    logsnr: Float[Array, "b"],
    labels: Int[Array, "b"],
) -> Float[Array, "b ..."]:
    """∇_z log p(c | z), with the shape of z. It is 0 for images whose label is ∅."""

    def log_p(z: Array) -> Array:
        log_probs = jax.nn.log_softmax(classifier_fn(z, logsnr))
        chosen = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
        return jnp.sum(jnp.where(labels >= 0, chosen, 0.0))

    return jax.grad(log_p)(z)


def _weighted_gradient(
    classifier_fn: Callable[[Array, Array], Array],
    w: Any,
    z: Float[Array, "b ..."],
    logsnr: Float[Array, "b"],
    labels: Int[Array, "b"],
) -> Float[Array, "b ..."]:
    """w ∇_z log p(c | z). The classifier is not evaluated if all weights are 0."""
    weight = _weight_at(w, logsnr)
    gradient = jax.lax.cond(
        jnp.any(weight != 0), lambda: class_gradient(classifier_fn, z, logsnr, labels), lambda: jnp.zeros_like(z)
    )
    return per_example(weight, z) * gradient


def check_interval(interval: Interval) -> None:
    """Raises ValueError if the interval contains no λ. Traced ends are not checked."""
    numbers = all(isinstance(end, (int, float)) for end in interval[1:])
    if numbers and not interval.logsnr_lo <= interval.logsnr_hi:
        raise ValueError(f"w is {interval}, which contains no λ: give logsnr_lo <= logsnr_hi")


def _weight_at(w: Any, logsnr: Float[Array, "b"]) -> Float[Array, "b"]:
    if isinstance(w, Interval):
        check_interval(w)
        w = jnp.where((logsnr >= w.logsnr_lo) & (logsnr <= w.logsnr_hi), w.w, 0.0)
    weight = jnp.asarray(w(logsnr) if callable(w) else w, jnp.float32)
    if weight.shape not in ((), logsnr.shape):
        raise ValueError(f"w has shape {weight.shape}; give a scalar or one weight per image, shape {logsnr.shape}")
    return jnp.broadcast_to(weight, logsnr.shape)


def without_null(eps_fn: Callable[[Array, Array, Array], Array]) -> Callable[[Array, Array, Array], Array]:
    """`eps_fn`, guarded against the label ∅, for a model that was never trained without a label (p_uncond = 0).

    ADM's published models are of this kind. The guarded function raises ValueError if a concrete label is ∅. Under
    `jit`, labels are not known; rows of ∅ then come out as NaN instead of an image from an untrained embedding.
    """

    def guarded(z: Array, logsnr: Array, labels: Array) -> Array:
        if not isinstance(labels, Tracer) and np.any(np.asarray(labels) < 0):
            raise ValueError(
                "this model was always trained with a label (p_uncond = 0), so it has no unconditional score: sample "
                "with a plain w = 0, or use classifier_guidance"
            )
        eps = eps_fn(z, logsnr, labels)
        return jnp.where((labels >= 0).reshape(-1, *[1] * (eps.ndim - 1)), eps, jnp.nan)

    return guarded
