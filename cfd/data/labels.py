"""The class of each file, from a table: a CSV file, or the dataset.json of EDM's and StyleGAN's .zip files."""

import csv
import io
import json
from typing import NamedTuple

from cfd.errors import UserError

MAX_CLASSES = 2**20
"""The numbers of classes in a dataset.json must be below this one."""


class Table(NamedTuple):
    """The number of the class of each file, by name, and the names of the classes."""

    labels: dict[str, int]
    class_names: tuple[str, ...]


def read_table(content: bytes, name: str) -> Table:
    """The table in a file, which is JSON if `name` ends with .json, and CSV otherwise.

    CSV: a row per file, in UTF-8, with the columns `file` and `label` named in the first row; further columns are not
    read. The classes are numbered by their names, sorted as text. A row without a file declares a class that has none.
    JSON: {"labels": [[file, number], ...]}. The numbers are those of the classes; class c is named "c".
    A name of a file may begin with "./", as those that `find .` prints.

    Raises ValueError, with the name and the line, if it is neither, if a file is listed twice, and if a row of a CSV
    file has more values than there are columns, as one with a comma in a name without quotes around it.
    """
    try:
        return _read_json(content, name) if name.lower().endswith(".json") else _read_csv(content, name)
    except UserError:
        raise
    except (ValueError, csv.Error, RecursionError) as error:  # a number of 5000 digits is a ValueError
        raise UserError(
            f"data.labels = {name!r} cannot be read ({error}): give a CSV file in UTF-8 with the columns file,label, "
            "or EDM's dataset.json"
        ) from error


def _read_csv(content: bytes, name: str) -> Table:
    # Strict: quotes that are not closed would take in the lines that follow.
    text = io.StringIO(content.decode("utf-8-sig"), newline="")
    reader = csv.DictReader(text, skipinitialspace=True, strict=True)
    columns = [column.strip() for column in reader.fieldnames or []]
    if columns.count("file") != 1 or columns.count("label") != 1:
        there = ", ".join(map(repr, columns)) or "none"
        raise UserError(
            f"{name} has the columns {there}: name one of them file and one label in its first row, with commas between"
        )
    reader.fieldnames = columns
    classes: dict[str, str] = {}
    declared = set()
    for row in reader:
        if any(more := row.get(None, ())):
            raise UserError(
                f"{name}, line {reader.line_num}, has {len(columns) + len(more)} values for {len(columns)} "
                'columns: put quotes around a value with a comma, as in "a, b", or name all columns in the first row'
            )
        file, label = _plain((row["file"] or "").strip()), (row["label"] or "").strip()
        if not label:
            raise UserError(f"{name}, line {reader.line_num}, has no label: add it, or remove the line")
        if file in classes:
            raise UserError(f"{name}, line {reader.line_num}, lists {file!r} again: remove one of its lines")
        declared.add(label)
        if file:
            classes[file] = label
    if not classes:
        raise UserError(f"{name} lists no file: add a row for each image, with its name in the column file")
    names = tuple(sorted(declared))
    number = {label: i for i, label in enumerate(names)}
    return Table({file: number[label] for file, label in classes.items()}, names)


def _plain(file: str) -> str:
    """The name of a file without parts that mean nothing, such as the "./" that `find .` puts in front of it.

    A name that leads elsewhere, which begins with a slash or has a part "..", is left as it is.
    """
    parts = file.split("/")
    return file if file.startswith("/") or ".." in parts else "/".join(part for part in parts if part not in ("", "."))


def holds_labels(content: bytes) -> bool:
    """Whether the content of a dataset.json has labels of files."""
    try:
        labels = json.loads(content)["labels"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return False
    return isinstance(labels, list) and len(labels) > 0


def _read_json(content: bytes, name: str) -> Table:
    whole = json.loads(content)
    rows = whole.get("labels") if isinstance(whole, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{name} has no "labels": give a file with [[file, number of its class], ...] there')
    labels: dict[str, int] = {}
    for row in rows:
        file, label = row if isinstance(row, list) and len(row) == 2 else (None, None)
        if not isinstance(file, str) or type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise UserError(
                f'{name} has {str(row)[:80]} among its "labels": give [file, number of its class] there, with numbers '
                f"below {MAX_CLASSES}"
            )
        if (file := _plain(file)) in labels:
            raise UserError(f"{name} lists {file!r} twice: remove one of the entries")
        labels[file] = label
    return Table(labels, tuple(str(i) for i in range(max(labels.values()) + 1)))
