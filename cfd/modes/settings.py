"""From a config to the values and functions that the rooms below take.

A string becomes a function here, and the name of a sampler in `cfd.loading`.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict
from jax import Array
from ml_collections import ConfigDict

from cfd.attributes import is_student
from cfd.config import Config, as_recorded, complete, recorded_fields, with_classes, with_defaults
from cfd.data.sources import Dataset, check_classes, open_dataset
from cfd.errors import UserError, about_inputs
from cfd.fields import BEFORE, DEFAULTS, NETWORK
from cfd.guidance import NULL_LABEL
from cfd.loading import (
    STEP_RULES,
    WITH_V,
    Loaded,
    learned_step,
    load,
    load_classifier,
    respaced_of,
    schedule_of,
)
from cfd.losses import mean_weight, sigmoid_weight, v_weight, x_weight
from cfd.modes import rules, students
from cfd.modes.fit import Training
from cfd.modes.sampler import Network, Sampling
from cfd.modes.train_step import make_optimizer
from cfd.networks.classifier import ClassifierFn
from cfd.networks.model import Model, build
from cfd.networks.times import logsnr_table
from cfd.process import Schedule
from cfd.runs import access, files, workdir
from cfd.sampling import EpsFn, Langevin, schedule

IMPORTED = "adm"
"""The data.source of a network that `cfd.convert` imported: the images of its training are not here."""


def open_split(config: Config, split: str) -> Dataset:
    """The data set of `config.data`, of one of its splits. Raises ValueError as `open_dataset` does.

    Process 0 prints the notes of the data set, once. data.num_classes counts the classes of data.split; other splits
    are compared with it by `check_classes`, which names the classes that differ.
    """
    data = config.data
    if data.source == IMPORTED:
        raise UserError(
            f"config.data.source is {IMPORTED!r}: this network was imported, and the images of its training are not "
            "here. Set data.source to 'folder' or 'tfds', with data.path or data.name, for a copy of them; or measure "
            "without them, with eval.features = 'inception' and an .npz file as eval.reference"
        )
    with about_inputs():
        dataset = open_dataset(
            source=data.source,
            name=data.name,
            split=split,
            path=data.path,
            image_size=data.image_size,
            channels=data.channels,
            num_classes=data.num_classes if split == data.split else 0,
            on_bad_image=data.on_bad_image,
            in_memory=data.in_memory,
            labels=data.labels,
            empty_classes=data.empty_classes,
            exif_orientation=data.exif_orientation,
            transparency=data.transparency,
            max_pixels=data.max_pixels,
        )
    print_once(dataset.notes)
    return dataset


@functools.cache
def print_once(lines: tuple[str, ...]) -> None:
    """Print lines on process 0, and nothing if the same lines were printed before."""
    if lines and jax.process_index() == 0:
        print("\n".join(lines), flush=True)


def image_shape(config: Config) -> tuple[int, int, int]:
    """(H, W, C) of the images."""
    return config.data.image_size, config.data.image_size, config.data.channels


def model_of(config: Config) -> Model:
    """The diffusion network of `config.model`, whose outputs are (ε, v) if it trains a variance or samples by it."""
    variance = config.model.learn_variance or config.sample.variance == "learned"
    return build(dict(config.model), config.data.image_size, config.data.channels, variance=variance)


def network_of(config: Config) -> Network:
    """The diffusion network of `config.model`, as sampling uses it."""
    model = model_of(config)
    return Network(
        lambda params: lambda z, logsnr, labels: model.apply(params, z, logsnr, labels),
        image_shape(config),
        config.model.num_classes,
    )


def network_of_run(model: Loaded) -> Network:
    """The diffusion network of a trained run, as `load` defines it. Trained without labels, it is given none."""
    has_labels = model.num_classes > 0 and model.config["train"]["p_uncond"] < 1

    def eps_of_params(params: Any) -> EpsFn:
        def unconditional(z: Array, logsnr: Array, labels: Array) -> Array:
            return model.eps_fn.func(params, z, logsnr, jnp.full_like(labels, NULL_LABEL))

        return functools.partial(model.eps_fn.func, params) if has_labels else unconditional

    return Network(eps_of_params, model.image_shape, model.num_classes, is_student(model.eps_fn))


def sampling_of(config: Config) -> Sampling:
    """The sampler of `config.sample` over the λ range of `config.process`.

    Raises ValueError if the schedule, or the steps of ADM's table, do not fit the process or sample.num_steps.
    """
    sample, process = config.sample, config.process
    name = sample.schedule or process.schedule
    return Sampling(
        step_rule=learned_step if sample.variance == "learned" else STEP_RULES[sample.sampler],
        num_steps=sample.num_steps,
        v=sample.v,
        interval=tuple(sample.interval),
        clip=sample.clip,
        doubled=sample.doubled,
        batch_size=sample.batch_size,
        logsnr_min=process.logsnr_min,
        logsnr_max=process.logsnr_max,
        guidance=rules.guidance_of(sample.rule),
        clean_end=sample.clean_end,
        schedule=None if name == "cosine" else schedule_of(name, process.logsnr_min, process.logsnr_max),
        respaced=respaced_of(sample.to_dict(), process.to_dict(), config.model.time),
        by_mean=sample.guidance == "classifier-mean",
        clip_first=sample.clip_first,
        corrector=Langevin(sample.corrector, sample.corrector_steps) if sample.corrector else None,
        predictor_guided=sample.predictor_guided,
    )


def training_schedule(config: Config) -> Schedule:
    """The schedule of λ in training. Raises ValueError if it does not fit the ends of the process."""
    process = config.process
    return schedule_of(process.schedule, process.logsnr_min, process.logsnr_max)


def training_weight(config: Config) -> Callable[[Array], Array] | None:
    """The weight of the loss of ε that `train.weight` names; None for none."""
    name, time = config.train.weight, config.model.time
    if name == "mean":
        return mean_weight(logsnr_table(time.removeprefix("adm_"))[::-1])
    if name == "sigmoid":
        return sigmoid_weight(training_schedule(config), config.train.sigmoid_bias)
    return {"eps": None, "x": x_weight, "v": v_weight}[name]


def check_schedules(config: Config) -> None:
    """Raises ValueError if process.schedule or sample.schedule does not fit the ends of the process."""
    training_schedule(config)
    sampling_of(config)


def training_of(config: Config, train: Config) -> Training:
    """How training proceeds, for `train`: the config's own `train` group or a variant of it."""
    fields = {name: train[name] for name in Training._fields if name in train}
    return Training(**fields, seed=config.seed, flip=config.data.flip, num_workers=config.data.num_workers)


