"""`--mode=sweep`: images of the same seeds and classes for every cell of a grid, and their metrics.

Each row of sweep.csv and its manifest are written as soon as the cell is measured. A sweep that is killed therefore
resumes at the first cell that is missing. One compiled program serves all cells of the same T. All processes sample
the images and extract their features; a thread of process 0 computes the metrics from them, and meanwhile the next
cell is sampled.
"""

import functools
import os
from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from cfd.config import Config, complete, with_classes
from cfd.data.sources import Dataset, check_classes
from cfd.devices import parallel, seeds
from cfd.errors import UserError
from cfd.evaluation import dinov2, inception, metrics, nearest
from cfd.evaluation.features import (
    FeatureNetwork,
    classifier_path,
    open_classifier,
    open_dinov2,
    open_inception,
    read_recipe,
    recipe,
)
from cfd.evaluation.floor import draws_of_real, held_out_metrics, read_floor, write_floor
from cfd.evaluation.reference import (
    Reference,
    check_count,
    check_reference,
    open_held_out,
    open_reference,
    reference_hash,
)
from cfd.loading import Loaded
from cfd.modes import emas, figures, guides, race, rules, settings, tables
from cfd.modes.cells import Cell, manifest_of, measured_rows, missing_cells, rows_of_grid
from cfd.modes.measuring import Model, measure_cells
from cfd.runs import files, manifest, results
from cfd.runs.access import check_file
from cfd.runs.digest import weights_hash
from cfd.runs.results import SETTINGS, Row


def sweep(config: Config, folder: str, out: str) -> list[Row]:
    """Sample and measure `eval.num_samples` images for every cell of `eval`'s grid.

    Its axes are the step, the EMA, T, v, the guide, the interval, the seed, the rule and w.

    Reads the run in `folder`, and writes to the folder `out`: sweep.csv, a manifest per row, the curves in sweep.png,
    grids of images, and the images as `.npz`. Prints the table, with the paper's if the config is the paper's. Image i
    is number i of the cell's seed. Returns the rows of this config. Raises `preemption.Stopped` when asked to stop; the
    same call resumes.
    """
    if not config.eval.weights:
        raise UserError(
            "config.eval.weights is (): give the weights to sweep, such as --config.eval.weights='(0.0, 1.0)'"
        )
    run = settings.open_run(config, folder)
    train = check(config, folder, out)
    config, mesh = run.config, parallel.make_mesh(**run.config.mesh)
    weights = {}
    # A step that is not there is named before the feature classifier is trained. The last that is loaded is used first.
    for step in reversed(config.eval.steps or (config.sample.step,)):
        for ema in reversed(config.eval.emas or (config.sample.ema,)):
            model = run.model_at(step, ema)
            step = model.step  # the newest stays the same one for all lengths
            weights[step, ema] = model.weights_hash
        say_if_other_data(model, train)
    made_guides, guide_at = guides.open_guides(config, run, mesh, config.eval.guides or (config.sample.guide,))
    features = open_features(config, folder, out, mesh, train)
    reference_name = reference_hash(features, train, path=config.eval.reference, data=config.data.to_dict())
    classifier_name = "" if run.classifier is None else weights_hash(run.classifier.args[0])
    class_counts = None
    if train is not None and config.eval.labels == "data":
        class_counts = np.bincount(train.labels, minlength=len(train.class_names)).tolist()
    held_out = held_out_split(config, train)
    hashes = {
        "classifier": classifier_name,
        "reference": reference_name,
        "data": "" if train is None else train.identity,
        "held_out": "" if held_out is None else held_out.identity,
    }
    classes, cells = (len(run.class_names), class_counts), []
    for step in dict.fromkeys(step for step, _ in reversed(weights)):
        for row in rows_of_grid(config, step):
            made = hashes | {"weights": weights[step, row["ema"]]}
            guide = made_guides.get(row["guide"], {})
            cells.append(Cell(row, manifest_of(config, row, made, features, *classes, guide)))
    missing = missing_cells(out, cells)

    @functools.cache
    def reference_set() -> Reference:
        return open_reference(
            out,
            features,
            train,
            reference_name,
            path=config.eval.reference,
            image_shape=settings.image_shape(config),
            num_workers=config.data.num_workers,
        )

    if missing:
        reference, held_out_reference = reference_set(), None
        if held_out is not None:
            split, workers = config.eval.test_split, config.data.num_workers
            held_out_reference = open_held_out(
                out, features, held_out, split=split, data=config.data.to_dict(), num_workers=workers
            )
        metrics.check_rank(config.eval.num_samples, len(reference.mu))
        if config.eval.features != "dinov2":  # which has no class probabilities, and therefore no Inception Score
            metrics.check_splits(config.eval.num_samples)
        classifier = parallel.replicate(mesh, run.classifier)
        first, sampling = missing[0].row, settings.sampling_of(config)
        network = settings.network_of_run(run.model_at(first["step"], first["ema"]))

        @functools.lru_cache(maxsize=1)
        def params_at(step: int, ema: float) -> Any:
            return parallel.replicate(mesh, run.model_at(step, ema).params)

        model = Model(network, sampling, params_at, classifier, mesh, functools.partial(guide_at, network))
        if config.eval.racing:
            best = race.best_cell(model, out, cells, len(run.class_names), features, reference)
            missing = [cell for cell in missing if cell.manifest == best.manifest]
        if missing:
            measure_cells(model, out, missing, len(run.class_names), features, reference, held_out_reference)

    measure_real(config, out, features, reference_name, reference_set, held_out)
    rows = list(measured_rows(out, cells).values())
    if train is not None and not config.eval.reference and not nearest.is_written(out, ends := ends_of(rows)):
        training = reference_set().features
        assert training is not None, "the reference is the data set"
        reason = nearest.write_nearest(out, ends, features, training, train, config.data.num_workers)
        if reason and jax.process_index() == 0:
            print(f"{nearest.nearest_path(out)} is not written: {reason}.", flush=True)
    if jax.process_index() == 0:
        published = tables.published_of(config, run.class_names)
        show(out, rows + comparable_rows(out, rows), run.class_names, published)
    return rows


