"""All metrics of a stream of images, in one pass."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int, UInt8

from cfd.errors import UserError
from cfd.evaluation import metrics
from cfd.evaluation.features import FeatureNetwork
from cfd.evaluation.reference import Reference

Batches = Iterator[tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " _n"]]]
"""(images, labels) per batch."""


def score(
    batches: Batches,
    count: int,
    features: FeatureNetwork,
    reference: Reference,
    radii: Float[np.ndarray, " n"] | None = None,
) -> dict[str, float | None]:
    """The metrics of `count` images that come in batches: one value per column in `cfd.runs.results.MEASURED`.

    The pool features of all images stay in memory; the images do not. `radii` are
    `metrics.squared_radii(reference.features)`, if the caller has them already. "class_accuracy" is the fraction of
    images that the feature network assigns to the class in their label. It is None unless the network is the classifier
    of the data set's own classes and every image has a class; -1 stands for none. "sfid" is None if the network or the
    reference has no spatial layer, and "precision" and "recall" are None if the reference has no features. Raises
    ValueError if the number of images is not `count`, or if the classifier has no class of a label.
    """
    pool = spatial = sums = None
    pool_rows, correct, first, labelled = [], 0, 0, features.name == "classifier"
    for images, labels in batches:
        outputs = features.extract(images)
        pool, spatial = metrics.add(pool, outputs.pool), metrics.add(spatial, outputs.spatial)
        batch = metrics.score_sums(outputs.probs, np.arange(first, first + len(images)), count)
        sums = batch if sums is None else metrics.merge_score_sums(sums, batch)
        if features.name == "classifier":
            check_labels(labels, len(images), outputs.probs.shape[1])
            labelled = labelled and bool((labels >= 0).all())
            correct += int((outputs.probs.argmax(-1) == labels).sum())
        pool_rows.append(outputs.pool)
        first += len(images)
    if pool is None or sums is None or first != count:
        raise UserError(f"got {first} images, expected {count}: give the number of images in all batches")
    sfid = None
    if spatial is not None and reference.mu_s is not None and reference.sigma_s is not None:
        sfid = metrics.frechet_distance(reference.mu_s, reference.sigma_s, *metrics.mean_and_cov(spatial))
    precision = recall = None
    if reference.features is not None:
        samples = np.concatenate(pool_rows)
        precision, recall = metrics.precision_recall(reference.features, samples, reference_radii=radii)
    return {
        "fid": metrics.frechet_distance(reference.mu, reference.sigma, *metrics.mean_and_cov(pool)),
        "sfid": sfid,
        "is": metrics.inception_score_from_sums(sums),
        "precision": precision,
        "recall": recall,
        "class_accuracy": correct / count if labelled else None,
    }


def check_labels(labels: Int[np.ndarray, " _n"], count: int, num_classes: int) -> None:
    """Raises ValueError unless there is one label per image, -1 or the number of a class."""
    if labels.shape != (count,):
        raise UserError(f"{count} images came with labels of shape {labels.shape}: give one label per image")
    wrong = labels[(labels < -1) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"label {wrong[0]} is of no class: the feature classifier has the classes 0 to {num_classes - 1}: give "
            "labels of the data set that it was trained on, or -1 for none"
        )
