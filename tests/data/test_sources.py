"""The three sources, the classes that they have, images kept in memory, and data that cannot be used."""

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from pictures import FIELDS, assert_same, encoded, noise, open_folder, take, torn, write

from cfd.data import sources
from cfd.data.batches import batches, load_arrays
from cfd.data.decode import BadImage, decode
from cfd.data.sources import check_classes, open_dataset


def test_digits_are_scikit_learns_split_once_for_all():
    from sklearn.datasets import load_digits

    fields = {**FIELDS, "source": "digits", "path": "", "channels": 1, "num_classes": 10}
    train, test = (open_dataset(**{**fields, "split": split}) for split in ("train", "test"))
    bunch = load_digits(return_X_y=True)
    assert len(train) + len(test) == len(bunch[1]) and len(test) == len(bunch[1]) // 6
    image, label = load_arrays(test)
    np.testing.assert_array_equal(label, bunch[1][5::6])
    np.testing.assert_array_equal(np.round(image[..., 0] / 255 * 16), bunch[0][5::6].reshape(-1, 8, 8))
    assert image.min() == 0 and image.max() == 255 and train.class_names == tuple("0123456789")

    doubled = load_arrays(open_dataset(**{**fields, "split": "test", "image_size": 16, "channels": 3}))[0]
    np.testing.assert_array_equal(doubled, image.repeat(2, 1).repeat(2, 2).repeat(3, 3))
    halved = load_arrays(open_dataset(**{**fields, "split": "test", "image_size": 4}))[0]
    assert np.abs(halved - image.reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))).max() <= 1.0

    for change, remedy in (({"split": "validation"}, "'train' and 'test'"), ({"image_size": 12}, "multiple of 8")):
        with pytest.raises(ValueError, match=remedy):
            open_dataset(**{**fields, **change})


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
    image, label = load_arrays(dataset, np.array([5, 0]), num_workers=2)
    np.testing.assert_array_equal(label, [2, 0])
    np.testing.assert_array_equal(image[:, 0, 0, 0], [0, 2])
    assert len(open_folder(tmp_path, num_classes=3, split="test")) == 6
    assert len(open_folder(tmp_path / "train", num_classes=3)) == 6


def test_a_file_that_vanished_is_bad_and_a_failing_disk_is_never_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "ant" / "00.png").unlink(missing_ok=False)
    dataset = open_folder(folder, on_bad_image="skip")
    (folder / "ant" / "01.png").unlink()
    with pytest.raises(BadImage, match=r"ant/01\.png no longer exists"):
        dataset[0]
    monkeypatch.setattr(sources, "MAX_BYTES", 10)
    with pytest.raises(BadImage, match=r"ant/02\.png has \d+ bytes, and the limit is 10"):
        dataset[1]

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sources.os, "lstat", fail)
    with pytest.raises(ValueError, match=r"ant/02\.png cannot be read \(Input/output error\)"):
        load_arrays(dataset, np.array([1]))


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
        ({"split": "test"}, None, r"eval.test_split is 'test', but there is no folder .*/pics/test: create it"),
        (
            {"num_classes": 10},
            None,
            r"num_classes is 10, but the folder data.path = .* has 2 \(ant, bee\): set .* = 2, or leave it out",
        ),
        ({"channels": 4}, None, r"data.channels is 4; it must be one of \(1, 3\)"),
        ({"image_size": 0}, None, "data.image_size is 0"),
        ({"on_bad_image": "ignore"}, None, "data.on_bad_image is 'ignore'"),
        ({"image_size": 10**6, "in_memory": True}, None, r"17 images .* 51,000,000,000,000 bytes, .*in_memory = False"),
        ({"source": "webdataset"}, None, "data.source is 'webdataset'; it must be one of"),
        (
            {},
            lambda path: (path / "cat").mkdir(),
            r"class folder .*/pics/cat contains no .* file: fill it or remove it",
        ),
        ({}, leading_out, r"/pics/cat is a link that leads out of"),
        ({}, without_folders, r"/pics contains no folder: put the images of each class"),
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


