"""Batches that depend on (seed, step) only, and whole data sets as arrays.

The step number is the only state of a run's input pipeline. Row r of the global batch of step s is position
p = s · batch_size + r of an endless sequence of examples. With N examples, position p belongs to epoch p // N and holds
entry p mod N of that epoch's own shuffle. Every example therefore occurs once per epoch, and a batch may straddle two
epochs. Each process reads the same rows of every global batch: those that its devices hold, in any order of devices. If
bad images are skipped, a good image of the same class takes the place of a bad one. It is drawn at random, and depends
on the seed and on p alone.

Threads do the work, never processes: the image decoders release Python's global interpreter lock, threads cannot be
left behind or be killed one by one, and the number of threads does not change the output.
"""

import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool, Int, Int32, UInt8

from cfd.data.dataset import REMOTE_READS, Dataset
from cfd.data.decode import BadImage
from cfd.devices.notices import absl_errors_only
from cfd.errors import UserError

with absl_errors_only():  # with jax before 0.11, Grain warns about worker processes, which this package never starts
    import grain
    from grain.experimental import index_shuffle

MAX_SKIPPED_IN_A_ROW = 1000
"""Reading gives up after this many bad images for one place of a batch.

They are tried in a random order, so that many mean that nearly the whole class is bad: a broken disk or an interrupted
copy, not a few bad files.
"""
NUM_DRAWS = 32
"""An image of a class is looked for among this many, times the number of classes, before all labels are read."""


class Found(NamedTuple):
    """The labels and bad images of a data set that this process has met. It saves time, and changes no batch.

    labels: int32 [N], the classes that were read, and -1 elsewhere. Empty if bad images are not skipped.
    bad: {image: why it cannot be used}.
    """

    labels: np.ndarray
    bad: dict[int, str]


_FOUND: weakref.WeakKeyDictionary[Dataset, Found] = weakref.WeakKeyDictionary()
_LOGGED: dict[str, object] = {}
"""The bad images that this process has logged, by their messages."""


def epoch_order(seed: int, positions: Iterable[int], num_examples: int) -> list[int]:
    """The index of the example at each of `positions` in the endless sequence of examples.

    Every example occurs once per epoch, and every epoch has its own order.
    """
    order, epoch, shuffle_seed = [], -1, 0
    for position in positions:
        if position // num_examples != epoch:
            epoch = position // num_examples
            shuffle_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        order.append(index_shuffle(position % num_examples, num_examples - 1, shuffle_seed, rounds=4))
    return order


