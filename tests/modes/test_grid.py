"""The grid of samples: which images it has, and where they are in the picture."""

import numpy as np
import pytest
from tiny import tiny_config

from cfd.modes import figures
from cfd.modes.grid import Grid, grid_of, picture_of, spec_of


def test_a_class_keeps_its_image_whatever_the_other_classes_are() -> None:
    few, many = (spec_of(Grid(classes, tuple(map(str, classes)), (3, 4), (0.0, 2.0))) for classes in ((7,), (0, 7)))
    assert [column.tolist() for column in few] == [[3, 3, 4, 4], [7] * 4, [7] * 4, [0.0, 2.0, 0.0, 2.0]]
    assert [column[4:].tolist() for column in many] == [column.tolist() for column in few]
    assert [column.dtype.name for column in few] == ["uint32", "int32", "int32", "float32"]


def test_the_grid_of_a_config_has_its_classes_or_the_first_ten() -> None:
    names = tuple(f"class {c}" for c in range(12))
    grid = grid_of(tiny_config(sample__classes=(0, 7), sample__seeds=(3, 4)), names, (0.0, 2.0))
    assert grid == Grid((0, 7), ("class 0", "class 7"), (3, 4), (0.0, 2.0))
    assert grid_of(tiny_config(sample__classes=()), names, (0.0,)).classes == tuple(range(10))
    assert grid_of(tiny_config(sample__classes=()), names[:2], (0.0,)).names == names[:2]


def test_classes_are_named_or_numbered_and_an_unknown_name_is_refused() -> None:
    """If the names of folders are numbers, the text "10" names class 2, and the number 10 is class 10."""
    names = tuple(sorted(map(str, range(12))))
    grid = grid_of(tiny_config(sample__classes=("10", 2, "2", 3)), names, (0.0,))
    assert grid.classes == (2, 2, names.index("2"), 3) and grid.names == ("10", "10", "2", "11")
    with pytest.raises(ValueError, match=r"has the name '99', .*0 = '0', .*'2', \.\.\.; close to it: '9'\): give"):
        grid_of(tiny_config(sample__classes=("99",)), names, (0.0,))
    with pytest.raises(ValueError, match=r"has the name 'zebr', .*; close to it: 'zebra'\)"):
        grid_of(tiny_config(sample__classes=("zebr",)), ("ape", "zebra"), (0.0,))


def test_the_picture_has_a_row_per_class_and_seed_and_a_column_per_weight() -> None:
    grid = Grid((0, 7), ("zero", "seven"), (3, 4), (0.0, 0.5, 2.0))
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    rows = ["zero", "zero", "seven", "seven"]
    expected = figures.grid(images.reshape(4, 3, 8, 8, 1), rows, ["w = 0", "w = 0.5", "w = 2"])
    np.testing.assert_array_equal(picture_of(grid, images), expected)
