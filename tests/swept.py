"""The folders of runs that have been swept, with made-up numbers and without images, and features for real sweeps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_config

from cfd.evaluation import intervals
from cfd.evaluation.features import FeatureNetwork, Outputs
from cfd.modes import sweep
from cfd.runs import manifest, results


def pixels(images: np.ndarray) -> Outputs:
    """Features without a network: all pixels of an image."""
    pool = images.reshape(len(images), 64) / 255
    return Outputs(pool, None, np.exp(pool[:, :10]) / np.exp(pool[:, :10]).sum(axis=1, keepdims=True))


def swept(folder: Path, p_uncond: float, features_hash: str = "f") -> Path:
    """The folder of a run that has been swept at step 3, and again at step 5."""
    folder.mkdir()
    return sweep_again(folder, p_uncond, features_hash)


def sweep_again(
    folder: Path,
    p_uncond: float,
    features_hash: str = "f",
    data: str = "data",
    reference: str = "reference",
    weights: str = "weights",
    **changes: Any,
) -> Path:
    """Adds the rows of one more sweep at step 3 and at step 5."""
    config = tiny_config(**dict(train__p_uncond=p_uncond, eval__weights=(0.0, 4.0)) | changes)
    network = FeatureNetwork("classifier", features_hash, lambda _: Outputs(*[np.zeros((1, 1))] * 3))
    hashes = dict(weights=weights, classifier="", reference=reference, data=data, held_out="")
    for row in sweep.rows_of_grid(config, 3) + sweep.rows_of_grid(config, 5):
        made = sweep.manifest_of(config, row, hashes, network)
        fid = 10 * p_uncond + row["w"] + 50 * (row["step"] == 3)
        measured = dict.fromkeys(results.MEASURED, 0.5) | {"fid": fid, "is": 20 - row["w"]}
        name = manifest.manifest_name(made)
        manifest.write_manifest(str(folder), made)
        if name not in {row["manifest"] for row in results.latest(str(folder))}:  # as a sweep does
            results.append_row(str(folder), row | measured | {"manifest": name})
    return folder


def cell(rule: str, guide: str, w: float, values: Mapping[str, Sequence[float]], **changes: Any) -> results.Row:
    """A row of a sweep over rules and guides. `values` maps a measure to its value and to that without each group."""
    row = dict.fromkeys(results.COLUMNS) | {
        "step": 5,
        "ema": 0.0,
        "p_uncond": 0.1,
        "num_steps": 4,
        "sampler": "ancestral",
        "v": 0.3,
        "guidance": "classifier-free",
        "rule": rule,
        "guide": guide,
        "interval": "",
        "w": w,
        "num_samples": 20,
        "labels": "balanced",
        "seed": 1000,
        "features": "classifier",
        "fid_name": "FID-20",
        "run": "run",
        "weights": "weights",
        "without": {key: list(without) for key, (_, *without) in values.items() if without},
    }
    for key, (value, *without) in values.items():
        low, high = intervals.interval(value, without) if without else (None, None)
        row |= {key: value, f"{key}_low": low, f"{key}_high": high}
    return row | changes


def write_cells(folder: Path, rows: Sequence[results.Row], reference: str = "reference") -> Path:
    """The folder of a run whose sweep has measured these rows of `cell`."""
    for row in rows:
        made = {
            "weights": {"sha256": row["weights"]},
            "reference": {"sha256": reference},
            "features": {"sha256": "features"},
            "sampling": {key: row[key] for key in manifest.SAMPLING} | row.get("unlisted", {}),
        }
        manifest.write_manifest(str(folder), made)
        name = manifest.manifest_name(made)
        results.write_without(str(folder), name, row["without"])
        results.append_row(str(folder), {key: row[key] for key in results.COLUMNS} | {"manifest": name})
    return folder
