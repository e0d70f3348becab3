"""The metrics of real images, below or above which no generator of the same images need go: <folder>/floor.json.

FID and KID of `num_samples` training images that are drawn without replacement, as many times as `draws` says, and the
metrics of the images of the held-out split. FID of few images is biased, and even real ones are far from 0.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from cfd.data.batches import load_arrays
from cfd.data.dataset import Dataset
from cfd.errors import UserError
from cfd.evaluation import kid, metrics
from cfd.evaluation.features import FeatureNetwork
from cfd.evaluation.reference import Reference, block_rows, evenly_spaced, with_progress
from cfd.evaluation.scores import score_outputs
from cfd.runs import files

DRAWS = 20


def _is_number(x: Any) -> bool:
    return type(x) in (int, float)


def _is_spread(x: Any) -> bool:
    """Whether a value is None or has the parts of `spread`."""
    return x is None or (isinstance(x, dict) and all(_is_number(x.get(part)) for part in ("mean", "sd", "low", "high")))


def _is_held_out(x: Any) -> bool:
    """Whether a value is None, or describes a split with a number or None for each of its measures."""
    if x is None or not isinstance(x, dict):
        return x is None
    measures = [value for name, value in x.items() if name not in ("split", "identity")]
    return (
        isinstance(x.get("split"), str)
        and type(x.get("images")) is int
        and all(value is None or _is_number(value) for value in measures)
    )


PARTS: dict[str, Callable[[Any], bool]] = {
    "reference": lambda x: isinstance(x, str),
    "num_samples": lambda x: type(x) is int,
    "draws": lambda x: type(x) is int,
    "fid": _is_spread,
    "kid": _is_spread,
    "saturation": lambda x: x is None or _is_number(x),
    "held_out": _is_held_out,
}
"""The parts of a floor.json that are read, and a condition that each satisfies."""


def floor_path(folder: str) -> str:
    """The file with the metrics of real images in the folder of a sweep."""
    return os.path.join(folder, "floor.json")


def read_floor(folder: str) -> dict[str, Any] | None:
    """The content of floor.json; None if the file is missing or damaged, and the next sweep then writes it again.

    "reference" names the reference, "num_samples" is the number of images of a draw, and "draws" that of draws. "fid"
    and "kid" are {"mean", "sd", "low", "high"} over the draws, the last two mean ± 1.96 sd; both are None if there are
    too few features, and "reason" says so. "balanced" is whether the draws have equally many images of each class.
    "saturation" is that of the reference. "held_out" has the "split", the "identity" of its data, the number of
    "images", and a value per metric, such as "precision", "recall", "is" and "class_accuracy". It is None if no split
    is held out. Raises ValueError if this job may not read the file.
    """
    path = floor_path(folder)
    try:
        content = files.read_bytes(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {files.how_to_allow(path)}") from error
    try:
        found = None if content is None else json.loads(content)
    except ValueError:
        return None
    sound = isinstance(found, dict) and all(holds(found.get(name)) for name, holds in PARTS.items())
    return found if sound else None


def write_floor(folder: str, name: str, reference: Reference, floor: dict[str, Any], num_samples: int) -> None:
    """Writes floor.json: the values of `floor` and, of the reference called `name`, its saturation."""
    whole = {"reference": name, "num_samples": num_samples, "saturation": reference.saturation} | floor
    files.write_atomically(floor_path(folder), json.dumps(whole, indent=1) + "\n")


def draws_of_real(reference: Reference, num_samples: int, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """The "draws", "fid", "kid", "reason" and "balanced" of `read_floor`, of `num_samples` real images per draw.

    If the reference has the classes of its features, each draw has equally many images of each class, up to 1. FID is
    that from the whole reference. No more than half of its images are drawn, because all of them have FID 0. KID is
    that from the features of the reference that are not drawn.
    """
    labels = reference.labels
    found: dict[str, Any] = {"draws": draws, "fid": None, "kid": None, "reason": "", "balanced": labels is not None}
    features = reference.features
    if features is None or len(features) < 2 * num_samples:
        count = 0 if features is None else len(features)
        found["reason"] = f"{num_samples:,} images are more than half of the {count:,} whose features the reference has"
        return found
    classes = np.zeros(len(features), np.int64) if labels is None else np.asarray(labels)
    names, counts = np.unique(classes, return_counts=True)
    if counts.min() < -(-num_samples // len(names)):
        found["reason"] = f"a class has only {counts.min():,} images, too few for {num_samples:,} images of all classes"
        return found
    numbers, one_group = np.random.default_rng(seed), np.zeros(num_samples, np.int64)
    root = metrics.covariance_root(reference.sigma, "first")[1]
    distances, divergences = [], []
    for _ in range(draws):
        rows = balanced(numbers, classes, num_samples)
        drawn = features[rows]
        statistics = metrics.mean_and_cov(metrics.moments(drawn))
        distances.append(metrics.frechet_distance(reference.mu, reference.sigma, *statistics, root))
        others, of_others = np.delete(features, rows, axis=0), np.delete(classes, rows)
        kernel = kid.mean_kernel(others, of_others)
        divergences.append(kid.kid(others, drawn, classes[rows], one_group, kernel)[0])
    return found | {"fid": spread(distances), "kid": spread(divergences)}


def balanced(numbers: np.random.Generator, classes: Int[np.ndarray, " _n"], count: int) -> Int[np.ndarray, " m"]:
    """`count` rows without replacement, equally many of each class. Random classes have one row more if need be."""
    names = numbers.permutation(np.unique(classes))
    sizes = count // len(names) + (np.arange(len(names)) < count % len(names))
    pairs = zip(names, sizes, strict=True)
    return np.concatenate(
        [numbers.choice(np.flatnonzero(classes == name), size, replace=False) for name, size in pairs]
    )


def spread(values: list[float]) -> dict[str, float]:
    """Mean, standard deviation, and mean ± 1.96 standard deviations."""
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    return {"mean": mean, "sd": sd, "low": mean - 1.96 * sd, "high": mean + 1.96 * sd}


def held_out_metrics(
    split: str, dataset: Dataset, features: FeatureNetwork, reference: Reference, num_samples: int
) -> dict[str, Any]:
    """The metrics of at most `num_samples` images of the held-out split, evenly spaced; see `read_floor`.

    All processes call it, with the same result. Bad images are left out.
    """
    indices = np.flatnonzero(evenly_spaced(len(dataset), num_samples))
    size = block_rows((dataset.image_size, dataset.image_size, dataset.channels))
    labels: list[np.ndarray] = []

    def blocks() -> Iterator[np.ndarray]:
        for first in range(0, len(indices), size):
            images, classes = load_arrays(dataset, indices[first : first + size])
            labels.append(classes)
            yield images

    batches = [(features.extract(block), labels[-1]) for block in with_progress(blocks(), len(indices)) if len(block)]
    count = sum(len(of_batch) for _, of_batch in batches)
    described = {"split": split, "identity": dataset.identity, "images": count}
    if count <= metrics.NEIGHBOURS:
        return described
    return described | score_outputs(iter(batches), count, features.name, reference).values
