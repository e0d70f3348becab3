"""The cells of a sweep, sampled and measured one after the other.

All processes sample and extract features. A thread of process 0 computes the metrics from them.
"""

import concurrent.futures
import contextlib
import functools
import glob
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8
from tqdm import tqdm

from cfd.devices import buckets, parallel, preemption, progress, watchdog
from cfd.errors import UserError
from cfd.evaluation import intervals
from cfd.evaluation.features import FeatureNetwork
from cfd.evaluation.reference import Reference
from cfd.evaluation.scores import Scoring, prepare, start_scoring
from cfd.modes import rules
from cfd.modes.cells import Cell, interval_of, row_of
from cfd.modes.sampler import (
    Guide,
    Network,
    Sampler,
    SampleSpec,
    Sampling,
    compile_sampler,
    evaluation_flops,
    evaluations,
    second_flops,
)
from cfd.runs import manifest, npz, results
from cfd.runs.results import MEASURED, Row


def no_guide(text: str) -> Guide | None:
    """The guide of rows that name none. Raises ValueError for a row that names one."""
    if text:
        raise ValueError(f"the row has the guide {text!r}, and the model none: give Model.guide_at")
    return None


class Model(NamedTuple):
    """A trained network and how it is sampled.

    `params_at(step, ema)` are its parameters, and `classifier` is its noisy classifier or None; both are on all
    devices. `guide_at(text)` is the guide of a row, on all devices too, or None for "". Guides that differ in
    parameters alone have the same network, and therefore share a program.
    """

    network: Network
    sampling: Sampling
    params_at: Callable[[int, float], Any]
    classifier: Any
    mesh: Mesh
    guide_at: Callable[[str], Guide | None] = no_guide


class Measuring(NamedTuple):
    """A cell that was sampled in `seconds`. `scoring` computes its metrics on process 0, and is None on others.

    The metrics are computed while the next cell is sampled. `where` names the cell for the user, and `has_classes` says
    whether classes were asked for.
    """

    cell: Cell
    scoring: Scoring | None
    seconds: float
    where: str
    has_classes: bool


def measure_cells(
    model: Model,
    folder: str,
    cells: list[Cell],
    num_classes: int,
    features: FeatureNetwork,
    reference: Reference,
    held_out: Reference | None = None,
) -> None:
    """Samples the images of one cell after the other, and writes the row of each as soon as it is measured.

    A cell is measured while the next one is sampled, and is written before that one is measured. An error of the
    sampling, or a request to stop, leaves no cell unwritten whose images are complete. The progress bar counts network
    evaluations.
    """

    @functools.cache
    def sampler_at(sampling: Sampling, guide: Network | None) -> Sampler:
        return compile_sampler(model.network, sampling, model.mesh, guide)

    student = model.network.student
    costs = [evaluations(sampling_of_row(model, row), row["w"], interval_of(row), student) for row, _ in cells]
    total = sum(row["num_samples"] * cost for (row, _), cost in zip(cells, costs, strict=True))
    flops = total_flops(model, cells, costs)
    if jax.process_index() == 0:
        cells_to_measure = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
        print(f"{cells_to_measure} to measure: {total:,} network evaluations, {flops:.3g} FLOP.", flush=True)
    prepared = prepare(reference, held_out) if jax.process_index() == 0 else None
    several = cells[0].row["step"] != cells[-1].row["step"]
    before: Measuring | None = None
    with tqdm(total=total, desc="sweep", unit="eval", unit_scale=True, smoothing=0.1, disable=None) as bar:
        for cell, cost in zip(cells, costs, strict=True):
            start, row = time.perf_counter(), cell.row
            guide = model.guide_at(row["guide"])
            sampler = sampler_at(sampling_of_row(model, row), guide and guide.network)
            batches = sampled(model, sampler, row_of(cell), folder, num_classes, cell.manifest.get("class_counts"))
            scoring = None
            if jax.process_index() == 0:
                scoring = start_scoring(row["num_samples"], features.name, reference, held_out, prepared)
            try:
                with contextlib.closing(batches):
                    for images, labels in batches:
                        outputs = features.extract(images)
                        if scoring is not None:
                            scoring.put((outputs, labels))
                        bar.update(len(images) * cost)
                        before = finish(folder, before, wait=False)
                seconds = time.perf_counter() - start
                finish(folder, before)
            except BaseException as error:
                if scoring is not None:
                    scoring.put(concurrent.futures.CancelledError())
                    if before is not None and isinstance(error, Exception) and not isinstance(error, preemption.Lost):
                        save(folder, before)
                raise
            if scoring is not None:
                scoring.put(None)
            step = f"step {row['step']}  " if several else ""
            step += f"EMA {row['ema']:g}  " if row["ema"] else ""
            guidance = "".join(f"{row[key]}  " for key in ("rule", "guide") if row[key])
            where = f"{step}T {row['num_steps']}  {guidance}w {row['w']:g}"
            before = Measuring(cell, scoring, seconds, where, num_classes > 0)
        finish(folder, before)


