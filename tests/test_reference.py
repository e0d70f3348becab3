"""The reference set: from a data set, cached, or from an `.npz`; and what cannot be one."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import tiny_config

from cfd import data, metrics, npz, reference
from cfd.features import FeatureNetwork, Outputs


def network(name: str = "classifier", weights: str = "a" * 64, spatial: bool = False) -> FeatureNetwork:
    """Features that are the pixels of every fourth row and the mean, without a network."""

    def extract(images: np.ndarray) -> Outputs:
        flat = images.reshape(len(images), -1).astype(np.float64)
        pool = np.concatenate([flat[:, ::16], flat.mean(axis=1, keepdims=True)], axis=1)
        return Outputs(pool, flat[:, 1:4] if spatial else None, np.full((len(images), 2), 0.5))

    return FeatureNetwork(name, weights, extract)


def dataset(config: ConfigDict) -> data.Dataset:
    return data.from_config(config.data, "train")


def opened(config: ConfigDict, folder: Path, features: FeatureNetwork) -> reference.Reference:
    train = dataset(config)
    name = reference.reference_hash(config, features, train)
    return reference.open_reference(config, str(folder), features, train, name)


def test_the_statistics_are_those_of_the_whole_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 64 * 100)
    features = network(spatial=True)
    found = opened(tiny_config(), tmp_path, features)
    images = data.load_arrays(dataset(tiny_config()))[0]
    whole = features.extract(images)
    np.testing.assert_allclose(found.mu, whole.pool.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(whole.pool.T), rtol=1e-9, atol=1e-9)
    assert whole.spatial is not None and found.sigma_s is not None
    np.testing.assert_allclose(found.sigma_s, np.cov(whole.spatial.T), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found.features, whole.pool)


def test_a_large_set_is_thinned_evenly_and_comes_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 64 * 100)
    monkeypatch.setattr(reference, "NEIGHBOUR_ROWS", 300)
    features, train = network(spatial=True), dataset(tiny_config())
    found = opened(tiny_config(), tmp_path, features)
    pool = features.extract(data.load_arrays(train)[0]).pool
    np.testing.assert_array_equal(found.features, pool[reference.evenly_spaced(len(pool), 300)])
    for one, other in zip(found, opened(tiny_config(), tmp_path, features), strict=True):
        assert other is not None
        np.testing.assert_array_equal(one, other)


def test_a_block_whose_images_are_all_bad_is_passed_over() -> None:
    images = data.load_arrays(dataset(tiny_config()))[0]
    blocks = [images[:500], images[:0], images[500:]]
    found = reference.measure(iter(blocks), len(images), network())
    np.testing.assert_allclose(found.mu, network().extract(images).pool.mean(axis=0), rtol=1e-12)


def test_it_is_measured_once_for_what_it_is_made_from(tmp_path: Path) -> None:
    config = tiny_config()
    first = opened(config, tmp_path, network())

    def never(images: np.ndarray) -> Outputs:
        raise AssertionError("the reference is in the cache")

    again = opened(config, tmp_path, network()._replace(extract=never))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(list((tmp_path / "features").glob("reference_*.npz"))) == 1

    train = dataset(config)
    names = {
        reference.reference_hash(config, network(), train),
        reference.reference_hash(config, network(weights="b" * 64), train),
        reference.reference_hash(tiny_config(data__split="test"), network(), data.from_config(config.data, "test")),
        reference.reference_hash(config, network(), data.from_config(config.data, "test")),
    }
    negative = dataclasses.replace(train, read=lambda i: (255 - train.read(i)[0], train.read(i)[1]))
    names.add(reference.reference_hash(config, network(), negative))
    assert len(names) == 5, "other weights, another split, other images: another name"
    moved = tiny_config(data__path="elsewhere", data__num_workers=7, data__in_memory=True)
    assert reference.reference_hash(moved, network(), train) in names, "where the data lies does not matter"


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


def test_openais_own_statistics_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_BYTES", 64 * 10)
    monkeypatch.setattr(reference, "NEIGHBOUR_ROWS", 20)
    statistics = {"mu": np.arange(5.0), "sigma": np.eye(5), "mu_s": np.arange(3.0), "sigma_s": 2 * np.eye(3)}
    path = openai_file(tmp_path / "reference.npz", **statistics)
    config = tiny_config(eval__reference=path)
    found = opened(config, tmp_path, network("inception", spatial=True))
    for key, array in statistics.items():
        np.testing.assert_array_equal(getattr(found, key), array)
    images = npz.read_npz(path)["arr_0"]
    np.testing.assert_array_equal(found.features, network().extract(images[reference.evenly_spaced(30, 20)]).pool)

    with pytest.raises(ValueError, match="statistics of InceptionV3, and"):
        opened(config, tmp_path / "other", network())


def test_a_batch_without_statistics_is_measured(tmp_path: Path) -> None:
    path = openai_file(tmp_path / "batch.npz")
    found = opened(tiny_config(eval__reference=path), tmp_path, network())
    pool = network().extract(npz.read_npz(path)["arr_0"]).pool
    np.testing.assert_allclose(found.sigma, np.cov(pool.T), rtol=1e-9)


@pytest.mark.parametrize(
    ("size", "arrays", "words"),
    [
        (16, {}, r"shape \(16, 16, 1\), this config makes uint8 \(8, 8, 1\)"),
        (8, {"arr_0": np.zeros((3, 8, 8, 1), np.float32)}, "float32 images"),
    ],
)
def test_images_of_another_kind_are_refused(tmp_path: Path, size: int, arrays: dict[str, Any], words: str) -> None:
    path = openai_file(tmp_path / "reference.npz", size, **arrays)
    with pytest.raises(ValueError, match=words):
        opened(tiny_config(eval__reference=path), tmp_path, network())


def test_a_file_that_is_no_reference_is_refused(tmp_path: Path) -> None:
    pickled, empty = tmp_path / "pickled.npz", tmp_path / "empty.npz"
    np.savez(pickled, arr_0=np.array([{"a": 1}], object), allow_pickle=True)
    npz.write_npz(empty, {"mu": np.zeros(3)})
    for path, words in ((pickled, "never pickled objects"), (empty, "no images arr_0")):
        with pytest.raises(ValueError, match=words):
            opened(tiny_config(eval__reference=str(path)), tmp_path, network())


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def broken(images: np.ndarray) -> Outputs:
        outputs = network().extract(images)
        outputs.pool[3] = np.nan
        return outputs

    with pytest.raises(ValueError, match="rows hold NaN or infinity, first row 3"):
        opened(tiny_config(), tmp_path, network()._replace(extract=broken))


def test_a_set_too_small_for_its_features_says_the_number(tmp_path: Path) -> None:
    path = openai_file(tmp_path / "few.npz")
    few = network()._replace(extract=lambda images: Outputs(np.random.randn(len(images), 40), None, np.ones((1, 1))))  # noqa: NPY002
    with pytest.warns(UserWarning, match="30 samples give a covariance of rank 29 at most, of 40 features"):
        opened(tiny_config(eval__reference=path), tmp_path, few)
    with pytest.warns(UserWarning, match="use at least 41 samples"):
        metrics.check_rank(40, 40)


def test_the_hash_of_a_file_is_of_its_content(tmp_path: Path) -> None:
    path = openai_file(tmp_path / "reference.npz")
    config, train = tiny_config(eval__reference=path), dataset(tiny_config())
    content = hashlib.sha256(Path(path).read_bytes()).digest()
    expected = hashlib.sha256(network().weights_hash.encode() + content).hexdigest()
    assert reference.reference_hash(config, network(), train) == expected
