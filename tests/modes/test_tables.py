"""Curves and tables of the rows of sweeps."""

from tiny import tiny_config

from cfd.modes import tables
from cfd.modes.sweep import rows_of_grid


def test_a_row_that_is_measured_again_replaces_the_old_one() -> None:
    old, other = (row | {"fid": 1.0} for row in rows_of_grid(tiny_config(eval__weights=(0.0, 1.0)), 5))
    new = old | {"fid": 2.0}
    assert list(tables.curves([old, other, new]).values()) == [[new, other]]


def test_a_curve_is_named_by_the_settings_in_which_it_differs() -> None:
    rows = rows_of_grid(tiny_config(eval__weights=(1.0, 0.0), eval__num_steps=(4, 8), eval__intervals=((), (-3, 5))), 5)
    curves = tables.curves(rows)
    intervals = ("all", "[-3, 5]")
    assert list(curves) == [f"T = {num_steps}, interval = {interval}" for num_steps in (4, 8) for interval in intervals]
    assert all([row["w"] for row in curve] == [0.0, 1.0] for curve in curves.values())
    assert list(tables.curves(rows[:2])) == ["classifier-free guidance"]
    assert list(tables.curves(rows[:2], "paper")) == ["paper"]
