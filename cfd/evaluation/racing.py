"""Racing: the cell of a grid with the lowest Fréchet distance, found from a part of the images of the whole grid.

All cells share their seeds and classes: image i of one cell and image i of another began with the same noise. The
difference of two distances then varies much less than either distance, and its interval, by the delete-a-group
jackknife over the shared images, is short. Four assumptions are made:

- A distance of n images exceeds that of many images by about b / n (Chong and Forsyth, arXiv:1911.07023). The jackknife
  estimates b for each cell, and all distances are extrapolated from n images to the number that a whole cell has.
  Without this, a race of few images would prefer cells whose images vary little.
- Where the grid is too large for each cell to be sampled, the distance is a smooth function of the places of a cell on
  the axes. It is modelled by a Gaussian process, fitted to cells that are spread over the grid. The cells that are
  sampled next are those at the minimum of random functions that agree with the measurements within their errors
  (Thompson 1933). A sharp minimum between the first cells is missed.
- A cell is beaten if the 95 % interval of its difference to the best lies above 0. Intervals of many cells at many
  rounds are not corrected for their number.
- At most half of the cells go on from round to round (successive halving: Jamieson and Talwalkar, arXiv:1502.07943).
  Cells that are neither beaten nor go on are stopped for the sake of the budget, and are reported as such.

Measured on the digits (the paper's 14 weights, ancestral sampler, T = 16, 500 images per cell drawn from a pool of
1,500, 10 % of the images): 98 of 100 races found the argmin of their whole grid, and 100 of 100 with 1,000 images per
cell. Where two cells nearly tie, a race cannot tell them apart from so few images: with dpm_solver at T = 8, whose two
best weights differ by 5 to 7 % in FID, 66 to 90 of 100 races of 5,000 images per cell found the argmin (images drawn
with replacement from pools of 1,000 and 1,500).
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import ceil, log2
from typing import NamedTuple

import numpy as np
import scipy  # scipy imports its submodules on first use
from jaxtyping import Float, Int

from cfd.errors import UserError
from cfd.evaluation import intervals, leave_out, metrics

FIRST_SHARE = 1 / 3
"""The share of the budget that the first round takes on a grid of which it samples only some cells."""
FEWEST = 2 * intervals.GROUPS
"""The fewest images with which a cell takes part: two per group of the jackknife."""
LENGTHS = (0.3, 0.6, 1.2, 2.4)
NOISES = (1e-6, 1e-4, 1e-2)
"""Candidates for the length scale of the Gaussian process, in widths of the grid, and for its noise variance."""
FUNCTIONS = 256
"""The number of random functions whose minima choose the cells of the second round."""

Draw = Callable[[int, int, int], Float[np.ndarray, "n d"]]
"""(cell, first, count) -> the features of the images first to first + count − 1 of a cell."""


class Standing(NamedTuple):
    """How a cell stands after a round.

    `images` have been sampled. `value` is the Fréchet distance, extrapolated to the images of a whole cell, and
    `without` is the distance of the sampled images without each group. `verdict` is "running", "best", "beaten",
    "stopped" (for the budget) or "not sampled", and `stopped_in` is the round in which the cell was stopped.
    """

    images: int = 0
    value: float | None = None
    without: tuple[float, ...] = ()
    verdict: str = "not sampled"
    stopped_in: int | None = None


class Race(NamedTuple):
    """The number of the best cell, how every cell stands, and the number of rounds."""

    best: int
    standings: list[Standing]
    rounds: int


def race(
    draw: Draw,
    places: Float[np.ndarray, "k a"],
    labels: Int[np.ndarray, " _n"],
    mu: Float[np.ndarray, " d"],
    sigma: Float[np.ndarray, "d d"],
    *,
    budget: int,
    agree: Callable[[Int[np.ndarray, " k"]], Int[np.ndarray, " k"]] = lambda targets: targets,
    on_round: Callable[[int, list[Standing]], None] = lambda number, standings: None,
) -> Race:
    """The cell with the lowest Fréchet distance to N(mu, sigma), from at most `budget` images of all cells together.

    `places` are the cells' places on each ordered axis of the grid, as `places_of` gives them. `labels` are the classes
    of the images of a whole cell, the same in all cells. The images of a cell are drawn in order, and none twice.

    Before each round, `agree` takes the number of images that each cell should have after it, 0 for cells that do not
    go on, and returns the number that each shall have: with several processes, that of process 0. After each round,
    `on_round` takes its number and how all cells stand. The cell with the lowest value at the end is the best, even if
    others are not beaten. Raises ValueError as `first_targets` does.
    """
    distances = distance_function(mu, sigma, labels)
    features: dict[int, np.ndarray] = {}
    standings, number = [Standing()] * len(places), 0
    targets = agree(first_targets(places, len(labels), budget))
    while True:
        number += 1
        running = np.flatnonzero(targets).tolist()
        for cell in running:
            before = features.get(cell, np.zeros((0, len(mu))))
            more = draw(cell, len(before), int(targets[cell]) - len(before))
            features[cell] = np.concatenate([before, more])
            standings[cell] = Standing(len(features[cell]), *distances(features[cell]), "running")
        best, *others = sorted(running, key=lambda cell: (standings[cell].value, cell))
        beaten = [cell for cell in others if is_beaten(standings[cell], standings[best])]
        left = [cell for cell in (best, *others) if cell not in beaten]
        if number == 1 and len(running) < len(places):
            likely = most_likely(places, running, [standings[cell] for cell in running], -(-len(running) // 2))
            left = [best, *(cell for cell in likely if cell not in (best, *beaten))]
        else:
            left = left[: -(-len(running) // 2)]
        targets = next_targets([standing.images for standing in standings], left, len(labels), budget)
        targets = agree(targets)
        for cell in running:
            if not targets[cell]:
                verdict = "beaten" if cell in beaten else "stopped"
                standings[cell] = standings[cell]._replace(verdict=verdict, stopped_in=number)
        if not targets.any():
            standings[best] = standings[best]._replace(verdict="best", stopped_in=None)
        on_round(number, standings)
        if not targets.any():
            return Race(best, standings, number)


def default_budget(cells: int, count: int) -> int:
    """The images that a race may sample: 10 % of those of the grid, at most 20 cells' worth, or 2 % if that is more."""
    return int(count * max(0.02 * cells, min(0.1 * cells, 20.0)))


