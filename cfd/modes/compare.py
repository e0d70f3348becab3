"""`--mode=compare`: sweeps of several runs, each at one step, and the paper's, in one table and one picture."""

import os
from collections.abc import Sequence

from cfd.config import Config
from cfd.errors import UserError
from cfd.modes import figures, tables
from cfd.runs import files, manifest, results, workdir


def compare(config: Config, folder: str, others: Sequence[str], out: str) -> str:
    """Compare the sweep of the run in `folder` with those of other runs, such as one run per p_uncond.

    It takes the rows of `sample.step` of each run; -1 stands for the newest step that was swept. The sweep of the run
    in `folder` is the one in the folder `out`, or its own if there is none.

    Writes compare.md, a table in the paper's layout, and compare.png to `out`. Returns the table. Raises ValueError if
    the settings of two runs do not tell them apart, if runs were measured with different references or features, or if
    the manifest of a row is missing or damaged.
    """
    rows, made_with = [], {}
    runs = (results.swept_folder(folder, out), *others)
    for run in runs:
        at_step = rows_at(run, config.sample.step)
        rows += at_step
        for row in at_step:
            made_with.setdefault(measures(run, row), run)
    if len(made_with) > 1:
        raise UserError(
            f"{' and '.join(made_with.values())} were measured with different references or feature networks: copy the "
            "features folder of one into the others and sweep them again"
        )
    curves = tables.curves(rows)
    if sum(map(len, curves.values())) < len(rows):
        raise UserError(f"{', '.join(runs)} hold rows of the same settings: nothing tells them apart")
    published = tables.published_rows(config, len(workdir.read_config(folder)["class_names"]))
    text = tables.table({"ours": rows, "paper": published} if published else {"": rows})
    files.write_atomically(os.path.join(out, "compare.md"), text + "\n")
    figures.save_curve(os.path.join(out, "compare.png"), curves, tables.curves(published, "paper"))
    return text


def rows_at(run: str, step: int) -> list[results.Row]:
    """The rows of a step of a run; -1 is the newest that was swept. Raises ValueError if there are none."""
    rows = results.latest(run)
    if not rows:
        raise UserError(f"{run} has no sweep.csv: sweep it first, with --mode=sweep")
    steps = sorted({row["step"] for row in rows})
    if step not in (-1, *steps):
        raise UserError(
            f"{run} was swept at step {', '.join(map(str, steps))}, and sample.step is {step}: set it to one of these, "
            "or to -1 for the newest, or sweep the run at this step"
        )
    return [row for row in rows if row["step"] == (steps[-1] if step == -1 else step)]


def measures(run: str, row: results.Row) -> tuple[str, str]:
    """The digests of the reference and of the feature network with which a row was measured."""
    made = manifest.read_manifest(run, row["manifest"])
    if made is None:
        raise UserError(
            f"{run}/manifests/{row['manifest']}.json is missing or damaged: sweep {run} again at w = {row['w']:g}"
        )
    return made["reference"]["sha256"], made["features"]["sha256"]
