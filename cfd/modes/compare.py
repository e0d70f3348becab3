"""`--mode=compare`: the newest sweeps of several runs, and the paper's results, in one table and one picture."""

import os
from collections.abc import Sequence

from cfd.config import Config
from cfd.errors import UserError
from cfd.modes import figures, tables
from cfd.runs import manifest, results, workdir


def compare(config: Config, folder: str, others: Sequence[str]) -> str:
    """Compare the newest sweep of the run in `folder` with those of other runs, such as one run per p_uncond.

    Writes compare.md, a table in the paper's layout, and compare.png. Returns the table. Raises ValueError if the
    settings of two runs do not tell them apart, if runs were measured with different references or features, or if the
    manifest of a row is missing or damaged.
    """
    rows, made_with = [], {}
    for run in (folder, *others):
        newest = newest_rows(run)
        rows += newest
        for row in newest:
            made_with.setdefault(measures(run, row), run)
    if len(made_with) > 1:
        raise UserError(
            f"{' and '.join(made_with.values())} were measured with different references or feature networks: copy the "
            "features folder of one into the others and sweep them again"
        )
    curves = tables.curves(rows)
    if sum(map(len, curves.values())) < len(rows):
        raise UserError(f"{', '.join((folder, *others))} hold rows of the same settings: nothing tells them apart")
    published = tables.published_rows(config, len(workdir.read_config(folder)["class_names"]))
    text = tables.table({"ours": rows, "paper": published} if published else {"": rows})
    with open(os.path.join(folder, "compare.md"), "w") as file:
        file.write(text + "\n")
    figures.save_curve(os.path.join(folder, "compare.png"), curves, tables.curves(published, "paper"))
    return text


def newest_rows(run: str) -> list[results.Row]:
    """The rows of a run's newest step. Raises ValueError if there are none."""
    rows = results.latest(run)
    if not rows:
        raise UserError(f"{run} has no sweep.csv: sweep it first, with --mode=sweep")
    newest = max(row["step"] for row in rows)
    return [row for row in rows if row["step"] == newest]


def measures(run: str, row: results.Row) -> tuple[str, str]:
    """The digests of the reference and of the feature network with which a row was measured."""
    made = manifest.read_manifest(run, row["manifest"])
    if made is None:
        raise UserError(
            f"{run}/manifests/{row['manifest']}.json is missing or damaged: sweep {run} again at w = {row['w']:g}"
        )
    return made["reference"]["sha256"], made["features"]["sha256"]
