"""A trained model from a run's folder: the one place where networks meet checkpoints."""

import functools
import math
import numbers
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Float, Int

from cfd.arguments import check_numbers, check_switch
from cfd.errors import UserError
from cfd.guidance import without_null
from cfd.networks.classifier import Classifier, ClassifierFn
from cfd.networks.model import build
from cfd.networks.times import logsnr_table, respaced
from cfd.networks.unet import check_labels
from cfd.posthoc_ema import MAX_SIGMA_REL
from cfd.process import Schedule, cosine, linear, log_normal, tabulated
from cfd.runs import files, posthoc, steps
from cfd.runs.access import check_run_path
from cfd.runs.checkpoint import CheckpointError
from cfd.runs.digest import recorded_hash, weights_hash
from cfd.runs.files import AnyPath, is_url
from cfd.runs.reading import find, is_gone, read_verified
from cfd.runs.workdir import CHECKPOINTS, SNAPSHOTS, abbreviate, config_differences, flatten, read_config
from cfd.steps import LearnedVariance, SecondOrder, StepRule, ancestral, ddim, dpm_solver, grid, sde_dpm_solver

STEP_RULES: dict[str, Callable[[Any], StepRule | SecondOrder]] = {
    "ancestral": ancestral,
    "ddim": lambda v: ddim(),
    "dpm_solver": lambda v: dpm_solver(),
    "sde_dpm_solver": sde_dpm_solver,
}
"""The step rules that sample.sampler names, as functions of sample.v."""
WITH_V = ("ancestral", "sde_dpm_solver")
"""The names of those that depend on it."""


def learned_step(v: Any) -> LearnedVariance:
    """The step rule of sample.variance = "learned", which takes v from the network and not from sample.v."""
    return ancestral(None)


def schedule_of(name: str, logsnr_min: float, logsnr_max: float) -> Schedule:
    """The schedule that process.schedule or sample.schedule names, between these ends.

    "learned" gives `linear`, whose loss a learned schedule estimates; see `cfd.losses.learned_loss`.
    Raises ValueError if ADM's or DDPM's table, which has its own ends, has others.
    """
    if not name.startswith("adm_"):
        schedules = {"cosine": cosine, "linear": linear, "learned": linear, "edm": log_normal}
        return schedules[name](logsnr_min, logsnr_max)
    table = logsnr_table(name.removeprefix("adm_"))
    first, last = float(table[-1]), float(table[0])
    if max(abs(first - logsnr_min), abs(last - logsnr_max)) > 1e-3 * (last - first):
        raise UserError(
            f"the schedule {name!r} goes from λ = {first:.6g} to {last:.6g}, and the process from {logsnr_min:g} to "
            f"{logsnr_max:g}: set process.logsnr_min to {first:.6g} and process.logsnr_max to {last:.6g}"
        )
    return tabulated(table)


def respaced_of(sample: Mapping[str, Any], process: Mapping[str, Any], time: str) -> tuple[float, ...]:
    """The grid of λ, rising, of sample.respacing; () if it is "". `time` is model.time.

    The table is that of process.schedule, or else of model.time. Raises ValueError without a table, for steps that it
    does not give, and if sample.num_steps is not their number.
    """
    steps = sample.get("respacing", "")
    if not steps:
        return ()
    names = [name for name in (process.get("schedule", ""), time) if name.startswith("adm_")]
    if not names:
        raise UserError(
            f"config.sample.respacing is {steps!r}, steps of a table, and neither process.schedule nor model.time is "
            "'adm_linear' or 'adm_cosine': set sample.respacing to '', and sample.schedule to a grid for this run"
        )
    try:
        levels = respaced(steps, names[0].removeprefix("adm_"))
    except ValueError as error:
        raise UserError(f"config.sample.respacing: {error}") from None
    if len(levels) != sample["num_steps"]:
        raise UserError(
            f"config.sample.respacing is {steps!r}, which has {len(levels)} steps, and sample.num_steps is "
            f"{sample['num_steps']}: set sample.num_steps to {len(levels)}"
        )
    return tuple(map(float, levels))


class Loaded(NamedTuple):
    """A trained model, ready to sample from: `guided_sample(..., **run.process, **run.sampling)`.

    `process` has the ends of the λ range that the model was trained on, as `logsnr_min` and `logsnr_max`. `sampling`
    has `num_steps`, `sampler` and `clip` as the run's config says; `num_steps` is a grid of λ if the config asks for
    another schedule than the cosine or for sample.respacing. With sample.variance = "learned", `sampler` takes v from
    the network if it was loaded with `variance`, and else from sample.v. `sampling` lacks those that the config lacks,
    and is empty for an imported model; `guided_sample` then uses its own defaults. `data_identity` is that of the
    images of its training, as `cfd.data.dataset.Dataset` defines it, or "" if it is not recorded.
    """

    eps_fn: Callable[[Float[Array, "b h w c"], Float[Array, "b"], Int[Array, "b"]], Any]
    params: Any
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    config: dict[str, Any]
    step: int
    process: dict[str, float]
    sampling: dict[str, Any]
    weights_hash: str
    data_identity: str = ""


