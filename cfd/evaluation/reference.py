"""The reference set of the metrics: statistics of the data set, which are cached, or those of OpenAI's `.npz` files.

An `.npz` of OpenAI's evaluator holds `mu`, `sigma`, `mu_s` and `sigma_s`, the statistics of InceptionV3's features over
the whole set. It also holds some of the set's images, `arr_0`; their features serve precision and recall. If a file
holds `arr_0` alone, the statistics are computed from these images. If it holds no images, as the files of TTUR do not,
precision and recall are not measured.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from tqdm import tqdm

from cfd.data.batches import load_arrays
from cfd.data.dataset import Dataset
from cfd.devices import parallel, preemption
from cfd.errors import UserError
from cfd.evaluation import metrics
from cfd.evaluation.features import FeatureNetwork, data_hash, saturation
from cfd.runs import files, npz

NEIGHBOUR_ROWS = 10_000
"""The number of reference images for precision and recall, as in ADM's evaluator."""
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
"""The statistics in a file of OpenAI's evaluator, and their shapes. Other programs write `mu` and `sigma` alone."""
DINOV2_STATISTICS = {"mu": (1024,), "sigma": (1024, 1024)}
"""The statistics of DINOv2's features, as EDM2's evaluator computes them."""
BLOCK_BYTES = 2**25


class Reference(NamedTuple):
    """Mean and covariance of both feature layers, and the pool features of at most NEIGHBOUR_ROWS images.

    `mu_s` and `sigma_s` are None if the feature network has no spatial layer, or a file no statistics of it. `features`
    is None if a file has no images. `saturation` is the mean share of saturated values of all images, as
    `cfd.evaluation.features.saturation` has it, and `labels` are the classes of the images that `features` are of. Both
    are None too if the set was measured by an earlier version, and `labels` are None for a file or after bad images.
    """

    mu: Float[np.ndarray, " d"]
    sigma: Float[np.ndarray, "d d"]
    mu_s: Float[np.ndarray, " s"] | None = None
    sigma_s: Float[np.ndarray, "s s"] | None = None
    features: Float[np.ndarray, "n d"] | None = None
    saturation: float | None = None
    labels: Int[np.ndarray, " n"] | None = None


class Words(NamedTuple):
    """Parts of messages. The defaults are for a run with a config; `cfd.measure` names its own flags.

    `features` is the setting that chooses the feature network, and `use` the remedy if it must be another, in braces.
    `sized_by` says with which images those of the file are compared, and `resize` is the remedy if they differ.
    `add_images` is the remedy for a set of too few images.
    """

    features: str = "eval.features"
    use: str = "set eval.features to '{}', or eval.reference to ''"
    sized_by: str = "the config is for images"
    resize: str = "give a reference of the config's own resolution and channels"
    add_images: str = (
        "give more images, or a file with more as eval.reference; --config.eval.weights='()' trains without measuring"
    )


