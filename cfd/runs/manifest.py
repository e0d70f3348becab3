"""Manifests: how each row of sweep.csv was made, in manifests/<name>.json.

The name of a manifest is a digest of its content. A sweep uses a row again only if the row names the manifest that the
sweep would write itself.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
from jaxtyping import Int

import cfd
from cfd.devices import seeds
from cfd.errors import UserError
from cfd.runs import files
from cfd.runs.workdir import CONVENTIONS

LABELS = {
    "balanced": "image i is of class i mod num_classes",
    "random": "image i is of class i of numpy.random.default_rng(seed).integers(num_classes, size=num_samples)",
    "data": "class c has n_c images, in proportion to class_counts, by largest remainders, of which equal ones are "
    "taken at even spacing; images are in the order of (k - u_c) / n_c, k = 1 to n_c, with u = "
    "numpy.random.default_rng(seed).random(num_classes)",
}
"""The label policies, as manifests describe them."""
FEW_BALANCED = (
    "image i is of class i of "
    "numpy.random.default_rng(seed).permutation(numpy.arange(num_samples) * num_classes // num_samples)"
)
"""The policy "balanced" where there are fewer images than classes."""

SAMPLING = (
    "num_steps",
    "sampler",
    "v",
    "guidance",
    "rule",
    "guide",
    "interval",
    "w",
    "num_samples",
    "labels",
    "seed",
)
"""The columns of a row that say how its images are sampled from the weights."""


def labels_of(
    policy: str, seed: int, count: int, num_classes: int, class_counts: Sequence[int] | None = None
) -> Int[np.ndarray, " count"]:
    """The class of each image, int32 [count], by a policy of LABELS.

    For "random", and for "balanced" unless there are fewer images than classes, a larger set begins with the same
    classes. Only "data" takes `class_counts`, the number of images of each class in the training split. Without
    classes, all are -1, the null label. Raises ValueError for another policy, and if `class_counts` are missing.
    """
    if policy not in LABELS:
        raise UserError(f"the label policy is {policy!r}; it must be one of {', '.join(LABELS)}")
    if num_classes == 0:
        return np.full(count, -1, np.int32)
    numbers = np.random.default_rng(seed)
    if policy == "random":
        return numbers.integers(num_classes, size=count).astype(np.int32)
    if policy == "data":
        if class_counts is None or len(class_counts) != num_classes or sum(class_counts) < 1:
            raise UserError(
                f"the label policy 'data' needs the number of images of each of {num_classes} classes in the training "
                f"split, got {class_counts}: give class_counts"
            )
        shares = proportional(np.asarray(class_counts, np.int64), count)
        classes = np.repeat(np.arange(num_classes, dtype=np.int32), shares)
        rank = 1 + np.arange(count) - np.repeat(np.cumsum(shares) - shares, shares)
        order = (rank - numbers.random(num_classes)[classes]) / shares[classes]
        return classes[np.argsort(order, kind="stable")]
    if count < num_classes:
        return numbers.permutation(np.arange(count) * num_classes // count).astype(np.int32)
    return np.arange(count, dtype=np.int32) % num_classes


def proportional(counts: Int[np.ndarray, " k"], total: int) -> Int[np.ndarray, " k"]:
    """`total` divided in proportion to `counts`, by largest remainders. Equal remainders are taken at even spacing."""
    shares, remainders = np.divmod(counts * total, counts.sum())
    missing = total - int(shares.sum())
    if missing:
        last = np.sort(remainders)[-missing]
        shares[remainders > last] += 1
        tied, left = np.flatnonzero(remainders == last), total - int(shares.sum())
        shares[tied[np.arange(left) * len(tied) // left]] += 1
    return shares


def label_policy(policy: str, count: int, num_classes: int) -> str:
    """The policy by which `labels_of` gives `count` labels, in words."""
    return FEW_BALANCED if policy == "balanced" and count < num_classes else LABELS[policy]


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
    data_identity: str,
    held_out_identity: str,
    reference: str,
    reference_path: str,
    features: str,
    features_weights: str,
    num_classes: int = 0,
    class_counts: Sequence[int] | None = None,
    guide: Mapping[str, Any] = {},
    steps: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """The manifest of a row: the hashes of everything that goes in, every setting, and the versions of the programs.

    `row` has the columns SAMPLING, "step", "ema" and "p_uncond". `weights`, `guide_weights` ("" without a guiding
    classifier), `reference` and `features_weights` are SHA-256 digests. `network`, `process` and `data` are groups of
    the config ("model", "process", "data"), and `clip` is sample.clip. `data_identity` is the identity of
    the training split, and `held_out_identity` that of the held-out split; "" if nothing is measured with it.
    `reference_path` is eval.reference, "" for the data set. `features` is the name of the feature network.
    `num_classes` and `class_counts` are those that `labels_of` takes for the row. `guide` has the "sha256" of the
    weights of the row's guide, their "step", the name of their "run" and perhaps the "ema" of a guide's length; {}
    without a guide. `steps` are settings of the sampler that no column has.
    """
    ema = {"ema": row["ema"]} if row["ema"] else {"ema_decay": ema_decay}
    return {
        "weights": {"sha256": weights, "step": row["step"], "p_uncond": row["p_uncond"], **ema},
        "classifier": {"sha256": guide_weights},
        "guide": dict(guide),
        "network": dict(network),
        "sampling": {key: row[key] for key in SAMPLING} | {"clip": clip, "process": dict(process), **steps},
        "label_policy": label_policy(row["labels"], row["num_samples"], num_classes),
        **({} if class_counts is None else {"class_counts": list(class_counts)}),
        "seeds": "image i is drawn with the key fold_in(key(seed), i)",
        "prng": seeds.PRNG,
        "images": CONVENTIONS["images"],
        "w": CONVENTIONS["w"],
        "data": {key: data[key] for key in ("source", "name", "split", "image_size")}
        | {"identity": data_identity, "held_out": held_out_identity},
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
    files.write_atomically(files.place(folder, "manifests", f"{manifest_name(manifest)}.json"), text + "\n")


def read_manifest(folder: str, name: str) -> dict[str, Any] | None:
    """The manifest of this name; None if there is no such file, or if its content does not have this name."""
    try:
        manifest = json.loads(files.read_bytes(files.place(folder, "manifests", f"{name}.json")) or b"")
    except ValueError:
        return None
    return manifest if isinstance(manifest, dict) and manifest_name(manifest) == name else None


def measured_with(folder: str, row: Mapping[str, Any]) -> str | None:
    """A digest of everything that rows of one picture must share, or None if the row's manifest is missing.

    It covers the manifest except for the guidance, its weight, rule, guide and classifier, and the version of cfd.
    """
    manifest = read_manifest(folder, row["manifest"])
    if manifest is None:
        return None
    sampling = manifest.get("sampling", {}) | {"guidance": "", "rule": "", "guide": "", "w": 0.0}
    return manifest_name(manifest | {"cfd": "", "classifier": {}, "guide": {}, "sampling": sampling})
