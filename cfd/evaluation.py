"""`--mode=sweep`: for every cell of a grid, images from the same seeds and classes, and what the metrics say of them.

A row of sweep.csv and its manifest are on the disk as soon as a cell is measured, so that a sweep which is killed
resumes at the first cell that is missing. One compiled program serves all cells of the same T.
"""

import contextlib
import functools
import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import flax
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

import cfd
from cfd import data, figures, inception, metrics, npz, paper, parallel, preemption, results
from cfd.config import CONVENTIONS, Config
from cfd.features import FeatureNetwork, open_classifier, open_inception
from cfd.generate import (
    Draw,
    Request,
    check_guide,
    check_weights,
    evaluation_flops,
    evaluations,
    load_guide,
    load_run,
    make_draw,
)
from cfd.reference import STATISTICS, Reference, add, check_reference, open_reference, reference_hash
from cfd.results import MEASURED, SETTINGS, Row

Batches = Iterator[tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]]
"""(images, labels), batch by batch."""

LABELS = {
    "balanced": "image i is of class i mod num_classes",
    "random": "image i is of class i of numpy.random.default_rng(seed).integers(num_classes, size=num_samples)",
}


def sweep(config: Config, folder: str) -> list[Row]:
    """Draw and measure `eval.num_samples` images for every cell of `eval`'s grid: T, v, interval and w.

    Writes sweep.csv, a manifest a row, the curves in sweep.png, grids of images and the images' `.npz`; prints the
    table, the paper's beside it where the config is the paper's. Image i is number i of seed `eval.seed`, whatever the
    cell. Returns the rows of this config. Raises `preemption.Stopped` when asked to stop; the same call resumes.
    """
    if not config.eval.weights:
        raise ValueError(
            "config.eval.weights is (): give the weights to sweep, such as --config.eval.weights='(0.0, 1.0)'"
        )
    check(config, folder)
    run = load_run(config, folder)
    mesh = parallel.make_mesh(**config.mesh)
    train = data.from_config(config.data, config.data.split)
    data.check_classes(run.class_names, f"the run {folder}", train.class_names, f"data.split {config.data.split!r}")
    features = open_features(config, folder, mesh, train)
    reference_name = reference_hash(config, features, train)
    guide = load_guide(config, folder)
    weights = weights_hash(run.params)
    guide_weights = "" if guide is None else weights_hash(guide.args[0])
    manifests = {}
    for c in grid(config, run.step):
        manifest = manifest_of(config, c, weights, guide_weights, reference_name, features)
        manifests[results.manifest_name(manifest)] = c, manifest

    held = rows_of(folder, manifests)
    parallel.barrier("sweep cells looked for")
    missing = [pair for name, pair in manifests.items() if name not in held]
    shown = {row["manifest"] for row in results.latest(folder)}
    parallel.barrier("sweep cells found")
    for name in held.keys() - shown if jax.process_index() == 0 else ():  # measured otherwise meanwhile
        results.append_row(folder, held[name])
    if held:
        print(f"{len(held)} of {len(manifests)} cells are in {folder}/sweep.csv already.", flush=True)
    if missing:
        reference = open_reference(config, folder, features, train, reference_name)
        metrics.check_rank(config.eval.num_samples, len(reference.mu))
        measure_cells(config, folder, mesh, run.params, guide, missing, features, reference)

    rows = list(rows_of(folder, manifests).values())
    if jax.process_index() == 0:
        show(config, folder, rows + beside(folder, rows), run.class_names)
    return rows