def reference_hash(features: FeatureNetwork, dataset: Dataset | None, *, path: str, data: dict[str, Any]) -> str:
    """The SHA-256, in hexadecimal, of everything that determines the reference statistics.

    It covers the weights of the feature network and the reference itself: the content of the file `path` or, if `path`
    is "", the data set. The data set enters by `data` (its settings, the `data` group of a config) and by `data_hash`,
    with the limit stated there. Settings that do not affect the images, such as where they are stored, are left out.
    """
    digest = hashlib.sha256(features.weights_hash.encode())
    if path:
        with files.downloaded(path) as copy, open(copy, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
    assert dataset is not None, "without a file, the data set is the reference"
    irrelevant = ("path", "labels", "num_workers", "in_memory", "flip")
    settings = {key: value for key, value in data.items() if key not in irrelevant}
    settings |= {"data_hash": data_hash(dataset), "neighbour_rows": NEIGHBOUR_ROWS}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def open_reference(
    folder: str,
    features: FeatureNetwork,
    dataset: Dataset | None,
    name: str,
    *,
    path: str,
    image_shape: tuple[int, int, int],
    num_workers: int,
) -> Reference:
    """The statistics in the file `path` or, if `path` is "", those of `dataset`.

    They are cached in features/reference_<name>.npz of the run's folder; `name` comes from `reference_hash`.
    `image_shape` is (H, W, C), and `num_workers` threads decode the images of `dataset`. Each process decodes an equal
    share of them, and all processes have the same result, to the bit, however many of them share the devices. Warns if
    the set is too small for a covariance of full rank, or if a file has no images. Raises ValueError as
    `check_reference` does, and `preemption.Stopped` on request.
    """
    cache = os.path.join(folder, "features", f"reference_{name[:12]}.npz")
    found = files.exists(cache)
    parallel.barrier("reference looked for")
    if found:
        reference = read_cached(cache)
    elif path:
        reference = read_reference(path, image_shape, features)
    else:
        assert dataset is not None, "without a file, the data set is the reference"
        reference = measure(image_blocks(dataset, num_workers), len(dataset), features)
        reference = reference._replace(labels=labels_of_features(dataset, reference))
    if path:
        warn_without_images(path, reference, features.name)
    if jax.process_index() == 0 and not found:
        npz.write_npz(cache, {key: np.asarray(x) for key, x in reference._asdict().items() if x is not None})
    parallel.barrier("reference")
    return reference


def labels_of_features(dataset: Dataset, reference: Reference) -> Int[np.ndarray, " n"] | None:
    """The classes of the images of `dataset` whose features the reference has; None if it left out bad images."""
    chosen = np.flatnonzero(evenly_spaced(len(dataset), NEIGHBOUR_ROWS)).tolist()
    if reference.features is None or len(chosen) != len(reference.features):
        return None
    labels = np.array([dataset.read_label(index) for index in chosen], np.int64)
    return labels if (labels >= 0).all() else None


def open_held_out(
    folder: str, features: FeatureNetwork, held_out: Dataset, *, split: str, data: dict[str, Any], num_workers: int
) -> Reference:
    """The statistics of the held-out split, cached as `open_reference` does it, with its errors.

    `split` is the name of the split, and `data` are the settings of the training split, as `reference_hash` takes them.
    """
    name = reference_hash(features, held_out, path="", data=data | {"split": split})
    shape = (held_out.image_size, held_out.image_size, held_out.channels)
    return open_reference(folder, features, held_out, name, path="", image_shape=shape, num_workers=num_workers)


def read_cached(path: str) -> Reference:
    """The reference in a file of an earlier sweep. A line says if its version did not measure saturation.

    Raises ValueError, with the remedy, if the file is damaged.
    """
    remedy = "remove the file, and --mode=sweep computes it again"
    arrays: dict[str, Any] = npz.read_npz(path, remedy=remedy)
    if not {"mu", "sigma"} <= arrays.keys() <= set(Reference._fields):
        raise UserError(f"{path} holds {list(arrays)}, expected mu, sigma and others of {Reference._fields}: {remedy}")
    if "saturation" in arrays:
        arrays["saturation"] = float(arrays["saturation"])
    elif "features" in arrays and jax.process_index() == 0:
        print(
            f"{path} is of an earlier version and lacks the saturation of the reference images: remove it, and "
            "--mode=sweep computes it again.",
            flush=True,
        )
    return Reference(**arrays)


def warn_without_images(path: str, reference: Reference, features_name: str) -> None:
    """Warns if the file of a reference has no images, and names the measures that it therefore does not serve."""
    if reference.features is None:
        dinov2 = features_name == "dinov2"  # which has no spatial layer
        spatial = "" if reference.mu_s is not None or dinov2 else "sFID, for which it has no mu_s and sigma_s, and "
        taken = "OpenAI's or TTUR's evaluator computes them; pytorch-fid resizes images in another way"
        if dinov2:
            taken = "EDM2's evaluator computes them; that of Stein et al. rounds the resized images"
        warnings.warn(
            f"{path} has no images arr_0: {spatial}KID, precision and recall, which compare single images, are not "
            f"measured. Its mu and sigma are taken to be as {taken}",
            stacklevel=1,  # notices.warnings_in_lines knows this package's warnings by their file
        )


def read_reference(
    path: str, image_shape: tuple[int, int, int], features: FeatureNetwork, words: Words = Words()
) -> Reference:
    """The statistics of an `.npz` in the layout of OpenAI's evaluator, computed from its images if it holds none.

    Raises ValueError, with `words`, as `check_reference` does.
    """
    headers = check_reference(path, image_shape, features.name, words)
    statistics: dict[str, Any] = npz.read_npz(path, [name for name in STATISTICS if name in headers])
    if "arr_0" not in headers:
        return Reference(**statistics)
    count, rows = headers["arr_0"].shape[0], block_rows(image_shape)
    blocks = with_progress(npz.npz_batches(path, "arr_0", rows), count)
    if "mu" not in headers:
        return measure(blocks, count, features)
    chosen = evenly_spaced(count, NEIGHBOUR_ROWS)
    pool, saturated = [], 0.0
    for first, block in zip(range(0, count, rows), blocks, strict=True):
        pool.append(features.extract(block[chosen[first : first + rows]]).pool)
        saturated += float(saturation(block).sum())
    return Reference(**statistics, features=np.concatenate(pool), saturation=saturated / count)


def check_reference(
    path: str, image_shape: tuple[int, int, int], features_name: str, words: Words = Words()
) -> dict[str, npz.Header]:
    """The headers of a reference `.npz`. Its images are not read.

    Raises ValueError, with `words`, if the file has neither images `arr_0` nor statistics `mu` and `sigma`, if the
    images are not as `check_images` requires, or if the statistics are not finite, not of the feature network
    `features_name`, or of other sizes than those of OpenAI's or EDM2's evaluator. Without images, the
    statistics of the spatial layer may be absent.
    """
    headers = npz.npz_headers(path)
    statistics = [name for name in STATISTICS if name in headers]
    if "arr_0" in headers:
        check_images(path, headers["arr_0"], image_shape, words)
    elif statistics not in (["mu", "sigma"], list(STATISTICS)):
        raise UserError(
            f"{path} holds {sorted(headers)}, and neither images arr_0, which all metrics can be measured with, nor mu "
            "and sigma, the statistics of InceptionV3's features for FID: give a file that has one or the other"
        )
    if not statistics:
        return headers
    of_dinov2 = "mu" in headers and headers["mu"].shape == DINOV2_STATISTICS["mu"]
    if features_name == "classifier" or (features_name == "dinov2" and not of_dinov2):
        whose, name = ("DINOv2", "dinov2") if of_dinov2 else ("InceptionV3", "inception")
        raise UserError(
            f"{path} holds statistics of {whose}, but {words.features} is {features_name!r}: {words.use.format(name)}"
        )
    shapes = DINOV2_STATISTICS if features_name == "dinov2" else STATISTICS
    evaluator = "EDM2's" if features_name == "dinov2" else "OpenAI's"
    for name in {**shapes, **dict.fromkeys(statistics)} if "arr_0" in headers else statistics:
        found, expected = headers[name].shape if name in headers else "missing", shapes.get(name, "nothing")
        if found != expected:
            raise UserError(
                f"{path}: {name} is {found}, expected {expected}: give a file with the statistics of {evaluator} "
                "evaluator, or one with images arr_0 alone"
            )
    for name, array in npz.read_npz(path, statistics).items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds NaN or infinity: compute it again, without broken images")
    return headers


def check_images(path: str, images: npz.Header, image_shape: tuple[int, int, int], words: Words = Words()) -> None:
    """Raises ValueError unless `arr_0` of the file has more than NEIGHBOURS uint8 images of this shape, in C order."""
    height, width, channels = image_shape
    if images.dtype != np.uint8:
        raise UserError(
            f"{path}: arr_0 has dtype {images.dtype}, expected uint8, from 0 to 255: save it again as "
            "numpy.uint8(numpy.round(arr_0)) if its values are in [0, 255], numpy.uint8(numpy.round(255 * arr_0)) if "
            "they are in [0, 1], or numpy.uint8(numpy.round(127.5 * (arr_0 + 1))) if they are in [-1, 1]"
        )
    if images.shape[1:] != image_shape:
        remedies = {
            (channels, height, width): "save arr_0.transpose(0, 2, 3, 1).copy() in its place",
            (height, width): f"save numpy.repeat(arr_0[..., None], {channels}, axis=-1) in its place",
            (height, width, 1): f"save numpy.repeat(arr_0, {channels}, axis=-1) in its place",
        }
        remedy = remedies.get(images.shape[1:], words.resize)
        raise UserError(
            f"{path}: arr_0 holds images of shape {images.shape[1:]}, but {words.sized_by} of shape {image_shape}, "
            f"[H, W, C]: {remedy}"
        )
    if images.fortran:
        raise UserError(
            f"{path}: arr_0 is in Fortran order, in which images are not stored one after the other: save "
            "numpy.ascontiguousarray(arr_0) in its place"
        )
    check_count(images.shape[0], path, words)


def check_count(count: int, whose: str, words: Words = Words()) -> None:
    """Raises ValueError unless a reference set has enough images for precision and recall; `whose` names the set."""
    if count <= metrics.NEIGHBOURS:
        raise UserError(
            f"{whose} has {count} images, and precision and recall need at least {metrics.NEIGHBOURS + 1}: "
            f"{words.add_images}"
        )


def measure(images: Iterable[UInt8[np.ndarray, "n h w c"]], count: int, features: FeatureNetwork) -> Reference:
    """The statistics of about `count` images that come in blocks. No block stays in memory.

    `count` includes bad images, which the blocks leave out. Warns if the set is too small for a covariance
    of full rank. Raises ValueError if there is no image.
    """
    chosen = evenly_spaced(count, NEIGHBOUR_ROWS)
    pool = spatial = None
    chosen_features, first, saturated = [], 0, 0.0
    for block in images:
        if len(block) == 0:  # every image of the block is bad and was skipped
            continue
        outputs = features.extract(block)
        pool, spatial = metrics.add(pool, outputs.pool), metrics.add(spatial, outputs.spatial)
        chosen_features.append(outputs.pool[chosen[first : first + len(block)]])
        saturated += float(saturation(block).sum())
        first += len(block)
    if pool is None:
        raise UserError("the reference set holds no image that can be read: check the data, or set eval.reference")
    metrics.check_rank(pool.count, len(pool.mean), "reference images")
    mu_s, sigma_s = (None, None) if spatial is None else metrics.mean_and_cov(spatial)
    return Reference(*metrics.mean_and_cov(pool), mu_s, sigma_s, np.concatenate(chosen_features), saturated / first)


def evenly_spaced(count: int, wanted: int) -> Bool[np.ndarray, " count"]:
    """A mask that chooses `wanted` of `count` rows, or all if there are fewer.

    The chosen rows are evenly spaced. If the rows are sorted by class, classes of equal size get equal numbers.
    """
    chosen = np.zeros(count, bool)
    chosen[np.arange(min(wanted, count)) * count // max(min(wanted, count), 1)] = True
    return chosen


def image_blocks(dataset: Dataset, num_workers: int) -> Iterator[UInt8[np.ndarray, "n h w c"]]:
    """The images of a whole data set, in order, in blocks; see `with_progress`."""
    rows = block_rows((dataset.image_size, dataset.image_size, dataset.channels))
    blocks = (
        decode_together(dataset, np.arange(first, min(first + rows, len(dataset))), num_workers)
        for first in range(0, len(dataset), rows)
    )
    return with_progress(blocks, len(dataset))


def decode_together(
    dataset: Dataset, indices: Int[np.ndarray, " _n"], num_workers: int
) -> UInt8[np.ndarray, "n h w c"]:
    """The good images at `indices`, in order, on every process. Each process decodes an equal share of them.

    If a process cannot decode its share, all processes raise an error.
    """
    share = -(-len(indices) // jax.process_count())
    own, images, error = indices[jax.process_index() * share :][:share], None, None
    try:
        images = load_arrays(dataset, own, num_workers=num_workers)[0]
    except Exception as caught:
        error = caught
    counts = parallel.gather_rows(np.array([-1 if images is None else len(images)], np.int32))
    if images is None or (counts < 0).any():
        process = int(counts.argmin())
        raise error or UserError(f"process {process} cannot decode its share of the reference set, and says why")
    # Flat rows: a TPU would pad the last two axes of images to tiles of 8 x 128.
    padded = np.zeros((share, int(np.prod(images.shape[1:]))), np.uint8)
    padded[: len(images)] = images.reshape(len(images), padded.shape[1])
    shares = parallel.gather_rows(padded).reshape(-1, share, *images.shape[1:])
    return np.concatenate([some[:count] for some, count in zip(shares, counts, strict=True)])


def with_progress(blocks: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The same blocks of images, with a progress bar over `count` images.

    After each block, tells the watchdog that the process is alive, and raises `preemption.Stopped` on request.
    """
    with tqdm(total=count, desc="reference statistics", unit="image", unit_scale=True, disable=None) as bar:
        for block in blocks:
            yield block
            bar.update(len(block))
            if preemption.requested():
                raise preemption.Stopped("Stopped in the sweep, while computing the reference statistics")


def block_rows(image_shape: tuple[int, int, int]) -> int:
    """The number of images per block: at most 1000, and at most BLOCK_BYTES in all."""
    return max(1, min(1000, BLOCK_BYTES // int(np.prod(image_shape))))
