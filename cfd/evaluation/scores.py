"""All metrics of a stream of images, in one pass, which a thread can make while further images are sampled."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from cfd.errors import UserError
from cfd.evaluation import kid, leave_out, metrics
from cfd.evaluation.features import FeatureNetwork, Outputs
from cfd.evaluation.intervals import groups
from cfd.evaluation.reference import Reference

Batches = Iterator[tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " _n"]]]
"""(images, labels) per batch."""


class Scores(NamedTuple):
    """The metrics of a set of images.

    `values` has one value per column in `cfd.runs.results.MEASURED`, None for a metric that is not measured. `without`
    has, for the others, the values without each group of images, for `cfd.evaluation.intervals`; it leaves out a metric
    of which the remaining images would be too few. `classes` has one dictionary per class that has images: "class",
    "images", and "class_accuracy" and "precision" of these images, each of which may be None.
    """

    values: dict[str, float | None]
    without: dict[str, list[float]]
    classes: list[dict[str, Any]]


class Prepared(NamedTuple):
    """The parts of the metrics that depend on the references alone. `prepare` computes them once for many sets.

    `radii` are those of `metrics.precision_recall`, and `kernel` is `kid.mean_kernel`. The others are
    `metrics.covariance_root` of the reference, of its spatial layer, and of the held-out reference.
    """

    radii: Float[np.ndarray, " n"] | None
    kernel: float | None
    root: Float[np.ndarray, "d r"]
    root_s: Float[np.ndarray, "s q"] | None
    root_test: Float[np.ndarray, "d p"] | None


class Scoring(NamedTuple):
    """Metrics that a thread computes, and the function that gives it the batches.

    `put((outputs, labels))` adds a batch, `put(None)` ends the set, and `put(error)` makes the thread end with `error`.
    The thread ends with the process.
    """

    put: Callable[[Any], None]
    result: Future[Scores]


class Gathered(NamedTuple):
    """The outputs and labels of all images, the moments of both feature layers, and the sums of the Inception Score."""

    outputs: Outputs
    labels: Int[np.ndarray, " _n"]
    pool: metrics.Moments
    spatial: metrics.Moments | None
    sums: metrics.ScoreSums | None


def prepare(reference: Reference, held_out: Reference | None = None) -> Prepared:
    """The part of `score` that depends on the references alone, for callers that score several sets of images."""
    return Prepared(
        None if reference.features is None else metrics.squared_radii(reference.features),
        None if reference.features is None else kernel_of(reference),
        metrics.covariance_root(reference.sigma, "first")[1],
        None if reference.sigma_s is None else metrics.covariance_root(reference.sigma_s, "first")[1],
        None if held_out is None else metrics.covariance_root(held_out.sigma, "first")[1],
    )


def kernel_of(reference: Reference) -> float:
    """`kid.mean_kernel` of a reference that has features."""
    assert reference.features is not None, "the caller has looked"
    labels = np.zeros(len(reference.features), np.int64) if reference.labels is None else reference.labels
    return kid.mean_kernel(reference.features, labels)


def score(
    batches: Batches,
    count: int,
    features: FeatureNetwork,
    reference: Reference,
    held_out: Reference | None = None,
    prepared: Prepared | None = None,
) -> Scores:
    """The metrics of `count` images that come in batches.

    The features and class probabilities of all images stay in memory; the images do not. `held_out` are the statistics
    of images that the model was not trained on. `prepared` is `prepare(reference, held_out)`, if the caller has it.

    "class_accuracy" is the fraction of images that the feature network assigns to the class in their label. It is None
    unless the network is the classifier of the data set's own classes and every image has a class; -1 stands for none.
    Images that do not depend on their class, such as those of w = -1, are assigned to it by chance.
    "sfid" is None if the network or the reference has no spatial layer, "is" if the network gives no probabilities,
    "kid", "precision" and "recall" if the reference has no features, "fid_test" without `held_out`, and "saturation" if
    the outputs have none. Raises ValueError if the number of images is not `count`, or if the classifier has no class
    of a label.
    """
    outputs = ((features.extract(images), labels) for images, labels in batches)
    return score_outputs(outputs, count, features.name, reference, held_out, prepared)


def start_scoring(
    count: int,
    features_name: str,
    reference: Reference,
    held_out: Reference | None = None,
    prepared: Prepared | None = None,
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
            result.set_result(score_outputs(received(), count, features_name, reference, held_out, prepared))
        except BaseException as error:  # `result` raises it
            result.set_exception(error)

    threading.Thread(target=run, name="metrics", daemon=True).start()
    return Scoring(waiting.put, result)


def score_outputs(
    batches: Iterator[tuple[Outputs, Int[np.ndarray, " _n"]]],
    count: int,
    features_name: str,
    reference: Reference,
    held_out: Reference | None = None,
    prepared: Prepared | None = None,
) -> Scores:
    """`score` of the outputs of the feature network called `features_name`, in place of images."""
    images = gather(batches, count, features_name)
    ready = prepare(reference, held_out) if prepared is None else prepared
    outputs, labels, group = images.outputs, images.labels, groups(images.labels)
    correct = inside = None
    if features_name == "classifier" and outputs.probs is not None:
        correct = outputs.probs.argmax(-1) == labels
    score = divergence = precision = recall = None
    test = (None, None) if held_out is None else (held_out.mu, held_out.sigma)
    spatial = (reference.mu_s, reference.sigma_s)
    if outputs.probs is not None and images.sums is not None:
        left = leave_out.inception_score(outputs.probs, group, images.sums)
        score = metrics.inception_score_from_sums(images.sums), left
    if reference.features is not None:
        inside, *recall = leave_out.precision_recall(reference.features, outputs.pool, group, ready.radii)
        precision = share(inside, group)
        kernel = kernel_of(reference) if ready.kernel is None else ready.kernel
        divergence = kid.kid(reference.features, outputs.pool, labels, group, kernel)
    found = {
        "fid": distance(reference.mu, reference.sigma, ready.root, outputs.pool, images.pool, group),
        "fid_test": distance(*test, ready.root_test, outputs.pool, images.pool, group),
        "sfid": distance(*spatial, ready.root_s, outputs.spatial, images.spatial, group),
        "kid": divergence,
        "is": score,
        "precision": precision,
        "recall": recall,
        "class_accuracy": share(correct, group) if correct is not None and (labels >= 0).all() else None,
        "saturation": None if outputs.saturation is None else share(outputs.saturation, group),
    }
    return Scores(
        {name: None if measured is None else measured[0] for name, measured in found.items()},
        {name: measured[1] for name, measured in found.items() if measured is not None and measured[1]},
        [per_class(number, labels == number, correct, inside) for number in np.unique(labels[labels >= 0]).tolist()],
    )


def distance(
    mu: Float[np.ndarray, " d"] | None,
    sigma: Float[np.ndarray, "d d"] | None,
    root: Float[np.ndarray, "d r"] | None,
    features: metrics.Rows | None,
    whole: metrics.Moments | None,
    group: Int[np.ndarray, " n"],
) -> tuple[float, list[float]] | None:
    """The Fréchet distance of features from the statistics of a reference, and the distances without each group.

    None if the statistics or the features are.
    """
    if mu is None or sigma is None or root is None or features is None or whole is None:
        return None
    value = metrics.frechet_distance(mu, sigma, *metrics.mean_and_cov(whole), root)
    return value, leave_out.frechet_distance(mu, sigma, root, features, group, whole)


def share(of_images: Shaped[np.ndarray, " n"], group: Int[np.ndarray, " n"]) -> tuple[float, list[float]]:
    """The mean of one value per image, and the means without each group."""
    return float(of_images.mean()), leave_out.mean(of_images, group)


def per_class(
    number: int,
    rows: Bool[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"] | None,
    inside: Bool[np.ndarray, " n"] | None,
) -> dict[str, Any]:
    """One of `Scores.classes`. The last two say which images are recognised, and which lie in a reference's ball."""
    of_class = {"class_accuracy": correct, "precision": inside}
    means = {name: None if of_images is None else float(of_images[rows].mean()) for name, of_images in of_class.items()}
    return {"class": number, "images": int(rows.sum()), **means}


