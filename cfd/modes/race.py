"""The race of `eval.racing`: the best cell of a sweep's grid, found from a part of the images of all cells.

race.csv                after each round, how every cell stands
race/<manifest>.npz     the features of the images that a cell has sampled so far

A race that is killed reads the features again, and therefore takes the same decisions and goes on at the cell at which
it was killed. All processes sample, extract features and compute distances; process 0 decides which cells go on.
"""

import csv
import functools
import io
import os
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from cfd.config import Config
from cfd.devices import parallel, preemption, progress
from cfd.errors import UserError
from cfd.evaluation import intervals, racing
from cfd.evaluation.features import FeatureNetwork
from cfd.evaluation.racing import Standing
from cfd.evaluation.reference import Reference
from cfd.modes.cells import Cell, interval_of, row_of, rows_of_grid
from cfd.modes.measuring import Model, sampling_of_row
from cfd.modes.sampler import Guide, Sampler, SampleSpec, Sampling, compile_sampler
from cfd.runs import files, manifest, npz, results
from cfd.runs.results import SETTINGS, Row

COLUMNS = (*SETTINGS, "images", "fid", "fid_low", "fid_high", "verdict", "stopped_in", "manifest")
"""The columns of race.csv. "fid" is extrapolated to "num_samples" images."""
MAX_BYTES = 2**33


def check(config: Config) -> None:
    """Raises ValueError, before anything is sampled, if the grid of `eval` cannot be raced over."""
    if len(config.eval.seeds) > 1:
        raise UserError(
            f"config.eval.racing is True, and config.eval.seeds has {len(config.eval.seeds)} seeds, but the cells of a "
            "race share one: set eval.seeds to () and eval.seed to one of them, or eval.racing to False"
        )
    rows = [row for step in config.eval.steps or (config.sample.step,) for row in rows_of_grid(config, step)]
    count = config.eval.num_samples
    racing.first_targets(places_of(rows), count, racing.default_budget(len(rows), count))


def places_of(rows: Sequence[Row]) -> Float[np.ndarray, "k a"]:
    """The places of cells on the axes of their grid. A cell without an interval has one that is wider than all."""
    ends = [interval_of(row) or (-np.inf, np.inf) for row in rows]
    words = [[row[key] for row in rows] for key in ("guide", "rule")]
    numbers = [[float(row[key]) for row in rows] for key in ("step", "ema", "num_steps", "v", "w")]
    return racing.places_of([*words, *numbers, *zip(*ends, strict=True)])


def best_cell(
    model: Model,
    folder: str,
    cells: list[Cell],
    num_classes: int,
    features: FeatureNetwork,
    reference: Reference,
) -> Cell:
    """The cell with the lowest FID, from the images that `racing.default_budget` allows. Every process must call it.

    Reads the winner from race.csv if it holds a finished race of these cells. Raises `preemption.Stopped` on request.
    """
    names = [manifest.manifest_name(cell.manifest) for cell in cells]
    finished = winner(folder, names)
    parallel.barrier("race looked for")
    if finished is not None:
        if jax.process_index() == 0:
            print(f"The race is finished: {describe(cells, finished)} is the best; see {folder}/race.csv.", flush=True)
        return cells[finished]
    count = cells[0].row["num_samples"]
    labels = labels_of(cells[0], num_classes)
    budget = racing.default_budget(len(cells), count)
    if jax.process_index() == 0:
        print(f"A race of {len(cells)} cells, within {budget:,} of {len(cells) * count:,} images.", flush=True)
    places = places_of([row for row, _ in cells])
    size = int(racing.first_targets(places, count, budget).max())
    sampler_at = functools.cache(functools.partial(compile_cell, model, size))
    with tqdm(desc="race", total=budget, unit="image", unit_scale=True, smoothing=0.1, disable=None) as bar:

        def draw(number: int, first: int, wanted: int) -> Float[np.ndarray, "n d"]:
            path = os.path.join(folder, "race", f"{names[number]}.npz")
            there = read_features(path, len(reference.mu)) if files.exists(path) else None
            parallel.barrier("features of the race looked for")
            if there is None or len(there) < first + wanted:
                before = np.zeros((0, len(reference.mu)), np.float32) if there is None else there
                row = cells[number].row
                sampler = sampler_at(sampling_of_row(model, row), model.guide_at(row["guide"]))
                more = sampled_features(model, sampler, row, labels, len(before), first + wanted, features)
                there = np.concatenate([before, more])
                preemption.check_held()
                if jax.process_index() == 0:
                    npz.write_npz(path, {"features": there})
                parallel.barrier("features of the race")
            bar.update(wanted)
            progress.report(f"{bar.n} images of the race")
            return there[first : first + wanted]

        def on_round(number: int, standings: list[Standing]) -> None:
            if jax.process_index() == 0:
                write_standings(folder, cells, standings)
                tqdm.write(round_in_words(cells, number, standings))
            parallel.barrier("round of the race")

        race = racing.race(
            draw,
            places,
            labels,
            reference.mu,
            reference.sigma,
            budget=budget,
            agree=lambda targets: parallel.gather_rows(targets.astype(np.int32))[: len(cells)].astype(np.int64),
            on_round=on_round,
        )
    best = winner(folder, names)
    assert best is not None, f"{folder}/race.csv, as process 0 has just written it, names the best cell"
    if jax.process_index() == 0:
        print(result_in_words(folder, cells, best, race.standings), flush=True)
    parallel.barrier("race finished")
    return cells[best]


