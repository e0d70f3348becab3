"""The measured results of a run: sweep.csv, with one row per cell of the grid, and the images of each row.

sweep.csv                 SETTINGS, MEASURED with their intervals, the name to give FID, and the row's manifest
samples/<...>.npz         the images of a row, in the layout of OpenAI's evaluator
intervals/<manifest>.json the measures of a row, computed again without each group of its images
classes/<manifest>.csv    the measures of each class of a row
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from cfd.errors import UserError
from cfd.runs import files, npz
from cfd.runs.manifest import SAMPLING, measured_with

Row = dict[str, Any]

SETTINGS: tuple[str, ...] = ("step", "ema", "p_uncond", *SAMPLING, "features")
MEASURED: tuple[str, ...] = (
    "fid",
    "fid_test",
    "sfid",
    "kid",
    "is",
    "precision",
    "recall",
    "class_accuracy",
    "saturation",
)
"""The measures of a row. Each may be None, where the feature network or the reference does not give it."""
INTERVALS = tuple(f"{key}_{end}" for key in MEASURED for end in ("low", "high"))
"""The ends of the 95 % interval of each measure, or None."""
COLUMNS: tuple[str, ...] = (*SETTINGS, *MEASURED, *INTERVALS, "kid_se", "fid_name", "manifest")
YOUNGER = ("ema", "rule", "guide", "fid_test", "kid", "saturation", *INTERVALS, "kid_se")
"""Columns that a sweep.csv of an earlier version lacks."""
WORDS = ("sampler", "guidance", "rule", "guide", "interval", "labels", "features", "fid_name", "manifest")
WITHOUT_SAMPLES = "remove the file, and the images of its row are left out"
"""The remedy for damaged samples. The measures of the row stay in sweep.csv."""
COUNTS = ("step", "num_steps", "num_samples", "seed")


def fid_name(num_samples: int, features: str) -> str:
    """The name to give the Fréchet distance in a feature network: FID, or FD-DINOv2 with DINOv2.

    With fewer than 50,000 samples it includes their number, because the distance is biased by it.
    """
    name = "FD-DINOv2" if features == "dinov2" else "FID"
    return name if num_samples >= 50_000 else f"{name}-{num_samples}"


def fid_names(rows: Iterable[Row]) -> str:
    """The names of the Fréchet distances of these rows, in the order of their numbers of samples, joined by /."""
    counts = sorted({(row["num_samples"], row["features"]) for row in rows})
    return "/".join(dict.fromkeys(fid_name(*count) for count in counts))


def samples_path(folder: str, row: Row) -> str:
    """The file of a row's images. The name includes the manifest's, so no other row has the same file.

    An interval is written without a colon, which `scp` and `rsync` take for the name of a host. On a disk, a file that
    an earlier version named with it is found too. Of a long rule or guide, the name has a part: file systems limit the
    length of a name to 255 bytes.
    """
    keys = [key for key in SETTINGS if key not in ("p_uncond", "features") and row[key] != ""]
    # The name for the run's own EMA is that of versions that had no other.
    keys = [key for key in keys if key != "ema" or row[key]]
    parts = row | {"rule": _safe(row["rule"])[:16], "guide": _safe(row["guide"])[-16:]}
    earlier = f"{'_'.join(f'{key}-{parts[key]}' for key in keys)[:200]}_manifest-{row['manifest']}"
    path, old = (os.path.join(folder, "samples", f"{name}.npz") for name in (earlier.replace(":", "_"), earlier))
    if files.is_url(folder):  # no version with colons wrote to buckets
        return path
    return old if os.path.exists(old) and not os.path.exists(path) else path


def first_samples(folder: str, row: Row, name: str, count: int) -> Shaped[np.ndarray, "n ..."]:
    """The first `count` images ("arr_0") or classes ("arr_1") of a row. Raises ValueError if its file is damaged."""
    return next(npz.npz_batches(samples_path(folder, row), name, count, remedy=WITHOUT_SAMPLES))


def _safe(text: str) -> str:
    """A text with letters and digits that every file system takes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")


def swept_folder(folder: str, out: str) -> str:
    """The folder with a run's sweep: `out`, where a sweep of the run in `folder` may have written it, or the run's."""
    return out if files.exists(os.path.join(out, "sweep.csv")) else folder


def read_rows(folder: str) -> list[Row]:
    """The rows of sweep.csv, or [] if there is no such file. A last line that was cut short is ignored.

    Columns that a file of an earlier version lacks are "" for settings and None for measures. Raises ValueError if the
    file has other columns, or if a line is damaged; the message gives its number.
    """
    path = os.path.join(folder, "sweep.csv")
    lines = whole_lines(path)
    if not lines:
        return []
    reader = csv.reader(lines)
    header = next(reader)
    if not _is_header(header):
        raise UserError(f"{path} has other columns than this version writes: move it away to measure again")
    missing = dict.fromkeys(COLUMNS) | {"ema": 0.0, "rule": "", "guide": ""}
    rows = []
    for cells in filter(None, reader):
        try:
            rows.append(missing | {key: _value(key, text) for key, text in zip(header, cells, strict=True)})
        except ValueError:
            raise UserError(
                f"{path}: line {reader.line_num} is damaged: delete it, and --mode=sweep measures its row again"
            ) from None
    return rows