def places_of(columns: Sequence[Sequence[float | str]]) -> Float[np.ndarray, "k a"]:
    """The places of k cells from their settings, one sequence of k values per setting.

    A setting of numbers is an axis with places from 0 to 1, evenly spaced in the order of its values. A setting of
    words has an axis for each word but one, with the place 1 for that word and 0 for others.
    """
    axes: list[list[float]] = []
    for column in columns:
        values = sorted(set(column))
        if isinstance(values[0], str):
            axes += [[float(value == word) for value in column] for word in values[1:]]
        elif len(values) > 1:
            axes.append([values.index(value) / (len(values) - 1) for value in column])
    return np.array(axes).T if axes else np.zeros((len(columns[0]), 1))


def distance_function(
    mu: Float[np.ndarray, " d"], sigma: Float[np.ndarray, "d d"], labels: Int[np.ndarray, " _n"]
) -> Callable[[Float[np.ndarray, "m d"]], tuple[float, tuple[float, ...]]]:
    """The function from the features of a cell's first images to (distance, distances without each group of images).

    The first is extrapolated from m images to those of `labels`, with a bias of b / m, where the jackknife gives
    b = m (G − 1) (mean of the distances without a group − distance).
    """
    root, group = metrics.covariance_root(sigma, "first")[1], intervals.groups(labels)

    def distance(features: Float[np.ndarray, "m d"]) -> tuple[float, tuple[float, ...]]:
        whole, count = metrics.moments(features), len(features)
        value = metrics.frechet_distance(mu, sigma, *metrics.mean_and_cov(whole), root)
        without = leave_out.frechet_distance(mu, sigma, root, features, group[:count], whole)
        bias = (len(without) - 1) * (float(np.mean(without)) - value)
        return value - bias * (1.0 - count / len(labels)), tuple(without)

    return distance


def is_beaten(cell: Standing, best: Standing) -> bool:
    """Whether the 95 % interval of the difference of two cells that share their images lies above 0."""
    assert cell.value is not None and best.value is not None, "both cells have images"
    without = np.subtract(cell.without, best.without).tolist()
    return intervals.interval(cell.value - best.value, without)[0] > 0.0


def rounds_left(cells: int) -> int:
    """The rounds in which half of the cells are stopped, until one is left."""
    return max(1, ceil(log2(max(cells, 1))))


