"""The fronts of rules and guides: which lines each part of the picture has, and what is left out."""

from typing import Any

import pytest
from matplotlib.colors import to_rgb
from swept import cell

from cfd.modes import fronts
from cfd.runs import results

RULES, GUIDES, WEIGHTS = ("", "apg(0)", "cfgpp()"), ("", "@100"), (0.0, 1.0, 4.0)


def rows_of(rules: tuple[str, ...] = RULES, **changes: Any) -> list[results.Row]:
    rows = []
    for i, rule in enumerate(rules):
        for j, guide in enumerate(GUIDES):
            for w in WEIGHTS:
                recall = 0.9 - 0.1 * w - 0.01 * i - 0.001 * j
                values = {"fid": [5 + w + i], "recall": [recall, recall, recall + 0.01], "class_accuracy": [0.98]}
                rows.append(cell(rule, guide, w, values | {"precision": [0.8 + 0.01 * w]}, **changes))
    return rows


def lines_of(axes: Any) -> list[tuple[list[tuple[float, float]], tuple[float, ...], str]]:
    return [
        (list(zip(*line.get_data(), strict=True)), to_rgb(line.get_color()), line.get_linestyle())
        for line in axes.get_lines()
    ]


def points(rule: str, guide: str, x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in rows_of() if (row["rule"], row["guide"]) == (rule, guide)]


def test_all_fronts_are_on_common_axes_and_each_rule_beside_plain_guidance() -> None:
    figure = fronts.front_figure(rows_of(), real=(1.8, 2.3))
    together, apart = figure.axes[:3], [figure.axes[i : i + 3] for i in range(3, 12, 3)]
    assert len(figure.axes) == 12
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in together] == [
        ("recall", "FID-20"),
        ("asked class", "FID-20"),
        ("recall", "precision"),
    ]
    for overview, pair, *own in zip(together, fronts.PAIRS, *apart, strict=True):
        drawn = lines_of(overview)
        assert [line for line, _, _ in drawn] == [points(rule, guide, *pair) for rule in RULES for guide in GUIDES]
        colours, styles = [colour for _, colour, _ in drawn], [style for _, _, style in drawn]
        assert colours[::2] == colours[1::2] and len(set(colours)) == len(RULES)  # a colour per rule
        assert styles[::2] == [styles[0]] * 3 and styles[1::2] == [styles[1]] * 3 and styles[0] != styles[1]
        for rule, colour, axes in zip(RULES, colours[::2], own, strict=True):
            assert axes.get_xlim() == overview.get_xlim() and axes.get_ylim() == overview.get_ylim()
            beside = [points("", "", *pair)] if rule else []
            lines = lines_of(axes)
            assert [line for line, _, _ in lines] == beside + [points(rule, guide, *pair) for guide in GUIDES]
            assert all(shown == colour for _, shown, _ in lines[len(beside) :])
            assert all(len(set(shown)) == 1 for _, shown, _ in lines[: len(beside)])  # grey
    floor = together[0].get_ylim()
    assert floor[0] < 1.8  # real images are on the axes
    titles = [half.get_suptitle() for line in figure.subfigs[1:] for half in line.subfigs]
    assert titles == ["plain", "apg(0)", "cfgpp()", ""]


@pytest.mark.parametrize(
    ("missing", "left"),
    [
        (("precision", "recall"), [("asked class", "FID-20")]),
        (("class_accuracy",), [("recall", "FID-20"), ("recall", "precision")]),
    ],
)
def test_measures_that_no_row_has_are_left_out(missing: tuple[str, ...], left: list[tuple[str, str]]) -> None:
    rows = [row | dict.fromkeys(missing) for row in rows_of()]
    axes = fronts.front_figure(rows).axes
    assert [(each.get_xlabel(), each.get_ylabel()) for each in axes] == left * 4


def test_rules_of_other_settings_have_their_own_plain_guidance_and_say_which() -> None:
    parts = fronts.parts_of(rows_of(num_steps=4) + rows_of(num_steps=8))
    assert [part.name for part in parts] == [f"{rule or 'plain'}, T = {steps}" for steps in (4, 8) for rule in RULES]
    for part in parts:
        steps = {row["num_steps"] for line in (part.plain, *part.lines.values()) for row in line}
        assert len(steps) == 1


def test_without_plain_guidance_the_fronts_are_drawn_alone() -> None:
    figure = fronts.front_figure(rows_of(("apg(0)",)))
    assert [len(axes.get_lines()) for axes in figure.axes] == [2] * 6