def test_each_image_is_decoded_once_in_memory_and_a_bad_one_stays_bad(folder: Path, monkeypatch: pytest.MonkeyPatch):
    decoded: list[str] = []
    monkeypatch.setattr(sources, "decode", lambda *of: decoded.append(of[1]) or decode(*of))
    dataset = open_folder(folder, in_memory=True)
    take(dataset, 5, batch_size=17)
    images = load_arrays(dataset)[0]
    here = [file for file in decoded if folder in Path(file).parents]  # threads of other tests may still decode
    assert sorted(here) == sorted(map(str, folder.glob("*/*")))
    np.testing.assert_array_equal(images, load_arrays(open_folder(folder))[0])
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0][:] = 0

    dataset = open_folder(torn(folder), in_memory=True)
    for _ in range(3):
        with pytest.raises(BadImage, match=r"13b\.jpg"):
            dataset[14]
    dataset = open_folder(folder, on_bad_image="skip", in_memory=True)
    for _ in range(2):
        np.testing.assert_array_equal(load_arrays(dataset, num_workers=2)[0], images)


def test_an_image_in_memory_is_not_seen_before_it_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    begun, go_on = threading.Event(), threading.Event()

    def slow(*of) -> np.ndarray:
        if folder in Path(of[1]).parents and not begun.is_set():
            begun.set()
            assert go_on.wait(60)
        return decode(*of)

    monkeypatch.setattr(sources, "decode", slow)
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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tfds data set named "tiny", whose ArrayRecord files this fixture writes without TensorFlow."""
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
    dataset = open_dataset(**fields)
    assert len(dataset) == 11 and dataset.class_names == ("ant", "bee")
    np.testing.assert_array_equal(dataset.labels, np.arange(11) % 2)
    image, label = load_arrays(dataset)
    for i in range(11):
        np.testing.assert_array_equal(image[i], decode(encoded(noise(i, 16, 16)), "x", 8, 3))
    np.testing.assert_array_equal(label, dataset.labels)
    assert_same(take(dataset, 4, num_workers=2), take(dataset, 4))
    assert len(open_dataset(**{**fields, "split": "train[:4]+test"})) == 4 + 3
    many = open_dataset(**{**fields, "split": "many"})
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
        ({"num_classes": 3}, r"num_classes is 3, but the tfds data set 'tiny' has 2"),
    ],
)
def test_tfds_that_is_not_there_says_how_to_prepare_it(prepared: Path, change: dict, message: str):
    fields = {**FIELDS, "source": "tfds", "name": "tiny", "path": str(prepared)} | change
    with pytest.raises(ValueError, match=message) as raised:
        open_dataset(**fields)
    assert "\n" not in str(raised.value)


def test_tfds_names_the_record(prepared: Path):
    fields = {**FIELDS, "source": "tfds", "name": "tiny", "path": str(prepared)}
    with pytest.raises(ValueError, match="tiny unlabelled record 0 has no label"):
        next(batches(open_dataset(**{**fields, "split": "unlabelled"}), seed=0, batch_size=1, flip=False))
    with pytest.raises(BadImage, match=r"^tiny train record 4 has 16x16 pixels, fewer than .* 32"):
        open_dataset(**{**fields, "image_size": 32})[4]


def test_reading_the_labels_of_a_tfds_data_set_shows_progress(prepared: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    fields = {**FIELDS, "source": "tfds", "name": "tiny", "path": str(prepared), "split": "many"}
    assert len(open_dataset(**fields).labels) == 1030
    last = terminal.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("read labels: 100%") and "1.03k/1.03k" in last


def test_zero_classes_are_as_many_as_the_data_has(folder: Path):
    dataset = open_folder(folder, num_classes=0)
    assert dataset.class_names == open_folder(folder, num_classes=2).class_names == ("ant", "bee")


@pytest.mark.parametrize(
    "here, message",
    [
        (("ant", "wasp"), "^class 1 is 'bee' in the run x and 'wasp' in data.split 'train': give .* rename"),
        (("bee", "ant"), "^class 0 is 'ant' in the run x and 'bee' in data.split 'train': give .* rename"),
        (("ant",), "^the run x has 2 classes, and data.split 'train' has 1: give"),
        (("ant", "bee", "cat"), "^the run x has 2 classes, and data.split 'train' has 3: give"),
        ((), "^the run x has 2 classes, and data.split 'train' has 0: give"),
    ],
)
def test_classes_that_differ_are_named_or_counted(here: tuple[str, ...], message: str):
    check_classes(["ant", "bee"], "the run x", ("ant", "bee"), "data.split 'train'")
    with pytest.raises(ValueError, match=message):
        check_classes(["ant", "bee"], "the run x", here, "data.split 'train'")