def first_targets(places: Float[np.ndarray, "k a"], count: int, budget: int) -> Int[np.ndarray, " k"]:
    """The images of each cell in the first round: as many of each, or none except for cells spread over the grid.

    All cells are sampled if each then has a fiftieth of its images, and FEWEST, within its share of the budget. Raises
    ValueError if the budget is not FEWEST images of at least three cells, or of all if there are fewer.
    """
    cells, axes = places.shape
    if not can_begin(cells, count, budget):
        higher = (n for n in range(count + 1, 2**31) if can_begin(cells, n, default_budget(cells, n)))
        raise UserError(
            f"a race of {cells} cells of {count} images within {budget} images cannot begin with {FEWEST} images of at "
            f"least three cells: set eval.num_samples to {next(higher)}, or eval.racing to False"
        )
    if samples_all(cells, count, budget):
        return np.full(cells, min(budget // rounds_left(cells) // cells, count))
    share, wanted = int(budget * FIRST_SHARE), 3 * (axes + 1) * (axes + 2) // 2
    chosen = spread(places, min(cells, wanted, affordable(count, budget)))
    targets = np.zeros(cells, np.int64)
    targets[chosen] = min(share // len(chosen), count)
    return targets


def samples_all(cells: int, count: int, budget: int) -> bool:
    """Whether the first round samples all cells: a fiftieth of their images, and FEWEST, within its share."""
    return cells == 1 or budget // rounds_left(cells) // cells >= min(max(FEWEST, count // 50), count)


def affordable(count: int, budget: int) -> int:
    """The cells that the first round of a part of the grid can sample, by its share of the budget."""
    return int(budget * FIRST_SHARE) // min(FEWEST, count)


def can_begin(cells: int, count: int, budget: int) -> bool:
    """Whether the first round can sample all cells, or three at least."""
    return samples_all(cells, count, budget) or affordable(count, budget) >= min(3, cells)


def spread(places: Float[np.ndarray, "k a"], number: int) -> list[int]:
    """The numbers of cells that are spread over the grid: the middle one, and then always the one farthest from all."""
    nearest = np.full(len(places), np.inf)
    chosen: list[int] = []
    middle = int(((places - 0.5) ** 2).sum(axis=1).argmin())
    while len(chosen) < number:
        chosen.append(middle if not chosen else int(nearest.argmax()))
        nearest = np.minimum(nearest, ((places - places[chosen[-1]]) ** 2).sum(axis=1))
    return chosen


def next_targets(images: Sequence[int], left: Sequence[int], count: int, budget: int) -> Int[np.ndarray, " k"]:
    """The images of each cell in the next round: equally many of those that are left, within the round's share.

    All zeros if one cell is left, or if none can get more images.
    """
    have = np.array(images)
    targets = np.zeros(len(have), np.int64)
    share = (budget - int(have.sum())) // rounds_left(len(left))
    own = have[list(left)]
    level = max((n for n in range(int(own.max()), count + 1) if np.maximum(n - own, 0).sum() <= share), default=0)
    if len(left) > 1 and (level > own).any():
        targets[list(left)] = level
    return targets


def most_likely(
    places: Float[np.ndarray, "k a"], sampled: Sequence[int], standings: Sequence[Standing], number: int
) -> list[int]:
    """The cells that are most often at the minimum of random functions over the grid, the most frequent first.

    A function is a posterior draw of a Gaussian process (Rasmussen and Williams 2006, Algorithm 2.1), fitted to values
    of the `sampled` cells to which a random error is added. The errors have the covariance that the jackknife gives,
    over all cells together.
    """
    noise = np.random.default_rng(0)
    values = np.array([standing.value for standing in standings])
    without = np.array([standing.without for standing in standings])
    groups = without.shape[1]
    errors = (without - without.mean(axis=1, keepdims=True)) * np.sqrt((groups - 1) / groups)
    y = values[:, None] + errors @ noise.standard_normal((groups, FUNCTIONS))
    centre, scale = y.mean(axis=0), max(float(values.std()), 1e-12)
    y = (y - centre) / scale
    squared = ((places[:, None] - places[None]) ** 2).sum(axis=-1)
    at = squared[np.ix_(sampled, sampled)]

    def fitted(length: float, variance: float) -> tuple[float, float, np.ndarray]:
        factor = np.linalg.cholesky(np.exp(-0.5 * at / length**2) + variance * np.eye(len(at)))
        white = scipy.linalg.solve_triangular(factor, (values - values.mean()) / scale, lower=True)
        amplitude = max(float(np.mean(white**2)), 1e-12)  # equal values have none
        return len(at) * np.log(amplitude) / 2 + float(np.log(np.diag(factor)).sum()), length, factor

    _, length, factor = min((fitted(*pair) for pair in product(LENGTHS, NOISES)), key=lambda found: found[0])
    towards = scipy.linalg.solve_triangular(factor, np.exp(-0.5 * squared[sampled] / length**2), lower=True)
    means = towards.T @ scipy.linalg.solve_triangular(factor, y, lower=True)
    white = scipy.linalg.solve_triangular(factor, y[:, :1], lower=True)
    left = np.exp(-0.5 * squared / length**2) - towards.T @ towards
    variances, vectors = np.linalg.eigh(left)
    spread_of = vectors * np.sqrt(np.maximum(variances, 0.0) * float(np.mean(white**2)))
    functions = means + spread_of @ noise.standard_normal((len(places), FUNCTIONS))
    often = np.bincount(functions.argmin(axis=0), minlength=len(places))
    order = np.lexsort((means.mean(axis=1), -often))
    return order[:number].tolist()
