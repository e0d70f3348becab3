"""Labelled images from three sources, opened as a `Dataset` that decodes an image when it is asked for."""

import dataclasses
import functools
import importlib.util
import math
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from PIL import Image
from tqdm import tqdm

from cfd.data.decode import BadImage, decode
from cfd.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_BYTES = 2**26
"""Largest image file that is read, in bytes."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A random-access source of labelled images, which are decoded, cropped and resized on access.

    `dataset[i]` is (uint8 [image_size, image_size, channels], label). It raises BadImage if image i cannot be used.
    `labels`, int32 [N], decodes no image. For a tfds data set, its first access reads every record once.
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
    """The data set that the `data` group of a config describes.

    `source` is one of:

    - digits: the 8x8 digits that scikit-learn contains. Every sixth image belongs to the split "test", the others to
      "train".
    - folder: the files path/<split>/<class>/*.jpg|jpeg|png|webp. For the split "train", they may also be
      path/<class>/*.jpg|jpeg|png|webp.
    - tfds: the data set `name`, which TensorFlow Datasets has prepared as ArrayRecord files below the folder `path`.
      `split` is any split of tfds.

    `num_classes` is the number of classes that the data set must have; 0 accepts any number. With `in_memory`, each
    image is decoded on first access and then kept, which takes num_examples · image_size² · channels bytes in every
    process.

    Raises ValueError if anything is missing or disagrees with the arguments, or if `in_memory` needs more memory than
    the machine has. Image files are not opened before they are read.
    """
    for field, value, allowed in (
        ("channels", channels, (1, 3)),
        ("on_bad_image", on_bad_image, ("raise", "skip")),
        ("source", source, ("digits", "folder", "tfds")),
    ):
        if value not in allowed:
            raise UserError(f"data.{field} is {value!r}; it must be one of {allowed}")
    if image_size < 1:
        raise UserError(f"data.image_size is {image_size}; it must be at least 1")
    if source == "digits":
        read, read_labels, num_examples, class_names = _digits(split, image_size, channels)
        described = "the digits data set"
    elif source == "folder":
        read, read_labels, num_examples, class_names = _folder(path, split, image_size, channels)
        described = f"the folder data.path = {path!r}"
    else:
        read, read_labels, num_examples, class_names = _tfds(name, split, path, image_size, channels)
        described = f"the tfds data set {name!r}"
    if num_classes not in (0, len(class_names)):
        first_names = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
        raise UserError(
            f"data.num_classes is {num_classes}, but {described} has {len(class_names)} ({first_names}): "
            f"set data.num_classes = {len(class_names)}, or leave it out"
        )
    if in_memory:
        read = _in_memory(read, (num_examples, image_size, image_size, channels))
    return Dataset(read, read_labels, num_examples, image_size, channels, class_names, on_bad_image)


def check_classes(there: Sequence[str], whose: str, here: Sequence[str], split: str) -> None:
    """Raises ValueError unless two lists of class names are equal, in the same order.

    there: the expected class names, and `whose`: the words for where they are from.
    here: the class names that were found, and `split`: the words for where they are from.
    """
    remedy = "give the data.path and the splits that have the run's own classes"
    if len(there) != len(here):
        raise UserError(f"{whose} has {len(there)} classes, and {split} has {len(here)}: {remedy}")
    for number, (expected, found) in enumerate(zip(there, here, strict=True)):
        if expected != found:
            raise UserError(
                f"class {number} is {expected!r} in {whose} and {found!r} in {split}: {remedy}, or rename the folders"
            )


_Source = tuple[Callable[[int], tuple[np.ndarray, int]], Callable[[], np.ndarray], int, tuple[str, ...]]
"""`read`, `read_labels`, `num_examples` and `class_names` of a Dataset."""


def _digits(split: str, image_size: int, channels: int) -> _Source:
    """scikit-learn's digits. Raises ValueError if they have no such split, or cannot have this size."""
    if split not in ("train", "test"):
        raise UserError(
            f"data.split or eval.test_split is {split!r}; the digits have the splits 'train' and 'test': "
            "give one of the two"
        )
    if image_size > 8 and image_size % 8:
        raise UserError(f"data.image_size is {image_size}; the digits are 8x8: give 8, a multiple of 8, or less than 8")
    # `sklearn.datasets.load_digits` reads the same file, but importing it takes ten times as long as reading the file.
    sklearn = importlib.util.find_spec("sklearn")
    assert sklearn is not None and sklearn.origin is not None
    table = np.loadtxt(Path(sklearn.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    pixels, target = table[:, :-1], table[:, -1]
    chosen = (np.arange(len(target)) % 6 == 5) == (split == "test")
    levels = np.round(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = target[chosen].astype(np.int32)
    size = (image_size, image_size)
    resized = np.stack([np.asarray(Image.fromarray(level).resize(size, Image.Resampling.BOX)) for level in levels])
    images = np.repeat(resized[..., None], channels, axis=-1)
    return lambda i: (images[i], int(labels[i])), lambda: labels, len(labels), tuple(str(c) for c in range(10))


def _folder(path: str, split: str, image_size: int, channels: int) -> _Source:
    """The image files below a folder; each of its folders is a class. Raises ValueError if there is nothing to read."""
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(
            f"data.path is {path!r}, which is not a folder: give the folder that contains one folder per class"
        )
    if (root / split).is_dir():
        root = root / split
    elif split != "train":
        raise UserError(
            f"data.split or eval.test_split is {split!r}, but there is no folder {root / split}: create it, with one "
            "folder per class, or use the split 'train', which is data.path itself if that is not divided into splits"
        )
    root = root.resolve()
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(f"{root} contains no folder: put the images of each class into a folder named after the class")
    files: list[str] = []
    counts: list[int] = []
    for folder in folders:
        if not folder.resolve().is_relative_to(root):
            raise UserError(f"{folder} is a link that leads out of {root}: move the class there, or remove the link")
        found = sorted(f.name for f in os.scandir(folder) if f.name.lower().endswith(SUFFIXES))
        if not found:
            raise UserError(f"the class folder {folder} contains no {'/'.join(SUFFIXES)} file: fill it or remove it")
        files += [f"{folder.name}/{f}" for f in found]
        counts.append(len(found))
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), counts)

    def read(i: int) -> tuple[np.ndarray, int]:
        file = f"{root}/{files[i]}"
        return decode(_read_file(file, root), file, image_size, channels), int(labels[i])

    return read, lambda: labels, len(files), tuple(f.name for f in folders)


def _read_file(file: str, root: Path) -> bytes:
    """The content of a file below `root`.

    Raises BadImage if it is missing, leads out of `root`, is not a regular file or is larger than MAX_BYTES. Raises
    ValueError if the operating system cannot read it.
    """
    try:
        status = os.lstat(file)
        if stat.S_ISLNK(status.st_mode):
            if not Path(file).resolve().is_relative_to(root):
                raise BadImage(f"{file} is a link that leads out of {root}: replace it by the file, or remove it")
            status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"{file} is not a regular file: remove it")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"{file} has {status.st_size} bytes, and the limit is {MAX_BYTES}: shrink or remove it")
        with open(file, "rb", buffering=0) as f:
            return f.read(status.st_size)
    except FileNotFoundError:
        raise BadImage(f"{file} no longer exists or is a broken link: remove the link, or start again") from None
    except OSError as error:
        # This is not a BadImage, because on_bad_image = "skip" must not skip it: whether a disk fails or a permission
        # is missing depends on the moment, and the batches must not.
        raise UserError(f"{file} cannot be read ({error.strerror}): repair the file or its permissions") from error


def _tfds(name: str, split: str, path: str, image_size: int, channels: int) -> _Source:
    """A split of a prepared tfds data set. Raises ValueError if it is not prepared, or lacks an image or a class."""
    # Only this source needs tfds. Neither import loads TensorFlow.
    import tensorflow_datasets as tfds
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
            raise UserError(
                f"data.split or eval.test_split is {split!r} for the tfds data set {name!r}: {reason}"
            ) from error
        raise UserError(
            f"the tfds data set {name!r} is not prepared as ArrayRecord in {data_dir or '~/tensorflow_datasets'} "
            f'({reason}). Prepare it once: pip install "cfd[prepare]" && '
            f'python -c "import tensorflow_datasets as tfds; {builder}.download_and_prepare()"'
        ) from error
    features = records.dataset_info.features
    if "image" not in features or "label" not in features or not hasattr(features["label"], "names"):
        raise UserError(
            f"the tfds data set {name!r} has the features {sorted(features)}: "
            "choose a data set with an 'image' and a 'label' that is a class"
        )
    if len(records) == 0:
        raise UserError(f"split {split!r} of the tfds data set {name!r} is empty: choose another split")

    example_type: Any = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue] (made at import)

    # The parser of tfds takes as long as decoding a small JPEG. This one reads only the two features that are needed.
    def parse(i: int, record: bytes) -> tuple[bytes, int]:
        feature = example_type.FromString(record).features.feature
        label = feature["label"].int64_list.value[0]
        if label < 0:
            raise UserError(f"{name} {split} record {i} has no label (it is {label}): choose a split with labels")
        return feature["image"].bytes_list.value[0], label

    def read(i: int) -> tuple[np.ndarray, int]:
        image, label = parse(i, records[i])
        return decode(image, f"{name} {split} record {i}", image_size, channels), label

    def read_labels() -> np.ndarray:
        labels = np.empty(len(records), np.int32)
        with tqdm(total=len(records), desc="read labels", unit="record", unit_scale=True, disable=None) as bar:
            for first in range(0, len(records), 1024):
                block = range(first, min(first + 1024, len(records)))
                labels[block.start : block.stop] = [
                    parse(i, record)[1] for i, record in zip(block, records.__getitems__(block), strict=True)
                ]
                bar.update(len(block))
        return labels

    return read, read_labels, len(records), tuple(features["label"].names)


def _in_memory(
    read: Callable[[int], tuple[np.ndarray, int]], shape: tuple[int, int, int, int]
) -> Callable[[int], tuple[np.ndarray, int]]:
    """A `read` that keeps every image that it has read, for `shape` = (num_examples, height, width, channels).

    It calls the original `read` once per image, and again on each access for an image that raises. Two threads may read
    the same image at the same time. Raises ValueError if the images need more memory than the machine has.
    """
    needed, available = math.prod(shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:  # the allocation would succeed, and the system would kill the process an epoch later
        raise UserError(
            f"data.in_memory is True, but {shape[0]} images of {shape[1]}x{shape[2]}x{shape[3]} take {needed:,} bytes, "
            f"and the machine has {available:,}: set data.in_memory = False"
        )
    images, labels, present = np.empty(shape, np.uint8), np.empty(shape[0], np.int32), np.zeros(shape[0], bool)
    read_only = images.view()
    read_only.flags.writeable = False

    def read_once(i: int) -> tuple[np.ndarray, int]:
        if not present[i]:
            images[i], labels[i] = read(i)
            present[i] = True  # set after the pixels, because other threads return the pixels once this is True
        return read_only[i], int(labels[i])

    return read_once