def measure_cells(
    config: Config,
    folder: str,
    mesh: Mesh,
    params: Any,
    guide: Any,
    cells: list[tuple[Row, dict[str, Any]]],
    features: FeatureNetwork,
    reference: Reference,
) -> None:
    """One cell after the other, its row written when it is known. The bar counts network evaluations."""
    costs = [evaluations(config, c["num_steps"], c["w"], ends(c)) for c, _ in cells]
    total = config.eval.num_samples * sum(costs)
    flops = total * evaluation_flops(config, params)
    print(f"{len(cells)} cells to measure: {total:,} network evaluations, {flops:.3g} FLOP.", flush=True)

    @functools.cache
    def draw_with(num_steps: int) -> Draw:
        return make_draw(config, ConfigDict(config.sample.to_dict() | {"num_steps": num_steps}), mesh)

    params, guide = parallel.replicate(mesh, params), parallel.replicate(mesh, guide)
    radii = metrics.squared_radii(reference.features)
    with tqdm(total=total, desc="sweep", unit="eval", unit_scale=True, smoothing=0.1, disable=None) as bar:
        for number, ((c, manifest), cost) in enumerate(zip(cells, costs, strict=True)):
            start = time.perf_counter()
            row: Row = c | {"manifest": results.manifest_name(manifest)}
            images = drawn(config, draw_with(c["num_steps"]), params, guide, row, folder)
            row |= measure(counted(images, bar, cost), c["num_samples"], features, reference, radii)
            rate = c["num_samples"] / (time.perf_counter() - start)
            if jax.process_index() == 0:
                results.write_manifest(folder, manifest)
                results.append_row(folder, row)
                shown = "  ".join(f"{key} {row[key]:.4g}" for key in MEASURED if row[key] is not None)
                tqdm.write(f"T {c['num_steps']}  w {c['w']:g}  {shown}  ({rate:.3g} images/s drawn and measured)")
                sys.stdout.flush()  # a supervisor reads it
            parallel.barrier(f"sweep cell {number}")


def counted(batches: Batches, bar: tqdm, cost: int) -> Batches:
    """The same batches; the bar moves by `cost` an image."""
    for images, labels in batches:
        yield images, labels
        bar.update(len(images) * cost)


def measure(
    batches: Batches,
    count: int,
    features: FeatureNetwork,
    reference: Reference,
    radii: Float[np.ndarray, " n"] | None = None,
) -> dict[str, float | None]:
    """The columns MEASURED, of `count` images that come by batches; their features are kept, they are not.

    `radii` are the reference's, where they are known. sFID is None where the feature network has no spatial layer, the
    share of the class asked for where it is not the classifier of the data set's own classes.
    """
    pool = spatial = sums = None
    rows, right, first = [], 0, 0
    for images, labels in batches:
        outputs = features.extract(images)
        pool, spatial = add(pool, outputs.pool), add(spatial, outputs.spatial)
        batch = metrics.score_sums(outputs.probs, np.arange(first, first + len(images)), count)
        sums = batch if sums is None else metrics.merge_score_sums(sums, batch)
        right += int((outputs.probs.argmax(-1) == labels).sum())
        rows.append(outputs.pool)
        first += len(images)
    if pool is None or sums is None or first != count:
        raise ValueError(f"{first} images came, {count} were announced")
    sfid = None
    if spatial is not None and reference.mu_s is not None and reference.sigma_s is not None:
        sfid = metrics.frechet_distance(reference.mu_s, reference.sigma_s, *metrics.mean_and_cov(spatial))
    precision, recall = metrics.precision_recall(reference.features, np.concatenate(rows), reference_radii=radii)
    return {
        "fid": metrics.frechet_distance(reference.mu, reference.sigma, *metrics.mean_and_cov(pool)),
        "sfid": sfid,
        "is": metrics.inception_score_from_sums(sums),
        "precision": precision,
        "recall": recall,
        "class_accuracy": right / count if features.name == "classifier" else None,
    }


def check(config: Config, folder: str) -> None:
    """What a sweep needs beyond a trained model, looked at before hours of training. Raises ValueError."""
    evaluate = config.eval
    parallel.check_batch("sample.batch_size", config.sample.batch_size, parallel.make_mesh(**config.mesh))
    if evaluate.features == "classifier":
        splits = config.data.split, evaluate.test_split
        train, held_out = (data.from_config(config.data, split).class_names for split in splits)
        data.check_classes(train, f"data.split {splits[0]!r}", held_out, f"eval.test_split {splits[1]!r}")
    elif not os.path.isfile(evaluate.inception_path):
        raise ValueError(
            f"config.eval.inception_path is {evaluate.inception_path!r}, which is no file; make it with "
            "`python -m cfd.convert inception FILE OUT`"
        )
    else:
        inception.load_params(evaluate.inception_path)
    if evaluate.reference:
        if not os.path.isfile(evaluate.reference):
            raise ValueError(
                f"config.eval.reference is {evaluate.reference!r}, which is no file; '' takes the data set"
            )
        shape = (config.data.image_size, config.data.image_size, config.data.channels)
        headers = check_reference(evaluate.reference, shape, evaluate.features)
        for name, expected in STATISTICS.items() if "mu" in headers else ():
            found = headers[name].shape if name in headers else "missing"
            if found != expected:
                raise ValueError(
                    f"{evaluate.reference}: {name} is {found}, expected {expected}: give a file with the statistics of "
                    "OpenAI's evaluator, or one of images arr_0 alone"
                )
    check_weights(config, evaluate.weights)
    check_guide(config, folder)


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


