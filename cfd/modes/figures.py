"""Pictures: grids of images with named rows and columns, the curves of a sweep, and the curves of training."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from cfd.evaluation.paper import Result
from cfd.runs.files import write_atomically
from cfd.runs.results import fid_names

MAX_POINTS = 400
"""Points per training curve, at most about this many."""
MAX_NAMED = 4
"""Curves, at most, with their weights at the points and bands."""
Interval = tuple[float, float]
"""The ends of a 95 % interval."""


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


def curve_figure(
    curves: dict[str, list[dict]],
    published: dict[str, list[dict]],
    axis: str = "w",
    real: Interval | None = None,
    baselines: Sequence[Result] = (),
) -> Any:
    """A matplotlib Figure: FID against Inception Score, as in Figs. 4 and 5 of arXiv:2207.12598, and both against w.

    `curves` and `published` map a name to rows of a sweep, whose curves are over `axis`, "w" or "step". Each row is a
    point; published curves are grey. Bands and bars are the rows' 95 % intervals; more than MAX_NAMED curves have bars
    alone. `real` is the interval of FID of real images. `baselines` are published results of other methods, each a mark
    and lines of its height. The title states the feature network and the number of samples, which is also in the label
    of FID. Without Inception Scores, which some feature networks do not give, there is FID against w alone.
    """
    from matplotlib.figure import Figure  # imported here because it takes 0.3 s, which training need not wait for

    rows = [row for line in curves.values() for row in line]
    scored = any(row["is"] is not None for row in rows)
    pairs = [("is", "fid"), (axis, "fid"), (axis, "is")] if scored else [(axis, "fid")]
    crowded = len(curves) > MAX_NAMED
    figure = Figure(figsize=(11 if scored else 6, 4.2), layout="constrained")
    drawn = figure.subplots(1, len(pairs), squeeze=False)[0]
    greys, own, weights = iter(("0.35", "0.55", "0.75")), iter(styles(len(curves))), []
    for number, (name, line) in enumerate((curves | published).items()):
        line = sorted(line, key=lambda row: row[axis])
        style = {"color": next(greys), "linestyle": "--"} if name in published else next(own)
        for axes, (x, y) in zip(drawn, pairs, strict=True):
            shown = [row for row in line if row[x] is not None and row[y] is not None]
            axes.plot([row[x] for row in shown], [row[y] for row in shown], "o", markersize=4, label=name, **style)
            bars(axes, shown, x, y, style["color"])
            if x == axis and not crowded:
                band(axes, shown, x, y, style["color"])
            elif shown and x != axis and name in curves and not crowded:
                weights += [
                    axes.annotate(
                        f"{axis} = {row[axis]:g}",
                        (row[x], row[y]),
                        textcoords="offset points",
                        color=style["color"],
                        **{"xytext": (6, -12), "ha": "left"} if number % 2 else {"xytext": (-6, 4), "ha": "right"},
                    )
                    for row in (shown[0], shown[-1], shown[len(shown) // 2])
                ]
    labels = {"is": "Inception score", "fid": fid_names(rows), axis: axis}
    for axes, (x, y) in zip(drawn, pairs, strict=True):
        axes.set(xlabel=labels[x], ylabel=labels[y])
        axes.grid(alpha=0.3)
        reference_lines(axes, baselines, x, y)
        if y == "fid":
            floor(axes, real)
        if x == "is":
            axes.margins(x=0.25, y=0.08)  # room for the annotations
    remove_overlapping(weights)
    features = "/".join(sorted({row["features"] for row in rows}))
    count = "/".join(f"{n:,}" for n in sorted({row["num_samples"] for row in rows}))
    figure.suptitle(f"{features} features, {count} samples")
    handles, names = drawn[0].get_legend_handles_labels()
    if len(names) > 1:  # below the axes, where it hides no point
        beside = max(1, (150 if scored else 80) // (max(map(len, names)) + 6))
        figure.set_figheight(4.2 + 0.2 * math.ceil(len(names) / beside))
        figure.legend(handles, names, loc="outside lower center", ncols=beside, fontsize="small")
    return figure


def remove_overlapping(texts: Sequence[Any]) -> None:
    """Removes each text that would overlap an earlier one on axes of the size that they have before the layout."""
    kept: list[Any] = []
    for text in texts:
        text.axes.autoscale_view()  # matplotlib would set the limits when it draws
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in kept):
            text.remove()
        else:
            kept.append(box)


def styles(count: int) -> list[dict[str, Any]]:
    """A colour and a line for each of `count` curves, none of them grey. Up to 23 curves have different colours."""
    from matplotlib import colormaps

    lights = (1, 3, 5, 7, 9, 11, 13, 17, 19)
    colours: list[Any] = [f"C{i}" for i in range(10) if i != 7]  # C7 is grey
    colours += [colormaps["tab20b"](i) for i in range(0, 20, 4)] + [colormaps["tab20"](i) for i in lights]
    lines = ("-", "--", "-.", ":")
    return [
        {"color": colours[i % len(colours)], "linestyle": lines[i // len(colours) % len(lines)]} for i in range(count)
    ]


def bars(axes: Any, rows: Sequence[Mapping[str, Any]], x: str, y: str, colour: Any) -> None:
    """Thin bars through the points of rows, along both axes: the 95 % intervals of those measures that have one."""
    style = {"color": colour, "linewidth": 0.8, "alpha": 0.5}
    if across := [(row[y], *ends) for row in rows if (ends := interval_of(row, x))]:
        axes.hlines(*zip(*across, strict=True), **style)
    if along := [(row[x], *ends) for row in rows if (ends := interval_of(row, y))]:
        axes.vlines(*zip(*along, strict=True), **style)


def band(axes: Any, rows: Sequence[Mapping[str, Any]], x: str, y: str, colour: Any) -> None:
    """The 95 % intervals of the measure y of rows as a band along x, with gaps at rows without one."""
    ends = [interval_of(row, y) or (math.nan, math.nan) for row in rows]
    if not all(math.isnan(low) for low, _ in ends):
        axes.fill_between([row[x] for row in rows], *zip(*ends, strict=True), color=colour, alpha=0.15, linewidth=0)


def interval_of(row: Mapping[str, Any], key: str) -> Interval | None:
    """The 95 % interval of a measure of a row, if it has one."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return None if low is None or high is None else (low, high)


