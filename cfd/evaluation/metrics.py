"""FID, sFID, Inception Score, precision and recall, with the definitions of ADM's evaluator (arXiv:2105.05233).

No function runs a network: each takes features or class probabilities. `Moments` and `ScoreSums` are float64 sums that
can be merged over batches, devices and hosts in any order. Images therefore need not stay in memory; for FID and IS,
not even their features need to. sFID is `frechet_distance` on spatial features.
"""

import warnings
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import scipy  # scipy imports its submodules on first use
from jax import Array
from jaxtyping import Float, Int, Shaped

from cfd.errors import UserError
from cfd.evaluation import neighbours

Rows = Shaped[np.ndarray, "_n _d"] | Shaped[Array, "_n _d"]
"""Rows of real numbers of any dtype. jaxtyping ignores these sizes and dtypes; mismatches get a ValueError."""

SPLIT_SIZE = 5000  # images per split of the Inception Score, as in ADM's evaluator
NEIGHBOURS = 3  # k of precision and recall, as in ADM's evaluator
MAX_INTEGER = 2.0**53  # float64 holds every integer up to here
MAX_MAGNITUDE = 2.0**430  # sums of squares of features neither overflow nor, at the inverse, vanish


@dataclass(frozen=True)
class Moments:
    """The mean of `count` feature vectors and the sum of the outer products of their deviations from it, float64."""

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]


def moments(features: Rows) -> Moments:
    """The moments of a batch of features [n, d]. Raises ValueError if the batch is empty or not finite."""
    x = finite_rows(features, "features").astype(np.float64)
    mean = x.mean(axis=0)
    x = x - mean
    return Moments(len(x), mean, x.T @ x)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the union of two disjoint sets (Chan, Golub and LeVeque 1983), which subtracts no large sums.

    Raises ValueError if the sets differ in their number of features.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"moments of {len(a.mean)} and {len(b.mean)} features cannot be merged: compute both with the same feature "
            "network"
        )
    count = a.count + b.count
    step = b.mean - a.mean
    between = np.outer(step, step) * (a.count * b.count / count)
    return Moments(count, a.mean + step * (b.count / count), a.scatter + b.scatter + between)


def subtract(whole: Moments, part: Moments) -> Moments:
    """The moments of a set without a part of it: the inverse of `merge`, up to rounding."""
    count = whole.count - part.count
    mean = whole.mean + (whole.mean - part.mean) * (part.count / count)
    step = part.mean - mean
    between = np.outer(step, step) * (count * part.count / whole.count)
    return Moments(count, mean, whole.scatter - part.scatter - between)


def add(total: Moments | None, features: Float[np.ndarray, "n d"] | None) -> Moments | None:
    """`total`, the moments of earlier batches, merged with those of one more batch. Before the first, `total` is None.

    Returns `total` if `features` is None, which means that the feature network has no such layer.
    """
    if features is None:
        return total
    batch = moments(features)
    return batch if total is None else merge(total, batch)


def mean_and_cov(m: Moments) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """(mean, unbiased covariance), the statistics of ADM's evaluator.

    Warns if all feature vectors are equal up to rounding. Raises ValueError for fewer than 2 samples.
    """
    if m.count < 2:
        raise UserError(f"a covariance needs at least 2 samples, got {m.count}")
    if np.trace(m.scatter) <= 1e-24 * m.count * (m.mean @ m.mean):
        warnings.warn(f"all {m.count} feature vectors are equal, up to rounding: the set is constant", stacklevel=2)
    return m.mean, m.scatter / (m.count - 1)


def check_rank(count: int, dim: int, what: str = "samples") -> None:
    """Warns if `count` samples are too few for a covariance of full rank of `dim` features, which takes dim + 1.

    `what` names the samples.
    """
    if count <= dim:
        warnings.warn(
            f"{count} {what} of {dim} features give a covariance of rank at most {max(count - 1, 0)}: "
            f"the Fréchet distance is biased; use at least {dim + 1} {what}",
            stacklevel=2,
        )


