"""The picture of fronts: what each rule and guide trades for what as w grows, beside plain guidance."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from cfd.modes import figures, matched, tables
from cfd.runs.results import Row

PAIRS = (("recall", "fid"), ("class_accuracy", "fid"), ("recall", "precision"))
"""(x, y) of the axes."""
BESIDE = 2
"""Rules beside each other."""
MARKS = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."), ("v", (0, (5, 1, 1, 1, 1, 1))), ("P", (0, (1, 1))))
"""Marker and line of each guide."""
PLAIN, GREY = "0.25", "0.65"
"""Plain guidance as a rule, and beside other rules."""


class Part(NamedTuple):
    """A rule in one group of rows: its rows by guide, and those of plain guidance."""

    rule: str
    name: str
    lines: dict[str, list[Row]]
    plain: list[Row]


def front_figure(rows: list[Row], real: figures.Interval | None = None) -> Any:
    """A matplotlib Figure: FID against recall and against the share recognised as the asked class, and precision
    against recall; first of all rules together, then of each.

    `rows` are of one seed, or means over seeds. All axes of a pair have the same limits. Each rule has a colour, each
    guide a marker and a line, and plain guidance is grey among the others. Bars are 95 % intervals, and `real` is that
    of FID of real images. A pair of measures that no row has is left out; one pair there must be.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = [row for group in matched.groups(rows) for row in group]
    pairs = pairs_of(rows)
    parts, marks = parts_of(rows), marks_of(rows)
    colours = [PLAIN, *(style["color"] for style in figures.styles(len(parts) - 1))]
    count = math.ceil(len(parts) / BESIDE)
    figure = Figure(figsize=(2.8 * BESIDE * len(pairs), 5 + 2.5 * count), layout="constrained")
    top, *below = figure.subfigures(1 + count, 1, height_ratios=(5, *[2.5] * count), squeeze=False)[:, 0]
    halves = [half for each in below for half in each.subfigures(1, BESIDE, squeeze=False)[0]][: len(parts)]
    together, *apart = (each.subplots(1, len(pairs), squeeze=False)[0] for each in (top, *halves))
    for axes, pair in zip(together, pairs, strict=True):
        for part, colour in zip(parts, colours, strict=True):
            for guide, line in part.lines.items():
                draw(axes, line, pair, color=colour, **marks[guide])
        frame(axes, pair, rows, real)
        axes.margins(0.1)
    for part, colour, half, own in zip(parts, colours, halves, apart, strict=True):
        half.suptitle(part.name, fontsize="medium", color=colour, fontweight="bold")
        for axes, overview, pair in zip(own, together, pairs, strict=True):
            if part.rule:
                draw(axes, part.plain, pair, color=GREY, **marks[""])
            for guide, line in part.lines.items():
                draw(axes, line, pair, color=colour, **marks[guide])
                figures.bars(axes, [row for row in line if has(row, pair)], *pair, colour)
            frame(axes, pair, rows, real)
            axes.set(xlim=overview.get_xlim(), ylim=overview.get_ylim())
        name_ends(own[0], pairs[0], part.lines.values(), colour)
    keys: list[Any] = [
        Line2D([], [], color=colour, label=part.name) for part, colour in zip(parts, colours, strict=True)
    ]
    keys += [Line2D([], [], color="black", label=guide_name(guide), **mark) for guide, mark in marks.items()]
    if real is not None:
        keys.append(Patch(color="0.6", alpha=0.3, label="real images"))
    beside = max(1, 170 // max(10, *(len(part.name) for part in parts)))
    top.legend(handles=keys, loc="outside lower center", ncols=min(beside, 6), fontsize="small")
    top.suptitle("All rules above, each rule below: plain guidance in grey, bars are 95 % intervals", fontsize="medium")
    return figure


def pairs_of(rows: list[Row]) -> list[tuple[str, str]]:
    """The PAIRS of measures that some row has."""
    return [pair for pair in PAIRS if any(has(row, pair) for row in rows)]


def frame(axes: Any, pair: tuple[str, str], rows: list[Row], real: figures.Interval | None) -> None:
    """The names of the axes, and FID of real images. FID is on a logarithmic scale, which keeps good fronts apart."""
    axes.set(xlabel=tables.measure_name(pair[0], rows), ylabel=tables.measure_name(pair[1], rows))
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.3)
    if pair[1] == "fid":
        figures.logarithmic(axes)
        figures.floor(axes, real)


def parts_of(rows: list[Row]) -> list[Part]:
    """Every rule of every group of rows, plain guidance first."""
    groups = matched.groups(rows)
    parts = []
    for name, group in zip(matched.names_of(groups), groups, strict=True):
        lines = {key: sorted(line, key=lambda row: row["w"]) for key, line in matched.lines_of(group).items()}
        for rule in dict.fromkeys(rule for rule, _ in lines):
            own = {guide: line for (of, guide), line in lines.items() if of == rule}
            whose = ", ".join(filter(None, [tables.in_words("rule", rule), name]))
            parts.append(Part(rule, whose, own, lines.get(("", ""), [])))
    return parts


def marks_of(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """The marker and the line of each guide."""
    guides = sorted({"", *(row["guide"] for row in rows)})
    return {
        guide: dict(zip(("marker", "linestyle"), MARKS[i % len(MARKS)], strict=True)) for i, guide in enumerate(guides)
    }


def guide_name(guide: str) -> str:
    """A guide as the legend writes it."""
    return f"guide {tables.in_words('guide', guide)}"


def has(row: Row, pair: Sequence[str]) -> bool:
    """Whether both measures of a pair are there."""
    return all(row.get(key) is not None for key in pair)


def draw(axes: Any, line: list[Row], pair: tuple[str, str], **style: Any) -> None:
    """A front, from the smallest weight to the largest, in those rows that have both measures."""
    points = [tuple(row[key] for key in pair) for row in line if has(row, pair)]
    if points:
        axes.plot(*zip(*points, strict=True), markersize=3, linewidth=1, **style)


def name_ends(axes: Any, pair: tuple[str, str], lines: Iterable[list[Row]], colour: Any) -> None:
    """The weights at both ends of each line, beside them on the side with more room, but none on another one."""
    middle, texts = sum(axes.get_xlim()) / 2, []
    for line in lines:
        shown = [row for row in line if has(row, pair)]
        if not shown:
            continue
        for row, height in ((shown[0], -9), (shown[-1], 4))[: len(shown)]:
            right = row[pair[0]] > middle
            side = {"xytext": (-4 if right else 4, height), "ha": "right" if right else "left"}
            texts.append(
                axes.annotate(
                    f"w = {row['w']:g}",
                    (row[pair[0]], row[pair[1]]),
                    textcoords="offset points",
                    fontsize="x-small",
                    color=colour,
                    **side,
                )
            )
    figures.remove_overlapping(texts)
