"""Kernel Inception Distance, KID, of Binkowski et al. (arXiv:1801.01401).

KID is the squared maximum mean discrepancy with the kernel k(x, y) = (x·y / d + 1)³ between the pool features of
samples and of a reference set. The estimate is the U-statistic over all pairs, which has no bias at any number of
images and may therefore be negative. It takes at most MAX_ROWS images of each set, evenly spaced: in the reference, and
in each group of the samples. The usual mean over random subsets of 1,000 images estimates the same number.

Pairs of images of one class and of two are averaged apart, and weighted by the shares of the classes. A set with
equally many images of every class has fewer pairs of one class than independent images have, and the plain mean over
all its pairs would therefore be too low.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int, Shaped

from cfd.devices import watchdog
from cfd.errors import UserError
from cfd.evaluation import metrics

MAX_ROWS = 10_000
BLOCK_ELEMENTS = 2**22
"""Float64 kernel values per block: 32 MB."""


def kid(
    reference: metrics.Rows,
    samples: metrics.Rows,
    labels: Int[np.ndarray, " n"],
    group: Int[np.ndarray, " n"],
    reference_mean: float,
) -> tuple[float, list[float]]:
    """(KID, KID without each group of samples), in float64.

    `labels` are the classes of the samples; those of which there is one image are taken as one class. `group` is the
    group of each sample; the second value is [] if a group leaves fewer than 2 samples.
    `reference_mean` is `mean_kernel` of the reference. Raises ValueError if a set has fewer
    than 2 rows or is not finite, or if the sets differ in their number of features.
    """
    order = evenly_spaced(np.argsort(group, kind="stable"))
    x, y, group = float_rows(samples, order, "samples"), reference_rows(reference), group[order]
    stratum = strata(labels[order])
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"{y.shape[1]} reference and {x.shape[1]} sample features: compute both with the same feature network"
        )
    member = np.eye(int(group.max()) + 1)[group]
    pairs = pair_sums(x, member)
    classes = [stratum == number for number in range(int(stratum.max()) + 1)]
    pairs_of_class = np.stack([pair_sums(x[rows], member[rows]) for rows in classes])
    counts = np.stack([member[rows].sum(axis=0) for rows in classes])
    sizes, across = counts.sum(axis=0), np.zeros(member.shape[1])
    for rows, values in kernel_blocks(x, y):
        across += member[rows].T @ values.sum(axis=1)

    def estimate(kept: np.ndarray) -> float:
        count, of_class = sizes[kept].sum(), pairs_of_class[:, kept][:, :, kept].sum(axis=(1, 2))
        own = stratified_mean(pairs[np.ix_(kept, kept)].sum(), of_class, counts[:, kept].sum(axis=1))
        return float(own + reference_mean - 2.0 * across[kept].sum() / (count * len(y)))

    present = np.flatnonzero(sizes)
    value = estimate(present)
    if len(x) - sizes.max() < 2:
        return value, []
    return value, [estimate(present[present != g]) for g in range(len(sizes))]


def strata(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The number of the class of each image, from 0 on. All classes of which there is one image share one number."""
    index, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    return np.unique(np.where(counts[index] > 1, index, -1), return_inverse=True)[1]


def mean_kernel(x: metrics.Rows, labels: Int[np.ndarray, " n"]) -> float:
    """The mean of k over the pairs of different rows of a reference, of those that `kid` takes of it.

    `labels` are their classes, all equal if they are not known. Raises ValueError as `kid` does.
    """
    rows, stratum = reference_rows(x), strata(evenly_spaced(labels))
    of_class = [rows[stratum == number] for number in range(int(stratum.max()) + 1)]
    whole, *pairs = (pair_sums(some, np.ones((len(some), 1))).item() for some in (rows, *of_class))
    return stratified_mean(whole, np.array(pairs), np.array([len(some) for some in of_class]))


def stratified_mean(pairs: float, of_class: Float[np.ndarray, " c"], counts: Shaped[np.ndarray, " c"]) -> float:
    """The mean of k for independent images whose classes have the shares `counts`.

    `pairs` is the sum of k over all pairs of different images, and `of_class` are the parts of it within the classes. A
    class of n images has n (n − 1) of these pairs, and of independent images it would have n².
    """
    return float((pairs + np.sum(of_class / np.maximum(counts - 1, 1))) / counts.sum() ** 2)


def pair_sums(x: Float[np.ndarray, "n d"], member: Float[np.ndarray, "n g"]) -> Float[np.ndarray, "g g"]:
    """The sums of k over all pairs of different rows, by the groups of both; `member` is 1 in the group of a row."""
    sums = np.zeros((member.shape[1], member.shape[1]))
    for rows, values in kernel_blocks(x, x):
        values[np.arange(len(values)), np.arange(rows.start, rows.stop)] = 0.0
        sums += member[rows].T @ (values @ member)
    return sums


def kernel_blocks(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Iterator[tuple[slice, Float[np.ndarray, "r m"]]]:
    """Yields blocks of rows of x with their kernel values (x·y / d + 1)³ with all rows of y."""
    size = max(1, BLOCK_ELEMENTS // len(y))
    for first in range(0, len(x), size):
        watchdog.alive(slow=True)
        rows = slice(first, min(first + size, len(x)))
        base = x[rows] @ y.T / x.shape[1] + 1.0
        yield rows, base * base * base


def reference_rows(x: metrics.Rows) -> Float[np.ndarray, "n d"]:
    """The rows that `kid` takes of a reference, in float64. Raises ValueError as it does."""
    return float_rows(x, evenly_spaced(np.arange(len(x))), "references")


def float_rows(x: metrics.Rows, index: Int[np.ndarray, " m"], what: str) -> Float[np.ndarray, "m d"]:
    """The rows of x at `index`, in float64. Raises ValueError, which calls them `what`, if there are fewer than 2."""
    if len(index) < 2:
        raise UserError(f"KID needs at least 2 {what}, got {len(index)}: give more images")
    return metrics.finite_rows(x, what)[index].astype(np.float64)


def evenly_spaced(x: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """At most MAX_ROWS elements of x, evenly spaced."""
    count = min(len(x), MAX_ROWS)
    return x[np.arange(count) * len(x) // max(count, 1)]
