"""A data set: labelled images that are decoded when they are asked for, and the classes that they have."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

REMOTE_READS = 32
"""Images that are read at a time if each is read over a network, which takes tens of milliseconds."""


class Source(NamedTuple):
    """Labelled images as one kind of source gives them, before the checks of `open_dataset`.

    `described` is the split and the place in words, for messages. `numbered` says how the classes are numbered.
    The other fields are those of `Dataset`.
    """

    read: Callable[[int], tuple[np.ndarray, int]]
    read_label: Callable[[int], int]
    read_labels: Callable[[], np.ndarray]
    num_examples: int
    class_names: tuple[str, ...]
    identity: str
    described: str
    numbered: str
    notes: tuple[str, ...] = ()
    remote: bool = False


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A random-access source of labelled images, which are decoded, cropped and resized on access.

    `dataset[i]` is (uint8 [image_size, image_size, channels], label). It raises BadImage if image i cannot be used.
    `read_label(i)` is the label alone, and `labels`, int32 [N], has all of them; neither decodes an image. For a tfds
    data set, the first access of `labels` reads every record once.

    `identity` is a SHA-256, in hexadecimal, of what the data set holds: the names, sizes and labels of its files, or
    the name, version and shards of a tfds data set. It depends neither on the place of the data nor on the fields that
    say how an image is decoded. `notes` are lines for the user: how many images there are, how the classes are
    numbered, and which files are not read. `remote` is whether each image is read over a network: REMOTE_READS of a
    batch are then read at a time.
    """

    read: Callable[[int], tuple[np.ndarray, int]]
    read_label: Callable[[int], int]
    read_labels: Callable[[], np.ndarray]
    num_examples: int
    image_size: int
    channels: int
    class_names: tuple[str, ...]
    on_bad_image: str
    identity: str
    notes: tuple[str, ...] = ()
    remote: bool = False

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.read(index)

    @functools.cached_property
    def labels(self) -> Int32[np.ndarray, "n"]:
        return self.read_labels()
