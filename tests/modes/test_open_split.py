"""The splits that a config names: their notes are printed once, and their classes are compared before training."""

from pathlib import Path
from typing import Any

import pytest
from pictures import encoded, noise, write
from tiny import tiny_config

from cfd.config import as_recorded, with_classes
from cfd.modes import settings, sweep
from cfd.runs.workdir import flatten


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """A config for a folder whose test split lacks one of the three classes."""
    for split, names in (("train", "abc"), ("test", "ab")):
        for name in names:
            for i in range(2):
                write(tmp_path / split / name / f"{i}.png", encoded(noise(i, channels=1)))
    return tiny_config(data__source="folder", data__path=str(tmp_path), data__num_classes=3, sample__classes=())


def test_the_notes_of_a_split_are_printed_once(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test", "train"):
        settings.open_split(config, split)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0].split(" of ")[0] for line in lines] == ["The split 'train'", "The split 'test'"]
    assert lines[0].endswith("6 images in 3 classes, numbered by name: 0 = a, 1 = b, 2 = c.")


@pytest.mark.parametrize("stated", [0, 3])
def test_a_test_split_without_a_class_is_found_before_training_and_the_remedy_works(
    config: Any, tmp_path: Path, stated: int
) -> None:
    """Also if data.num_classes is stated, which counts the classes of the training split."""
    config = config.copy_and_resolve_references().unlock()
    config.data.num_classes = stated
    run = str(tmp_path / "run")
    message = r"^eval\.test_split 'test' lacks the class 'c', which data\.split 'train' has: add its images, or"
    with pytest.raises(ValueError, match=message):
        sweep.check(config, run)
    (tmp_path / "test" / "c").mkdir()  # "an empty folder of its name and data.empty_classes = True"
    config.data.empty_classes = True
    sweep.check(config, run)
    write(tmp_path / "test" / "d" / "0.png", encoded(noise(0, channels=1)))
    with pytest.raises(ValueError, match=r"^eval\.test_split 'test' has the class 'd', which data\.split 'tr"):
        sweep.check(config, run)
    with pytest.raises(ValueError, match=r"is 2, but the split 'train' of data\.path = .* has 3 \(a, b, c\)"):
        config.data.num_classes = 2
        settings.open_split(config, "train")


def test_every_field_of_the_data_that_a_source_reads_reaches_it(config: Any, tmp_path: Path) -> None:
    changed = config.copy_and_resolve_references().unlock()
    write(tmp_path / "train" / "labels.csv", b"file,label\na/0.png,x\nb/0.png,y\nc/0.png,y\n")
    changed.data.update(dict(labels="labels.csv", num_classes=2, max_pixels=63))
    dataset = settings.open_split(changed, "train")
    assert dataset.class_names == ("x", "y")
    with pytest.raises(ValueError, match=r"data\.max_pixels is 63"):
        dataset[0]


def test_a_run_that_is_older_than_the_field_keeps_its_images_as_they_are_stored(config: Any) -> None:
    recorded = {name: value for name, value in flatten(config.to_dict()).items() if name != "data.exif_orientation"}
    assert config.data.exif_orientation and not as_recorded(config, recorded).data.exif_orientation


def test_a_config_with_names_of_classes_is_filled_in(config: Any) -> None:
    config = config.copy_and_resolve_references().unlock()
    config.sample.classes = ("c", 1)
    assert with_classes(config, 3).sample.classes == ("c", 1)
