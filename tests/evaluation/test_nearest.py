"""The nearest training images: against all pairs, of training images themselves, and in spite of bad images."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfd.data.batches import load_arrays
from cfd.data.dataset import Dataset
from cfd.data.decode import BadImage
from cfd.data.sources import open_dataset
from cfd.evaluation import nearest, reference
from cfd.evaluation.features import FeatureNetwork, Outputs
from cfd.runs import npz, results


def extract(images: np.ndarray) -> Outputs:
    """Features without a network: the pixels of all images, and one class."""
    return Outputs(images.reshape(len(images), -1).astype(np.float32), None, np.ones((len(images), 1)))


NETWORK = FeatureNetwork("classifier", "f" * 64, extract)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(
        source="digits",
        name="",
        split="train",
        path="",
        image_size=8,
        channels=1,
        num_classes=10,
        on_bad_image="raise",
        in_memory=False,
    )


def training(dataset: Dataset) -> np.ndarray:
    found = reference.measure([load_arrays(dataset)[0]], len(dataset), NETWORK).features
    assert found is not None
    return found


def row(w: float, name: str, count: int) -> results.Row:
    words = dict.fromkeys(results.SETTINGS, "") | {"step": 1, "num_samples": count, "w": w}
    return words | {"manifest": name}


def write_samples(folder: Path, one: results.Row, images: np.ndarray) -> None:
    with npz.sample_writer(results.samples_path(str(folder), one), len(images), images.shape[1:]) as write:
        write(images, np.arange(len(images)))


def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    assert nearest.read_nearest(str(tmp_path)) is None
    for content in (b"", b"PK\3\4 and no more"):
        (tmp_path / "nearest.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"nearest\.npz is not a sound .*: remove it, and --mode=sweep"):
            nearest.read_nearest(str(tmp_path))
    npz.write_npz(tmp_path / "nearest.npz", {"images": np.zeros(3)})
    with pytest.raises(ValueError, match=r"holds \['images'\], not .*: remove it, and --mode=sweep writes it again"):
        nearest.read_nearest(str(tmp_path))


def test_the_nearest_row_is_that_of_all_pairs() -> None:
    """Also among rows whose distances differ by less than the rounding of float32 products."""
    numbers = np.random.default_rng(0)
    centres = numbers.normal(size=(200, 7))
    close = 1000 + 1e-6 * numbers.normal(size=(50, 7))
    for x, others in ((numbers.normal(size=(30, 7)), centres), (1000 + 1e-6 * numbers.normal(size=(30, 7)), close)):
        squared = ((x[:, None] - others[None]) ** 2).sum(axis=-1)
        index, found = nearest.nearest_rows(x, others)
        np.testing.assert_array_equal(index, squared.argmin(axis=1))
        np.testing.assert_allclose(found, squared.min(axis=1), rtol=1e-12)
        order = numbers.permutation(len(others))
        permuted, again = nearest.nearest_rows(x, others[order])
        np.testing.assert_array_equal(order[permuted], index)
        np.testing.assert_array_equal(again, found)


def test_a_training_image_is_its_own_nearest_at_distance_zero(digits: Dataset, tmp_path: Path) -> None:
    """A second row shows the same images with one pixel changed by 3, which are at distance 3."""
    numbers = np.array([5, 700, 1200, 0])
    images, labels = load_arrays(digits, numbers)
    changed = images.copy()
    changed[:, 4, 4] += np.where(changed[:, 4, 4] > 100, np.uint8(253), np.uint8(3))
    rows = [row(0.0, "a" * 16, 4), row(4.0, "b" * 16, 4)]
    for one, some in zip(rows, (images, changed), strict=True):
        write_samples(tmp_path, one, some)
    assert nearest.read_nearest(str(tmp_path)) is None and not nearest.is_written(str(tmp_path), rows)
    features = training(digits)
    assert nearest.write_nearest(str(tmp_path), rows, NETWORK, features, digits, 2) == ""
    found = nearest.read_nearest(str(tmp_path))
    assert found is not None and nearest.is_written(str(tmp_path), rows)
    assert not nearest.is_written(str(tmp_path), rows[:1])
    np.testing.assert_array_equal(found.w, [0.0, 4.0])
    np.testing.assert_array_equal(found.index, [numbers, numbers])
    np.testing.assert_array_equal(found.distance, [[0.0] * 4, [3.0] * 4])
    np.testing.assert_array_equal(found.samples, [images, changed])
    np.testing.assert_array_equal(found.nearest, [images, images])
    np.testing.assert_array_equal(found.nearest_labels, [labels, labels])
    np.testing.assert_array_equal(found.searched, [len(digits), len(digits)])
    own = [np.partition(((features - x) ** 2).sum(axis=1), 1)[1] for x in features.astype(np.float64)]
    np.testing.assert_allclose(found.typical, np.quantile(np.sqrt(own), nearest.QUANTILES))


def test_a_larger_set_is_searched_at_even_spacing(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (reference, nearest):
        monkeypatch.setattr(module, "NEIGHBOUR_ROWS", 100)
    chosen = np.flatnonzero(reference.evenly_spaced(len(digits), 100))
    images = load_arrays(digits, chosen[[3, 99]])[0]
    one = row(0.0, "a" * 16, 2)
    write_samples(tmp_path, one, images)
    nearest.write_nearest(str(tmp_path), [one], NETWORK, training(digits), digits, 0)
    found: Any = nearest.read_nearest(str(tmp_path))
    np.testing.assert_array_equal(found.index, [chosen[[3, 99]]])
    np.testing.assert_array_equal(found.searched, [100, len(digits)])


def test_bad_images_that_were_skipped_shift_no_number(digits: Dataset, tmp_path: Path) -> None:
    bad = {2, 3, 600}

    def read(index: int) -> tuple[np.ndarray, int]:
        if index in bad:
            raise BadImage(f"image {index} is broken")
        return digits.read(index)

    broken = dataclasses.replace(digits, read=read, on_bad_image="skip")
    features, numbers = training(broken), np.array([0, 10, 1200])
    images = load_arrays(digits, numbers)[0]
    one = row(0.0, "a" * 16, 3)
    write_samples(tmp_path, one, images)
    assert nearest.write_nearest(str(tmp_path), [one], NETWORK, features, broken, 0) == ""
    found: Any = nearest.read_nearest(str(tmp_path))
    np.testing.assert_array_equal(found.index, [numbers])
    np.testing.assert_array_equal(found.nearest, [images])


def test_nothing_is_written_without_samples_or_if_the_data_have_changed(digits: Dataset, tmp_path: Path) -> None:
    one = row(0.0, "a" * 16, 3)
    features = training(digits)
    assert "the samples are missing" in nearest.write_nearest(str(tmp_path), [one], NETWORK, features, digits, 0)
    write_samples(tmp_path, one, load_arrays(digits, np.arange(3))[0])
    changed = dataclasses.replace(digits, read=lambda i: (255 - digits.read(i)[0], digits.read(i)[1]))
    reason = nearest.write_nearest(str(tmp_path), [one], NETWORK, features[:1], changed, 0)
    assert "is not found again" in reason and nearest.read_nearest(str(tmp_path)) is None
