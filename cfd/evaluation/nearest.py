"""The nearest training images of a sweep's first samples, which show whether a model copies its training set.

Distances are between features of the pool layer. The training images are those whose features serve precision and
recall: all of them, or NEIGHBOUR_ROWS that are evenly spaced in a larger set.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from cfd.data.dataset import Dataset
from cfd.devices import parallel
from cfd.evaluation import neighbours
from cfd.evaluation.features import FeatureNetwork
from cfd.evaluation.reference import NEIGHBOUR_ROWS, decode_together, evenly_spaced
from cfd.runs import files, npz
from cfd.runs.results import Row, first_samples, samples_path

COUNT = 10
"""The number of samples, at most, of each row of the sweep."""
MAX_BAD_IMAGES = 1000
"""If bad images were skipped, a training image is looked for among this many places from its own."""
BLOCK = 100
"""The number of these places that are looked at together."""
QUANTILES = (0.05, 0.5, 0.95)


class Nearest(NamedTuple):
    """The first n samples of each of r rows, and the nearest training image of each.

    `manifests` are the names of the rows' manifests, and `w` their weights. `index` is the number of a nearest image in
    the training split. `typical` are QUANTILES of the distance from a training image to the nearest other one.
    `searched` is (the number of training images that were compared, the number of all).
    """

    manifests: tuple[str, ...]
    w: Float[np.ndarray, " r"]
    labels: Int[np.ndarray, "r n"]
    samples: UInt8[np.ndarray, "r n h w c"]
    nearest: UInt8[np.ndarray, "r n h w c"]
    nearest_labels: Int[np.ndarray, "r n"]
    index: Int[np.ndarray, "r n"]
    distance: Float[np.ndarray, "r n"]
    typical: Float[np.ndarray, "3"]
    searched: Int[np.ndarray, "2"]


def nearest_rows(
    x: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m d"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(index, squared distance) of the nearest centre of each row of x, as float64 differences decide it."""
    frame, no_offset = neighbours.frame_of(x, centres), np.zeros(len(centres))
    index, squared, unsure = np.empty(len(x), np.int64), np.empty(len(x)), np.zeros(len(x), bool)
    count = 1 + neighbours.SPARE_CANDIDATES
    for rows, found, distances, beyond in neighbours.candidates(x, centres, no_offset, frame, count):
        best = distances.argmin(axis=1)[:, None]
        index[rows] = np.take_along_axis(found, best, axis=1)[:, 0]
        squared[rows] = np.take_along_axis(distances, best, axis=1)[:, 0]
        unsure[rows] = (squared[rows] > beyond) & (squared[rows] > 0.0)
    for row, low, high in neighbours.bounds(x, centres, no_offset, frame, np.flatnonzero(unsure)):
        near = np.flatnonzero(low <= high.min())
        distances = neighbours.squared_distances(x[row], centres, near)
        index[row], squared[row] = near[distances.argmin()], distances.min()
    return index, squared


def nearest_path(folder: str) -> str:
    """The file of the nearest training images in the folder of a sweep."""
    return os.path.join(folder, "nearest.npz")


