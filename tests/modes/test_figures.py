"""The content of the pictures: curves over w with the paper's in grey, the curves of training, and image grids."""

import base64
import io
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from PIL import Image

from cfd.evaluation import paper
from cfd.modes import figures, tables

WEIGHTS = (3.0, 0.0, 1.0)


def curve(offset: float = 0.0) -> list[dict[str, Any]]:
    """The rows of a curve, not sorted by w."""
    return [
        {"w": w, "fid": offset + 3 + w, "is": 5 + w, "fid_name": "FID-20", "features": "classifier", "num_samples": 20}
        for w in WEIGHTS
    ]


def lines_of(axes: Any) -> list[list[Any]]:
    return [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()]


def test_the_curves_are_of_what_their_axes_say() -> None:
    figure = figures.curve_figure({"a": curve(), "b": curve(10.0)}, {})
    left, middle, right = figure.axes
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == [
        ("Inception score", "FID-20"),
        ("w", "FID-20"),
        ("w", "Inception score"),
    ]
    w = sorted(WEIGHTS)
    assert lines_of(left) == [[(5 + x, offset + 3 + x) for x in w] for offset in (0.0, 10.0)]
    assert lines_of(middle) == [[(x, offset + 3 + x) for x in w] for offset in (0.0, 10.0)]
    assert lines_of(right) == [[(x, 5 + x) for x in w]] * 2
    assert figure.get_suptitle() == "classifier features, 20 samples"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert [text.get_text() for text in left.texts] == ["w = 0", "w = 3", "w = 1"] * 2
    for axes in figure.axes:  # more is to the right and higher up
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
        assert x0 < x1 and y0 < y1
    assert not figures.curve_figure({"a": curve()}, {}).legends


def test_published_curves_are_grey_and_all_others_are_not() -> None:
    published = tables.curves(paper.rows(paper.TABLE_1), "paper")
    figure = figures.curve_figure({"ours": curve()}, published)
    assert len(published) == len(paper.TABLE_1.columns) == 3
    for axes in figure.axes:
        ours, *theirs = axes.get_lines()
        assert len(theirs) == 3
        colours = [to_rgb(line.get_color()) for line in theirs]
        assert len(set(colours)) == 3 and all(len(set(colour)) == 1 for colour in colours)
        assert len(set(to_rgb(ours.get_color()))) > 1
        assert {line.get_linestyle() for line in theirs} == {"--"} and ours.get_linestyle() == "-"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["ours", *(f"paper, p_uncond = {p_uncond}" for p_uncond in paper.TABLE_1.columns)]


def test_other_methods_are_marks_where_their_numbers_say() -> None:
    baselines = (paper.Result("A", "source", fid=2.07), paper.Result("B", "source", fid=1.5, inception_score=6.0))
    figure = figures.curve_figure({"ours": curve()}, {}, baselines=baselines)
    left, middle, right = (axes.get_lines()[1:] for axes in figure.axes)
    assert [list(zip(*line.get_data(), strict=True)) for line in left] == [[], [(6.0, 1.5)]]  # A states no IS
    marks = [line.get_marker() for line in left]
    assert len(set(marks)) == 2
    for lines, heights, at in ((middle, [2.07, 1.5], marks), (right, [6.0], marks[1:])):
        across, points = lines[::2], lines[1::2]
        assert [line.get_ydata()[0] for line in across] == [line.get_ydata()[0] for line in points] == heights
        assert [line.get_xdata()[0] for line in points] == [0.0] * len(heights)
        assert [line.get_marker() for line in points] == at
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "A", "B"]