def reference_lines(axes: Any, baselines: Sequence[Result], x: str, y: str) -> None:
    """Published results as grey marks: at their FID and IS, or on a line of that height, at the left edge."""
    for mark, result in zip("s^Dv*Xp", baselines, strict=False):
        values = {"fid": result.fid, "is": result.inception_score}
        style: dict[str, Any] = {"marker": mark, "color": "0.45", "markersize": 5, "linestyle": "none"}
        across, height = values.get(x), values[y]
        if x in values:
            stated = across is not None and height is not None
            axes.plot([across] if stated else [], [height] if stated else [], label=result.method, **style)
        elif height is not None:
            axes.axhline(height, color="0.45", linewidth=0.8, linestyle=":", zorder=0)
            axes.plot(
                [0.0], [height], transform=axes.get_yaxis_transform(), clip_on=False, label=result.method, **style
            )


def floor(axes: Any, real: Interval | None) -> None:
    """The interval of FID of real images as a horizontal band."""
    if real is not None:
        axes.axhspan(*real, color="0.6", alpha=0.3, linewidth=0, label="real images", zorder=0)


def logarithmic(axes: Any) -> None:
    """A logarithmic vertical axis, with plain numbers."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())


def save_curve(
    path: str,
    curves: dict[str, list[dict]],
    published: dict[str, list[dict]],
    axis: str = "w",
    real: Interval | None = None,
    baselines: Sequence[Result] = (),
) -> None:
    """Write `curve_figure` as a PNG, whole or not at all."""
    save_figure(path, curve_figure(curves, published, axis, real, baselines))


def save_figure(path: str, figure: Any, dpi: int = 120) -> None:
    """Write a matplotlib Figure as a PNG, whole or not at all."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
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


def rate_figure(
    rate: Float[np.ndarray, " t"], rmse: Float[np.ndarray, " t"], logsnr: Float[np.ndarray, " t"], title: str
) -> Any:
    """A matplotlib Figure of a progressive code: distortion and rate against λ, and distortion against rate.

    The rate is in bits per dimension and the distortion a root mean squared error on the scale of 0 to 255.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    distortion, spent = "root mean squared error (0 to 255)", "rate (bits per dimension)"
    level = "log-SNR λ"
    panels = ((logsnr, rmse, level, distortion), (logsnr, rate, level, spent), (rate, rmse, spent, distortion))
    figure.suptitle(title, fontsize=11)
    for axes, (x, y, across, up) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(x, y)
        axes.set(xlabel=across, ylabel=up)
        axes.grid(alpha=0.3)
    return figure
