"""Manifests: how each row of sweep.csv was made, in manifests/<name>.json.

The name of a manifest is a digest of its content. A sweep uses a row again only if the row names the manifest that the
sweep would write itself.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from jaxtyping import Int

import cfd
from cfd.runs.files import write_atomically
from cfd.runs.workdir import CONVENTIONS

LABELS = {
    "balanced": "image i is of class i mod num_classes",
    "random": "image i is of class i of numpy.random.default_rng(seed).integers(num_classes, size=num_samples)",
}
"""The label policies, as manifests describe them."""

SAMPLING = ("num_steps", "sampler", "v", "guidance", "interval", "w", "num_samples", "labels", "seed")
"""The columns of a row that say how its images are sampled from the weights."""


def labels_of(policy: str, seed: int, count: int, num_classes: int) -> Int[np.ndarray, " count"]:
    """The class of each image, int32 [count], by a policy of LABELS; a larger set begins with the same classes."""
    if policy == "random":
        return np.random.default_rng(seed).integers(num_classes, size=count).astype(np.int32)
    return np.arange(count, dtype=np.int32) % num_classes


def manifest_of(
    row: Mapping[str, Any],
    *,
    weights: str,
    guide_weights: str,
    ema_decay: float,
    network: Mapping[str, Any],
    process: Mapping[str, Any],
    clip: bool,
    data: Mapping[str, Any],
    reference: str,
    reference_path: str,
    features: str,
    features_weights: str,
) -> dict[str, Any]:
    """The manifest of a row: the hashes of everything that goes in, every setting, and the versions of the programs.

    `row` has the columns SAMPLING, "step" and "p_uncond". `weights`, `guide_weights` ("" without a guiding classifier),
    `reference` and `features_weights` are SHA-256 digests. `network`, `process` and `data` are the groups of the config
    in full ("model", "process", "data"), and `clip` is sample.clip. `reference_path` is eval.reference, "" for the data
    set. `features` is the name of the feature network.
    """
    return {
        "weights": {"sha256": weights, "step": row["step"], "ema_decay": ema_decay, "p_uncond": row["p_uncond"]},
        "classifier": {"sha256": guide_weights},
        "network": dict(network),
        "sampling": {key: row[key] for key in SAMPLING} | {"clip": clip, "process": dict(process)},
        "label_policy": LABELS[row["labels"]],
        "seeds": "image i is drawn with the key fold_in(key(seed), i)",
        "images": CONVENTIONS["images"],
        "w": CONVENTIONS["w"],
        "data": {key: data[key] for key in ("source", "name", "split", "image_size")},
        "reference": {"sha256": reference, "source": os.path.basename(reference_path) or "data"},
        "features": {"name": features, "sha256": features_weights},
        "cfd": cfd.__version__,
        "environment": {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def manifest_name(manifest: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of a manifest without its "environment".

    Two rows with the same name may be used in place of each other: they differ at most in the machine.
    """
    matched = {key: value for key, value in manifest.items() if key != "environment"}
    return hashlib.sha256(json.dumps(matched, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(folder: str, manifest: Mapping[str, Any]) -> None:
    """Writes manifests/<name>.json."""
    text = json.dumps(manifest, indent=1, sort_keys=True)
    write_atomically(Path(folder, "manifests", f"{manifest_name(manifest)}.json"), text + "\n")


def read_manifest(folder: str, name: str) -> dict[str, Any] | None:
    """The manifest of this name; None if there is no such file, or if its content does not have this name."""
    path = Path(folder, "manifests", f"{name}.json")
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest_name(manifest) == name else None


def measured_with(folder: str, row: Mapping[str, Any]) -> str | None:
    """A digest of everything that rows of one picture must share, or None if the row's manifest is missing.

    It covers the manifest except for the guidance, its weight and classifier, and the version of cfd.
    """
    manifest = read_manifest(folder, row["manifest"])
    if manifest is None:
        return None
    sampling = manifest.get("sampling", {}) | {"guidance": "", "w": 0.0}
    return manifest_name(manifest | {"cfd": "", "classifier": {}, "sampling": sampling})
