"""Pictures: grids of images with named rows and columns, the curves of a sweep, and the curves of training."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from cfd.runs.files import write_atomically

MAX_POINTS = 400
"""Points per training curve, at most about this many."""


def grid(
    images: UInt8[np.ndarray, "rows columns h w c"], row_names: Sequence[str], column_names: Sequence[str]
) -> UInt8[np.ndarray, "height width 3"]:
    """One picture of all images, with the names of rows and columns. Small images are enlarged by a whole factor."""
    rows, columns, height, width, channels = images.shape
    zoom = max(1, 64 // height)
    tiles = images.repeat(zoom, axis=2).repeat(zoom, axis=3)
    if channels == 1:
        tiles = tiles.repeat(3, axis=-1)
    height, width, gap = height * zoom, width * zoom, 2
    font = ImageFont.load_default(size=14)
    left = 12 + max(int(font.getlength(name)) for name in row_names)
    top = 24
    sheet = np.full((top + rows * (height + gap), left + columns * (width + gap), 3), 255, np.uint8)
    for r in range(rows):
        for c in range(columns):
            y, x = top + r * (height + gap), left + c * (width + gap)
            sheet[y : y + height, x : x + width] = tiles[r, c]
    image = Image.fromarray(sheet)
    pen = ImageDraw.Draw(image)
    for r, name in enumerate(row_names):
        pen.text((left - 6, top + r * (height + gap) + height // 2), name, "black", font, anchor="rm")
    for c, name in enumerate(column_names):
        pen.text((left + c * (width + gap) + width // 2, top // 2), name, "black", font, anchor="mm")
    return np.asarray(image)


def save(path: str, picture: UInt8[np.ndarray, "height width 3"]) -> None:
    """Write a PNG whole or not at all, and make its folder if necessary."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    write_atomically(path, file.getvalue())


def png_uri(image: UInt8[np.ndarray, "h w c"]) -> str:
    """An image as a data URI of a PNG."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def svg_uri(figure: Any) -> str:
    """A figure as a data URI of an SVG, without a date, so that equal figures give equal bytes."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "cfd"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def curve_figure(curves: dict[str, list[dict]], published: dict[str, list[dict]], axis: str = "w") -> Any:
    """A matplotlib Figure: FID against Inception Score, as in Figs. 4 and 5 of arXiv:2207.12598, and both against w.

    `curves` and `published` map a name to rows of a sweep, whose curves are over `axis`, "w" or "step". Each row is a
    point; published curves are grey. The labels of the axes state the number of samples behind each FID, and the
    feature network.
    """
    from matplotlib.figure import Figure  # imported here because it takes 0.3 s, which training need not wait for

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    greys = iter(("0.35", "0.55", "0.75"))
    for number, (name, rows) in enumerate((curves | published).items()):
        rows = sorted(rows, key=lambda row: row[axis])
        x, fid, score = ([row[key] for row in rows] for key in (axis, "fid", "is"))
        style = {"color": next(greys), "linestyle": "--"} if name in published else {}
        (line,) = left.plot(score, fid, "o", markersize=4, label=name, **{"linestyle": "-"} | style)
        if name in curves:
            for row in (rows[0], rows[len(rows) // 2], rows[-1]):
                left.annotate(
                    f"{axis} = {row[axis]:g}",
                    (row["is"], row["fid"]),
                    textcoords="offset points",
                    color=line.get_color(),
                    **{"xytext": (6, -12), "ha": "left"} if number % 2 else {"xytext": (-6, 4), "ha": "right"},
                )
        middle.plot(x, fid, "o", markersize=4, **{"linestyle": "-"} | style)
        right.plot(x, score, "o", markersize=4, **{"linestyle": "-"} | style)
    rows = [row for line in curves.values() for row in line]
    fid = "/".join(sorted({row["fid_name"] for row in rows}))
    features = "/".join(sorted({row["features"] for row in rows}))
    count = ", ".join(f"{n:,} samples" for n in sorted({row["num_samples"] for row in rows}))
    left.margins(x=0.25, y=0.08)  # room for the annotations
    left.set(xlabel="Inception score", ylabel=fid, title=f"{features} features, {count}")
    middle.set(xlabel=axis, ylabel=fid)
    right.set(xlabel=axis, ylabel="Inception score")
    if len(curves | published) > 1:
        left.legend(fontsize="small")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    return figure


def save_curve(path: str, curves: dict[str, list[dict]], published: dict[str, list[dict]], axis: str = "w") -> None:
    """Write `curve_figure` as a PNG, whole or not at all."""
    file = io.BytesIO()
    curve_figure(curves, published, axis).savefig(file, format="png", dpi=120)
    write_atomically(path, file.getvalue())


def training_figure(metrics: list[dict[str, Any]]) -> Any:
    """A matplotlib Figure: loss, images per second and gradient norm against the step, from lines of metrics.jsonl."""
    from matplotlib.figure import Figure

    metrics = metrics[:: math.ceil(len(metrics) / MAX_POINTS)]
    labels = {"loss": "loss", "images_per_second": "images per second", "grad_norm": "gradient norm"}
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        points = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
        axes.plot(*zip(*points, strict=True)) if points else axes.set_axis_off()
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
    return figure
