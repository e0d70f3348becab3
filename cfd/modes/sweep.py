"""`--mode=sweep`: images of the same seeds and classes for every cell of a grid, and their metrics.

Each row of sweep.csv and its manifest are on the disk as soon as the cell is measured. A sweep that is killed therefore
resumes at the first cell that is missing. One compiled program serves all cells of the same T.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from tqdm import tqdm

from cfd.config import Config, complete, with_classes
from cfd.data.sources import Dataset, check_classes
from cfd.devices import parallel, preemption, progress, seeds
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
from cfd.evaluation.scores import Batches, score
from cfd.modes import figures, settings, tables
from cfd.modes.sampler import Network, Sampler, SampleSpec, Sampling, compile_sampler, evaluation_flops, evaluations
from cfd.runs import manifest, npz, results
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


class Cell(NamedTuple):
    """A cell of the grid: the settings of its row, and the manifest that says how the row is made."""

    row: Row
    manifest: dict[str, Any]


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
    elif not os.path.isfile(evaluate.inception_path):
        raise UserError(
            f"config.eval.inception_path is {evaluate.inception_path!r}, which is no file; make it with "
            "`python -m cfd.convert inception FILE OUT`"
        )
    else:
        inception.load_params(evaluate.inception_path)
    if evaluate.reference:
        if not os.path.isfile(evaluate.reference):
            raise UserError(f"config.eval.reference is {evaluate.reference!r}, which is no file; '' takes the data set")
        check_reference(evaluate.reference, settings.image_shape(config), evaluate.features)
    settings.check_weights(config, evaluate.weights)
    settings.check_sampling(
        config, evaluate.num_steps or (config.sample.num_steps,), evaluate.intervals or (config.sample.interval,)
    )
    settings.check_classifier(config, folder)
    return train


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
    there, here = (os.path.exists(classifier_path(place)) for place in (folder, out))
    return folder if there and not here else out


def rows_of_grid(config: Config, step: int) -> list[Row]:
    """The cells that `eval` asks for at one step, as rows that hold their settings and the name of their FID."""
    sample, evaluate = config.sample, config.eval
    v = tuple(evaluate.v) or (sample.v,) if sample.sampler == "ancestral" else (0.0,)
    intervals = tuple(evaluate.intervals) or (tuple(sample.interval),)
    cells = product(tuple(evaluate.num_steps) or (sample.num_steps,), v, intervals, evaluate.weights)
    return [
        {
            "step": step,
            "p_uncond": float(config.train.p_uncond),
            "num_steps": num_steps,
            "sampler": sample.sampler,
            "v": float(v),
            "guidance": sample.guidance,
            "interval": ":".join(repr(float(end)).removesuffix(".0") for end in interval),
            "w": float(w),
            "num_samples": evaluate.num_samples,
            "labels": evaluate.labels,
            "seed": evaluate.seed,
            "features": evaluate.features,
            "fid_name": results.fid_name(evaluate.num_samples),
        }
        for num_steps, v, interval, w in cells
    ]


def interval_of(row: Row) -> tuple[float, ...]:
    """The guidance interval of a row; () if it has none."""
    return tuple(float(end) for end in row["interval"].split(":") if end)


def missing_cells(folder: str, cells: list[Cell]) -> list[Cell]:
    """The cells that are still to be measured. Every process calls it.

    A cell that was measured in another way meanwhile, such as with another reference, gets its row again at the end of
    sweep.csv, where the rows that belong together are looked for.
    """
    by_name = {manifest.manifest_name(cell.manifest): cell for cell in cells}
    there = measured_rows(folder, cells)
    parallel.barrier("sweep cells looked for")
    newest = {row["manifest"] for row in results.latest(folder)}
    parallel.barrier("sweep cells found")
    for name in there.keys() - newest if jax.process_index() == 0 else ():
        results.append_row(folder, there[name])
    if there and jax.process_index() == 0:
        print(f"{len(there)} of {len(cells)} cells are in {folder}/sweep.csv already.", flush=True)
        progress.report(f"{len(results.read_rows(folder))} rows")
    return [cell for name, cell in by_name.items() if name not in there]


def measured_rows(folder: str, cells: Iterable[Cell]) -> dict[str, Row]:
    """The rows of sweep.csv that belong to these cells, by the names of their manifests, which must be there."""
    rows = {row["manifest"]: row for row in results.read_rows(folder)}
    names = [manifest.manifest_name(cell.manifest) for cell in cells]
    return {name: rows[name] for name in names if name in rows and manifest.read_manifest(folder, name) is not None}


def measure_cells(
    model: Model, folder: str, cells: list[Cell], num_classes: int, features: FeatureNetwork, reference: Reference
) -> None:
    """Measure one cell after the other and write each row at once. The progress bar counts network evaluations."""

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
    radii = None if reference.features is None else metrics.squared_radii(reference.features)
    with tqdm(total=total, desc="sweep", unit="eval", unit_scale=True, smoothing=0.1, disable=None) as bar:
        for number, (cell, cost) in enumerate(zip(cells, costs, strict=True)):
            start = time.perf_counter()
            row: Row = cell.row | {"manifest": manifest.manifest_name(cell.manifest)}
            count, sampler = row["num_samples"], sampler_at(row["num_steps"])
            images = sampled(model, sampler, row, folder, num_classes, cell.manifest.get("class_counts"))
            row |= score(counted(images, bar, cost), count, features, reference, radii)
            row |= {} if num_classes else {"class_accuracy": None}  # no class was asked for
            rate = count / (time.perf_counter() - start)
            if jax.process_index() == 0:
                manifest.write_manifest(folder, cell.manifest)
                results.append_row(folder, row)
                measured = "  ".join(f"{key} {row[key]:.4g}" for key in MEASURED if row[key] is not None)
                step = f"step {row['step']}  " if cells[0].row["step"] != cells[-1].row["step"] else ""
                where = f"{step}T {row['num_steps']}  w {row['w']:g}"
                tqdm.write(f"{where}  {measured}  ({rate:.3g} images/s sampled and measured)")
                progress.report(f"{len(results.read_rows(folder))} rows")
            parallel.barrier(f"sweep cell {number}")


def counted(batches: Batches, bar: tqdm, cost: int) -> Batches:
    """The same batches. The bar advances by `cost` per image."""
    for images, labels in batches:
        yield images, labels
        bar.update(len(images) * cost)


def sampled(
    model: Model,
    sampler: Sampler,
    row: Row,
    folder: str,
    num_classes: int,
    class_counts: Sequence[int] | None = None,
) -> Batches:
    """The (images, labels) of a row as they are sampled; also written to the row's `.npz`, in OpenAI's layout."""
    count = row["num_samples"]
    index = np.arange(count, dtype=np.int32)
    labels = manifest.labels_of(row["labels"], row["seed"], count, num_classes, class_counts)
    spec = SampleSpec(np.full(count, row["seed"], np.uint32), index, labels, np.full(count, row["w"], np.float32))
    path = results.samples_path(folder, row)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    writer: Callable[..., Any] = npz.sample_writer if jax.process_index() == 0 else discard_samples
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


def manifest_of(
    config: Config,
    row: Row,
    hashes: dict[str, str],
    features: FeatureNetwork,
    num_classes: int = 0,
    class_counts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The manifest of a row: the SHA-256 of everything that goes in, every setting, and the versions."""
    return manifest.manifest_of(
        row,
        weights=hashes["weights"],
        guide_weights=hashes["classifier"],
        ema_decay=config.train.ema_decay,
        network=config.model.to_dict(),
        process=config.process.to_dict(),
        clip=config.sample.clip,
        data=config.data.to_dict(),
        data_identity=hashes["data"],
        reference=hashes["reference"],
        reference_path=config.eval.reference,
        features=features.name,
        features_weights=features.weights_hash,
        num_classes=num_classes,
        class_counts=class_counts,
    )


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
        kept = [row for row in line if os.path.exists(results.samples_path(folder, row))]
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