def optimizer_of(train: Config) -> optax.GradientTransformation:
    """The optimizer of a `train` group."""
    names = ("learning_rate", "warmup_steps", "adam_b1", "adam_b2", "weight_decay", "grad_clip")
    return make_optimizer(**{name: train[name] for name in names})


class Run(NamedTuple):
    """A trained run: its whole config, its classes, and its noisy classifier if the config asks for guidance by one.

    `model_at(step, ema)` is its model; step -1 is the newest, and ema 0.0, the default, the run's own EMA; see
    sample.ema. The model of the last call stays in memory.
    """

    config: Config
    class_names: tuple[str, ...]
    model_at: Callable[..., Loaded]
    classifier: ClassifierFn | None
    folder: str = ""


def config_of_run(folder: str) -> Config:
    """The config of the run in `folder`, as config.json records it. Younger fields mean what the code did before.

    The noisy classifier of an imported network has the fields of that network, which fit its images. Raises ValueError
    if the folder holds no run of a diffusion model.
    """
    if not workdir.has_config(folder):
        raise UserError(
            f"{folder} is a folder without {workdir.CONFIG}, which is no run: give the folder of a run, a "
            "Python file, or the name of a config of the package, such as digits"
        )
    content = workdir.check_kind(folder)
    recorded = recorded_fields(files.place(folder, workdir.CONFIG), workdir.flatten(content["config"]))
    fields = dict(BEFORE)
    if is_imported(content):
        fields |= {f"classifier.{name}": recorded[f"model.{name}"] for name in NETWORK if f"model.{name}" in recorded}
    return with_defaults(ConfigDict(unflatten_dict(fields | recorded, sep=".")))


def is_imported(content: dict[str, Any]) -> bool:
    """Whether a config.json belongs to a network that `cfd.convert` imported, without the images of its training."""
    return content["config"]["data"]["source"] == IMPORTED