def read_features(path: str, width: int) -> Float[np.ndarray, "n d"]:
    """The features, `width` per image, in a file of the race. Raises ValueError, with the remedy, if it is damaged."""
    remedy = "remove the file, and --mode=sweep samples its images again"
    features = npz.read_npz(path, ["features"], max_bytes=MAX_BYTES, remedy=remedy)["features"]
    if features.shape[1:] != (width,):
        raise UserError(f"{path} holds features of shape {features.shape}, expected [N, {width}]: {remedy}")
    return features


def compile_cell(model: Model, size: int, sampling: Sampling, guide: Guide | None) -> Sampler:
    """The sampler of the cells with this sampling and guide, in batches of at most `size` images.

    Smaller batches than those of a sweep leave less of the last batch of each round unused.
    """
    whole = -(-size // model.mesh.size) * model.mesh.size
    sampling = sampling._replace(batch_size=min(sampling.batch_size, whole))
    return compile_sampler(model.network, sampling, model.mesh, guide and guide.network)


def labels_of(cell: Cell, num_classes: int) -> Int[np.ndarray, " n"]:
    """The classes of the images of a whole cell."""
    row = cell.row
    counts = cell.manifest.get("class_counts")
    return manifest.labels_of(row["labels"], row["seed"], row["num_samples"], num_classes, counts)


def sampled_features(
    model: Model,
    sampler: Sampler,
    row: Row,
    labels: Int[np.ndarray, " _n"],
    first: int,
    end: int,
    features: FeatureNetwork,
) -> Float[np.ndarray, "n d"]:
    """The features of the images number `first` to `end` − 1 of a cell; they are those that a sweep would measure."""
    guide = model.guide_at(row["guide"])
    spec = SampleSpec(
        np.full(end - first, row["seed"], np.uint32),
        np.arange(first, end, dtype=np.int32),
        labels[first:end],
        np.full(end - first, row["w"], np.float32),
    )
    weights = {"classifier": model.classifier, "guide": guide and guide.params}
    parts = []
    params = model.params_at(row["step"], row["ema"])
    for images in sampler(params, spec, v=row["v"], interval=interval_of(row), **weights):
        parts.append(features.extract(images).pool)
        if preemption.requested():
            raise preemption.Stopped(f"Stopped in the race at w = {row['w']:g}")
    return np.concatenate(parts)


def winner(folder: str, names: list[str]) -> int | None:
    """The number of the best cell, if race.csv holds a finished race of the cells of these manifests alone."""
    lines = results.whole_lines(os.path.join(folder, "race.csv"))
    found = {row.get("manifest"): row.get("verdict") for row in csv.DictReader(lines)}  # None if it is damaged
    best = [names.index(name) for name, verdict in found.items() if verdict == "best" and name in names]
    return best[0] if best and found.keys() == set(names) else None


def write_standings(folder: str, cells: Sequence[Cell], standings: Sequence[Standing]) -> None:
    """Writes race.csv: the settings of every cell, and how it stands."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for cell, standing in zip(cells, standings, strict=True):
        row = {key: value for key, value in row_of(cell).items() if key in COLUMNS}
        row |= {"images": standing.images, "verdict": standing.verdict, "stopped_in": standing.stopped_in}
        if standing.value is not None:
            low, high = intervals.interval(standing.value, standing.without)
            row |= {"fid": standing.value, "fid_low": low, "fid_high": high}
        table.writerow(row)
    files.write_atomically(os.path.join(folder, "race.csv"), text.getvalue())


def describe(cells: Sequence[Cell], number: int) -> str:
    """The settings of a cell in which the cells of the race differ, and its weight."""
    rows = [row for row, _ in cells]
    keys = [key for key in SETTINGS if key != "w" and len({row[key] for row in rows}) > 1]
    return ", ".join(f"{key} = {rows[number][key]}" for key in (*keys, "w"))


def round_in_words(cells: Sequence[Cell], number: int, standings: Sequence[Standing]) -> str:
    """How many cells were sampled and stopped in a round, and which one leads."""
    rows = [(standing.value, i) for i, standing in enumerate(standings) if standing.verdict in ("running", "best")]
    value, leader = min((value, i) for value, i in rows if value is not None)
    stopped = [standing.verdict for standing in standings if standing.stopped_in == number]
    return (
        f"Round {number}: {describe(cells, leader)} leads after {standings[leader].images} images, with an expected "
        f"{cells[leader].row['fid_name']} of {value:.4g}; {stopped.count('beaten')} cells were beaten and "
        f"{stopped.count('stopped')} stopped for the budget"
    )


def result_in_words(folder: str, cells: Sequence[Cell], best: int, standings: Sequence[Standing]) -> str:
    """The best cell, the share of the images that were sampled, and what the race leaves out."""
    sampled, whole = sum(standing.images for standing in standings), len(cells) * cells[0].row["num_samples"]
    verdicts = [standing.verdict for standing in standings]
    return (
        f"The race sampled {sampled:,} of {whole:,} images ({sampled / whole:.1%}). Best: {describe(cells, best)}. "
        f"Of the others, {verdicts.count('beaten')} are beaten beyond their intervals, {verdicts.count('stopped')} "
        "were stopped for the budget without being beaten, and "
        f"{verdicts.count('not sampled')} were not sampled. They have no rows in sweep.csv; {folder}/race.csv says how "
        "they stand."
    )
