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
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Key, PyTree, Real, UInt32

from cfd.arguments import (
    EPS_FN,
    check_called,
    check_function,
    check_number,
    check_numbers,
    check_output,
    check_representable,
    check_returned,
    check_same_shape,
    concrete,
    is_zero,
    known_labels,
    threefry,
)
from cfd.attributes import check_student, declared, is_student, trained_range
from cfd.process import alpha_sigma, eps_from_x, per_example, x_from_eps
from cfd.steps import LearnedVariance, SecondOrder, StepRule, rule_of

NULL_LABEL = -1
"""∅, the label of the unconditional model: "input zeros for the class identifier" (Section 3.2)."""


def drop_labels(
    key: Key[Array, ""] | UInt32[Array, "2"] | UInt32[Array, "4"],
    labels: PyTree,
    p_uncond: Real[ArrayLike, "*b"],
    null: PyTree = NULL_LABEL,
) -> PyTree:
    """The labels, each replaced by ∅ with probability p_uncond, independently: Algorithm 1, line 3.

    `labels` and `null` are as in `guided_sample`: int32 [B] and NULL_LABEL, or a pytree (text embeddings) and its ∅.
    p_uncond is a scalar or [B]. The key is as in `threefry`.

    Raises ValueError if a concrete p_uncond is outside [0, 1], if it has another shape, or if labels share no batch
    axis. Unless p_uncond is a concrete 0, also raises ValueError as `nulls_like` does.
    """
    check_numbers(
        "p_uncond", p_uncond, lambda p: (p >= 0.0) & (p <= 1.0), "it is a probability: give a value in [0, 1]"
    )
    batch, labels = batch_size(labels), jax.tree.map(jnp.asarray, labels)
    if (shape := jnp.asarray(p_uncond).shape) not in ((), (batch,)):
        raise ValueError(f"p_uncond has shape {shape}; give a scalar, or shape ({batch},)")
    if is_zero(p_uncond):
        return labels
    dropped = jax.random.bernoulli(threefry(key), jnp.asarray(p_uncond, jnp.float32), (batch,))
    return jax.tree.map(
        lambda c, n: jnp.where(dropped.reshape(-1, *[1] * (c.ndim - 1)), n, c), labels, nulls_like(labels, null)
    )


def nulls_like(labels: PyTree, null: PyTree, *, batched: bool = False) -> PyTree:
    """One ∅ per label: `null`, repeated along the batch axis of `labels`. If `batched`, it may have one of its own.

    Raises ValueError if `null` does not have the structure and shape of one label, or if the dtype of the labels cannot
    represent it: −1 as uint8, 0.5 as int32, a traced floating number as int32.
    """
    if jax.tree.structure(null) != jax.tree.structure(labels):
        raise ValueError(f"null is {null!r}; it must have the structure of labels, {jax.tree.structure(labels)}")

    def repeated(n: Any, c: Array) -> Array:
        if jnp.shape(n) != c.shape[1:] and not (batched and jnp.shape(n) == c.shape):
            of_all = f", or of all, {c.shape}" if batched else ""
            raise ValueError(f"null has shape {jnp.shape(n)}; it must be that of one label, {c.shape[1:]}{of_all}")
        number = concrete(n)
        if number is None:
            fits = not jnp.issubdtype(jnp.result_type(n), jnp.floating)
        else:
            with np.errstate(invalid="ignore"):  # a cast of NaN
                fits = number.dtype.kind not in "OSU" and np.array_equal(number.astype(c.dtype), number)
        if c.dtype.kind in "iub" and not fits:
            raise ValueError(
                f"null is {n!r}, which labels of dtype {c.dtype} cannot represent: give an integer, and labels as int32"
            )
        return jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape)

    return jax.tree.map(repeated, null, labels)


