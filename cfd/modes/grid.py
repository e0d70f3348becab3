"""The grid of samples that a config asks for: one row per class and seed, one column per weight."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from cfd.config import Config
from cfd.modes import figures
from cfd.modes.sampler import SampleSpec


class Grid(NamedTuple):
    """The axes of a grid: classes and their names, seeds, and weights."""

    classes: tuple[int, ...]
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    weights: tuple[float, ...]


def grid_of(config: Config, class_names: tuple[str, ...], weights: tuple[float, ...]) -> Grid:
    """The grid of `config.sample` at `weights`. An empty sample.classes stands for the first ten classes."""
    classes = config.sample.classes or tuple(range(min(10, len(class_names))))
    return Grid(classes, tuple(class_names[c] for c in classes), config.sample.seeds, weights)


def spec_of(grid: Grid) -> SampleSpec:
    """The images of a grid, row by row. The number of a class's image does not depend on the other classes."""
    rows = [(s, c, c, w) for c in grid.classes for s in grid.seeds for w in grid.weights]
    seed, index, label, w = map(list, zip(*rows, strict=True))
    return SampleSpec(
        np.array(seed, np.uint32), np.array(index, np.int32), np.array(label, np.int32), np.array(w, np.float32)
    )


def picture_of(grid: Grid, images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "height width 3"]:
    """One picture of the images of `spec_of(grid)`, with the classes and weights written at its edges."""
    rows = [name for name in grid.names for _ in grid.seeds]
    return figures.grid(
        images.reshape(len(rows), len(grid.weights), *images.shape[1:]), rows, [f"w = {w:g}" for w in grid.weights]
    )
