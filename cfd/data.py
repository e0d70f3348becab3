"""Images and labels: three sources, decoded and resized on the host, in batches that depend on (seed, step) alone.

The position of a run in its data is the step number, nothing else. Position p = step · batch_size + row of the endless
sequence of examples holds, in epoch p // N, the (p mod N)-th entry of that epoch's own shuffle, so every example comes
once an epoch and a batch may straddle two. A process reads its contiguous block of rows of every global batch.

Work is done by threads, never by processes: the decoders release the interpreter lock, threads cannot be left behind
or killed singly, and how many there are changes nothing in the output.
"""

import dataclasses
import functools
import importlib.util
import io
import math
import os
import stat
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import logging
from grain.experimental import index_shuffle
from jaxtyping import Int32, UInt8
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 2**26
MAX_PIXELS = 2**25
"""A decoded image takes 4 bytes a pixel: at most 128 MiB for each thread, whatever a file declares."""
MAX_SKIPPED_IN_A_ROW = 1000
"""More bad images than this next to each other are a broken disk or a wrong folder, not a few bad files."""


class BadImage(ValueError):
    """One image that cannot be used; the message names it. What on_bad_image = "skip" passes over."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A random-access source of images, decoded, cropped and resized as they are asked for.

    `dataset[i]` is (uint8 [image_size, image_size, channels], label); it raises BadImage if image i cannot be used.
    `labels`, int32 [N], decodes no image; with tfds the first access reads every record once.
    """

    read: Callable[[int], tuple[np.ndarray, int]]
    read_labels: Callable[[], np.ndarray]
    num_examples: int
    image_size: int
    channels: int
    class_names: tuple[str, ...]
    on_bad_image: str

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.read(index)

    @functools.cached_property
    def labels(self) -> Int32[np.ndarray, "n"]:
        return self.read_labels()


def open_dataset(
    *,
    source: str,
    name: str,
    split: str,
    path: str,
    image_size: int,
    channels: int,
    num_classes: int,
    on_bad_image: str,
    in_memory: bool,
) -> Dataset:
    """The data set that a config's `data` group names.

    digits: scikit-learn's embedded 8x8 digits; every sixth image is the test split.
    folder: path/<split>/<class>/*.jpg|jpeg|png|webp, or path/<class>/*.jpg... for the split "train".
    tfds: a data set that TensorFlow Datasets has prepared as ArrayRecord below the folder `path`; any tfds split.

    With in_memory each image is decoded when it is first asked for and then kept: num_examples · image_size² · channels
    bytes, in every process.

    Raises ValueError for whatever is missing or disagrees with the arguments, and if the images would not fit in the
    machine's memory; images themselves are opened when read.
    """
    for field, value, allowed in (
        ("channels", channels, (1, 3)),
        ("on_bad_image", on_bad_image, ("raise", "skip")),
        ("source", source, ("digits", "folder", "tfds")),
    ):
        if value not in allowed:
            raise ValueError(f"data.{field} is {value!r}; it must be one of {allowed}")
    if image_size < 1:
        raise ValueError(f"data.image_size is {image_size}; it must be at least 1")
    if source == "digits":
        read, read_labels, num_examples, class_names = _digits(split, image_size, channels)
        where = "scikit-learn's digits"
    elif source == "folder":
        read, read_labels, num_examples, class_names = _folder(path, split, image_size, channels)
        where = f"data.path = {path!r}"
    else:
        read, read_labels, num_examples, class_names = _tfds(name, split, path, image_size, channels)
        where = f"tfds data set {name!r}"
    if len(class_names) != num_classes:
        shown = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
        raise ValueError(
            f"data.num_classes is {num_classes}, but {where} has {len(class_names)} ({shown}): "
            f"set data.num_classes = {len(class_names)}, or correct the data"
        )
    if in_memory:
        read = _kept(read, (num_examples, image_size, image_size, channels))
    return Dataset(read, read_labels, num_examples, image_size, channels, class_names, on_bad_image)


def from_config(group: Any, split: str) -> Dataset:
    """`open_dataset` with the fields of a config's `data` group, but for the split."""
    loading = ("flip", "num_workers")
    fields: dict[str, Any] = {key: value for key, value in group.items() if key not in loading} | {"split": split}
    return open_dataset(**fields)


def check_classes(there: Sequence[str], whose: str, here: Sequence[str], split: str) -> None:
    """Raises ValueError unless the classes are the same, in the same order."""
    for number, (expected, found) in enumerate(zip(there, here, strict=True)):
        if expected != found:
            raise ValueError(
                f"class {number} is {expected!r} in {whose} and {found!r} in {split}: give the data.path and the "
                "splits of the run's own classes, or rename the folders"
            )


_Source = tuple[Callable[[int], tuple[np.ndarray, int]], Callable[[], np.ndarray], int, tuple[str, ...]]