def frechet_distance(
    mu1: Float[np.ndarray, " _d"],
    sigma1: Float[np.ndarray, "_d _d"],
    mu2: Float[np.ndarray, " _d"],
    sigma2: Float[np.ndarray, "_d _d"],
    root1: Float[np.ndarray, "_d _r"] | None = None,
) -> float:
    """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2 (Σ1^½ Σ2 Σ1^½)^½), the FID of Heusel et al. (arXiv:1706.08500), in float64.

    Both matrix roots come from eigenvalues of symmetric matrices. `root1` is `covariance_root(sigma1, "first")[1]`, if
    the caller has it already. Raises ValueError if the statistics differ in size or are not finite, or if a covariance
    is not symmetric or has an eigenvalue that is negative beyond rounding.
    """
    if not mu1.shape * 2 == mu2.shape * 2 == sigma1.shape == sigma2.shape:
        shapes = f"means {mu1.shape} and {mu2.shape}, covariances {sigma1.shape} and {sigma2.shape}"
        raise UserError(f"the statistics differ in size: {shapes}; compute both with the same feature network")
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    if not (np.isfinite(mu1).all() and np.isfinite(mu2).all()):
        raise UserError("a mean holds NaN or infinity: look for broken images in the set that it describes")
    if root1 is None:
        root1 = covariance_root(sigma1, "first")[1]
    sigma1 = np.asarray(sigma1, np.float64)
    sigma2, root2 = covariance_root(sigma2, "second")
    # With Σ = R Rᵀ, the eigenvalues of Σ1^½ Σ2 Σ1^½ are the squares of the singular values of R1ᵀ R2. Take the Gram
    # matrix of its smaller side, which has no null space: there, rounding errors of 1e-16 would give roots of 1e-8.
    cross = root1.T @ root2
    if cross.shape[0] > cross.shape[1]:
        cross = cross.T
    eigenvalues = scipy.linalg.eigh(cross @ cross.T, eigvals_only=True, check_finite=False)
    overlap = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2.0 * overlap
    return max(float(distance), 0.0)


def covariance_root(
    sigma: Float[np.ndarray, "d d"], which: str
) -> tuple[Float[np.ndarray, "d d"], Float[np.ndarray, "d r"]]:
    """Σ in float64, and R with Σ = R Rᵀ, which has one column per nonzero eigenvalue, or one of zeros if Σ = 0.

    `which`, "first" or "second", names the covariance in the errors of `frechet_distance`.
    """
    sigma = np.asarray(sigma, np.float64)
    if not np.isfinite(sigma).all():
        raise UserError(
            f"the {which} covariance holds NaN or infinity: look for broken images in the set that it describes"
        )
    if not np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6 * np.abs(sigma).max(initial=0.0)):
        raise UserError(f"the {which} covariance is not symmetric: compute the statistics again")
    eigenvalues, vectors = scipy.linalg.eigh(sigma, check_finite=False, driver="evd")
    largest = eigenvalues[-1]
    if eigenvalues[0] < -1e-4 * max(largest, 0.0) or largest < 0.0:
        raise UserError(
            f"the {which} covariance has the eigenvalue {eigenvalues[0]:.3g}, and those of a covariance are >= 0: "
            "compute the statistics again"
        )
    nonzero = eigenvalues > largest * len(sigma) * np.finfo(np.float64).eps
    nonzero[-1] = True  # equal images have Σ = 0, and moments need a column
    return sigma, vectors[:, nonzero] * np.sqrt(eigenvalues[nonzero])


@dataclass(frozen=True)
class ScoreSums:
    """Sums for the Inception Score. Each row is a split: its number of images, Σ p log p and Σ p."""

    count: Int[np.ndarray, " s"]
    plogp: Float[np.ndarray, " s"]
    p: Float[np.ndarray, "s k"]


