"""Which files of a folder are read, how their classes are numbered, and layouts that are refused with a remedy."""

import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, noise, open_folder, write

from cfd.data import files, folder
from cfd.data.batches import load_arrays
from cfd.data.decode import BadImage


def put(root: Path, *names: str) -> Path:
    """Images at these places, all different: the last is noise(len(names) - 1)."""
    for i, name in enumerate(names):
        write(root / name, encoded(noise(i)))
    return root


def names_in(root: Path, **changes) -> tuple[str, ...]:
    return open_folder(root, num_classes=0, **changes).class_names


def refusal(root: Path, **changes) -> str:
    with pytest.raises(ValueError) as raised:
        open_folder(root, **{"num_classes": 0} | changes)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_labels_come_from_sorted_names_and_split_folders(tmp_path: Path):
    for split in ("train", "test"):
        for c, name in enumerate(("zebra", "ape", "Cat")):
            for i in range(2):
                write(
                    tmp_path / split / name / f"{i}.{'JPG' if i else 'webp'}", encoded(np.full((8, 8, 3), c, np.uint8))
                )
    dataset = open_folder(tmp_path, num_classes=3)
    assert dataset.class_names == ("Cat", "ape", "zebra") and len(dataset) == 6
    np.testing.assert_array_equal(dataset.labels, [0, 0, 1, 1, 2, 2])
    assert [dataset.read_label(i) for i in range(6)] == dataset.labels.tolist() and dataset.labels.dtype == np.int32
    image, label = load_arrays(dataset, np.array([5, 0]), num_workers=2)
    np.testing.assert_array_equal(label, [2, 0])
    np.testing.assert_array_equal(image[:, 0, 0, 0], [0, 2])
    assert len(open_folder(tmp_path, num_classes=3, split="test")) == 6
    assert len(open_folder(tmp_path / "train", num_classes=3)) == 6
    assert len(dataset.notes) == 1


# Files


def test_a_class_folder_is_read_with_its_folders(tmp_path: Path):
    """tiny-imagenet has train/<class>/images/*.JPEG. The images of a class are sorted by their names in it."""
    put(tmp_path, "train/n01/images/b.JPEG", "train/n01/images/a.JPEG", "train/n02/0.jfif", "train/n02/deep/er/1.jpe")
    dataset = open_folder(tmp_path)
    assert dataset.class_names == ("n01", "n02") and dataset.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(load_arrays(dataset)[0], [noise(i) for i in (1, 0, 2, 3)])


def test_files_that_are_not_read_are_counted_by_reason(tmp_path: Path):
    put(tmp_path, "a/0.png", "a/deep/1.png", "b/0.png", "loose.png", "a/._0.png", "b/._0.png", ".cache/0.png")
    for name in ("a/x.bmp", "a/y.bmp", "a/x.gif", "b/x.TIFF", "b/Makefile", "labels.txt", "a/.DS_Store"):
        write(tmp_path / name, b"not read")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b")
    dataset = open_folder(tmp_path)
    assert len(dataset) == 3
    (_, note) = dataset.notes
    assert note == (
        f"Not read in {tmp_path}: 12 files or folders (.bmp: 2 (a/x.bmp), .gif: 1 (a/x.gif), .tiff: 1 (b/x.TIFF), "
        ".txt: 1 (labels.txt), beside the class folders: 1 (loose.png), hidden: 4 (.cache), "
        "links to folders: 1 (a/link), without a suffix: 1 (b/Makefile))."
    )


