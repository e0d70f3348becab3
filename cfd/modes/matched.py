"""The table of rules and guides at matched strength: each at the weight where it is as strong as plain guidance.

Strength is the share of images that the feature network recognises as the class that was asked for. At equal weights, a
rule that guides less would look better wherever FID rises with w.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cfd.evaluation import intervals
from cfd.modes import tables
from cfd.runs.results import SETTINGS, Row

WEIGHTS = (0.1, 0.3, 1.0)
"""The weights of plain guidance to whose strength the other rules are brought."""
SHARE = "class_accuracy"
MEASURES = ("fid", "precision", "recall", "kid", "is")
OWN = ("rule", "guide", "w", "seed")
"""The settings in which rows that are compared with each other may differ."""
BELOW, ABOVE = "stays below", "always above"
BETTER, WORSE, NEITHER = "better", "worse", "no difference shown"

Columns = Sequence[float]
"""A number that follows from all images, then the same without each group of images, or without each seed."""
Value = tuple[float, float | None, float | None]
"""A number and its 95 % interval, if there is one."""


class Front(NamedTuple):
    """The cells of one rule and guide, in the order of w, at some seeds.

    `values` has each measure of each cell, all with the same leave-outs. Measures that a cell lacks are absent.
    """

    weights: list[float]
    values: dict[str, list[Columns]]


class Matched(NamedTuple):
    """A rule and guide, given by a row of it, at the strength of plain guidance at `weight`.

    `share` is that strength. `values` has "w", the MEASURES, and "difference", FID less that of plain guidance; it is
    empty if that strength is not reached, and `status` then says why. `seeds` is the number of seeds.
    """

    row: Row
    weight: float
    seeds: int
    status: str = ""
    share: Value | None = None
    values: dict[str, Value] = {}  # noqa: RUF012, it is never written to
    verdict: str = ""


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows that may be compared: of one network and its sampler ("weights"), with settings that agree but for OWN.

    Rows of plain guidance that nothing is compared with are left out.
    """
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["weights"], *(row[key] for key in SETTINGS if key not in OWN)), []).append(row)
    return [group for group in grouped.values() if any(row["rule"] or row["guide"] for row in group)]


