"""`--mode=sweep`: images of the same seeds and classes for every cell of a grid, and their metrics.

Each row of sweep.csv and its manifest are written as soon as the cell is measured. A sweep that is killed therefore
resumes at the first cell that is missing. One compiled program serves all cells of the same T. All processes sample
the images and extract their features; a thread of process 0 computes the metrics from them, and meanwhile the next
cell is sampled.
"""

import concurrent.futures
import contextlib
import functools
import glob
import os
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8
from tqdm import tqdm

from cfd.config import Config, complete, with_classes
from cfd.data.sources import Dataset, check_classes
from cfd.devices import buckets, parallel, preemption, progress, seeds, watchdog
from cfd.errors import UserError
from cfd.evaluation import inception, metrics
from cfd.evaluation.features import (
    FeatureNetwork,
    classifier_path,
    open_classifier,
    open_inception,
    read_recipe,
    recipe,
)
from cfd.evaluation.reference import Reference, check_count, check_reference, open_reference, reference_hash
from cfd.evaluation.scores import Scoring, start_scoring
from cfd.modes import figures, settings, tables
from cfd.modes.cells import Cell, interval_of, manifest_of, measured_rows, missing_cells, row_of, rows_of_grid
from cfd.modes.sampler import Network, Sampler, SampleSpec, Sampling, compile_sampler, evaluation_flops, evaluations
from cfd.runs import files, manifest, npz, results
from cfd.runs.digest import weights_hash
from cfd.runs.results import MEASURED, SETTINGS, Row


class Model(NamedTuple):
    """A trained network and how it is sampled.

    `params_at(step)` are its parameters, and `classifier` is its noisy classifier or None; both are on all devices.
    """

    network: Network
    sampling: Sampling
    params_at: Callable[[int], Any]
    classifier: Any
    mesh: Mesh


class Measuring(NamedTuple):
    """A cell whose sampling began at `start`. `scoring` computes its metrics on process 0, and is None on others.

    `where` names the cell for the user, and `has_classes` says whether classes were asked for.
    """

    cell: Cell
    scoring: Scoring | None
    start: float
    where: str
    has_classes: bool


def sweep(config: Config, folder: str, out: str) -> list[Row]:
    """Sample and measure `eval.num_samples` images for every cell of `eval`'s grid: step, T, v, interval and w.

    Reads the run in `folder`, and writes to the folder `out`: sweep.csv, a manifest per row, the curves in sweep.png,
    grids of images, and the images as `.npz`. Prints the table, with the paper's if the config is the paper's. Image i
    is number i of seed `eval.seed` in every cell. Returns the rows of this config. Raises `preemption.Stopped` when
    asked to stop; the same call resumes.
    """
    if not config.eval.weights:
        raise UserError(
            "config.eval.weights is (): give the weights to sweep, such as --config.eval.weights='(0.0, 1.0)'"
        )
    train = check(config, folder, out)
    run = settings.open_run(config, folder)
    config, mesh = run.config, parallel.make_mesh(**run.config.mesh)
    weights = {}
    # A step that is not there is named before the feature classifier is trained. The last that is loaded is used first.
    for step in reversed(config.eval.steps or (config.sample.step,)):
        model = run.model_at(step)
        weights[model.step] = model.weights_hash
        settings.say_if_other_data(model, train)
    features = open_features(config, folder, out, mesh, train)
    reference_name = reference_hash(features, train, path=config.eval.reference, data=config.data.to_dict())
    guide = "" if run.classifier is None else weights_hash(run.classifier.args[0])
    class_counts = None
    if train is not None and config.eval.labels == "data":
        class_counts = np.bincount(train.labels, minlength=len(train.class_names)).tolist()
    hashes = {"classifier": guide, "reference": reference_name, "data": "" if train is None else train.identity}
    classes, cells = (len(run.class_names), class_counts), []
    for step in reversed(weights):
        made = hashes | {"weights": weights[step]}
        cells += [Cell(row, manifest_of(config, row, made, features, *classes)) for row in rows_of_grid(config, step)]
    missing = missing_cells(out, cells)

    if missing:
        reference = open_reference(
            out,
            features,
            train,
            reference_name,
            path=config.eval.reference,
            image_shape=settings.image_shape(config),
            num_workers=config.data.num_workers,
        )
        metrics.check_rank(config.eval.num_samples, len(reference.mu))
        metrics.check_splits(config.eval.num_samples)
        classifier = parallel.replicate(mesh, run.classifier)
        network, sampling = settings.network_of_run(run.model_at(missing[0].row["step"])), settings.sampling_of(config)

        @functools.lru_cache(maxsize=1)
        def params_at(step: int) -> Any:
            return parallel.replicate(mesh, run.model_at(step).params)

        model = Model(network, sampling, params_at, classifier, mesh)
        measure_cells(model, out, missing, len(run.class_names), features, reference)

    rows = list(measured_rows(out, cells).values())
    if jax.process_index() == 0:
        published = tables.published_rows(config, len(run.class_names))
        show(out, rows + comparable_rows(out, rows), run.class_names, published)
    return rows