def batch_size(labels: PyTree) -> int:
    """The length B of the batch axis of a pytree of arrays [B, ...].

    Raises ValueError if they do not share one, and as `check_representable` does.
    """
    check_representable(labels)
    leading = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(labels)}
    if len(leading) != 1 or leading == {()}:
        raise ValueError(
            f"labels have leading shapes {sorted(leading)}; give arrays that share one batch axis, [B, ...], such as "
            "jnp.array([0, 1])"
        )
    return leading.pop()[0]


def guide(
    eps_cond: Float[Array, "..."], eps_uncond: Float[Array, "..."], w: Real[ArrayLike, "*b"]
) -> Float[Array, "..."]:
    """ε̃ = (1 + w) ε(z, c) − w ε(z): Eq. 6. w is a scalar or [B]. The result is exact at w = 0 and at w = −1.

    Raises ValueError if a concrete w is not finite, and if the two scores have different shapes.
    """
    check_weight(w)
    check_same_shape(eps_cond=eps_cond, eps_uncond=eps_uncond)
    if callable(w) or isinstance(w, Interval):
        raise ValueError(f"w is {w}; this is the mix at one λ: give its weight there, a number or one per row")
    w = per_example(w, eps_cond)
    return (1.0 + w) * eps_cond - w * eps_uncond


def guided(
    eps_fn: Callable[..., Any], labels: PyTree, w: Any, null: PyTree = NULL_LABEL
) -> Callable[[Array, Array], Array]:
    """The field (z [B, ...], λ) -> ε̃ of Eq. 6 for these labels. The arguments are as in `guided_sample`.

    A concrete scalar 0 as w costs one evaluation of eps_fn, and every other w two, outside of an `Interval` too. A
    student always costs one.
    """
    check_function("eps_fn", eps_fn, EPS_FN)
    batch = batch_size(labels)
    check_weight(w, batch)
    student = is_student(eps_fn)
    if student:
        check_student_weight(eps_fn, w, null=null is not NULL_LABEL)
    labels = jax.tree.map(jnp.asarray, labels)
    unguided = student or (not isinstance(w, Interval) and is_zero(w))
    nulls = None if unguided and null is NULL_LABEL else nulls_like(labels, null, batched=True)

    def evaluate(z: Array, logsnr: Array, *inputs: PyTree) -> Array:
        return check_output("eps_fn", eps_fn(z, jnp.broadcast_to(logsnr, z.shape[:1]), *inputs), z.shape)[0]

    def field(z: Array, logsnr: Array) -> Array:
        eps = evaluate(z, logsnr, labels, *([weight_at(w, logsnr, batch)] if student else []))
        if unguided:
            return eps
        weight = w.w if isinstance(w, Interval) else weight_of(w, logsnr, batch) if callable(w) else w
        weight = jnp.asarray(weight, jnp.float32)
        if isinstance(w, Interval):
            weight = jnp.where(w.contains(logsnr), weight, 0.0)
        return guide(eps, evaluate(z, logsnr, nulls), weight)

    return field


class Interval(NamedTuple):
    """Guidance of weight w for logsnr_lo <= λ <= logsnr_hi, and no guidance outside.

    Kynkäänniemi et al., Applying Guidance in a Limited Interval (arXiv:2404.07724). All three fields are traced: new
    values never recompile. Outside the interval, the sampler evaluates the network once per step instead of twice.

    `guided_sample`, `flow` and `log_likelihood` refuse an interval that none of their λ falls into. Everywhere else,
    such an interval means no guidance.
    """

    w: Real[ArrayLike, "*b"]
    logsnr_lo: Real[ArrayLike, ""]
    logsnr_hi: Real[ArrayLike, ""]

    def contains(self, logsnr: Float[Array, "*t"]) -> Bool[Array, "*t"]:
        """Whether each λ lies in the interval, whose ends belong to it."""
        lo, hi = jnp.asarray(self.logsnr_lo, jnp.float32), jnp.asarray(self.logsnr_hi, jnp.float32)
        return (logsnr >= lo) & (logsnr <= hi)