class Batches:
    """An iterator of {"image": uint8 [b, h, w, c], "label": int32 [b]}, which decodes ahead in threads.

    `skipped` counts the rows, in all batches returned so far, in which another image replaces a bad one. Rows that
    another process counts are left out.
    No thread remains after `next` has raised an error, or after `close`, which may be called repeatedly.
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
        """Stops the threads."""
        self._iterator.close()


def batches(
    dataset: Dataset,
    *,
    seed: int,
    batch_size: int,
    flip: bool,
    start_step: int = 0,
    rows: Int[np.ndarray, " n"] | None = None,
    counted: Bool[np.ndarray, " n"] | None = None,
    num_workers: int = 0,
    prefetch: int = 2,
) -> Batches:
    """This process's rows of the global batches start_step, start_step + 1, ...

    `rows` are the numbers of these rows in the global batch, and `counted` says which of them this process counts if
    their images are replaced; None stands for all. The global batch of step s, including its flips, depends on
    (seed, s) only: row r of it is the same for every `rows` and every `num_workers`. With `flip`, each image
    is flipped left to right with probability 1/2. `num_workers` threads decode one batch each, and `prefetch` more
    batches wait in a buffer; num_workers = 0 decodes in the calling thread. If the data set's `on_bad_image` is "skip",
    a good image replaces a bad one, as `_substitute` says.

    Raises ValueError if `batch_size` is not positive, or if a global batch has no such rows. The iterator's `next`
    raises BadImage for a bad image or, if bad images are skipped, ValueError for too many of them in a row.
    """
    if batch_size < 1:
        raise UserError(f"train.batch_size is {batch_size}: give a positive number")
    rows = np.arange(batch_size) if rows is None else rows
    if len(rows) == 0 or rows.min() < 0 or rows.max() >= batch_size:
        raise UserError(f"rows are {rows}: give one or more of the numbers 0 to {batch_size - 1}, the rows of a batch")
    counts = np.ones(len(rows), bool) if counted is None else counted
    found = _found(dataset)

    class Steps:
        """A random-access source for grain. Its element s is this process's part of the global batch of step s."""

        def __len__(self) -> int:
            return sys.maxsize // batch_size

        def __getitem__(self, index: int) -> dict[str, Any]:
            first = index * batch_size
            positions = [first + row for row in rows.tolist()]
            image = np.empty((len(rows), dataset.image_size, dataset.image_size, dataset.channels), np.uint8)
            label = np.empty(len(rows), np.int32)
            skipped = 0
            numbers = epoch_order(seed, positions, len(dataset))
            for i, example in enumerate(_read_all(dataset, found, numbers)):
                if example is None:
                    example = _substitute(dataset, found, seed, positions[i], numbers[i])
                    skipped += int(counts[i])
                image[i], label[i] = example
            if flip:
                flips = _flips(seed, first, batch_size)[rows]
                image[flips] = image[flips, :, ::-1]
            return {"image": image, "label": label, "skipped": skipped}

    options = grain.ReadOptions(num_threads=num_workers, prefetch_buffer_size=num_workers + prefetch)
    iterator = iter(grain.MapDataset.source(Steps()).to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return Batches(iterator)


def _flips(seed: int, first: int, rows: int) -> np.ndarray:
    """Whether to flip the images at positions first, ..., first + rows - 1: bool [rows], each True half of the time."""
    # Each position has its own Philox block of four words. The flip is therefore the same whichever batch contains
    # the position.
    words = np.random.Philox(key=seed, counter=first).random_raw(4 * rows)
    return words[::4] >= 2**63


def _found(dataset: Dataset) -> Found:
    """The record of a data set, which later calls with the same data set share."""
    if dataset not in _FOUND:
        num_labels = len(dataset) if dataset.on_bad_image == "skip" else 0
        _FOUND[dataset] = Found(np.full(num_labels, -1, np.int32), {})
    return _FOUND[dataset]


def _read(dataset: Dataset, found: Found, index: int) -> tuple[np.ndarray, int] | None:
    """The image at `index` and its class, or None if it is bad and `on_bad_image` is "skip".

    A bad image is decoded and logged once. Raises BadImage if `on_bad_image` is "raise".
    """
    if index in found.bad:
        return None
    try:
        image, label = dataset[index]
    except BadImage as error:
        if dataset.on_bad_image == "raise":
            raise BadImage(f'{error}; or set data.on_bad_image = "skip"') from error
        found.bad[index] = str(error)
        mine = object()  # `setdefault` decides among threads that meet the same image
        if _LOGGED.setdefault(str(error), mine) is mine:
            logging.warning("Skipped a bad image: %s", error)
        return None
    if len(found.labels):
        found.labels[index] = label
    return image, label


def _read_all(dataset: Dataset, found: Found, indices: Sequence[int]) -> Iterable[tuple[np.ndarray, int] | None]:
    """`_read` of each of `indices`, in this order. Over a network, REMOTE_READS of them are read at a time."""
    if not dataset.remote:
        return (_read(dataset, found, index) for index in indices)
    with ThreadPoolExecutor(REMOTE_READS) as pool:
        return list(pool.map(partial(_read, dataset, found), indices))


def _label(dataset: Dataset, found: Found, index: int) -> int:
    """The class of an image, which is not decoded."""
    if found.labels[index] < 0:
        found.labels[index] = dataset.read_label(index)
    return int(found.labels[index])


def _substitute(dataset: Dataset, found: Found, seed: int, position: int, index: int) -> tuple[np.ndarray, int]:
    """A good image, and its class, for `position`, whose own image at `index` is bad.

    The seed and the position give a random order of the images of the class. The substitute is the first good one or,
    if the class has no good image, the first good one in a random order of all images. Every good image of the class is
    therefore equally likely, and bad files that lie together do not make one image frequent.

    Raises ValueError if all images of the data set are bad, or MAX_SKIPPED_IN_A_ROW of those that are tried.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, position], spawn_key=(1,)))
    label, tried, last = _label(dataset, found, index), {index}, index
    for last in _candidates(dataset, found, words, label):
        example = _read(dataset, found, last)
        if example is not None:
            return example
        tried.add(last)
        if len(tried) >= MAX_SKIPPED_IN_A_ROW:
            break
    raise UserError(
        f"{len(tried)} images in a row cannot be used, the first of the class {dataset.class_names[label]!r}: check "
        f"the data; the last error is: {found.bad[last]}"
    )


def _candidates(dataset: Dataset, found: Found, words: np.random.Philox, label: int) -> Iterator[int]:
    """The images of a class in a random order, and then all images in a random order; some of them come repeatedly.

    Either order begins with independent draws from the whole data set. For them, a tfds data set reads the labels of
    few records, and nothing is sorted.
    """
    draws = words.random_raw(NUM_DRAWS * len(dataset.class_names)) % len(dataset)
    known = found.labels[draws]
    yield from (i for i in draws[(known == label) | (known < 0)].tolist() if _label(dataset, found, i) == label)
    of_class = np.flatnonzero(dataset.labels == label)
    yield from of_class[np.argsort(words.random_raw(len(of_class)))].tolist()
    yield from (words.random_raw(NUM_DRAWS) % len(dataset)).tolist()
    yield from np.argsort(words.random_raw(len(dataset))).tolist()


def load_arrays(
    dataset: Dataset, indices: np.ndarray | None = None, *, num_workers: int = 0
) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, "n"]]:
    """The images and labels at `indices`, in that order, or those of the whole data set. For evaluation.

    If the data set's `on_bad_image` is "skip", bad images are left out and not replaced: n counts the good ones. If it
    is "raise", a bad image raises BadImage. To stream a large data set, call this function once per block of indices.
    """
    wanted = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    image = np.empty((len(wanted), dataset.image_size, dataset.image_size, dataset.channels), np.uint8)
    label = np.empty(len(wanted), np.int32)
    good = np.ones(len(wanted), bool)
    found = _found(dataset)

    def fill(rows: range) -> None:
        for row, example in zip(rows, _read_all(dataset, found, wanted[rows].tolist()), strict=True):
            if example is None:
                good[row] = False
            else:
                image[row], label[row] = example

    size = max(1, min(256, -(-len(wanted) // max(num_workers, 1))))
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        for _ in pool.map(fill, [range(i, min(i + size, len(wanted))) for i in range(0, len(wanted), size)]):
            pass
    return (image, label) if good.all() else (image[good], label[good])