def check(config: Config, folder: str, out: str | None = None) -> Dataset | None:
    """Check, before hours of training, all that a sweep of the run in `folder` needs beyond a trained model.

    Returns the training split, or None if nothing needs it: with Inception, a file as the reference, and classes that
    do not depend on the data. Raises ValueError if something is missing, or does not fit the config or the results in
    the folder `out`, which is the run's by default.
    """
    out = folder if out is None else out
    seeds.check()
    results.read_rows(out)
    config = complete(config)
    data, evaluate = config.data, config.eval
    parallel.check_batch("sample.batch_size", config.sample.batch_size, parallel.make_mesh(**config.mesh))
    train = None
    if evaluate.features == "classifier" or not evaluate.reference or evaluate.labels == "data":
        train = settings.open_split(config, data.split)
        settings.check_class_names(folder, train.class_names, data.split)
        config = with_classes(config, len(train.class_names))
        if not evaluate.reference:
            check_count(len(train), f"data.split {data.split!r}")
    if train is not None and evaluate.features == "classifier":
        held_out = settings.open_split(config, evaluate.test_split).class_names
        check_classes(
            train.class_names, f"data.split {data.split!r}", held_out, f"eval.test_split {evaluate.test_split!r}"
        )
        trained = recipe(train, num_steps=evaluate.classifier_steps, flip=data.flip, seed=config.seed)
        read_recipe(classifier_folder(folder, out), trained)
    else:
        remedy = "make it with `python -m cfd.convert inception FILE OUT`"
        check_file("config.eval.inception_path", evaluate.inception_path, remedy)
        inception.load_params(evaluate.inception_path)
    if evaluate.reference:
        check_file("config.eval.reference", evaluate.reference, "'' takes the data set")
        check_reference(evaluate.reference, settings.image_shape(config), evaluate.features)
    settings.check_weights(config, evaluate.weights)
    settings.check_sampling(
        config, evaluate.num_steps or (config.sample.num_steps,), evaluate.intervals or (config.sample.interval,)
    )
    settings.check_classifier(config, folder)
    return train


def check_file(name: str, path: str, remedy: str) -> None:
    """Raises UserError, which names the field, if there is no file at `path`, or if it cannot be read from its bucket.

    `remedy` is for a file that is missing.
    """
    if buckets.is_url(path):
        buckets.check(name, path)
    try:
        found = files.exists(path) if buckets.is_url(path) else os.path.isfile(path)
    except OSError as error:
        raise UserError(
            f"{name} is {path!r}, which cannot be read ({error.strerror}): {files.how_to_allow(path)}"
        ) from error
    if not found:
        raise UserError(f"{name} is {path!r}, which is no file; {remedy}")


def open_features(config: Config, folder: str, out: str, mesh: Mesh, train: Dataset | None) -> FeatureNetwork:
    """The feature network that `eval.features` names.

    A classifier is in `out`. If there is none yet, but one in the run's `folder`, that one is used, for numbers that
    can be compared with the run's own; a line says so.
    """
    evaluate = config.eval
    if train is None or evaluate.features == "inception":
        return open_inception(evaluate.inception_path, mesh)
    held_out = settings.open_split(config, evaluate.test_split)
    place = classifier_folder(folder, out)
    if place != out and jax.process_index() == 0:
        print(f"The feature classifier is that of the run, in {folder}/features.", flush=True)
    return open_classifier(
        place, mesh, train, held_out, num_steps=evaluate.classifier_steps, flip=config.data.flip, seed=config.seed
    )


def classifier_folder(folder: str, out: str) -> str:
    """`out`, or the run's `folder` if it alone has a feature classifier."""
    there, here = (files.exists(classifier_path(place)) for place in (folder, out))
    return folder if there and not here else out


