"""Arguments without effect are refused, and unusual kinds of legal arguments give the images of the usual ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recursion import jaxtyping_off

from cfd import distillation, flow, guidance, likelihood, losses, reuse, rules
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


def draw(labels: Any = LABELS, key: Any = KEY, shape: Any = (3,), **options: Any):
    return guided_sample(key, eps_fn, labels, shape, **{"w": 1.0, "num_steps": 4, **options})


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
        r"sampler is <function ancestral.*ancestral\(v\)",
    ),
}


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
