"""From a config to the values and functions that the rooms below take. A string becomes a function here only."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax

from cfd.config import BEFORE, Config, as_recorded, complete, with_classes
from cfd.data.sources import Dataset, open_dataset
from cfd.errors import UserError
from cfd.loading import Loaded, load, load_classifier
from cfd.modes.fit import Training
from cfd.modes.sampler import Network, Sampling
from cfd.modes.train_step import make_optimizer
from cfd.networks.classifier import ClassifierFn
from cfd.networks.unet import UNet
from cfd.runs import workdir
from cfd.steps import SecondOrder, StepRule, ancestral, ddim, dpm_solver

STEP_RULES: dict[str, Callable[[Any], StepRule | SecondOrder]] = {
    "ancestral": ancestral,
    "ddim": lambda v: ddim(),
    "dpm_solver": lambda v: dpm_solver(),
}
"""The step rules that sample.sampler names, as functions of sample.v."""


def open_split(config: Config, split: str) -> Dataset:
    """The data set of `config.data`, of one of its splits."""
    data = config.data
    return open_dataset(
        source=data.source,
        name=data.name,
        split=split,
        path=data.path,
        image_size=data.image_size,
        channels=data.channels,
        num_classes=data.num_classes,
        on_bad_image=data.on_bad_image,
        in_memory=data.in_memory,
    )


def image_shape(config: Config) -> tuple[int, int, int]:
    """(H, W, C) of the images."""
    return config.data.image_size, config.data.image_size, config.data.channels


def network_of(config: Config) -> Network:
    """The diffusion network of `config.model`."""
    net: Any = UNet(**config.model)
    return Network(
        lambda params: lambda z, logsnr, labels: net.apply({"params": params}, z, logsnr, labels), image_shape(config)
    )


def sampling_of(config: Config) -> Sampling:
    """The sampler of `config.sample` over the λ range of `config.process`."""
    sample = config.sample
    return Sampling(
        step_rule=STEP_RULES[sample.sampler],
        num_steps=sample.num_steps,
        v=sample.v,
        interval=tuple(sample.interval),
        clip=sample.clip,
        doubled=sample.doubled,
        batch_size=sample.batch_size,
        logsnr_min=config.process.logsnr_min,
        logsnr_max=config.process.logsnr_max,
    )


def training_of(config: Config, train: Config) -> Training:
    """How training proceeds, for `train`: the config's own `train` group or a variant of it."""
    fields = {name: train[name] for name in Training._fields if name in train}
    return Training(**fields, seed=config.seed, flip=config.data.flip, num_workers=config.data.num_workers)


def optimizer_of(train: Config) -> optax.GradientTransformation:
    """The optimizer of a `train` group."""
    names = ("learning_rate", "warmup_steps", "adam_b1", "adam_b2", "weight_decay", "grad_clip")
    return make_optimizer(**{name: train[name] for name in names})


class Run(NamedTuple):
    """A trained run: its whole config, its model, and its noisy classifier if the config asks for guidance by one."""

    config: Config
    model: Loaded
    classifier: ClassifierFn | None


def of_run(config: Config, folder: str) -> Config:
    """The whole config of the run in `folder`, which may not exist yet.

    Fields that are younger than the run take the value that means what the code did then; a line names them.
    """
    config = complete(config)
    if not os.path.exists(os.path.join(folder, workdir.CONFIG)):
        return config
    recorded = workdir.flatten(workdir.read_config(folder)["config"])
    old = as_recorded(config, recorded)
    here, there = workdir.flatten(config.to_dict()), workdir.flatten(old.to_dict())
    if changed := [f"{name} = {there[name]!r}" for name in here if here[name] != there[name]]:
        print(f"{folder} is older than some fields, which keep their old meaning: {', '.join(changed)}.", flush=True)
    return old


def open_run(config: Config, folder: str) -> Run:
    """The newest checkpoint of the run in `folder`, which must be the run of `config`.

    Raises ValueError if the folder holds no checkpoint or another config's run, and as `check_classifier` does.
    """
    content = workdir.read_config(folder)
    config = with_classes(of_run(config, folder), len(content["class_names"]))
    workdir.check_config(folder, workdir.describe("diffusion", config.to_dict(), content["class_names"]), BEFORE)
    model = load(folder)
    check_classifier(config, folder)
    by_classifier = config.sample.guidance == "classifier"
    return Run(config, model, load_classifier(classifier_folder(folder)) if by_classifier else None)


def classifier_folder(folder: str) -> str:
    """The folder of the noisy classifier of a run, which is a run of its own."""
    return os.path.join(folder, "classifier")


def check_classifier(config: Config, folder: str) -> None:
    """Raises ValueError if sample.guidance asks for a noisy classifier that is missing or takes other images."""
    if config.sample.guidance == "classifier-free":
        return
    place = classifier_folder(folder)
    if not os.path.exists(os.path.join(place, workdir.CONFIG)):
        raise UserError(
            f"config.sample.guidance is 'classifier', and {place} holds no noisy classifier: train it with "
            "--mode=train_classifier"
        )
    data = config.data
    workdir.check_images(place, image_size=data.image_size, channels=data.channels, num_classes=data.num_classes)


def check_weights(config: Config, weights: Sequence[int | float]) -> None:
    """Raises ValueError if a weight needs a score, conditional or unconditional, that the run does not train."""
    p_uncond, free = config.train.p_uncond, config.sample.guidance == "classifier-free"
    if p_uncond == 0 and any(weights) and free:
        raise UserError(
            f"w = {next(filter(None, weights)):g} needs the unconditional score, which train.p_uncond = 0 does not "
            "train: sample.w and eval.weights can only be (0.0,)"
        )
    if p_uncond == 1 and not (free and set(weights) == {-1}):
        raise UserError(
            f"w in {tuple(weights)} needs the conditional score, which train.p_uncond = 1 does not train: sample.w and "
            "eval.weights can only be (-1.0,), with sample.guidance 'classifier-free'"
        )
