"""Arguments without effect are refused, and unusual kinds of legal arguments give the images of the usual ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import jax_setting
from recursion import jaxtyping_off

from cfd import (
    distillation,
    flow,
    guidance,
    likelihood,
    loading,
    losses,
    process,
    reuse,
    rules,
    score_matching,
    steps,
    tilt,
)
from cfd.guidance import Interval
from cfd.process import linear
from cfd.sampling import Langevin, SecondOrder, ancestral, ddim, guided_sample, hold

KEY = jax.random.key(0)
LABELS = jnp.array([0, 1], jnp.int32)
X = jnp.ones((2, 3), jnp.float32)


def eps_fn(z, logsnr, labels):
    return 0.5 * z + 0.1 * labels.astype(jnp.float32)[:, None]


def student(z, logsnr, labels, w):
    return eps_fn(z, logsnr, labels) * w[:, None]


def draw(labels: Any = LABELS, key: Any = KEY, shape: Any = (3,), eps: Any = eps_fn, **options: Any):
    return guided_sample(key, eps, labels, shape, **{"w": 1.0, "num_steps": 4, **options})


def halving(**options: Any):
    return distillation.halving_loss(
        KEY, student, student, X, LABELS, num_steps=2, weights=(0.0, 4.0), schedule=linear(-4.0, 4.0), **options
    )


GRID = [-4.0, 0.0, 4.0]
FAR = Interval(1.0, 30.0, 40.0)
BOTH = "give a guide that ignores its label"
REFUSED: dict[str, tuple[Any, str]] = {
    "null beside a guide": (lambda: draw(guide=eps_fn, null=1), rf"null is 1, and guide, .*{BOTH}"),
    "null beside a guide, w = 0": (lambda: draw(guide=eps_fn, null=1, w=0.0), BOTH),
    "null of another type, w = 0": (lambda: draw(null=0.5, w=0.0), "null is 0.5, which labels of dtype int32"),
    "null of another type, flow": (lambda: flow.flow(eps_fn, X, LABELS, logsnr=GRID, null=0.5), "null is 0.5, which"),
    "null that is a text": (lambda: draw(null="none"), "null is 'none', which labels of dtype int32 cannot represent"),
    "traced null": (lambda: jax.jit(lambda n: draw(null=n))(0.5), "null is .*, which labels of dtype int32"),
    "hold of second order": (
        lambda: draw(sampler=SecondOrder(hold()), corrector=Langevin()),
        r"sampler is SecondOrder\(hold\(\)\), .*give hold\(\) alone",
    ),
    "interval of flow": (lambda: flow.flow(eps_fn, X, LABELS, logsnr=GRID, w=FAR), "none of the 3 steps"),
    "interval of log_likelihood": (
        lambda: flow.log_likelihood(KEY, eps_fn, X, LABELS, logsnr_min=-4.0, logsnr_max=4.0, num_steps=2, w=FAR),
        "none of the 3 steps falls into the interval: .* at λ = 4: widen",
    ),
    "clip of bound": (
        lambda: likelihood.bound(KEY, eps_fn, X, LABELS, logsnr=GRID, clip=0.5),  # pyright: ignore
        "clip is 0.5; give True or False",
    ),
    "clip of halving_loss": (lambda: halving(clip=0.5), "clip is 0.5; give True or False"),
    "weight of halving_loss": (lambda: halving(weight=2.0), r"weight is 2.0; give a function of λ \[B\], or None"),
    "weight of eps_loss": (
        lambda: losses.eps_loss(KEY, eps_fn, X, LABELS, weight=2.0),  # pyright: ignore
        "weight is 2.0; give a function",
    ),
    "cosine": (lambda: draw(reuse=reuse.Reuse(2, 5.0)), r"cosine is 5.0; .*\[-1, 1\]"),
    "list as the weight of a rule": (
        lambda: rules.ramp([1.0, 2.0], -2.0, 2.0),  # pyright: ignore
        r"w is \[1.0, 2.0\]; give .* \(B,\)",
    ),
    "function as the weight of a rule": (
        lambda: rules.constant(rules.constant(1.0)),  # pyright: ignore
        "w is <function .*; give a",
    ),
    "classifier": (
        lambda: guidance.classifier_guidance(eps_fn, None, 0.0),  # pyright: ignore
        "classifier_fn is None; give a function",
    ),
    "maker of a rule": (
        lambda: guidance.shift_mean(ancestral, lambda z, logsnr: z, LABELS, 1.0),  # pyright: ignore
        r"sampler is ancestral, which was not called: give sampler=ancestral\(v\)",
    ),
}


def halve(schedule: Any = linear(-4.0, 4.0), student_fn: Any = student, teacher_fn: Any = student):
    return distillation.halving_loss(
        KEY, student_fn, teacher_fn, X, LABELS, num_steps=2, weights=(0.0, 4.0), schedule=schedule
    )


def distill(schedule: Any = linear(-4.0, 4.0), student_fn: Any = student, teacher_fn: Any = eps_fn, labels=LABELS):
    return distillation.distillation_loss(KEY, student_fn, teacher_fn, X, labels, weights=(0.0, 4.0), schedule=schedule)


def tilted(network: Any = eps_fn, label: Any = 0, w: Any = 1.0):
    return tilt.tilted_sample(KEY, network, label, (3,), w=w, num_particles=2, num_steps=3)


def bits(network: Any = eps_fn, labels: Any = LABELS, decoder: Any = likelihood.gaussian_decoder(0.1)):
    return likelihood.bound(KEY, network, X, labels, logsnr=GRID, decoder=decoder)


def learned(network: Any = eps_fn, schedule: Any = linear(-4.0, 4.0), **options: Any):
    return losses.learned_loss(KEY, network, X, LABELS, schedule=schedule, **options)


def divergence(network: Any):
    return score_matching.implicit_score_matching(KEY, network, X, LABELS, logsnr=0.0)


class Run(NamedTuple):
    """As `cfd.loading.Loaded`, of which the function is one field."""

    eps_fn: Any


COSINE = r"schedule is cosine, which was not called: give schedule=cosine\(logsnr_min, logsnr_max\)"
UNCALLED: dict[str, tuple[Any, str]] = {
    "eps_loss": (lambda: losses.eps_loss(KEY, eps_fn, X, LABELS, schedule=process.cosine), COSINE),  # pyright: ignore
    "learned_loss": (lambda: learned(schedule=process.cosine), COSINE),
    "distillation_loss": (lambda: distill(process.cosine), COSINE),
    "halving_loss": (lambda: halve(process.cosine), COSINE),
    "grid": (lambda: steps.grid(4, process.cosine), COSINE),  # pyright: ignore
    "sigmoid_weight": (lambda: losses.sigmoid_weight(process.cosine), COSINE),  # pyright: ignore
    "tabulated": (lambda: steps.grid(4, process.tabulated), r"schedule=tabulated\(logsnr\)"),  # pyright: ignore
    "weight": (
        lambda: losses.eps_loss(KEY, eps_fn, X, LABELS, weight=losses.sigmoid_weight),  # pyright: ignore
        r"weight is sigmoid_weight, which was not called: give weight=sigmoid_weight\(schedule, bias\)",
    ),
    "w": (lambda: draw(w=rules.ramp), r"w is ramp, .*w=ramp\(w, logsnr_lo, logsnr_hi\)"),
    "class as w": (lambda: draw(w=Interval), r"w=Interval\(w, logsnr_lo, logsnr_hi\)"),
    "w of a corrector": (lambda: draw(corrector=Langevin(w=rules.constant)), r"w is constant, .*w=constant\(w\)"),
    "w of tilted_sample": (lambda: tilted(w=rules.constant), r"w=constant\(w\)"),
    "w of a rule": (lambda: rules.ramp(rules.constant, 0.0, 1.0), r"w=constant\(w\)"),  # pyright: ignore
    "reuse": (lambda: draw(reuse=reuse.every), r"reuse is every, which was not called: give reuse=every\(k\)"),
    "corrector": (lambda: draw(corrector=Langevin), r"corrector=Langevin\(c, steps, w\)"),
    "second order": (lambda: draw(sampler=SecondOrder), r"sampler=SecondOrder\(rule\)"),
    "rule of second order": (lambda: draw(sampler=SecondOrder(ddim)), r"sampler=ddim\(eta\)"),  # pyright: ignore
    "rule of the user": (lambda: draw(rule=rules.stateless), r"rule=stateless\(mix\)"),
    "guide": (lambda: draw(guide=process.from_v), r"guide=from_v\(v_fn\)"),
    "decoder": (lambda: bits(decoder=likelihood.gaussian_decoder), r"decoder=gaussian_decoder\(variance\)"),
    "levels": (lambda: draw(num_steps=linear(-4.0, 4.0)), r"num_steps is a function; give T, .*grid\(T, schedule\)"),
}
EPS = r"eps_fn is None; give a function \(z, logsnr, labels\) -> "
NO_FUNCTION: dict[str, tuple[Any, str]] = {
    "eps_loss": (lambda: losses.eps_loss(KEY, None, X, LABELS), EPS),  # pyright: ignore
    "learned_loss": (lambda: learned(None), EPS),
    "variance_loss": (lambda: losses.variance_loss(KEY, None, X, LABELS, logsnr=GRID), EPS),  # pyright: ignore
    "flow": (lambda: flow.flow(None, X, LABELS, logsnr=GRID), EPS),
    "log_likelihood": (
        lambda: flow.log_likelihood(KEY, None, X, LABELS, logsnr_min=-4.0, logsnr_max=4.0),
        EPS,
    ),
    "bound": (lambda: bits(None), EPS),
    "tilted_sample": (lambda: tilted(None), EPS),
    "score matching": (lambda: divergence(None), EPS),
    "student": (lambda: distill(student_fn=None), r"student_fn is None; give a function \(z, logsnr, labels, w\)"),
    "teacher": (lambda: distill(teacher_fn=None), "teacher_fn is None; give a function"),
    "student of half": (lambda: halve(student_fn=None), "student_fn is None; give a function"),
    "teacher of half": (lambda: halve(teacher_fn=None), "teacher_fn is None; give a function"),
    "classifier guidance": (lambda: guidance.classifier_guidance(None, eps_fn, 1.0), EPS),  # pyright: ignore
    "clipped": (lambda: guidance.clipped(None), EPS),  # pyright: ignore
    "cads": (lambda: rules.cads(None, 0.0, 1.0, 0.1, 1.0), EPS),  # pyright: ignore
    "from_x": (lambda: process.from_x(None), r"x_fn is None; give a function \(z, logsnr, labels\) -> the data"),  # pyright: ignore
    "from_velocity": (lambda: process.from_velocity(None), "velocity_fn is None; give a function"),  # pyright: ignore
    "rescaled": (lambda: process.variance_exploding(None), EPS),  # pyright: ignore
    "scale": (lambda: process.rescaled(eps_fn, 2.0), "scale is 2.0; give a function of λ"),  # pyright: ignore
    "schedule": (lambda: distill("cosine"), r"schedule is 'cosine'; give a function .*cosine\(-20.0, 20.0\)"),
    "table": (lambda: steps.grid(4, [4.0, 0.0, -4.0]), "schedule is a list; give a function"),  # pyright: ignore
    "a run": (lambda: draw(guide=(eps_fn, {"weights": X})), "guide is a tuple; give a function"),
    "decoder": (lambda: bits(decoder=None), r"decoder is None; give a function \(x, z, x̂, λ\)"),
    "result of decoder": (lambda: bits(decoder=lambda x, *_: x[0]), r"decoder returned shape \(3,\)"),
    "mix": (lambda: rules.stateless(None), "mix is None; give a function"),  # pyright: ignore
    "run": (lambda: draw(eps=Run(eps_fn)), "eps_fn is a Run; give its eps_fn"),
}
SWITCHES: dict[str, Any] = {
    "doubled": lambda x: draw(doubled=x),
    "trajectory": lambda x: draw(trajectory=x),
    "clean_end": lambda x: steps.grid(4, linear(-4.0, 4.0), clean_end=x),
    "low_discrepancy": lambda x: losses.eps_loss(KEY, eps_fn, X, LABELS, low_discrepancy=x),
    "low_discrepancy of learned_loss": lambda x: learned(low_discrepancy=x),
    "extrapolate": lambda x: draw(reuse=reuse.Reuse(2, extrapolate=x)),
    "fast": lambda x: loading.load("no_run", fast=x),
    "fast of load_classifier": lambda x: loading.load_classifier("no_run", fast=x),
    "variance": lambda x: loading.load("no_run", variance=x),
}
WIDE = np.array([1, 2**31])
CAST = "labels have 2147483648, which int32 cannot represent, and JAX casts int64 to it: give the numbers of classes"
LOST: dict[str, Any] = {
    "guided_sample": draw,
    "guided_sample, w = 0": lambda labels: draw(labels, w=0.0),
    "eps_loss": lambda labels: losses.eps_loss(KEY, eps_fn, X, labels),
    "drop_labels": lambda labels: guidance.drop_labels(KEY, labels, 0.0),
    "distillation_loss": lambda labels: distill(labels=labels),
    "bound": lambda labels: bits(labels=labels),
    "flow": lambda labels: flow.flow(eps_fn, X, labels, logsnr=GRID),
    "tilted_sample": lambda labels: tilted(label=labels[1]),
    "tilted_sample, int": lambda labels: tilted(label=int(labels[1])),
    "other_labels": lambda labels: rules.other_labels(KEY, labels, 5),
    "shift_mean": lambda labels: guidance.shift_mean(ancestral(), lambda z, logsnr: z, labels, 1.0),
}


@pytest.mark.parametrize("name", UNCALLED)
def test_a_maker_that_was_not_called_is_refused_with_the_call(name):
    call, words = UNCALLED[name]
    with jaxtyping_off(), pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", NO_FUNCTION)
def test_what_is_no_function_is_refused_by_its_name(name):
    call, words = NO_FUNCTION[name]
    with jaxtyping_off(), pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", SWITCHES)
def test_what_is_neither_true_nor_false_is_refused(name):
    for value in (None, "no", 1, np.ones(2, bool)):
        with jaxtyping_off(), pytest.raises(ValueError, match=f"{name.split()[0]} is .*; give True or False"):
            SWITCHES[name](value)


@pytest.mark.parametrize(
    "name, value", [("num_steps", 4), ("shape", 3), ("clip", True), ("doubled", True), ("trajectory", True)]
)
def test_what_the_program_depends_on_must_be_static(name, value):
    options = lambda x: {name: (x,) if name == "shape" else x}  # noqa: E731
    with jaxtyping_off(), pytest.raises(ValueError, match=rf"{name} is .*, and name its argument in static_argnames"):
        jax.jit(lambda x: draw(**options(x)))(value)
    with jaxtyping_off():
        jax.jit(lambda x: draw(**options(x)), static_argnames="x").lower(x=value)


MEANS: dict[str, Any] = {
    "eps_loss": lambda x, labels: losses.eps_loss(KEY, eps_fn, x, labels),
    "learned_loss": lambda x, labels: losses.learned_loss(KEY, eps_fn, x, labels, schedule=linear(-4.0, 4.0)),
    "variance_loss": lambda x, labels: losses.variance_loss(KEY, student, x, labels, logsnr=GRID),  # pyright: ignore
    "distillation_loss": lambda x, labels: distillation.distillation_loss(
        KEY, student, eps_fn, x, labels, weights=(0.0, 4.0)
    ),
    "halving_loss": lambda x, labels: distillation.halving_loss(
        KEY, student, student, x, labels, num_steps=2, weights=(0.0, 4.0)
    ),
    "score matching": lambda x, labels: score_matching.sliced_score_matching(KEY, eps_fn, x, labels, logsnr=0.0),
    "conservativeness": lambda x, labels: score_matching.conservativeness(KEY, eps_fn, x, labels, logsnr=0.0),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_over_no_examples_is_refused(name):
    with jaxtyping_off(), pytest.raises(ValueError, match=r"x has shape \(0, 3\); a mean over no examples"):
        MEANS[name](X[:0], LABELS[:0])
    assert draw(LABELS[:0]).shape == (0, 3)  # no images are images


@pytest.mark.parametrize("name", LOST)
def test_labels_that_a_cast_would_change_are_refused(name):
    with jaxtyping_off(), pytest.raises(ValueError, match=CAST):
        LOST[name](WIDE)


def test_other_labels_that_a_cast_would_change():
    embeddings = np.array([[0.5, 1e39]] * 2)
    for labels, words in (
        (np.array([2**64 - 1, 0], np.uint64), "labels have 18446744073709551615, which uint32 cannot represent"),
        (np.array([2**32, 0.5]) * 1e30, "labels have 4.29.*e\\+39, which float32 cannot represent"),
        ({"text": embeddings, "class": LABELS}, "labels have 1e\\+39, which float32"),
        (np.array(["cat", "dog"]), r"labels have \['cat'\] of <U3; give numbers"),
    ):
        with jaxtyping_off(), pytest.raises(ValueError, match=words):
            draw(labels, w=0.0)
    infinite = np.array([np.inf, np.nan, 1.0])  # these are what they were
    np.testing.assert_array_equal(guidance.drop_labels(KEY, infinite, 0.0), infinite)
    with jax_setting("jax_enable_x64", True):
        assert guidance.drop_labels(KEY, WIDE, 0.0).tolist() == WIDE.tolist()


def test_scores_of_different_shapes_are_not_broadcast():
    other = X[:, :1]
    for call in (
        lambda: guidance.guide(X, other, 1.0),
        lambda: rules.cfgpp().mix(X, X, other, jnp.float32(0.0), jnp.float32(1.0), ()),
        lambda: rules.apg(0.0, 1.0, 0.0).mix(X, X, other, jnp.float32(0.0), jnp.float32(1.0), X),
    ):
        with (
            jaxtyping_off(),
            pytest.raises(ValueError, match=r"eps_cond has shape \(2, 3\) and eps_\w+ has .*\(2, 1\)"),
        ):
            call()
    narrow = guidance.classifier_guidance(lambda z, *_: z[:, :1], lambda z, logsnr: z, 1.0)
    for adapted in (narrow, guidance.clipped(lambda z, *_: z[:, :1])):
        with jaxtyping_off(), pytest.raises(ValueError, match=r"eps_fn returned shape \(2, 1\)"):
            draw(eps=adapted)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_have_no_effect_or_fail_later_is_refused(name):
    call, words = REFUSED[name]
    with jaxtyping_off(), pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("axes", [0, 1])
def test_labels_may_be_numbers_that_are_no_classes(axes):
    """With an axis of features, or without."""
    labels = np.array([0.0, 1.0], np.float32).reshape(2, *[1] * axes)

    def of_numbers(z, logsnr, numbers):
        return eps_fn(z, logsnr, numbers.ravel())

    null = np.full((1,) * axes, -1.0, np.float32)
    images = guided_sample(KEY, of_numbers, labels, (3,), w=1.0, null=null, num_steps=4)
    np.testing.assert_allclose(images, draw(), rtol=1e-6)


def test_a_guide_that_ignores_its_label_is_given_any():
    images = draw(guide=lambda z, logsnr, _: eps_fn(z, logsnr, jnp.full(2, 1)))
    np.testing.assert_allclose(images, draw(null=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64, np.uint8, np.uint32])
def test_labels_of_every_integer_type_are_the_same_classes(dtype):
    """∅ is class 1 here, which unsigned labels can represent too."""
    expected = draw(null=1)
    for kind in (np.asarray, jnp.asarray):
        np.testing.assert_array_equal(
            draw(kind(np.array([0, 1]), dtype if kind is np.asarray else jnp.int32), null=1), expected
        )
    np.testing.assert_array_equal(draw(np.array([0, 1], dtype), null=dtype(1)), expected)


def test_shapes_keys_and_numbers_of_every_kind():
    expected = draw()
    old = jax.random.PRNGKey(0)
    with jaxtyping_off():
        for shape in ([3], np.array([3]), jnp.array([3]), 3, np.int64(3)):
            np.testing.assert_array_equal(draw(shape=shape), expected)
        for key in (old, np.asarray(old)):
            np.testing.assert_array_equal(draw(key=key), expected)
        for w in (1, np.int8(1), np.float64(1.0), np.array([1.0, 1.0]), [1, 1], lambda logsnr: [1.0, 1.0]):
            np.testing.assert_allclose(draw(w=w), expected, rtol=1e-6)
        for num_steps in (np.int8(4), jnp.int32(4)):
            np.testing.assert_array_equal(draw(num_steps=num_steps), expected)
    np.testing.assert_allclose(draw(LABELS[:1]), expected[:1], rtol=1e-6)
    traced = jax.jit(lambda key, w, null: draw(key=key, w=w, null=null))(old, 1.0, -1)
    np.testing.assert_allclose(traced, expected, rtol=1e-6)


def test_keys_and_weights_under_vmap():
    keys, weights = jax.random.split(KEY, 3), jnp.float32([0.0, 0.5, 2.0])
    together = jax.vmap(lambda key, w, null: draw(key=key, w=w, null=null))(keys, weights, jnp.array([-1, 0, 1]))
    for i, images in enumerate(together):
        alone = draw(key=keys[i], w=float(weights[i]), null=[-1, 0, 1][i])
        np.testing.assert_allclose(images, alone, rtol=1e-5, atol=1e-6)


def test_hold_is_a_sampler_beside_a_corrector():
    assert bool(jnp.isfinite(draw(sampler=hold(), corrector=Langevin(0.1, 2))).all())
    np.testing.assert_array_equal(draw(num_steps=1, sampler=ddim()), draw(num_steps=1))
