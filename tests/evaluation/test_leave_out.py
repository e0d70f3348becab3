"""Every metric without a group of images, against the same metric of the images that are left."""

import numpy as np
import pytest

from cfd.evaluation import leave_out, metrics, neighbours
from cfd.evaluation.intervals import groups


def lattice(seed: int, count: int, dim: int) -> np.ndarray:
    """Rows on a coarse lattice: many distances are equal, and some are 0."""
    return np.random.default_rng(seed).integers(0, 3, (count, dim)).astype(np.float32)


@pytest.mark.parametrize("dim", [3, 30])
def test_frechet_distances(dim: int) -> None:
    """In 30 dimensions, the 25 rows that are left have a covariance without full rank."""
    numbers = np.random.default_rng(3)
    reference, rows = numbers.normal(size=(90, dim)), 0.3 + 1.2 * numbers.normal(size=(27, dim))
    mu, sigma = reference.mean(axis=0), np.cov(reference.T)
    root, group = metrics.covariance_root(sigma, "first")[1], groups(np.zeros(27, np.int64))
    found = leave_out.frechet_distance(mu, sigma, root, rows, group, metrics.moments(rows))
    subsets = [rows[group != g] for g in range(group.max() + 1)]
    direct = [metrics.frechet_distance(mu, sigma, x.mean(axis=0), np.cov(x.T)) for x in subsets]
    assert found == pytest.approx(direct, rel=1e-9)
    assert metrics.frechet_distance(mu, sigma, rows.mean(axis=0), np.cov(rows.T), root) == metrics.frechet_distance(
        mu, sigma, rows.mean(axis=0), np.cov(rows.T)
    )


def test_the_distance_from_equal_images_has_no_overlap() -> None:
    """Their covariance is 0, and what is left of the distance is |μ1 − μ2|² + tr Σ2."""
    rows, group = np.random.default_rng(14).normal(size=(20, 3)), np.arange(20) % 4
    mu, sigma = np.ones(3), np.zeros((3, 3))
    root = metrics.covariance_root(sigma, "first")[1]
    np.testing.assert_array_equal(root @ root.T, sigma)
    found = leave_out.frechet_distance(mu, sigma, root, rows, group, metrics.moments(rows))
    subsets = [rows[group != g] for g in range(4)]
    assert found == pytest.approx([((x.mean(0) - 1) ** 2).sum() + x.var(0, ddof=1).sum() for x in subsets], rel=1e-12)


def test_moments_of_a_part_can_be_subtracted() -> None:
    rows = 1e3 + np.random.default_rng(4).normal(size=(50, 4))
    left = metrics.subtract(metrics.moments(rows), metrics.moments(rows[:20]))
    expected = metrics.moments(rows[20:])
    assert left.count == 30
    np.testing.assert_allclose(left.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(left.scatter, expected.scatter, atol=1e-8)


def test_inception_scores_in_two_splits() -> None:
    probs = np.random.default_rng(5).dirichlet(np.ones(4), 60)
    index, group = np.arange(60), groups(np.arange(60) % 3)
    whole = metrics.score_sums(probs, index, 60, 40)
    found = leave_out.inception_score(probs, group, whole, 40)
    for g, value in enumerate(found):
        parts = [probs[(group != g) & (index // 40 == split)] for split in (0, 1)]
        assert value == pytest.approx(np.mean([metrics.inception_score(part) for part in parts]), rel=1e-12)
    assert leave_out.inception_score(probs, index // 40, whole, 40) == [], "a split would have no images"


@pytest.mark.parametrize("rows", ["normal", "lattice", "far apart"])
def test_recall_and_precision_exactly(rows: str) -> None:
    """Also where float32 cannot tell distances apart, and where every distance has ties."""
    numbers = np.random.default_rng(6)
    reference, samples = numbers.normal(size=(70, 4)), 0.7 * numbers.normal(size=(45, 4))
    if rows == "lattice":
        reference, samples = lattice(7, 70, 4), lattice(8, 45, 4)
    elif rows == "far apart":
        reference[::2] += 1e5
        samples[::3] += 1e5
    group = groups(np.arange(45) % 5)
    inside, recall, found = leave_out.precision_recall(reference, samples, group)
    assert (inside.mean(), recall) == metrics.precision_recall(reference, samples)
    direct = [metrics.precision_recall(reference, samples[group != g]) for g in range(group.max() + 1)]
    assert found == [value for _, value in direct]
    assert leave_out.mean(inside, group) == pytest.approx([value for value, _ in direct], rel=1e-12)
    assert 0.0 < recall < 1.0 and len(set(found)) > 1


def test_the_groups_whose_balls_cover_a_row() -> None:
    """All of them if there is none or one, and at least two of them if there are more."""
    centres, x = lattice(9, 60, 3), lattice(10, 40, 3) + np.float32(0.25)
    radii, group = np.random.default_rng(11).uniform(0.0, 1.5, 60), np.arange(60) % 5
    found = neighbours.covering_groups(x, centres, radii, group)
    inside = ((x[:, None].astype(np.float64) - centres) ** 2).sum(axis=2) <= radii
    expected = np.stack([inside[:, group == g].any(axis=1) for g in range(5)], axis=1)
    few = expected.sum(axis=1) < 2
    np.testing.assert_array_equal(found[few], expected[few])
    assert (found <= expected).all() and (found[~few].sum(axis=1) >= 2).all() and few.any() and not few.all()
    np.testing.assert_array_equal(neighbours.covered_by_few(x, centres, radii), inside.any(axis=1))


def test_distances_to_the_kth_neighbour_without_each_group() -> None:
    x, group = lattice(12, 40, 3), np.arange(40) % 3
    found, without = neighbours.squared_to_kth_without(x, 3, group)
    np.testing.assert_array_equal(found, neighbours.squared_to_kth(x, 3))
    for g in range(3):
        left = group != g
        np.testing.assert_array_equal(without[g, left], neighbours.squared_to_kth(x[left], 3))


def test_too_few_images_have_no_values() -> None:
    rows, group = np.random.default_rng(13).normal(size=(4, 2)), np.array([0, 0, 0, 1])
    whole, eye = metrics.moments(rows), np.eye(2)
    assert leave_out.frechet_distance(np.zeros(2), eye, eye, rows, group, whole) == []
    assert leave_out.precision_recall(rows, rows, np.arange(4))[2] == []
    assert leave_out.mean(rows[:, 0], np.zeros(4, np.int64)) == []