def _digits(split: str, image_size: int, channels: int) -> _Source:
    if split not in ("train", "test"):
        raise ValueError(f"data.split or eval.test_split is {split!r}; the digits have the splits 'train' and 'test'")
    if image_size > 8 and image_size % 8:
        raise ValueError(
            f"data.image_size is {image_size}; the digits are 8x8: give 8, a multiple of 8, or less than 8"
        )
    # The file of `sklearn.datasets.load_digits`, whose import takes ten times as long as reading it.
    found = importlib.util.find_spec("sklearn")
    assert found is not None and found.origin is not None
    table = np.loadtxt(Path(found.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    pixels, target = table[:, :-1], table[:, -1]
    chosen = (np.arange(len(target)) % 6 == 5) == (split == "test")
    levels = np.round(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = target[chosen].astype(np.int32)
    box = (image_size, image_size)
    small = np.stack([np.asarray(Image.fromarray(level).resize(box, Image.Resampling.BOX)) for level in levels])
    images = np.repeat(small[..., None], channels, axis=-1)
    return lambda i: (images[i], int(labels[i])), lambda: labels, len(labels), tuple(str(c) for c in range(10))


def _folder(path: str, split: str, image_size: int, channels: int) -> _Source:
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise ValueError(f"data.path is {path!r}, which is not a folder: give the folder that holds a folder a class")
    if (root / split).is_dir():
        root = root / split
    elif split != "train":
        raise ValueError(
            f"data.split or eval.test_split is {split!r}, but there is no folder {root / split}: make it, with a "
            "folder a class, or use the split 'train', which is the folder itself where it is not divided"
        )
    root = root.resolve()
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise ValueError(f"{root} holds no folder: put the images of each class in a folder of the class's name")
    files: list[str] = []
    counts: list[int] = []
    for folder in folders:
        if not folder.resolve().is_relative_to(root):
            raise ValueError(f"{folder} is a link that leads out of {root}: move the class there, or remove the link")
        found = sorted(f.name for f in os.scandir(folder) if f.name.lower().endswith(SUFFIXES))
        if not found:
            raise ValueError(f"the class folder {folder} holds no {'/'.join(SUFFIXES)} file: fill it or remove it")
        files += [f"{folder.name}/{f}" for f in found]
        counts.append(len(found))
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)

    def read(i: int) -> tuple[np.ndarray, int]:
        file = f"{root}/{files[i]}"
        return decode(_read_file(file, root), file, image_size, channels), int(labels[i])

    return read, lambda: labels, len(files), tuple(f.name for f in folders)


def _read_file(file: str, root: Path) -> bytes:
    try:
        status = os.lstat(file)
        if stat.S_ISLNK(status.st_mode):
            if not Path(file).resolve().is_relative_to(root):
                raise BadImage(f"{file} is a link that leads out of {root}: replace it by the file, or remove it")
            status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"{file} is not a regular file: remove it")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"{file} has {status.st_size} bytes, the limit is {MAX_BYTES}: shrink or remove it")
        with open(file, "rb", buffering=0) as f:
            return f.read(status.st_size)
    except FileNotFoundError:
        raise BadImage(f"{file} is gone, or a link to nothing: remove the link, or start again") from None
    except OSError as error:
        # Not a BadImage: to pass over what a failing disk or a permission hides would depend on the moment.
        raise ValueError(f"{file} cannot be read ({error.strerror}): mend the file or its permissions") from error


def _tfds(name: str, split: str, path: str, image_size: int, channels: int) -> _Source:
    import tensorflow_datasets as tfds  # only this source needs it; it does not import TensorFlow here
    from tensorflow_datasets.proto import tf_example_pb2

    data_dir = str(Path(path).expanduser()) if path else None
    builder = f"tfds.builder({name!r}, data_dir={data_dir!r}, file_format='array_record')"
    try:
        records: Any = tfds.data_source(
            name,
            split=split,
            data_dir=data_dir,
            download=False,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        )
        if records.dataset_info.file_format.value != "array_record":
            raise NotImplementedError(f"it is prepared as {records.dataset_info.file_format.value}")
    except (ValueError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        if "split" in reason.lower():
            raise ValueError(
                f"data.split or eval.test_split is {split!r} for the tfds data set {name!r}: {reason}"
            ) from error
        raise ValueError(
            f"the tfds data set {name!r} is not prepared as ArrayRecord in {data_dir or '~/tensorflow_datasets'} "
            f'({reason}). Prepare it once: pip install "cfd[prepare]" && '
            f'python -c "import tensorflow_datasets as tfds; {builder}.download_and_prepare()"'
        ) from error
    features = records.dataset_info.features
    if "image" not in features or "label" not in features or not hasattr(features["label"], "names"):
        raise ValueError(
            f"the tfds data set {name!r} has {sorted(features)}: choose one with an image and a class as its label"
        )
    if len(records) == 0:
        raise ValueError(f"split {split!r} of the tfds data set {name!r} is empty: choose another split")

    example_type: Any = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue] (made at import)

    # tfds's own parser takes as long as decoding a small JPEG; image and label are all that is needed.
    def parse(i: int, record: bytes) -> tuple[bytes, int]:
        feature = example_type.FromString(record).features.feature
        label = feature["label"].int64_list.value[0]
        if label < 0:
            raise ValueError(f"{name} {split} record {i} has no label (it is {label}): choose a split with labels")
        return feature["image"].bytes_list.value[0], label

    def read(i: int) -> tuple[np.ndarray, int]:
        image, label = parse(i, records[i])
        return decode(image, f"{name} {split} record {i}", image_size, channels), label

    def read_labels() -> np.ndarray:
        labels = np.empty(len(records), np.int32)
        for first in range(0, len(records), 1024):
            block = range(first, min(first + 1024, len(records)))
            labels[block.start : block.stop] = [
                parse(i, record)[1] for i, record in zip(block, records.__getitems__(block), strict=True)
            ]
        return labels

    return read, read_labels, len(records), tuple(features["label"].names)


