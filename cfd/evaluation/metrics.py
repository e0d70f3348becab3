"""FID, sFID, Inception Score, precision and recall, with the definitions of ADM's evaluator (arXiv:2105.05233).

No function runs a network: each takes features or class probabilities. `Moments` and `ScoreSums` are float64 sums that
can be merged over batches, devices and hosts in any order. Images therefore need not stay in memory; for FID and IS,
not even their features need to. sFID is `frechet_distance` on spatial features.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # scipy imports its submodules on first use
from jax import Array
from jaxtyping import Float, Int

from cfd.errors import UserError

Rows = Float[np.ndarray, "_n _d"] | Float[Array, "_n _d"]  # jaxtyping ignores these sizes; mismatches get a ValueError

SPLIT_SIZE = 5000  # images per split of the Inception Score, as in ADM's evaluator
BLOCK_ELEMENTS = 2**25  # float32 distances per block: 128 MB
SPARE_CANDIDATES = 4  # candidates beyond those needed, because float32 may order close neighbours wrongly


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

    Warns if all feature vectors are equal. Raises ValueError for fewer than 2 samples.
    """
    if m.count < 2:
        raise UserError(f"a covariance needs at least 2 samples, got {m.count}")
    if np.trace(m.scatter) <= 1e-24 * m.count * (m.mean @ m.mean):
        warnings.warn(f"all {m.count} feature vectors are equal: the set is constant", stacklevel=2)
    return m.mean, m.scatter / (m.count - 1)


def check_rank(count: int, dim: int) -> None:
    """Warns if `count` samples are too few for a covariance of full rank of `dim` features, which takes dim + 1."""
    if count <= dim:
        warnings.warn(
            f"{count} samples of {dim} features give a covariance of rank at most {max(count - 1, 0)}: "
            f"the Fréchet distance is biased; use at least {dim + 1} samples",
            stacklevel=2,
        )


def frechet_distance(
    mu1: Float[np.ndarray, " _d"],
    sigma1: Float[np.ndarray, "_d _d"],
    mu2: Float[np.ndarray, " _d"],
    sigma2: Float[np.ndarray, "_d _d"],
) -> float:
    """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2 (Σ1^½ Σ2 Σ1^½)^½), the FID of Heusel et al. (arXiv:1706.08500), in float64.

    Both matrix roots come from eigenvalues of symmetric matrices. Raises ValueError if the statistics differ in size or
    are not finite, or if a covariance is not symmetric or has an eigenvalue that is negative beyond rounding.
    """
    if not mu1.shape * 2 == mu2.shape * 2 == sigma1.shape == sigma2.shape:
        shapes = f"means {mu1.shape} and {mu2.shape}, covariances {sigma1.shape} and {sigma2.shape}"
        raise UserError(f"the statistics differ in size: {shapes}; compute both with the same feature network")
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    if not (np.isfinite(mu1).all() and np.isfinite(mu2).all()):
        raise UserError("a mean holds NaN or infinity: look for broken images in the set that it describes")
    sigma1, root1 = covariance_root(sigma1, "first")
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
    """Σ in float64, and R with Σ = R Rᵀ, which has one column per nonzero eigenvalue.

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
    return sigma, vectors[:, nonzero] * np.sqrt(eigenvalues[nonzero])


@dataclass(frozen=True)
class ScoreSums:
    """Sums for the Inception Score. Each row is a split: its number of images, Σ p log p and Σ p."""

    count: Int[np.ndarray, " s"]
    plogp: Float[np.ndarray, " s"]
    p: Float[np.ndarray, "s k"]


def score_sums(probs: Rows, index: Int[np.ndarray, " _n"], num_samples: int, split_size: int = SPLIT_SIZE) -> ScoreSums:
    """The sums over a batch of class probabilities [n, k]; image i of `num_samples` is in split i // split_size.

    Raises ValueError unless each row is a distribution and has one image number in [0, num_samples).
    """
    p = finite_rows(probs, "class probabilities").astype(np.float64)
    if (p < 0.0).any() or (np.abs(p.sum(axis=1) - 1.0) > 1e-3).any():
        raise UserError(
            "class probabilities must be >= 0 and add up to 1 in each row: pass the softmax, not the logits"
        )
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
    """The Inception Score of Salimans et al. (arXiv:1606.03498); as in ADM's evaluator, a mean over splits of 5,000."""
    return inception_score_from_sums(score_sums(probs, np.arange(len(probs)), len(probs), split_size))