def check_weight(w: Any, batch: int | None = None) -> None:
    """Raises ValueError for a concrete weight that is not finite, or for an `Interval` that contains no λ.

    w is as in `guided_sample`. If `batch` is given, w must be a scalar or have the shape [batch]. The numbers of traced
    arrays and of functions are not checked.
    """
    check_called("w", w)
    weight = w.w if isinstance(w, Interval) else w
    if isinstance(w, Interval) and callable(weight):
        raise ValueError(
            f"w is {w}; give numbers, or, for a function of λ, the function alone, with values of 0 outside"
        )
    check_numbers("w", weight, np.isfinite, "give guidance weights that are finite in float32")
    if not callable(weight) and batch is not None and (shape := jnp.asarray(weight).shape) not in ((), (batch,)):
        raise ValueError(f"w has shape {shape}; give a scalar or one weight per label, shape ({batch},)")
    if isinstance(w, Interval):
        remedy = "give logsnr_lo <= logsnr_hi, two numbers"
        lo, hi = (
            check_number(f"w is {w}: {name}", end, lambda x: ~np.isnan(x), remedy)
            for name, end in (("logsnr_lo", w.logsnr_lo), ("logsnr_hi", w.logsnr_hi))
        )
        if lo is not None and hi is not None and lo > hi:
            raise ValueError(f"w is {w}, which contains no λ: {remedy}")


def check_reached(w: Any, levels: np.ndarray | None) -> None:
    """Raises ValueError if w is an `Interval` that none of these λ falls into. None, and traced ends, pass."""
    bounds = (concrete(w.logsnr_lo), concrete(w.logsnr_hi)) if isinstance(w, Interval) else (None, None)
    if levels is None or bounds[0] is None or bounds[1] is None:
        return
    distance = np.maximum(bounds[0] - levels, levels - bounds[1])
    if distance.min() > 1e-4:  # more than the rounding of λ in float32
        raise ValueError(
            f"w is {w}, and none of the {len(levels)} steps falls into the interval: nothing is guided. The nearest "
            f"step is at λ = {levels[distance.argmin()]:.6g}: widen the interval, or take more steps"
        )


def weight_of(w: Callable[[Array], Any], logsnr: Float[Array, "*t"], batch: int) -> Any:
    """w(λ), a scalar or [B], of a function. Raises ValueError if it returns anything else, and as `check_weight`."""
    weight = w(logsnr)
    if callable(weight) or isinstance(weight, Interval):
        raise ValueError(f"w is a function that returned {weight}; it must return the weight at λ, a number or [B]")
    check_weight(weight, batch)
    return weight


def check_student_weight(eps_fn: Callable[..., Any], w: Any, **others: bool) -> None:
    """`check_student` of a w as in `guided_sample`."""
    interval = isinstance(w, Interval)
    check_student(eps_fn, w.w if interval else w, often_zero=interval, **others)


def weight_at(w: Any, logsnr: Float[Array, "*t"], batch: int) -> Float[Array, "b"]:
    """The weight of each image at λ, a scalar or [B], of a w as in `guided_sample`. Outside of an `Interval`, it is 0.

    Raises ValueError as `check_weight` does.
    """
    if isinstance(w, Interval):
        w = jnp.where(w.contains(logsnr), jnp.asarray(w.w, jnp.float32), 0.0)
    if callable(w):
        w = weight_of(w, logsnr, batch)
    check_weight(w, batch)
    return jnp.broadcast_to(jnp.asarray(w, jnp.float32), (batch,))