def write_nearest(
    folder: str,
    rows: Sequence[Row],
    features: FeatureNetwork,
    training: Float[np.ndarray, "m d"],
    dataset: Dataset,
    num_workers: int,
) -> str:
    """Writes nearest.npz: the nearest training images of the first samples of these rows of a sweep.

    `training` are the pool features of `dataset` at `evenly_spaced(len(dataset), NEIGHBOUR_ROWS)`, the `features` of
    its `Reference`. Every process must call this; all read the samples, and process 0 writes. Returns "", or the reason
    why there is no file: that samples are missing, or that training images have changed.
    """
    rows = [row for row in rows if files.exists(samples_path(folder, row))]
    if not rows:
        return "the samples are missing"
    count = min(COUNT, *(row["num_samples"] for row in rows))
    parts = [{name: first_samples(folder, row, name, count) for name in ("arr_0", "arr_1")} for row in rows]
    samples = np.stack([part["arr_0"] for part in parts])
    pool = features.extract(samples.reshape(-1, *samples.shape[2:])).pool
    found, squared = nearest_rows(pool, training)
    index, images = training_images(found, features, training, dataset, num_workers)
    if (index < 0).any():
        return f"training image {found[index < 0][0]} of those that served the reference is not found again"
    if jax.process_index() == 0:
        spread = np.sqrt(neighbours.squared_to_kth(training, 1)) if len(training) > 1 else np.zeros(1)
        whole = samples.shape[:2]
        classes = np.array([dataset.read_label(int(i)) for i in index], np.int64)
        arrays = {
            "manifests": np.stack([np.frombuffer(row["manifest"].encode().ljust(16), np.uint8) for row in rows]),
            "w": np.array([row["w"] for row in rows], np.float64),
            "labels": np.stack([part["arr_1"] for part in parts]),
            "samples": samples,
            "nearest": images.reshape(samples.shape),
            "nearest_labels": classes.reshape(whole),
            "index": index.reshape(whole),
            "distance": np.sqrt(squared).reshape(whole),
            "typical": np.quantile(spread, QUANTILES),
            "searched": np.array([len(training), len(dataset)], np.int64),
        }
        npz.write_npz(nearest_path(folder), arrays)
    parallel.barrier("nearest images")
    return ""


def training_images(
    found: Int[np.ndarray, " n"],
    features: FeatureNetwork,
    training: Float[np.ndarray, "m d"],
    dataset: Dataset,
    num_workers: int,
) -> tuple[Int[np.ndarray, " n"], UInt8[np.ndarray, "n h w c"]]:
    """(numbers in the data set, images) of the rows `found` of `training`; the number is -1 if an image is not found.

    Bad images that were skipped are not among the rows, and then later images have lower rows than places. An image is
    therefore recognised by its features.
    """
    place = np.flatnonzero(evenly_spaced(len(dataset), NEIGHBOUR_ROWS))[found]
    images = decode_together(dataset, place, num_workers)
    if len(images) == len(place) and same(features.extract(images).pool, training[found]).all():
        return place, images
    images = np.zeros((len(found), dataset.image_size, dataset.image_size, dataset.channels), np.uint8)
    index = np.full(len(found), -1)
    for i, first in enumerate(place.tolist()):
        for start in range(first, min(first + MAX_BAD_IMAGES, len(dataset)), BLOCK):
            block = np.arange(start, min(start + BLOCK, len(dataset)))
            good = decode_together(dataset, block, num_workers)
            match = np.flatnonzero(len(good) and same(features.extract(good).pool, training[found[i]]))
            if len(match):
                numbers = [n for n in block.tolist() if len(decode_together(dataset, np.array([n]), 0))]
                index[i], images[i] = numbers[match[0]], good[match[0]]
                break
        if index[i] < 0:
            break
    return index, images


def same(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "*m d"]) -> Bool[np.ndarray, " n"]:
    """Whether rows are equal to those of y, or to the one row y, up to the rounding of a feature network."""
    return np.linalg.norm(x - y, axis=-1) <= 1e-3 * np.linalg.norm(y, axis=-1)


def read_nearest(folder: str) -> Nearest | None:
    """The content of nearest.npz, or None if there is no such file. Raises ValueError if it is damaged."""
    path = nearest_path(folder)
    if not files.exists(path):
        return None
    remedy = "remove it, and --mode=sweep writes it again"
    arrays: dict[str, Any] = npz.read_npz(path, Nearest._fields, remedy=remedy)
    manifests = tuple(bytes(name).decode().strip() for name in arrays.pop("manifests"))
    return Nearest(manifests, **arrays)


def is_written(folder: str, rows: Sequence[Row]) -> bool:
    """Whether nearest.npz is about these rows already."""
    found = read_nearest(folder)
    return found is not None and found.manifests == tuple(row["manifest"] for row in rows)
