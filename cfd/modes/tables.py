"""Curves over w, and tables in the layout of the paper's, from rows of results."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cfd.config import Config
from cfd.evaluation import intervals, paper
from cfd.evaluation.floor import read_floor
from cfd.runs import manifest
from cfd.runs.results import MEASURED, SETTINGS, Row, fid_names

SYMBOLS = {"num_steps": "T", "num_samples": "N", "run_name": "run"}
NAMES = {"sfid": "sFID", "kid": "KID", "is": "IS", "class_accuracy": "asked class"}
"""How tables write a measure, where they do not use its name in sweep.csv."""
EMPTY = {"interval": "all", "rule": "plain", "guide": "classifier-free"}
"""How tables write settings that are ""."""


RUN = "run_name"
"""A setting that rows may have beside those of sweep.csv: the run that they are of."""


def varied(rows: Iterable[Row], axis: str = "w") -> tuple[str, ...]:
    """The names of the settings, other than the axis of the curves, in which rows differ."""
    rows = list(rows)
    return tuple(key for key in (RUN, *SETTINGS) if key != axis and len({row.get(key) for row in rows}) > 1)


def guided_in_several_ways(rows: Iterable[Row]) -> bool:
    """Whether rows differ in rule or guide."""
    return bool({"rule", "guide"} & set(varied(rows)))


def curves(rows: list[Row], prefix: str = "", axis: str = "w") -> dict[str, list[Row]]:
    """The curves over w, or over "step", that rows form, each named by the settings in which it differs.

    If several rows have the same settings, the last one counts.
    """
    keys = varied(rows, axis)
    grouped: dict[str, dict[float, Row]] = {}
    for row in sorted(rows, key=lambda row: [(isinstance(row[key], str), row[key]) for key in keys]):
        name = ", ".join(filter(None, [prefix, in_full(row, keys)])) or rows[0]["guidance"] + " guidance"
        grouped.setdefault(name, {})[row[axis]] = row
    return {name: [along[x] for x in sorted(along)] for name, along in grouped.items()}


def overlap(rows: list[Row]) -> bool:
    """Whether several rows have the same settings, so that `curves` would show only one of them."""
    return sum(map(len, curves(rows).values())) < len(rows)


def longest(curves: dict[str, list[Row]]) -> list[Row]:
    """The curve of most points among those of the newest step."""
    return max(curves.values(), key=lambda line: (line[0]["step"], len(line)))


def over_seeds(folder: str, rows: list[Row]) -> list[Row]:
    """Rows of a run in which those that differ in seed alone are one row, the mean over the seeds.

    Its intervals are Student's t intervals over the seeds, its "seed" names all seeds of its curve, and its "seeds" is
    the number of those that it has. A row of one seed keeps its interval over images. Rows that were measured in
    different ways, such as with different references, stay apart.
    """
    if len({row["seed"] for row in rows}) < 2:
        return rows
    grouped: dict[tuple, dict[float, dict[int, Row]]] = {}
    for row in rows:
        settings = (*(row[key] for key in SETTINGS if key not in ("w", "seed")), made_with(folder, row))
        grouped.setdefault(settings, {}).setdefault(row["w"], {})[row["seed"]] = row
    merged = []
    for along in grouped.values():
        seeds = sorted({seed for cell in along.values() for seed in cell})
        name = {"seed": ", ".join(map(str, seeds))} if len(seeds) > 1 else {}
        merged += [mean_row([cell[seed] for seed in sorted(cell)]) | name for cell in along.values()]
    return merged


def made_with(folder: str, row: Row) -> str:
    """All that made a row except for its weight, its seed and the version of cfd; its own name without a manifest."""
    made = manifest.read_manifest(folder, row["manifest"])
    if made is None:
        return row["manifest"]
    sampling = made["sampling"] | {"w": 0.0, "seed": 0}
    return json.dumps(made | {"cfd": "", "environment": {}, "sampling": sampling}, sort_keys=True)


def mean_row(rows: Sequence[Row]) -> Row:
    """The mean of rows that differ in seed alone, with the t interval over them. A single row stays as it is."""
    if len(rows) == 1:
        return rows[0] | {"seeds": 1}
    row = rows[0] | {"seeds": len(rows), "kid_se": None}
    for key in MEASURED:
        values = [row[key] for row in rows]
        ends: tuple[float | None, float | None] = (None, None)
        row[key] = None
        if None not in values:
            row[key] = float(np.mean(values))
            ends = intervals.interval(row[key], without_each(values))
        row[f"{key}_low"], row[f"{key}_high"] = ends
    return row


def without_each(values: Sequence[float]) -> list[float]:
    """The mean without each of the values. The jackknife of these is Student's t interval of the mean."""
    return [float(np.mean(np.delete(values, i))) for i in range(len(values))]


