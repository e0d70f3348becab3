"""`--init_from=RUN[:STEP]`: a new run that begins with the EMA weights of another run, and with a fresh optimizer.

config.json records the source under "init_from". A run that resumes goes on from its own checkpoints, and then the
source may be gone.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from cfd.config import Config, as_tuples, recorded_fields
from cfd.devices import parallel
from cfd.errors import UserError
from cfd.fields import BEFORE, NETWORK, OF_TRANSFORMER, OF_UNETS
from cfd.loading import Ema, load_ema
from cfd.modes import settings
from cfd.networks.monotone import SCHEDULE
from cfd.networks.unet import UNet, levels_with_attention
from cfd.networks.weight import is_of_weight
from cfd.runs import files, steps, workdir
from cfd.runs.access import run_path
from cfd.runs.digest import leaves
from cfd.runs.files import is_url

CLASS_TABLE = "embed/label/embedding"
OUTPUTS = ("conv_out/kernel", "conv_out/bias")
OTHERS = ("network", "predict", "fourier", *OF_TRANSFORMER)
"""The fields of the diffusion network, beside those of NETWORK, by which its weights mean something else."""
FREE = ("num_classes", "dropout", "dtype", "remat")
"""Fields of the network in which a run may differ from the run that it begins from."""


class Source(NamedTuple):
    """The run that another run began from, as config.json records it: its folder, the step, the hash of its weights."""

    run: str
    step: int
    weights_hash: str


class Start(NamedTuple):
    """The source of a run, and a function that gives its weights, once."""

    source: Source
    read: Callable[[], Ema]


def check(config: Config, folder: str, init_from: str | None) -> None:
    """Look at the source of a new run before anything large is read.

    Raises ValueError if `init_from` names no checkpoint of a diffusion model whose network is the config's, or if the
    run in `folder` began in another way.
    """
    recorded = source_of(folder)
    if workdir.has_begun(folder):
        if init_from is not None and recorded is None:
            raise UserError(
                f"{folder} has begun with random weights, and --init_from={init_from} begins a new run: give another "
                "--workdir, or leave --init_from out to resume"
            )
        return
    if init_from is not None:
        run, step = parse(init_from)
    elif recorded is not None:
        run, step = recorded.run, recorded.step
    else:
        return
    if os.path.realpath(run) == os.path.realpath(folder):
        raise UserError(f"--init_from={init_from} is the run's own folder: give another --workdir")
    content = workdir.read_config(run)
    if content["kind"] != "diffusion":
        raise UserError(f"{run} holds a {content['kind']} run: --init_from takes the run of a diffusion model")
    recorded_fields(files.place(run, workdir.CONFIG), workdir.flatten(content["config"]))
    if content["config"]["model"].get("weight_range") and not config.model.weight_range:
        teacher = content.get("init_from", {}).get("run", "its teacher")
        raise UserError(
            f"{run} is a student, whose weights take the guidance weight as an input: begin with those of the run that "
            f"it learned from, {teacher}, or go on to fewer steps with --mode=distill"
        )
    checkpoints, snapshots = (
        steps.steps_of(files.place(run, name)) for name in (workdir.CHECKPOINTS, workdir.SNAPSHOTS)
    )
    if not checkpoints if step is None else step not in (*checkpoints, *snapshots):
        what = "checkpoint" if step is None else f"step {step}"
        there = f"--init_from={run}:STEP takes one of {sorted({*checkpoints, *snapshots})}"
        hint = steps.hint(files.place(run, workdir.CHECKPOINTS))
        raise UserError(f"{run} has no {what}: {there if checkpoints or snapshots else 'train it first'}{hint}")
    check_network(config, run, content)


def find(config: Config, folder: str, init_from: str | None) -> Start | None:
    """Where the run in `folder` takes its first weights from: from `init_from`, or as config.json records it.

    None stands for random weights. The weights of a new run are read at once. Those of a run that has begun are read
    only if it must begin again, and may be gone. Every process must call this. Raises ValueError as `check` does.
    """
    check(config, folder, init_from)
    recorded = source_of(folder)
    if workdir.has_begun(folder):
        if recorded is None:
            return None
        if init_from is not None:
            check_same(folder, recorded, init_from)
        return Start(recorded, functools.partial(read, recorded))
    if init_from is not None:
        run, step = parse(init_from)
        ema = load_ema(run, "diffusion", step)
        recorded = Source(run, ema.step, ema.weights_hash)
    elif recorded is not None:
        ema = read(recorded)
    else:
        return None
    # `pop` lets go of the weights, which would otherwise stay in memory for as long as the run trains.
    return Start(recorded, [ema].pop)


def parse(init_from: str, name: str = "--init_from") -> tuple[str, int | None]:
    """(absolute path or URL, step) of RUN:STEP; the step is None for RUN alone. Errors are about the setting `name`."""
    whole = run_path(name, init_from)
    whole = whole if is_url(whole) else os.path.abspath(whole)
    run, _, step = whole.rpartition(":")
    is_step = step.isdecimal() and not (files.names(whole) if is_url(whole) else os.path.isdir(whole))
    return (os.fspath(files.place(run)), int(step)) if is_step else (whole, None)


def source_of(folder: str) -> Source | None:
    """The source that the config.json of a folder records; None if there is neither."""
    if not workdir.has_config(folder):
        return None
    recorded = workdir.read_config(folder).get("init_from")
    return None if recorded is None else Source(**recorded)


def check_same(folder: str, recorded: Source, init_from: str) -> None:
    """Raises UserError unless `init_from` names the weights from which the run in `folder` began."""
    if not is_same(recorded, init_from):
        raise UserError(
            f"{folder} began from {recorded.run}, step {recorded.step}, whose weights are not those of "
            f"--init_from={init_from}: give another --workdir, or leave --init_from out to resume"
        )


def is_same(recorded: Source, init_from: str) -> bool:
    """Whether `init_from` names the recorded run and step, or other ones with the same weights."""
    run, step = parse(init_from)
    if run == recorded.run and step in (None, recorded.step):
        return True
    try:
        return load_ema(run, "diffusion", step).weights_hash == recorded.weights_hash
    except UserError:
        return False


def read(source: Source) -> Ema:
    """The weights of a recorded source. Raises ValueError if they are gone or no longer the same."""
    ema = load_ema(source.run, "diffusion", source.step)
    if ema.weights_hash != source.weights_hash:
        raise UserError(
            f"step {source.step} of {source.run}, from which this run began, has other weights now: restore it from a "
            "copy, or begin a new run in another --workdir"
        )
    return ema


def check_network(config: Config, run: str, content: dict[str, Any]) -> None:
    """Raises ValueError, with the flags to give, unless the run's network is the config's, except for FREE."""
    data, model = content["config"]["data"], content["config"]["model"]
    there = {name: as_tuples(model.get(name, BEFORE[f"model.{name}"])) for name in (*NETWORK, *OTHERS)}
    is_transformer = "transformer" in (there["network"], config.model.network)
    levels = set() if there["network"] == "transformer" else attended(data["image_size"], there)
    if there["network"] == "transformer":
        there = {name: value for name, value in there.items() if name not in OF_UNETS}
    elif not is_transformer and levels == attended(config.data.image_size, config.model):
        there["attention_resolutions"] = config.model.attention_resolutions
    else:
        there["attention_resolutions"] = tuple(config.data.image_size >> level for level in sorted(levels))
    wanted = {f"model.{name}": value for name, value in there.items() if name not in FREE}
    wanted["data.channels"] = data["channels"]
    variance = bool(config.model.learn_variance) and model.get("out_channels") == 2 * data["channels"]
    if config.model.learn_variance:
        wanted["model.learn_variance"] = variance
    if config.model.out_channels:
        wanted["model.out_channels"] = data["channels"] * (1 + variance)
    here = workdir.flatten(config.to_dict())
    if other := {name: value for name, value in wanted.items() if value != here[name]}:
        shown = [f"{name} is {here[name]!r} here" for name in other]
        flags = [f'--config.{name}="{value}"' for name, value in other.items()]
        raise UserError(
            f"the network of {run} is another one than the config's: {workdir.abbreviate(shown)}. To begin with its "
            f"weights, give {' '.join(flags)}"
        )


def attended(image_size: int, model: Any) -> set[int]:
    """The levels of a network that have attention."""
    mult, resolutions = tuple(model["channel_mult"]), tuple(model["attention_resolutions"])
    return levels_with_attention(
        UNet(image_size=image_size, num_classes=0, channel_mult=mult, attention_resolutions=resolutions)
    )


def from_weights(start: Start, config: Config, class_names: Sequence[str]) -> Callable[[Any], Any]:
    """(fresh parameters) -> the parameters of the source, as the fresh ones are divided over the devices.

    Classes that the source does not have keep their fresh rows of the table of classes. A learned schedule and the
    input w of a student keep their fresh parameters if the source has none. Outputs that the network of this run does
    not have are dropped.
    """

    def place(fresh: Array, value: np.ndarray) -> Array:
        return jax.make_array_from_callback(fresh.shape, fresh.sharding, lambda index: value[index])

    def from_fresh(params: Any) -> Any:
        ema = start.read()
        weights = {key: np.asarray(x) for key, x in leaves(ema.params)}
        rows = rows_of(class_names, ema.config_json)

        def one(key: str, fresh: Array) -> Array:
            if key == CLASS_TABLE:
                table = np.array(parallel.gather(fresh))
                for new, old in rows.items():
                    table[new] = weights[key][old]
                return place(fresh, table)
            if (key.startswith(f"{SCHEDULE}/") or is_of_weight(key)) and key not in weights:
                return fresh
            value = weights[key][..., : fresh.shape[-1]] if key in OUTPUTS else weights[key]
            if value.shape != fresh.shape:
                raise ValueError(f"{key} is {value.shape} in the source and {fresh.shape} in the network")
            return place(fresh, value)

        say(f"Beginning with the EMA weights of {start.source.run}, step {start.source.step}.")
        there, here = ema.config_json["config"].get("process", {}), config.process.to_dict()
        if range_of(there) != range_of(here):
            say(f"Its λ range was {range_of(there)}; that of this run is {range_of(here)}.")
        new = [name for number, name in enumerate(class_names) if number not in rows]
        names = f"; new: {workdir.abbreviate(new, separator=', ')}" if new else ""
        by_number = " by their number, because an imported network has no names of classes"
        how = by_number if rows and settings.is_imported(ema.config_json) else ""
        say(f"{len(rows)} of {len(class_names)} classes take their weights from the source{how}{names}.")
        structure = jax.tree.structure(params)
        return jax.tree.unflatten(structure, [one(key, fresh) for key, fresh in leaves(params)])

    return from_fresh


def rows_of(class_names: Sequence[str], content: dict[str, Any]) -> dict[int, int]:
    """{class: class of the source} of the classes that the source has, by name.

    The names of an imported network are only numbers. Its classes are those of the data if they are as many.
    """
    theirs = content["class_names"]
    if settings.is_imported(content):
        return {number: number for number in range(len(theirs))} if len(theirs) == len(class_names) else {}
    return {number: theirs.index(name) for number, name in enumerate(class_names) if name in theirs}


def range_of(process: dict[str, float]) -> str:
    return f"[{process['logsnr_min']:g}, {process['logsnr_max']:g}]" if process else "not recorded"


def say(line: str) -> None:
    """Prints a line on process 0."""
    if jax.process_index() == 0:
        print(line, flush=True)
