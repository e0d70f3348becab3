"""All metrics of a stream of images, against each metric on its own."""

from collections.abc import Iterator

import numpy as np
import pytest

from cfd.evaluation import features, metrics, reference, scores
from cfd.runs.results import MEASURED


def extract(images: np.ndarray) -> features.Outputs:
    """Features without a network: the pixels, overlapping in two layers, and positive probabilities from them."""
    flat = images.reshape(len(images), 4) / 255
    return features.Outputs(flat[:, :2], flat[:, 1:], (flat + 0.1) / (flat + 0.1).sum(axis=1, keepdims=True))


def random_images(seed: int, count: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (count, 2, 2, 1), np.uint8)


def in_batches(images: np.ndarray, labels: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size))


def test_scores_are_of_the_right_set_features_and_split() -> None:
    """With more images than one split of the Inception Score."""
    references, images = random_images(0, 90, 256), random_images(1, 5100, 200)
    network = features.FeatureNetwork("inception", "f" * 64, extract)
    base = reference.measure([references], 90, network)
    found = scores.score(in_batches(images, np.zeros(5100, np.int32), 700), 5100, network, base)
    assert tuple(found) == MEASURED
    theirs, ours = extract(references), extract(images)
    for key, layer in (("fid", "pool"), ("sfid", "spatial")):
        a, b = getattr(theirs, layer), getattr(ours, layer)
        distance = metrics.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
        assert found[key] == pytest.approx(distance, rel=1e-9)
    with pytest.warns(UserWarning, match="5,100 images are no multiple of 5,000"):
        assert found["is"] == pytest.approx(metrics.inception_score(ours.probs), rel=1e-12)
    assert (found["precision"], found["recall"]) == metrics.precision_recall(theirs.pool, ours.pool)
    assert found["precision"] != found["recall"]
    assert found["class_accuracy"] is None, "Inception's classes are not the data set's"
    assert base.features is not None
    radii = metrics.squared_radii(base.features)
    assert scores.score(in_batches(images, np.zeros(5100, np.int32), 700), 5100, network, base, radii) == found


def test_the_classifier_of_the_data_gives_an_accuracy_and_no_sfid() -> None:
    images, labels = random_images(2, 40, 256), np.arange(40, dtype=np.int32) % 4
    network = features.FeatureNetwork("classifier", "f" * 64, lambda block: extract(block)._replace(spatial=None))
    base = reference.measure([random_images(3, 30, 256)], 30, network)
    found = scores.score(in_batches(images, labels, 7), 40, network, base)
    assert found["sfid"] is None
    assert found["class_accuracy"] == np.mean(extract(images).probs.argmax(axis=1) == labels)


def test_a_reference_without_images_gives_fid_alone() -> None:
    network = features.FeatureNetwork("inception", "f" * 64, extract)
    base = reference.measure([random_images(3, 30, 256)], 30, network)
    labels = np.zeros(40, np.int32)
    whole = scores.score(in_batches(random_images(2, 40, 256), labels, 7), 40, network, base)
    alone = base._replace(features=None, mu_s=None, sigma_s=None)
    found = scores.score(in_batches(random_images(2, 40, 256), labels, 7), 40, network, alone)
    assert found == whole | {"sfid": None, "precision": None, "recall": None}


def test_labels_of_no_class_are_refused_or_not_counted() -> None:
    network = features.FeatureNetwork("classifier", "f" * 64, extract)
    base = reference.measure([random_images(3, 30, 256)], 30, network)
    images, labels = random_images(2, 40, 256), np.arange(40) % 4
    for changed, words in (
        (labels + 1, "label 4 is of no class: the feature classifier has the classes 0 to 3"),
        (labels - 2, "label -2 is of no class"),
        (labels[:1], r"7 images came with labels of shape \(1,\)"),
    ):
        batches = ((images[i : i + 7], changed[i : i + 7]) for i in range(0, 40, 7))
        with pytest.raises(ValueError, match=words):
            scores.score(batches, 40, network, base)
    without = np.where(labels == 3, -1, labels)
    assert scores.score(in_batches(images, without, 7), 40, network, base)["class_accuracy"] is None


@pytest.mark.parametrize("expected", [39, 41])
def test_another_number_of_images_is_refused(expected: int) -> None:
    network = features.FeatureNetwork("classifier", "f" * 64, extract)
    base = reference.measure([random_images(3, 30, 256)], 30, network)
    words = "got 40 images, expected 41" if expected == 41 else r"in \[0, 39\)"
    with pytest.raises(ValueError, match=words):
        scores.score(in_batches(random_images(2, 40, 256), np.zeros(40, np.int32), 7), expected, network, base)
