"""Curves and tables of the rows of sweeps."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from swept import cell, write_cells
from tiny import tiny_config

from cfd.modes import tables
from cfd.modes.sweep import rows_of_grid
from cfd.runs import results


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


def test_rules_and_guides_have_names_where_their_text_is_empty() -> None:
    rows = [cell(rule, guide, w, {}) for rule in ("", "apg(0)") for guide in ("", "@100") for w in (1.0, 0.0)]
    assert list(tables.curves(rows)) == [
        f"rule = {rule}, guide = {guide}" for rule in ("plain", "apg(0)") for guide in ("classifier-free", "@100")
    ]
    assert tables.guided_in_several_ways(rows) and not tables.guided_in_several_ways(rows[:2])


FIDS = {0.0: (4.53, 4.86, 5.54), 1.0: (13.1, 13.4, 12.2)}
GROUPS = [4.0, 4.5, 5.0]


def of_seeds(fids: dict[float, tuple[float, ...]], **changes: object) -> list[results.Row]:
    return [
        cell("", "", w, {"fid": [fid, *GROUPS], "recall": [0.9]}, seed=1000 + i, **changes)
        for w, values in fids.items()
        for i, fid in enumerate(values)
    ]


def test_rows_that_differ_in_seed_alone_become_their_mean_with_the_t_interval(tmp_path: Path) -> None:
    run = write_cells(tmp_path, of_seeds(FIDS))
    curves = tables.curves(tables.over_seeds(str(run), results.latest(str(run))))
    assert list(curves) == ["classifier-free guidance"]
    ((first, second),) = curves.values()
    for row, values in ((first, FIDS[0.0]), (second, FIDS[1.0])):
        mean, error = np.mean(values), scipy.stats.sem(values)
        low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
        assert row["fid"] == pytest.approx(mean)
        assert (row["fid_low"], row["fid_high"]) == (pytest.approx(low), pytest.approx(high))
        assert (row["recall"], row["recall_low"], row["recall_high"]) == (pytest.approx(0.9),) * 3
        assert row["kid"] is row["kid_low"] is None and row["seeds"] == 3 and row["seed"] == "1000, 1001, 1002"
    assert tables.caption([first, second]) == "± is half the 95 % interval: of the mean over 3 seeds (Student's t)."


def test_a_weight_of_one_seed_keeps_its_interval_over_images(tmp_path: Path) -> None:
    run = write_cells(tmp_path, of_seeds(FIDS | {2.0: (18.3,)}))
    ((*_, last),) = tables.curves(tables.over_seeds(str(run), results.latest(str(run)))).values()
    (alone,) = [row for row in results.latest(str(run)) if row["w"] == 2.0]
    assert [last[key] for key in ("fid", "fid_low", "fid_high")] == [
        alone[key] for key in ("fid", "fid_low", "fid_high")
    ]
    rows = tables.over_seeds(str(run), results.latest(str(run)))
    assert tables.caption(rows) == (
        "± is half the 95 % interval: over images (delete-a-group jackknife), or of the mean over 3 seeds "
        "(Student's t)."
    )


def test_seeds_that_were_measured_in_different_ways_stay_apart(tmp_path: Path) -> None:
    for seed, reference in ((1000, "a"), (1001, "b"), (1002, "a")):
        write_cells(tmp_path, [cell("", "", 0.0, {"fid": [float(seed)]}, seed=seed)], reference)
    rows = tables.over_seeds(str(tmp_path), results.latest(str(tmp_path)))
    assert {row["seed"]: row["fid"] for row in rows} == {"1000, 1002": 1001.0, 1001: 1001.0}
    assert len(tables.curves(rows)) == 2


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (4.531, 3.911, 5.151, "4.53 ± 0.62"),
        (0.8641, 0.8331, 0.8951, "0.864 ± 0.031"),
        (-0.012, -0.0162, -0.0078, "-0.0120 ± 0.0042"),
        (22.21, 9.81, 34.61, "22.21 ± 12.40"),
        (1.0, 1.0, 1.0, "1.00 ± 0.00"),
        (9.8374, None, None, "9.84"),
        (0.864, None, None, "0.864"),
        (None, None, None, "–"),
    ],
)
def test_a_value_has_half_its_interval_where_there_is_one(
    value: float | None, low: float | None, high: float | None, text: str
) -> None:
    assert tables.plus_minus(value, low, high) == text


def test_measures_are_shown_where_they_are_present() -> None:
    rows = [cell("", "", w, {"fid": [4 + w, 4 + w, 5 + w], "kid": [0.01], "fid_test": [6.0]}) for w in (0.0, 1.0)]
    assert tables.cells([*rows, cell("", "", 2.0, {"fid": [6.0]})]).splitlines() == [
        "| w | FID-20 | FID-20 (held-out) | KID |",
        "|---|---|---|---|",
        "| 0 | 4.00 ± 6.35 | 6.00 | 0.01 |",
        "| 1 | 5.00 ± 6.35 | 6.00 | 0.01 |",
        "| 2 | 6.00 | – | – |",
    ]
    assert tables.caption([cell("", "", 0.0, {"fid": [4.0]})]) == ""


def test_a_bar_inside_a_cell_of_a_table_is_escaped() -> None:
    assert tables.markdown(["guide"], [["a|b"]]) == "| guide |\n|---|\n| a\\|b |"
