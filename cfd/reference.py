"""The reference set of the metrics: its statistics, from the data set (and then cached) or from OpenAI's `.npz` files.

An `.npz` of OpenAI's evaluator holds `mu`, `sigma`, `mu_s` and `sigma_s` of InceptionV3 over the whole set, and some of
its images, `arr_0`, whose features serve precision and recall. One with `arr_0` alone is measured itself.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8

from cfd import data, metrics, npz, parallel, preemption
from cfd.config import Config
from cfd.features import FeatureNetwork

NEIGHBOUR_ROWS = 10_000
"""Reference images for precision and recall, as in ADM's evaluator."""
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
"""Of a file of OpenAI's evaluator, and their shapes."""
FINGERPRINT_IMAGES = 16
BLOCK_BYTES = 2**25


class Reference(NamedTuple):
    """Mean and covariance of both feature layers, and the features of at most NEIGHBOUR_ROWS images.

    The spatial ones are None where the feature network has no spatial layer.
    """

    mu: Float[np.ndarray, " d"]
    sigma: Float[np.ndarray, "d d"]
    mu_s: Float[np.ndarray, " s"] | None
    sigma_s: Float[np.ndarray, "s s"] | None
    features: Float[np.ndarray, "n d"]


def reference_hash(config: Config, features: FeatureNetwork, dataset: data.Dataset) -> str:
    """A SHA-256 of what the reference is made from: the file, or the data set (by its config, its size and some of its
    images), and the weights of the feature network."""
    digest = hashlib.sha256(features.weights_hash.encode())
    if config.eval.reference:
        with open(config.eval.reference, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
    elsewhere = ("path", "num_workers", "in_memory", "flip")
    settings = {key: value for key, value in config.data.items() if key not in elsewhere}
    settings |= {"num_examples": len(dataset), "neighbour_rows": NEIGHBOUR_ROWS}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    some = np.flatnonzero(evenly_spaced(len(dataset), FINGERPRINT_IMAGES))
    for array in data.load_arrays(dataset, some):
        digest.update(array.tobytes())
    return digest.hexdigest()


def open_reference(
    config: Config, folder: str, features: FeatureNetwork, dataset: data.Dataset, name: str
) -> Reference:
    """The statistics that `eval.reference` names, or those of `dataset`, kept in features/reference_<name>.npz.

    `name` is from `reference_hash`. Warns where the set is too small for a covariance of full rank. Raises ValueError
    for a file of another resolution, of other features, or that is no such `.npz`.
    """
    path = os.path.join(folder, "features", f"reference_{name[:12]}.npz")
    found = os.path.exists(path)
    parallel.barrier("reference looked for")
    if found:
        held = npz.read_npz(path)
        return Reference(held["mu"], held["sigma"], held.get("mu_s"), held.get("sigma_s"), held["features"])
    if config.eval.reference:
        shape = (config.data.image_size, config.data.image_size, config.data.channels)
        reference = read_reference(config.eval.reference, shape, features)
    else:
        images = (rows for rows, _ in in_blocks(dataset, config.data.num_workers))
        reference = measure(images, len(dataset), features)
    if jax.process_index() == 0:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        npz.write_npz(path, {key: array for key, array in reference._asdict().items() if array is not None})
    parallel.barrier("reference")
    return reference


def read_reference(path: str, image_shape: tuple[int, int, int], features: FeatureNetwork) -> Reference:
    """The statistics of an `.npz` in the layout of OpenAI's evaluator; their own, where it holds them."""
    headers = check_reference(path, image_shape, features.name)
    images, rows = headers["arr_0"], block_rows(image_shape)
    blocks = until_stopped(npz.npz_batches(path, "arr_0", rows))
    if "mu" not in headers:
        return measure(blocks, images.shape[0], features)
    chosen = evenly_spaced(images.shape[0], NEIGHBOUR_ROWS)
    pool = [
        features.extract(block[chosen[first : first + rows]]).pool
        for first, block in zip(range(0, len(chosen), rows), blocks, strict=True)
    ]
    return Reference(**npz.read_npz(path, tuple(STATISTICS)), features=np.concatenate(pool))


def check_reference(path: str, image_shape: tuple[int, int, int], features_name: str) -> dict[str, npz.Header]:
    """The headers of such an `.npz`. Raises ValueError if it does not go with images of this shape, or the features."""
    headers = npz.npz_headers(path)
    if "arr_0" not in headers:
        raise ValueError(f"{path} holds {sorted(headers)} and no images arr_0, which precision and recall need")
    images = headers["arr_0"]
    if images.shape[1:] != image_shape or images.dtype != np.uint8:
        raise ValueError(
            f"{path} holds {images.dtype} images of shape {images.shape[1:]}, this config makes uint8 {image_shape}: "
            "give the reference of the config's own resolution"
        )
    if "mu" in headers and features_name != "inception":
        raise ValueError(
            f"{path} holds statistics of InceptionV3, and eval.features is {features_name!r}: set eval.features to "
            "'inception', or eval.reference to ''"
        )
    return headers


def measure(images: Iterable[UInt8[np.ndarray, "n h w c"]], count: int, features: FeatureNetwork) -> Reference:
    """The statistics of about `count` images that come by blocks; none is kept."""
    chosen = evenly_spaced(count, NEIGHBOUR_ROWS)
    pool = spatial = None
    kept, first = [], 0
    for block in images:
        if len(block) == 0:  # all its images are bad, and skipped
            continue
        outputs = features.extract(block)
        pool, spatial = add(pool, outputs.pool), add(spatial, outputs.spatial)
        kept.append(outputs.pool[chosen[first : first + len(block)]])
        first += len(block)
    if pool is None:
        raise ValueError("the reference set holds no image")
    metrics.check_rank(pool.count, len(pool.mean))
    mu_s, sigma_s = (None, None) if spatial is None else metrics.mean_and_cov(spatial)
    return Reference(*metrics.mean_and_cov(pool), mu_s, sigma_s, np.concatenate(kept))


def add(total: metrics.Moments | None, rows: Float[np.ndarray, "n d"] | None) -> metrics.Moments | None:
    """The moments with more rows; None where the network has no such features."""
    if rows is None:
        return total
    batch = metrics.moments(rows)
    return batch if total is None else metrics.merge(total, batch)


def evenly_spaced(count: int, wanted: int) -> Bool[np.ndarray, " count"]:
    """Which `wanted` of `count` rows to take, or all of fewer: where rows are sorted by class, as many of each."""
    chosen = np.zeros(count, bool)
    chosen[np.arange(min(wanted, count)) * count // max(min(wanted, count), 1)] = True
    return chosen


def in_blocks(dataset: data.Dataset, num_workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The whole data set in order, (images, labels) by blocks; stops when asked to."""
    rows = block_rows((dataset.image_size, dataset.image_size, dataset.channels))
    return until_stopped(
        data.load_arrays(dataset, np.arange(first, min(first + rows, len(dataset))), num_workers=num_workers)
        for first in range(0, len(dataset), rows)
    )


def until_stopped(blocks: Iterable[Any]) -> Iterator[Any]:
    """The blocks; after each the watchdog hears of it, and the run stops if it was asked to."""
    for block in blocks:
        yield block
        if preemption.requested():
            raise preemption.Stopped("Stopped in the sweep, in its reference set")


def block_rows(image_shape: tuple[int, int, int]) -> int:
    """Images a block: at most 1000, and no more than BLOCK_BYTES of them."""
    return max(1, min(1000, BLOCK_BYTES // int(np.prod(image_shape))))