def of_run(config: Config, folder: str) -> Config:
    """The whole config of the run in `folder`, which may not exist yet.

    In the folder of a student, a config is that of the student, as `--mode=distill` makes it. Fields that are younger
    than the run take the value that means what the code did then; a line names them. Raises
    ValueError if transparent images would get another background than before, and if the folder is in a bucket that
    cannot be read.
    """
    config = complete(config)
    access.run_path("the run's folder", folder)
    if not workdir.has_config(folder):
        return config
    place = files.place(folder, workdir.CONFIG)
    recorded = recorded_fields(place, workdir.flatten(workdir.read_config(folder)["config"]))
    if recorded.get("model.weight_range") and not students.is_student(config):  # the config that --mode=distill takes
        config = students.of_config(config, recorded["distill.sampling_steps"])
    background = recorded.get("data.transparency", BEFORE["data.transparency"])
    if background not in ("refuse", config.data.transparency):  # a run that refused them has seen none
        raise UserError(
            f"data.transparency was {background!r} in {folder} and is {config.data.transparency!r} here, which changes "
            f"images that it has been trained on: set it to {background!r}, or give another --workdir"
        )
    old = as_recorded(config, recorded)
    here, there = workdir.flatten(config.to_dict()), workdir.flatten(old.to_dict())
    if changed := [f"{name} = {there[name]!r}" for name in here if here[name] != there[name]]:
        print_once((f"{folder} is older than some fields, which keep their old meaning: {', '.join(changed)}.",))
    return old


def open_run(config: Config, folder: str) -> Run:
    """The run in `folder`, which must be the run of `config`.

    The classes of an unconditional network that a classifier guides are those of the classifier. Raises ValueError if
    the folder holds another config's run, and as `check_classifier` does; `model_at` raises it for a step that is not
    there.
    """
    content = workdir.read_config(folder)
    names = content["class_names"]
    config = with_classes(of_run(config, folder), len(names))
    described = workdir.describe("diffusion", config.to_dict(), names)
    if is_imported(content):
        described["config"] = as_imported(described["config"], content["config"])
    workdir.check_config(folder, described, BEFORE)
    check_classifier(config, folder)
    classifier = None
    if config.sample.guidance != "classifier-free":
        place = classifier_folder(folder)
        classifier, names = load_classifier(place), names or workdir.read_config(place)["class_names"]

    # Of one step, also as -1: a run that trains may have deleted it meanwhile.
    cached: dict[tuple[int, float], Loaded] = {}

    def model_at(step: int, ema: float = 0.0) -> Loaded:
        if (step, ema) not in cached:
            cached.clear()
            learned = config.sample.variance == "learned"
            model = load(folder, None if step == -1 else step, ema, variance=learned)
            cached.update({(step, ema): model, (model.step, ema): model})
        return cached[step, ema]

    return Run(config, tuple(names), model_at, classifier, folder)


