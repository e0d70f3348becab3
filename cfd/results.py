"""The results in a run's folder: sweep.csv, the manifest of each of its rows, and tables in the layout of the paper's.

sweep.csv               a row a cell of the grid: SETTINGS, MEASURED, what FID is called, the name of its manifest
manifests/<name>.json   how the row was made; the name is a digest of the content
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cfd.workdir import write_atomically

Row = dict[str, Any]

SETTINGS: tuple[str, ...] = (
    "step", "p_uncond", "num_steps", "sampler", "v", "guidance", "interval", "w", "num_samples", "labels", "seed",
    "features",
)  # fmt: skip
MEASURED: tuple[str, ...] = ("fid", "sfid", "is", "precision", "recall", "class_accuracy")
COLUMNS: tuple[str, ...] = (*SETTINGS, *MEASURED, "fid_name", "manifest")
WORDS = ("sampler", "guidance", "interval", "labels", "features", "fid_name", "manifest")
COUNTS = ("step", "num_steps", "num_samples", "seed")
SYMBOLS = {"num_steps": "T", "num_samples": "N"}


def fid_name(num_samples: int) -> str:
    """FID is biased by the number of samples: with fewer than 50,000 it is called by that number."""
    return "FID" if num_samples >= 50_000 else f"FID-{num_samples}"


def manifest_name(manifest: dict[str, Any]) -> str:
    """16 digits of the SHA-256 of a manifest without its "environment": what must match to use a row again."""
    matched = {key: value for key, value in manifest.items() if key != "environment"}
    return hashlib.sha256(json.dumps(matched, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(folder: str, manifest: dict[str, Any]) -> None:
    """manifests/<name>.json"""
    text = json.dumps(manifest, indent=1, sort_keys=True)
    write_atomically(Path(folder, "manifests", f"{manifest_name(manifest)}.json"), text + "\n")


def read_manifest(folder: str, name: str) -> dict[str, Any] | None:
    """The manifest of a row; None if the file is not there, or does not hold what its name says."""
    path = Path(folder, "manifests", f"{name}.json")
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest_name(manifest) == name else None


def read_rows(folder: str) -> list[Row]:
    """The rows of sweep.csv; none if there is no such file. A last line that was cut short is not a row.

    Raises ValueError if the columns are not COLUMNS, and names a line that is damaged.
    """
    path = os.path.join(folder, "sweep.csv")
    lines = whole_lines(path)
    if not lines:
        return []
    reader = csv.reader(lines)
    if tuple(next(reader)) != COLUMNS:
        raise ValueError(f"{path} has other columns than this version writes: move it away to measure again")
    rows = []
    for cells in filter(None, reader):
        try:
            rows.append({key: _value(key, text) for key, text in zip(COLUMNS, cells, strict=True)})
        except ValueError:
            raise ValueError(
                f"{path}: line {reader.line_num} is damaged: delete it, and --mode=sweep measures its row again"
            ) from None
    return rows


def measured_with(folder: str, row: Row) -> str | None:
    """A digest of what the rows of one picture share: the manifest but for the guidance, its weight and the version.

    None if the manifest is not there.
    """
    manifest = read_manifest(folder, row["manifest"])
    if manifest is None:
        return None
    sampling = manifest.get("sampling", {}) | {"guidance": "", "w": 0.0}
    return manifest_name(manifest | {"cfd": "", "classifier": {}, "sampling": sampling})


def latest(folder: str) -> list[Row]:
    """The rows of sweep.csv that go together: of a curve, those measured as its last row was, such as with its
    reference; of rows of the same settings, the last."""
    rows = [(row, tuple(row[key] for key in SETTINGS if key != "w")) for row in read_rows(folder)]
    measured = [measured_with(folder, row) for row, _ in rows]
    last = {curve: how for (_, curve), how in zip(rows, measured, strict=True) if how is not None}
    kept = {
        (curve, row["w"]): row
        for (row, curve), how in zip(rows, measured, strict=True)
        if how in (None, last.get(curve))
    }
    return list(kept.values())


def _value(key: str, text: str) -> str | int | float | None:
    if key in WORDS:
        return text
    if key in COUNTS:
        return int(text)
    return float(text) if text else None


def append_row(folder: str, row: Row) -> None:
    """One more row, on the disk before the next cell begins; a line that was cut short is dropped first."""
    path = os.path.join(folder, "sweep.csv")
    lines = whole_lines(path)
    temporary = path + ".tmp"
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        file.writelines(lines) if lines else writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def whole_lines(path: str) -> list[str]:
    """The lines of a file that is perhaps not there, without a last one that was cut short."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", errors="replace") as file:  # the reader of a damaged line names it
        return [line for line in file if line.endswith("\n")]


def varied(rows: Iterable[Row]) -> tuple[str, ...]:
    """The settings, other than w, in which rows differ."""
    rows = list(rows)
    return tuple(key for key in SETTINGS if key != "w" and len({row.get(key) for row in rows}) > 1)


def curves(rows: list[Row], prefix: str = "") -> dict[str, list[Row]]:
    """Rows -> the curves over w that they make, each under the settings in which it differs from the others.

    Later rows take the place of earlier ones with the same settings.
    """
    keys = varied(rows)
    grouped: dict[str, dict[float, Row]] = {}
    for row in sorted(rows, key=lambda row: [row[key] for key in keys]):
        settings = [f"{SYMBOLS.get(key, key)} = {shown(key, row[key])}" for key in keys]
        name = ", ".join(filter(None, [prefix, *settings])) or rows[0]["guidance"] + " guidance"
        grouped.setdefault(name, {})[row["w"]] = row
    return {name: [by_weight[w] for w in sorted(by_weight)] for name, by_weight in grouped.items()}


def table(blocks: dict[str, list[Row]]) -> str:
    """A Markdown table in the layout of the paper's: a row a weight, FID and then IS, the curves of a block by slashes.

    `blocks` maps a heading, such as "ours" and "paper", to rows.
    """
    weights = sorted({row["w"] for rows in blocks.values() for row in rows})
    header, columns = ["w"], []
    for column in ("fid", "is"):
        for heading, rows in blocks.items():
            lines, keys = list(curves(rows).values()), varied(rows)
            fid = "/".join(sorted({fid_name(row["num_samples"]) for row in rows}))
            names = " / ".join(", ".join(shown(key, line[0][key]) for key in keys) for line in lines)
            what = f"{', '.join(SYMBOLS.get(key, key) for key in keys)} = {names}" if keys else ""
            header.append(" ".join(filter(None, [heading, fid if column == "fid" else "IS", what])))
            columns.append([{row["w"]: row[column] for row in line} for line in lines])
    text = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for w in weights:
        cells = [" / ".join(rounded(line[w]) if w in line else "–" for line in column) for column in columns]
        text.append(f"| {w:g} | {' | '.join(cells)} |")
    return "\n".join(text)


def rounded(value: float) -> str:
    """As the paper writes FID and IS, two decimals; three digits below 1."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def shown(key: str, value: Any) -> str:
    """A setting in words."""
    if key == "interval":
        return f"[{value.replace(':', ', ')}]" if value else "all"
    return f"{value:g}" if isinstance(value, float) else str(value)
