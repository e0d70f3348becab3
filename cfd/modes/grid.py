"""The grid of samples that a config asks for: one row per class and seed, one column per weight."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from cfd.config import Config
from cfd.errors import UserError
from cfd.guidance import NULL_LABEL
from cfd.modes import figures
from cfd.modes.sampler import SampleSpec


class Grid(NamedTuple):
    """The axes of a grid: classes and their names, seeds, and weights."""

    classes: tuple[int, ...]
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    weights: tuple[float, ...]


def grid_of(config: Config, class_names: tuple[str, ...], weights: tuple[float, ...]) -> Grid:
    """The grid of `config.sample` at `weights`. An empty sample.classes stands for the first ten classes.

    Without classes, the grid has one row per seed, of the null label. Raises ValueError if sample.classes has a name or
    a number of no class.
    """
    if not class_names and config.sample.classes:
        raise UserError(
            f"config.sample.classes is {config.sample.classes}, and the network has no classes: set it to ()"
        )
    if not class_names:
        return Grid((NULL_LABEL,), ("",), config.sample.seeds, weights)
    classes = numbers_of(config.sample.classes, class_names) or tuple(range(min(10, len(class_names))))
    return Grid(classes, tuple(class_names[c] for c in classes), config.sample.seeds, weights)


def numbers_of(classes: Sequence[int | str], class_names: Sequence[str]) -> tuple[int, ...]:
    """The numbers of classes that are given by number or by name. Raises ValueError for an unknown one."""
    number = {name: i for i, name in enumerate(class_names)}
    if unknown := [item for item in classes if isinstance(item, int) and item >= len(class_names)]:
        raise UserError(f"config.sample.classes has {unknown[0]}; classes are 0 to {len(class_names) - 1}")
    for name in classes:
        if isinstance(name, str) and name not in number:
            listed = ", ".join(f"{i} = {class_names[i]!r}" for i in range(min(5, len(class_names))))
            more = ", ..." if len(class_names) > 5 else ""
            close = difflib.get_close_matches(name, class_names, n=3, cutoff=0.5)
            meant = f"; close to it: {', '.join(map(repr, close))}" if close else ""
            raise UserError(
                f"config.sample.classes has the name {name!r}, which no class has (there are {listed}{more}{meant}): "
                "give the name of a class, or its number without quotes"
            )
    return tuple(number[item] if isinstance(item, str) else item for item in classes)


def spec_of(grid: Grid) -> SampleSpec:
    """The images of a grid, row by row. The number of a class's image does not depend on the other classes."""
    rows = [(s, max(c, 0), c, w) for c in grid.classes for s in grid.seeds for w in grid.weights]
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
