"""Rules and guides at matched strength: the weights, what is interpolated there, and its intervals."""

import csv
import io
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from swept import cell

from cfd.modes import matched
from cfd.runs import results

GROUPS = 20
NUMBERS = np.random.default_rng(0).normal(size=(4, GROUPS))
NONE = np.zeros(GROUPS)


def line(
    rule: str,
    shares: dict[float, float],
    fid: tuple[float, float],
    share_without: np.ndarray = NONE,
    fid_without: np.ndarray = NONE,
    **changes: Any,
) -> list[results.Row]:
    """Rows with these shares at these weights, and fid = fid[0] + fid[1] w. The leave-outs add these offsets."""
    rows = []
    for w, share in shares.items():
        value = fid[0] + fid[1] * w
        values = {"class_accuracy": [share, *(share + share_without)], "fid": [value, *(value + fid_without)]}
        rows.append(cell(rule, "", w, values | {"recall": [1 - share]}, **changes))
    return rows


def linear(start: float, slope: float) -> dict[float, float]:
    return {float(w): start + slope * w for w in range(4)}


PLAIN = line("", linear(0.5, 0.1), (4.0, 2.0), fid_without=NUMBERS[0])


def of_rule(rows: list[results.Row], weight: float) -> matched.Matched:
    """The match of the rule "a" in rows."""
    (one,) = [one for one in matched.matched(rows, weight) if one.row["rule"] == "a"]
    return one


def test_a_rule_of_half_the_strength_is_taken_at_twice_the_weight() -> None:
    """The difference of FID is that of the two lines there, and its interval follows from the leave-outs by hand.

    Without group g, the share of the rule is e_g higher, and reaches that of plain guidance e_g / 0.05 earlier. There
    its FID is 0.5 e_g / 0.05 less, and b_g more by its own leave-out.
    """
    own, shift = 0.2 * NUMBERS[1], 0.002 * NUMBERS[2]
    rows = PLAIN + line("a", linear(0.5, 0.05), (4.0, 0.5), shift, NUMBERS[0] + own)
    for weight in matched.WEIGHTS:
        one = of_rule(rows, weight)
        assert one.status == "" and one.share is not None
        assert one.share[0] == pytest.approx(0.5 + 0.1 * weight)
        assert one.values["w"][0] == pytest.approx(2 * weight)
        assert one.values["fid"][0] == pytest.approx(4 + weight)
        assert one.values["recall"] == (pytest.approx(0.5 - 0.1 * weight), None, None)
        value, low, high = one.values["difference"]
        without = own - 0.5 * shift / 0.05
        error = math.sqrt((GROUPS - 1) / GROUPS * float(((without - without.mean()) ** 2).sum()))
        half = float(scipy.stats.t.ppf(0.975, GROUPS - 1)) * error
        assert value == pytest.approx(-weight)
        assert (low, high) == (pytest.approx(-weight - half), pytest.approx(-weight + half))


@pytest.mark.parametrize(("offset", "verdict"), [(-1.0, "better"), (1.0, "worse"), (0.01, "no difference shown")])
def test_the_verdict_is_whether_the_interval_excludes_zero(offset: float, verdict: str) -> None:
    rows = PLAIN + line("a", linear(0.5, 0.1), (4.0 + offset, 2.0), fid_without=NUMBERS[0] + 0.1 * NUMBERS[1])
    assert of_rule(rows, 1.0).verdict == verdict


def test_what_all_cells_share_cancels_in_the_difference() -> None:
    """The cells are paired: their groups are the same images."""
    rows = PLAIN + line("a", linear(0.5, 0.1), (3.9, 2.0), fid_without=NUMBERS[0])
    one = of_rule(rows, 1.0)
    assert one.values["difference"] == (pytest.approx(-0.1),) * 3 and one.verdict == "better"
    low, high = one.values["fid"][1:]
    assert low is not None and high is not None and high - low > 1


def test_of_several_weights_with_the_share_the_smallest_counts_for_plain_guidance_too() -> None:
    plain = line("", {0.0: 0.9, 0.5: 1.0, 1.0: 1.0}, (4.0, 2.0), fid_without=NUMBERS[0])
    rule = line("a", {0.0: 0.9, 1.0: 0.95, 2.0: 1.0, 3.0: 1.0}, (4.0, 1.0), fid_without=NUMBERS[0])
    first, second = matched.matched(plain + rule, 1.0)
    assert first.row["rule"] == "" and first.values["w"] == (0.5,) * 3 and first.values["fid"][0] == 5.0
    assert second.values["w"] == (2.0,) * 3 and second.values["difference"] == (pytest.approx(1.0),) * 3


@pytest.mark.parametrize(
    ("shares", "target", "w"),
    [
        ((0.1, 0.3, 0.5), 0.4, 1.5),
        ((0.1, 0.3, 0.5), 0.5, 2.0),
        ((0.1, 0.3, 0.3), 0.3, 1.0),
        ((0.5, 0.1, 0.9), 0.3, 0.5),
        ((0.1, 0.3, 0.5), 0.6, math.nan),
        ((0.1, 0.3, 0.5), 0.0, math.nan),
        ((0.2,), 0.2, 0.0),
        ((0.1, 0.2, 0.3), 0.1 + 0.2, 2.0),
        ((0.2,), 0.3, math.nan),
    ],
)
def test_the_first_crossing_lies_on_the_line_between_cells(shares: tuple[float, ...], target: float, w: float) -> None:
    assert matched.first_crossing((0.0, 1.0, 2.0), shares, target) == pytest.approx(w, nan_ok=True)


