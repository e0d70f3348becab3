"""`--mode=compare`: sweeps of several runs, each at one step, and the paper's, in one table and one picture.

Rules and guides, of one run or of several, are also compared at matched strength, and by their fronts.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from cfd.config import Config
from cfd.errors import UserError
from cfd.modes import figures, fronts, matched, tables
from cfd.runs import files, manifest, results, workdir


def compare(config: Config, folder: str, others: Sequence[str], out: str) -> str:
    """Compare the sweep of the run in `folder` with those of other runs, such as one run per p_uncond.

    It takes the rows of `sample.step` of each run; -1 stands for the newest step that was swept. The sweep of the run
    in `folder` is the one in the folder `out`, or its own if there is none.

    Rows that differ in seed alone become one, the mean over the seeds. Curves are named by the settings in which they
    differ, and by their runs only if runs of different weights have the same settings.

    Writes compare.md, a table in the paper's layout, and compare.png to `out`. If rows differ in rule or guide, also
    writes the fronts, fronts.png, and the tables at matched strength, matched.md and matched.csv. Returns the tables.
    Raises ValueError if two runs have rows of the same weights and settings, if runs were measured with different
    references or features, or if the manifest of a row is missing or damaged.
    """
    runs = (results.swept_folder(folder, out), *others)
    rows, means = rows_of_runs(runs, config.sample.step)
    floors = [tables.floor_of(run, [row for row in rows if row["run"] == run]) for run in runs]
    floor = next(filter(None, floors), None)
    real = tables.real_fid(floor, rows)
    if tables.overlap(means):
        means = named(means, runs)
    curves = tables.curves(means)
    if tables.overlap(means):
        raise UserError(
            f"{', '.join(runs)} hold rows of the same settings and weights: nothing tells them apart. Give --runs "
            "without those that hold the rows of another one"
        )
    published = tables.published_of(config, workdir.read_config(folder)["class_names"])
    blocks = {"ours": means, "paper": published.rows} if published.rows else {"": means}
    below = [tables.caption(means), tables.real_images(floor, rows[0]["features"])]
    if tables.guided_in_several_ways(rows):
        paper = [tables.table({"paper": published.rows})] if published.rows else []
        parts = [tables.cells(means), *below, *paper, compare_rules(rows, means, out, floor)]
    else:
        parts = [tables.table(blocks), *below]
    text = "\n\n".join(filter(None, [*parts, tables.literature(published)]))
    files.write_atomically(os.path.join(out, "compare.md"), text + "\n")
    theirs, path = tables.curves(published.rows, "paper"), os.path.join(out, "compare.png")
    figures.save_curve(path, curves, theirs, real=real, baselines=published.baselines)
    return text


def compare_rules(rows: list[results.Row], means: list[results.Row], out: str, floor: dict[str, Any] | None) -> str:
    """Write fronts.png, matched.md and matched.csv, and return the tables at matched strength.

    `means` are the means of `rows` over their seeds. Rows have their "run" and "weights", as `matched.report` needs.
    `floor` is what real images score. In matched.md it stands below the tables.
    """
    with_groups = [row | {"without": results.read_without(row["run"], row) or {}} for row in rows]
    text, cells = matched.report(with_groups)
    note = tables.real_images(floor, rows[0]["features"])
    files.write_atomically(os.path.join(out, "matched.md"), "\n\n".join(filter(None, [text, note])) + "\n")
    files.write_atomically(os.path.join(out, "matched.csv"), cells)
    if fronts.pairs_of(means):
        real = tables.real_fid(floor, [row for group in matched.groups(means) for row in group])
        figures.save_figure(os.path.join(out, "fronts.png"), fronts.front_figure(means, real), dpi=100)
        print(f"Wrote {out}/fronts.png, matched.md and matched.csv.", flush=True)
    else:
        print(f"Wrote {out}/matched.md and matched.csv; fronts.png needs recall or the asked class.", flush=True)
    return text


def named(rows: list[results.Row], runs: Sequence[str]) -> list[results.Row]:
    """Rows with the name of their run as a setting, if their weights differ wherever their settings do not."""
    made = [(row["weights"], *(row[key] for key in results.SETTINGS)) for row in rows]
    if len(set(made)) < len(made):
        return rows
    short = {run: os.path.basename(os.path.normpath(run)) for run in runs}
    unique = len({*short.values()}) == len(runs)
    return [row | {tables.RUN: short[row["run"]] if unique else row["run"]} for row in rows]


def unlisted(made: Mapping[str, Any]) -> dict[str, Any]:
    """How a manifest says that images were sampled, without the settings that are columns of sweep.csv."""
    return {key: value for key, value in sorted(made["sampling"].items()) if key not in results.SETTINGS}


def rows_of_runs(runs: Sequence[str], step: int) -> tuple[list[results.Row], list[results.Row]]:
    """The rows of a step of several runs, with their "run" and "weights", and the means of those over their seeds.

    Raises ValueError as `compare` does.
    """
    rows, means, made_with = [], [], {}
    of_runs = [(run, rows_at(run, step)) for run in runs]
    manifests = read_manifests(of_runs)
    for run, at_step in of_runs:
        for row in at_step:
            made = manifests[run, row["manifest"]]
            by_data = made["reference"].get("source") == "data"  # not a file
            identity = made.get("data", {}).get("identity", "") if by_data else ""
            made_with.setdefault((made["reference"]["sha256"], made["features"]["sha256"]), (run, identity))
            rows.append(row | {"run": run, "weights": json.dumps([made["weights"]["sha256"], unlisted(made)])})
        means += tables.over_seeds(run, rows[-len(at_step) :])
    if len(made_with) > 1:
        names, identities = zip(*made_with.values(), strict=True)
        remedy = "copy the features folder of one into the others and sweep them again"
        if len({*identities} - {""}) > 1:
            remedy = (
                "they have different data sets. Give --runs without those of other data, or sweep them again with the "
                "same file as eval.reference, and with eval.features 'inception' or 'dinov2'"
            )
        raise UserError(f"{' and '.join(names)} were measured with different references or feature networks: {remedy}")
    return rows, means


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


def read_manifests(of_runs: Sequence[tuple[str, Sequence[results.Row]]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The manifests of the rows of runs, by the run and the name.

    Raises ValueError if some are missing or damaged. The message names all the runs and weights to sweep again.
    """
    names = [(run, row["manifest"], f"{row['w']:g}") for run, rows in of_runs for row in rows]
    found = {(run, name): manifest.read_manifest(run, name) for run, name, _ in names}
    lost: dict[str, list[tuple[str, str]]] = {}
    for run, name, w in names:
        if found[run, name] is None:
            lost.setdefault(run, []).append((f"{name}.json", w))
    if lost:
        parts = [
            f"{run}/manifests: {workdir.abbreviate([name for name, _ in rows], separator=', ')}; sweep {run} again at "
            f"w = {', '.join(dict.fromkeys(w for _, w in rows))}"
            for run, rows in lost.items()
        ]
        raise UserError(f"manifests are missing or damaged in {', and in '.join(parts)}")
    return {place: made for place, made in found.items() if made is not None}