def _kept(
    read: Callable[[int], tuple[np.ndarray, int]], shape: tuple[int, int, int, int]
) -> Callable[[int], tuple[np.ndarray, int]]:
    """`read`, called once an image, or as often as it raises. Two threads may read the same image at once."""
    needed, there = math.prod(shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:  # the allocation would succeed, and the process be killed an epoch later
        raise ValueError(
            f"data.in_memory is True, and {shape[0]} images of {shape[1]}x{shape[2]}x{shape[3]} take {needed:,} bytes, "
            f"where the machine has {there:,}: set data.in_memory = False"
        )
    images, labels, present = np.empty(shape, np.uint8), np.empty(shape[0], np.int32), np.zeros(shape[0], bool)
    shown = images.view()
    shown.flags.writeable = False

    def read_once(i: int) -> tuple[np.ndarray, int]:
        if not present[i]:
            images[i], labels[i] = read(i)
            present[i] = True  # after the pixels, for the other threads
        return shown[i], int(labels[i])

    return read_once


def decode(encoded: bytes, name: str, image_size: int, channels: int) -> UInt8[np.ndarray, "s s c"]:
    """A JPEG, PNG or WebP image as uint8 [image_size, image_size, channels]: centre square, box downsampling.

    The largest centred square (cut at whole pixels) is shrunk by Pillow's box filter, as ImageNet 64x64 was made
    (Chrabaszcz et al., arXiv:1707.08819). Grey, palette and CMYK images become RGB, 16 bits become 8, an alpha channel
    is dropped if it is opaque; the EXIF orientation is not applied. Raises BadImage, which begins with `name`, if the
    image cannot be decoded, is too large or smaller than image_size, has transparent pixels, or has colour where
    channels is 1.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_size(*image.size, name, image_size)
        image.load()
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # whatever a decoder raises here, it says that the bytes are bad
        raise BadImage(f"{name} cannot be decoded as {', '.join(FORMATS)} ({error}): remove or replace it") from error
    image = _to_mode(image, name, channels)
    if image.size != (image_size, image_size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((image_size, image_size), Image.Resampling.BOX, box=box)
    pixels = np.asarray(image)
    return pixels if channels == 3 else pixels[:, :, None]


def _check_size(width: int, height: int, name: str, image_size: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{name} has {width}x{height} pixels, the limit is {MAX_PIXELS} in all: shrink or remove it")
    if min(width, height) < image_size:
        raise BadImage(
            f"{name} has {width}x{height} pixels, fewer than data.image_size = {image_size}: "
            "lower data.image_size, or remove it (images are never enlarged)"
        )


def _to_mode(image: Image.Image, name: str, channels: int) -> Image.Image:
    if image.mode == ("RGB" if channels == 3 else "L") and "transparency" not in image.info:
        return image
    deep = image.mode.startswith("I")
    if image.has_transparency_data and (deep or np.asarray(image.convert("RGBA"))[:, :, 3].min() < 255):
        raise BadImage(f"{name} has transparent pixels: put it on a background, or remove it")
    if deep:  # Pillow's own conversion clips 16-bit grey at 255 instead of scaling it
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA", "La")
    if channels == 1 and not grey:
        raise BadImage(
            f"{name} is a colour image (mode {image.mode}), but data.channels is 1: "
            "set data.channels = 3, or convert the images to grey"
        )
    return image.convert("L" if grey else "RGB").convert("RGB" if channels == 3 else "L")


def epoch_order(seed: int, positions: range, num_examples: int) -> list[int]:
    """The example at each position of the endless sequence: each one once an epoch, in an order of the epoch's own."""
    order, epoch, shuffle_seed = [], -1, 0
    for position in positions:
        if position // num_examples != epoch:
            epoch = position // num_examples
            shuffle_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        order.append(index_shuffle(position % num_examples, num_examples - 1, shuffle_seed, rounds=4))
    return order


class Batches:
    """An iterator of {"image": float32 [b, h, w, c] in [-1, 1], "label": int32 [b]}, decoding ahead in threads.

    skipped: how many rows of the batches given out so far hold the next good image in place of a bad one.
    After an error, which `next` raises, and after `close`, which is idempotent, no thread is left.
    """

    def __init__(self, iterator: grain.DatasetIterator):
        self.skipped = 0
        self._iterator = iterator

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._iterator)
        except BaseException:
            self.close()
            raise
        self.skipped += batch["skipped"]
        return {"image": batch["image"], "label": batch["label"]}

    def close(self) -> None:
        self._iterator.close()


