"""The arguments on which a global batch depends, the images in a batch, and the effect of bad files and of `close`."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grain.experimental
import numpy as np
import pytest
from pictures import assert_same, bad_images, encoded, noise, open_folder, take, torn, write
from PIL import Image

from cfd.data.batches import _flips, batches, epoch_order, load_arrays
from cfd.data.decode import BadImage


def test_batches_hold_every_example_once_an_epoch_in_another_order_each(folder: Path):
    dataset = open_folder(folder)
    every = {dataset[i][0].tobytes(): i for i in range(17)}
    rows = [row for batch in take(dataset, 17, flip=False, batch_size=4) for row in zip(*batch.values(), strict=True)]
    seen = [every[image.tobytes()] for image, _ in rows]
    epochs = [seen[i : i + 17] for i in range(0, 68, 17)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [label for _, label in rows] == [dataset.labels[i] for i in seen]
    assert rows[0][0].dtype == np.uint8 and rows[0][1].dtype == np.int32


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_global_batch_does_not_depend_on_processes_and_workers(folder: Path, process_count: int, num_workers: int):
    dataset = open_folder(folder)
    parts = [take(dataset, 7, rows=rows, num_workers=num_workers) for rows in np.split(np.arange(8), process_count)]
    joined = [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, take(dataset, 7))


def test_started_at_any_step_it_goes_on_with_the_same_bits(folder: Path):
    """The position is the step number; steps 2 and 4 straddle epochs.

    This is grain's own check, applied to the state that a checkpoint contains.
    """
    dataset = open_folder(folder)

    class Iterator:
        def __init__(self):
            self.set_state({"next_step": 0})

        def set_state(self, state: dict[str, int]):
            self.next_step = state["next_step"]
            self.batches = batches(
                dataset, seed=3, batch_size=8, flip=True, start_step=self.next_step, num_workers=self.next_step % 3
            )

        def get_state(self) -> dict[str, int]:
            return {"next_step": self.next_step}

        def __iter__(self):
            return self

        def __next__(self):
            if self.next_step == 9:
                self.batches.close()
                raise StopIteration
            self.next_step += 1
            return next(self.batches)

    class Source:
        def __iter__(self):
            return Iterator()

    grain.experimental.assert_equal_output_after_checkpoint(Source())


def test_flips_are_a_fair_coin_of_seed_and_position(folder: Path):
    dataset = open_folder(folder)
    straight, flipped = take(dataset, 30, flip=False), take(dataset, 30)
    coins = []
    for a, b in zip(straight, flipped, strict=True):
        for x, y in zip(a["image"], b["image"], strict=True):
            assert np.array_equal(y, x) or np.array_equal(y, x[:, ::-1])
            coins.append(not np.array_equal(y, x))
    assert abs(np.mean(coins) - 0.5) < 5 * 0.5 / np.sqrt(len(coins))
    # The same example is flipped in one epoch and not in another.
    assert coins[: 17 * 4] != coins[17 * 4 : 17 * 8]
    # A flip depends on the position, not on the step: one batch of 16 equals two batches of 8.
    pairs = take(dataset, 4, batch_size=16)
    np.testing.assert_array_equal(
        np.concatenate([b["image"] for b in pairs]), np.concatenate([b["image"] for b in flipped[:8]])
    )


def test_seeds_differ_and_repeat(folder: Path):
    dataset = open_folder(folder)
    assert_same(take(dataset, 3, seed=0), take(dataset, 3, seed=0))
    first = [take(dataset, 1, seed=seed)[0]["image"].tobytes() for seed in (0, 1, 2, 2**31)]
    assert len(set(first)) == 4


def test_seeds_have_orders_and_flips_of_their_own_in_every_epoch():
    assert epoch_order(0, range(17, 34), 17) != epoch_order(1, range(17), 17)
    assert (_flips(0, 0, 64) != _flips(1, 0, 64)).any()


def test_one_example_and_a_batch_of_many_epochs(tmp_path: Path):
    for name in "ab":
        write(tmp_path / name / "0.png", encoded(noise(0)))
    labels = np.concatenate([b["label"] for b in take(open_folder(tmp_path), 4)])
    np.testing.assert_array_equal(np.sort(labels.reshape(-1, 2)), [[0, 1]] * 16)
    alone = epoch_order(0, range(5), 1)
    assert alone == [0] * 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_kept_in_memory_give_the_same_batches(folder: Path, num_workers: int):
    torn(folder)
    for options in ({}, {"rows": np.arange(4, 8), "start_step": 3}):
        datasets = [open_folder(folder, on_bad_image="skip", in_memory=in_memory) for in_memory in (False, True)]
        iterators = [
            batches(dataset, seed=3, batch_size=8, flip=True, num_workers=num_workers, **options)
            for dataset in datasets
        ]
        straight, kept = [[next(iterator) for _ in range(9)] for iterator in iterators]
        assert_same(straight, kept)
        assert iterators[0].skipped == iterators[1].skipped > 0
        for iterator in iterators:
            iterator.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_may_be_any_and_are_counted_once(folder: Path, num_workers: int):
    """Rows that lie apart, and rows that two processes hold."""
    torn(folder)
    dataset = open_folder(folder, on_bad_image="skip")
    options: dict[str, Any] = dict(seed=3, batch_size=8, flip=True, num_workers=num_workers)
    parts = [([0, 3, 4, 7], [1, 1, 1, 1]), ([1, 2, 4, 5, 6, 7], [1, 1, 0, 1, 1, 0])]
    whole = batches(dataset, **options)
    some = [batches(dataset, rows=np.array(r), counted=np.array(c, bool), **options) for r, c in parts]
    for _ in range(9):
        batch = next(whole)
        for (rows, _), iterator in zip(parts, some, strict=True):
            assert_same([next(iterator)], [{name: x[rows] for name, x in batch.items()}])
        assert sum(iterator.skipped for iterator in some) == whole.skipped
    assert whole.skipped > 0
    for iterator in (whole, *some):
        iterator.close()


@pytest.mark.parametrize("batch_size, rows, words", [(0, None, "batch_size"), (8, [8], "rows"), (8, [-1, 0], "rows")])
def test_rows_that_no_batch_has(folder: Path, batch_size: int, rows: list[int] | None, words: str):
    with pytest.raises(ValueError, match=words):
        wanted = None if rows is None else np.array(rows)
        batches(open_folder(folder), seed=0, batch_size=batch_size, flip=False, rows=wanted)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_skipped_and_counted_exactly(folder: Path, tmp_path: Path, num_workers: int):
    for file, content in bad_images().items():
        write(folder / "ant" / file, content)
    write(tmp_path / "outside.png", encoded(noise(99)))
    (folder / "bee" / "escape.png").symlink_to(tmp_path / "outside.png")
    (folder / "bee" / "dangling.png").symlink_to(folder / "nothing.png")
    (folder / "bee" / "inside.png").symlink_to(folder / "ant" / "00.png")
    (folder / "bee" / "folder.png").mkdir()
    os.mkfifo(folder / "bee" / "pipe.png")
    good, bad = 17 + 1, len(bad_images()) + 3
    dataset = open_folder(folder, on_bad_image="skip")
    assert len(dataset) == good + bad and bad > 40

    iterator = batches(dataset, seed=1, batch_size=good + bad, flip=False, num_workers=num_workers)
    taken = [next(iterator)]
    assert iterator.skipped == bad
    taken.append(next(iterator))
    assert iterator.skipped == 2 * bad
    iterator.close()

    assert_same(taken, take(dataset, 2, seed=1, batch_size=good + bad, flip=False))
    halves = [take(dataset, 2, seed=1, rows=np.arange(4 * p, 4 * p + 4)) for p in (0, 1)]
    whole = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert_same(whole, take(dataset, 2, seed=1))

    allowed = {np.asarray(Image.open(f)).tobytes(): f.parent.name for f in sorted(folder.glob("*/[01][0-9].png"))}
    for image, label in zip(taken[0]["image"], taken[0]["label"], strict=True):
        pixels = image.tobytes()
        assert pixels in allowed
        # The replacement has its own label. 00.png is also in the other class, as the target of a link.
        assert allowed[pixels] == ("ant", "bee")[label] or pixels == next(iter(allowed))

    image, label = load_arrays(dataset, num_workers=num_workers)
    assert len(image) == len(label) == good
    np.testing.assert_array_equal(np.bincount(label), [11, 7])


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_bad_image_among_good_ones_stops_the_run_by_name(folder: Path, num_workers: int):
    write(folder / "bee" / "torn.jpg", encoded(noise(0, 32, 32), "JPEG")[:300])
    iterator = batches(open_folder(folder), seed=0, batch_size=6, flip=False, num_workers=num_workers)
    with pytest.raises(BadImage, match=r"bee/torn\.jpg cannot be decoded .*remove .*on_bad_image = \"skip\""):
        for _ in range(3):
            next(iterator)
    iterator.close()
    with pytest.raises(BadImage, match=r"torn\.jpg"):
        load_arrays(open_folder(folder))


def test_nothing_but_bad_images_is_an_error_even_where_they_are_skipped(tmp_path: Path):
    for name in "ab":
        write(tmp_path / name / "0.png", b"text")
    dataset = open_folder(tmp_path, on_bad_image="skip")
    with pytest.raises(ValueError, match=r"2 images in a row cannot be used, .*: check the data; the last error is: "):
        next(batches(dataset, seed=0, batch_size=2, flip=False))
    assert len(load_arrays(dataset)[0]) == 0


def test_close_stops_the_threads_and_reading_goes_ahead(folder: Path):
    dataset = open_folder(folder)
    before = set(threading.enumerate())
    iterator = batches(dataset, seed=0, batch_size=4, flip=False, num_workers=2)
    next(iterator)
    workers = set(threading.enumerate()) - before
    assert len(workers) == 2
    iterator.close()
    iterator.close()
    for worker in workers:
        worker.join(100)
        assert not worker.is_alive()


PROGRAM = """
import sys
from cfd.data.batches import batches
from cfd.data.sources import open_dataset
fields = dict(source="digits", name="", split="train", path="", image_size=8, channels=1, num_classes=10)
dataset = open_dataset(**fields, on_bad_image="raise", in_memory=False)
iterator = batches(dataset, seed=0, batch_size=64, flip=False, num_workers=2)
while True:
    next(iterator)
    print("batch", "tensorflow" in sys.modules, flush=True)
"""


def test_a_killed_trainer_leaves_no_process_and_no_shared_memory():
    shm = Path("/dev/shm")
    before = set(shm.iterdir()) if shm.exists() else set()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == "batch False\n"
        trainer.kill()
    with pytest.raises(ProcessLookupError):
        os.killpg(trainer.pid, 0)
    assert not [f for f in (set(shm.iterdir()) if shm.exists() else set()) - before if f.name.startswith("psm_")]