def classifier_guidance(
    eps_fn: Callable[..., Any], classifier_fn: Callable[[Array, Array], Array], w: Any
) -> Callable[[Array, Array, Array], Any]:
    """The eps_fn of ε̃ = ε(z, c) − w σ ∇_z log p(c | z): Section 3.1; with `ddim()`, Algorithm 2 of arXiv:2105.05233.

    `classifier_fn(z, logsnr) -> logits [B, K]`. w is a number, an array (scalar or [B]), a function of λ [B] that
    returns either, or an `Interval`. The classifier is not evaluated at steps where w is 0 for all images. Images with
    the label ∅ are not guided.

    The result is an eps_fn like any other. Pass it to `guided_sample`, whose own w then adds classifier-free guidance.
    To guide an unconditional model, ignore the label:
    `lambda z, logsnr, c: eps_fn(z, logsnr, 0 * c - 1)`. A v that eps_fn returns with ε stays as it is.

    With `guided_sample(clip=True)`, x̃ is clipped after the shift of ε. ADM's code clips before it, and not again:
    `guided_sample(key, classifier_guidance(clipped(eps_fn), classifier_fn, w), ..., clip=False)`.

    Raises ValueError as `check_weight` does, and for a student. The returned function raises ValueError if w has
    another shape, and as `class_gradient` does. It has the `logsnr_range` of eps_fn, and of classifier_fn if w is the
    same for all λ.
    """
    check_weight(w)
    check_function("eps_fn", eps_fn, EPS_FN)
    check_function("classifier_fn", classifier_fn, "(z, logsnr) -> logits")
    if is_student(eps_fn):
        raise ValueError(
            "eps_fn is a student, which is guided by its input w without a classifier: give its w to guided_sample, or "
            "give the network that the student learned from"
        )
    if not isinstance(w, Interval) and is_zero(w):
        return eps_fn

    def guided(z: Array, logsnr: Array, labels: Array) -> Any:
        _, sigma = alpha_sigma(logsnr)
        eps, v = check_output("eps_fn", eps_fn(z, logsnr, labels), z.shape)
        eps = eps - per_example(sigma, z) * _weighted_gradient(classifier_fn, w, z, logsnr, labels)
        return eps if v is None else (eps, v)

    everywhere = not (isinstance(w, Interval) or callable(w))
    vars(guided).update(logsnr_range=trained_range(eps_fn, *[classifier_fn] * everywhere))
    return guided