class Published(NamedTuple):
    """Published results on the images of a run: rows of the paper's own table, its other methods, and other papers'."""

    rows: list[Row]
    baselines: tuple[paper.Result, ...]
    others: tuple[paper.Result, ...]


def published_of(config: Config, class_names: Sequence[str]) -> Published:
    """The published results with which those of `config` may be compared; each part is empty if there are none.

    Bits per dimension can be compared always, and the other metrics only if the features are Inception's.
    """
    data, features = config.data, config.eval.features
    own = paper.table_of(name=data.name, num_classes=len(class_names), image_size=data.image_size, features=features)
    place = paper.data_set(data.name, class_names, imported=data.source == "adm"), data.image_size
    inception = features == "inception"
    others = [result for result in paper.OTHERS.get(place, ()) if inception or result.bits_per_dim is not None]
    baselines = paper.BASELINES.get(place, ()) if inception else ()
    return Published([] if own is None else paper.rows(own), baselines, tuple(others))


def literature(published: Published, *, bits: bool = False) -> str:
    """A Markdown table of published metrics with their sources, or of bits per dimension; "" if there are none."""
    names = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "precision", "recall": "recall"}
    names = {"bits_per_dim": "bits/dim"} if bits else names
    body = []
    for result in (*published.baselines, *published.others):
        values = [getattr(result, key) for key in names]
        if any(value is not None for value in values):
            shown = ("–" if value is None else f"{value:.2f}" for value in values)
            body.append([result.method, *shown, result.source])
    return markdown(["published", *names.values(), "source"], body) if body else ""


def table(blocks: dict[str, list[Row]]) -> str:
    """A Markdown table in the layout of the paper's: one row per weight, FID columns and then IS columns.

    `blocks` maps a heading, such as "ours" or "paper", to rows. Slashes separate the curves of a block.
    """
    everything = [row for rows in blocks.values() for row in rows]
    weights = sorted({row["w"] for row in everything})
    header, columns = ["w"], []
    for column in ("fid", "is"):
        for heading, rows in blocks.items():
            lines, keys = list(curves(rows).values()), varied(rows)
            names = " / ".join(", ".join(in_words(key, line[0][key]) for key in keys) for line in lines)
            what = f"{', '.join(SYMBOLS.get(key, key) for key in keys)} = {names}" if keys else ""
            header.append(" ".join(filter(None, [heading, measure_name(column, rows), what])))
            columns.append([{row["w"]: with_interval(row, column) for row in line} for line in lines])
    body = [[f"{w:g}", *(" / ".join(line.get(w, "–") for line in column) for column in columns)] for w in weights]
    return markdown(header, body)