def measure_cells(
    model: Model, folder: str, cells: list[Cell], num_classes: int, features: FeatureNetwork, reference: Reference
) -> None:
    """Samples the images of one cell after the other, and writes the row of each as soon as it is measured.

    A cell is measured while the next one is sampled, and is written before that one is measured. An error of the
    sampling, or a request to stop, leaves no cell unwritten whose images are complete. The progress bar counts network
    evaluations.
    """

    @functools.cache
    def sampling_at(num_steps: int) -> Sampling:
        return model.sampling._replace(num_steps=num_steps)

    @functools.cache
    def sampler_at(num_steps: int) -> Sampler:
        return compile_sampler(model.network, sampling_at(num_steps), model.mesh)

    costs = [evaluations(sampling_at(row["num_steps"]), row["w"], interval_of(row)) for row, _ in cells]
    total = sum(row["num_samples"] * cost for (row, _), cost in zip(cells, costs, strict=True))
    flops = total * evaluation_flops(model.network, model.params_at(cells[0].row["step"]))
    if jax.process_index() == 0:
        print(f"{len(cells)} cells to measure: {total:,} network evaluations, {flops:.3g} FLOP.", flush=True)
    radii = None
    if jax.process_index() == 0 and reference.features is not None:
        radii = metrics.squared_radii(reference.features)
    several = cells[0].row["step"] != cells[-1].row["step"]
    before: Measuring | None = None
    with tqdm(total=total, desc="sweep", unit="eval", unit_scale=True, smoothing=0.1, disable=None) as bar:
        for cell, cost in zip(cells, costs, strict=True):
            start, row = time.perf_counter(), cell.row
            sampler = sampler_at(row["num_steps"])
            batches = sampled(model, sampler, row_of(cell), folder, num_classes, cell.manifest.get("class_counts"))
            scoring = None
            if jax.process_index() == 0:
                scoring = start_scoring(row["num_samples"], features.name, reference, radii)
            try:
                with contextlib.closing(batches):
                    for images, labels in batches:
                        outputs = features.extract(images)
                        if scoring is not None:
                            scoring.put((outputs, labels))
                        bar.update(len(images) * cost)
                        before = finish(folder, before, wait=False)
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
            where = f"{step}T {row['num_steps']}  w {row['w']:g}"
            before = Measuring(cell, scoring, start, where, num_classes > 0)
        finish(folder, before)


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
    progress.report(f"{len(results.read_rows(folder))} rows")
    return None


def save(folder: str, cell: Measuring) -> None:
    """Waits for the metrics of a cell on process 0, writes its manifest and its row, and prints the row."""
    assert cell.scoring is not None, "process 0 alone measures"
    scores = cell.scoring.result.result()
    row = row_of(cell.cell) | scores | ({} if cell.has_classes else {"class_accuracy": None})
    manifest.write_manifest(folder, cell.cell.manifest)
    results.append_row(folder, row)
    measured = "  ".join(f"{key} {row[key]:.4g}" for key in MEASURED if row[key] is not None)
    rate = cell.cell.row["num_samples"] / (time.perf_counter() - cell.start)
    tqdm.write(f"{cell.where}  {measured}  ({rate:.3g} images/s sampled and measured)")


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
        params = model.params_at(row["step"])
        images = sampler(params, spec, v=row["v"], interval=interval_of(row), classifier=model.classifier)
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


def comparable_rows(folder: str, rows: list[Row]) -> list[Row]:
    """The rows of the other kind of guidance that were measured with all else equal, for the same picture."""

    def setting(row: Row) -> tuple:
        shared = tuple(row[key] for key in SETTINGS if key not in ("guidance", "w"))
        return *shared, manifest.measured_with(folder, row)

    kinds, measured = {row["guidance"] for row in rows}, {setting(row) for row in rows}
    return [row for row in results.latest(folder) if row["guidance"] not in kinds and setting(row) in measured]


def show(folder: str, rows: list[Row], class_names: tuple[str, ...], published: list[Row]) -> None:
    """Write sweep.png and a grid of images per curve, and print the table, with the paper's if there is one.

    If the rows are of several steps, also writes the curves over them, in sweep_steps.png.
    """
    curves = tables.curves(rows)
    figures.save_curve(os.path.join(folder, "sweep.png"), curves, tables.curves(published, "paper"))
    if "step" in tables.varied(rows):
        figures.save_curve(os.path.join(folder, "sweep_steps.png"), tables.curves(rows, axis="step"), {}, axis="step")
    for number, line in enumerate(curves.values()):
        name = f"sweep_{number}.png" if len(curves) > 1 else "sweep.png"
        kept = [row for row in line if files.exists(results.samples_path(folder, row))]
        if len(kept) < len(line):
            lost = ", ".join(f"{row['w']:g}" for row in line if row not in kept)
            print(f"The images of w = {lost} are not in {folder}/samples: {name} there leaves them out.", flush=True)
        if kept:
            figures.save(os.path.join(folder, "samples", name), picture_of(kept, folder, class_names))
    print(tables.table({"ours": rows, "paper": published} if published else {"": rows}), flush=True)


def picture_of(line: list[Row], folder: str, class_names: tuple[str, ...]) -> UInt8[np.ndarray, "height width 3"]:
    """The first images of a curve, at most ten, at every weight: each row is an image, each column a weight."""
    first = line[0]
    count = min(10, first["num_samples"])
    classes = next(npz.npz_batches(results.samples_path(folder, first), "arr_1", count))
    columns = [next(npz.npz_batches(results.samples_path(folder, row), "arr_0", count)) for row in line]
    images = np.stack(columns, axis=1)
    names = [class_names[i] if i >= 0 else "" for i in classes]
    return figures.grid(images, names, [f"w = {row['w']:g}" for row in line])