def load(
    workdir: str | os.PathLike[str],
    step: int | None = None,
    ema: float | None = None,
    *,
    sharding: Sharding | None = None,
    fast: bool = True,
    variance: bool = False,
) -> Loaded:
    """The model in a run's folder, with the EMA weights of its newest undamaged step, or of `step`.

    `ema` is the length of another EMA, σ_rel of `cfd.posthoc_ema`, which is then reconstructed from the averages that
    the run keeps (train.posthoc_ema). None and 0.0 are the run's own EMA, as sample.ema says it.

    `eps_fn(z, logsnr, labels)` is a `jax.tree_util.Partial`. Pass it to a jitted function as an argument: its weights
    are then arguments too. The program of a function that closes over it contains them as constants.

    `eps_fn` raises ValueError for a λ outside the range of `process`, for a label that is not below the number of
    classes, and for the null label ∅ if the model never saw it in training (p_uncond = 0). Under `jit`, it cannot
    raise, and such a row is NaN instead. With `fast=False`, `jax.jvp` and `jax.jacfwd` differentiate it; see `UNet`.

    The eps_fn of a student (--mode=distill) takes w, float32 [B], as its fourth argument, and its attribute
    `weight_range` says the range. A w outside of it, and the label ∅, are errors as above: a student has one score,
    which is guided already.

    With `variance`, `eps_fn` returns (ε, v) for `ancestral(v=None)`. v = (o + 1) / 2 of the outputs o of the learned
    variance, which a model has that was trained with model.learn_variance, or imported with --keep-variance. Without
    them, this is a ValueError.

    The weights are on one device unless `sharding` says otherwise. With several processes, every one must call this.
    Raises ValueError if there is no run, no such step or no such EMA, and CheckpointError if the checkpoints are
    damaged.
    """
    check_switch("fast", fast)
    check_switch("variance", variance)
    found = load_ema(workdir, "diffusion", step, ema, sharding=sharding)
    params, config_json = found.params, found.config_json
    config = config_json["config"]
    num_classes = config["model"]["num_classes"]
    size, channels = config["data"]["image_size"], config["data"]["channels"]
    model = build(config["model"], size, channels, variance=variance, fast=fast)
    process = _ends(config)
    weight_range = tuple(config["model"].get("weight_range", ()))
    always_labelled = num_classes > 0 and config["train"]["p_uncond"] == 0
    num_outputs = config["model"].get("out_channels") or channels
    if variance and num_outputs != 2 * channels:
        raise UserError(
            f"{os.fspath(workdir)} has no learned variance: its network has {num_outputs} outputs for {channels} "
            "channels. Leave variance out, or train one with model.learn_variance; or, if it is an import, import it "
            "again: python -m cfd.convert adm --keep-variance FILE OUT"
        )

    def eps_fn(params: Any, z: Array, logsnr: Array, labels: Array) -> Any:
        trained = check_labels(labels, num_classes) & _in_range(logsnr, process)
        eps = functools.partial(model.apply, params)
        outputs = (without_null(eps) if always_labelled else eps)(z, logsnr, labels)
        return jax.tree.map(lambda out: _nan_unless(trained, out), outputs)

    def scores(params: Any, z: Array, logsnr: Array, labels: Array, nulls: Array) -> tuple[Any, Array]:
        assert model.scores is not None, "it is an attribute of eps_fn only then"
        trained, trained_null = (check_labels(c, num_classes) & _in_range(logsnr, process) for c in (labels, nulls))
        outputs, eps_null = model.scores(params, z, logsnr, labels, nulls)
        return jax.tree.map(lambda out: _nan_unless(trained, out), outputs), _nan_unless(trained_null, eps_null)

    def student_fn(params: Any, z: Array, logsnr: Array, labels: Array, w: Array) -> Any:
        trained = check_labels(labels, num_classes) & _in_range(logsnr, process) & _learned(labels, w, weight_range)
        return jax.tree.map(lambda out: _nan_unless(trained, out), model.apply(params, z, logsnr, labels, w=w))

    if model.scores is not None and not always_labelled:
        eps_fn.scores = scores  # pyright: ignore[reportFunctionMemberAccess]
    if weight_range:
        student_fn.weight_range = weight_range  # pyright: ignore[reportFunctionMemberAccess]
    return Loaded(
        eps_fn=_bound(student_fn if weight_range else eps_fn, params, process),
        params=params,
        image_shape=(size, size, channels),
        num_classes=num_classes,
        class_names=tuple(config_json["class_names"]),
        config=config,
        step=found.step,
        process=process,
        sampling=_sampling(config, variance),
        weights_hash=found.weights_hash,
        data_identity=found.data_identity,
    )