def lines_of(group: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """{(rule, guide): its rows}, plain guidance first."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(group, key=lambda row: (row["rule"], row["guide"])):
        lines.setdefault((row["rule"], row["guide"]), []).append(row)
    return lines


def matched(group: Iterable[Row], weight: float) -> list[Matched]:
    """Every rule and guide of a group at the strength of plain guidance at `weight`: plain guidance, then by FID."""
    lines = lines_of(group)
    plain = lines.get(("", ""), [])
    found = [at_strength(line, plain, weight) for line in lines.values()]
    return sorted(found, key=lambda one: (one.row is not (plain or [None])[0], *one.values.get("fid", (np.inf,))[:1]))


def at_strength(line: list[Row], plain: list[Row], weight: float) -> Matched:
    """The cells of a rule and guide, interpolated to the strength of plain guidance at `weight`.

    Plain guidance too is taken at the smallest weight that has this strength. All is computed from the measures of all
    images, and again without each group: first the strength, then the weights, then what is measured there.
    """
    seeds = sorted(seeds_of(line) & seeds_of(plain))
    made = Matched(line[0], weight, len(seeds))
    if not plain:
        return made._replace(status="no plain guidance to compare with")
    if not seeds:
        return made._replace(status="no seed in common with plain guidance")
    front, base = front_of(line, seeds), front_of(plain, seeds)
    if SHARE not in front.values or SHARE not in base.values:
        return made._replace(status=f"{tables.NAMES[SHARE]} is not measured")
    if not base.weights[0] <= weight <= base.weights[-1]:
        return made._replace(status=f"plain guidance is swept from w = {base.weights[0]:g} to {base.weights[-1]:g}")
    target = at(base, SHARE, [weight] * len(base.values[SHARE][0]))
    made = made._replace(share=value_of(target))
    reached = reaching(front, target)
    if np.isnan(reached[0]):
        below = max(share for share, *_ in front.values[SHARE]) < target[0]
        return made._replace(status=BELOW if below else ABOVE)
    values = {"w": value_of(reached)}
    values |= {key: value_of(at(front, key, reached)) for key in MEASURES if key in front.values}
    if line is plain or "fid" not in front.values or "fid" not in base.values:
        return made._replace(values=values)
    paired = together(at(front, "fid", reached), at(base, "fid", reaching(base, target)))
    values["difference"] = value_of([ours - theirs for ours, theirs in paired])
    return made._replace(values=values, verdict=verdict_of(values["difference"]))


def seeds_of(line: Iterable[Row]) -> set[int]:
    """The seeds that the cells of every weight of a line have."""
    at_weight: dict[float, set[int]] = {}
    for row in line:
        at_weight.setdefault(row["w"], set()).add(row["seed"])
    return set.intersection(*at_weight.values()) if at_weight else set()


def front_of(line: Iterable[Row], seeds: Sequence[int]) -> Front:
    """The cells of a line at these seeds. Each row has "without", the values of `results.read_without`."""
    cells: dict[float, dict[int, Row]] = {}
    for row in line:
        if row["seed"] in seeds:
            cells.setdefault(row["w"], {})[row["seed"]] = row
    values = {}
    for key in (SHARE, *MEASURES):
        columns = [columns_of([cells[w][seed] for seed in seeds], key) for w in sorted(cells)]
        if all(columns):
            values[key] = list(zip(*together(*columns), strict=True))
    return Front(sorted(cells), values)


def columns_of(rows: Sequence[Row], key: str) -> Columns:
    """A measure of one row and its leave-outs, or the mean over the seeds of several and the means without each seed.

    () if a row lacks the measure.
    """
    values = [row[key] for row in rows]
    if None in values:
        return ()
    if len(values) > 1:
        return (float(np.mean(values)), *tables.without_each(values))
    return (values[0], *rows[0]["without"].get(key, ()))


def together(*columns: Columns) -> Iterable[tuple[float, ...]]:
    """Columns side by side. If they do not all have the same leave-outs, only what follows from all images."""
    alike = len(set(map(len, columns))) == 1
    return zip(*(each if alike else each[:1] for each in columns), strict=True)


def at(front: Front, key: str, weights: Columns) -> Columns:
    """A measure at these weights, linear in w between cells."""
    columns = together(weights, *front.values[key])
    return [float(np.interp(w, front.weights, cells)) for w, *cells in columns]


def reaching(front: Front, target: Columns) -> Columns:
    """The smallest weights at which the share, linear in w between cells, is `target`; NaN where it never is."""
    return [first_crossing(front.weights, cells, share) for share, *cells in together(target, *front.values[SHARE])]


def first_crossing(weights: Sequence[float], shares: Sequence[float], target: float) -> float:
    """The smallest w at which the line through (w, share) has the value `target`. NaN outside: no extrapolation."""
    for i, share in enumerate(shares):
        if math.isclose(share, target):  # means of equal shares in another order differ in the last bits
            return weights[i]
        if i + 1 < len(shares) and (share - target) * (shares[i + 1] - target) < 0:
            return weights[i] + (target - share) / (shares[i + 1] - share) * (weights[i + 1] - weights[i])
    return np.nan


def value_of(columns: Columns) -> Value:
    """The number and its 95 % interval; no interval if there are no leave-outs, or if one is undefined."""
    value, *without = columns
    if len(without) < 2 or not np.isfinite(without).all():
        return value, None, None
    return value, *intervals.interval(value, without)


def verdict_of(difference: Value) -> str:
    """Whether a difference of FID to plain guidance lies beyond its 95 % interval."""
    _, low, high = difference
    if low is None or high is None:
        return "no interval"
    return BETTER if high < 0 else WORSE if low > 0 else NEITHER


def report(rows: list[Row]) -> tuple[str, str]:
    """The tables at matched strength, as Markdown and as CSV.

    Rows have "weights", which is equal for rows of one network and the same sampler, "without", which
    `results.read_without` gives, and "run".
    """
    together = groups(rows)
    sections, found = [], []
    for name, group in zip(names_of(together), together, strict=True):
        for weight in WEIGHTS:
            block = matched(group, weight)
            found += block
            sections.append(f"### {heading(block, group, name)}\n\n{markdown(block)}")
    return "\n\n".join([*sections, caption(found)]), to_csv(found)


def names_of(groups: Sequence[Sequence[Row]]) -> list[str]:
    """The settings in which groups differ, and the runs where these are the same."""
    firsts = [group[0] for group in groups]
    keys = [key for key in tables.varied(firsts) if key not in OWN]
    names = [tables.in_full(row, keys) for row in firsts]
    return [
        ", ".join(filter(None, [name, row["run"] if names.count(name) > 1 else ""]))
        for name, row in zip(names, firsts, strict=True)
    ]


def heading(block: Sequence[Matched], group: Iterable[Row], name: str) -> str:
    """The plain guidance with which the rules of a block are compared, and its strength."""
    weight = block[0].weight
    swept = {row["w"] for row in lines_of(group).get(("", ""), [])}
    where = ", ".join(filter(None, [f"plain guidance at w = {weight:g}", name]))
    share = next((one.share for one in block if one.share is not None), None)
    if share is None:
        return f"As strong as {where}"
    between = "" if weight in swept else " (interpolated, because this w was not swept)"
    return f"As strong as {where}{between}: {percent(share)} recognised as the asked class"


def percent(value: Value) -> str:
    """A share and its interval in percent."""
    scaled = [None if each is None else 100 * each for each in value]
    return f"{tables.plus_minus(*scaled)} %"


def markdown(block: Sequence[Matched]) -> str:
    """A table with a line per rule and guide. The number of seeds is a column if it differs."""
    fid = tables.measure_name("fid", [one.row for one in block])
    present = [key for key in MEASURES if any(key in one.values for one in block)]
    several = len({one.seeds for one in block}) > 1
    header = ["rule", "guide", *(["seeds"] if several else []), "w"]
    header += [*(tables.measure_name(key, [one.row for one in block]) for key in present), f"{fid} less plain", ""]
    body = []
    for one in block:
        names = [tables.in_words(key, one.row[key]) for key in ("rule", "guide")] + (
            [str(one.seeds)] if several else []
        )
        w = one.status or f"{one.values['w'][0]:.3g}"
        measured = [tables.plus_minus(*one.values.get(key, (None, None, None))) for key in (*present, "difference")]
        body.append([*names, w, *measured, one.verdict or "–"])
    return tables.markdown(header, body)


def caption(found: Sequence[Matched]) -> str:
    """How the tables are made, and how many differences chance alone would show."""
    tested = sum(one.verdict in (BETTER, WORSE, NEITHER) for one in found)
    seeds = sorted({one.seeds for one in found if one.seeds > 1})
    over = "over images (delete-a-group jackknife)"
    if seeds:
        over = f"over {'/'.join(map(str, seeds))} seeds (Student's t)" + (
            f", or {over} where there is one seed" if any(one.seeds == 1 for one in found) else ""
        )
    return (
        "Each rule is taken at the smallest w at which its share of images recognised as the asked class equals that "
        "of plain guidance. Shares and measures are interpolated linearly in w between neighbouring cells and never "
        f'extrapolated: "{BELOW}" and "{ABOVE}" mean that no swept w has this share. If several weights have the same '
        "share, such as 100 %, the smallest counts, for plain guidance too. ± is half the 95 % interval "
        f"{over}; the interpolation is part of what is repeated, and differences are paired by image. "
        f'"{BETTER}" and "{WORSE}" mean that the 95 % interval of the difference of FID excludes 0. '
        f"{tested} differences are tested, so about {tested / 20:.2g} would be excluded by chance if no rule differed "
        "from plain guidance; no correction is made. Near 100 % the share says little about strength, and "
        "intervals are wide."
    )


def to_csv(found: Iterable[Matched]) -> str:
    """All tables as one, with the ends of the intervals, and all settings."""
    settings = [key for key in SETTINGS if key not in ("w", "seed")]
    measured = ("share", "w", *MEASURES, "difference")
    columns = [f"{key}{end}" for key in measured for end in ("", "_low", "_high")]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["plain_w", "run", *settings, "seeds", *columns, "status", "verdict"], lineterminator="\n"
    )
    writer.writeheader()
    for one in found:
        line: dict[str, Any] = {key: one.row[key] for key in ("run", *settings)}
        line |= {"plain_w": one.weight, "seeds": one.seeds, "status": one.status, "verdict": one.verdict}
        values = one.values | ({} if one.share is None else {"share": one.share})
        for key, (value, low, high) in values.items():
            line |= {key: value, f"{key}_low": low, f"{key}_high": high}
        writer.writerow(line)
    return text.getvalue()
