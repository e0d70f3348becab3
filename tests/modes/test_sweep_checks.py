"""Sweeps: all that stands in their way is seen before training, and what biases their numbers before sampling."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from meshes import mesh_of
from PIL import Image
from swept import pixels
from tiny import tiny_config

from cfd.devices import parallel
from cfd.evaluation.features import FeatureNetwork
from cfd.modes import settings, sweep
from cfd.runs import manifest, npz, results

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning"),
]


def images_of_classes(root: Path, **counts: int) -> str:
    """A folder of random 8x8 images with so many per class, for training and for tests."""
    numbers = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(numbers.integers(0, 256, (8, 8), np.uint8))
                image.save(root / split / name / f"{i}.png")
    return str(root)


def folder_config(path: str, **changes: Any) -> Any:
    return tiny_config(data__source="folder", data__path=path, data__num_classes=2, sample__classes=(), **changes)


@pytest.fixture
def run(mixing_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run at step 7 that is swept on one device, with the features `pixels`."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    network = FeatureNetwork("classifier", "f" * 64, pixels)
    monkeypatch.setattr(sweep, "open_features", lambda *_: network)
    return mixing_run


def test_too_few_images_for_the_metrics_are_found_before_training(tmp_path: Path) -> None:
    """Both remedies of the message are followed."""
    data, reference = images_of_classes(tmp_path / "few", cat=2, dog=1), tmp_path / "reference.npz"
    with pytest.raises(ValueError, match=r"data.split 'train' has 3 images, and .* at least 4: .*eval\.reference"):
        sweep.check(folder_config(data), str(tmp_path / "run"))
    npz.write_npz(reference, {"arr_0": np.zeros((4, 8, 8, 1), np.uint8)})
    sweep.check(folder_config(data, eval__reference=str(reference)), str(tmp_path / "run"))
    npz.write_npz(reference, {"arr_0": np.zeros((3, 8, 8, 1), np.uint8)})
    with pytest.raises(ValueError, match=r"reference.npz has 3 images, and precision and recall need at least 4"):
        sweep.check(folder_config(data, eval__reference=str(reference)), str(tmp_path / "run"))
    sweep.check(folder_config(images_of_classes(tmp_path / "enough", cat=2, dog=2)), str(tmp_path / "run"))


def test_results_that_are_there_and_do_not_fit_are_found_before_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "features").mkdir(parents=True)
    (run / "features" / "classifier.json").write_text('{"classifier_steps": 6}')
    npz.write_npz(run / "features" / "classifier.npz", {"kernel": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"classifier.npz was trained in another way: eval\.classifier_steps is 6"):
        sweep.check(tiny_config(), str(run))
    sweep.check(tiny_config(eval__classifier_steps=6), str(run))
    (run / "features" / "classifier.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"classifier\.npz is not a sound .*: remove the folder .*features,"):
        sweep.check(tiny_config(eval__classifier_steps=6), str(run))
    for file in (run / "features").iterdir():  # the remedy
        file.unlink()
    sweep.check(tiny_config(), str(run))
    (run / "sweep.csv").write_text("step,fid\n1,2\n")
    with pytest.raises(ValueError, match=r"sweep.csv has other columns .*: move it away to measure again"):
        sweep.check(tiny_config(), str(run))
    sweep.check(tiny_config(), str(run), str(tmp_path / "out"))


def test_a_reference_that_cannot_be_read_is_found_before_training(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=np.asfortranarray(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)))
    with pytest.raises(ValueError, match="arr_0 is in Fortran order"):
        sweep.check(tiny_config(eval__reference=str(path)), str(tmp_path))


def test_a_ragged_split_of_the_inception_score_is_said_before_sampling(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sampling(Exception):
        pass

    def sampling(*_: Any) -> None:
        raise Sampling

    monkeypatch.setattr(sweep, "measure_cells", sampling)
    with pytest.raises(Sampling), pytest.warns(UserWarning, match="5,001 images are no multiple of 5,000") as warned:
        sweep.sweep(tiny_config(eval__num_samples=5001), str(run), str(run))
    assert len(warned) == 1
    with pytest.raises(Sampling):  # pytest makes a warning an error
        sweep.sweep(tiny_config(eval__num_samples=5000), str(run), str(run))


def test_labels_in_the_shares_of_the_training_split(run: Path) -> None:
    """The digits have between 143 and 154 images per class. The picture names the classes of its images."""
    config = tiny_config(eval__weights=(0.0, 1.0), eval__labels="data", eval__num_samples=25, sample__num_steps=2)
    rows = sweep.sweep(config, str(run), str(run))
    counts = np.bincount(settings.open_split(config, "train").labels)
    for row in rows:
        labels = npz.read_npz(results.samples_path(str(run), row))["arr_1"]
        found = np.bincount(labels, minlength=10)
        assert found.sum() == 25 and np.abs(found - 25 * counts / counts.sum()).max() < 1.0
        np.testing.assert_array_equal(labels, manifest.labels_of("data", 1000, 25, 10, counts.tolist()))
        made = manifest.read_manifest(str(run), row["manifest"])
        assert made is not None and made["class_counts"] == counts.tolist() and row["labels"] == "data"
    assert sweep.sweep(config, str(run), str(run)) == rows, "the rows are used again"
    assert len(results.read_rows(str(run))) == 2


def test_fewer_images_than_classes_have_spread_classes_in_the_samples_and_in_the_picture(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[list[str]] = []
    grid = sweep.figures.grid
    monkeypatch.setattr(
        sweep.figures, "grid", lambda images, rows, w: named.append(list(rows)) or grid(images, rows, w)
    )
    config = tiny_config(eval__weights=(1.0,), eval__num_samples=5, sample__num_steps=2)
    (row,) = sweep.sweep(config, str(run), str(run))
    labels = npz.read_npz(results.samples_path(str(run), row))["arr_1"]
    assert sorted(labels) == [0, 2, 4, 6, 8]
    assert named == [[str(label) for label in labels]]
    made = manifest.read_manifest(str(run), row["manifest"])
    assert made is not None and made["label_policy"] == manifest.FEW_BALANCED
