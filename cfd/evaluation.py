"""`--mode=sweep`: for every weight, class-balanced images from the same seeds, and what the metrics say of them.

sweep.csv gets a row a cell as soon as the cell is measured, so that a sweep which is killed resumes at the first cell
that is missing. One compiled program serves every weight.
"""

import contextlib
import csv
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from cfd import data, figures, metrics, npz, parallel, preemption
from cfd.config import Config
from cfd.features import FeatureNetwork, open_classifier, open_inception
from cfd.generate import Draw, Request, load_run, make_draw

SETTINGS = ("step", "num_steps", "sampler", "v", "interval", "w", "num_samples", "seed", "features")
MEASURED = ("fid", "is", "precision", "recall", "class_accuracy")
NEIGHBOUR_ROWS = 10_000
"""Reference images for precision and recall, as in ADM's evaluator."""

Row = dict[str, Any]


class Statistics(NamedTuple):
    """What the metrics need of a set of images."""

    moments: metrics.Moments
    pool: Float[np.ndarray, "n d"]
    probs: Float[np.ndarray, "n k"]
    class_accuracy: float


def statistics(
    batches: Iterable[tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, "n"]]], features: FeatureNetwork
) -> Statistics:
    """Stream (images, labels) through the feature network; the images themselves are not kept."""
    moments, pool, probs, labels = [], [], [], []
    for images, classes in batches:
        outputs = features.extract(images)
        batch = metrics.moments(outputs.pool)
        moments = [metrics.merge(*moments, batch)] if moments else [batch]
        pool.append(outputs.pool)
        probs.append(outputs.probs)
        labels.append(classes)
    probs = np.concatenate(probs)
    class_accuracy = float((probs.argmax(-1) == np.concatenate(labels)).mean())
    return Statistics(moments[0], np.concatenate(pool), probs, class_accuracy)


def compare(reference: Statistics, samples: Statistics) -> dict[str, float]:
    """The columns MEASURED: Fréchet distance, Inception score, precision, recall, share of the class asked for."""
    precision, recall = metrics.precision_recall(reference.pool[:NEIGHBOUR_ROWS], samples.pool)
    fid = metrics.frechet_distance(*metrics.mean_and_cov(reference.moments), *metrics.mean_and_cov(samples.moments))
    score = metrics.inception_score(samples.probs)
    return dict(zip(MEASURED, (fid, score, precision, recall, samples.class_accuracy), strict=True))


def sweep(config: Config, folder: str) -> list[Row]:
    """Draw and measure `eval.num_samples` images for every weight of `eval.weights`; write sweep.csv, .png and a grid.

    Image i is number i of seed `eval.seed`, of class i mod num_classes, whatever the weight. Returns the rows of this
    config. Raises `preemption.Stopped` when asked to stop; the same call resumes.
    """
    if not config.eval.weights:
        raise ValueError(
            "config.eval.weights is (): give the weights to sweep, such as --config.eval.weights='(0.0, 1.0)'"
        )
    run = load_run(config, folder)
    cells = [cell(config, run.step, w) for w in config.eval.weights]
    path = os.path.join(folder, "sweep.csv")
    missing = [c for c in cells if not rows_of(path, [c])]
    if len(missing) < len(cells):
        print(f"{len(cells) - len(missing)} of {len(cells)} weights are in {path} already.", flush=True)
    if missing:
        mesh = parallel.make_mesh(**config.mesh)
        train = data.from_config(config.data, config.data.split)
        features = open_features(config, folder, mesh, train)
        reference = statistics(in_blocks(train), features)
        draw = make_draw(config, config.sample, mesh)
        params = parallel.replicate(mesh, run.params)
        for number, c in enumerate(tqdm(missing, desc="sweep", unit="weight", disable=None)):
            row = c | compare(reference, statistics(drawn(config, draw, params, c, folder), features))
            if jax.process_index() == 0:
                append_row(path, row)
                tqdm.write("  ".join(f"{key} {row[key]:.4g}" for key in ("w", *MEASURED)))
            parallel.barrier(f"sweep cell {number}")

    rows = rows_of(path, cells)
    if jax.process_index() == 0:
        curve = os.path.join(folder, "sweep.png")
        figures.save_curve(curve, {"classifier-free guidance": rows}, config.eval.features)
        figures.save_grid(
            os.path.join(folder, "samples", "sweep.png"), *grid_of(config, cells, folder, run.class_names)
        )
    return rows


