"""The checks of `open_dataset` for every source, images kept in memory, and the comparison of classes."""

import inspect
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import FIELDS, encoded, noise, open_folder, take, torn, write

from cfd.data import sources
from cfd.data.batches import load_arrays
from cfd.data.decode import BadImage, decode
from cfd.data.sources import check_classes, open_dataset
from cfd.fields import FIELDS as CONFIG_FIELDS


def without_folders(path: Path):
    for file in path.glob("*/*"):
        file.rename(path / file.name)
    for name in ("ant", "bee"):
        (path / name).rmdir()


@pytest.mark.parametrize(
    "change, prepare, message",
    [
        ({"path": ""}, None, "data.path is '', which is not a folder or a .zip file: give"),
        ({"path": "/no/such/folder"}, None, "'/no/such/folder', which is not a folder or a .zip file: give"),
        ({"split": "test"}, None, r"eval.test_split is 'test', but there is no folder .*/pics/test .*: create it"),
        (
            {"num_classes": 10},
            None,
            r"num_classes is 10, but the split 'train' of data.path = .* has 2 \(ant, bee\): set .* = 2, or leave it",
        ),
        ({"channels": 4}, None, r"data.channels is 4; it must be one of \(1, 3\)"),
        ({"image_size": 0}, None, "data.image_size is 0"),
        ({"on_bad_image": "ignore"}, None, "data.on_bad_image is 'ignore'"),
        ({"transparency": "pink"}, None, "data.transparency is 'pink'; it must be one of .*'refuse', 'white'"),
        ({"max_pixels": 0}, None, "data.max_pixels is 0; it must be from 1 to"),
        ({"image_size": 10**6, "in_memory": True}, None, r"17 images .* 51,000,000,000,000 bytes, .*in_memory = False"),
        ({"source": "webdataset"}, None, "data.source is 'webdataset'; it must be one of"),
        ({}, lambda path: (path / "cat").mkdir(), r"class folder .*/pics/cat contains no .* file: fill it or remove"),
        ({}, without_folders, r"/pics contains no folder, but files \(\.png: 17 \(00\.png\)\): put the images"),
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


OTHER = {
    "name": "cifar10",
    "path": "/does/not/exist",
    "labels": "labels.csv",
    "empty_classes": True,
    "transparency": "white",
    "max_pixels": 10,
}


@pytest.mark.parametrize(
    "source, fields",
    [
        ("digits", ("name", "path", "labels", "empty_classes", "transparency", "max_pixels")),
        ("folder", ("name",)),
        ("tfds", ("labels", "empty_classes")),
    ],
)
def test_a_field_that_the_source_does_not_read_is_refused_by_name(source: str, fields: tuple[str, ...]):
    for field in fields:
        with pytest.raises(ValueError) as raised:
            open_dataset(**{**FIELDS, "source": source, "path": "", field: OTHER[field]})
        message = str(raised.value)
        assert message.startswith(f"data.{field} is {OTHER[field]!r}, but data.source {source!r} does not read it: set")
        assert message.endswith(f"or data.{field} to {CONFIG_FIELDS[f'data.{field}'].default!r}")


def test_the_remedy_for_a_field_that_is_not_read_works(folder: Path):
    fields = {**FIELDS, "source": "digits", "path": str(folder), "num_classes": 0}
    with pytest.raises(ValueError, match=r"set data\.source to 'folder' or 'tfds', or data\.path to ''"):
        open_dataset(**fields)
    assert open_dataset(**{**fields, "source": "folder"}).class_names == ("ant", "bee")
    assert open_dataset(**{**fields, "path": ""}).class_names == tuple("0123456789")


def test_the_defaults_are_those_of_the_config():
    """A caller of the library who leaves out a field gets what a config gets that leaves it out."""
    parameters = inspect.signature(open_dataset).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert len(defaults) == 5 and defaults == {name: CONFIG_FIELDS[f"data.{name}"].default for name in defaults}
    for name, (_, default) in sources.READ_BY.items():
        assert default == CONFIG_FIELDS[f"data.{name}"].default


def test_one_line_says_how_many_images_there_are_and_how_classes_are_numbered(folder: Path):
    assert open_folder(folder).notes == (
        f"The split 'train' of data.path = '{folder}': 17 images in 2 classes, numbered by name: 0 = ant, 1 = bee.",
    )
    digits = open_dataset(**{**FIELDS, "source": "digits", "path": "", "num_classes": 10})
    assert digits.notes[0].endswith("1,498 images in 10 classes, numbered by digit: 0 = 0, 1 = 1, 2 = 2, ..., 9 = 9.")


def test_each_image_is_decoded_once_in_memory_and_a_bad_one_stays_bad(folder: Path, monkeypatch: pytest.MonkeyPatch):
    decoded: list[str] = []
    monkeypatch.setattr(sources, "decode", lambda *of, **how: decoded.append(of[1]) or decode(*of, **how))
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

    def slow(*of, **how) -> np.ndarray:
        if folder in Path(of[1]).parents and not begun.is_set():
            begun.set()
            assert go_on.wait(100)
        return decode(*of, **how)

    monkeypatch.setattr(sources, "decode", slow)
    dataset = open_folder(folder, in_memory=True)
    first: list[tuple[np.ndarray, int]] = []
    thread = threading.Thread(target=lambda: first.append(dataset[12]))
    thread.start()
    assert begun.wait(100)
    second = dataset[12][0].copy(), dataset[12][1]
    go_on.set()
    thread.join()
    for image, label in (*first, second):
        np.testing.assert_array_equal(image, noise(12))
        assert label == 1


def test_zero_classes_are_as_many_as_the_data_has(folder: Path):
    dataset = open_folder(folder, num_classes=0)
    assert dataset.class_names == open_folder(folder, num_classes=2).class_names == ("ant", "bee")


def test_the_settings_of_decoding_reach_the_decoder(folder: Path):
    write(folder / "ant" / "00.png", encoded(np.dstack([noise(0), np.zeros((8, 8), np.uint8)])))
    with pytest.raises(BadImage, match=r'transparent pixels: set data\.transparency = "white"'):
        open_folder(folder)[0]
    assert open_folder(folder, transparency="white")[0][0].min() == 255
    with pytest.raises(BadImage, match=r"8x8 = 64 pixels, and data\.max_pixels is 63: raise data\.max_pixels"):
        open_folder(folder, max_pixels=63)[1]
    np.testing.assert_array_equal(open_folder(folder, max_pixels=64)[1][0], noise(1))


@pytest.mark.parametrize(
    "here, message",
    [
        (("ant", "wasp"), "^class 1 is 'bee' in the run x and 'wasp' in data.split 'train': give .* rename"),
        (("bee", "ant"), "^class 0 is 'ant' in the run x and 'bee' in data.split 'train': give .* rename"),
        (("aphid", "ant", "cat"), "^class 0 is 'ant' in the run x and 'aphid' in data.split 'train'"),
        (("ant",), "^data.split 'train' lacks the class 'bee', which the run x has: add"),
        (("ant", "bee", "cat"), "^data.split 'train' has the class 'cat', which the run x lacks: remove"),
        (("aphid", "ant", "bee", "cat"), "^data.split 'train' has the classes 'aphid', 'cat', which the run x lacks"),
        ((), "^data.split 'train' lacks the classes 'ant', 'bee', which the run x has: add"),
    ],
)
def test_classes_that_differ_are_named(here: tuple[str, ...], message: str):
    check_classes(["ant", "bee"], "the run x", ("ant", "bee"), "data.split 'train'")
    with pytest.raises(ValueError, match=message):
        check_classes(["ant", "bee"], "the run x", here, "data.split 'train'")