def precision_recall(
    reference_features: Rows,
    sample_features: Rows,
    k: int = 3,
    reference_radii: Float[np.ndarray, " n"] | None = None,
) -> tuple[float, float]:
    """Improved precision and recall of Kynkäänniemi et al. (arXiv:1904.06991): (precision, recall).

    The ball of a feature vector reaches to the k-th nearest neighbour in its own set. Precision is the fraction of
    samples that lie in the ball of some reference; recall is the fraction of references that lie in the ball of some
    sample. The device finds candidates by float32 distances, in blocks, and float64 distances decide among them. The
    results therefore do not depend on the device or on the block size. ADM's evaluator rounds its distances to float16,
    and its results differ by that rounding alone. `reference_radii` are `squared_radii(reference_features, k)`, which
    can be computed once for many sets of samples. Raises ValueError if the sets differ in their number of features, are
    not finite, or have at most k rows.
    """
    reference = finite_rows(reference_features, "reference features")
    samples = finite_rows(sample_features, "sample features")
    if reference.shape[1] != samples.shape[1]:
        raise UserError(
            f"{reference.shape[1]} reference and {samples.shape[1]} sample features: compute both with the same "
            "feature network"
        )
    if reference_radii is None:
        reference_radii = squared_radii(reference, k)
    return within(samples, reference, reference_radii), within(reference, samples, squared_radii(samples, k, "samples"))


def squared_radii(x: Rows, k: int = 3, what: str = "references") -> Float[np.ndarray, " n"]:
    """The squared distance from each row to its k-th nearest neighbour among the other rows.

    Raises ValueError, in which `what` names the rows, if there are at most k.
    """
    if len(x) <= k:
        raise UserError(f"k = {k} neighbours need more than {k} {what}, and there are {len(x)}")
    blocks = candidates(x, x, np.zeros(len(x)), k + 1 + SPARE_CANDIDATES)
    return np.concatenate([np.partition(squared, k, axis=1)[:, k] for squared, _ in blocks])


def within(x: Rows, centres: Rows, squared: Float[np.ndarray, " m"]) -> float:
    """The fraction of rows of x that lie in some ball. `squared` are the squares of the radii."""
    blocks = candidates(x, centres, squared, 1 + SPARE_CANDIDATES)
    return float(np.concatenate([(distance <= squared[index]).any(axis=1) for distance, index in blocks]).mean())


def candidates(
    x: Rows, centres: Rows, offset: Float[np.ndarray, " m"], count: int
) -> Iterator[tuple[Float[np.ndarray, "r c"], Int[np.ndarray, "r c"]]]:
    """Yields, per block of rows of x, the squared distances to `count` centres, and the indices of these centres.

    The centres are those with the smallest squared distance − offset, found in float32. The distances are float64.
    """
    # Subtracting the mean changes no distance, and |x|² + |c|² − 2 x·c then loses the least to rounding.
    mean = centres.mean(axis=0, dtype=np.float64).astype(centres.dtype)
    shifted = centres - mean
    constant = np.einsum("md,md->m", shifted, shifted, dtype=np.float64) - offset
    device_centres, device_constant = jnp.asarray(shifted, jnp.float32), jnp.asarray(constant, jnp.float32)
    rows = max(1, BLOCK_ELEMENTS // len(centres))
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        found = nearest(
            jnp.asarray(block - mean, jnp.float32), device_centres, device_constant, min(count, len(centres))
        )
        index, exact = np.asarray(found), block.astype(np.float64)
        yield np.stack([np.sum((exact - centres[column]) ** 2, axis=1) for column in index.T], axis=1), index


@partial(jax.jit, static_argnames="count")
def nearest(
    x: Float[Array, "n d"], centres: Float[Array, "m d"], constant: Float[Array, " m"], count: int
) -> Int[Array, "n c"]:
    """The indices of the `count` centres with the smallest constant − 2 x·c, for each row of x.

    |x|² is left out because it is the same for all centres.
    """
    dots = jnp.matmul(x, centres.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(2.0 * dots - constant[None, :], count)[1]


def finite_rows(x: Rows, what: str) -> Float[np.ndarray, "n d"]:
    """x on the host. Raises ValueError, in which `what` names x, unless it is [n, d], not empty, and finite."""
    rows = np.asarray(x)
    if rows.ndim != 2 or rows.size == 0:
        raise UserError(f"{what} must be [n, d] with n and d > 0, got shape {rows.shape}")
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(broken):
        raise UserError(f"{what}: {len(broken)} of {len(rows)} rows hold NaN or infinity; the first is row {broken[0]}")
    return rows
