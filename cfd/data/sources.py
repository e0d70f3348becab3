"""Labelled images from three sources, opened as a `Dataset`, and the comparison of the classes of two data sets."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cfd.data.dataset import Dataset, Source
from cfd.data.decode import BACKGROUNDS, MAX_PIXELS, PILLOW_MAX_PIXELS, decode
from cfd.data.digits import open_digits
from cfd.data.folder import open_folder
from cfd.errors import UserError

READ_BY: dict[str, tuple[tuple[str, ...], Any]] = {
    "name": (("tfds",), ""),
    "path": (("folder", "tfds"), ""),
    "labels": (("folder",), ""),
    "empty_classes": (("folder",), False),
    "transparency": (("folder", "tfds"), "refuse"),
    "max_pixels": (("folder", "tfds"), MAX_PIXELS),
}
"""The sources that read each field that not all of them read, and its default."""


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
    labels: str = "",
    empty_classes: bool = False,
    exif_orientation: bool = True,
    transparency: str = "refuse",
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """The data set that the `data` group of a config describes.

    `source` is one of:

    - digits: the 8x8 digits that the package contains. Every sixth image belongs to the split "test", the others to
      "train".
    - folder: the images path/<split>/<class>/**/*.jpg|jpeg|jpe|jfif|png|webp. For the split "train", they may also be
      path/<class>/**/*. `path` may be a .zip file of this layout. `labels` names a CSV file with the columns file,label
      instead of class folders, or a dataset.json of EDM: see `cfd.data.labels`. `empty_classes` accepts class folders
      without images.
    - tfds: the data set `name`, which TensorFlow Datasets has prepared as ArrayRecord files below the folder `path`.
      `split` is any split of tfds.

    `path` and `labels` may be URLs, gs://BUCKET/NAME.

    `num_classes` is the number of classes that the data set must have; 0 accepts any number. With `in_memory`, each
    image is decoded on first access and then kept, which takes num_examples · image_size² · channels bytes in every
    process. `exif_orientation`, `transparency` and `max_pixels` are those of `cfd.data.decode.decode`.

    Raises ValueError if anything is missing or disagrees with the arguments, if a field is set that `source` does not
    read, or if `in_memory` needs more memory than the machine has. Image files are not opened before they are read.
    """
    for field, value, allowed in (
        ("channels", channels, (1, 3)),
        ("on_bad_image", on_bad_image, ("raise", "skip")),
        ("source", source, ("digits", "folder", "tfds")),
        ("transparency", transparency, ("refuse", *BACKGROUNDS)),
    ):
        if value not in allowed:
            raise UserError(f"data.{field} is {value!r}; it must be one of {allowed}")
    if image_size < 1:
        raise UserError(f"data.image_size is {image_size}; it must be at least 1")
    if not 1 <= max_pixels <= PILLOW_MAX_PIXELS:
        raise UserError(f"data.max_pixels is {max_pixels}; it must be from 1 to {PILLOW_MAX_PIXELS}, Pillow's limit")
    given = dict(
        name=name,
        path=path,
        labels=labels,
        empty_classes=empty_classes,
        transparency=transparency,
        max_pixels=max_pixels,
    )
    _check_read(source, given)

    pixels = functools.partial(
        decode,
        image_size=image_size,
        channels=channels,
        exif_orientation=exif_orientation,
        transparency=transparency,
        max_pixels=max_pixels,
    )
    if source == "digits":
        opened = open_digits(split, image_size, channels)
    elif source == "folder":
        opened = open_folder(path, split, labels, empty_classes, pixels)
    else:
        from cfd.data.tfds import open_tfds  # tfds takes seconds to import, and only this source needs it

        opened = open_tfds(name, split, path, pixels)
    count = len(opened.class_names)
    if num_classes not in (0, count):
        raise UserError(
            f"data.num_classes is {num_classes}, but {opened.described} has {count} "
            f"({_abbreviated(opened.class_names)}): set data.num_classes = {count}, or leave it out, like "
            "model.num_classes and classifier.num_classes"
        )
    read = opened.read
    if in_memory:
        read = _in_memory(read, (opened.num_examples, image_size, image_size, channels))
    return Dataset(
        read=read,
        read_label=opened.read_label,
        read_labels=opened.read_labels,
        num_examples=opened.num_examples,
        image_size=image_size,
        channels=channels,
        class_names=opened.class_names,
        on_bad_image=on_bad_image,
        identity=opened.identity,
        notes=(_summary(opened), *opened.notes),
        remote=opened.remote,
    )


def _check_read(source: str, given: dict[str, Any]) -> None:
    """Raises ValueError if a field is set that `source` does not read."""
    for field, value in given.items():
        readers, default = READ_BY[field]
        if source not in readers and value != default:
            others = " or ".join(map(repr, readers))
            raise UserError(
                f"data.{field} is {value!r}, but data.source {source!r} does not read it: set data.source to {others}, "
                f"or data.{field} to {default!r}"
            )


def _summary(opened: Source) -> str:
    """One line that says how many images there are, and how the classes are numbered."""
    names = opened.class_names
    shown = range(len(names)) if len(names) <= 4 else (0, 1, 2, len(names) - 1)
    listed = [f"{i} = {names[i]}" for i in shown]
    if len(shown) < len(names):
        listed.insert(3, "...")
    words = f"{opened.num_examples:,} images in {len(names):,} classes, {opened.numbered}: {', '.join(listed)}."
    return f"{opened.described[0].upper()}{opened.described[1:]}: {words}"


def _abbreviated(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def check_classes(there: Sequence[str], whose: str, here: Sequence[str], split: str) -> None:
    """Raises ValueError unless two lists of class names are equal, in the same order.

    there: the expected class names, and `whose`: the words for where they are from.
    here: the class names that were found, and `split`: the words for where they are from.
    """
    lacking = [name for name in there if name not in set(here)]
    more = [name for name in here if name not in set(there)]
    if lacking and not more:
        raise UserError(
            f"{split} lacks {_classes(lacking)}, which {whose} has: add its images, or, if there are none, an empty "
            "folder of its name and data.empty_classes = True, or in a CSV file of labels a row with its label and no "
            "file; or give data of the same classes"
        )
    if more and not lacking:
        raise UserError(
            f"{split} has {_classes(more)}, which {whose} lacks: remove it from {split}, or give data of the same "
            "classes"
        )
    for number, (expected, found) in enumerate(zip(there, here, strict=False)):
        if expected != found:
            raise UserError(
                f"class {number} is {expected!r} in {whose} and {found!r} in {split}: give data of the same classes, "
                "or rename the folders"
            )


def _classes(names: Sequence[str]) -> str:
    """ "the class 'a'" or "the classes 'a', 'b', ..."."""
    return f"the class{'es' if len(names) > 1 else ''} {_abbreviated([repr(name) for name in names])}"


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