def clipped(eps_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The eps_fn whose x̂ is that of `eps_fn`, clipped to [−1, 1]: ε = (z − α clip(x̂)) / σ. v stays as it is.

    A classifier's gradient is added to it after the clipping, as in ADM's code, if the sampler has clip=False.
    """

    check_function("eps_fn", eps_fn, EPS_FN)

    def of_clipped(z: Array, logsnr: Array, labels: Array, *w: Array) -> Any:
        eps, v = check_output("eps_fn", eps_fn(z, logsnr, labels, *w), z.shape)
        eps = eps_from_x(z, jnp.clip(x_from_eps(z, eps, logsnr), -1.0, 1.0), logsnr)
        return eps if v is None else (eps, v)

    vars(of_clipped).update(logsnr_range=trained_range(eps_fn), weight_range=declared(eps_fn, "weight_range"))
    return of_clipped


def shift_mean(
    sampler: StepRule | LearnedVariance,
    classifier_fn: Callable[[Array, Array], Array],
    labels: Int[Array, "b"],
    w: Any,
) -> Any:
    """The step rule `sampler` with its mean shifted by w Σ ∇_z log p(c | z): Algorithm 1 of arXiv:2105.05233.

    `sampler` is `ancestral(v)` and Σ its variance, which `ancestral(v=None)` takes from the network, as ADM does. The
    other arguments are as in `classifier_guidance`. The shift is applied after x̃ is clipped, as in ADM's code.
    `classifier_guidance` shifts the same mean by (1 − e^{λ−λ'}) (α'/α) σ² w ∇. That shift is larger by α'/α at v = 1
    and by (α/α') e^{λ'−λ} at v = 0. The two agree in the limit of small steps.

    ADM's code shifts the last x̃ too, by w Σ ∇ with Σ near 1e-4. The last step of `guided_sample` returns x̃ itself.

    Raises ValueError if `sampler` is not a step rule that adds noise, and as `classifier_guidance` does.
    """
    check_weight(w)
    check_function("classifier_fn", classifier_fn, "(z, logsnr) -> logits")
    if isinstance(sampler, SecondOrder):
        raise ValueError(f"sampler is {sampler!r}; it must be a step rule that adds noise: give ancestral(v)")
    learned = isinstance(sampler, LearnedVariance)
    rule: Any = sampler.rule if learned else rule_of(sampler)
    check_representable(labels)
    labels = jnp.asarray(labels)

    def step(z: Array, x: Array, logsnr: Array, logsnr_next: Array, *v: Array) -> tuple[Array, Array]:
        mean, std = rule(z, x, logsnr, logsnr_next, *v)
        if std is None:
            raise ValueError("the sampler adds no noise, so there is no Σ to shift by: use classifier_guidance")
        logsnr = jnp.broadcast_to(logsnr, z.shape[:1])
        return mean + jnp.square(std) * _weighted_gradient(classifier_fn, w, z, logsnr, labels), std

    return LearnedVariance(step) if learned else step


def class_gradient(
    classifier_fn: Callable[[Array, Array], Array],
    z: Float[Array, "b ..."],
    logsnr: Float[Array, "b"],
    labels: Int[Array, "b"],
) -> Float[Array, "b ..."]:
    """∇_z log p(c | z), with the shape of z. It is 0 for images whose label is ∅.

    Raises ValueError if a concrete label is neither ∅ nor a class of the classifier, and if the classifier does not
    return logits [B, K]. Under `jit`, labels are not known; rows of such a label then are NaN.
    """

    def log_p(z: Array) -> tuple[Array, Array]:
        logits = classifier_fn(z, logsnr)
        check_returned("classifier_fn", logits, (len(z), None), "logits [B, K]")
        known = known_labels(labels, logits, lowest=NULL_LABEL)
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
        return jnp.sum(jnp.where(labels >= 0, chosen, 0.0)), known

    gradient, known = jax.grad(log_p, has_aux=True)(z)
    return jnp.where(known.reshape(-1, *[1] * (z.ndim - 1)), gradient, jnp.nan)


def _weighted_gradient(
    classifier_fn: Callable[[Array, Array], Array],
    w: Any,
    z: Float[Array, "b ..."],
    logsnr: Float[Array, "b"],
    labels: Int[Array, "b"],
) -> Float[Array, "b ..."]:
    """w ∇_z log p(c | z). The classifier is not evaluated if all weights are 0."""
    weight = weight_at(w, logsnr, len(logsnr))
    gradient = jax.lax.cond(
        jnp.any(weight != 0), lambda: class_gradient(classifier_fn, z, logsnr, labels), lambda: jnp.zeros_like(z)
    )
    return per_example(weight, z) * gradient


def without_null(eps_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`eps_fn`, guarded against the label ∅, for a model that was never trained without a label (p_uncond = 0).

    ADM's published models are of this kind. The guarded function raises ValueError if a concrete label is ∅. Under
    `jit`, labels are not known; rows of ∅ then come out as NaN instead of an image from an untrained embedding.
    """
    check_function("eps_fn", eps_fn, EPS_FN)

    def guarded(z: Array, logsnr: Array, labels: Array, *w: Array) -> Any:
        given = concrete(labels)
        if given is not None and np.any(given < 0):
            raise ValueError(
                "this model was always trained with a label (p_uncond = 0), so it has no unconditional score: sample "
                "with a plain w = 0, or use classifier_guidance"
            )
        known = (labels >= 0).reshape(-1, *[1] * (z.ndim - 1))
        return jax.tree.map(lambda out: jnp.where(known, out, jnp.nan), eps_fn(z, logsnr, labels, *w))

    vars(guarded).update(logsnr_range=trained_range(eps_fn), weight_range=declared(eps_fn, "weight_range"))
    return guarded
