"""The picture of a sweep over EMA lengths: FID over the length and w."""

import math
from typing import Any

import numpy as np

from cfd.modes import figures, tables
from cfd.runs.results import Row

MAX_MAPS = 12
"""Maps at most, for rows that also differ in other settings, such as their guides."""
MAX_WRITTEN = 120
"""Cells, at most, of a map with the value in each."""


def figure(rows: list[Row], real: figures.Interval | None = None) -> Any:
    """A matplotlib Figure with two panels for each group of rows that differ in "ema" and "w" alone.

    The first is a map of FID, on whose axes lengths and weights are at equal spacing; a frame marks the best cell. The
    second has FID against the length at each weight, with 95 % intervals; lines of dots are the run's own EMA, whose
    length is another kind of number. `real` is the interval of FID of real images.
    """
    from matplotlib.figure import Figure

    groups = list(groups_of(rows).items())[:MAX_MAPS]
    drawn = Figure(figsize=(11, 4.2 * len(groups)), layout="constrained")
    for (name, group), (left, right) in zip(groups, drawn.subplots(len(groups), 2, squeeze=False), strict=True):
        draw_map(drawn, left, group)
        draw_curves(right, group, real)
        left.set_title(name or f"{group[0]['features']} features, {group[0]['num_samples']:,} samples")
    return drawn


def groups_of(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows that differ in EMA length and weight alone, by the other settings in which they differ."""
    keys = [key for key in tables.varied(rows) if key != "ema"]
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(tables.in_full(row, keys), []).append(row)
    return grouped


def draw_map(drawn: Any, axes: Any, group: list[Row]) -> None:
    """FID of each cell as a colour, with its value if there is room, and a frame around the lowest."""
    emas, weights = sorted({row["ema"] for row in group}), sorted({row["w"] for row in group})
    fid = np.full((len(emas), len(weights)), np.nan)
    for row in group:
        fid[emas.index(row["ema"]), weights.index(row["w"])] = row["fid"]
    image = axes.imshow(np.log10(fid), origin="lower", aspect="auto", cmap="viridis_r")
    bar = drawn.colorbar(image, ax=axes, label=group[0]["fid_name"])
    low, high = (math.log10(x) for x in (np.nanmin(fid), np.nanmax(fid)))
    ticks = np.linspace(low, high, 5) if high > low else [low]
    bar.set_ticks(ticks, labels=[f"{10**tick:.3g}" for tick in ticks])
    if fid.size <= MAX_WRITTEN:
        for i, j in np.argwhere(~np.isnan(fid)):
            colour = "white" if math.log10(fid[i, j]) > (low + high) / 2 else "black"
            axes.text(j, i, f"{fid[i, j]:.3g}", ha="center", va="center", fontsize="x-small", color=colour)
    best = np.unravel_index(np.nanargmin(fid), fid.shape)
    axes.add_patch(frame(int(best[1]), int(best[0])))
    axes.set_xticks(range(len(weights)), labels=[f"{w:g}" for w in weights])
    axes.set_yticks(range(len(emas)), labels=[tables.in_words("ema", ema) for ema in emas])
    axes.set(xlabel="w", ylabel="EMA length (σ_rel)")


def frame(x: int, y: int) -> Any:
    """A red frame around the cell of a map."""
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2)


def draw_curves(axes: Any, group: list[Row], real: figures.Interval | None) -> None:
    """FID against the EMA length, a curve at each weight."""
    weights = sorted({row["w"] for row in group})
    for w, style in zip(weights, figures.styles(len(weights)), strict=True):
        line = sorted((row for row in group if row["w"] == w), key=lambda row: row["ema"])
        own, others = [row for row in line if not row["ema"]], [row for row in line if row["ema"]]
        label = f"w = {w:g}"
        if others:
            axes.plot([row["ema"] for row in others], [row["fid"] for row in others], "o", ms=4, label=label, **style)
            figures.bars(axes, others, "ema", "fid", style["color"])
        for row in own:
            axes.axhline(row["fid"], color=style["color"], linestyle=":", linewidth=1, label=None if others else label)
    figures.floor(axes, real)
    axes.set(xlabel="EMA length (σ_rel)", ylabel=group[0]["fid_name"])
    figures.logarithmic(axes)
    axes.set_title("dotted: the run's own EMA", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="x-small")
