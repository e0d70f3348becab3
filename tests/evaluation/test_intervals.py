"""The jackknife against textbook standard errors, and its groups."""

import numpy as np
import pytest
import scipy.stats

from cfd.evaluation import intervals, leave_out


@pytest.mark.parametrize("count", [20, 7])
def test_of_a_mean_it_is_the_textbook_standard_error(count: int) -> None:
    """With one image in each group."""
    x = np.random.default_rng(0).normal(size=count)
    group = intervals.groups(np.zeros(count, np.int64))
    assert sorted(group) == list(range(count))
    without = leave_out.mean(x, group)
    assert without == pytest.approx([np.delete(x, i).mean() for i in np.argsort(group)], rel=1e-12)
    assert intervals.standard_error(without) == pytest.approx(scipy.stats.sem(x), rel=1e-12)
    low, high = intervals.interval(x.mean(), without)
    expected = scipy.stats.t.interval(0.95, count - 1, x.mean(), scipy.stats.sem(x))
    assert (low, high) == pytest.approx(expected, rel=1e-9)


def test_of_a_ratio_of_two_sets_it_is_the_delta_method() -> None:
    """Any function of the leave-out values has an interval. The sets are paired: their errors partly cancel."""
    numbers = np.random.default_rng(1)
    x = 5.0 + numbers.normal(size=20_000)
    y = x + 0.5 * numbers.normal(size=20_000)
    group = intervals.groups(np.zeros(len(x), np.int64))
    ratio = np.divide(leave_out.mean(x, group), leave_out.mean(y, group))
    exact = np.std((x - y * x.mean() / y.mean()) / y.mean()) / np.sqrt(len(x))
    assert intervals.standard_error(ratio.tolist()) == pytest.approx(exact, rel=0.5)  # 19 degrees of freedom


@pytest.mark.parametrize(
    ("counts", "number"),
    [((50,) * 10, 25), ((5000,) * 10, 20), ((100,) * 10, 20), ((10,) * 100, 10), ((500,), 20), ((3, 4), 7)],
)
def test_groups_are_even_within_each_class_and_in_all(counts: tuple[int, ...], number: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(2).shuffle(labels)
    group = intervals.groups(labels)
    assert group.max() + 1 == number == intervals.number_of_groups(labels)
    for rows in (labels == label for label in range(-1, len(counts))):
        sizes = np.bincount(group[rows] if rows.any() else group, minlength=number)
        assert np.ptp(sizes) <= 1
    if len(set(counts)) == 1 and counts[0] % number == 0:
        assert all(np.ptp(np.bincount(labels[group == g])) == 0 for g in range(number)), "every group has all classes"


def test_too_few_values_are_refused() -> None:
    for without in ([], [1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="a standard error needs 2 finite values or more"):
            intervals.standard_error(without)
