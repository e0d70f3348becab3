"""A trained model from a run's folder: the one place where networks meet checkpoints."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.core import Tracer
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Float, Int

from cfd.errors import UserError
from cfd.guidance import without_null
from cfd.networks.classifier import Classifier, ClassifierFn
from cfd.networks.unet import UNet
from cfd.runs.checkpoint import CheckpointError, read_verified
from cfd.runs.workdir import CHECKPOINTS, abbreviate, config_differences, flatten, read_config


class Loaded(NamedTuple):
    """A trained model, ready to sample from."""

    eps_fn: Callable[[Float[Array, "b h w c"], Float[Array, "b"], Int[Array, "b"]], Float[Array, "b h w c"]]
    params: Any
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    config: dict[str, Any]
    step: int


def load(workdir: str | os.PathLike[str], step: int | None = None, *, sharding: Sharding | None = None) -> Loaded:
    """The model in a run's folder, with the EMA weights of its newest undamaged step, or of `step`.

    `eps_fn(z, logsnr, labels)` is a `jax.tree_util.Partial`. It can be an argument of a jitted function, and its
    weights are then arguments too. It raises ValueError for labels that are not below the number of classes, and for
    the null label ∅ if the model never saw it in training (p_uncond = 0). Under `jit` it cannot raise, and the rows of
    ∅ are NaN instead.

    The weights are on one device unless `sharding` says otherwise. With several processes, every one must call this.
    Raises ValueError if there is no run or no such step, and CheckpointError if the checkpoints are damaged.
    """
    params, config_json, step = load_ema(workdir, "diffusion", step, sharding=sharding)
    config = config_json["config"]
    num_classes = config["model"]["num_classes"]
    net = UNet(**_network_fields(config["model"]))
    channels = config["data"]["channels"]
    always_labelled = num_classes > 0 and config["train"]["p_uncond"] == 0

    def eps_fn(params: Any, z: Array, logsnr: Array, labels: Array) -> Array:
        if not isinstance(labels, Tracer) and np.max(np.asarray(labels), initial=-1) >= num_classes:
            raise UserError(
                f"label {np.max(np.asarray(labels))} is not below the number of classes, {num_classes}; -1 is no class"
            )

        def eps(z: Array, logsnr: Array, labels: Array) -> Array:
            outputs: Any = net.apply({"params": params}, z, logsnr, labels)
            return outputs[..., :channels]  # the outputs after these are a learned variance, kept at import

        return (without_null(eps) if always_labelled else eps)(z, logsnr, labels)

    size = config["data"]["image_size"]
    return Loaded(
        eps_fn=jax.tree_util.Partial(eps_fn, params),
        params=params,
        image_shape=(size, size, channels),
        num_classes=num_classes,
        class_names=tuple(config_json["class_names"]),
        config=config,
        step=step,
    )


def load_classifier(workdir: str | os.PathLike[str], step: int | None = None) -> ClassifierFn:
    """The classifier in the folder of a run of kind "classifier": (z [B, H, W, C], logsnr [B]) -> logits [B, K].

    Its weights are the EMA weights of the newest undamaged step, or of `step`. Raises ValueError if the folder holds
    another kind of run, and CheckpointError if its checkpoints are damaged.
    """
    params, config_json, _ = load_ema(workdir, "classifier", step)
    net = Classifier(**_network_fields(config_json["config"]["classifier"]))

    def classifier_fn(params: Any, z: Array, logsnr: Array) -> Array:
        return net.apply({"params": params}, z, logsnr)  # pyright: ignore[reportReturnType]

    return jax.tree_util.Partial(classifier_fn, params)


def load_ema(
    workdir: str | os.PathLike[str], kind: str, step: int | None = None, *, sharding: Sharding | None = None
) -> tuple[Any, dict[str, Any], int]:
    """(EMA weights, content of config.json, step) of a run whose "kind" is `kind`.

    It reads only the EMA of a checkpoint, and changes nothing in the folder: a damaged newest step is skipped with a
    warning. Raises CheckpointError if `step` is damaged, or if all steps are, and ValueError for a run of another kind,
    for a step that does not exist, and for one that was written with another config.
    """
    workdir = os.path.expanduser(workdir)
    config_json = read_config(workdir)
    if config_json["kind"] != kind:
        opened_by = {"diffusion": "cfd.loading.load", "classifier": "cfd.loading.load_classifier"}
        raise UserError(
            f"{workdir} holds a {config_json['kind']} run; a {kind} run was expected: give its "
            f"folder, or open this one with {opened_by.get(config_json['kind'], 'the program that wrote it')}"
        )
    directory = Path(workdir).absolute() / CHECKPOINTS
    steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal())
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{directory} has no step{'' if step is None else f' {step}'}; its steps are {steps}")
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    # A newer version that resumes a run adds its new fields to config.json, and older checkpoints lack them.
    younger = flatten(config_json["config"])

    def template(meta: dict[str, Any]) -> Any:
        if differences := config_differences(meta["config"], config_json, younger):
            raise UserError(
                f"step {meta['step']} was not written with {workdir}/config.json: {abbreviate(differences)}. Restore "
                f"the config.json of this run, from {directory}/{meta['step']}/meta or a backup"
            )
        ema = {
            tuple(key.split("/")): jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for key, (shape, dtype, _) in meta["arrays"].items()
            if key.startswith("ema/")
        }
        return unflatten_dict(ema)

    damaged = []
    for candidate in reversed(steps) if step is None else [step]:
        result = read_verified(directory, candidate, template)
        if not isinstance(result, str):
            tree, _ = result
            return tree["ema"], config_json, candidate
        logging.warning("checkpoint of step %d in %s is damaged and skipped: %s", candidate, directory, result)
        damaged.append(f"step {candidate}: {result}")
    raise CheckpointError(
        f"no undamaged checkpoint in {directory} ({'; '.join(damaged)}): restore the folder from a copy"
    )


def _network_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Flax module; JSON made lists of its tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
