"""The class of each image from a table beside the images, and tables that are refused with a remedy."""

from pathlib import Path

import numpy as np
import pytest
from pictures import noise, open_folder, write
from test_folder import names_in, put, refusal

from cfd.data.batches import load_arrays
from cfd.data.sources import check_classes


def table(root: Path, text: str | bytes, name: str = "labels.csv") -> str:
    return write(root / name, text.encode() if isinstance(text, str) else text).name


def test_a_csv_file_gives_the_labels(tmp_path: Path):
    put(tmp_path / "train", "0.png", "sub/1.png", "2.png", "extra.png")
    put(tmp_path / "test", "0.png")
    table(tmp_path / "train", "\ufeffid,label,file\n7,dog,0.png\n8, cat ,sub/1.png\n9,dog,2.png\n,eel,\n")
    table(tmp_path / "test", "file,label\n0.png,dog\n,cat\n,eel\n")
    dataset = open_folder(tmp_path, num_classes=3, labels="labels.csv")
    assert dataset.class_names == ("cat", "dog", "eel") and dataset.labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(load_arrays(dataset)[0], [noise(1), noise(0), noise(2)])
    assert dataset.notes[1:] == (
        "Classes without images: 1 (2 = eel).",
        f"Not read in {tmp_path}/train: 1 files or folders (not in labels.csv: 1 (extra.png)).",
    )
    assert open_folder(tmp_path, num_classes=3, labels="labels.csv", split="test").labels.tolist() == [1]
    absolute = table(tmp_path, "file,label\n0.png,x\n", "elsewhere.csv")
    assert names_in(tmp_path, labels=str(tmp_path / absolute)) == ("x",)

    same = put(tmp_path / "folders", "cat/0.png", "dog/0.png", "dog/1.png")
    listed = open_folder(same, labels=table(same, "file,label\ndog/0.png,dog\ndog/1.png,dog\ncat/0.png,cat\n"))
    (same / "labels.csv").unlink()
    assert listed.identity == open_folder(same).identity, "the same names, sizes and labels"


def test_a_class_that_another_split_lacks_can_be_declared(tmp_path: Path):
    """The remedy is followed."""
    for split in ("train", "test"):
        put(tmp_path / split, "0.png", "1.png")
    table(tmp_path / "train", "file,label\n0.png,cat\n1.png,dog\n")
    table(tmp_path / "test", "file,label\n0.png,dog\n1.png,dog\n")
    expected = names_in(tmp_path, labels="labels.csv")
    with pytest.raises(ValueError, match=r"lacks the class 'cat', .* a row with its label and no file; or give"):
        check_classes(expected, "train", names_in(tmp_path, labels="labels.csv", split="test"), "test")
    table(tmp_path / "test", "file,label\n0.png,dog\n1.png,dog\n,cat\n")
    check_classes(expected, "train", names_in(tmp_path, labels="labels.csv", split="test"), "test")


def test_a_csv_file_as_programs_write_it(tmp_path: Path):
    """Names of `find .`, a space after the comma in the first row, and empty columns, as of a spreadsheet."""
    put(tmp_path, "0.png", "sub/1.png")
    plain = open_folder(tmp_path, labels=table(tmp_path, "file,label\n0.png,a\nsub/1.png,b\n"))
    for text in ("file, label\n./0.png, a\n./sub//1.png, b\n", "file,label,\n0.png,a,,\nsub/1.png,b,,,\n"):
        dataset = open_folder(tmp_path, labels=table(tmp_path, text))
        assert (dataset.identity, dataset.class_names) == (plain.identity, ("a", "b"))


def test_quotes_after_a_space_keep_the_comma_inside_them(tmp_path: Path):
    root = put(tmp_path, "0.png", "a, b.png")
    text = '\ufefffile, label\r\n"a, b.png", "crane, bird"\r\n0.png, crow\r\n'
    dataset = open_folder(root, labels=table(root, text))
    assert dataset.class_names == ("crane, bird", "crow") and dataset.labels.tolist() == [0, 1]


