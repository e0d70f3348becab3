"""All metrics of a stream of images, in one pass, which a thread can make while further images are sampled."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from cfd.errors import UserError
from cfd.evaluation import metrics
from cfd.evaluation.features import FeatureNetwork, Outputs
from cfd.evaluation.reference import Reference

Batches = Iterator[tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " _n"]]]
"""(images, labels) per batch."""
Scores = dict[str, float | None]
"""One value per column in `cfd.runs.results.MEASURED`."""


class Scoring(NamedTuple):
    """Metrics that a thread computes, and the function that gives it the batches.

    `put((outputs, labels))` adds a batch, `put(None)` ends the set, and `put(error)` makes the thread end with `error`.
    The thread ends with the process.
    """

    put: Callable[[Any], None]
    result: Future[Scores]


def score(
    batches: Batches,
    count: int,
    features: FeatureNetwork,
    reference: Reference,
    radii: Float[np.ndarray, " n"] | None = None,
) -> Scores:
    """The metrics of `count` images that come in batches.

    The pool features of all images stay in memory; the images do not. `radii` are
    `metrics.squared_radii(reference.features)`, if the caller has them already. "class_accuracy" is the fraction of
    images that the feature network assigns to the class in their label. It is None unless the network is the classifier
    of the data set's own classes and every image has a class; -1 stands for none. "sfid" is None if the network or the
    reference has no spatial layer, and "precision" and "recall" are None if the reference has no features. Raises
    ValueError if the number of images is not `count`, or if the classifier has no class of a label.
    """
    outputs = ((features.extract(images), labels) for images, labels in batches)
    return score_outputs(outputs, count, features.name, reference, radii)


def start_scoring(
    count: int, features_name: str, reference: Reference, radii: Float[np.ndarray, " n"] | None = None
) -> Scoring:
    """Starts a thread that computes what `score` returns, from outputs of the feature network `features_name`."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    result: Future[Scores] = Future()

    def received() -> Iterator[tuple[Outputs, Int[np.ndarray, " _n"]]]:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def run() -> None:
        try:
            result.set_result(score_outputs(received(), count, features_name, reference, radii))
        except BaseException as error:  # `result` raises it
            result.set_exception(error)

    threading.Thread(target=run, name="metrics", daemon=True).start()
    return Scoring(waiting.put, result)


def score_outputs(
    batches: Iterator[tuple[Outputs, Int[np.ndarray, " _n"]]],
    count: int,
    features_name: str,
    reference: Reference,
    radii: Float[np.ndarray, " n"] | None,
) -> Scores:
    """`score` of the outputs of the feature network called `features_name`, in place of images."""
    pool = spatial = sums = None
    pool_rows, correct, first, labelled = [], 0, 0, features_name == "classifier"
    for outputs, labels in batches:
        pool, spatial = metrics.add(pool, outputs.pool), metrics.add(spatial, outputs.spatial)
        batch = metrics.score_sums(outputs.probs, np.arange(first, first + len(outputs.pool)), count)
        sums = batch if sums is None else metrics.merge_score_sums(sums, batch)
        if features_name == "classifier":
            check_labels(labels, len(outputs.pool), outputs.probs.shape[1])
            labelled = labelled and bool((labels >= 0).all())
            correct += int((outputs.probs.argmax(-1) == labels).sum())
        pool_rows.append(outputs.pool)
        first += len(outputs.pool)
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