def as_imported(config: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """The fields of `config` that must agree with those that `cfd.convert` recorded.

    It records what determines the network and its images. Where a copy of the training images is, is free.
    """
    here, there = workdir.flatten(config), workdir.flatten(recorded)
    free = ("data.source", "data.name")
    return unflatten_dict({name: there[name] if name in free else here.get(name) for name in there}, sep=".")


def classifier_folder(folder: str) -> str:
    """The folder of the noisy classifier of a run, which is a run of its own."""
    return os.path.join(folder, "classifier")


def check_classifier(config: Config, folder: str) -> None:
    """Raises ValueError if sample.guidance asks for a noisy classifier that is missing, or does not fit the run."""
    if config.sample.guidance == "classifier-free":
        return
    begin, place = f"config.sample.guidance is {config.sample.guidance!r}, and", classifier_folder(folder)
    if config.train.p_uncond == 1:
        raise UserError(
            f"{begin} train.p_uncond = 1 trains no conditional score for a classifier to guide: set "
            "sample.guidance='classifier-free', and the weight (-1.0,)"
        )
    if not workdir.has_config(place):
        raise UserError(f"{begin} {place} holds no noisy classifier: train it with --mode=train_classifier")
    data, ours = config.data, config.process
    workdir.check_images(place, image_size=data.image_size, channels=data.channels, num_classes=data.num_classes)
    theirs = workdir.read_config(place)["config"]["process"]
    check_range(place, theirs, ours.to_dict(), "move it away, and train another one with --mode=train_classifier")


def check_range(whose: str, theirs: Mapping[str, float], ours: Mapping[str, float], remedy: str) -> None:
    """Raises ValueError unless a network, `whose`, is trained on a range of λ that covers the run's."""
    rounding = 1e-3 * (ours["logsnr_max"] - ours["logsnr_min"])
    below, above = theirs["logsnr_min"] - ours["logsnr_min"], ours["logsnr_max"] - theirs["logsnr_max"]
    if max(below, above) > rounding:
        raise UserError(
            f"{whose} is trained on λ in [{theirs['logsnr_min']:g}, {theirs['logsnr_max']:g}], which does not cover "
            f"the run's [{ours['logsnr_min']:g}, {ours['logsnr_max']:g}]: {remedy}"
        )


def check_class_names(folder: str, names: Sequence[str], split: str) -> None:
    """Raises ValueError unless the classes of the run in `folder`, if there is one, are those of a split of the data.

    The classes of an imported network have numbers for names, and only how many they are is compared. An imported
    network without classes accepts all.
    """
    if not workdir.has_config(folder):
        return
    content = workdir.read_config(folder)
    there = content["class_names"]
    if not is_imported(content):
        check_classes(there, f"the run {folder}", names, f"data.split {split!r}")
    elif len(there) not in (0, len(names)):
        raise UserError(
            f"the run {folder} has {len(there)} classes, and data.split {split!r} has {len(names)}: give a copy of the "
            "images that the network was trained on"
        )


def check_weights(
    config: Config, weights: Sequence[int | float], guidance: rules.Guidance = rules.PLAIN, guide: str = ""
) -> None:
    """Raises ValueError if a weight needs a score, conditional or unconditional, that the run does not train.

    A guide, and another class in place of ∅, take the place of the unconditional score. Raises it for a student as
    `students.check` does.
    """
    if students.is_student(config):
        return students.check(config, weights, guidance, guide)
    p_uncond, free = config.train.p_uncond, config.sample.guidance == "classifier-free"
    if p_uncond == 0 and free and not guide and not guidance.other_labels and (any(weights) or guidance.always):
        needs = f"the rule {guidance.text!r}" if guidance.always else f"w = {next(filter(None, weights)):g}"
        remedy = "leave the rule out" if guidance.always else "sample.w and eval.weights can only be (0.0,)"
        raise UserError(
            f"{needs} needs the unconditional score, which train.p_uncond = 0 does not train: {remedy}, unless "
            "sample.guide or eval.guides name a guide to take its place"
        )
    if p_uncond == 1 and not (free and set(weights) == {-1} and not guidance.text and not guide):
        raise UserError(
            f"w in {tuple(weights)} needs the conditional score, which train.p_uncond = 1 does not train: sample.w and "
            "eval.weights can only be (-1.0,), with sample.guidance 'classifier-free'"
        )


def check_sampling(config: Config, num_steps: Sequence[int], intervals: Sequence[tuple[float, ...]]) -> None:
    """Raises ValueError if, for one of these T, no step falls into one of these guidance intervals.

    Prints a line, once, if config.sample has a v that its sampler does not use.
    """
    sample, sampling = config.sample, sampling_of(config)
    learned = sample.variance == "learned"
    if sample.v != DEFAULTS["sample.v"] and (learned or sample.sampler not in WITH_V):
        why = "sample.variance is 'learned'" if learned else f"sample.sampler {sample.sampler!r} has no v"
        print_once((f"sample.v = {sample.v} is not used: {why}.",))
    for steps, (lo, hi) in product(num_steps, filter(None, intervals)):
        levels = sampling._replace(num_steps=steps).levels
        logsnr = np.asarray(schedule(levels, sampling.logsnr_min, sampling.logsnr_max))
        distance = np.maximum(lo - logsnr, logsnr - hi)
        if distance.min() > 0:
            raise UserError(
                f"the guidance interval ({lo:g}, {hi:g}) of sample.interval or eval.intervals has no effect with "
                f"{steps} steps: none of them falls into it. The nearest is at λ = {logsnr[distance.argmin()]:.6g}: "
                "widen the interval, or take more steps"
            )
