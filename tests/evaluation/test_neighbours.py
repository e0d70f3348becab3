"""Precision and recall are exactly those of float64 differences of all pairs, for any dtype, scale and clustering."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cfd.evaluation import metrics, neighbours


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The squared distances of all pairs, by float64 differences."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.array([((row - b) ** 2).sum(axis=1) for row in a])


def assert_exact(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Compares precision, recall and the radii of the references with brute force. Returns (precision, recall)."""
    between = squared_distances(reference, samples)
    radii, sample_radii = (np.sort(squared_distances(rows, rows), axis=1)[:, k] for rows in (reference, samples))
    precision = (between <= radii[:, None]).any(axis=0).mean()
    recall = (between <= sample_radii).any(axis=1).mean()
    assert metrics.precision_recall(reference, samples, k) == (precision, recall)
    np.testing.assert_array_equal(metrics.squared_radii(reference, k), radii)
    return precision, recall


def clustered(spread: float, count: int = 400, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of float64 features in the same 10 clusters of 64 dimensions."""
    numbers = np.random.default_rng(0)
    centres = numbers.normal(size=(10, 64)) + offset
    first, second = (
        centres[numbers.integers(10, size=n)] + spread * numbers.normal(size=(n, 64)) for n in (count, count)
    )
    return first, second


@pytest.mark.parametrize("spread", [3e-3, 1e-3, 3e-4, 1e-4, 1e-6, 1e-9, 0.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_near_duplicates(spread: float, dtype: Any) -> None:
    """Float32 products cannot order the rows of a cluster. Copies of a row lie in its ball, even if its radius is 0."""
    reference, samples = (rows.astype(dtype) for rows in clustered(spread, 400 if dtype == np.float32 else 150))
    found = assert_exact(reference, samples)
    if spread == 0.0:
        assert found == (1.0, 1.0)
    elif spread >= 1e-4 and dtype == np.float32:
        assert max(found) < 0.82, "float32 products would find 0.82 to 0.86 at a spread of 1e-4 and 3e-4"


@pytest.mark.parametrize("offset", [1e3, -1e6, 1e9])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_a_common_offset_changes_nothing(offset: float, spread: float) -> None:
    reference, samples = clustered(spread, 150, offset)
    assert_exact(reference, samples)
    numbers = np.random.default_rng(1)
    one, two = (offset + spread * numbers.normal(size=(150, 64)) for _ in range(2))
    assert_exact(one, two)
    assert_exact(one.astype(np.float32), two.astype(np.float32))


@pytest.mark.parametrize("scale", [1e20, 1e-20, 1e37, 1e-38, 1e-42])
def test_no_scale_overflows_or_vanishes(scale: float) -> None:
    """The squares of these float32 features are infinite, zero or subnormal in float32."""
    reference, samples = clustered(1e-3, 150)
    assert_exact((reference * scale).astype(np.float32), (samples * scale).astype(np.float32))


def test_a_power_of_two_changes_nothing() -> None:
    reference, samples = clustered(1e-3, 150)
    found = assert_exact(reference, samples)
    for scale in (2.0**300, 2.0**-300):
        assert metrics.precision_recall(reference * scale, samples * scale) == found


@pytest.mark.parametrize(
    ("dtype", "high"),
    [(bool, 2), (np.uint8, 256), (np.int8, 128), (np.uint16, 2**16), (np.int32, 2**31), (np.int64, 2**53)],
)
def test_integers(dtype: Any, high: int) -> None:
    """The differences of unsigned and of small integers overflow in their own dtype."""
    numbers = np.random.default_rng(0)
    one, two = (numbers.integers(0, high, (150, 5)).astype(dtype) for _ in range(2))
    assert_exact(one, two)


@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("block", [2**9, 2**25])
def test_ties_count_as_inside(k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a grid of integers, many distances equal a radius, and many rows are equal."""
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(neighbours, "CENTRE_ELEMENTS", block // 64)  # with 2**9, parts of two centres: fewer than k + 1
    numbers = np.random.default_rng(k)
    one, two = (numbers.integers(0, 4, (n, 3)).astype(np.float32) for n in (130, 90))
    assert_exact(one, two + np.float32(1.0), k)


def test_outliers_change_nothing_for_the_other_rows() -> None:
    numbers = np.random.default_rng(0)
    one, two = numbers.normal(size=(150, 16)), numbers.normal(size=(150, 16))
    one[0] *= 1e8
    assert_exact(one, two)
    two[3] *= 1e14
    assert_exact(one, two)
    assert_exact(one, one + 1e30)
    assert_exact(np.ones((6, 4)), np.full((5, 4), 1.0 + 1e-15))


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [2**11, 2**25])
def test_neither_blocks_nor_the_origin_matter(
    offset: float, k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(neighbours, "CENTRE_ELEMENTS", block)
    numbers = np.random.default_rng(0)
    reference, samples = (numbers.normal(offset, 1.0, (n, 48)).astype(np.float32) for n in (150, 170))
    found = assert_exact(reference, samples, k)
    radii = metrics.squared_radii(reference, k)
    assert metrics.precision_recall(reference, samples, k, reference_radii=radii) == found
    assert metrics.precision_recall(reference, samples, k, reference_radii=0 * radii)[0] == 0.0


def test_ordinary_features_need_no_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """For features of InceptionV3's dimension, float32 products with their worst-case error suffice."""
    rows, bounds = [], neighbours.bounds
    monkeypatch.setattr(neighbours, "bounds", lambda *given: rows.extend(given[-1]) or bounds(*given))
    numbers = np.random.default_rng(0)
    one, two = (numbers.normal(size=(300, 2048)).astype(np.float32) for _ in range(2))
    metrics.precision_recall(one, two)
    assert len(rows) < 12, "1 % of 1,200 searches"
    metrics.precision_recall(*clustered(1e-4, 100))
    assert len(rows) > 100


def test_a_copied_row_is_found_among_rows_that_float32_cannot_tell_apart() -> None:
    """Each sample is a copy of one of 200 references that differ in the last bits of float64."""
    reference = 1.0 + np.random.default_rng(0).integers(0, 2, (200, 30)) * 2.0**-52
    reference = np.concatenate([reference, np.eye(30)])
    samples = reference[:200:2]
    zeros = np.zeros(len(reference))
    assert metrics.precision_recall(reference, samples, reference_radii=zeros)[0] == 1.0
    assert metrics.precision_recall(reference, samples + 2.0**-51, reference_radii=zeros)[0] == 0.0


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (np.full((9, 2), 2**53 + 2), "int64 up to 9.01e.15 in magnitude, and float64 cannot hold"),
        (np.full((9, 2), 1e160), "float64 up to 1e.160 in magnitude"),
        (np.full((9, 2), 1e-160), "float64 up to 1e-160 in magnitude"),
        (np.ones((9, 2), complex), "must be real numbers, got dtype complex128"),
        (np.full((9, 2), "a"), "must be real numbers, got dtype <U1"),
    ],
)
def test_numbers_that_float64_cannot_square_are_refused(features: np.ndarray, words: str) -> None:
    for call in (metrics.moments, metrics.squared_radii, lambda x: metrics.precision_recall(np.ones((9, 2)), x)):
        with pytest.raises(ValueError, match=words):
            call(features)


def test_radii_and_k_that_do_not_fit_are_refused() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 2))
    assert metrics.precision_recall(rows, rows + 1e3, reference_radii=np.full(9, 1e300))[0] == 1.0
    for radii in (np.ones(8), -np.ones(9), np.full(9, np.nan), np.full(9, np.inf)):
        with pytest.raises(ValueError, match="reference_radii must be 9 finite numbers >= 0"):
            metrics.precision_recall(rows, rows, reference_radii=radii)
    with pytest.raises(ValueError, match="k is 0; give the number of a neighbour, at least 1"):
        metrics.squared_radii(rows, 0)
    with pytest.raises(ValueError, match="k = 9 neighbours need more than 9 references, and there are 9"):
        metrics.squared_radii(rows, 9)
