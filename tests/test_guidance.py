"""Label dropout as independent coin tosses, and Eq. 6 at its limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfd.guidance import NULL_LABEL, drop_labels, guide


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


@pytest.mark.parametrize("p_uncond", [-0.1, 1.5, 10.0, math.nan])
def test_a_probability_outside_0_to_1_is_refused(p_uncond):
    with pytest.raises(ValueError, match=rf"p_uncond is {p_uncond}.*\[0, 1\]"):
        drop_labels(jax.random.key(0), jnp.zeros(3, jnp.int32), p_uncond)


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
