"""The measured results of a run: sweep.csv, with one row per cell of the grid, and the images of each row.

sweep.csv               SETTINGS, MEASURED, the name to give FID, and the name of the row's manifest
samples/<...>.npz       the images of a row, in the layout of OpenAI's evaluator
"""

import csv
import io
import os
from typing import Any

from cfd.errors import UserError
from cfd.runs import files
from cfd.runs.manifest import SAMPLING, measured_with

Row = dict[str, Any]

SETTINGS: tuple[str, ...] = ("step", "p_uncond", *SAMPLING, "features")
MEASURED: tuple[str, ...] = ("fid", "sfid", "is", "precision", "recall", "class_accuracy")
COLUMNS: tuple[str, ...] = (*SETTINGS, *MEASURED, "fid_name", "manifest")
WORDS = ("sampler", "guidance", "interval", "labels", "features", "fid_name", "manifest")
COUNTS = ("step", "num_steps", "num_samples", "seed")


def fid_name(num_samples: int) -> str:
    """The name to give FID: with fewer than 50,000 samples it includes their number, because FID is biased by it."""
    return "FID" if num_samples >= 50_000 else f"FID-{num_samples}"


def samples_path(folder: str, row: Row) -> str:
    """The file of a row's images. The name includes the manifest's, so no other row has the same file.

    An interval is written without a colon, which `scp` and `rsync` take for the name of a host. On a disk, a file that
    an earlier version named with it is found too.
    """
    keys = [key for key in (*SETTINGS, "manifest") if key not in ("p_uncond", "features") and row[key] != ""]
    earlier = "_".join(f"{key}-{row[key]}" for key in keys)
    path, old = (os.path.join(folder, "samples", f"{name}.npz") for name in (earlier.replace(":", "_"), earlier))
    if files.is_url(folder):  # no version with colons wrote to buckets
        return path
    return old if os.path.exists(old) and not os.path.exists(path) else path


def swept_folder(folder: str, out: str) -> str:
    """The folder with a run's sweep: `out`, where a sweep of the run in `folder` may have written it, or the run's."""
    return out if files.exists(os.path.join(out, "sweep.csv")) else folder


def read_rows(folder: str) -> list[Row]:
    """The rows of sweep.csv, or [] if there is no such file. A last line that was cut short is ignored.

    Raises ValueError if the columns are not COLUMNS, or if a line is damaged; the message gives its number.
    """
    path = os.path.join(folder, "sweep.csv")
    lines = whole_lines(path)
    if not lines:
        return []
    reader = csv.reader(lines)
    if tuple(next(reader)) != COLUMNS:
        raise UserError(f"{path} has other columns than this version writes: move it away to measure again")
    rows = []
    for cells in filter(None, reader):
        try:
            rows.append({key: _value(key, text) for key, text in zip(COLUMNS, cells, strict=True)})
        except ValueError:
            raise UserError(
                f"{path}: line {reader.line_num} is damaged: delete it, and --mode=sweep measures its row again"
            ) from None
    return rows


def _value(key: str, text: str) -> str | int | float | None:
    if key in WORDS:
        return text
    if key in COUNTS:
        return int(text)
    return float(text) if text else None


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
    """Adds a row to sweep.csv, which is on the disk when this returns. A last line that was cut short is dropped."""
    added = io.StringIO()
    csv.DictWriter(added, COLUMNS, lineterminator="\n").writerow(row)
    line = added.getvalue()

    written = b""

    def append(content: bytes) -> bytes:
        nonlocal written
        if not written or content != written:
            written = "".join([*(_whole_lines(content) or [",".join(COLUMNS) + "\n"]), line]).encode()
        return written

    files.rewrite(os.path.join(folder, "sweep.csv"), append)


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