def count_rows(folder: str) -> int:
    """The number of rows of sweep.csv. Unlike `read_rows`, it looks at no value, and is cheap after every row."""
    return sum(line.strip() != "" for line in whole_lines(os.path.join(folder, "sweep.csv"))[1:])


def _is_header(names: Sequence[str]) -> bool:
    """Whether these are the columns of sweep.csv, in this version or in an earlier one."""
    return len(set(names)) == len(names) and set(COLUMNS) - set(YOUNGER) <= set(names) <= set(COLUMNS)


def _value(key: str, text: str) -> str | int | float | None:
    if key in WORDS:
        return text
    if key in COUNTS:
        return int(text)
    if key == "ema":  # empty in the rows of an earlier version
        return float(text or 0.0)
    return float(text) if text or key in SETTINGS else None


def latest(folder: str) -> list[Row]:
    """The rows of sweep.csv that belong together.

    Rows that differ only in w form a curve. Of each curve, this keeps the rows that were measured like its last row,
    for example with the same reference. Of several rows with the same settings, it keeps the last.
    """
    rows = [(row, tuple(row[key] for key in SETTINGS if key != "w")) for row in read_rows(folder)]
    measured = [measured_with(folder, row) for row, _ in rows]
    last = {curve: how for (_, curve), how in zip(rows, measured, strict=True) if how is not None}
    kept = {
        (curve, row["w"]): row
        for (row, curve), how in zip(rows, measured, strict=True)
        if how in (None, last.get(curve))
    }
    return list(kept.values())


def append_row(folder: str, row: Row) -> None:
    """Adds a row to sweep.csv, which is on the disk when this returns. A last line that was cut short is dropped.

    A file of an earlier version gets the columns of this one in the same write; what it holds stays.
    """
    added = io.StringIO()
    csv.DictWriter(added, COLUMNS, lineterminator="\n").writerow(row)
    line = added.getvalue()

    written = b""

    def append(content: bytes) -> bytes:
        nonlocal written
        if not written or content != written:
            written = "".join([*_with_all_columns(_whole_lines(content)), line]).encode()
        return written

    files.rewrite(os.path.join(folder, "sweep.csv"), append)


def _with_all_columns(lines: list[str]) -> list[str]:
    """The lines of a sweep.csv of any version with the columns of this one. A damaged line stays as it is."""
    header = next(csv.reader(lines[:1]), list(COLUMNS))
    if not _is_header(header) or (lines and header == list(COLUMNS)):
        return lines
    upgraded = io.StringIO()
    writer = csv.DictWriter(upgraded, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in lines[1:]:
        cells = next(csv.reader([line]))
        if len(cells) == len(header):
            writer.writerow(dict(zip(header, cells, strict=True)))
        else:
            upgraded.write(line)
    return [upgraded.getvalue()]


def write_without(folder: str, manifest_name: str, without: Mapping[str, Sequence[float]]) -> None:
    """Writes intervals/<manifest>.json: each measure of a row, computed again without each group of its images."""
    text = json.dumps({key: list(values) for key, values in without.items()}, indent=1, sort_keys=True)
    files.write_atomically(files.place(folder, "intervals", f"{manifest_name}.json"), text + "\n")


def read_without(folder: str, row: Mapping[str, Any]) -> dict[str, list[float]] | None:
    """The measures of a row without each group of its images; None if the file is missing or damaged.

    A number may be NaN, where a measure is not defined without a group.
    """
    try:
        found = json.loads(files.read_bytes(files.place(folder, "intervals", f"{row['manifest']}.json")) or b"")
    except ValueError:
        return None
    sound = isinstance(found, dict) and all(
        isinstance(values, list) and all(type(value) in (int, float) for value in values) for values in found.values()
    )
    return found if sound else None


def write_classes(folder: str, manifest_name: str, classes: Sequence[Mapping[str, Any]]) -> None:
    """Writes classes/<manifest>.csv: a line per class, with the columns of the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(classes[0]) if classes else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(classes)
    files.write_atomically(files.place(folder, "classes", f"{manifest_name}.csv"), text.getvalue())


def read_classes(folder: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of classes/<manifest>.csv of a row; [] if there is no such file. Raises ValueError if it is damaged."""
    path = os.fspath(files.place(folder, "classes", f"{row['manifest']}.csv"))
    try:
        return [{key: _number(key, text) for key, text in line.items()} for line in csv.DictReader(whole_lines(path))]
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be used ({error}): delete it to go on without it") from None


def _number(key: str, text: str) -> int | float | None:
    if key in ("class", "images"):
        return int(text)
    return float(text) if text else None


def whole_lines(path: str) -> list[str]:
    """The lines of a file, without a last line that was cut short; [] if there is no such file."""
    try:
        return _whole_lines(files.read_bytes(path) or b"")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {files.how_to_allow(path)}") from error


def _whole_lines(content: bytes) -> list[str]:
    # Bytes that are not UTF-8 are replaced: whoever parses a damaged line can then give its number.
    text = io.StringIO(content.decode(errors="replace"), newline="")
    return [line for line in text if line.endswith("\n")]
