"""The cells of a sweep's grid: their settings, their manifests, and which of them are measured already."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import jax

from cfd.config import Config
from cfd.devices import parallel, progress
from cfd.evaluation.features import FeatureNetwork
from cfd.fields import DEFAULTS, NETWORK
from cfd.loading import WITH_V
from cfd.modes import rules
from cfd.runs import manifest, results
from cfd.runs.results import Row

STEPS = ("variance", "respacing", "corrector", "corrector_steps", "predictor_guided", "clip_first")
"""The fields of `sample` about steps that manifests record, and sweep.csv does not."""


class Cell(NamedTuple):
    """A cell of the grid: the settings of its row, and the manifest that says how the row is made."""

    row: Row
    manifest: dict[str, Any]


def rows_of_grid(config: Config, step: int) -> list[Row]:
    """The cells that `eval` asks for at one step, as rows that hold their settings and the name of their FID."""
    sample, evaluate = config.sample, config.eval
    ruled = [(guidance.text, float(w)) for guidance, weights in rules.in_grid(config) for w in weights]
    has_v = sample.sampler in WITH_V and sample.variance == "fixed"
    v = tuple(evaluate.v) or (sample.v,) if has_v else (0.0,)
    intervals = tuple(evaluate.intervals) or (tuple(sample.interval),)
    guides, seeds = tuple(evaluate.guides) or (sample.guide,), tuple(evaluate.seeds) or (evaluate.seed,)
    num_steps, emas = tuple(evaluate.num_steps) or (sample.num_steps,), tuple(evaluate.emas) or (sample.ema,)
    return [
        {
            "step": step,
            "ema": float(ema),
            "p_uncond": float(config.train.p_uncond),
            "num_steps": steps,
            "sampler": sample.sampler,
            "v": float(v),
            "guidance": sample.guidance,
            "rule": rule,
            "guide": guide,
            "interval": ":".join(repr(float(end)).removesuffix(".0") for end in interval),
            "w": w,
            "num_samples": evaluate.num_samples,
            "labels": evaluate.labels,
            "seed": seed,
            "features": evaluate.features,
            "fid_name": results.fid_name(evaluate.num_samples, evaluate.features),
        }
        for ema, steps, v, guide, interval, seed, (rule, w) in product(
            emas, num_steps, v, guides, intervals, seeds, ruled
        )
    ]


def interval_of(row: Row) -> tuple[float, ...]:
    """The guidance interval of a row, or of its rule; () if it has none."""
    given = tuple(float(end) for end in row["interval"].split(":") if end)
    return given or rules.guidance_of(row["rule"]).interval


def missing_cells(folder: str, cells: list[Cell]) -> list[Cell]:
    """The cells that are still to be measured. Every process calls it.

    A cell that was measured in another way meanwhile, such as with another reference, gets its row again at the end of
    sweep.csv, where the rows that belong together are looked for.
    """
    by_name = {manifest.manifest_name(cell.manifest): cell for cell in cells}
    there = measured_rows(folder, cells)
    parallel.barrier("sweep cells looked for")
    newest = {row["manifest"] for row in results.latest(folder)}
    parallel.barrier("sweep cells found")
    for name in there.keys() - newest if jax.process_index() == 0 else ():
        results.append_row(folder, there[name])
    if there:
        if jax.process_index() == 0:
            print(f"{len(there)} of {len(cells)} cells are in {folder}/sweep.csv already.", flush=True)
        progress.report(f"{results.count_rows(folder)} rows")
    say_if_measured_before(folder, [cell for name, cell in by_name.items() if name not in there])
    return [cell for name, cell in by_name.items() if name not in there]


def say_if_measured_before(folder: str, cells: list[Cell]) -> None:
    """Prints, on process 0, how many of these cells have a row of an earlier version, which is not used again."""
    if jax.process_index() != 0:
        return

    def setting(row: Row) -> tuple:
        return tuple(row[key] for key in results.SETTINGS)

    names = {setting(row): row["manifest"] for row in results.read_rows(folder)}
    made = [manifest.read_manifest(folder, names[setting(row)]) for row, _ in cells if setting(row) in names]
    if old := sum("rule" not in found.get("sampling", {}) for found in made if found is not None):
        print(
            f"{old} cells have rows of an earlier version in {folder}/sweep.csv, which lack measures of this one: they "
            "are measured again, and the earlier rows stay.",
            flush=True,
        )


def measured_rows(folder: str, cells: Iterable[Cell]) -> dict[str, Row]:
    """The rows of sweep.csv that belong to these cells, by the names of their manifests, which must be there."""
    rows = {row["manifest"]: row for row in results.read_rows(folder)}
    names = [manifest.manifest_name(cell.manifest) for cell in cells]
    return {name: rows[name] for name in names if name in rows and manifest.read_manifest(folder, name) is not None}


def row_of(cell: Cell) -> Row:
    """The settings of a cell's row, and the name of its manifest."""
    return cell.row | {"manifest": manifest.manifest_name(cell.manifest)}


def network_of(config: Config) -> dict[str, Any]:
    """The group model as manifests record it.

    Younger fields that have their defaults are left out, and so are those of STEPS: the manifests of rows that a
    version without these fields measured stay the same, and the rows count.
    """
    return {
        name: value
        for name, value in config.model.to_dict().items()
        if name in (*NETWORK, "out_channels") or value != DEFAULTS[f"model.{name}"]
    }


def manifest_of(
    config: Config,
    row: Row,
    hashes: dict[str, str],
    features: FeatureNetwork,
    num_classes: int = 0,
    class_counts: Sequence[int] | None = None,
    guide: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """The manifest of a row: the SHA-256 of everything that goes in, every setting, and the versions.

    `guide` says which weights guide the row, as `cfd.runs.manifest.manifest_of` takes it.
    """
    return manifest.manifest_of(
        row,
        weights=hashes["weights"],
        guide_weights=hashes["classifier"],
        ema_decay=config.train.ema_decay,
        network=network_of(config),
        process=config.process.to_dict()
        | {"schedule": config.sample.schedule or config.process.schedule}
        | ({} if config.sample.clean_end else {"clean_end": False}),
        clip=config.sample.clip,
        steps={name: config.sample[name] for name in STEPS if config.sample[name] != DEFAULTS[f"sample.{name}"]},
        data=config.data.to_dict(),
        data_identity=hashes["data"],
        held_out_identity=hashes["held_out"],
        reference=hashes["reference"],
        reference_path=config.eval.reference,
        features=features.name,
        features_weights=features.weights_hash,
        num_classes=num_classes,
        class_counts=class_counts,
        guide=guide,
    )