def gather(batches: Iterator[tuple[Outputs, Int[np.ndarray, " _n"]]], count: int, features_name: str) -> Gathered:
    """All outputs and labels, and their sums batch by batch. Raises ValueError as `score` does."""
    pool = spatial = sums = None
    parts, labels, first = [], [], 0
    for outputs, batch_labels in batches:
        pool, spatial = metrics.add(pool, outputs.pool), metrics.add(spatial, outputs.spatial)
        if outputs.probs is not None:
            batch = metrics.score_sums(outputs.probs, np.arange(first, first + len(outputs.pool)), count)
            sums = batch if sums is None else metrics.merge_score_sums(sums, batch)
        check_labels(batch_labels, len(outputs.pool))
        if features_name == "classifier" and outputs.probs is not None:
            check_classes(batch_labels, outputs.probs.shape[1])
        parts.append(outputs)
        labels.append(batch_labels)
        first += len(outputs.pool)
    if pool is None or first != count:
        raise UserError(f"got {first} images, expected {count}: give the number of images in all batches")
    columns: Any = [None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True)]
    return Gathered(Outputs(*columns), np.concatenate(labels), pool, spatial, sums)


def check_labels(labels: Int[np.ndarray, " _n"], count: int) -> None:
    """Raises ValueError unless there is one label per image."""
    if labels.shape != (count,):
        raise UserError(f"{count} images came with labels of shape {labels.shape}: give one label per image")


def check_classes(labels: Int[np.ndarray, " _n"], num_classes: int) -> None:
    """Raises ValueError unless each label is -1 or the number of a class of the feature classifier."""
    wrong = labels[(labels < -1) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"label {wrong[0]} is of no class: the feature classifier has the classes 0 to {num_classes - 1}: give "
            "labels of the data set that it was trained on, or -1 for none"
        )
