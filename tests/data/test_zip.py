"""A .zip file is read as the folder that it holds, from several threads and without unpacking."""

import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pictures import assert_same, encoded, noise, open_folder, take, write

from cfd.data import folder as source
from cfd.data.batches import load_arrays
from cfd.data.decode import BadImage


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    """A folder with the splits train (11 and 6 images) and test, what macOS adds, and a file that is not read."""
    root = tmp_path / "divided"
    for i in range(17):
        write(root / "train" / ("ant", "bee")[i > 10] / f"{i:02}.png", encoded(noise(i)))
    write(root / "test" / "bee" / "00.png", encoded(noise(50)))
    write(root / "train" / "ant" / "x.bmp", b"BM")
    write(root / "__MACOSX" / "train" / "ant" / "._00.png", b"companion")
    return root


def packed(root: Path, top: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A .zip file of all files and folders below `root`, inside the folder `top`."""
    file = root.parent / f"{root.name}-{top}-{method}.zip"
    with zipfile.ZipFile(file, "w", method) as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, f"{top}/{path.relative_to(root)}".lstrip("/"))
    return file


@pytest.mark.parametrize("top", ["", "pics"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_file_is_read_as_the_folder(divided: Path, top: str, method: int):
    file = packed(divided, top, method)
    before = sorted(divided.parent.rglob("*"))
    here, there = open_folder(divided), open_folder(file)
    assert here.class_names == there.class_names and here.identity == there.identity
    np.testing.assert_array_equal(here.labels, there.labels)
    assert_same(take(here, 3, num_workers=2), take(there, 3, num_workers=4))
    for dataset in (here, there):
        assert dataset.notes[1].endswith("1 files or folders (.bmp: 1 (ant/x.bmp)).")
    assert open_folder(file, split="test", num_classes=1).class_names == ("bee",)
    assert sorted(divided.parent.rglob("*")) == before, "nothing is unpacked"


def test_an_undivided_zip_file_with_labels(divided: Path):
    write(divided / "train" / "labels.csv", b"file,label\nant/00.png,x\nbee/11.png,y\n")
    file = packed(divided / "train", top="wrapped")
    dataset = open_folder(file, labels="labels.csv")
    assert dataset.class_names == ("x", "y")
    np.testing.assert_array_equal(load_arrays(dataset)[0], [noise(0), noise(11)])
    assert open_folder(file).class_names == ("ant", "bee")


def test_the_remedies_for_an_ambiguous_layout_work_in_a_zip_file(divided: Path):
    write(divided / "train" / "train" / "bee" / "0.png", encoded(noise(1)))
    file = packed(divided / "train")
    with pytest.raises(ValueError, match=rf"can be the split 'train', .* give data\.path = '{file}/train'"):
        open_folder(file)
    assert open_folder(f"{file}/train", num_classes=1).class_names == ("bee",)
    with pytest.raises(ValueError, match=r"\.zip has no folder 'tests': give one of ant, bee, train"):
        open_folder(f"{file}/tests")
    with pytest.raises(
        ValueError, match=r"/train/bee has no folder '0\.png': give the folder that contains one folder"
    ):
        open_folder(f"{file}/train/bee/0.png")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["ant/03.png", "./ant//03.png"])
def test_a_zip_file_that_holds_a_file_twice_is_refused(divided: Path, name: str):
    file = packed(divided / "train")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, encoded(noise(0)))
    with pytest.raises(ValueError, match=r"\.zip holds ant/03\.png twice: keep one of the two"):
        open_folder(file)


def test_a_zip_file_of_one_class_keeps_it(divided: Path):
    (divided / "train" / "ant").rename(divided / "train" / "only")
    single = divided / "single"
    single.mkdir()
    (divided / "train" / "only").rename(single / "only")
    assert open_folder(packed(single), num_classes=1).class_names == ("only",)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_image_in_a_zip_file_is_bad(divided: Path, method: int):
    file = packed(divided / "train", method=method)
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo("ant/03.png")
    content = bytearray(file.read_bytes())
    content[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 1
    file.write_bytes(content)
    dataset = open_folder(file)
    with pytest.raises(BadImage, match=r"\.zip/ant/03\.png is damaged .*: make the \.zip file again"):
        dataset[3]
    np.testing.assert_array_equal(dataset[4][0], noise(4))
    file.unlink()
    with pytest.raises(ValueError, match=r"\.zip cannot be read \(No such file or directory\)"):
        dataset[4]


def test_members_that_cannot_be_read_are_bad_images(divided: Path, monkeypatch: pytest.MonkeyPatch):
    file = packed(divided / "train")
    with zipfile.ZipFile(file, "a") as archive:
        link = zipfile.ZipInfo("bee/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "../ant/00.png")
        archive.writestr("bee/other.png", encoded(noise(0)), zipfile.ZIP_LZMA)
    dataset = open_folder(file, on_bad_image="skip")
    for name, message in (("link", "is a link: make"), ("other", "is encrypted or not packed by deflate: make")):
        with pytest.raises(BadImage, match=rf"bee/{name}\.png {message}"):
            dataset[17 if name == "link" else 18]
    assert len(load_arrays(dataset)[0]) == 17
    monkeypatch.setattr(source, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(BadImage, match=r"ant/00\.png has \d+ bytes, and the limit is 10"):
        dataset[0]


def test_a_file_that_is_no_zip_file_is_refused(tmp_path: Path):
    write(tmp_path / "x.zip", b"PK\3\4 and no more")
    with pytest.raises(ValueError, match=r"x\.zip is not a \.zip file that can be read .*: make it again"):
        open_folder(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "nested.zip", "w") as archive:
        archive.write(tmp_path / "x.zip", "x.zip")
    with pytest.raises(ValueError, match=r"nested\.zip contains no folder, but files \(\.zip: 1 \(x\.zip\)\): put"):
        open_folder(tmp_path / "nested.zip")
    deep = tmp_path / "deep.zip"
    with zipfile.ZipFile(deep, "w") as archive:
        archive.writestr("a/" * 2000 + "0.png", b"")
    with pytest.raises(ValueError, match=r"deeper than 100 folders: make it again"):
        open_folder(deep)


def test_a_declared_size_does_not_take_memory(tmp_path: Path):
    """A file that unpacks to more than it declares is cut there."""
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", bytes(2**20))
    content = bytearray(bomb.read_bytes())
    for signature, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = content.index(signature) + offset
        content[at : at + 4] = (100).to_bytes(4, "little")
    bomb.write_bytes(content)
    dataset = open_folder(bomb, num_classes=1)
    with pytest.raises(BadImage, match=r"a/0\.png is damaged \(its checksum differs\)"):
        dataset[0]
