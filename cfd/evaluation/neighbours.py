"""Nearest neighbours as float64 differences decide them, at about the cost of float32 products.

Products are fast, but |x|² + |c|² − 2 x·c loses a small |x − c|² to rounding. Here, products therefore only exclude
centres: they give bounds of each squared distance that hold in spite of rounding, and all centres that the bounds do
not exclude are decided by the sum of the squares of float64 differences. For most rows, float32 products on the device
exclude all centres but a few. The other rows, whose neighbours are close together, take float64 products on the host.

The results are those of a comparison of all pairs in float64. They do not depend on the device or on block sizes.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from cfd.devices import watchdog

BLOCK_ELEMENTS = 2**25  # float32 distances per block on the device: 128 MB; blocks of float64 on the host are smaller
CENTRE_ELEMENTS = 2**24  # float32 coordinates of centres that are on the device at a time: 64 MB
SPARE_CANDIDATES = 4  # candidates beyond those needed: with them, the bounds nearly always exclude all other centres


class Frame(NamedTuple):
    """A shift and a scale, a power of two, after which no coordinate of two sets exceeds 1 in magnitude.

    Neither changes which squared distances are smaller, and products then lose the least to rounding.
    """

    mean: Float[np.ndarray, " d"]
    scale: float

    def place(self, rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """The rows in this frame, in float64."""
        placed = rows.astype(np.float64)
        placed -= self.mean
        placed *= self.scale
        return placed


def squared_to_kth(x: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, " n"]:
    """The squared distance from each row to its k-th nearest neighbour among the other rows; there are more than k."""
    frame, no_offset = frame_of(x, x), np.zeros(len(x))
    found, unsure = np.empty(len(x)), np.zeros(len(x), bool)
    for rows, _, squared, beyond in candidates(x, x, no_offset, frame, k + 1 + SPARE_CANDIDATES):
        found[rows] = np.partition(squared, k, axis=1)[:, k]  # the row itself is its own nearest neighbour
        unsure[rows] = (found[rows] > beyond) & (found[rows] > 0.0)
    for row, low, high in bounds(x, x, no_offset, frame, np.flatnonzero(unsure)):
        near = np.flatnonzero(low <= np.partition(high, k)[k])
        found[row] = np.partition(squared_distances(x[row], x, near), k)[k]
    return found


def covered(
    x: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m d"], squared_radii: Float[np.ndarray, " m"]
) -> Bool[np.ndarray, " n"]:
    """Whether each row of x lies in the ball of some centre, or on its surface."""
    frame = frame_of(x, centres)
    found, unsure = np.zeros(len(x), bool), np.zeros(len(x), bool)
    for rows, index, squared, beyond in candidates(x, centres, squared_radii, frame, 1 + SPARE_CANDIDATES):
        found[rows] = (squared <= squared_radii[index]).any(axis=1)
        unsure[rows] = ~found[rows] & (beyond <= 0.0)
    for row, inside in inside_of(x, centres, squared_radii, frame, np.flatnonzero(unsure)):
        found[row] = len(inside) > 0
    return found


def squared_to_kth_without(
    x: Float[np.ndarray, "n d"], k: int, group: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "g n"]]:
    """`squared_to_kth` of all rows, and, in row g of the second array, that of the rows without group g.

    Rows in group g itself keep in it their distance among all rows. Each group leaves more than k rows.
    """
    frame, no_offset, number = frame_of(x, x), np.zeros(len(x)), int(group.max()) + 1
    found, without = np.empty(len(x)), np.empty((number, len(x)))
    unsure, unsure_without = np.zeros(len(x), bool), np.zeros((number, len(x)), bool)
    for rows, index, squared, beyond in candidates(x, x, no_offset, frame, k + 1 + SPARE_CANDIDATES):
        found[rows] = np.partition(squared, k, axis=1)[:, k]  # the row itself is its own nearest neighbour
        unsure[rows] = (found[rows] > beyond) & (found[rows] > 0.0)
        for g in range(number):
            left = np.where(group[index] == g, np.inf, squared)
            without[g, rows] = np.where(group[rows] == g, found[rows], np.partition(left, k, axis=1)[:, k])
            unsure_without[g, rows] = (without[g, rows] > beyond) & (without[g, rows] > 0.0)
    for row, low, high in bounds(x, x, no_offset, frame, np.flatnonzero(unsure | unsure_without.any(axis=0))):
        for g in np.flatnonzero(unsure_without[:, row]) if not unsure[row] else range(-1, number):
            left = np.flatnonzero(group != g) if g != group[row] else np.arange(len(x))
            near = left[low[left] <= np.partition(high[left], k)[k]]
            squared = np.partition(squared_distances(x[row], x, near), k)[k]
            if g < 0:
                found[row] = squared
            else:
                without[g, row] = squared
    return found, without


def covering_groups(
    x: Float[np.ndarray, "n d"],
    centres: Float[np.ndarray, "m d"],
    squared_radii: Float[np.ndarray, " m"],
    group: Int[np.ndarray, " m"],
) -> Bool[np.ndarray, "n g"]:
    """Whether each row of x lies in the ball of some centre of each group.

    If a row lies in balls of several groups, at least two of these groups are found.
    """
    frame, number = frame_of(x, centres), int(group.max()) + 1
    found, unsure = np.zeros((len(x), number), bool), np.zeros(len(x), bool)
    for rows, index, squared, beyond in candidates(x, centres, squared_radii, frame, 1 + SPARE_CANDIDATES):
        row, column = np.nonzero(squared <= squared_radii[index])
        found[rows.start + row, group[index[row, column]]] = True
        unsure[rows] = (found[rows].sum(axis=1) < min(2, number)) & (beyond <= 0.0)
    for row, inside in inside_of(x, centres, squared_radii, frame, np.flatnonzero(unsure)):
        found[row, group[inside]] = True
    return found


def covered_by_few(
    x: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m d"], squared_radii: Float[np.ndarray, " m"]
) -> Bool[np.ndarray, " n"]:
    """`covered` by float64 products on the host alone, which compile nothing for another number of rows or centres."""
    found = np.zeros(len(x), bool)
    if found.size and squared_radii.size:
        frame = frame_of(x, centres)
        for row, inside in inside_of(x, centres, squared_radii, frame, np.arange(len(x))):
            found[row] = len(inside) > 0
    return found


def frame_of(x: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m d"]) -> Frame:
    """The frame in which the mean of the centres is 0."""
    mean = centres.mean(axis=0, dtype=np.float64)
    spread = max(max((rows.max(axis=0) - mean).max(), (mean - rows.min(axis=0)).max()) for rows in (x, centres))
    return Frame(mean, 2.0 ** -np.frexp(spread)[1])


def candidates(
    x: Float[np.ndarray, "n d"],
    centres: Float[np.ndarray, "m d"],
    offset: Float[np.ndarray, " m"],
    frame: Frame,
    count: int,
) -> Iterator[tuple[slice, Int[np.ndarray, "r c"], Float[np.ndarray, "r c"], Float[np.ndarray, " r"]]]:
    """Yields, for each block of rows of x: the rows, `count` centres, the squared distances to them, and a bound.

    The memory depends neither on the number of rows nor on that of centres, of which a part is on the device at a time.
    The centres are those whose squared distance − offset may be smallest. Of every other centre, the squared distance
    − offset is at least the bound.
    """
    dim = x.shape[1]
    # A float32 product of two rows is wrong by at most d 2⁻²⁴ |x| |c|, in any order of summation (Higham, Accuracy and
    # Stability of Numerical Algorithms, section 3.1). The rest allows for rounding of x, c and the result, and for
    # accelerators that multiply float32 in several passes. The product of the last columns subtracts this error.
    error = (dim + 64) * 2.0**-23
    parts = list(blocks(len(centres), dim, CENTRE_ELEMENTS))

    def on_device(part: slice) -> tuple[Array, Array]:
        size = part.stop - part.start
        columns, squares = np.empty((size, dim + 1), np.float32), np.empty(size)
        for rows in blocks(size, 8 * dim):
            placed = frame.place(centres[part][rows])
            columns[rows, :dim], squares[rows] = placed, np.einsum("md,md->m", placed, placed)
        columns[:, dim] = error * np.sqrt(squares)
        own = offset[part] * frame.scale**2
        # The last term covers numbers that are too small for float32.
        constant = squares - own - 2.0**-21 * (squares + np.abs(own)) - dim * 2.0**-120
        with np.errstate(over="ignore"):  # a ball beyond float32's range covers all: −∞ bounds its distances from below
            return jnp.asarray(columns), jnp.asarray(constant.astype(np.float32))

    count = min(count, len(centres))
    only = on_device(parts[0]) if len(parts) == 1 else None
    for rows in blocks(len(x), max(parts[0].stop, 4 * dim)):
        placed = frame.place(x[rows])
        squares = np.einsum("nd,nd->n", placed, placed)
        block = jnp.asarray(np.concatenate([placed, np.sqrt(squares)[:, None]], axis=1, dtype=np.float32))
        del placed
        values, index = np.empty((len(squares), 0), np.float32), np.empty((len(squares), 0), np.int64)
        for part in parts:
            watchdog.alive(slow=True)
            some, found = nearest(block, *(only or on_device(part)), min(count, part.stop - part.start))
            values = np.concatenate([values, np.asarray(some)], axis=1)
            index = np.concatenate([index, np.asarray(found) + part.start], axis=1)
            if values.shape[1] > count:
                best = np.argsort(-values, axis=1, kind="stable")[:, :count]
                values, index = np.take_along_axis(values, best, axis=1), np.take_along_axis(index, best, axis=1)
        last = values[:, -1].astype(np.float64)
        beyond = squares - last - (dim + 64) * 2.0**-50 * (squares + np.abs(last))
        exact = x[rows].astype(np.float64)
        squared = np.stack([np.sum((exact - centres[column]) ** 2, axis=1) for column in index.T], axis=1)
        yield rows, index, squared, np.full(len(exact), np.inf) if count >= len(centres) else beyond / frame.scale**2


@partial(jax.jit, static_argnames="count")
def nearest(
    x: Float[Array, "n d"], centres: Float[Array, "m d"], constant: Float[Array, " m"], count: int
) -> tuple[Float[Array, "n c"], Int[Array, "n c"]]:
    """The `count` largest values of 2 x·c − constant for each row of x, largest first, and the indices of their c."""
    dots = jnp.matmul(x, centres.T, precision=jax.lax.Precision.HIGHEST)
    # Returned whole: XLA:CPU sorts all values if a slice of the result is taken here.
    values, index = jax.lax.top_k(2.0 * dots - constant[None, :], count)
    return values, index


def bounds(
    x: Float[np.ndarray, "n d"],
    centres: Float[np.ndarray, "m d"],
    offset: Float[np.ndarray, " m"],
    frame: Frame,
    rows: Int[np.ndarray, " u"],
) -> Iterator[tuple[int, Float[np.ndarray, " m"], Float[np.ndarray, " m"]]]:
    """Yields each of these rows of x with a lower and an upper bound of its squared distance − offset to every centre.

    The bounds are in the frame, and come from float64 products.
    """
    dim, offset = x.shape[1], offset * frame.scale**2
    error = (dim + 64) * 2.0**-51
    parts = list(blocks(len(rows), 4 * len(centres)))
    room = np.empty((parts[0].stop if parts else 0, len(centres)))  # for all parts: a new one each would need it twice
    for part in parts:
        watchdog.alive(slow=True)
        placed = frame.place(x[rows[part]])
        own = np.einsum("nd,nd->n", placed, placed)
        product, squares = room[: len(placed)], np.empty(len(centres))
        for some in blocks(len(centres), 8 * dim):
            others = frame.place(centres[some])
            product[:, some], squares[some] = placed @ others.T, np.einsum("md,md->m", others, others)
        slack = error * squares + 2.0**-50 * np.abs(offset)
        for row, products, square in zip(rows[part], product, own, strict=True):
            value = square + squares - 2.0 * products - offset
            wrong = error * square + slack
            yield int(row), value - wrong, value + wrong


def inside_of(
    x: Float[np.ndarray, "n d"],
    centres: Float[np.ndarray, "m d"],
    squared_radii: Float[np.ndarray, " m"],
    frame: Frame,
    rows: Int[np.ndarray, " u"],
) -> Iterator[tuple[int, Int[np.ndarray, " c"]]]:
    """Yields each of these rows of x with the indices of all centres in whose balls it lies."""
    for row, low, high in bounds(x, centres, squared_radii, frame, rows):
        near = np.flatnonzero(low <= 0.0)
        sure = high[near] <= 0.0
        doubtful = near[~sure]
        exact = squared_distances(x[row], centres, doubtful) <= squared_radii[doubtful]
        yield row, np.concatenate([near[sure], doubtful[exact]])


def squared_distances(
    row: Float[np.ndarray, " d"], centres: Float[np.ndarray, "m d"], index: Int[np.ndarray, " c"]
) -> Float[np.ndarray, " c"]:
    """The squared distances from a row to the centres of these indices, by float64 differences."""
    row = row.astype(np.float64)
    parts = [np.sum((row - centres[index[part]]) ** 2, axis=1) for part in blocks(len(index), 8 * len(row))]
    return np.concatenate([np.empty(0), *parts])


def blocks(count: int, width: int, elements: int | None = None) -> Iterator[slice]:
    """Slices of `count` rows, each of at most `elements` / width rows, by default BLOCK_ELEMENTS / width."""
    size = max(1, (elements or BLOCK_ELEMENTS) // width)
    return (slice(first, min(first + size, count)) for first in range(0, count, size))
