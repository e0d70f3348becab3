"""Label dropout as independent coin tosses, and Eq. 6 at its limits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recursion import jaxtyping_off

from cfd.guidance import (
    NULL_LABEL,
    Interval,
    check_weight,
    classifier_guidance,
    drop_labels,
    guide,
    trained_range,
    without_null,
)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("p_uncond", [0.1, 0.2, 0.5])
def test_labels_are_dropped_with_probability_p_uncond(p_uncond):
    n = 100_000
    dropped = drop_labels(jax.random.key(0), jnp.zeros(n, jnp.int32), p_uncond) == NULL_LABEL
    assert abs(float(np.mean(dropped)) - p_uncond) < 5 * math.sqrt(p_uncond * (1 - p_uncond) / n)


def test_labels_are_dropped_independently_of_each_other():
    """The joint distribution of neighbours over many keys is the product of the marginals."""
    n, p = 20_000, 0.3
    keys = jax.random.split(jax.random.key(1), n)
    dropped = np.asarray(jax.vmap(lambda key: drop_labels(key, jnp.arange(4, dtype=jnp.int32), p))(keys)) == NULL_LABEL
    covariance = np.cov(dropped.T.astype(np.float64))
    bound = 5 * p * (1 - p) / math.sqrt(n)
    np.testing.assert_allclose(covariance, p * (1 - p) * np.eye(4), atol=2 * bound)
    assert np.all(np.abs(dropped.mean(axis=0) - p) < 5 * math.sqrt(p * (1 - p) / n))


def test_probabilities_0_and_1_are_never_and_always():
    labels = jnp.arange(10_000, dtype=jnp.int32)
    np.testing.assert_array_equal(drop_labels(jax.random.key(2), labels, 0.0), labels)
    np.testing.assert_array_equal(drop_labels(jax.random.key(2), labels, 1.0), np.full(10_000, NULL_LABEL))


def test_kept_labels_are_unchanged_and_a_key_is_reproducible():
    labels = jnp.arange(1000, dtype=jnp.int32)
    one = drop_labels(jax.random.key(3), labels, 0.5)
    assert one.dtype == jnp.int32
    np.testing.assert_array_equal(one[one != NULL_LABEL], labels[one != NULL_LABEL])
    np.testing.assert_array_equal(one, jax.jit(drop_labels)(jax.random.key(3), labels, jnp.float32(0.5)))
    assert np.any(one != drop_labels(jax.random.key(4), labels, 0.5))


@pytest.mark.parametrize("kind", [float, np.float32, np.asarray, jnp.float32, lambda p: np.full(3, p)])
@pytest.mark.parametrize("p_uncond", [-0.25, 1.5, 10.0, math.nan])
def test_a_probability_outside_0_to_1_is_refused(p_uncond, kind):
    with pytest.raises(ValueError, match=rf"p_uncond is {p_uncond}.*\[0, 1\]"):
        drop_labels(jax.random.key(0), jnp.zeros(3, jnp.int32), kind(p_uncond))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.asarray, jnp.float32])
def test_a_probability_of_any_type_drops_the_same_labels(kind):
    labels = jnp.arange(100, dtype=jnp.int32)
    for p_uncond in (0.25, 0.0, 1.0):
        dropped = drop_labels(jax.random.key(5), labels, kind(p_uncond))
        np.testing.assert_array_equal(dropped, drop_labels(jax.random.key(5), labels, p_uncond))
    np.testing.assert_array_equal(drop_labels(jax.random.key(5), labels, np.int32(1)), jnp.full(100, NULL_LABEL))


def test_a_probability_per_label():
    p_uncond = jnp.arange(1000) % 2
    dropped = drop_labels(jax.random.key(6), jnp.arange(1000, dtype=jnp.int32), p_uncond.astype(jnp.float32))
    np.testing.assert_array_equal(dropped == NULL_LABEL, p_uncond == 1)
    with pytest.raises(ValueError, match=r"p_uncond has shape \(2,\); give a scalar, or shape \(3,\)"):
        drop_labels(jax.random.key(0), jnp.zeros(3, jnp.int32), np.full(2, 0.5))


def test_the_implementation_of_a_key_does_not_matter():
    expected, *others = (
        drop_labels(jax.random.key(7, impl=impl), jnp.arange(50), 0.5) for impl in ("threefry2x32", "rbg", "unsafe_rbg")
    )
    for dropped in others:
        np.testing.assert_array_equal(dropped, expected)


def test_numpy_labels_are_labels():
    dropped = drop_labels(jax.random.key(0), np.arange(5), 0.5)
    np.testing.assert_array_equal(dropped, drop_labels(jax.random.key(0), jnp.arange(5), 0.5))
    assert dropped.dtype == jnp.int32


def test_labels_that_are_never_dropped_need_no_null():
    for labels in (jnp.ones((3, 4)), jnp.arange(3, dtype=jnp.uint8)):
        np.testing.assert_array_equal(drop_labels(jax.random.key(0), labels, 0.0), labels)


def test_a_label_of_several_arrays_is_dropped_as_a_whole():
    """A pytree of embeddings with its own ∅ is dropped in the same rows as the indices that would look it up."""
    labels = jnp.arange(1000, dtype=jnp.int32)
    dropped = drop_labels(jax.random.key(3), labels, 0.5) == NULL_LABEL
    text = {"tokens": jnp.ones((1000, 5, 2)), "length": labels}
    null = {"tokens": jnp.arange(10.0).reshape(5, 2), "length": 0}
    for drop in (drop_labels, jax.jit(drop_labels)):
        given = drop(jax.random.key(3), text, jnp.float32(0.5), null)
        np.testing.assert_array_equal(given["length"], jnp.where(dropped, 0, labels))
        expected = jnp.where(dropped[:, None, None], null["tokens"][None], text["tokens"])
        np.testing.assert_array_equal(given["tokens"], expected)
        assert jax.tree.map(jnp.result_type, given) == jax.tree.map(jnp.result_type, text)


@pytest.mark.parametrize(
    ("labels", "null", "words"),
    [
        (
            np.arange(3, dtype=np.uint8),
            NULL_LABEL,
            "null is -1, which labels of dtype uint8 cannot represent.*as int32",
        ),
        (np.array([True, False]), NULL_LABEL, "labels of dtype bool"),
        (np.arange(3, dtype=np.uint8), 256, "null is 256, which labels of dtype uint8 cannot represent"),
        (np.arange(3), 0.5, "null is 0.5, which labels of dtype int32 cannot represent"),
        (np.arange(3), np.float32(math.nan), "null is .*nan.*, which labels of dtype int32 cannot represent"),
        (np.ones((3, 4)), NULL_LABEL, r"null has shape \(\); it must be that of one label, \(4,\)"),
        (np.ones((3, 4)), np.zeros((3, 4)), r"null has shape \(3, 4\)"),
        ({"text": np.ones(3)}, NULL_LABEL, "null is -1; it must have the structure of labels"),
        (3, NULL_LABEL, r"labels have leading shapes \[\(\)\]"),
    ],
)
def test_labels_that_cannot_be_dropped_are_refused(labels, null, words):
    with pytest.raises(ValueError, match=words):
        drop_labels(jax.random.key(0), labels, 0.1, null)


def scores() -> tuple[jax.Array, jax.Array]:
    cond, uncond = np.random.default_rng(5).normal(size=(2, 4, 3, 3, 2)) * 10.0
    return jnp.asarray(cond, jnp.float32), jnp.asarray(uncond, jnp.float32)


def test_guide_is_exact_at_0_and_minus_1():
    cond, uncond = scores()
    for mix in (guide, jax.jit(guide)):
        np.testing.assert_array_equal(mix(cond, uncond, jnp.float32(0)), cond)
        np.testing.assert_array_equal(mix(cond, uncond, jnp.float32(-1)), uncond)


def test_guide_weighs_each_row_by_its_own_w():
    cond, uncond = scores()
    w = jnp.float32([-1.0, 0.0, 0.3, 4.0])
    together = guide(cond, uncond, w)
    for row in range(4):
        np.testing.assert_array_equal(together[row], guide(cond, uncond, w[row])[row])


def test_guide_extrapolates_the_line_from_uncond_through_cond():
    """ε̃ − ε_cond = w (ε_cond − ε_uncond): w is the distance beyond the conditional score, in units of the gap."""
    cond, uncond = (np.float64(score) for score in scores())
    for w in (-1.0, -0.5, 0.1, 1.0, 4.0):
        guided = guide(jnp.float32(cond), jnp.float32(uncond), w)
        np.testing.assert_allclose(guided - cond, w * (cond - uncond), rtol=0, atol=2e-5 * (1 + abs(w)))


def test_guide_is_linear_in_the_scores_and_keeps_equal_scores():
    cond, uncond = scores()
    two = jnp.float32(2)
    np.testing.assert_array_equal(guide(two * cond, two * uncond, 0.7), two * guide(cond, uncond, 0.7))
    np.testing.assert_allclose(guide(cond, cond, 3.0), cond, rtol=1e-6)


@pytest.mark.parametrize("w", [np.float32(math.nan), jnp.float32(math.inf), np.array([0, 0, 0, math.nan]), 1e39, True])
def test_weights_that_are_not_finite_are_refused(w):
    with jaxtyping_off():
        for use in (guide, lambda cond, uncond, w: classifier_guidance(lambda *_: cond, lambda *_: cond, w)):
            with pytest.raises(ValueError, match=r"w is .*give guidance weights that are finite"):
                use(*scores(), w)


@pytest.mark.parametrize("w", [Interval(1.0, -5.0, 5.0), lambda logsnr: 1.0])
def test_the_mix_at_one_noise_level_takes_a_number(w):
    cond, uncond = scores()
    with jaxtyping_off(), pytest.raises(ValueError, match=r"w is .*; this is the mix at one λ: give its weight there"):
        guide(cond[:3], uncond[:3], w)  # an Interval is three numbers, for three rows


def test_intervals_of_numbers_that_are_not_python_s():
    for lo, hi in ((np.float32(3), np.float32(-3)), (jnp.float32(1), 0.5)):
        with pytest.raises(ValueError, match="contains no λ: give logsnr_lo <= logsnr_hi"):
            check_weight(Interval(1.0, lo, hi))
    with pytest.raises(ValueError, match="logsnr_hi is nan"):
        check_weight(Interval(1.0, -3.0, np.float32(math.nan)))
    with jaxtyping_off():
        with pytest.raises(ValueError, match=r"logsnr_lo has shape \(8,\); it is one number: give .* two numbers"):
            check_weight(Interval(1.0, np.zeros(8), 3.0))
        with pytest.raises(ValueError, match="for a function of λ, the function alone"):
            check_weight(Interval(lambda logsnr: logsnr, -3.0, 3.0))  # pyright: ignore[reportArgumentType]
    for w in (Interval(np.int32(1), -3, np.float64(3)), Interval(1.0, -math.inf, math.inf)):
        check_weight(w)
        np.testing.assert_array_equal(w.contains(jnp.float32([-3.0, 3.0])), [True, True])


def test_a_network_says_on_which_noise_levels_it_was_trained():
    def eps_fn(z, logsnr, labels):
        return z

    eps_fn.logsnr_range = (-10.0, 9.0)  # pyright: ignore[reportFunctionMemberAccess]
    partial = jax.tree_util.Partial(lambda params, z, logsnr, labels: z, 1.0)
    partial.func.logsnr_range = (-10.0, 9.0)
    for fun in (eps_fn, partial):
        wrappers = (fun, jax.jit(fun), functools.partial(fun), functools.wraps(fun)(lambda *args: args[0]))
        guided = (without_null(fun), classifier_guidance(fun, lambda z, logsnr: z, 2.0))
        for wrapped in (*wrappers, *guided):
            assert trained_range(wrapped) == (-10.0, 9.0)
    assert trained_range(lambda z, logsnr, labels: z) is None

    def classifier(z, logsnr):
        return z

    classifier.logsnr_range = (-12.0, 5.0)  # pyright: ignore[reportFunctionMemberAccess]
    assert trained_range(classifier_guidance(eps_fn, classifier, 2.0)) == (-10.0, 5.0)
    assert trained_range(classifier_guidance(eps_fn, classifier, Interval(2.0, -5.0, 5.0))) == (-10.0, 9.0)