def batches(
    dataset: Dataset,
    *,
    seed: int,
    batch_size: int,
    flip: bool,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
) -> Batches:
    """This process's rows of the global batches start_step, start_step + 1, ...: b = batch_size // process_count.

    The global batch of step s is a function of (seed, s): the same for every process_count and num_workers. Flips too.
    num_workers threads decode a batch each, and `prefetch` more batches wait; 0 decodes in the calling thread.
    With on_bad_image = "skip" the place of a bad image is taken by the next good one in the data set's own order.
    Raises ValueError if processes do not divide batch_size; `next` does for a bad image or, skipping, for too many.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"train.batch_size is {batch_size} with {process_count} processes: give a multiple of {process_count}"
        )
    rows = batch_size // process_count

    class Steps:
        """grain's random-access source, whose element s is this process's part of the batch of step s."""

        def __len__(self) -> int:
            return sys.maxsize // batch_size

        def __getitem__(self, index: int) -> dict[str, Any]:
            first = index * batch_size + process_index * rows
            image = np.empty((rows, dataset.image_size, dataset.image_size, dataset.channels), np.uint8)
            label = np.empty(rows, np.int32)
            skipped = 0
            for row, example in enumerate(epoch_order(seed, range(first, first + rows), len(dataset))):
                image[row], label[row], bad = _read_good(dataset, example)
                skipped += bad > 0
            if flip:
                flips = _flips(seed, first, rows)
                image[flips] = image[flips, :, ::-1]
            scaled = image.astype(np.float32)
            scaled /= 127.5
            scaled -= 1.0
            return {"image": scaled, "label": label, "skipped": skipped}

    options = grain.ReadOptions(num_threads=num_workers, prefetch_buffer_size=num_workers + prefetch)
    iterator = iter(grain.MapDataset.source(Steps()).to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return Batches(iterator)


def _flips(seed: int, first: int, rows: int) -> np.ndarray:
    # One Philox block of four words a position, so that a position's bit is the same whichever batch holds it.
    words = np.random.Philox(key=seed, counter=first).random_raw(4 * rows)
    return words[::4] >= 2**63


def _read_good(dataset: Dataset, index: int) -> tuple[np.ndarray, int, int]:
    """The image and label at index, or of the next good one where on_bad_image is "skip"; how many were passed over."""
    tries = min(len(dataset), MAX_SKIPPED_IN_A_ROW)
    for bad in range(tries):
        try:
            return *dataset[(index + bad) % len(dataset)], bad
        except BadImage as error:
            _raise_or_log(dataset, error)
            last = error
    raise ValueError(f"{tries} images in a row cannot be used: check the data; the last one: {last}")


def load_arrays(
    dataset: Dataset, indices: np.ndarray | None = None, *, num_workers: int = 0
) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, "n"]]:
    """The images (uint8) and labels at `indices`, in that order; of the whole data set if None. For evaluation.

    With on_bad_image = "skip" bad images are left out, not replaced: n counts the good ones. To stream a large set,
    call it for one block of indices after the other.
    """
    wanted = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    image = np.empty((len(wanted), dataset.image_size, dataset.image_size, dataset.channels), np.uint8)
    label = np.empty(len(wanted), np.int32)
    good = np.ones(len(wanted), bool)

    def fill(rows: range) -> None:
        for row in rows:
            try:
                image[row], label[row] = dataset[int(wanted[row])]
            except BadImage as error:
                _raise_or_log(dataset, error)
                good[row] = False

    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        for _ in pool.map(fill, [range(i, min(i + 256, len(wanted))) for i in range(0, len(wanted), 256)]):
            pass
    return (image, label) if good.all() else (image[good], label[good])


def _raise_or_log(dataset: Dataset, error: BadImage) -> None:
    if dataset.on_bad_image == "raise":
        raise BadImage(f'{error}; or set data.on_bad_image = "skip"') from error
    logging.warning("skipped: %s", error)
