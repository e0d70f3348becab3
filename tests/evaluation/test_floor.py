"""The metrics of real images: what is drawn, and what the file holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfd.data.batches import load_arrays
from cfd.data.sources import open_dataset
from cfd.evaluation import features, floor, metrics, reference, scores


def extract(images: np.ndarray) -> features.Outputs:
    """Features without a network: the mean of each quarter of an image, and a class by its brightness."""
    pool = images.reshape(len(images), 4, -1).mean(axis=2) / 255.0
    probs = np.eye(10)[(images.mean(axis=(1, 2, 3)) / 25.6).astype(int)]
    return features.Outputs(pool, None, probs, features.saturation(images))


NETWORK = features.FeatureNetwork("classifier", "f" * 64, extract)


def digits(split: str):
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


@pytest.fixture(scope="module")
def base() -> reference.Reference:
    images = load_arrays(digits("train"))[0]
    found = reference.measure([images], len(images), NETWORK)
    return found._replace(labels=reference.labels_of_features(digits("train"), found))


def test_draws_are_balanced_and_without_replacement() -> None:
    classes = np.array([0] * 5 + [1] * 7 + [2] * 9)
    seen = set()
    for seed in range(20):
        rows = floor.balanced(np.random.default_rng(seed), classes, 10)
        assert len(set(rows)) == 10
        sizes = np.bincount(classes[rows])
        assert sorted(sizes) == [3, 3, 4]
        seen.add(int(sizes.argmax()))
    assert seen == {0, 1, 2}, "the class with one image more is random"


def test_real_images_are_nearer_than_others_and_balanced_ones_nearest(base: reference.Reference) -> None:
    """And KID of real images is 0 within its spread, with or without classes."""
    np.testing.assert_array_equal(base.labels, digits("train").labels)
    balanced, free = (floor.draws_of_real(base._replace(labels=given), 200) for given in (base.labels, None))
    assert balanced["draws"] == 20 and balanced["reason"] == "" and balanced["balanced"] and not free["balanced"]
    assert 0.0 < balanced["fid"]["mean"] < free["fid"]["mean"]
    assert balanced["fid"]["high"] - balanced["fid"]["mean"] == pytest.approx(1.96 * balanced["fid"]["sd"])
    for found in (balanced, free):
        assert abs(found["kid"]["mean"]) < found["kid"]["sd"]


def test_too_few_features_give_a_reason(base: reference.Reference) -> None:
    found = floor.draws_of_real(base, 800)
    assert found["fid"] is None and found["kid"] is None
    assert found["reason"] == "800 images are more than half of the 1,498 whose features the reference has"
    assert floor.draws_of_real(base._replace(features=None), 5)["reason"].endswith(
        "the 0 whose features the reference has"
    )
    assert base.features is not None
    rare = np.where(np.arange(len(base.features)) < 20, 1, 0)
    assert floor.draws_of_real(base._replace(labels=rare), 100)["reason"].startswith("a class has only 20 images")


def test_the_held_out_images_are_measured_and_the_file_comes_back(base: reference.Reference, tmp_path: Path) -> None:
    assert floor.read_floor(str(tmp_path)) is None
    held_out = floor.held_out_metrics("test", digits("test"), NETWORK, base, 100)
    images, labels = (rows[reference.evenly_spaced(299, 100)] for rows in load_arrays(digits("test")))
    assert held_out["split"] == "test" and held_out["images"] == 100
    values = scores.score(iter([(images, labels)]), 100, NETWORK, base).values
    assert {name: held_out[name] for name in values} == values
    assert base.features is not None
    assert held_out["precision"] == metrics.precision_recall(base.features, extract(images).pool)[0]
    real = floor.draws_of_real(base, 100) | {"held_out": held_out}
    floor.write_floor(str(tmp_path), "a" * 64, base, real, 100)
    found = floor.read_floor(str(tmp_path))
    assert found == real | {"reference": "a" * 64, "num_samples": 100, "saturation": base.saturation}
    path = Path(floor.floor_path(str(tmp_path)))
    path.write_text(path.read_text()[:40])
    assert floor.read_floor(str(tmp_path)) is None, "a damaged file is written again"
    assert found is not None
    damages: list[dict[str, Any]] = [
        {"fid": 3},
        {"kid": {"mean": "a"}},
        {"num_samples": "100"},
        {"draws": None},
        {"held_out": []},
        {"held_out": {"split": "test"}},
        {"held_out": held_out | {"is": "8"}},
        {"saturation": "1"},
    ]
    for damage in damages:
        path.write_text(json.dumps(found | damage))
        assert floor.read_floor(str(tmp_path)) is None