def drawn(config: Config, draw: Draw, params: Any, guide: Any, c: Row, folder: str) -> Batches:
    """The (images, labels) of a cell as they are drawn; also written to its .npz, in OpenAI's layout."""
    count = c["num_samples"]
    index = np.arange(count, dtype=np.int32)
    labels = labels_of(c["labels"], c["seed"], count, config.data.num_classes)
    request = Request(np.full(count, c["seed"], np.uint32), index, labels, np.full(count, c["w"], np.float32))
    size = (config.data.image_size, config.data.image_size, config.data.channels)
    path = samples_path(folder, c)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    first_process = jax.process_index() == 0
    with npz.sample_writer(path, count, size) if first_process else contextlib.nullcontext(lambda *_: None) as write:
        first = 0
        for images in draw(params, request, v=c["v"], interval=ends(c), classifier=guide):
            rows = labels[first : first + len(images)]
            write(images, rows)
            first += len(images)
            yield images, rows
            if preemption.requested():
                raise preemption.Stopped(f"Stopped in the sweep at w = {c['w']:g}")


def labels_of(policy: str, seed: int, count: int, num_classes: int) -> Int[np.ndarray, " count"]:
    """The class of each image, by a policy of LABELS; a longer set begins with the same classes."""
    if policy == "random":
        return np.random.default_rng(seed).integers(num_classes, size=count).astype(np.int32)
    return np.arange(count, dtype=np.int32) % num_classes


def grid(config: Config, step: int) -> list[Row]:
    """The cells that `eval` asks for: what determines each, and what its FID is called."""
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


def ends(c: Row) -> tuple[float, ...]:
    """The guidance interval of a cell, () for none."""
    return tuple(float(end) for end in c["interval"].split(":") if end)


def samples_path(folder: str, c: Row) -> str:
    """Where the images of a row are kept; by the manifest, those of no other row."""
    keys = [key for key in (*SETTINGS, "manifest") if key not in ("p_uncond", "features") and c[key] != ""]
    name = "_".join(f"{key}-{c[key]}" for key in keys)
    return os.path.join(folder, "samples", f"{name}.npz")