def sampling_of_row(model: Model, row: Row) -> Sampling:
    """How a row is sampled by a program that serves all weights, intervals and seeds."""
    guidance = rules.without_interval(rules.guidance_of(row["rule"]))
    return model.sampling._replace(num_steps=row["num_steps"], guidance=guidance)


def total_flops(model: Model, cells: Sequence[Cell], costs: Sequence[int]) -> float:
    """Floating-point operations of all network evaluations of cells, of which an image takes `costs`."""
    params = model.params_at(cells[0].row["step"], cells[0].row["ema"])
    first = evaluation_flops(model.network, params)
    second: dict[str, float] = {}
    total = 0.0
    for (row, _), cost in zip(cells, costs, strict=True):
        text, seconds = row["guide"], cost - row["num_steps"]
        if seconds and text not in second:
            second[text] = second_flops(model.network, params, first, model.guide_at(text))
        total += row["num_samples"] * (row["num_steps"] * first + (seconds * second[text] if seconds else 0.0))
    return total


def finish(folder: str, cell: Measuring | None, *, wait: bool = True) -> Measuring | None:
    """Writes the row of a cell as soon as its metrics are there, and returns None. Every process must call it.

    Without `wait`, returns the cell if they are not there yet. If process 0 cannot measure the cell or write its row,
    all processes raise an error.
    """
    if cell is None or not parallel.total(int(wait or (cell.scoring is not None and cell.scoring.result.done()))):
        return cell
    watchdog.alive(slow=True)
    if cell.scoring is not None:
        concurrent.futures.wait([cell.scoring.result])
    preemption.check_held()
    error = None
    if cell.scoring is not None:
        try:
            save(folder, cell)
        except Exception as caught:
            error = caught
    if parallel.total(int(error is not None)):
        raise error or UserError(f"process 0 could not measure {cell.where}, and says why")
    progress.report(f"{results.count_rows(folder)} rows")
    return None


def save(folder: str, cell: Measuring) -> None:
    """Waits for the metrics of a cell on process 0, writes its manifest and its row, and prints the row."""
    assert cell.scoring is not None, "process 0 alone measures"
    scores = cell.scoring.result.result()
    values = scores.values | ({} if cell.has_classes else {"class_accuracy": None})
    row: Row = row_of(cell.cell) | values | intervals_of(values, scores.without)
    results.write_without(folder, row["manifest"], scores.without)
    results.write_classes(folder, row["manifest"], scores.classes)
    manifest.write_manifest(folder, cell.cell.manifest)
    results.append_row(folder, row)
    measured = "  ".join(f"{key} {row[key]:.4g}" for key in MEASURED if row[key] is not None)
    rate = cell.cell.row["num_samples"] / cell.seconds
    tqdm.write(f"{cell.where}  {measured}  ({rate:.3g} images/s sampled and measured)")


def intervals_of(values: Mapping[str, float | None], without: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The ends of the 95 % intervals of measures, as columns of sweep.csv, and the standard error of KID."""
    ends = {}
    for key, parts in without.items():
        if (value := values[key]) is not None:
            ends[f"{key}_low"], ends[f"{key}_high"] = intervals.interval(value, parts)
    return ends | ({"kid_se": intervals.standard_error(without["kid"])} if "kid_low" in ends else {})


def sampled(
    model: Model,
    sampler: Sampler,
    row: Row,
    folder: str,
    num_classes: int,
    class_counts: Sequence[int] | None = None,
) -> Generator[tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " _n"]], None, None]:
    """The (images, labels) of a row as they are sampled; also written to the row's `.npz`, in OpenAI's layout."""
    count = row["num_samples"]
    index = np.arange(count, dtype=np.int32)
    labels = manifest.labels_of(row["labels"], row["seed"], count, num_classes, class_counts)
    spec = SampleSpec(np.full(count, row["seed"], np.uint32), index, labels, np.full(count, row["w"], np.float32))
    path = results.samples_path(folder, row)
    writer: Callable[..., Any] = npz.sample_writer if jax.process_index() == 0 else discard_samples
    if jax.process_index() == 0 and not buckets.is_url(path):
        for unfinished in Path(path).parent.glob(f"{glob.escape(Path(path).name)}.*.tmp"):  # of a sweep that was killed
            unfinished.unlink()
    with writer(path, count, model.network.image_shape) as write:
        first = 0
        params = model.params_at(row["step"], row["ema"])
        guide = model.guide_at(row["guide"])
        weights = {"classifier": model.classifier, "guide": guide and guide.params}
        images = sampler(params, spec, v=row["v"], interval=interval_of(row), **weights)
        for batch in images:
            batch_labels = labels[first : first + len(batch)]
            write(batch, batch_labels)
            first += len(batch)
            yield batch, batch_labels
            if preemption.requested():
                raise preemption.Stopped(f"Stopped in the sweep at w = {row['w']:g}")


def discard_samples(*_: Any) -> contextlib.AbstractContextManager[Callable[..., None]]:
    """A writer that writes nothing, for the processes other than the first."""
    return contextlib.nullcontext(lambda *_: None)