def test_dot_files_are_not_images(tmp_path: Path):
    put(tmp_path, "a/0.png", "a/1.png")
    for i in range(2):
        write(tmp_path / "a" / f"._{i}.png", b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    dataset = open_folder(tmp_path, num_classes=1)
    assert len(dataset) == len(load_arrays(dataset)[0]) == 2
    assert "hidden: 2 (a/._" in dataset.notes[-1]


def test_a_class_folder_without_images_says_what_lies_there_and_can_keep_its_number(tmp_path: Path):
    put(tmp_path, "train/a/0.png", "train/c/0.png", "test/a/0.png", "test/b/0.png", "test/c/0.png")
    for i in range(3):
        write(tmp_path / "train" / "b" / f"{i}.bmp", b"BM")
    message = refusal(tmp_path)
    assert (
        f"class folder {tmp_path}/train/b contains no .jpg/" in message and " (.bmp: 3 (b/0.bmp)): fill it" in message
    )
    assert message.endswith("set data.empty_classes = True")
    dataset = open_folder(tmp_path, num_classes=3, empty_classes=True)
    assert dataset.class_names == ("a", "b", "c") and dataset.labels.tolist() == [0, 2]
    assert "Classes without images: 1 (1 = b)." in dataset.notes

    write(tmp_path / "train" / "b" / "0.png", encoded(noise(1)))  # "fill it"
    assert open_folder(tmp_path, num_classes=3).labels.tolist() == [0, 1, 2]
    for file in (tmp_path / "train" / "b").iterdir():  # "or remove it"
        file.unlink()
    (tmp_path / "train" / "b").rmdir()
    assert names_in(tmp_path) == ("a", "c")
    (tmp_path / "nothing" / "a").mkdir(parents=True)
    assert "contains no image: put" in refusal(tmp_path / "nothing", empty_classes=True)


def test_names_with_numbers_are_sorted_as_text_and_that_is_said(tmp_path: Path):
    for c in range(12):
        put(tmp_path / "plain", f"{c}/0.png")
        put(tmp_path / "words", f"class_{c}/0.png")
        put(tmp_path / "padded", f"{c:02}/0.png")
    for root, name in (("plain", "10"), ("words", "class_10")):
        (note,) = open_folder(tmp_path / root, num_classes=12).notes[1:]
        assert note.endswith(f"sorted as text, and not as numbers: class 2 is '{name}'.")
    assert len(open_folder(tmp_path / "padded", num_classes=12).notes) == 1


def test_links_out_of_the_folder_are_refused_and_the_remedy_works(tmp_path: Path):
    outside = put(tmp_path / "outside", "b/0.png")
    for kind in ("class", "file"):
        root = put(tmp_path / kind, "a/0.png")
        if kind == "class":
            (root / "b").symlink_to(outside / "b")
            message = refusal(root)
        else:
            (root / "b").mkdir()
            (root / "b" / "0.png").symlink_to(outside / "b" / "0.png")
            with pytest.raises(BadImage) as raised:
                open_folder(root)[1]
            message = str(raised.value)
        assert f"{root}/b" in message and f"is a link that leads out of {root}: replace links by the files" in message
        command = message.partition("`")[2].partition("`")[0]
        copy = tmp_path / f"{kind}-copy"
        subprocess.run([{"FOLDER": str(root), "COPY": str(copy)}.get(w, w) for w in shlex.split(command)], check=True)
        assert len(load_arrays(open_folder(copy))[0]) == 2
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train").symlink_to(tmp_path / "class-copy")
    assert names_in(tmp_path / "linked") == ("a", "b")


def test_a_file_that_vanished_is_bad_and_a_failing_disk_is_never_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put(tmp_path, "ant/01.png", "ant/02.png")
    dataset = open_folder(tmp_path, num_classes=1, on_bad_image="skip")
    (tmp_path / "ant" / "01.png").unlink()
    with pytest.raises(BadImage, match=r"ant/01\.png no longer exists"):
        dataset[0]
    monkeypatch.setattr(folder, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(BadImage, match=r"ant/02\.png has \d+ bytes, and the limit is 10"):
        dataset[1]

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, "lstat", fail)
    with pytest.raises(ValueError, match=r"ant/02\.png cannot be read \(Input/output error\)"):
        load_arrays(dataset, np.array([1]))
    monkeypatch.setattr(files.os, "scandir", fail)
    assert "cannot be read (Input/output error): repair" in refusal(tmp_path)


def test_the_identity_is_that_of_names_sizes_and_labels(tmp_path: Path):
    def root(name: str) -> Path:
        return put(tmp_path / name, "train/cat/0.png", "train/cat/1.png", "train/dog/0.png")

    def identity(root: Path) -> str:
        return open_folder(root, num_classes=0).identity

    here = identity(root("here"))
    assert len(here) == 64 and int(here, 16)
    assert identity(root("moved")) == identity(root("moved") / "train") == here
    write(root("noted") / "train" / "cat" / "notes.txt", b"of no effect")
    assert identity(tmp_path / "noted") == here
    swapped = root("swapped") / "train"
    (swapped / "cat" / "1.png").rename(swapped / "dog" / "1.png")
    renamed = root("renamed") / "train"
    (renamed / "cat" / "1.png").rename(renamed / "cat" / "2.png")
    other_class = root("class") / "train"
    (other_class / "dog").rename(other_class / "eel")
    resized = root("resized") / "train"
    write(resized / "cat" / "1.png", encoded(noise(1)) + b"\0")
    changed = [identity(root) for root in (swapped, renamed, other_class, resized)]
    assert len({here, *changed}) == 5


# Layouts


@pytest.mark.parametrize(
    "names, classes",
    [
        (("boat/0.png", "train/0.png", "tv/0.png"), ("boat", "train", "tv")),
        (("boat/x/0.png", "train/0.png"), ("boat", "train")),
        (("cat/0.png", "test/0.png", "train/0.png"), ("cat", "test", "train")),
        (("train/a/0.png", "train/train/0.png", "val/a/0.png"), ("a", "train")),
        (("train/a/0.png", "test_2/a/0.png", "Val/a/0.png", "train-old/b/0.png"), ("a",)),
        (("train/a/0.png", "train/loose.png"), ("a",)),
        (("train/vehicles/train/0.png", "train/vehicles/car/0.png"), ("vehicles",)),
        (("only/0.png",), ("only",)),
        (("train station/0.png", "test tube/0.png"), ("test tube", "train station")),
    ],
)
def test_the_whole_layout_decides_what_the_folder_train_is(
    tmp_path: Path, names: tuple[str, ...], classes: tuple[str, ...]
):
    assert names_in(put(tmp_path, *names)) == classes


def test_a_folder_without_images_beside_the_splits_is_no_class(tmp_path: Path):
    put(tmp_path, "train/a/0.png", "test/a/0.png")
    write(tmp_path / "docs" / "README.txt", b"text")
    assert names_in(tmp_path) == ("a",)


def into_train(root: Path):
    """The remedy "move all class folders into a new folder 'train'"."""
    (root / "new").mkdir()
    for path in sorted(root.iterdir()):
        if path.name != "new":
            path.rename(root / "new" / path.name)
    (root / "new").rename(root / "train")


def test_a_train_folder_that_can_be_both_is_refused_and_both_remedies_work(tmp_path: Path):
    root = put(tmp_path, "boat/a/0.png", "train/a/0.png", "train/b/0.png", "tv/a/0.png")
    message = refusal(root)
    assert f"{root}/train can be the split 'train', with the class 'a', or a class beside boat, tv: " in message
    assert f"give data.path = '{root}/train', or" in message
    assert names_in(root / "train") == ("a", "b")
    into_train(root)
    assert names_in(root) == ("boat", "train", "tv")


@pytest.mark.parametrize(
    "moves, message, classes",
    [
        (
            {"cat/0.png": "train/cat/0.png", "dog/0.png": "train/dog/0.png", "val/cat/0.png": "val/cat/0.png"},
            "has no folder 'train', and its folder 'val' can be a split or a class beside cat, dog: put",
            ("cat", "dog"),
        ),
        (
            {"flat/a/0.png": "flat/0.png", "flat/b/0.png": "flat/1.png"},
            "has one folder, 'flat', whose images lie in its folders a, b: give",
            ("flat",),
        ),
        (
            {
                "cat/train/0.png": "train/cat/0.png",
                "cat/test/0.png": "test/cat/0.png",
                "dog/train/0.png": "train/dog/0.png",
            },
            "cat holds the folders test, train, which look like splits: give",
            ("cat", "dog"),
        ),
    ],
)
def test_other_ambiguous_layouts_are_refused_and_the_remedy_works(
    tmp_path: Path, moves: dict[str, str], message: str, classes: tuple[str, ...]
):
    root = put(tmp_path, *moves)
    assert message in refusal(root)
    if "flat/a/0.png" in moves:  # "give data.path = ..., if these are classes"
        assert names_in(root / "flat") == ("a", "b")
    for here, there in moves.items():
        (root / there).parent.mkdir(parents=True, exist_ok=True)
        (root / here).rename(root / there)
    assert names_in(root) == classes


def test_split_folders_of_other_names_are_named(tmp_path: Path):
    root = put(tmp_path / "capital", "Train/a/0.png", "Val/a/0.png")
    message = refusal(root)
    assert f"{root} has no folder of this name, but Train, Val, which look like splits: set data.split to" in message
    assert names_in(root, split="Train") == ("a",)
    message = refusal(root, split="test")
    assert "there is no folder" in message and "(folders there: Train, Val): create it" in message
    assert "slices such as 'train[:90%]' are for data.source = 'tfds'" in refusal(root, split="train[::2]")
    assert "which look like splits without class folders: set" in refusal(
        put(tmp_path / "x", "Train/0.png", "Val/0.png")
    )
    assert "train contains no folder, but files (.png: 1 (0.png)): put" in refusal(
        put(tmp_path / "flat", "train/0.png", "test/0.png")
    )


@pytest.mark.parametrize("split", ["", ".", "..", "x/train", "/etc", "train/", ".hidden"])
def test_a_split_is_the_name_of_one_folder(tmp_path: Path, split: str):
    root = put(tmp_path, "x/train/a/0.png", "train/a/0.png", ".hidden/a/0.png")
    message = refusal(root, split=split)
    assert f"data.split or eval.test_split is {split!r}; for a folder, it is the name of a folder" in message
    assert names_in(root / "x", split="train") == ("a",)


def test_a_file_that_is_no_folder_is_refused(tmp_path: Path):
    archive = write(tmp_path / "images.tar", b"tar")
    assert "is not a folder or a .zip file (unpack it first): give the folder" in refusal(archive)
    assert "is not a folder or a .zip file: give the folder" in refusal(write(tmp_path / "0.png", encoded(noise(0))))
