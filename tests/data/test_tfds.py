"""Data sets of TensorFlow Datasets: read without TensorFlow, and for each way not to be there, the right remedy."""

import io
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pictures import assert_same, encoded, noise, take
from prepared import fields_of, write_metadata, write_tiny
from tiny import ROOT

from cfd.data import tfds as source
from cfd.data.batches import batches, load_arrays
from cfd.data.decode import BadImage, decode
from cfd.data.sources import open_dataset


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tfds"))


def test_array_records_are_read_as_a_folder_of_the_same_images(prepared: Path):
    dataset = open_dataset(**fields_of(prepared))
    assert len(dataset) == 11 and dataset.class_names == ("ant", "bee")
    np.testing.assert_array_equal(dataset.labels, np.arange(11) % 2)
    assert [dataset.read_label(i) for i in range(11)] == dataset.labels.tolist()
    image, label = load_arrays(dataset)
    for i in range(11):
        np.testing.assert_array_equal(image[i], decode(encoded(noise(i, 16, 16)), "x", 8, 3))
    np.testing.assert_array_equal(label, dataset.labels)
    assert_same(take(dataset, 4, num_workers=2), take(dataset, 4))
    assert len(open_dataset(**fields_of(prepared, split="train[:4]+test"))) == 4 + 3
    many = open_dataset(**fields_of(prepared, split="many"))
    np.testing.assert_array_equal(many.labels, np.arange(1030) % 2)


def test_the_identity_is_that_of_the_shards_and_not_of_their_place(prepared: Path, tmp_path: Path):
    here = open_dataset(**fields_of(prepared)).identity
    assert open_dataset(**fields_of(write_tiny(tmp_path / "moved"))).identity == here
    others = [
        open_dataset(**fields_of(prepared, split=split)).identity for split in ("test", "train[:10]", "train[1:]")
    ]
    others.append(open_dataset(**fields_of(write_tiny(tmp_path / "changed", size=64))).identity)
    assert len({here, *others}) == 5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"split": "validation"}, r"eval.test_split is 'validation', which .* 'tiny' does not have \(Unknown split"),
        ({"split": "train[:200]"}, r"'train\[:200\]', .*slice \[:200\] incompatible with 11 examples\): give .*train"),
        ({"split": "train[5:5]"}, r"'train\[5:5\]', .* \(it selects no example\): give .* train \(11 examples\), test"),
        ({"split": ""}, r"eval.test_split is '', which .*: give one of its splits"),
        ({"name": "tinier"}, r"data.name is 'tinier'; tfds has no data set of this name, .*there: tiny\): correct"),
        ({"path": "/no/such/folder"}, r"'tiny'; .* none is prepared in /no/such/folder \(there: nothing\): correct"),
        ({"name": ""}, "data.name is '': give the name"),
        ({"name": "mnist/seven"}, r"data.name is 'mnist/seven', which .*BuilderConfig seven not found.*: give NAME"),
        ({"name": "mnist:9.9.9"}, r"'mnist:9.9.9', which .*only: 3\.0\.1\.\): give NAME, NAME/CONFIG or"),
        ({"num_classes": 3}, r"num_classes is 3, but the split 'train' of the tfds data set tiny/1.0.0 has 2"),
    ],
)
def test_each_cause_has_its_own_message(prepared: Path, change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as raised:
        open_dataset(**fields_of(prepared, **change))
    assert "\n" not in str(raised.value)


def run_remedy(message: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Runs the command of a message, except for pip and the download: what would be prepared, and where."""
    install, _, python = message[message.index("pip install") :].partition(" && ")
    assert install.split()[2:] == list(source.PREPARE)
    command = shlex.split(python)
    assert command[:2] == ["python", "-c"] and len(command) == 3
    made: dict[str, str] = {}

    def download_and_prepare(builder: Any, download_dir: str = "") -> None:
        made.update(place=str(builder.data_dir), format=builder.info.file_format.value, downloads=download_dir)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    exec(command[2], {})
    return made


def test_the_command_that_prepares_a_data_set_works_where_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = tmp_path / 'it\'s a "folder"'
    with pytest.raises(ValueError, match=r"'mnist' is not prepared in .* Prepare it once: pip install") as raised:
        open_dataset(**fields_of(place, name="mnist"))
    made = run_remedy(str(raised.value), monkeypatch)
    assert made == {"place": f"{place}/mnist/3.0.1", "format": "array_record", "downloads": ""}


def test_a_data_set_of_tfrecord_files_is_prepared_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """tfds refuses a second format in the folder of the first."""
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    write_metadata(folder, {"train": 3}, "tfrecord")
    with pytest.raises(
        ValueError, match=r"is prepared as tfrecord, and not as ArrayRecord.*set data\.path = "
    ) as raised:
        open_dataset(**fields_of(tmp_path, name="mnist"))
    made = run_remedy(str(raised.value), monkeypatch)
    other = tmp_path / "array_record"
    assert f"set data.path = '{other}'" in str(raised.value)
    expected = {"place": f"{other}/mnist/3.0.1", "format": "array_record", "downloads": f"{tmp_path}/downloads"}
    assert made == expected

    unknown = tmp_path / "mine" / "1.0.0"
    unknown.mkdir(parents=True)
    write_metadata(unknown, {"train": 3}, "tfrecord")
    with pytest.raises(ValueError, match=r"'mine' .* tfds does not know how to make it: make it again, with the prog"):
        open_dataset(**fields_of(tmp_path, name="mine"))


def test_the_remedies_install_the_packages_of_the_extras(prepared: Path, monkeypatch: pytest.MonkeyPatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(source.PACKAGES) == sorted(extras["tfds"])
    assert sorted(source.PREPARE) == sorted(extras["prepare"])
    assert set(source.PACKAGES) <= set(extras["test"])
    for missing in ("tensorflow_datasets", "array_record.python.array_record_data_source"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, missing, None)
            with pytest.raises(ValueError, match=r"needs TensorFlow Datasets .*: pip install ") as raised:
                open_dataset(**fields_of(prepared))
        assert shlex.split(str(raised.value).partition("pip install ")[2]) == list(source.PACKAGES)


def test_a_missing_shard_is_named_at_the_start(tmp_path: Path):
    folder = write_tiny(tmp_path) / "tiny" / "1.0.0"
    (folder / "tiny-test.array_record-00000-of-00001").unlink()
    with pytest.raises(ValueError, match=r"tiny-test\.array_record-00000-of-00001 cannot be read .*: copy or prepare"):
        open_dataset(**fields_of(tmp_path, split="test"))
    assert len(open_dataset(**fields_of(tmp_path))) == 11


def test_messages_name_the_record(prepared: Path):
    with pytest.raises(ValueError, match="tiny unlabelled record 0 has no label"):
        next(batches(open_dataset(**fields_of(prepared, split="unlabelled")), seed=0, batch_size=1, flip=False))
    with pytest.raises(BadImage, match=r"^tiny train record 4 has 16x16 pixels, fewer than .* 32"):
        open_dataset(**fields_of(prepared, image_size=32))[4]


def test_reading_the_labels_shows_progress(prepared: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert len(open_dataset(**fields_of(prepared, split="many")).labels) == 1030
    last = terminal.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("read labels: 100%") and "1.03k/1.03k" in last
