"""Bad images that are skipped: the images that take their place, and the record of the bad ones."""

import collections
import dataclasses
from collections.abc import Callable, Collection

import numpy as np
import pytest
from pictures import assert_same, take
from scipy import stats

from cfd.data import batches as batches_module
from cfd.data.batches import load_arrays
from cfd.data.dataset import Dataset
from cfd.data.decode import BadImage


def made(labels: Collection[int], is_bad: Callable[[int], bool]) -> tuple[Dataset, collections.Counter[int]]:
    """A data set whose image i has the bytes of the number i, and how often each image was decoded."""
    numbers, decoded = np.array(labels, np.int32), collections.Counter()

    def read(i: int) -> tuple[np.ndarray, int]:
        decoded[i] += 1
        if is_bad(i):
            raise BadImage(f"image {i} of {id(decoded)} is bad")
        return np.frombuffer(np.int32(i).tobytes() * 16, np.uint8).reshape(8, 8, 1), int(numbers[i])

    names = tuple(f"class {c}" for c in range(numbers.max() + 1))
    dataset = Dataset(
        read=read,
        read_label=lambda i: int(numbers[i]),
        read_labels=lambda: numbers,
        num_examples=len(numbers),
        image_size=8,
        channels=1,
        class_names=names,
        on_bad_image="skip",
        identity="made",
    )
    return dataset, decoded


def numbers_of(taken: list[dict[str, np.ndarray]]) -> np.ndarray:
    """The numbers of the images in batches, one batch per row."""
    return np.stack([np.ascontiguousarray(b["image"].reshape(-1, 64)[:, :4]).view(np.int32).ravel() for b in taken])


def assert_uniform(counts: np.ndarray) -> None:
    """Pearson's statistic of the counts has a tail probability above 1e-6; a neighbour that is preferred has none."""
    assert stats.chisquare(counts).pvalue > 1e-6


def test_substitutes_of_bad_files_that_lie_together_are_spread_over_their_class() -> None:
    """Two classes, each with 50 bad files before 50 good ones."""
    labels = np.repeat([0, 1], 100)
    dataset, decoded = made(labels, lambda i: i % 100 < 50)
    dataset = dataclasses.replace(dataset, read_labels=lambda: pytest.fail("a tfds data set would read every record"))
    epochs = 40
    taken = take(dataset, epochs, batch_size=200, flip=False)
    for batch, numbers in zip(taken, numbers_of(taken), strict=True):
        assert np.bincount(batch["label"]).tolist() == [100, 100], "the classes keep their shares in every epoch"
        np.testing.assert_array_equal(batch["label"], labels[numbers])
    counts = np.bincount(numbers_of(taken).ravel(), minlength=200).reshape(2, 100)
    assert (counts[:, :50] == 0).all() and (counts[:, 50:] >= epochs).all()
    substitutes = counts[:, 50:] - epochs  # each good image also comes once per epoch in its own place
    assert substitutes.sum(axis=1).tolist() == [50 * epochs] * 2
    for row in substitutes:
        assert_uniform(row)
    assert all(decoded[i] == 1 for i in range(200) if i % 100 < 50), "a bad image is decoded once"


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_substitutes_do_not_depend_on_processes_workers_and_the_batch_size(
    process_count: int, num_workers: int
) -> None:
    labels, is_bad = np.arange(37) % 3, lambda i: i % 5 < 3
    wanted = take(made(labels, is_bad)[0], 12, batch_size=8)
    parts = [
        take(
            made(labels, is_bad)[0],
            6,
            batch_size=16,
            rows=rows,
            num_workers=num_workers,
        )
        for rows in np.split(np.arange(16), process_count)
    ]
    joined = [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_same(
        joined, [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*[iter(wanted)] * 2, strict=True)]
    )


def test_what_is_remembered_changes_no_batch() -> None:
    """A class without a good image, one with a single one, and a good one."""
    labels, is_bad = np.repeat([0, 1, 2], 30), lambda i: i < 59
    known, _ = made(labels, is_bad)
    load_arrays(known)
    late = take(made(labels, is_bad)[0], 5, batch_size=32, start_step=9)
    assert_same(take(known, 5, batch_size=32, start_step=9), late)
    assert_same(take(made(labels, is_bad)[0], 14, batch_size=32)[9:], late)


def test_a_class_without_a_good_image_takes_those_of_the_others_and_is_searched_once() -> None:
    labels = np.repeat([0, 1, 2], 40)
    dataset, decoded = made(labels, lambda i: i < 40)
    searched = collections.Counter()

    def read_label(i: int) -> int:
        searched[i] += 1
        return int(labels[i])

    dataset = dataclasses.replace(dataset, read_label=read_label)
    taken = take(dataset, 30, batch_size=120, flip=False)
    counts = np.bincount(numbers_of(taken).ravel(), minlength=120)
    assert (counts[:40] == 0).all()
    assert_uniform(counts[40:] - 30)
    assert all(decoded[i] == 1 for i in range(40))
    assert max(searched.values()) == 1, "no label is read twice"


def test_too_many_bad_images_of_a_class_stop_the_run_wherever_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "MAX_SKIPPED_IN_A_ROW", 6)
    labels = np.repeat([0, 1], [6, 30])
    dataset, _ = made(labels, lambda i: i < 6)
    for _ in range(2):  # known by then
        with pytest.raises(
            ValueError, match="6 images in a row cannot be used, the first of the class 'class 0': check"
        ):
            take(dataset, 1, batch_size=36)
    fewer, _ = made(labels[1:], lambda i: i < 5)
    assert (take(fewer, 1, batch_size=35)[0]["label"] == 1).all()


def test_each_bad_image_is_logged_once_and_is_bad_in_training_and_in_evaluation(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "_LOGGED", {})  # other tests of this process have images of the same names
    repaired: list[int] = []
    dataset, _ = made(np.arange(20) % 2, lambda i: i % 4 == 3 and i not in repaired)
    for _ in range(2):
        take(dataset, 6, batch_size=20, num_workers=2)
        assert len(load_arrays(dataset)[0]) == 15
    take(dataclasses.replace(dataset, class_names=("opened", "again")), 2, batch_size=20)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) == 5
    repaired.append(3)
    assert len(load_arrays(dataset)[0]) == 15, "an image does not become good while the process runs"
    assert 3 not in numbers_of(take(dataset, 2, batch_size=20, flip=False))