def say_if_other_data(model: Loaded, train: Dataset | None) -> None:
    """Prints, on process 0, that a run is measured with other data than those of its training, if it is."""
    if train is None or model.data_identity in ("", train.identity) or jax.process_index() != 0:
        return
    print(
        "The run was trained on other data than those of data.path here, with which it is measured: names, sizes or "
        f"labels of the images differ (identity {model.data_identity[:12]} there, {train.identity[:12]} here).",
        flush=True,
    )


def held_out_split(config: Config, train: Dataset | None) -> Dataset | None:
    """The data set of `eval.test_split`, on which the model was not trained.

    None if the reference is a file or, as a line then says, if the split cannot be opened and the features do not need
    it.
    """
    if train is None or config.eval.reference:
        return None
    try:
        return settings.open_split(config, config.eval.test_split)
    except UserError as error:
        if config.eval.features == "classifier":
            raise
        if jax.process_index() == 0:
            print(f"Nothing is measured of held-out images, for eval.test_split cannot be opened: {error}", flush=True)
        return None


def measure_real(
    config: Config,
    out: str,
    features: FeatureNetwork,
    reference_name: str,
    reference_set: Callable[[], Reference],
    held_out: Dataset | None,
) -> None:
    """Write floor.json, the metrics of real images, unless it is there for this reference and number of images."""
    count = config.eval.num_samples
    found = read_floor(out)
    parallel.barrier("floor.json looked for")
    made_with = reference_name, count, "" if held_out is None else held_out.identity
    if found is not None:
        of_found = (found["held_out"] or {}).get("identity", "")
        if (found["reference"], found["num_samples"], of_found) == made_with:
            return
    reference, of_held_out = reference_set(), None
    if held_out is not None:
        of_held_out = held_out_metrics(config.eval.test_split, held_out, features, reference, count)
    if jax.process_index() == 0:
        real = draws_of_real(reference, count)
        if real["reason"]:
            print(f"FID and KID of real images are not measured: {real['reason']}.", flush=True)
        write_floor(out, reference_name, reference, real | {"held_out": of_held_out}, count)


def ends_of(rows: list[Row]) -> list[Row]:
    """The rows of the longest curve at w = 0, or at its smallest weight, and at its largest weight."""
    line = tables.longest(tables.curves(rows))
    first = next((row for row in line if row["w"] == 0), line[0])
    return [first, line[-1]] if line[-1] is not first else [first]