def test_a_dataset_json_gives_the_labels_and_is_not_overlooked(tmp_path: Path):
    """EDM numbers its classes, and its folders are not classes."""
    root = put(tmp_path, "00000/img0.png", "00000/img1.png", "00001/img2.png")
    table(root, '{"labels": [["00000/img0.png", 3], ["00000/img1.png", 10], ["00001/img2.png", 0]]}', "dataset.json")
    assert "holds labels, and data.labels is '': set data.labels = 'dataset.json'" in refusal(root)
    dataset = open_folder(root, num_classes=11, labels="dataset.json")
    assert dataset.class_names == tuple(map(str, range(11))) and dataset.labels.tolist() == [0, 3, 10]
    np.testing.assert_array_equal(load_arrays(dataset)[0], [noise(2), noise(0), noise(1)])
    assert "numbered as in the file" in dataset.notes[0] and "Classes without images: 8" in dataset.notes[1]
    table(root, '{"labels": null}', "dataset.json")
    assert names_in(root) == ("00000", "00001")


@pytest.mark.parametrize(
    "text, message",
    [
        ("id,class\n0.png,a\n", "has the columns 'id', 'class': name one of them file and one label"),
        ("file;label\n0.png;a\n", "has the columns 'file;label': name one of them file and one label"),
        ("file,label,label\n0.png,a,b\n", "has the columns 'file', 'label', 'label': name one of them file"),
        ("file,label\n0.png,crane, bird\n", "line 2, has 3 values for 2 columns: put quotes around a value with"),
        ("file,label\n0.png,\n", "line 2, has no label"),
        ("file,label\n0.png,a\n0.png,b\n", "line 3, lists '0.png' again"),
        ("file,label\n0.png,a\n./0.png,a\n", "line 3, lists '0.png' again"),
        ("file,label\nmissing.png,a\n", "lists 'missing.png', which is not in"),
        ("file,label\n../0.png,a\n", "lists '../0.png', which is not in"),
        ("file,label\n/0.png,a\n", "lists '/0.png', which is not in"),
        ("file,label\n0.PNG,a\n", "(there is '0.png'): add the file, or correct or remove its line"),
        ("file,label\nsub\\1.png,a\n", "(there is 'sub/1.png'): add"),
        ("file,label\n\u00e9.png,a\n", r"(there is 'e\u0301.png'): add"),
        ("file,label\nx.bmp,a\n", "lists 'x.bmp', which is no .jpg/"),
        ("file,label\n", "labels.csv lists no file: add a row for each image"),
        (b"file,label\n\xff\xfe.png,a\n", "cannot be read ('utf-8' codec"),
        ('file,label\n"0.png,a\nsub/1.png,a\n', "cannot be read (unexpected end of data)"),
        ("", "has the columns none: name one of them"),
    ],
)
def test_a_csv_file_that_cannot_work_is_refused(tmp_path: Path, text: str | bytes, message: str):
    put(tmp_path, "0.png", "sub/1.png", "e\u0301.png")
    write(tmp_path / "x.bmp", b"BM")
    assert message in refusal(tmp_path, labels=table(tmp_path, text))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"labels": [["0.png", 1.5]]}', "has ['0.png', 1.5] among its"),
        ('{"labels": [["0.png", -1]]}', "among its"),
        ('{"labels": [["0.png", 1000000000]]}', "with numbers below"),
        ('{"labels": [["0.png", 0], ["0.png", 1]]}', "lists '0.png' twice"),
        ('{"labels": []}', 'has no "labels"'),
        ("[", "cannot be read"),
        (f'{{"labels": [["0.png", {"9" * 5000}]]}}', "cannot be read"),
    ],
)
def test_a_dataset_json_that_cannot_work_is_refused(tmp_path: Path, text: str, message: str):
    put(tmp_path, "0.png")
    assert message in refusal(tmp_path, labels=table(tmp_path, text, "dataset.json"))


@pytest.mark.parametrize("labels", ["missing.csv", "/no/such/labels.csv"])
def test_missing_labels_are_refused(tmp_path: Path, labels: str):
    assert f"data.labels is '{labels}', and there is no file" in refusal(put(tmp_path, "0.png"), labels=labels)
