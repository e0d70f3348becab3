"""The reference set: from a data set, from the cache, or from an `.npz`."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config

from cfd.data.batches import load_arrays
from cfd.data.sources import Dataset, open_dataset
from cfd.errors import UserError
from cfd.evaluation import metrics, reference
from cfd.evaluation.features import FeatureNetwork, Outputs
from cfd.runs import npz


def network(name: str = "classifier", weights: str = "a" * 64, spatial: bool = False) -> FeatureNetwork:
    """A feature network without a network: the features are 4 of the 64 pixels and the mean."""

    def extract(images: np.ndarray) -> Outputs:
        flat = images.reshape(len(images), -1).astype(np.float64)
        pool = np.concatenate([flat[:, ::16], flat.mean(axis=1, keepdims=True)], axis=1)
        return Outputs(pool, flat[:, 1:4] if spatial else None, np.full((len(images), 2), 0.5))

    return FeatureNetwork(name, weights, extract)


def digits(split: str = "train") -> Dataset:
    return open_dataset(
        source="digits",
        name="",
        split=split,
        path="",
        image_size=8,
        channels=1,
        num_classes=10,
        on_bad_image="raise",
        in_memory=False,
    )


def hash_of(config: Any, features: FeatureNetwork, dataset: Dataset) -> str:
    return reference.reference_hash(features, dataset, path=config.eval.reference, data=config.data.to_dict())


def open_reference(config: Any, folder: Path, features: FeatureNetwork) -> reference.Reference:
    path = config.eval.reference
    name = hash_of(config, features, digits())
    return reference.open_reference(
        str(folder), features, digits(), name, path=path, image_shape=(8, 8, 1), num_workers=1
    )


def test_the_statistics_are_those_of_the_whole_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 64 * 100)
    features = network(spatial=True)
    found = open_reference(tiny_config(), tmp_path, features)
    images = load_arrays(digits())[0]
    whole = features.extract(images)
    np.testing.assert_allclose(found.mu, whole.pool.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(whole.pool.T), rtol=1e-9, atol=1e-9)
    assert whole.spatial is not None and found.sigma_s is not None
    np.testing.assert_allclose(found.sigma_s, np.cov(whole.spatial.T), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found.features, whole.pool)


def test_a_large_set_is_thinned_evenly_and_comes_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 64 * 100)
    monkeypatch.setattr(reference, "NEIGHBOUR_ROWS", 300)
    features, train = network(spatial=True), digits()
    found = open_reference(tiny_config(), tmp_path, features)
    pool = features.extract(load_arrays(train)[0]).pool
    np.testing.assert_array_equal(found.features, pool[reference.evenly_spaced(len(pool), 300)])
    for one, other in zip(found, open_reference(tiny_config(), tmp_path, features), strict=True):
        assert other is not None
        np.testing.assert_array_equal(one, other)


def test_a_block_without_good_images_is_skipped() -> None:
    images = load_arrays(digits())[0]
    blocks = [images[:500], images[:0], images[500:]]
    found = reference.measure(iter(blocks), len(images), network())
    np.testing.assert_allclose(found.mu, network().extract(images).pool.mean(axis=0), rtol=1e-12)


def test_equal_inputs_are_measured_once(tmp_path: Path) -> None:
    config = tiny_config()
    first = open_reference(config, tmp_path, network())

    def never(images: np.ndarray) -> Outputs:
        raise AssertionError("the reference is in the cache")

    again = open_reference(config, tmp_path, network()._replace(extract=never))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(list((tmp_path / "features").glob("reference_*.npz"))) == 1

    train = digits()
    names = {
        hash_of(config, network(), train),
        hash_of(config, network(weights="b" * 64), train),
        hash_of(tiny_config(data__split="test"), network(), digits("test")),
        hash_of(config, network(), digits("test")),
    }
    negative = dataclasses.replace(train, read=lambda i: (255 - train.read(i)[0], train.read(i)[1]))
    names.add(hash_of(config, network(), negative))
    names.add(hash_of(config, network(), dataclasses.replace(train, identity="f" * 64)))
    assert len(names) == 6, "other weights, another split, other images, and other names or labels: each another name"
    moved = config.data.to_dict() | dict(path="elsewhere", labels="/there.csv", num_workers=7, in_memory=True)
    assert reference.reference_hash(network(), train, path="", data=moved) in names, "the place does not matter"


@pytest.mark.parametrize(
    "content", [b"no archive", {}, {"mu": np.zeros(2)}, {"mu": np.zeros(2), "sigma": np.eye(2), "x": np.eye(2)}]
)
def test_a_damaged_file_of_an_earlier_sweep_is_named_with_the_remedy(
    content: bytes | dict[str, np.ndarray], tmp_path: Path
) -> None:
    first = open_reference(tiny_config(), tmp_path, network())
    (path,) = (tmp_path / "features").glob("reference_*.npz")
    path.write_bytes(content) if isinstance(content, bytes) else npz.write_npz(path, content)
    with pytest.raises(UserError, match=rf"{path.name} .*: remove the file, and --mode=sweep computes it again"):
        open_reference(tiny_config(), tmp_path, network())
    path.unlink()
    for one, other in zip(first, open_reference(tiny_config(), tmp_path, network()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_rows_for_precision_and_recall_are_balanced() -> None:
    labels = np.repeat(np.arange(10), 137)
    chosen = reference.evenly_spaced(len(labels), 100)
    assert chosen.sum() == 100
    assert np.bincount(labels[chosen]).tolist() == [10] * 10
    assert reference.evenly_spaced(3, 10).tolist() == [True] * 3


def openai_file(path: Path, size: int = 8, **arrays: np.ndarray) -> str:
    images = np.random.default_rng(0).integers(0, 256, (30, size, size, 1), np.uint8)
    npz.write_npz(path, {"arr_0": images} | arrays)
    return str(path)


def test_openais_statistics_are_used_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 64 * 10)
    monkeypatch.setattr(reference, "NEIGHBOUR_ROWS", 20)
    statistics = {"mu": np.arange(5.0), "sigma": np.eye(5), "mu_s": np.arange(3.0), "sigma_s": 2 * np.eye(3)}
    monkeypatch.setattr(reference, "STATISTICS", {key: array.shape for key, array in statistics.items()})
    path = openai_file(tmp_path / "reference.npz", **statistics)
    config = tiny_config(eval__reference=path)
    found = open_reference(config, tmp_path, network("inception", spatial=True))
    for key, array in statistics.items():
        np.testing.assert_array_equal(getattr(found, key), array)
    images = npz.read_npz(path)["arr_0"]
    np.testing.assert_array_equal(found.features, network().extract(images[reference.evenly_spaced(30, 20)]).pool)

    with pytest.raises(ValueError, match=r"statistics of InceptionV3, but eval\.features is 'classifier'"):
        open_reference(config, tmp_path / "other", network())


def test_a_batch_without_statistics_is_measured(tmp_path: Path) -> None:
    path = openai_file(tmp_path / "batch.npz")
    found = open_reference(tiny_config(eval__reference=path), tmp_path, network())
    pool = network().extract(npz.read_npz(path)["arr_0"]).pool
    np.testing.assert_allclose(found.sigma, np.cov(pool.T), rtol=1e-9)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def broken(images: np.ndarray) -> Outputs:
        outputs = network().extract(images)
        outputs.pool[3] = np.nan
        return outputs

    with pytest.raises(ValueError, match="rows hold NaN or infinity; the first is row 3"):
        open_reference(tiny_config(), tmp_path, network()._replace(extract=broken))


def test_a_set_too_small_for_its_features_warns_with_the_number(tmp_path: Path) -> None:
    path = openai_file(tmp_path / "few.npz")
    few = network()._replace(extract=lambda images: Outputs(np.random.randn(len(images), 40), None, np.ones((1, 1))))  # noqa: NPY002
    with pytest.warns(UserWarning, match="30 reference images of 40 features give a covariance of rank at most 29"):
        open_reference(tiny_config(eval__reference=path), tmp_path, few)
    with pytest.warns(UserWarning, match="use at least 41 samples"):
        metrics.check_rank(40, 40)


def test_the_hash_of_a_file_is_of_its_content(tmp_path: Path) -> None:
    path = openai_file(tmp_path / "reference.npz")
    config, train = tiny_config(eval__reference=path), digits()
    content = hashlib.sha256(Path(path).read_bytes()).digest()
    expected = hashlib.sha256(network().weights_hash.encode() + content).hexdigest()
    assert hash_of(config, network(), train) == expected
