"""Curves over w, and tables in the layout of the paper's, from rows of results."""

from collections.abc import Iterable
from typing import Any

from cfd.config import Config
from cfd.evaluation import paper
from cfd.runs.results import SETTINGS, Row, fid_name

SYMBOLS = {"num_steps": "T", "num_samples": "N"}


def varied(rows: Iterable[Row], axis: str = "w") -> tuple[str, ...]:
    """The names of the settings, other than the axis of the curves, in which rows differ."""
    rows = list(rows)
    return tuple(key for key in SETTINGS if key != axis and len({row.get(key) for row in rows}) > 1)


def curves(rows: list[Row], prefix: str = "", axis: str = "w") -> dict[str, list[Row]]:
    """The curves over w, or over "step", that rows form, each named by the settings in which it differs.

    If several rows have the same settings, the last one counts.
    """
    keys = varied(rows, axis)
    grouped: dict[str, dict[float, Row]] = {}
    for row in sorted(rows, key=lambda row: [row[key] for key in keys]):
        settings = [f"{SYMBOLS.get(key, key)} = {in_words(key, row[key])}" for key in keys]
        name = ", ".join(filter(None, [prefix, *settings])) or rows[0]["guidance"] + " guidance"
        grouped.setdefault(name, {})[row[axis]] = row
    return {name: [along[x] for x in sorted(along)] for name, along in grouped.items()}


def published_rows(config: Config, num_classes: int) -> list[Row]:
    """The paper's results for the experiment of `config`; empty if it has none."""
    table = paper.table_of(
        name=config.data.name,
        num_classes=num_classes,
        image_size=config.data.image_size,
        features=config.eval.features,
    )
    return [] if table is None else paper.rows(table)


def table(blocks: dict[str, list[Row]]) -> str:
    """A Markdown table in the layout of the paper's: one row per weight, FID columns and then IS columns.

    `blocks` maps a heading, such as "ours" or "paper", to rows. Slashes separate the curves of a block.
    """
    weights = sorted({row["w"] for rows in blocks.values() for row in rows})
    header, columns = ["w"], []
    for column in ("fid", "is"):
        for heading, rows in blocks.items():
            lines, keys = list(curves(rows).values()), varied(rows)
            fid = "/".join(sorted({fid_name(row["num_samples"]) for row in rows}))
            names = " / ".join(", ".join(in_words(key, line[0][key]) for key in keys) for line in lines)
            what = f"{', '.join(SYMBOLS.get(key, key) for key in keys)} = {names}" if keys else ""
            header.append(" ".join(filter(None, [heading, fid if column == "fid" else "IS", what])))
            columns.append([{row["w"]: row[column] for row in line} for line in lines])
    text = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for w in weights:
        cells = [" / ".join(rounded(line[w]) if w in line else "–" for line in column) for column in columns]
        text.append(f"| {w:g} | {' | '.join(cells)} |")
    return "\n".join(text)


def rounded(value: float) -> str:
    """A number as the paper writes FID and IS: two decimals, or three digits if it is below 1."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def in_words(key: str, value: Any) -> str:
    """A setting as text."""
    if key == "interval":
        return f"[{value.replace(':', ', ')}]" if value else "all"
    return f"{value:g}" if isinstance(value, float) else str(value)