def test_a_strength_that_is_not_reached_is_never_extrapolated() -> None:
    low, high = line("a", linear(0.0, 0.1), (4.0, 1.0)), line("a", linear(0.9, 0.01), (4.0, 1.0))
    for rule, status in ((low, "stays below"), (high, "always above")):
        one = of_rule(PLAIN + rule, 1.0)
        assert (one.status, one.values, one.verdict) == (status, {}, "")
    short = [row for row in PLAIN if row["w"] > 0]
    assert of_rule(short + low, 0.3).status == "plain guidance is swept from w = 1 to 3"
    assert of_rule(low, 1.0).status == "no plain guidance to compare with"
    other = line("a", linear(0.5, 0.1), (4.0, 1.0), seed=7)
    assert of_rule(PLAIN + other, 1.0).status == "no seed in common with plain guidance"
    unlabelled = [row | {"class_accuracy": None} for row in other]
    assert of_rule(PLAIN + [row | {"seed": 1000} for row in unlabelled], 1.0).status == "asked class is not measured"


def test_without_leave_outs_there_is_a_value_and_no_interval() -> None:
    """So it is for rows of an earlier version, and where a strength is not reached without some group."""
    earlier = [row | {"without": {}} for row in line("a", linear(0.5, 0.1), (3.0, 2.0))]
    one = of_rule(PLAIN + earlier, 1.0)
    assert one.values["difference"] == (pytest.approx(-1.0), None, None) and one.verdict == "no interval"
    barely = line("a", {0.0: 0.5, 1.0: 0.6}, (3.0, 2.0), share_without=np.linspace(-0.01, 0.01, GROUPS))
    one = of_rule(PLAIN + barely, 1.0)
    assert one.values["difference"][0] == pytest.approx(-1.0) and one.verdict == "no interval"


def test_over_several_seeds_the_interval_is_students_of_the_differences() -> None:
    seeds, rows = (1, 2, 3), []
    plain_fid, fid = (4.0, 5.0, 4.4), (3.5, 4.7, 3.8)
    for seed, a, b in zip(seeds, plain_fid, fid, strict=True):
        rows += line("", linear(0.5, 0.1), (a, 2.0), seed=seed) + line("a", linear(0.5, 0.1), (b, 2.0), seed=seed)
    rows += line("", {0.5: 0.55}, (9.0, 0.0), seed=1)  # a weight that lacks seeds leaves one seed
    one = of_rule([row for row in rows if row["w"] != 0.5], 1.0)
    mean = scipy.stats.ttest_1samp(np.subtract(fid, plain_fid), 0).confidence_interval(0.95)
    assert one.seeds == 3
    assert one.values["difference"] == (pytest.approx(-1.4 / 3), pytest.approx(mean.low), pytest.approx(mean.high))
    assert of_rule(rows, 1.0).seeds == 1


def test_only_what_differs_in_nothing_else_is_compared() -> None:
    """Plain guidance alone, of one number of steps, is compared with nothing."""
    rows = line("", linear(0.5, 0.1), (4.0, 2.0), num_steps=6) + PLAIN + line("a", linear(0.5, 0.1), (1.0, 1.0))
    rows += line("a", linear(0.5, 0.1), (1.0, 1.0), num_steps=8)
    rows += line("a", linear(0.5, 0.1), (1.0, 1.0), weights="others", run="other")
    assert [len(group) for group in matched.groups(rows)] == [8, 4, 4]
    text, _ = matched.report(rows)
    assert "T = 6" not in text
    for where in ("T = 4, run", "T = 8", "T = 4, other"):
        assert f"### As strong as plain guidance at w = 0.3, {where}" in text


def test_the_tables_say_all_that_they_show() -> None:
    rows = PLAIN + line("a(x=1)", linear(0.5, 0.05), (4.0, 0.5), fid_without=NUMBERS[0] + 0.01 * NUMBERS[1])
    rows += [row | {"guide": "@3"} for row in line("", linear(0.0, 0.01), (4.0, 2.0))]
    text, cells = matched.report(rows)
    blocks = text.split("\n\n")
    assert blocks[0] == (
        "### As strong as plain guidance at w = 0.1 (interpolated, because this w was not swept): "
        "51.00 ± 0.00 % recognised as the asked class"
    )
    assert blocks[4].startswith("### As strong as plain guidance at w = 1: ")
    table = [[text.strip() for text in line.strip("|").split("|")] for line in blocks[5].splitlines()]
    assert table[0] == ["rule", "guide", "w", "FID-20", "recall", "FID-20 less plain", ""]
    assert [(*line[:3], line[-1]) for line in table[2:]] == [
        ("plain", "classifier-free", "1", "–"),
        ("a(x=1)", "classifier-free", "2", "better"),
        ("plain", "@3", "stays below", "–"),
    ]
    assert table[3][3].startswith("5.00 ± ") and table[3][4] == "0.4" and table[3][5].startswith("-1.00")
    assert "3 differences are tested, so about 0.15 would be" in blocks[-1]
    lines = list(csv.DictReader(io.StringIO(cells)))
    assert len(lines) == 9
    (one,) = [line for line in lines if line["plain_w"] == "1.0" and line["rule"] == "a(x=1)"]
    low, difference, high = (float(one[f"difference{end}"]) for end in ("_low", "", "_high"))
    assert low < difference < high < 0 and difference == pytest.approx(-1.0)
    assert float(one["w"]) == pytest.approx(2.0) and one["verdict"] == "better" and one["run"] == "run"
    assert [line["status"] for line in lines].count("stays below") == 3