def with_intervals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with FID ± 0.5, except for the first, which has no interval."""
    first, *rest = rows
    return [first, *(row | {"fid_low": row["fid"] - 0.5, "fid_high": row["fid"] + 0.5} for row in rest)]


def test_intervals_are_bars_and_bands_where_rows_have_them() -> None:
    rows = with_intervals(curve())  # none at w = 3
    left, middle, right = figures.curve_figure({"a": rows}, {}).axes
    for axes, x in ((left, "is"), (middle, "w")):
        bars = [tuple(map(tuple, path)) for collection in axes.collections for path in bars_of(collection)]
        assert sorted(bars) == sorted(
            ((row[x], row["fid"] - 0.5), (row[x], row["fid"] + 0.5)) for row in rows if "fid_low" in row
        )
    (band,) = [collection for collection in middle.collections if isinstance(collection, PolyCollection)]
    heights = {(x, y) for path in band.get_paths() for x, y in np.asarray(path.vertices)}
    assert heights == {(w, 3 + w + sign * 0.5) for w in (0.0, 1.0) for sign in (-1, 1)}
    assert not right.collections  # no intervals of IS
    plain = figures.curve_figure({"a": curve()}, {})
    assert not any(axes.collections for axes in plain.axes)


def bars_of(collection: Any) -> list[Any]:
    return [] if isinstance(collection, PolyCollection) else [path.vertices for path in collection.get_paths()]


def test_real_images_are_a_band_on_the_axes_of_fid() -> None:
    figure = figures.curve_figure({"a": curve()}, {}, real=(1.75, 2.25))
    for axes, there in zip(figure.axes, (True, True, False), strict=True):
        bands = [patch.get_bbox().intervaly.tolist() for patch in axes.patches]
        assert bands == ([[1.75, 2.25]] if there else [])
        assert not there or axes.get_ylim()[0] < 1.75
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "real images"]


def test_no_text_hides_another_one_or_a_point() -> None:
    """A run that guidance changes little, beside one far above it, in files of different numbers of samples."""
    near = [row | {"fid": 3 + row["w"] / 1e3, "is": 9 + row["w"] / 1e3} for row in curve()]
    far = [row | {"fid": 1200 + row["w"], "num_samples": n} for row, n in zip(curve(), (100, 1000, 20), strict=True)]
    far = [row | {"fid_name": f"FID-{row['num_samples']}"} for row in far]
    figure = figures.curve_figure({"a curve whose name is long": far, "b": near}, {}, real=(1.0, 2.0))
    figure.draw_without_rendering()
    left, *others = figure.axes
    # There is one name for all points of `near`.
    assert [text.get_text() for text in left.texts] == ["w = 0", "w = 3", "w = 1", "w = 0"]
    title, (legend,) = figure._suptitle, figure.legends
    boxes = [text.get_window_extent() for text in (*left.texts, title)] + [legend.get_window_extent()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert title.get_text() == "classifier features, 20/100/1,000 samples"
    assert [axes.get_ylabel() for axes in (left, *others)][:2] == ["FID-20/FID-100/FID-1000"] * 2


def test_without_inception_scores_there_is_fid_against_w_alone() -> None:
    (axes,) = figures.curve_figure({"a": [row | {"is": None} for row in curve()]}, {}).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("w", "FID-20")
    assert lines_of(axes) == [[(x, 3 + x) for x in sorted(WEIGHTS)]]


def test_many_curves_look_different_and_have_their_names_below() -> None:
    curves = {f"rule {i}": curve(float(i)) for i in range(40)}
    figure = figures.curve_figure(curves, {})
    looks = {(to_rgb(line.get_color()), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(looks) == 40 and all(len(set(colour)) > 1 for colour, _ in looks)  # none is grey
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(curves)
    assert not figure.axes[0].texts


@pytest.mark.parametrize("count", [1, 399, 400, 401, 1000, 123_457])
def test_a_training_curve_has_at_most_about_max_points(count: int) -> None:
    metrics = [{"step": i + 1, "loss": 1 / (i + 1), "images_per_second": 50.0, "grad_norm": 2.0} for i in range(count)]
    figure = figures.training_figure(metrics)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "images per second", "gradient norm"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"step"}
    for axes, key in zip(figure.axes, ("loss", "images_per_second", "grad_norm"), strict=True):
        (points,) = lines_of(axes)
        assert min(count, figures.MAX_POINTS / 2) <= len(points) <= figures.MAX_POINTS
        assert points[0] == (1, metrics[0][key])
        assert all(y == metrics[x - 1][key] for x, y in points)


def test_values_that_are_not_finite_or_missing_are_left_out() -> None:
    metrics = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None, "grad_norm": None}, {"step": 3, "loss": 0.5}]
    loss, rate, norm = figures.training_figure(metrics).axes
    assert lines_of(loss) == [[(1, 1.0), (3, 0.5)]] and not any(map(math.isnan, loss.get_xlim()))
    assert not rate.get_lines() and not norm.get_lines()


def test_equal_figures_give_equal_bytes_and_refer_to_nothing_outside() -> None:
    def uris() -> list[str]:
        metrics = [{"step": i, "loss": 1 / i} for i in range(1, 20)]
        published = tables.curves(paper.rows(paper.TABLE_1), "paper")
        pictures = figures.curve_figure({"ours": curve()}, published), figures.training_figure(metrics)
        return [figures.svg_uri(picture) for picture in pictures]

    one, two = uris(), uris()
    assert one == two and one[0] != one[1]
    for uri in one:
        prefix = "data:image/svg+xml;base64,"
        assert uri.startswith(prefix)
        svg = base64.b64decode(uri[len(prefix) :]).decode()
        assert "<svg" in svg and "<dc:date>" not in svg and "<script" not in svg
        assert all(reference.startswith("#") for reference in re.findall(r'href="([^"]*)"', svg))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_comes_back_from_its_uri(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, channels), np.uint8)
    prefix, _, data = figures.png_uri(image).partition(",")
    assert prefix == "data:image/png;base64"
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(decoded.reshape(8, 8, channels), image)


@pytest.mark.parametrize(("size", "channels", "zoom"), [(8, 1, 8), (64, 3, 1), (40, 3, 1)])
def test_a_grid_has_each_image_once_enlarged_by_a_whole_factor(size: int, channels: int, zoom: int) -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 3, size, size, channels), np.uint8)
    picture = figures.grid(images, ["zero", "seven"], ["w = 0", "w = 1", "w = 2"])
    step, top = zoom * size + 2, 24
    left = picture.shape[1] - 3 * step
    assert picture.shape == (top + 2 * step, left + 3 * step, 3) and picture.dtype == np.uint8
    for r in range(2):
        for c in range(3):
            y, x = top + r * step, left + c * step
            tile = picture[y : y + zoom * size : zoom, x : x + zoom * size : zoom]
            np.testing.assert_array_equal(tile, np.broadcast_to(images[r, c], tile.shape))
    assert (picture[:, :left] < 128).any() and (picture[:top] < 128).any()  # the names
