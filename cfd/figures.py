"""Pictures: grids of images with their rows and columns named, and the FID/IS curve of a sweep."""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont


def save_grid(
    path: str, images: UInt8[np.ndarray, "rows columns h w c"], row_names: Sequence[str], column_names: Sequence[str]
) -> UInt8[np.ndarray, "height width 3"]:
    """Write a PNG with a row and a column of names; small images are enlarged by whole factors. Returns its pixels."""
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
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image.save(path)
    return np.asarray(image)


def save_curve(path: str, curves: dict[str, list[dict]], features: str) -> None:
    """The FID/IS curve, one point a weight, as in Figs. 1 and 4 of arXiv:2207.12598, beside both against w.

    `curves` maps a name to the rows of a sweep, each with w, fid and is.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, rows in curves.items():
        rows = sorted(rows, key=lambda row: row["w"])
        w, fid, score = ([row[key] for row in rows] for key in ("w", "fid", "is"))
        left.plot(score, fid, "o-", markersize=4, label=name)
        for row in (rows[0], rows[len(rows) // 2], rows[-1]):
            left.annotate(f"w = {row['w']:g}", (row["is"], row["fid"]), textcoords="offset points", xytext=(5, 5))
        middle.plot(w, fid, "o-", markersize=4)
        right.plot(w, score, "o-", markersize=4)
    count = ", ".join(sorted({f"{row['num_samples']} samples" for rows in curves.values() for row in rows}))
    left.set(xlabel="Inception score", ylabel="FID", title=f"{features} features, {count}")
    middle.set(xlabel="w", ylabel="FID")
    right.set(xlabel="w", ylabel="Inception score")
    if len(curves) > 1:
        left.legend()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
