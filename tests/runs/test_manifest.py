"""Manifests: everything that a row's numbers depend on is in the name, and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfd.runs import manifest
from cfd.runs.manifest import labels_of, manifest_name, manifest_of, measured_with, read_manifest, write_manifest
from cfd.runs.results import SETTINGS

ROW: dict[str, Any] = {
    "step": 7, "ema": 0.0, "p_uncond": 0.1, "num_steps": 4, "sampler": "ancestral", "v": 0.3,
    "guidance": "classifier-free", "rule": "", "guide": "", "interval": "", "w": 1.0,
    "num_samples": 20, "labels": "balanced", "seed": 1000, "features": "classifier",
}  # fmt: skip
KEYWORDS: dict[str, Any] = {
    "weights": "a" * 64,
    "guide_weights": "",
    "ema_decay": 0.999,
    "network": {"channel_mult": (1, 2)},
    "process": {"logsnr_min": -20.0, "logsnr_max": 20.0},
    "clip": True,
    "data": {"source": "digits", "name": "", "split": "train", "image_size": 8, "path": "/here"},
    "data_identity": "e" * 64,
    "held_out_identity": "d" * 64,
    "reference": "b" * 64,
    "reference_path": "",
    "features": "classifier",
    "features_weights": "c" * 64,
    "guide": {"sha256": "f" * 64},
}


def name(row: dict[str, Any] = ROW, **changes: Any) -> str:
    return manifest_name(manifest_of(row, **KEYWORDS | changes))


def test_the_name_depends_on_everything_that_a_row_depends_on() -> None:
    assert set(ROW) == set(SETTINGS)
    rows = [ROW | {key: "random" if key == "labels" else 123} for key in SETTINGS if key != "features"]
    others = {str: "x", dict: {}, float: 0.5, bool: False}
    changes = [{key: others[type(value)]} for key, value in KEYWORDS.items() if key != "data"]
    data = [{"data": KEYWORDS["data"] | {key: "x"}} for key in ("source", "name", "split", "image_size")]
    names = [name(), *(name(row) for row in rows), *(name(**change) for change in (*changes, *data))]
    assert len(set(names)) == len(names) == 1 + 14 + 13 + 4


def test_the_name_does_not_depend_on_where_files_are_or_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = name(reference_path="/here/a.npz")
    assert name(reference_path="/there/a.npz", data=KEYWORDS["data"] | {"path": "/there"}) == before
    monkeypatch.setattr(manifest.jax, "__version__", "1.0")
    assert manifest_of(ROW, **KEYWORDS)["environment"]["jax"] == "1.0"
    assert name(reference_path="/here/a.npz") == before


def test_a_manifest_is_read_only_if_its_content_has_its_name(tmp_path: Path) -> None:
    content = manifest_of(ROW, **KEYWORDS)
    write_manifest(str(tmp_path), content)
    read = read_manifest(str(tmp_path), name())
    assert read is not None and read["network"] == {"channel_mult": [1, 2]} and manifest_name(read) == name()
    path = tmp_path / "manifests" / f"{name()}.json"
    for damaged in (path.read_text().replace("0.999", "0.99"), "[]", "{", ""):
        path.write_text(damaged)
        assert read_manifest(str(tmp_path), name()) is None
    path.unlink()
    assert read_manifest(str(tmp_path), name()) is None


def test_rows_that_differ_only_in_guidance_belong_in_one_picture(tmp_path: Path) -> None:
    def digest(row: dict[str, Any], **changes: Any) -> str | None:
        write_manifest(str(tmp_path), manifest_of(row, **KEYWORDS | changes))
        return measured_with(str(tmp_path), row | {"manifest": name(row, **changes)})

    one = digest(ROW)
    assert one is not None and one == digest(ROW | {"w": 3.0})
    assert one == digest(ROW | {"guidance": "classifier"}, guide_weights="d" * 64)
    assert one != digest(ROW | {"num_samples": 40}) and one != digest(ROW, reference="e" * 64)
    assert measured_with(str(tmp_path), ROW | {"manifest": "0" * 16}) is None


def test_a_larger_set_of_labels_begins_with_the_same_classes() -> None:
    for policy in ("balanced", "random"):
        small, large = labels_of(policy, 3, 50, 7), labels_of(policy, 3, 700, 7)
        np.testing.assert_array_equal(small, large[:50])
        assert large.dtype == np.int32 and set(large) == set(range(7))
    assert (np.bincount(labels_of("balanced", 3, 700, 7)) == 100).all()
    assert (labels_of("random", 3, 50, 7) != labels_of("random", 4, 50, 7)).any()


@pytest.mark.parametrize(("count", "num_classes"), [(500, 1000), (3, 1000), (7, 10), (1, 5), (999, 1000)])
def test_fewer_balanced_images_than_classes_are_spread_over_the_classes(count: int, num_classes: int) -> None:
    labels = labels_of("balanced", 3, count, num_classes)
    assert labels.dtype == np.int32 and len(labels) == len(set(labels)) == count
    ends = np.concatenate([np.sort(labels), [num_classes]])
    assert ends[0] == 0 and np.diff(ends).max() <= -(-num_classes // count)
    assert (labels_of("balanced", 4, 500, 1000) != labels_of("balanced", 3, 500, 1000)).any()
    text = manifest.label_policy("balanced", count, num_classes).removeprefix("image i is of class i of ")
    names = {"numpy": np, "seed": 3, "num_samples": count, "num_classes": num_classes}
    np.testing.assert_array_equal(labels, eval(text, names))


def test_the_policy_in_a_manifest_is_the_one_that_was_used() -> None:
    balanced = name()
    assert manifest_of(ROW, **KEYWORDS)["label_policy"] == manifest.LABELS["balanced"]
    assert manifest_of(ROW, **KEYWORDS, num_classes=20)["label_policy"] == manifest.LABELS["balanced"]
    few = manifest_of(ROW, **KEYWORDS, num_classes=21)
    assert few["label_policy"] != manifest.LABELS["balanced"] and manifest_name(few) != balanced
    counts = {name(ROW | {"labels": "data"}, class_counts=counts) for counts in ([9, 1], [1, 9], None)}
    assert len(counts) == 3


@pytest.mark.parametrize(
    ("counts", "count", "expected"),
    [
        ([900, 100], 50, [45, 5]),
        ([900, 100], 1000, [900, 100]),
        ([2, 3, 5], 10, [2, 3, 5]),
        ([10, 6, 4], 11, [6, 3, 2]),  # 5.5, 3.3, 2.2
        ([1, 0, 1], 4, [2, 0, 2]),
        ([1] * 10, 5, [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]),  # equal remainders: evenly spaced classes
        ([7] * 3, 8, [3, 3, 2]),
    ],
)
def test_labels_have_the_shares_of_the_data(counts: list[int], count: int, expected: list[int]) -> None:
    labels = labels_of("data", 3, count, len(counts), counts)
    assert labels.dtype == np.int32
    assert np.bincount(labels, minlength=len(counts)).tolist() == expected
    np.testing.assert_array_equal(labels, labels_of("data", 3, count, len(counts), counts))


def test_labels_in_the_shares_of_the_data_are_mixed() -> None:
    """Each split of the Inception score gets each class in its share, within one image at either end."""
    counts = np.random.default_rng(0).integers(1, 1300, 1000)
    labels = labels_of("data", 3, 50_000, 1000, counts.tolist())
    shares = 50_000 * counts / counts.sum()
    whole = np.bincount(labels, minlength=1000)
    assert np.abs(whole - shares).max() < 1.0
    for split in labels.reshape(10, 5000):
        assert np.abs(np.bincount(split, minlength=1000) - whole / 10).max() < 2.0


def test_a_policy_that_is_not_there_and_missing_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="the label policy is 'sorted'; it must be one of balanced, random, data"):
        labels_of("sorted", 3, 50, 7)
    for counts in (None, [1, 2], [0] * 7):
        with pytest.raises(ValueError, match="needs the number of images of each of 7 classes in the training split"):
            labels_of("data", 3, 50, 7, counts)