def manifest_of(
    config: Config, c: Row, weights: str, guide_weights: str, reference: str, features: FeatureNetwork
) -> dict[str, Any]:
    """How a row is made: the hashes of all that goes in, every setting, and the versions of the programs."""
    settings = {key: c[key] for key in SETTINGS if key not in ("step", "p_uncond", "features")}
    return {
        "weights": {
            "sha256": weights,
            "step": c["step"],
            "ema_decay": config.train.ema_decay,
            "p_uncond": c["p_uncond"],
        },
        "classifier": {"sha256": guide_weights},
        "network": config.model.to_dict(),
        "sampling": settings | {"clip": config.sample.clip, "process": config.process.to_dict()},
        "label_policy": LABELS[c["labels"]],
        "seeds": "image i is drawn with the key fold_in(key(seed), i)",
        "images": CONVENTIONS["images"],
        "w": CONVENTIONS["w"],
        "data": {key: config.data[key] for key in ("source", "name", "split", "image_size")},
        "reference": {"sha256": reference, "source": os.path.basename(config.eval.reference) or "data"},
        "features": {"name": features.name, "sha256": features.weights_hash},
        "cfd": cfd.__version__,
        "environment": {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def weights_hash(params: Any) -> str:
    """The SHA-256 of parameters: of every array, by path, its path, dtype, shape and values."""
    digest = hashlib.sha256()
    for path, x in sorted(flatten_dict(params).items()):
        array = np.ascontiguousarray(x)
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def rows_of(folder: str, names: Iterable[str]) -> dict[str, Row]:
    """The rows of sweep.csv whose manifests have these names and are there, in the order of the names."""
    rows = {row["manifest"]: row for row in results.read_rows(folder)}
    return {name: rows[name] for name in names if name in rows and results.read_manifest(folder, name) is not None}


def beside(folder: str, rows: list[Row]) -> list[Row]:
    """The rows of the other kind of guidance that are measured with all else equal: they belong in the same picture."""

    def others(row: Row) -> tuple:
        shared = tuple(row[key] for key in SETTINGS if key not in ("guidance", "w"))
        return *shared, results.measured_with(folder, row)

    kinds, settings = {row["guidance"] for row in rows}, {others(row) for row in rows}
    return [row for row in results.latest(folder) if row["guidance"] not in kinds and others(row) in settings]


def show(config: Config, folder: str, rows: list[Row], class_names: tuple[str, ...]) -> None:
    """sweep.png, a grid of images for each curve in it, and the table on the standard output."""
    table = paper.table_of(config)
    published = [] if table is None else paper.rows(table)
    curves = results.curves(rows)
    figures.save_curve(os.path.join(folder, "sweep.png"), curves, results.curves(published, "paper"))
    for number, line in enumerate(curves.values()):
        name = f"sweep_{number}.png" if len(curves) > 1 else "sweep.png"
        kept = [row for row in line if os.path.exists(samples_path(folder, row))]
        if len(kept) < len(line):
            lost = ", ".join(f"{row['w']:g}" for row in line if row not in kept)
            print(f"The images of w = {lost} are not in {folder}/samples: {name} there leaves them out.", flush=True)
        if kept:
            figures.save(os.path.join(folder, "samples", name), grid_of(config, kept, folder, class_names))
    print(results.table({"ours": rows, "paper": published} if table else {"": rows}), flush=True)


def grid_of(config: Config, line: list[Row], folder: str, class_names: tuple[str, ...]) -> np.ndarray:
    """The first images (at most ten) at every weight of a curve: a row an image, a column a weight."""
    first = line[0]
    count = min(10, first["num_samples"])
    classes = labels_of(first["labels"], first["seed"], count, config.data.num_classes)
    columns = [next(npz.npz_batches(samples_path(folder, row), "arr_0", count)) for row in line]
    images = np.stack(columns, axis=1)
    return figures.grid(images, [class_names[i] for i in classes], [f"w = {row['w']:g}" for row in line])


def compare(config: Config, folder: str, others: Sequence[str]) -> str:
    """`--mode=compare`: the newest sweeps of several runs side by side, such as one a p_uncond, and the paper's.

    Writes compare.md, the table in the paper's layout, and compare.png. Returns the table. Raises ValueError where two
    runs cannot be told apart by their settings, where they were measured with different references or features, and
    where a row's manifest is missing or damaged.
    """
    rows, made_with = [], {}
    for run in (folder, *others):
        held = results.latest(run)
        if not held:
            raise ValueError(f"{run} has no sweep.csv: sweep it first, with --mode=sweep")
        newest = max(row["step"] for row in held)
        for row in held:
            if row["step"] != newest:
                continue
            manifest = results.read_manifest(run, row["manifest"])
            if manifest is None:
                raise ValueError(
                    f"{run}/manifests/{row['manifest']}.json is not there, or is damaged: sweep {run} again at "
                    f"w = {row['w']:g}"
                )
            rows.append(row)
            made_with.setdefault((manifest["reference"]["sha256"], manifest["features"]["sha256"]), run)
    if len(made_with) > 1:
        raise ValueError(
            f"{' and '.join(made_with.values())} were measured with different references or feature networks: copy the "
            "features folder of one into the others and sweep them again"
        )
    curves = results.curves(rows)
    if sum(map(len, curves.values())) < len(rows):
        raise ValueError(f"{', '.join((folder, *others))} hold rows of the same settings: nothing tells them apart")
    table = paper.table_of(config)
    published = [] if table is None else paper.rows(table)
    text = results.table({"ours": rows, "paper": published} if table else {"": rows})
    with open(os.path.join(folder, "compare.md"), "w") as file:
        file.write(text + "\n")
    figures.save_curve(os.path.join(folder, "compare.png"), curves, results.curves(published, "paper"))
    return text
