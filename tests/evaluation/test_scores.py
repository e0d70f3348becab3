"""All metrics of a stream of images, against each metric on its own."""

from collections.abc import Iterator

import numpy as np
import pytest

from cfd.evaluation import features, metrics, reference, scores
from cfd.evaluation.intervals import groups
from cfd.runs.results import MEASURED


def extract(images: np.ndarray) -> features.Outputs:
    """Features without a network: the pixels, overlapping in two layers, and positive probabilities from them."""
    flat = images.reshape(len(images), 4) / 255
    probs = (flat + 0.1) / (flat + 0.1).sum(axis=1, keepdims=True)
    return features.Outputs(flat[:, :2], flat[:, 1:], probs, features.saturation(images))


def random_images(seed: int, count: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (count, 2, 2, 1), np.uint8)


def in_batches(images: np.ndarray, labels: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size))


def test_scores_are_of_the_right_set_features_and_split() -> None:
    """With more images than one split of the Inception Score."""
    references, images = random_images(0, 90, 256), random_images(1, 5100, 200)
    network = features.FeatureNetwork("inception", "f" * 64, extract)
    base = reference.measure([references], 90, network)
    held_out = reference.measure([random_images(4, 50, 256)], 50, network)
    scored = scores.score(in_batches(images, np.zeros(5100, np.int32), 700), 5100, network, base, held_out)
    found = scored.values
    assert tuple(found) == MEASURED
    assert scored.without.keys() == {name for name, value in found.items() if value is not None}
    assert {len(values) for values in scored.without.values()} == {20}
    theirs, ours = extract(references), extract(images)
    for key, layer in (("fid", "pool"), ("sfid", "spatial")):
        a, b = getattr(theirs, layer), getattr(ours, layer)
        distance = metrics.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
        assert found[key] == pytest.approx(distance, rel=1e-9)
    assert ours.probs is not None
    with pytest.warns(UserWarning, match="5,100 images are no multiple of 5,000"):
        assert found["is"] == pytest.approx(metrics.inception_score(ours.probs), rel=1e-12)
    assert (found["precision"], found["recall"]) == metrics.precision_recall(theirs.pool, ours.pool)
    assert found["precision"] != found["recall"]
    assert found["class_accuracy"] is None, "Inception's classes are not the data set's"
    assert found["saturation"] == ((images <= 6) | (images >= 249)).mean()
    distance = metrics.frechet_distance(held_out.mu, held_out.sigma, ours.pool.mean(0), np.cov(ours.pool.T))
    assert found["fid_test"] == pytest.approx(distance, rel=1e-9)
    prepared = scores.prepare(base, held_out)
    again = in_batches(images, np.zeros(5100, np.int32), 700)
    assert scores.score(again, 5100, network, base, held_out, prepared) == scored


def test_the_classifier_of_the_data_gives_an_accuracy_and_no_sfid() -> None:
    images, labels = random_images(2, 40, 256), np.arange(40, dtype=np.int32) % 4
    network = features.FeatureNetwork("classifier", "f" * 64, lambda block: extract(block)._replace(spatial=None))
    base = reference.measure([random_images(3, 30, 256)], 30, network)
    found = scores.score(in_batches(images, labels, 7), 40, network, base)
    assert found.values["sfid"] is None and found.values["fid_test"] is None
    probs = extract(images).probs
    assert probs is not None
    correct = probs.argmax(axis=1) == labels
    assert found.values["class_accuracy"] == np.mean(correct)
    assert [row["class"] for row in found.classes] == [0, 1, 2, 3]
    assert [row["class_accuracy"] for row in found.classes] == [correct[labels == c].mean() for c in range(4)]
    assert np.mean([row["precision"] for row in found.classes]) == pytest.approx(found.values["precision"])
    assert {row["images"] for row in found.classes} == {10}


def test_without_a_group_the_metrics_are_those_of_the_images_that_are_left() -> None:
    """All of them, by scoring these images alone. The Inception Score has one split."""
    images, labels = random_images(5, 60, 256), np.arange(60, dtype=np.int32) % 3
    network = features.FeatureNetwork("classifier", "f" * 64, extract)
    base = reference.measure([random_images(3, 30, 256)], 30, network)
    whole = scores.score(in_batches(images, labels, 13), 60, network, base, base)
    group = groups(labels)
    assert whole.without.keys() == set(MEASURED)
    for g in (0, 11):
        left = group != g
        alone = scores.score(in_batches(images[left], labels[left], 60), int(left.sum()), network, base, base).values
        for name, value in alone.items():
            assert whole.without[name][g] == pytest.approx(value, rel=1e-8, abs=1e-12), name


def test_a_network_without_probabilities_gives_no_inception_score_and_no_accuracy() -> None:
    network = features.FeatureNetwork("dinov2", "f" * 64, lambda block: extract(block)._replace(probs=None))
    base = reference.measure([random_images(3, 30, 256)], 30, network)
    found = scores.score(in_batches(random_images(2, 40, 256), np.zeros(40, np.int32), 7), 40, network, base)
    assert found.values["is"] is None and found.values["class_accuracy"] is None
    assert found.values["fid"] is not None and "is" not in found.without


def test_a_reference_without_images_gives_fid_alone() -> None:
    network = features.FeatureNetwork("inception", "f" * 64, extract)
    base = reference.measure([random_images(3, 30, 256)], 30, network)
    labels = np.zeros(40, np.int32)
    whole = scores.score(in_batches(random_images(2, 40, 256), labels, 7), 40, network, base)
    alone = base._replace(features=None, mu_s=None, sigma_s=None)
    found = scores.score(in_batches(random_images(2, 40, 256), labels, 7), 40, network, alone)
    assert found.values == whole.values | {"sfid": None, "kid": None, "precision": None, "recall": None}
    assert found.without == {name: whole.without[name] for name in ("fid", "is", "saturation")}


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
    assert scores.score(in_batches(images, without, 7), 40, network, base).values["class_accuracy"] is None


@pytest.mark.parametrize("expected", [39, 41])
def test_another_number_of_images_is_refused(expected: int) -> None:
    network = features.FeatureNetwork("classifier", "f" * 64, extract)
    base = reference.measure([random_images(3, 30, 256)], 30, network)
    words = "got 40 images, expected 41" if expected == 41 else r"in \[0, 39\)"
    with pytest.raises(ValueError, match=words):
        scores.score(in_batches(random_images(2, 40, 256), np.zeros(40, np.int32), 7), expected, network, base)