def load_classifier(workdir: str | os.PathLike[str], step: int | None = None, *, fast: bool = True) -> ClassifierFn:
    """The classifier in the folder of a run of kind "classifier": (z [B, H, W, C], logsnr [B]) -> logits [B, K].

    It treats a λ outside the range that it was trained on as `load` says, and `fast` is as in `load`.
    Its weights are the EMA weights of the newest undamaged step, or of `step`. Raises ValueError if the folder holds
    another kind of run, and CheckpointError if its checkpoints are damaged.
    """
    check_switch("fast", fast)
    params, config_json, *_ = load_ema(workdir, "classifier", step)
    config = config_json["config"]
    net = Classifier(image_size=config["data"]["image_size"], fast=fast, **_network_fields(config["classifier"]))
    process = _ends(config)

    def classifier_fn(params: Any, z: Array, logsnr: Array) -> Array:
        trained = _in_range(logsnr, process)
        logits: Any = net.apply({"params": params}, z, logsnr)
        return _nan_unless(trained, logits)

    return _bound(classifier_fn, params, process)


class Ema(NamedTuple):
    """The EMA weights of a run, the content of its config.json, the step, and the SHA-256 of the weights.

    `data_identity` is that of the images of its training, or "" if it is not recorded.
    """

    params: Any
    config_json: dict[str, Any]
    step: int
    weights_hash: str
    data_identity: str


def load_ema(
    workdir: str | os.PathLike[str],
    kind: str,
    step: int | None = None,
    ema: float | None = None,
    *,
    sharding: Sharding | None = None,
) -> Ema:
    """The EMA weights of a run whose "kind" is `kind`: of its newest checkpoint, or of `step`.

    `ema` is as in `load`. `step` may also be a snapshot. It reads only the EMA, and changes nothing in the folder,
    which another job may be training in: a damaged newest step is skipped with a warning, and one that is deleted
    meanwhile without. With several processes, every one must call this. Raises CheckpointError if `step` is damaged, or
    if all checkpoints are, and ValueError for a run of another kind, for a step that does not exist, for one that was
    written with another config, and for a student of an earlier version, whose input w is gone.
    """
    if ema is not None and not (isinstance(ema, numbers.Real) and 0 <= ema <= MAX_SIGMA_REL):
        raise UserError(f"ema is {ema!r}; expected a number in [0, {MAX_SIGMA_REL:g}], or None for the run's own EMA")
    check_run_path(workdir if is_url(workdir) else files.place(workdir))
    workdir = files.place(workdir)
    config_json = read_config(workdir)
    if config_json["kind"] != kind:
        opened_by = {"diffusion": "cfd.loading.load", "classifier": "cfd.loading.load_classifier"}
        raise UserError(
            f"{workdir} holds a {config_json['kind']} run; a {kind} run was expected: give its "
            f"folder, or open this one with {opened_by.get(config_json['kind'], 'the program that wrote it')}"
        )
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    # A newer version that resumes a run adds its new fields to config.json, and older checkpoints lack them.
    younger = flatten(config_json["config"])

    def template(meta: dict[str, Any], prefixes: tuple[str, ...] = ("ema/",)) -> Any:
        if differences := config_differences(meta["config"], config_json, younger):
            raise UserError(
                f"step {meta['step']} was not written with {workdir}/config.json: {abbreviate(differences)}. Restore "
                f"the config.json of this run, from the folder meta of that step or a backup"
            )
        if "ema/weight/weight_1/kernel" in meta["arrays"]:
            raise UserError(
                f"{workdir} is a student of an older form, whose input w this version does not have: distill it again "
                "with --mode=distill in another --workdir, or sample it with the version that distilled it"
            )
        wanted = {
            tuple(key.split("/")): jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for key, (shape, dtype, _) in meta["arrays"].items()
            if key.startswith(prefixes)
        }
        return unflatten_dict(wanted)

    if ema:
        kept = config_json["config"].get("train", {}).get("posthoc_ema", ())
        params, step, meta = posthoc.reconstruct(workdir, step, ema, kept, template, sharding)
        return Ema(params, config_json, step, weights_hash(params), meta["data_state"].get("data", ""))
    damaged: dict[AnyPath, str] = {}
    while place := find(workdir, step, damaged):
        result = read_verified(place, template)
        if not isinstance(result, str):
            tree, meta = result
            arrays = {key.removeprefix("ema/"): x for key, x in meta["arrays"].items() if key.startswith("ema/")}
            sha256 = recorded_hash(arrays) or weights_hash(tree["ema"])
            return Ema(tree["ema"], config_json, int(place.name), sha256, meta["data_state"].get("data", ""))
        if not is_gone(place):
            logging.warning("step %s in %s is damaged and skipped: %s", place.name, place.parent, result)
            damaged[place] = result
    if damaged:
        reasons = "; ".join(f"step {place.name} in {place.parent.name}: {why}" for place, why in damaged.items())
        wanted = "checkpoint" if step is None else f"step {step!r}"
        raise CheckpointError(f"no undamaged {wanted} in {workdir} ({reasons}): restore the folder from a copy")
    checkpoints, snapshots = (steps.steps_of(workdir / name) for name in (CHECKPOINTS, SNAPSHOTS))
    raise UserError(
        f"{workdir / CHECKPOINTS} has no step{'' if step is None else f' {step!r}'}; its steps are {checkpoints}"
        + (f", and the snapshots of the EMA are {snapshots}" if snapshots else "")
        + steps.hint(workdir / CHECKPOINTS)
    )


