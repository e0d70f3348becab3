"""The feature classifier of a run: how it is trained, stored and opened again."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax_settings import jax_setting

from cfd.data.batches import load_arrays
from cfd.data.sources import Dataset, open_dataset
from cfd.evaluation import features


def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"), (AxisType.Auto,) * 2)


def open_digits(split: str) -> Dataset:
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


@pytest.fixture
def digits() -> Dataset:
    return open_digits("train")


def test_the_feature_classifier_learns_from_the_very_images(digits: Dataset) -> None:
    seen: list[np.ndarray] = []

    class Seeing(nn.Module):
        @nn.compact
        def __call__(self, images: Any) -> Any:
            jax.debug.callback(lambda rows: seen.append(np.array(rows)), images)
            logits = nn.Dense(10)(images.reshape(len(images), -1) / 255.0)
            return logits, logits

    features.train_classifier(Seeing(), digits, num_steps=2, flip=False, seed=0)
    jax.effects_barrier()
    allowed = {image.tobytes() for image in load_arrays(digits)[0]} | {bytes(64)}
    assert len(np.concatenate(seen)) >= 2 * 128 and {image.tobytes() for image in np.concatenate(seen)} <= allowed


def test_the_classifier_of_a_run_is_trained_once(digits: Dataset, tmp_path: Path, capsys: Any) -> None:
    held_out = open_digits("test")

    def open_classifier(num_steps: int) -> features.FeatureNetwork:
        return features.open_classifier(
            str(tmp_path), one_device(), digits, held_out, num_steps=num_steps, flip=False, seed=0
        )

    network = open_classifier(30)
    assert f"{len(held_out)} held-out images: accuracy" in capsys.readouterr().out
    images, labels = load_arrays(digits, np.arange(300))
    outputs = network.extract(images)
    assert outputs.pool.shape == (300, 64) and outputs.spatial is None and outputs.probs is not None
    np.testing.assert_allclose(outputs.probs.sum(axis=1), 1.0, rtol=1e-5)
    assert (outputs.probs.argmax(axis=1) == labels).mean() > 0.5  # chance is 0.1
    np.testing.assert_allclose(network.extract(images[:7]).pool, outputs.pool[:7], rtol=1e-4, atol=1e-5)

    again = open_classifier(30)
    assert capsys.readouterr().out == "" and again.weights_hash == network.weights_hash
    np.testing.assert_array_equal(again.extract(images).pool, outputs.pool)
    with pytest.raises(ValueError, match=r"eval\.classifier_steps is 30 there and 40 here\. Give the config"):
        open_classifier(40)


def test_a_classifier_that_was_trained_on_other_images_is_refused(
    digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other names, sizes or labels, or other pixels alone. The remedy in the message works."""

    def open_classifier(dataset: Dataset, **changes: Any) -> features.FeatureNetwork:
        options: dict[str, Any] = dict(num_steps=2, flip=False, seed=0) | changes
        return features.open_classifier(str(tmp_path), one_device(), dataset, digits, **options)

    first = open_classifier(digits)
    files = {path: path.read_bytes() for path in (tmp_path / "features").iterdir()}
    renamed = dataclasses.replace(digits, identity="f" * 64)
    negative = dataclasses.replace(digits, read=lambda i: (255 - digits.read(i)[0], digits.read(i)[1]))
    for dataset in (renamed, negative):
        with pytest.raises(ValueError, match="was trained in another way: the hash of the images is"):
            open_classifier(dataset)
    capsys.readouterr()
    copied = open_classifier(digits, seed=7, flip=True)  # from the features folder of another run, to compare the two
    assert copied.weights_hash == first.weights_hash
    said = capsys.readouterr().out
    assert "is that of another run: seed is 0 there and 7 here, data.flip is False there and True here." in said
    assert {path: path.read_bytes() for path in (tmp_path / "features").iterdir()} == files
    moved = dataclasses.replace(digits, on_bad_image="skip")
    assert open_classifier(moved).weights_hash == first.weights_hash

    with pytest.raises(ValueError, match="another way") as error:
        open_classifier(renamed)
    (place,) = re.findall(r"or remove (\S+), and --mode=sweep", str(error.value))
    shutil.rmtree(place)
    open_classifier(renamed)
    recorded = json.loads((tmp_path / "features" / "classifier.json").read_text())
    assert recorded["data"] == features.data_hash(renamed) and recorded["held_out_images"] == len(digits)


def test_a_classifier_of_an_earlier_version_is_used_and_a_line_says_so(
    digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_classifier(num_steps: int = 2) -> features.FeatureNetwork:
        return features.open_classifier(
            str(tmp_path), one_device(), digits, digits, num_steps=num_steps, flip=False, seed=0
        )

    first = open_classifier()
    (tmp_path / "features" / "classifier.json").write_text('{"classifier_steps": 2, "held_out_accuracy": 0.5}')
    capsys.readouterr()
    assert open_classifier().weights_hash == first.weights_hash
    assert "is of an earlier version, which did not record the images of its training" in capsys.readouterr().out
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    open_classifier()
    assert capsys.readouterr().out == "", "process 0 says it for all"
    with pytest.raises(ValueError, match=r"eval\.classifier_steps is 2 there and 3 here"):
        open_classifier(3)


def test_the_classifier_does_not_depend_on_jax_s_default_prng(digits: Dataset) -> None:
    net = features.ImageClassifier(10)
    trained = []
    for implementation in ("threefry2x32", "rbg"):
        with jax_setting("jax_default_prng_impl", implementation):
            trained.append(features.train_classifier(net, digits, num_steps=1, flip=False, seed=3))
    jax.tree.map(np.testing.assert_array_equal, *trained)
    with jax_setting("jax_random_seed_offset", 1), pytest.raises(ValueError, match="jax_random_seed_offset is 1"):
        features.train_classifier(net, digits, num_steps=1, flip=False, seed=3)


def test_a_damaged_feature_classifier_is_refused_with_the_remedy(digits: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    (folder / "classifier.npz").write_bytes(b"no archive")
    for text in (None, "{}", "[]", '{"classifier_steps": 5}'):
        if text:
            (folder / "classifier.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"classifier\.(json|npz) is .*: remove the folder .*features, and --mode=sweep creates it"
        ):
            features.open_classifier(str(tmp_path), one_device(), digits, digits, num_steps=5, flip=False, seed=0)
