"""KID against a loop over pairs, on Gaussians with a closed form, and without groups."""

import itertools

import numpy as np
import pytest

from cfd.evaluation import kid
from cfd.evaluation.intervals import groups, standard_error


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return (float(x @ y) / len(x) + 1.0) ** 3


def by_pairs(reference: np.ndarray, samples: np.ndarray) -> float:
    """The U-statistic of Binkowski et al., pair by pair."""
    own = [kernel(x, y) for x, y in itertools.permutations(samples, 2)]
    theirs = [kernel(x, y) for x, y in itertools.permutations(reference, 2)]
    across = [kernel(x, y) for x, y in itertools.product(samples, reference)]
    return float(np.mean(own) + np.mean(theirs) - 2.0 * np.mean(across))


@pytest.mark.parametrize("one_each", [False, True])
def test_it_is_the_mean_over_all_pairs(one_each: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, with samples of one class, or one of each class, and without each group."""
    monkeypatch.setattr(kid, "BLOCK_ELEMENTS", 50)
    numbers = np.random.default_rng(0)
    reference, samples = numbers.normal(size=(17, 3)), 0.5 + numbers.normal(size=(21, 3))
    labels = np.arange(21) if one_each else np.full(21, -1)
    group, own = np.arange(21) % 4, kid.mean_kernel(reference, np.arange(17) if one_each else np.zeros(17, np.int64))
    value, without = kid.kid(reference, samples, labels, group, own)
    assert value == pytest.approx(by_pairs(reference, samples), rel=1e-12)
    assert without == pytest.approx([by_pairs(reference, samples[group != g]) for g in range(4)], rel=1e-12)
    assert kid.kid(reference, samples[:2], labels[:2], np.arange(2), own)[1] == []


def test_it_is_unbiased_for_balanced_classes_too() -> None:
    """Two classes far apart, with two images each in the samples and a share of a half each in 1,000 references.

    A plain mean over pairs has one pair of a class in three, not one in two, and is far too low.
    """
    numbers, labels = np.random.default_rng(1), np.array([0, 0, 1, 1])
    offset = np.array([[-2.0], [2.0]])
    reference = offset[np.arange(1000) % 2] + numbers.normal(size=(1000, 1))
    exact = float(np.mean([(x * y + 1.0) ** 3 for x, y in itertools.combinations(reference[:500, 0], 2)]))
    own = kid.mean_kernel(reference, np.arange(1000) % 2)
    few = [kid.mean_kernel(reference[2 * i :][:4], labels[[0, 2, 1, 3]]) for i in range(498)]
    assert np.mean(few) == pytest.approx(own, rel=0.25), "four references estimate the same as a thousand"
    assert own == pytest.approx(exact, rel=0.1)
    draws = [offset[labels] + numbers.normal(size=(4, 1)) for _ in range(200)]
    values = [kid.kid(reference, x, labels, np.arange(4), own)[0] for x in draws]
    plain = [kid.kid(reference, x, np.full(4, -1), np.arange(4), own)[0] for x in draws]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert np.mean(plain) < -3 * error


def test_two_gaussians_have_the_closed_form() -> None:
    """In one dimension E (x y + 1)³ is 1 + 3 a b for centred variables of variances a and b, and so MMD² 3 (a − b)²."""
    numbers = np.random.default_rng(2)
    reference, samples = numbers.normal(size=(3000, 1)), np.sqrt(2.0) * numbers.normal(size=(3000, 1))
    labels = np.zeros(3000, np.int64)
    own = kid.mean_kernel(reference, labels)
    value, without = kid.kid(reference, samples, labels, groups(labels), own)
    assert abs(value - 3.0) < 4 * standard_error(without)
    assert standard_error(without) < 0.5
    same, without = kid.kid(reference, numbers.normal(size=(3000, 1)), labels, groups(labels), own)
    assert abs(same) < 0.05


def test_large_sets_are_thinned_evenly_in_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every tenth image would be of few groups."""
    monkeypatch.setattr(kid, "MAX_ROWS", 40)
    numbers = np.random.default_rng(3)
    reference, samples = numbers.normal(size=(100, 2)), numbers.normal(size=(400, 2))
    labels = np.full(400, -1)
    group, own = groups(labels), kid.mean_kernel(reference, np.zeros(100, np.int64))
    rows = np.concatenate([np.flatnonzero(group == g)[[0, 10]] for g in range(20)])
    value, without = kid.kid(reference, samples, labels, group, own)
    chosen = reference[np.arange(40) * 100 // 40]
    assert (value, without) == kid.kid(chosen, samples[rows], labels[rows], group[rows], own)
    assert len(without) == 20


def test_sets_that_cannot_be_compared_are_refused() -> None:
    rows, labels = np.zeros((4, 2)), np.zeros(4, np.int64)
    with pytest.raises(ValueError, match="KID needs at least 2 samples, got 1: give more images"):
        kid.kid(rows, rows[:1], labels[:1], labels[:1], 0.0)
    with pytest.raises(ValueError, match="3 reference and 2 sample features: compute both with the same feature"):
        kid.kid(np.zeros((4, 3)), rows, labels, labels, 0.0)
