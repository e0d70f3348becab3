"""Races over Gaussian cells, whose Fréchet distances are known in closed form."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from cfd.errors import UserError
from cfd.evaluation import intervals, metrics, racing

MU, SIGMA = np.zeros(4), np.eye(4)


def gaussian_cells(
    places: np.ndarray, best: np.ndarray, count: int, seed: int = 0
) -> tuple[racing.Draw, np.ndarray, list[list[tuple[int, int]]]]:
    """Cells with images of N(m 1, (1 + m)² I), where m is the distance of a cell's place to `best`.

    Returns the function that draws, the closed-form distances 2 · 4 · m² from N(0, I), and what was drawn of each cell.
    """
    noise = np.random.default_rng(seed).standard_normal((count, 4))
    m = np.linalg.norm(places - best, axis=1)
    drawn: list[list[tuple[int, int]]] = [[] for _ in places]

    def draw(cell: int, first: int, number: int) -> np.ndarray:
        drawn[cell].append((first, number))
        return noise[first : first + number] * (1 + m[cell]) + m[cell]

    return draw, 8 * m**2, drawn


def run(draw: racing.Draw, places: np.ndarray, count: int, budget: int, **more: Callable) -> racing.Race:
    return racing.race(draw, places, np.arange(count) % 10, MU, SIGMA, budget=budget, **more)


def test_finds_the_best_of_a_few_cells_from_a_tenth_of_their_images() -> None:
    places = racing.places_of([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0]])
    draw, truth, drawn = gaussian_cells(places, np.array([0.31]), 4000)
    race = run(draw, places, 4000, 5600)
    assert race.best == truth.argmin() == 4
    assert [standing.verdict for standing in race.standings].count("best") == 1
    assert race.standings[4].verdict == "best"
    assert race.standings[-1].verdict == "beaten" and race.standings[-1].stopped_in == 1
    for parts, standing in zip(drawn, race.standings, strict=True):
        ends = [first + number for first, number in parts]
        assert [first for first, _ in parts] == [0, *ends[:-1]], "images are drawn in order, and none twice"
        assert ends[-1] == standing.images
    assert sum(standing.images for standing in race.standings) <= 5600


@pytest.mark.parametrize("seed", range(3))
def test_finds_a_cell_near_the_best_of_a_large_grid_from_a_fiftieth_of_its_images(seed: int) -> None:
    axis = [float(i) for i in range(8)]
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    places = racing.places_of(list(grid.T.tolist()))
    best = np.random.default_rng(seed).uniform(0.2, 0.8, 3)
    draw, truth, _ = gaussian_cells(places, best, 2000, seed)
    budget = len(places) * 2000 // 50
    race = run(draw, places, 2000, budget)
    assert sum(standing.images for standing in race.standings) <= budget
    assert truth[race.best] <= np.sort(truth)[5], "one of the best 6 of 512"
    assert sum(standing.verdict == "not sampled" for standing in race.standings) > 400


@pytest.mark.parametrize(("cells", "budget"), [(1, 100), (2, 300), (5, 400), (200, 500)])
def test_ends_with_identical_cells(cells: int, budget: int) -> None:
    places = racing.places_of([list(map(float, range(cells)))])
    draw, _, _ = gaussian_cells(np.zeros((cells, 1)), np.zeros(1), 200)
    race = run(draw, places, 200, budget)
    assert 0 < sum(standing.images for standing in race.standings) <= budget
    assert race.rounds <= 10 and not any(standing.verdict == "beaten" for standing in race.standings)


def test_no_cell_gets_more_images_than_a_whole_one() -> None:
    places = racing.places_of([[1.0, 2.0, 3.0]])
    draw, truth, _ = gaussian_cells(places, np.array([0.05]), 60)
    race = run(draw, places, 60, 10_000)
    assert race.best == truth.argmin()
    assert max(standing.images for standing in race.standings) == 60 and race.rounds == 1


def test_processes_follow_the_decisions_of_the_first() -> None:
    places = racing.places_of([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    draw, _, _ = gaussian_cells(places, np.array([0.4]), 1000)
    decisions: list[np.ndarray] = []

    def recorded(targets: np.ndarray) -> np.ndarray:
        decisions.append(targets)
        return targets

    first = run(draw, places, 1000, 900, agree=recorded)
    other, _, drawn = gaussian_cells(places, np.array([0.4]), 1000, seed=1)
    replies = iter(decisions)
    second = run(other, places, 1000, 900, agree=lambda targets: next(replies))
    assert [standing.images for standing in second.standings] == [standing.images for standing in first.standings]
    assert next(replies, None) is None and all(drawn)


def test_the_extrapolated_distance_has_the_mean_of_the_distance_of_a_whole_cell() -> None:
    labels = np.zeros(1000, np.int64)
    distance = racing.distance_function(MU, SIGMA, labels)
    noise = np.random.default_rng(0).standard_normal((60, 1000, 4)) * [0.7, 1.0, 1.0, 1.5]

    def fid(rows: np.ndarray) -> float:
        return metrics.frechet_distance(MU, SIGMA, *metrics.mean_and_cov(metrics.moments(rows)))

    gap = [distance(rows[:80])[0] - fid(rows) for rows in noise]
    plain = [fid(rows[:80]) - fid(rows) for rows in noise]
    error = np.std(gap) / np.sqrt(len(gap))
    assert abs(np.mean(gap)) < 3 * error < np.mean(plain)
    whole, without = distance(noise[0])
    np.testing.assert_allclose(whole, fid(noise[0]), rtol=1e-9)
    groups = intervals.groups(labels)
    np.testing.assert_allclose(without[3], fid(noise[0][groups != 3]), rtol=1e-9)


def test_a_cell_is_beaten_by_the_interval_of_the_difference() -> None:
    spread = np.linspace(-5.0, 5.0, 20)
    best = racing.Standing(100, 10.0, tuple(10.0 + spread), "running")
    close = racing.Standing(100, 10.1, tuple(10.1 + spread + np.linspace(-1e-3, 1e-3, 20)), "running")
    unpaired = racing.Standing(100, 10.1, tuple(10.1 + spread[::-1]), "running")
    assert racing.is_beaten(close, best) and not racing.is_beaten(unpaired, best)
    assert not racing.is_beaten(best, best)


def test_places_are_evenly_spaced_on_axes_of_numbers_and_apart_for_words() -> None:
    places = racing.places_of([[0.0, 4.0, 1.0], [7.0, 7.0, 7.0], ["", "apg()", ""]])
    np.testing.assert_array_equal(places, [[0.0, 0.0], [1.0, 1.0], [0.5, 0.0]])


def test_the_default_budget_is_a_tenth_of_few_cells_and_a_fiftieth_of_many() -> None:
    assert racing.default_budget(14, 5000) == 7000
    assert racing.default_budget(1000, 500) == 10_000
    assert racing.default_budget(4000, 500) == 40_000


def test_a_budget_that_is_too_small_is_refused_and_its_remedy_works() -> None:
    places = racing.places_of([list(map(float, range(14)))])
    message = r"within 70 images cannot begin.*set eval\.num_samples to (\d+), or"
    with pytest.raises(UserError, match=message) as raised:
        racing.first_targets(places, 50, racing.default_budget(14, 50))
    (enough,) = map(int, re.findall(message, str(raised.value)))
    assert racing.first_targets(places, enough, racing.default_budget(14, enough)).any()
    with pytest.raises(UserError):  # a smaller number is not enough
        racing.first_targets(places, enough - 1, racing.default_budget(14, enough - 1))
