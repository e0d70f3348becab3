"""Batches that depend on (seed, step) only, and whole data sets as arrays.

The step number is the only state of a run's input pipeline. Row r of the global batch of step s is position
p = s · batch_size + r of an endless sequence of examples. With N examples, position p belongs to epoch p // N and holds
entry p mod N of that epoch's own shuffle. Every example therefore occurs once per epoch, and a batch may straddle two
epochs. Each process reads a contiguous block of rows of every global batch.

Threads do the work, never processes: the image decoders release Python's global interpreter lock, threads cannot be
left behind or be killed one by one, and the number of threads does not change the output.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import logging
from grain.experimental import index_shuffle
from jaxtyping import Int32, UInt8

from cfd.data.decode import BadImage
from cfd.data.sources import Dataset
from cfd.errors import UserError

MAX_SKIPPED_IN_A_ROW = 1000
"""Reading gives up after this many consecutive bad images.

So many mean a broken disk or a wrong folder, not a few bad files.
"""


def epoch_order(seed: int, positions: range, num_examples: int) -> list[int]:
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
    """An iterator of {"image": float32 [b, h, w, c] in [-1, 1], "label": int32 [b]}, which decodes ahead in threads.

    `skipped` counts the rows, in all batches returned so far, in which the next good image replaces a bad one.
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
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
) -> Batches:
    """This process's rows of the global batches start_step, start_step + 1, ...

    Each process gets b = batch_size // process_count rows per batch. The global batch of step s, including its flips,
    depends on (seed, s) only: it is the same for every `process_count` and every `num_workers`. With `flip`, each image
    is flipped left to right with probability 1/2. `num_workers` threads decode one batch each, and `prefetch` more
    batches wait in a buffer; num_workers = 0 decodes in the calling thread. If the data set's `on_bad_image` is "skip",
    the next good image in the data set's own order replaces a bad one.

    Raises ValueError if `batch_size` is not a positive multiple of `process_count`. The iterator's `next` raises
    BadImage for a bad image or, if bad images are skipped, ValueError for too many of them in a row.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"train.batch_size is {batch_size} with {process_count} processes: "
            f"give a positive multiple of {process_count}"
        )
    rows = batch_size // process_count

    class Steps:
        """A random-access source for grain. Its element s is this process's part of the global batch of step s."""

        def __len__(self) -> int:
            return sys.maxsize // batch_size

        def __getitem__(self, index: int) -> dict[str, Any]:
            first = index * batch_size + process_index * rows
            image = np.empty((rows, dataset.image_size, dataset.image_size, dataset.channels), np.uint8)
            label = np.empty(rows, np.int32)
            skipped = 0
            for row, example in enumerate(epoch_order(seed, range(first, first + rows), len(dataset))):
                image[row], label[row], num_bad = _next_good(dataset, example)
                skipped += num_bad > 0
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
    """Whether to flip the images at positions first, ..., first + rows - 1: bool [rows], each True half of the time."""
    # Each position has its own Philox block of four words. The flip is therefore the same whichever batch contains
    # the position.
    words = np.random.Philox(key=seed, counter=first).random_raw(4 * rows)
    return words[::4] >= 2**63


def _next_good(dataset: Dataset, index: int) -> tuple[np.ndarray, int, int]:
    """The first good image at or after `index`, its label, and the number of bad images before it.

    Raises BadImage for the first bad image if `on_bad_image` is "raise". Raises ValueError if all images of the data
    set are bad, or MAX_SKIPPED_IN_A_ROW of them in a row.
    """
    tries = min(len(dataset), MAX_SKIPPED_IN_A_ROW)
    for num_bad in range(tries):
        try:
            return *dataset[(index + num_bad) % len(dataset)], num_bad
        except BadImage as error:
            _raise_or_log(dataset, error)
            last = error
    raise UserError(f"{tries} images in a row cannot be used: check the data; the last error is: {last}")


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
    """Raises the error, with a further remedy, if `on_bad_image` is "raise", and logs it as a warning if "skip"."""
    if dataset.on_bad_image == "raise":
        raise BadImage(f'{error}; or set data.on_bad_image = "skip"') from error
    logging.warning("Skipped a bad image: %s", error)
