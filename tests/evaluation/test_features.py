"""The feature classifier of a run: how it is trained, stored and opened again."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from cfd.data.batches import load_arrays
from cfd.data.sources import Dataset, open_dataset
from cfd.evaluation import features

pytestmark = pytest.mark.usefixtures("compile_once")


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
    assert outputs.pool.shape == (300, 64) and outputs.spatial is None
    np.testing.assert_allclose(outputs.probs.sum(axis=1), 1.0, rtol=1e-5)
    assert (outputs.probs.argmax(axis=1) == labels).mean() > 0.5  # chance is 0.1
    np.testing.assert_allclose(network.extract(images[:7]).pool, outputs.pool[:7], rtol=1e-4, atol=1e-5)

    again = open_classifier(30)
    assert capsys.readouterr().out == "" and again.weights_hash == network.weights_hash
    np.testing.assert_array_equal(again.extract(images).pool, outputs.pool)
    with pytest.raises(ValueError, match=r"eval\.classifier_steps = 30, not 40: set it to 30, or delete the features"):
        open_classifier(40)


def test_a_damaged_feature_classifier_is_refused_with_the_remedy(digits: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    (folder / "classifier.npz").write_bytes(b"no archive")
    for text in (None, "{}", '{"classifier_steps": 5}'):
        if text:
            (folder / "classifier.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"features is damaged .*: remove this folder, and --mode=sweep creates it again"
        ):
            features.open_classifier(str(tmp_path), one_device(), digits, digits, num_steps=5, flip=False, seed=0)