def check(config: Config) -> None:
    """What a sweep needs beyond a trained model, looked at before hours of training. Raises ValueError."""
    evaluate = config.eval
    parallel.check_batch("sample.batch_size", config.sample.batch_size, parallel.make_mesh(**config.mesh))
    if evaluate.features == "classifier":
        data.from_config(config.data, evaluate.test_split)
    elif not os.path.isfile(evaluate.inception_path):
        raise ValueError(
            f"config.eval.inception_path is {evaluate.inception_path!r}, which is no file; make it with "
            "`python -m cfd.convert inception FILE OUT`"
        )


def open_features(config: Config, folder: str, mesh: Mesh, train: data.Dataset) -> FeatureNetwork:
    """The feature network that `eval.features` names."""
    evaluate = config.eval
    if evaluate.features == "inception":
        return open_inception(evaluate.inception_path, mesh)
    if evaluate.features != "classifier":
        raise ValueError(f"eval.features is {evaluate.features!r}; choose 'classifier' or 'inception'")
    held_out = data.from_config(config.data, evaluate.test_split)
    return open_classifier(
        folder, mesh, train, held_out, num_steps=evaluate.classifier_steps, flip=config.data.flip, seed=config.seed
    )


def in_blocks(dataset: data.Dataset, rows: int = 1000) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The whole data set in order, (images, labels) by blocks."""
    for first in range(0, len(dataset), rows):
        yield data.load_arrays(dataset, np.arange(first, min(first + rows, len(dataset))))
        stop_if_asked("before its next weight")


def stop_if_asked(where: str) -> None:
    """Between two batches: what is asked of `preemption`, by every process alike."""
    if preemption.requested():
        raise preemption.Stopped(f"Stopped in the sweep {where}")


def drawn(config: Config, draw: Draw, params: Any, c: Row, folder: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The (images, labels) of a cell as they are drawn; also written to its .npz, in OpenAI's layout."""
    count = c["num_samples"]
    index = np.arange(count, dtype=np.int32)
    labels = index % config.data.num_classes
    request = Request(np.full(count, c["seed"], np.uint32), index, labels, np.full(count, c["w"], np.float32))
    size = (config.data.image_size, config.data.image_size, config.data.channels)
    path = samples_path(folder, c)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    first_process = jax.process_index() == 0
    with npz.sample_writer(path, count, size) if first_process else contextlib.nullcontext(lambda *_: None) as write:
        first = 0
        for images in draw(params, request):
            rows = labels[first : first + len(images)]
            write(images, rows)
            first += len(images)
            yield images, rows
            stop_if_asked(f"at w = {c['w']:g}")


def cell(config: Config, step: int, w: float) -> Row:
    """What determines a row of sweep.csv: the columns SETTINGS."""
    sample = config.sample
    v = float(sample.v) if sample.sampler == "ancestral" else 0.0
    interval = ":".join(f"{end:g}" for end in sample.interval)
    evaluate = config.eval
    values = (
        step,
        sample.num_steps,
        sample.sampler,
        v,
        interval,
        float(w),
        evaluate.num_samples,
        evaluate.seed,
        evaluate.features,
    )
    return dict(zip(SETTINGS, values, strict=True))


def samples_path(folder: str, c: Row) -> str:
    """Where the images of a cell are kept."""
    name = "_".join(f"{key}-{c[key]}" for key in SETTINGS if key != "features" and c[key] != "")
    return os.path.join(folder, "samples", f"{name}.npz")


def rows_of(path: str, cells: list[Row]) -> list[Row]:
    """The rows of sweep.csv that belong to the cells, in their order."""
    rows = list(csv.DictReader(whole_lines(path)))
    found = []
    for c in cells:
        for row in rows:
            if all(row[key] == str(c[key]) for key in SETTINGS):
                found.append(c | {key: float(row[key]) for key in MEASURED})
    return found


def append_row(path: str, row: Row) -> None:
    """One more row, on the disk before the next cell begins; a line that was cut short is dropped first."""
    lines = whole_lines(path)
    temporary = path + ".tmp"
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, SETTINGS + MEASURED, lineterminator="\n")
        file.writelines(lines) if lines else writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def whole_lines(path: str) -> list[str]:
    """The lines of a file that is perhaps not there, without a last one that was cut short."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return [line for line in file if line.endswith("\n")]


def grid_of(config: Config, cells: list[Row], folder: str, class_names: tuple[str, ...]) -> tuple:
    """The first image of (at most ten) classes at every weight: a row a class, a column a weight."""
    classes = min(10, config.data.num_classes, config.eval.num_samples)
    columns = [next(npz.npz_batches(samples_path(folder, c), "arr_0", classes)) for c in cells]
    return np.stack(columns, axis=1), class_names[:classes], [f"w = {c['w']:g}" for c in cells]