def _network_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Flax module; JSON made lists of its tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _bound(fun: Callable[..., Any], params: Any, process: dict[str, float]) -> jax.tree_util.Partial:
    """`fun` with its parameters. It tells `guided_sample` the trained λ range in an attribute, `logsnr_range`."""
    if process:
        fun.logsnr_range = process["logsnr_min"], process["logsnr_max"]  # pyright: ignore[reportFunctionMemberAccess]
    return jax.tree_util.Partial(fun, params)


def _in_range(logsnr: Array, process: dict[str, float]) -> Array:
    """Whether each λ is in the range of `process`, to 1e-3 of its width. Raises ValueError if a concrete one is not.

    Without `process`, every λ is in range.
    """
    lo, hi = process.get("logsnr_min", -math.inf), process.get("logsnr_max", math.inf)
    slack = 1e-3 * (hi - lo) if process else 0.0

    def inside(x: Any) -> Any:
        return (x >= lo - slack) & (x <= hi + slack)

    trained = f"the network was trained on [{lo:g}, {hi:g}]: stay in this range, in guided_sample by **run.process"
    check_numbers("logsnr", logsnr, inside, trained)
    return inside(jnp.asarray(logsnr))


def _learned(labels: Array, w: Array, weight_range: tuple[float, ...]) -> Array:
    """Whether a student can give the score of each row, which has a class and a w in its range.

    Raises ValueError if a concrete one is another.
    """
    lo, hi = map(np.float32, weight_range)
    remedy = f"the student learned w in [{lo:g}, {hi:g}]: give weights in this range, or load the run it learned from"
    check_numbers("w", w, lambda x: (x >= lo) & (x <= hi), remedy)
    null = "the label -1 asks for the unconditional score, which a student does not have: load the run it learned from"
    check_numbers("labels", labels, lambda c: c >= 0, null)
    return (w >= lo) & (w <= hi) & (labels >= 0)


def _nan_unless(known: Array, out: Array) -> Array:
    """`out` [B, ...], with the rows NaN that are not known.

    A NaN as λ would not do. XLA:CPU compiles the exponential in a network's time as if its argument were never NaN.
    """
    return jnp.where(known.reshape(-1, *[1] * (out.ndim - 1)), out, jnp.nan)


def _ends(config: dict[str, Any]) -> dict[str, float]:
    """The ends of λ that a config records, or {}."""
    process = config.get("process", {})
    return {name: process[name] for name in ("logsnr_min", "logsnr_max") if name in process}


def _sampling(config: dict[str, Any], variance: bool) -> dict[str, Any]:
    """The arguments of `guided_sample` that a config's group `sample` means, with a learned variance if `variance`.

    A run that is older than the fields of the schedule has the cosine.
    """
    sample = config.get("sample", {})
    found = {name: sample[name] for name in ("num_steps", "clip") if name in sample}
    name = sample.get("schedule") or config.get("process", {}).get("schedule", "cosine")
    if levels := respaced_of(sample, config.get("process", {}), config["model"].get("time", "cosine")):
        found["num_steps"] = np.asarray(levels, np.float32)
    elif "num_steps" in found and (name != "cosine" or not sample.get("clean_end", True)):
        levels = schedule_of(name, **_ends(config))
        found["num_steps"] = grid(found["num_steps"], levels, clean_end=sample.get("clean_end", True))
    if "sampler" not in sample:
        return found
    learned = variance and sample.get("variance", "fixed") == "learned"
    return found | {"sampler": (learned_step if learned else STEP_RULES[sample["sampler"]])(sample["v"])}