def check(config: Config, folder: str, out: str | None = None) -> Dataset | None:
    """Check, before hours of training, all that a sweep of the run in `folder` needs beyond a trained model.

    Returns the training split, or None if nothing needs it: with InceptionV3 or DINOv2, a file as the reference, and
    classes that do not depend on the data. Raises ValueError if something is missing, or does not fit the config or
    the results in the folder `out`, which is the run's by default.
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
        name, place = evaluate.features, evaluate[f"{evaluate.features}_path"]
        check_file(f"config.eval.{name}_path", place, f"make it with `python -m cfd.convert {name} FILE OUT`")
        (dinov2 if name == "dinov2" else inception).load_params(place)
    if evaluate.reference:
        check_file("config.eval.reference", evaluate.reference, "'' takes the data set")
        check_reference(evaluate.reference, settings.image_shape(config), evaluate.features)
    guided = evaluate.guides or (config.sample.guide,)
    guides.check(config, guided, None if train is None else train.class_names)
    ruled = rules.in_grid(config)
    for (guidance, weights), guide in product(ruled, guided):
        settings.check_weights(config, weights, guidance, guide)
    intervals = (*(evaluate.intervals or (config.sample.interval,)), *(guidance.interval for guidance, _ in ruled))
    settings.check_sampling(config, evaluate.num_steps or (config.sample.num_steps,), intervals)
    settings.check_classifier(config, folder)
    if evaluate.racing:
        race.check(config)
    return train


def open_features(config: Config, folder: str, out: str, mesh: Mesh, train: Dataset | None) -> FeatureNetwork:
    """The feature network that `eval.features` names.

    A classifier is in `out`. If there is none yet, but one in the run's `folder`, that one is used, for numbers that
    can be compared with the run's own; a line says so.
    """
    evaluate = config.eval
    if evaluate.features == "dinov2":
        return open_dinov2(evaluate.dinov2_path, mesh)
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


def comparable_rows(folder: str, rows: list[Row]) -> list[Row]:
    """The rows of the other kind of guidance that were measured with all else equal, for the same picture."""

    def setting(row: Row) -> tuple:
        shared = tuple(row[key] for key in SETTINGS if key not in ("guidance", "w"))
        return *shared, manifest.measured_with(folder, row)

    kinds, measured = {row["guidance"] for row in rows}, {setting(row) for row in rows}
    return [row for row in results.latest(folder) if row["guidance"] not in kinds and setting(row) in measured]


def show(folder: str, rows: list[Row], class_names: tuple[str, ...], published: tables.Published) -> None:
    """Write sweep.png and a grid of images per curve, and print the tables, with published results if there are any.

    Rows that differ in seed alone are one point, their mean. If the rows are of several steps, also writes the curves
    over them, in sweep_steps.png, and if they are of several EMAs, FID over these in sweep_emas.png.
    """
    means = tables.over_seeds(folder, rows)
    floor = tables.floor_of(folder, rows)
    real, theirs = tables.real_fid(floor, rows), tables.curves(published.rows, "paper")
    path = os.path.join(folder, "sweep.png")
    figures.save_curve(path, tables.curves(means), theirs, real=real, baselines=published.baselines)
    if "step" in tables.varied(means):
        along = tables.curves(means, axis="step")
        figures.save_curve(os.path.join(folder, "sweep_steps.png"), along, {}, axis="step", real=real)
    if "ema" in tables.varied(means):
        figures.save_figure(os.path.join(folder, "sweep_emas.png"), emas.figure(means, real))
    curves = tables.curves(rows)
    for number, line in enumerate(curves.values()):
        name = f"sweep_{number}.png" if len(curves) > 1 else "sweep.png"
        kept = [row for row in line if files.exists(results.samples_path(folder, row))]
        if len(kept) < len(line):
            lost = ", ".join(f"{row['w']:g}" for row in line if row not in kept)
            print(f"The images of w = {lost} are not in {folder}/samples: {name} there leaves them out.", flush=True)
        if kept:
            figures.save(os.path.join(folder, "samples", name), picture_of(kept, folder, class_names))
    blocks = {"ours": means, "paper": published.rows} if published.rows else {"": means}
    parts = [] if tables.guided_in_several_ways(means) else [tables.table(blocks)]
    parts += [tables.cells(means), tables.caption(means), tables.real_images(floor, rows[0]["features"])]
    parts.append(tables.literature(published))
    print("\n\n".join(filter(None, parts)), flush=True)


def picture_of(line: list[Row], folder: str, class_names: tuple[str, ...]) -> UInt8[np.ndarray, "height width 3"]:
    """The first images of a curve, at most ten, at every weight: each row is an image, each column a weight."""
    first = line[0]
    count = min(10, first["num_samples"])
    classes = results.first_samples(folder, first, "arr_1", count)
    columns = [results.first_samples(folder, row, "arr_0", count) for row in line]
    images = np.stack(columns, axis=1)
    names = [class_names[i] if i >= 0 else "" for i in classes]
    return figures.grid(images, names, [f"w = {row['w']:g}" for row in line])
