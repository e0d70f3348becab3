"""The metrics of a set of images without each of its groups, for `cfd.evaluation.intervals`, at little extra cost.

Sums and moments of a group are subtracted from those of the whole set. Recall takes the balls that grow without a
group, and looks only at the references that no ball of another group covers. `group` is the group of each image, from 0
to the number of groups − 1. Every function returns one value per group, or [] if a group leaves too few images.
"""

import numpy as np
import scipy  # scipy imports its submodules on first use
from jaxtyping import Bool, Float, Int, Shaped

from cfd.devices import watchdog
from cfd.evaluation import metrics, neighbours
from cfd.evaluation.metrics import Moments, ScoreSums

Group = Int[np.ndarray, " n"]


def mean(values: Shaped[np.ndarray, " n"], group: Group) -> list[float]:
    """The mean of one number, or truth value, per image."""
    size, total = np.bincount(group), np.bincount(group, weights=values)
    if size.max() == len(group):
        return []
    return [float(x) for x in (total.sum() - total) / (len(group) - size)]


def inception_score(
    probs: metrics.Rows, group: Group, whole: ScoreSums, split_size: int = metrics.SPLIT_SIZE
) -> list[float]:
    """The Inception Score; `whole` are the sums over all images, and every image stays in its split."""
    index, number = np.arange(len(group)), int(group.max()) + 1
    found = []
    for g in range(number):
        rows = group == g
        part = metrics.score_sums(np.asarray(probs)[rows], index[rows], len(group), split_size)
        left = ScoreSums(whole.count - part.count, whole.plogp - part.plogp, whole.p - part.p)
        if (left.count == 0).any():
            return []
        found.append(metrics.inception_score_from_sums(left))
    return found


def frechet_distance(
    mu: Float[np.ndarray, " d"],
    sigma: Float[np.ndarray, "d d"],
    root: Float[np.ndarray, "d r"],
    features: metrics.Rows,
    group: Group,
    whole: Moments,
) -> list[float]:
    """The Fréchet distance from the reference statistics, Σ = R Rᵀ with `root` R; `whole` are the moments of all rows.

    The roots of the eigenvalues of Rᵀ Σ_g R give the overlap with the covariance Σ_g without group g. If a group leaves
    fewer rows than R has columns, they come from the smaller Gram matrix of the rows, which has no null space.
    """
    size = np.bincount(group)
    if len(group) - size.max() < 2:
        return []
    projected = Moments(whole.count, whole.mean @ root, root.T @ whole.scatter @ root)
    rows_are_few = whole.count - size.min() < root.shape[1]
    placed = (np.asarray(features, np.float64) - whole.mean) @ root if rows_are_few else None
    found = []
    for g in range(len(size)):
        watchdog.alive(slow=True)
        part = np.asarray(features[group == g], np.float64)
        left = whole.count - len(part)
        step = (whole.mean - part.mean(axis=0)) * (len(part) / left)
        trace = np.trace(whole.scatter) - np.sum((part - whole.mean) ** 2) - left * (step @ step)
        if placed is None:
            gram = metrics.subtract(projected, metrics.moments(part @ root)).scatter
        else:
            rows = placed[group != g]
            rows = rows - rows.mean(axis=0)
            gram = rows @ rows.T
        eigenvalues = scipy.linalg.eigh(gram / (left - 1), eigvals_only=True, check_finite=False)
        if placed is not None:
            eigenvalues = eigenvalues[1:]  # that of the mean, which is 0, without its rounding
        overlap = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
        distance = np.sum((mu - whole.mean - step) ** 2) + np.trace(sigma) + trace / (left - 1) - 2.0 * overlap
        found.append(max(float(distance), 0.0))
    return found


def precision_recall(
    reference_features: metrics.Rows,
    sample_features: metrics.Rows,
    group: Group,
    reference_radii: Float[np.ndarray, " m"] | None = None,
    k: int = metrics.NEIGHBOURS,
) -> tuple[Bool[np.ndarray, " n"], float, list[float]]:
    """(which samples lie in the ball of a reference, recall, recall without each group).

    All are exactly those of `metrics.precision_recall`, whose arguments and errors these are. Precision without a group
    is the `mean` of the first.
    """
    reference, samples, reference_radii = metrics.balls(reference_features, sample_features, k, reference_radii)
    inside = neighbours.covered(samples, reference, reference_radii)
    if len(group) - np.bincount(group).max() <= k:
        radii = metrics.squared_radii(samples, k, "samples")
        return inside, float(neighbours.covered(reference, samples, radii).mean()), []
    radii, larger = neighbours.squared_to_kth_without(samples, k, group)
    covering = neighbours.covering_groups(reference, samples, radii, group)
    found = []
    for g, radii_without in enumerate(larger):
        covered = np.asarray(np.delete(covering, g, axis=1).any(axis=1))
        grown = (radii_without > radii) & (group != g)
        covered[~covered] = neighbours.covered_by_few(reference[~covered], samples[grown], radii_without[grown])
        found.append(float(covered.mean()))
    return inside, float(covering.any(axis=1).mean()), found
