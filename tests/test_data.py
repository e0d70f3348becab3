"""The input pipeline: what a global batch depends on, how an image is cut and shrunk, and what bad input does."""

import functools
import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import grain.experimental
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from cfd import data

FIELDS = {
    "source": "folder", "name": "", "split": "train", "image_size": 8, "channels": 3, "num_classes": 2,
    "on_bad_image": "raise", "in_memory": False,
}  # fmt: skip


def noise(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8).squeeze()


def encoded(image: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def write(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 8x8 colour images, 11 and 6, all different."""
    for i in range(17):
        write(tmp_path / "pics" / ("ant", "bee")[i > 10] / f"{i:02}.png", encoded(noise(i)))
    return tmp_path / "pics"


def open_folder(folder: Path, **changes) -> data.Dataset:
    return data.open_dataset(**{**FIELDS, "path": str(folder), **changes})


def take(dataset: data.Dataset, num_steps: int, **options) -> list[dict[str, np.ndarray]]:
    options = {"seed": 3, "batch_size": 8, "flip": True} | options
    iterator = data.batches(dataset, **options)
    taken = [next(iterator) for _ in range(num_steps)]
    iterator.close()
    return taken


def assert_same(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x["image"], y["image"])
        np.testing.assert_array_equal(x["label"], y["label"])


def test_digits_are_scikit_learns_split_once_for_all():
    from sklearn.datasets import load_digits

    fields = {**FIELDS, "source": "digits", "path": "", "channels": 1, "num_classes": 10}
    train, test = (data.open_dataset(**{**fields, "split": split}) for split in ("train", "test"))
    bunch = load_digits(return_X_y=True)
    assert len(train) + len(test) == len(bunch[1]) and len(test) == len(bunch[1]) // 6
    image, label = data.load_arrays(test)
    np.testing.assert_array_equal(label, bunch[1][5::6])
    np.testing.assert_array_equal(np.round(image[..., 0] / 255 * 16), bunch[0][5::6].reshape(-1, 8, 8))
    assert image.min() == 0 and image.max() == 255 and train.class_names == tuple("0123456789")

    doubled = data.load_arrays(data.open_dataset(**{**fields, "split": "test", "image_size": 16, "channels": 3}))[0]
    np.testing.assert_array_equal(doubled, image.repeat(2, 1).repeat(2, 2).repeat(3, 3))
    halved = data.load_arrays(data.open_dataset(**{**fields, "split": "test", "image_size": 4}))[0]
    assert np.abs(halved - image.reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))).max() <= 1.0

    for change, remedy in (({"split": "validation"}, "'train' and 'test'"), ({"image_size": 12}, "multiple of 8")):
        with pytest.raises(ValueError, match=remedy):
            data.open_dataset(**{**fields, **change})


def test_batches_hold_every_example_once_an_epoch_in_another_order_each(folder: Path):
    dataset = open_folder(folder)
    every = {dataset[i][0].tobytes(): i for i in range(17)}
    rows = [row for batch in take(dataset, 17, flip=False, batch_size=4) for row in zip(*batch.values(), strict=True)]
    seen = [every[np.round((image + 1) * 127.5).astype(np.uint8).tobytes()] for image, _ in rows]
    epochs = [seen[i : i + 17] for i in range(0, 68, 17)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [label for _, label in rows] == [dataset.labels[i] for i in seen]
    assert rows[0][0].dtype == np.float32 and rows[0][1].dtype == np.int32


def test_every_value_of_a_pixel_is_scaled_to_its_place_between_minus_one_and_one(tmp_path: Path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name in "ab":
        write(tmp_path / name / "0.png", encoded(ramp))
    batch = take(open_folder(tmp_path, image_size=16, channels=1), 1, flip=False, batch_size=1)[0]["image"]
    np.testing.assert_allclose(batch.ravel(), np.linspace(-1, 1, 256), atol=1e-7)
    assert batch.min() == -1 and batch.max() == 1


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_global_batch_does_not_depend_on_processes_and_workers(folder: Path, process_count: int, num_workers: int):
    dataset = open_folder(folder)
    parts = [
        take(dataset, 7, process_index=p, process_count=process_count, num_workers=num_workers)
        for p in range(process_count)
    ]
    joined = [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, take(dataset, 7))


def test_started_at_any_step_it_goes_on_with_the_same_bits(folder: Path):
    """The position is the step number; steps 2 and 4 straddle epochs. grain's own check, on the state we store."""
    dataset = open_folder(folder)

    class Iterator:
        def __init__(self):
            self.set_state({"next_step": 0})

        def set_state(self, state: dict[str, int]):
            self.next_step = state["next_step"]
            self.batches = data.batches(
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
    # Position, not step: one batch of 16 is two batches of 8.
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
    assert data.epoch_order(0, range(17, 34), 17) != data.epoch_order(1, range(17), 17)
    assert (data._flips(0, 0, 64) != data._flips(1, 0, 64)).any()


def test_one_example_and_a_batch_of_many_epochs(tmp_path: Path):
    for name in "ab":
        write(tmp_path / name / "0.png", encoded(noise(0)))
    labels = np.concatenate([b["label"] for b in take(open_folder(tmp_path), 4)])
    np.testing.assert_array_equal(np.sort(labels.reshape(-1, 2)), [[0, 1]] * 16)
    alone = data.epoch_order(0, range(5), 1)
    assert alone == [0] * 5


def torn(folder: Path) -> Path:
    """The folder with one bad image more, the fourth of bee."""
    write(folder / "bee" / "13b.jpg", encoded(noise(0, 32, 32), "JPEG")[:300])
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_kept_in_memory_give_the_same_batches(folder: Path, num_workers: int):
    torn(folder)
    for options in ({}, {"process_index": 1, "process_count": 2, "start_step": 3}):
        datasets = [open_folder(folder, on_bad_image="skip", in_memory=in_memory) for in_memory in (False, True)]
        iterators = [
            data.batches(dataset, seed=3, batch_size=8, flip=True, num_workers=num_workers, **options)
            for dataset in datasets
        ]
        straight, kept = [[next(iterator) for _ in range(9)] for iterator in iterators]
        assert_same(straight, kept)
        assert iterators[0].skipped == iterators[1].skipped > 0
        for iterator in iterators:
            iterator.close()


def test_each_image_is_decoded_once_in_memory_and_a_bad_one_stays_bad(folder: Path, monkeypatch: pytest.MonkeyPatch):
    decoded: list[str] = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda *of: decoded.append(of[1]) or decode(*of))
    dataset = open_folder(folder, in_memory=True)
    take(dataset, 5, batch_size=17)
    images = data.load_arrays(dataset)[0]
    here = [file for file in decoded if folder in Path(file).parents]  # other tests' threads may still be at work
    assert sorted(here) == sorted(map(str, folder.glob("*/*")))
    np.testing.assert_array_equal(images, data.load_arrays(open_folder(folder))[0])
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0][:] = 0

    dataset = open_folder(torn(folder), in_memory=True)
    for _ in range(3):
        with pytest.raises(data.BadImage, match=r"13b\.jpg"):
            dataset[14]
    dataset = open_folder(folder, on_bad_image="skip", in_memory=True)
    for _ in range(2):
        np.testing.assert_array_equal(data.load_arrays(dataset, num_workers=2)[0], images)


def test_an_image_in_memory_is_not_seen_before_it_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    begun, go_on, decode = threading.Event(), threading.Event(), data.decode

    def slow(*of) -> np.ndarray:
        if folder in Path(of[1]).parents and not begun.is_set():
            begun.set()
            assert go_on.wait(60)
        return decode(*of)

    monkeypatch.setattr(data, "decode", slow)
    dataset = open_folder(folder, in_memory=True)
    first: list[tuple[np.ndarray, int]] = []
    thread = threading.Thread(target=lambda: first.append(dataset[12]))
    thread.start()
    assert begun.wait(60)
    second = dataset[12][0].copy(), dataset[12][1]
    go_on.set()
    thread.join()
    for image, label in (*first, second):
        np.testing.assert_array_equal(image, noise(12))
        assert label == 1


@pytest.mark.parametrize("batch_size, process_count", [(0, 1), (8, 3), (-4, 2)])
def test_batch_size_that_processes_do_not_divide(folder: Path, batch_size: int, process_count: int):
    with pytest.raises(ValueError, match="batch_size"):
        data.batches(open_folder(folder), seed=0, batch_size=batch_size, flip=False, process_count=process_count)


def test_folder_labels_come_from_sorted_names_and_split_folders(tmp_path: Path):
    for split in ("train", "test"):
        for c, name in enumerate(("zebra", "ape", "Cat")):
            for i in range(2):
                write(
                    tmp_path / split / name / f"{i}.{'JPG' if i else 'webp'}", encoded(np.full((8, 8, 3), c, np.uint8))
                )
    write(tmp_path / "train" / "ape" / "notes.txt", b"not an image")
    (tmp_path / "train" / ".cache").mkdir()
    dataset = open_folder(tmp_path, num_classes=3)
    assert dataset.class_names == ("Cat", "ape", "zebra") and len(dataset) == 6
    np.testing.assert_array_equal(dataset.labels, [0, 0, 1, 1, 2, 2])
    assert dataset.labels.dtype == np.int32
    image, label = data.load_arrays(dataset, np.array([5, 0]), num_workers=2)
    np.testing.assert_array_equal(label, [2, 0])
    np.testing.assert_array_equal(image[:, 0, 0, 0], [0, 2])
    assert len(open_folder(tmp_path, num_classes=3, split="test")) == 6
    assert len(open_folder(tmp_path / "train", num_classes=3)) == 6


@pytest.mark.parametrize("height, width", [(24, 24), (24, 41), (38, 24)])
def test_centre_square_and_box_mean(height: int, width: int):
    """Against the mean of 3x3 blocks in float64; Pillow rounds after each axis, hence one grey level."""
    image = noise(1, height, width)
    top, left = (height - 24) // 2, (width - 24) // 2
    square = image[top : top + 24, left : left + 24].astype(np.float64)
    expected = square.reshape(8, 3, 8, 3, 3).mean((1, 3))
    out = data.decode(encoded(image), "x", 8, 3)
    assert out.dtype == np.uint8 and np.abs(out - expected).max() <= 1.0
    np.testing.assert_array_equal(data.decode(encoded(image[:24, :24]), "x", 24, 3), image[:24, :24])


def test_modes_are_converted_without_loss():
    grey = noise(2, channels=1)
    three = grey[..., None].repeat(3, -1)
    np.testing.assert_array_equal(data.decode(encoded(grey), "x", 8, 3), three)
    np.testing.assert_array_equal(data.decode(encoded(grey), "x", 8, 1), grey[..., None])
    levels = np.arange(2**16).reshape(256, 256)
    nearest = data.decode(encoded(Image.fromarray(levels.astype(np.uint16))), "x", 256, 1)[..., 0]
    np.testing.assert_array_equal(nearest, np.round(levels / 257))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(data.decode(encoded(deep), "x", 8, 3), three)
    np.testing.assert_array_equal(data.decode(encoded(deep), "x", 8, 1), grey[..., None])
    opaque = np.concatenate([three, np.full((8, 8, 1), 255, np.uint8)], -1)
    np.testing.assert_array_equal(data.decode(encoded(opaque), "x", 8, 3), three)
    np.testing.assert_array_equal(data.decode(encoded(Image.fromarray(grey).convert("P")), "x", 8, 3), three)
    bits = Image.fromarray(grey > 127)
    np.testing.assert_array_equal(data.decode(encoded(bits), "x", 8, 1)[..., 0], (grey > 127) * np.uint8(255))
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(data.decode(encoded(red, "JPEG", quality=95), "x", 8, 3)[0, 0], [255, 0, 0], atol=3)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares width x height black grey pixels and holds them, compressed a thousandfold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@functools.cache
def bad_images() -> dict[str, bytes]:
    """Files of which no one can become a training image, by name."""
    png, jpeg, webp = (encoded(noise(5, 32, 32), f) for f in ("PNG", "JPEG", "WEBP"))
    transparent = np.concatenate([noise(5), noise(6, channels=1)[..., None]], -1)
    bad = {
        "empty.png": b"",
        "empty.jpg": b"",
        "empty.webp": b"",
        "text.png": b"this is text\n" * 20,
        "text.jpg": b"<html>404</html>",
        "nulls.png": bytes(4096),
        "random.jpg": noise(1, 64, 64, 1).tobytes(),
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(canary) print\n%%EOF\n",
        "gif.png": encoded(noise(1, 32, 32, 1), "GIF"),
        "bmp.jpg": encoded(noise(1, 32, 32), "BMP"),
        "tiff.webp": encoded(noise(1, 32, 32), "TIFF"),
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"/>',
        "zip.png": b"PK\x03\x04" + bytes(100),
        "pickle.jpg": b"\x80\x04\x95" + bytes(30),
        "1x1.png": encoded(noise(1, 1, 1).reshape(1, 1, 3)),
        "7x9.jpg": encoded(noise(1, 7, 9), "JPEG"),
        "thin.png": encoded(np.zeros((4000, 2, 3), np.uint8)),
        "transparent.png": encoded(transparent),
        "transparent.webp": encoded(transparent, "WEBP", lossless=True),
        "grey-transparent.png": encoded(noise(1, channels=1), transparency=int(noise(1, channels=1)[0, 0])),
        "palette-transparent.png": encoded(Image.new("P", (8, 8), 0), transparency=0),
        "deep-transparent.png": encoded(Image.fromarray(np.zeros((8, 8), np.uint16)), transparency=0),
        "bomb-100-megapixel.png": png_header(10_000, 10_000),
    }
    for declared in ((15_000, 15_000), (2**31 - 1, 2**31 - 1), (0, 8)):
        size = struct.pack(">II", *declared)
        bad[f"declares-{declared[0]}x{declared[1]}.png"] = png_header(8, 8).replace(struct.pack(">II", 8, 8), size)
    for format, whole in (("png", png), ("jpg", jpeg), ("webp", webp)):
        for part in (4, 30, len(whole) // 2, len(whole) - 40):
            bad[f"first-{part}-bytes.{format}"] = whole[:part]
    for at in (20, len(png) // 2, len(png) - 40):
        bad[f"flipped-at-{at}.png"] = png[:at] + bytes([png[at] ^ 64]) + png[at + 1 :]
    return bad


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_each_bad_image_is_named_with_a_remedy():
    for file, content in bad_images().items():
        with pytest.raises(data.BadImage, match=rf"^{file} .*(remove|shrink|lower|background)"):
            data.decode(content, file, 8, 3)


DECODE_ALL = """
import resource, sys, warnings
from cfd import data
warnings.simplefilter("ignore")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for file in sys.argv[1:]:
    try:
        data.decode(open(file, "rb").read(), file, 8, 3)
    except data.BadImage:
        continue
    raise SystemExit(f"{file} was decoded")
print((peak() - before) * (1 if sys.platform == "darwin" else 1024))
"""


def test_bad_images_take_little_memory(tmp_path: Path):
    files = [str(write(tmp_path / file, content)) for file, content in bad_images().items()]
    grown = subprocess.run([sys.executable, "-c", DECODE_ALL, *files], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 200e6, grown.stdout


def test_colour_where_the_config_says_grey():
    with pytest.raises(data.BadImage, match=r"x\.png is a colour image .* data\.channels is 1: set"):
        data.decode(encoded(noise(0)), "x.png", 8, 1)


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
    good, bad = 17 + 1, len(bad_images()) + 4
    dataset = open_folder(folder, on_bad_image="skip")
    assert len(dataset) == good + bad and bad > 40

    iterator = data.batches(dataset, seed=1, batch_size=good + bad, flip=False, num_workers=num_workers)
    batches = [next(iterator)]
    assert iterator.skipped == bad
    batches.append(next(iterator))
    assert iterator.skipped == 2 * bad
    iterator.close()

    assert_same(batches, take(dataset, 2, seed=1, batch_size=good + bad, flip=False))
    halves = [take(dataset, 2, seed=1, process_index=p, process_count=2) for p in (0, 1)]
    whole = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert_same(whole, take(dataset, 2, seed=1))

    allowed = {np.asarray(Image.open(f)).tobytes(): f.parent.name for f in sorted(folder.glob("*/[01][0-9].png"))}
    for image, label in zip(batches[0]["image"], batches[0]["label"], strict=True):
        pixels = np.round((image + 1) * 127.5).astype(np.uint8).tobytes()
        assert pixels in allowed
        # The replacement brings its own label; 00.png is also the target of a link in the other class.
        assert allowed[pixels] == ("ant", "bee")[label] or pixels == next(iter(allowed))

    image, label = data.load_arrays(dataset, num_workers=num_workers)
    assert len(image) == len(label) == good
    np.testing.assert_array_equal(np.bincount(label), [11, 7])


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_bad_image_among_good_ones_stops_the_run_by_name(folder: Path, num_workers: int):
    write(folder / "bee" / "torn.jpg", encoded(noise(0, 32, 32), "JPEG")[:300])
    iterator = data.batches(open_folder(folder), seed=0, batch_size=6, flip=False, num_workers=num_workers)
    with pytest.raises(data.BadImage, match=r"bee/torn\.jpg cannot be decoded .*remove .*on_bad_image = \"skip\""):
        for _ in range(3):
            next(iterator)
    iterator.close()
    with pytest.raises(data.BadImage, match=r"torn\.jpg"):
        data.load_arrays(open_folder(folder))


def test_nothing_but_bad_images_is_an_error_even_where_they_are_skipped(tmp_path: Path):
    for name in "ab":
        write(tmp_path / name / "0.png", b"text")
    dataset = open_folder(tmp_path, on_bad_image="skip")
    with pytest.raises(ValueError, match="2 images in a row cannot be used: check the data; the last one: "):
        next(data.batches(dataset, seed=0, batch_size=2, flip=False))
    assert len(data.load_arrays(dataset)[0]) == 0


def test_a_file_that_vanished_is_bad_and_a_failing_disk_is_never_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "ant" / "00.png").unlink(missing_ok=False)
    dataset = open_folder(folder, on_bad_image="skip")
    (folder / "ant" / "01.png").unlink()
    with pytest.raises(data.BadImage, match=r"ant/01\.png is gone"):
        dataset[0]
    monkeypatch.setattr(data, "MAX_BYTES", 10)
    with pytest.raises(data.BadImage, match=r"ant/02\.png has \d+ bytes, the limit is 10"):
        dataset[1]

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(data.os, "lstat", fail)
    with pytest.raises(ValueError, match=r"ant/02\.png cannot be read \(Input/output error\)"):
        data.load_arrays(dataset, np.array([1]))


def leading_out(path: Path):
    write(path.parent / "elsewhere" / "0.png", encoded(noise(0)))
    (path / "cat").symlink_to(path.parent / "elsewhere")


def without_folders(path: Path):
    for file in path.glob("*/*"):
        file.rename(path / file.name)
    for name in ("ant", "bee"):
        (path / name).rmdir()


@pytest.mark.parametrize(
    "change, prepare, message",
    [
        ({"path": ""}, None, "data.path is '', which is not a folder: give"),
        ({"path": "/no/such/folder"}, None, "'/no/such/folder', which is not a folder: give"),
        ({"split": "test"}, None, r"eval.test_split is 'test', but there is no folder .*/pics/test: make it"),
        ({"num_classes": 10}, None, r"num_classes is 10, but data.path = .* has 2 \(ant, bee\): set"),
        ({"channels": 4}, None, r"data.channels is 4; it must be one of \(1, 3\)"),
        ({"image_size": 0}, None, "data.image_size is 0"),
        ({"on_bad_image": "ignore"}, None, "data.on_bad_image is 'ignore'"),
        ({"image_size": 10**6, "in_memory": True}, None, r"17 images .* 51,000,000,000,000 bytes, .*in_memory = False"),
        ({"source": "webdataset"}, None, "data.source is 'webdataset'; it must be one of"),
        ({}, lambda path: (path / "cat").mkdir(), r"class folder .*/pics/cat holds no .* file: fill it or remove it"),
        ({}, leading_out, r"/pics/cat is a link that leads out of"),
        ({}, without_folders, r"/pics holds no folder: put the images of each class"),
    ],
)
def test_a_data_group_that_cannot_work_is_refused_with_the_remedy(
    folder: Path, change: dict, prepare: Callable[[Path], None] | None, message: str
):
    if prepare is not None:
        prepare(folder)
    with pytest.raises(ValueError, match=message) as raised:
        open_folder(folder, **change)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tfds data set, "tiny", of ArrayRecord splits, written without TensorFlow."""
    root = tmp_path_factory.mktemp("tfds")
    features = tfds.features.FeaturesDict(
        {
            "file": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["ant", "bee"]),
        }
    )
    folder = root / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    splits = []
    for split, count in (("train", 11), ("test", 3), ("unlabelled", 1), ("many", 1030)):
        template = tfds.core.ShardedFileTemplate(
            data_dir=tfds.core.Path(folder), dataset_name="tiny", split=split, filetype_suffix="array_record"
        )
        writer = ArrayRecordWriter(str(folder / f"tiny-{split}.array_record-00000-of-00001"), "group_size:1")
        for i in range(count):
            label = -1 if split == "unlabelled" else i % 2
            image = encoded(noise(i if count < 20 else 0, 16, 16))
            writer.write(features.serialize_example({"file": f"{i}", "image": image, "label": label}))
        writer.close()
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=0, filename_template=template))
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=splits, check_data=False)
    return root


def test_tfds_reads_array_records_as_a_folder_of_the_same_images(prepared: Path, tmp_path: Path):
    fields = {**FIELDS, "source": "tfds", "name": "tiny", "path": str(prepared)}
    dataset = data.open_dataset(**fields)
    assert len(dataset) == 11 and dataset.class_names == ("ant", "bee")
    np.testing.assert_array_equal(dataset.labels, np.arange(11) % 2)
    image, label = data.load_arrays(dataset)
    for i in range(11):
        np.testing.assert_array_equal(image[i], data.decode(encoded(noise(i, 16, 16)), "x", 8, 3))
    np.testing.assert_array_equal(label, dataset.labels)
    assert_same(take(dataset, 4, num_workers=2), take(dataset, 4))
    assert len(data.open_dataset(**{**fields, "split": "train[:4]+test"})) == 4 + 3
    many = data.open_dataset(**{**fields, "split": "many"})
    np.testing.assert_array_equal(many.labels, np.arange(1030) % 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"split": "validation"},
            r"data.split or eval.test_split is 'validation' for the tfds data set 'tiny': Unknown split",
        ),
        ({"name": "tinier"}, r"'tinier' is not prepared as ArrayRecord in .*cfd\[prepare\].*download_and_prepare\(\)"),
        ({"name": "mnist"}, r"'mnist' is not prepared as ArrayRecord in .*file_format='array_record'"),
        ({"path": "/no/such/folder"}, r"'tiny' is not prepared as ArrayRecord in /no/such/folder"),
        ({"name": ""}, r"'' is not prepared"),
        ({"num_classes": 3}, r"num_classes is 3, but tfds data set 'tiny' has 2"),
    ],
)
def test_tfds_that_is_not_there_says_how_to_prepare_it(prepared: Path, change: dict, message: str):
    fields = {**FIELDS, "source": "tfds", "name": "tiny", "path": str(prepared)} | change
    with pytest.raises(ValueError, match=message) as raised:
        data.open_dataset(**fields)
    assert "\n" not in str(raised.value)


def test_tfds_names_the_record(prepared: Path):
    fields = {**FIELDS, "source": "tfds", "name": "tiny", "path": str(prepared)}
    with pytest.raises(ValueError, match="tiny unlabelled record 0 has no label"):
        next(data.batches(data.open_dataset(**{**fields, "split": "unlabelled"}), seed=0, batch_size=1, flip=False))
    with pytest.raises(data.BadImage, match=r"^tiny train record 4 has 16x16 pixels, fewer than .* 32"):
        data.open_dataset(**{**fields, "image_size": 32})[4]


def test_close_stops_the_threads_and_reading_goes_ahead(folder: Path):
    dataset = open_folder(folder)
    before = set(threading.enumerate())
    iterator = data.batches(dataset, seed=0, batch_size=4, flip=False, num_workers=2)
    next(iterator)
    workers = set(threading.enumerate()) - before
    assert len(workers) == 2
    iterator.close()
    iterator.close()
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()


PROGRAM = """
import sys
from cfd import data
fields = dict(source="digits", name="", split="train", path="", image_size=8, channels=1, num_classes=10)
dataset = data.open_dataset(**fields, on_bad_image="raise", in_memory=False)
iterator = data.batches(dataset, seed=0, batch_size=64, flip=False, num_workers=2)
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
