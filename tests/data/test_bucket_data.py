"""Data sets in a bucket are those of the local copy, and each way not to be readable has one line."""

import os
import re
import shlex
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from gcs import FakeGcs, Request
from pictures import assert_same, encoded, noise, open_folder, take, torn, write
from prepared import fields_of, write_metadata, write_tiny

from cfd.data.batches import batches, load_arrays
from cfd.data.decode import BadImage
from cfd.data.sources import open_dataset

SHARD = "tiny-train.array_record-00000-of-00001"


def upload(bucket: FakeGcs, root: Path, name: str) -> str:
    """Copies a file or a folder into the bucket. Returns its URL."""
    for path in [root] if root.is_file() else sorted(root.rglob("*")):
        if path.is_file():
            bucket.put(f"{name}/{path.relative_to(root)}".removesuffix("/."), path.read_bytes())
    return f"{bucket.url}/{name}"


def reads(bucket: FakeGcs) -> list[str]:
    """The names of the objects whose content was read."""
    return [request.name for request in bucket.requests if request.query.get("alt") == "media"]


def test_tfds_in_a_bucket_is_the_local_copy(bucket: FakeGcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = open_dataset(**fields_of(write_tiny(tmp_path / "data")))
    url = upload(bucket, tmp_path / "data", "data/tfds")
    monkeypatch.chdir(tmp_path)
    there = open_dataset(**fields_of(tmp_path, path=url))
    assert there.identity == here.identity and there.class_names == here.class_names
    assert there.remote and not here.remote
    np.testing.assert_array_equal(there.labels, here.labels)
    assert_same(take(there, 4, num_workers=2), take(here, 4))
    assert open_dataset(**fields_of(tmp_path, path=f"{url}/", split="train[:4]+test")).num_examples == 4 + 3
    assert os.listdir(tmp_path) == ["data"] and not bucket.names("data/tfds/tiny/1.0.0/incomplete")


def test_images_in_memory_are_read_from_the_bucket_once(bucket: FakeGcs, tmp_path: Path) -> None:
    url = upload(bucket, write_tiny(tmp_path / "data"), "tfds")
    dataset = open_dataset(**fields_of(tmp_path, path=url, in_memory=True))
    first = load_arrays(dataset)
    assert any(name.endswith(SHARD) for name in reads(bucket))
    bucket.reset_counts()
    np.testing.assert_array_equal(load_arrays(dataset)[0], first[0])
    take(dataset, 3)
    assert not bucket.requests


@pytest.mark.parametrize("source", ["tfds", "folder"])
def test_the_images_of_a_batch_are_read_at_once(bucket: FakeGcs, tmp_path: Path, folder: Path, source: str) -> None:
    """Each request waits until four are there."""
    url = upload(bucket, write_tiny(tmp_path / "data") if source == "tfds" else folder, "x")
    dataset = open_dataset(**fields_of(tmp_path, path=url, split="train[:8]")) if source == "tfds" else open_folder(url)
    dataset[0]
    together = threading.Barrier(4)

    def wait(request: Request) -> None:
        together.wait(60)

    bucket.fail = wait
    assert len(next(batches(dataset, seed=0, batch_size=8, flip=False))["image"]) == 8
    assert len(load_arrays(dataset, np.arange(8))[0]) == 8
    assert len(dataset.labels) == len(dataset)


def test_a_folder_in_a_bucket_is_the_local_copy(bucket: FakeGcs, folder: Path) -> None:
    write(folder / "ant" / "deeper" / "x.png", encoded(noise(30)))
    write(folder / "ant" / "notes.txt", b"not read")
    write(folder / "ant" / ".hidden.png", b"not read")
    here = open_folder(folder)
    there = open_folder(upload(bucket, folder, "a b/pics"))
    assert there.identity == here.identity and there.class_names == here.class_names
    assert there.notes == tuple(note.replace(str(folder), f"{bucket.url}/a b/pics") for note in here.notes)
    assert len(bucket.requests) == 1, "one listing"
    assert_same(take(there, 3, num_workers=2), take(here, 3))
    np.testing.assert_array_equal(load_arrays(there)[0], load_arrays(here)[0])


def test_splits_and_labels_in_a_bucket(bucket: FakeGcs, folder: Path, tmp_path: Path) -> None:
    table = b"file,label\nant/00.png,x\nbee/11.png,y\n"
    write(folder / "labels.csv", table)
    url, outside = upload(bucket, folder, "pics/train"), f"{bucket.url}/elsewhere/labels.csv"
    bucket.put("elsewhere/labels.csv", table)
    expected = open_folder(folder, labels="labels.csv")
    for path, labels in ((url, "labels.csv"), (f"{bucket.url}/pics", "labels.csv"), (folder, outside), (url, outside)):
        dataset = open_folder(path, labels=labels)
        assert dataset.identity == expected.identity
        np.testing.assert_array_equal(load_arrays(dataset)[0], load_arrays(expected)[0])
    for labels in (f"{bucket.url}/none.csv", "none.csv"):
        with pytest.raises(ValueError, match=r"and there is no file gs://.*none\.csv: give the CSV file"):
            open_folder(url, labels=labels)
    with pytest.raises(ValueError, match=r"there is no folder gs://cfd-test/pics/test \(folders there: train\)"):
        open_folder(f"{bucket.url}/pics", split="test")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_file_in_a_bucket_is_the_local_copy(bucket: FakeGcs, folder: Path, method: int) -> None:
    file = folder.parent / "pics.zip"
    with zipfile.ZipFile(file, "w", method) as archive:
        for path in sorted(folder.rglob("*.png")):
            member = zipfile.ZipInfo.from_file(path, f"train/{path.relative_to(folder)}")
            member.extra = b"\x99\x99\x04\x00abcd" * 20  # longer than what is read beyond the content
            archive.writestr(member, path.read_bytes(), method)
    here, there = open_folder(file), open_folder(upload(bucket, file, "pics.zip"))
    assert there.identity == here.identity == open_folder(folder).identity
    assert_same(take(there, 3, num_workers=2), take(here, 3))
    assert open_folder(f"{bucket.url}/pics.zip/train").identity == here.identity
    with pytest.raises(ValueError, match=r"and gs://cfd-test/pics\.zip has no folder 'val': give one of train"):
        open_folder(f"{bucket.url}/pics.zip/val")
    bucket.put("pics.zip", file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"gs://cfd-test/pics\.zip is not a \.zip file that can be read"):
        open_folder(f"{bucket.url}/pics.zip")


def test_bad_and_missing_images_in_a_bucket(bucket: FakeGcs, folder: Path) -> None:
    url = upload(bucket, torn(folder), "pics")
    here, there = (open_folder(path, on_bad_image="skip") for path in (folder, url))
    assert_same(take(there, 4), take(here, 4))
    dataset = open_folder(url)
    index = int(np.flatnonzero(dataset.labels == 0)[0])
    del bucket.objects["pics/ant/00.png"]
    with pytest.raises(BadImage, match=r"gs://cfd-test/pics/ant/00\.png no longer exists: start again"):
        dataset[index]
    bucket.fail = lambda request: 403
    with pytest.raises(ValueError, match=r"gs://.* cannot be read \(.*Forbidden.*\): repair .* permissions") as raised:
        dataset[index + 1]
    assert not isinstance(raised.value, BadImage), "a refusal depends on the moment, and is not skipped"


@pytest.mark.parametrize("source, field", [("tfds", "path"), ("folder", "path"), ("folder", "labels")])
@pytest.mark.parametrize(
    "url, message",
    [
        ("s3://bucket/x", "s3: is not a scheme that is read: give gs://BUCKET/NAME"),
        ("gs:/cfd-test/x", "does not have the form gs://BUCKET/NAME"),
        ("gs:///x", "does not have the form gs://BUCKET/NAME"),
        ("gs://no-such-bucket/x", "there is no bucket gs://no-such-bucket: correct the name"),
        ("gs://cfd-test/forbidden", "has no permission to (list|read) objects there"),
        ("gs://cfd-test/no-gcsfs", "buckets need gcsfs .*: pip install gcsfs"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused_in_one_line(
    bucket: FakeGcs, folder: Path, source: str, field: str, url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if "forbidden" in url:
        bucket.fail = lambda request: 403
    if "no-gcsfs" in url:
        monkeypatch.setitem(sys.modules, "gcsfs", None)
    fields = {"source": source, "name": "tiny" * (source == "tfds"), "path": str(folder)} | {field: url}
    with pytest.raises(ValueError, match=rf"^data\.{field} is '{re.escape(url)}', .*{message}") as raised:
        open_folder(folder, **fields)
    assert "\n" not in str(raised.value) and sorted(os.listdir()) == ["ant", "bee"]


def test_nothing_at_a_url(bucket: FakeGcs) -> None:
    with pytest.raises(ValueError, match=r"data\.path is 'gs://cfd-test/x/y\.zip/z', and no object lies there: give"):
        open_folder(f"{bucket.url}/x/y.zip/z")


def test_tfds_in_a_bucket_without_credentials_is_refused(
    bucket: FakeGcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Google's C++ client, with which ArrayRecord reads, waits for a metadata server without an end."""
    url = upload(bucket, write_tiny(tmp_path), "tfds")
    monkeypatch.delenv("CLOUD_STORAGE_EMULATOR_ENDPOINT")
    with pytest.raises(ValueError, match=r"waits for credentials for ever.*: run `gcloud auth application-default"):
        open_dataset(**fields_of(tmp_path, path=url))


def test_the_folder_of_tfds_itself_may_be_a_url(bucket: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, message in (("s3://b/x", "s3: is not a scheme"), ("gs://none/x", "there is no bucket gs://none")):
        monkeypatch.setenv("TFDS_DATA_DIR", url)
        with pytest.raises(ValueError, match=rf"^TFDS_DATA_DIR is '{url}', .*{message}"):
            open_dataset(**fields_of(Path(), path=""))


def test_shards_that_are_missing_or_refused_are_named(bucket: FakeGcs, tmp_path: Path) -> None:
    url = upload(bucket, write_tiny(tmp_path), "tfds")
    dataset = open_dataset(**fields_of(tmp_path, path=url))
    bucket.fail = lambda request: 403 if request.name.endswith(SHARD) else None
    with pytest.raises(ValueError, match=rf"tiny train record 4 cannot be read \(.*gs://.*{SHARD}.*\): .* permissions"):
        dataset[4]
    with pytest.raises(ValueError, match=rf"tiny train record 0 cannot be read \(.*{SHARD}"):
        _ = open_dataset(**fields_of(tmp_path, path=url)).labels
    del bucket.objects[f"tfds/tiny/1.0.0/{SHARD}"]
    with pytest.raises(
        ValueError, match=rf"gs://cfd-test/tfds/tiny/1\.0\.0/{SHARD} cannot be read .*: copy or prepare"
    ):
        open_dataset(**fields_of(tmp_path, path=url))


def test_an_unknown_data_set_is_told_what_lies_there(bucket: FakeGcs, tmp_path: Path) -> None:
    url = upload(bucket, write_tiny(tmp_path), "tfds")
    with pytest.raises(ValueError, match=rf"none is prepared in {url} \(there: tiny\): correct data\.name or data\.pa"):
        open_dataset(**fields_of(tmp_path, name="tinier", path=url))
    with pytest.raises(ValueError, match=rf"none is prepared in {url}/none \(there: nothing\): correct"):
        open_dataset(**fields_of(tmp_path, name="tinier", path=f"{url}/none"))


def run_remedy(message: str, bucket: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the command of a message, except for pip, the download, and the programs of Google Cloud."""
    install, python, copy = message[message.index("pip install") :].split(" && ")
    assert install.startswith("pip install tensorflow ")

    def download_and_prepare(builder: Any, download_dir: str = "") -> None:
        target = Path(builder.data_dir)
        target.mkdir(parents=True)
        write_metadata(target, {"train": 3}, "array_record")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    exec(shlex.split(python)[2], {})
    *gcloud, source, target = shlex.split(copy)
    assert gcloud == ["gcloud", "storage", "cp", "-r"] and target.startswith(bucket.url) and target.endswith("/")
    upload(bucket, Path(source), f"{target.removeprefix(f'{bucket.url}/')}{Path(source).name}")


@pytest.mark.parametrize("there", ["nothing", "tfrecord"])
def test_the_command_that_prepares_a_data_set_for_a_bucket_works(
    bucket: FakeGcs, tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ArrayRecord cannot write to a bucket: the data set is prepared on the disk, and copied."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    url = f"{bucket.url}/tfds"
    if there == "tfrecord":
        folder = tmp_path / "tfds" / "mnist" / "3.0.1"
        folder.mkdir(parents=True)
        write_metadata(folder, {"train": 3}, "tfrecord")
        upload(bucket, tmp_path / "tfds", "tfds")
    fields: dict[str, Any] = fields_of(tmp_path, name="mnist", path=url, num_classes=0)
    words = "is not prepared in" if there == "nothing" else "is prepared as tfrecord, and not as ArrayRecord"
    with pytest.raises(ValueError, match=words) as raised:
        open_dataset(**fields)
    run_remedy(str(raised.value), bucket, monkeypatch)
    if there == "tfrecord":
        url = re.findall(r"set data\.path = '(gs://[^']*)'", str(raised.value))[0]
    assert open_dataset(**fields_of(tmp_path, name="mnist", path=url, num_classes=0)).num_examples == 3


def test_reading_from_a_bucket_needs_no_tensorflow(bucket: FakeGcs, tmp_path: Path) -> None:
    url = upload(bucket, write_tiny(tmp_path), "tfds")
    code = f"""
import sys
from cfd.data.sources import open_dataset
dataset = open_dataset(source="tfds", name="tiny", split="train", path={url!r}, image_size=8, channels=3, num_classes=2,
                       on_bad_image="raise", in_memory=False)
print(dataset[0][0].shape, dataset[0][1], "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["(8, 8, 3) 0 False"], done.stderr
    assert sorted(os.listdir(tmp_path)) == ["tiny"]