def score_sums(probs: Rows, index: Int[np.ndarray, " _n"], num_samples: int, split_size: int = SPLIT_SIZE) -> ScoreSums:
    """The sums over a batch of class probabilities [n, k]; image i of `num_samples` is in split i // split_size.

    A row may add up to 1 within 1e-3 or, if that is more, 4 eps of the dtype of `probs`. Rows of a dtype of less than
    32 bits are divided by their sum. Raises ValueError unless each row is a distribution and has one image number in
    [0, num_samples).
    """
    p = finite_rows(probs, "class probabilities").astype(np.float64)
    eps = float(jnp.finfo(probs.dtype).eps) if jnp.issubdtype(probs.dtype, jnp.floating) else 0.0
    total, tolerance = p.sum(axis=1), max(1e-3, 4.0 * eps)
    if (p < 0.0).any() or (np.abs(total - 1.0) > tolerance).any():
        raise UserError(
            f"class probabilities must be >= 0 and add up to 1 in each row; these are {probs.dtype}, at least "
            f"{p.min():.3g}, and add up to {total.min():.5g} to {total.max():.5g}: pass the softmax, not the logits, "
            "and compute it in float32"
        )
    if eps > np.finfo(np.float32).eps:
        p /= total[:, None]
    if index.shape != (len(p),) or (index < 0).any() or (index >= num_samples).any():
        raise UserError(f"image numbers must be one per row and in [0, {num_samples}), got {index!r} for {len(p)} rows")
    splits, split = -(-num_samples // split_size), index // split_size
    sums = np.zeros((splits, p.shape[1]))
    np.add.at(sums, split, p)
    plogp = np.bincount(split, weights=scipy.special.xlogy(p, p).sum(axis=1), minlength=splits)
    return ScoreSums(np.bincount(split, minlength=splits), plogp, sums)


def merge_score_sums(a: ScoreSums, b: ScoreSums) -> ScoreSums:
    """The sums over the union of two disjoint sets of images.

    Raises ValueError if the numbers of splits or classes differ.
    """
    if a.p.shape != b.p.shape:
        raise UserError(
            f"sums of {a.p.shape} and {b.p.shape} (splits, classes) cannot be merged: both must be sums over parts "
            "of the same set"
        )
    return ScoreSums(a.count + b.count, a.plogp + b.plogp, a.p + b.p)


def inception_score_from_sums(s: ScoreSums) -> float:
    """The mean over splits of exp E KL(p(y|x) ‖ p(y)), with E KL = E Σ p log p − Σ p̄ log p̄.

    Raises ValueError if a split has no images.
    """
    if (s.count == 0).any():
        raise UserError(f"splits without images: {s.count.tolist()} images per split; add the sums of all images")
    mean = s.p / s.count[:, None]
    return float(np.exp(s.plogp / s.count - scipy.special.xlogy(mean, mean).sum(axis=1)).mean())


def inception_score(probs: Rows, split_size: int = SPLIT_SIZE) -> float:
    """The Inception Score of Salimans et al. (arXiv:1606.03498); as in ADM's evaluator, a mean over splits of 5,000.

    It depends on the order of the rows: a split of few classes has a low score. Warns as `check_splits` does.
    """
    check_splits(len(probs), split_size)
    return inception_score_from_sums(score_sums(probs, np.arange(len(probs)), len(probs), split_size))


def check_splits(num_samples: int, split_size: int = SPLIT_SIZE) -> None:
    """Warns if the last split of the Inception Score is smaller than the others."""
    whole, rest = divmod(num_samples, split_size)
    if whole and rest:
        warnings.warn(
            f"{num_samples:,} images are no multiple of {split_size:,}: the last split of the Inception Score, of "
            f"{rest:,}, counts as much as each of the others, which biases the score; use {whole * split_size:,} or "
            f"{(whole + 1) * split_size:,} images",
            stacklevel=2,
        )


def precision_recall(
    reference_features: Rows,
    sample_features: Rows,
    k: int = NEIGHBOURS,
    reference_radii: Float[np.ndarray, " n"] | None = None,
) -> tuple[float, float]:
    """Improved precision and recall of Kynkäänniemi et al. (arXiv:1904.06991): (precision, recall).

    The ball of a feature vector reaches to the k-th nearest neighbour in its own set. Precision is the fraction of
    samples that lie in the ball of some reference; recall is the fraction of references that lie in the ball of some
    sample. The results are exactly those of squared distances that are computed as float64 differences of all pairs;
    see `cfd.evaluation.neighbours`. ADM's evaluator rounds its distances to float16, and its results differ by that
    rounding alone. `reference_radii` are `squared_radii(reference_features, k)`, which can be computed once for many
    sets of samples. Raises ValueError if the sets differ in their number of features, are not finite, have at most k
    rows, or are so far apart, or so close, that float64 cannot hold their squared distances.
    """
    reference, samples, radii = balls(reference_features, sample_features, k, reference_radii)
    sample_radii = squared_radii(samples, k, "samples")
    precision = neighbours.covered(samples, reference, radii).mean()
    recall = neighbours.covered(reference, samples, sample_radii).mean()
    return float(precision), float(recall)


def balls(
    reference_features: Rows, sample_features: Rows, k: int, reference_radii: Float[np.ndarray, " m"] | None
) -> tuple[Float[np.ndarray, "m d"], Float[np.ndarray, "n d"], Float[np.ndarray, " m"]]:
    """The arguments of `precision_recall`, checked as it says: (reference, samples, squared radii of the reference)."""
    reference = finite_rows(reference_features, "reference features")
    samples = finite_rows(sample_features, "sample features")
    if reference.shape[1] != samples.shape[1]:
        raise UserError(
            f"{reference.shape[1]} reference and {samples.shape[1]} sample features: compute both with the same "
            "feature network"
        )
    if reference_radii is None:
        return reference, samples, squared_radii(reference, k)
    if reference_radii.shape != (len(reference),) or not ((reference_radii >= 0) & (reference_radii < np.inf)).all():
        raise UserError(
            f"reference_radii must be {len(reference)} finite numbers >= 0, one per reference, got shape "
            f"{reference_radii.shape}: give squared_radii(reference_features, k)"
        )
    return reference, samples, reference_radii


def squared_radii(x: Rows, k: int = NEIGHBOURS, what: str = "references") -> Float[np.ndarray, " n"]:
    """The squared distance from each row to its k-th nearest neighbour among the other rows.

    Raises ValueError, in which `what` names the rows, if there are at most k, and as `precision_recall` does.
    """
    rows = finite_rows(x, what)
    if k < 1:
        raise UserError(f"k is {k}; give the number of a neighbour, at least 1")
    if len(rows) <= k:
        raise UserError(f"k = {k} neighbours need more than {k} {what}, and there are {len(rows)}")
    return neighbours.squared_to_kth(rows, k)


def finite_rows(x: Rows, what: str) -> Float[np.ndarray, "n d"]:
    """x on the host, in float32 or float64, which hold its numbers exactly.

    Raises ValueError, in which `what` names x, unless x is [n, d], not empty, real and finite, and unless float64 holds
    its numbers and their squares.
    """
    rows = np.asarray(x)
    if rows.ndim != 2 or rows.size == 0:
        raise UserError(f"{what} must be [n, d] with n and d > 0, got shape {rows.shape}")
    if rows.dtype != bool and not any(jnp.issubdtype(rows.dtype, kind) for kind in (np.integer, np.floating)):
        raise UserError(f"{what} must be real numbers, got dtype {rows.dtype}: convert them to float32 or float64")
    rows = rows.astype(np.promote_types(rows.dtype, np.float32), copy=False)
    finite = [np.isfinite(rows[part]).all(axis=1) for part in neighbours.blocks(len(rows), 4 * rows.shape[1])]
    broken = np.flatnonzero(~np.concatenate(finite))
    if len(broken):
        raise UserError(f"{what}: {len(broken)} of {len(rows)} rows hold NaN or infinity; the first is row {broken[0]}")
    if rows.dtype == np.float32:
        return rows
    largest = float(np.abs(rows).max())
    too_large = MAX_INTEGER if np.issubdtype(np.asarray(x).dtype, np.integer) else MAX_MAGNITUDE
    if rows.dtype != np.float64 or largest > too_large or 0.0 < largest < 1.0 / MAX_MAGNITUDE:
        raise UserError(
            f"{what} are {np.asarray(x).dtype} up to {largest:.3g} in magnitude, and float64 cannot hold these numbers "
            "or their squares: multiply all features, of both sets, by one constant, and convert them to float64"
        )
    return rows