def cells(rows: list[Row]) -> str:
    """A Markdown table of every measure of rows, with a line per row, in the order of curves and of w."""
    keys = varied(rows)
    present = [key for key in MEASURED if any(row.get(key) is not None for row in rows)]
    header = [*(SYMBOLS.get(key, key) for key in keys), "w", *(measure_name(key, rows) for key in present)]
    body = [
        [*(in_words(key, row[key]) for key in keys), f"{row['w']:g}", *(with_interval(row, key) for key in present)]
        for line in curves(rows).values()
        for row in line
    ]
    return markdown(header, body)


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table. A bar inside a cell is escaped."""
    lines = [[text.replace("|", "\\|") for text in line] for line in (header, *body)]
    top, *rest = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([top, f"|{'---|' * len(header)}", *rest])


def caption(rows: Iterable[Row]) -> str:
    """A sentence on how the intervals of rows were made; "" if no row has any."""
    rows = list(rows)
    kinds = []
    if any(row.get(f"{key}_low") is not None for row in rows if row.get("seeds", 1) == 1 for key in MEASURED):
        kinds.append("over images (delete-a-group jackknife)")
    if counts := sorted({row["seeds"] for row in rows if row.get("seeds", 1) > 1}):
        kinds.append(f"of the mean over {'/'.join(map(str, counts))} seeds (Student's t)")
    return f"± is half the 95 % interval: {', or '.join(kinds)}." if kinds else ""


def floor_of(folder: str, rows: Iterable[Row]) -> dict[str, Any] | None:
    """The metrics of real images by `read_floor`, if a row has the same reference and as many images."""
    found = read_floor(folder)
    if found is None:
        return None
    for row in rows:
        made = manifest.read_manifest(folder, row["manifest"]) if row["num_samples"] == found["num_samples"] else None
        if made is not None and made["reference"]["sha256"] == found["reference"]:
            return found
    return None


def real_fid(floor: dict[str, Any] | None, rows: Iterable[Row]) -> tuple[float, float] | None:
    """The interval of FID of real images, if it was measured with as many images as all rows."""
    if floor is None or floor["fid"] is None or {row["num_samples"] for row in rows} != {floor["num_samples"]}:
        return None
    return floor["fid"]["low"], floor["fid"]["high"]


def real_images(floor: dict[str, Any] | None, features: str) -> str:
    """A line on real images in these features, to stand below a table; "" if nothing was measured."""
    if floor is None:
        return ""
    rows, lines = [{"num_samples": floor["num_samples"], "features": features}], []
    drawn = [
        f"{measure_name(key, rows)} {plus_minus(*(floor[key][part] for part in ('mean', 'low', 'high')))}"
        for key in ("fid", "kid")
        if floor[key] is not None
    ]
    if drawn:
        classes = ", each with equally many images of each class" if floor.get("balanced") else ""
        lines.append(f"Real images: {', '.join(drawn)} (95 % of {floor['draws']} draws from the reference{classes}).")
    held_out = floor["held_out"] or {}
    keys = ("precision", "recall", "is", "class_accuracy")
    measured = [f"{measure_name(key, rows)} {rounded(held_out[key])}" for key in keys if held_out.get(key) is not None]
    if measured:
        lines.append(f"The {held_out['images']:,} images of the split {held_out['split']!r}: {', '.join(measured)}.")
    if floor.get("saturation") is not None:
        lines.append(f"Saturation of the reference: {rounded(floor['saturation'])}.")
    return " ".join(lines)


def measure_name(key: str, rows: Iterable[Row]) -> str:
    """The heading of a measure, with the number of samples behind a Fréchet distance."""
    if key not in ("fid", "fid_test"):
        return NAMES.get(key, key)
    name = fid_names(rows)
    return name if key == "fid" else f"{name} (held-out)"


def with_interval(row: Row, key: str) -> str:
    """A measure of a row, as "4.53 ± 0.62", or alone if it has no interval; "–" if it is not measured."""
    return plus_minus(row.get(key), row.get(f"{key}_low"), row.get(f"{key}_high"))


def plus_minus(value: float | None, low: float | None, high: float | None) -> str:
    """A value with half the width of its interval, which has two digits at least; "–" without a value."""
    if value is None:
        return "–"
    if low is None or high is None:
        return rounded(value)
    half = (high - low) / 2
    decimals = min(max(2, 1 - math.floor(math.log10(half))), 9) if half > 1e-9 else 2
    return f"{value:.{decimals}f} ± {half:.{decimals}f}"


def rounded(value: float) -> str:
    """A number as the paper writes FID and IS: two decimals, or three digits if it is below 1."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def in_full(row: Row, keys: Iterable[str]) -> str:
    """Some settings of a row as text, such as "T = 32, rule = plain"."""
    return ", ".join(f"{SYMBOLS.get(key, key)} = {in_words(key, row[key])}" for key in keys)


def in_words(key: str, value: Any) -> str:
    """A setting as text."""
    if value == "":
        return EMPTY.get(key, value)
    if key == "ema" and not value:
        return "the run's own"
    if key == "interval":
        return f"[{value.replace(':', ', ')}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
