"""Every field that a config may set: its default, what it accepts, its meaning and its unit, in one table.

A config states what makes its experiment that experiment; `complete` adds the defaults of this table, and there are no
others. `python -m cfd.main --config=NAME --mode=config` prints the result.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from ml_collections import ConfigDict

from cfd.errors import UserError

Config: TypeAlias = Any
"""A ConfigDict that holds every field of FIELDS, with the types given there, once `complete` has returned it."""


class Check(NamedTuple):
    """The type of a value, the condition that it must satisfy, and that condition in words."""

    type: type
    holds: Callable[[Any], bool]
    words: str


class Field(NamedTuple):
    """One row of the table.

    `before` is the value that means what the code did before the field existed; None if the default does.
    """

    default: Any
    check: Check
    meaning: str
    before: Any = None


def accepts(check: Check, value: Any) -> bool:
    """Whether a value has the type and satisfies the condition. An int passes for a float, a bool only for a bool."""
    types = (int, float) if check.type is float else (check.type,)
    return isinstance(value, types) and (check.type is bool or not isinstance(value, bool)) and check.holds(value)


def at_least(low: int) -> Check:
    return Check(int, lambda x: x >= low, f"an integer >= {low}")


def number(low: float, high: float = math.inf, *, above: bool = False) -> Check:
    words = f"a number {'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
    return Check(float, lambda x: (x > low if above else x >= low) and x <= high and math.isfinite(x), words)


def one_of(*values: str) -> Check:
    return Check(str, lambda x: x in values, f"one of {', '.join(values)}")


def each(check: Check, words: str, *, empty: bool = True) -> Check:
    return Check(tuple, lambda x: (empty or len(x) > 0) and all(accepts(check, item) for item in x), words)


def distinct(check: Check, words: str) -> Check:
    every = each(check, words)
    return Check(tuple, lambda x: every.holds(x) and len(set(x)) == len(x), f"{words}, none twice")


def is_interval(value: Any) -> bool:
    """Whether a value is () or (logsnr_lo, logsnr_hi) with lo <= hi."""
    finite = isinstance(value, tuple) and all(accepts(FINITE, end) for end in value)
    return finite and (value == () or (len(value) == 2 and value[0] <= value[1]))


SEED = Check(int, lambda x: 0 <= x < 2**32, "an integer in [0, 2^32), the seeds of JAX")
TEXT = Check(str, lambda _: True, "a string")
BOOL = Check(bool, lambda _: True, "True or False")
FINITE = Check(float, math.isfinite, "a finite number")
DECAY = Check(float, lambda x: 0 <= x < 1, "a number in [0, 1)")
CHANNELS = Check(int, lambda x: x in (1, 3), "1 or 3")
BASE_CHANNELS = Check(int, lambda x: x > 0 and x % 32 == 0, "a multiple of 32, the number of norm groups")
# Beyond ±88, α or σ is 0 in float32.
LOGSNR = Check(float, lambda x: -80 <= x <= 80, "a number in [-80, 80]")
WEIGHTS = "a tuple of guidance weights, each finite and >= -1 (w = -1 is the unconditional model)"
INTERVAL = "() or (logsnr_lo, logsnr_hi) with lo <= hi"
SEEDS = each(SEED, "a tuple of integers in [0, 2^32), the seeds of JAX", empty=False)
INTERVALS = distinct(
    Check(tuple, is_interval, INTERVAL), f"() for sample.interval, or a tuple of intervals, each {INTERVAL}"
)
MESH_DATA = Check(int, lambda x: x == -1 or x >= 1, "-1 (the devices that fsdp leaves) or an integer >= 1")

NETWORK = {
    "num_classes": Field(0, at_least(0), "classes of the label; 0: as many as the data has"),
    "base_channels": Field(128, BASE_CHANNELS, "channels that channel_mult multiplies"),
    "channel_mult": Field(
        (1, 2, 2, 2), each(at_least(1), "a tuple of integers >= 1", empty=False), "channel multiplier of each level"
    ),
    "num_res_blocks": Field(2, at_least(1), "residual blocks per level, downwards"),
    "attention_resolutions": Field(
        (16, 8), each(at_least(1), "a tuple of integers >= 1"), "heights, in pixels, of the levels with attention"
    ),
    "head_channels": Field(64, at_least(0), "channels per attention head; 0: num_heads decides"),
    "num_heads": Field(0, at_least(0), "attention heads; 0: head_channels decides"),
    "resblock_updown": Field(True, BOOL, "residual blocks change the resolution; False: plain convolutions do"),
    "scale_shift_norm": Field(True, BOOL, "the embedding scales and shifts the second norm; False: it is added"),
    "dropout": Field(0.0, Check(float, lambda x: 0 <= x < 1, "a probability in [0, 1)"), "dropout probability"),
    "time": Field("cosine", one_of("cosine", "adm_cosine", "adm_linear"), "the time by which λ enters the network"),
    "dtype": Field("float32", one_of("float32", "bfloat16"), "dtype of activations; parameters are float32"),
    "remat": Field(False, BOOL, "recompute activations in the backward pass: less memory, more time"),
}

FIELDS: dict[str, Field] = {
    "seed": Field(0, SEED, "seed of initialisation, data order and training noise"),
    "data.source": Field("folder", one_of("digits", "folder", "tfds"), "where images come from"),
    "data.name": Field("", TEXT, "name of the TensorFlow Datasets data set"),
    "data.split": Field("train", TEXT, "split that is trained on"),
    "data.path": Field("", TEXT, "folder of images, or of prepared tfds data sets ('': ~/tensorflow_datasets)"),
    "data.image_size": Field(32, at_least(1), "height and width in pixels; larger images are cropped and shrunk"),
    "data.channels": Field(3, CHANNELS, "1: grey, 3: RGB"),
    "data.num_classes": Field(0, at_least(0), "classes that the data must have; 0: as many as it has"),
    "data.flip": Field(False, BOOL, "flip each training image left to right with probability 1/2"),
    "data.on_bad_image": Field("raise", one_of("raise", "skip"), "for an image that cannot be used"),
    "data.in_memory": Field(False, BOOL, "decode each image once and keep it"),
    "data.num_workers": Field(2, at_least(0), "decoding threads per process; 0: the calling thread"),
    **{f"model.{name}": field for name, field in NETWORK.items()},
    "model.out_channels": Field(0, at_least(0), "output channels; 0: data.channels"),
    "process.logsnr_min": Field(-20.0, LOGSNR, "smallest log-SNR λ, all noise"),
    "process.logsnr_max": Field(20.0, LOGSNR, "largest log-SNR λ, hardly any noise"),
    "train.num_steps": Field(100_000, at_least(1), "optimizer steps in all"),
    "train.batch_size": Field(256, at_least(1), "images per step, over all devices"),
    "train.p_uncond": Field(0.1, number(0.0, 1.0), "probability of dropping the label"),
    "train.learning_rate": Field(2e-4, number(0.0, above=True), "learning rate of AdamW after the warm-up"),
    "train.warmup_steps": Field(0, at_least(0), "steps of linear warm-up of the learning rate"),
    "train.adam_b1": Field(0.9, DECAY, "β1 of Adam"),
    "train.adam_b2": Field(0.999, DECAY, "β2 of Adam"),
    "train.weight_decay": Field(0.0, number(0.0), "weight decay of AdamW"),
    "train.grad_clip": Field(1.0, number(0.0, above=True), "largest global norm of the gradient"),
    "train.ema_decay": Field(0.9999, DECAY, "decay of the moving average of the parameters, per step"),
    "train.ema_warmup": Field(False, BOOL, "limit the decay to (1 + t) / (10 + t) at step t"),
    "train.num_microbatches": Field(1, at_least(1), "parts of the batch whose gradients are accumulated"),
    "train.nonfinite_limit": Field(3, at_least(1), "consecutive non-finite steps at which training gives up"),
    "train.checkpoint_every_steps": Field(5000, at_least(1), "steps between checkpoints"),
    "train.keep_checkpoints": Field(2, at_least(1), "checkpoints that are kept, the newest"),
    "train.log_every_steps": Field(100, at_least(1), "steps between lines of metrics.jsonl"),
    "train.sample_every_steps": Field(10_000, at_least(0), "steps between sample grids; 0: none"),
    "train.watchdog_seconds": Field(600, at_least(0), "seconds without progress that end the process; 0: never"),
    **{f"classifier.{name}": field for name, field in NETWORK.items()},
    "classifier_train.num_steps": Field(300_000, at_least(1), "optimizer steps of the noisy classifier"),
    "classifier_train.batch_size": Field(256, at_least(1), "images per step of the noisy classifier"),
    "classifier_train.learning_rate": Field(
        3e-4, number(0.0, above=True), "learning rate of its AdamW after the warm-up"
    ),
    "classifier_train.weight_decay": Field(0.05, number(0.0), "weight decay of its AdamW"),
    "mesh.data": Field(-1, MESH_DATA, "devices along which the batch alone is divided; -1: those that fsdp leaves"),
    "mesh.fsdp": Field(1, at_least(1), "devices along which parameters are divided too"),
    "sample.num_steps": Field(256, at_least(1), "T, network evaluations per image and score"),
    "sample.sampler": Field("ancestral", one_of("ancestral", "ddim", "dpm_solver"), "step rule"),
    "sample.v": Field(0.3, number(0.0, 1.0), "interpolation of the ancestral sampler's log-variance"),
    "sample.w": Field((0.0, 1.0, 2.0, 4.0), each(number(-1.0), WEIGHTS, empty=False), "weights, columns of the grid"),
    "sample.guidance": Field("classifier-free", one_of("classifier-free", "classifier"), "kind of guidance"),
    "sample.interval": Field((), Check(tuple, is_interval, INTERVAL), "λ interval that is guided; (): all"),
    "sample.doubled": Field(False, BOOL, "both scores in one batch of twice the size"),
    "sample.clip": Field(True, BOOL, "clip the predicted image to [-1, 1] at every step"),
    "sample.classes": Field(
        (), each(at_least(0), "a tuple of class numbers; () for the first ten"), "classes, rows of the grid; (): ten"
    ),
    "sample.seeds": Field((0,), SEEDS, "seeds, one row per class and seed"),
    "sample.batch_size": Field(256, at_least(1), "images per batch, over all devices"),
    "eval.weights": Field(
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0),
        distinct(number(-1.0), WEIGHTS),
        "weights of the sweep; (): no sweep",
    ),
    "eval.num_steps": Field(
        (), distinct(at_least(1), "() for sample.num_steps, or a tuple of integers >= 1"), "values of T"
    ),
    "eval.v": Field(
        (), distinct(number(0.0, 1.0), "() for sample.v, or a tuple of numbers in [0, 1]"), "values of sample.v"
    ),
    "eval.intervals": Field((), INTERVALS, "values of sample.interval"),
    "eval.num_samples": Field(50_000, at_least(4), "images per cell of the sweep"),
    "eval.labels": Field("balanced", one_of("balanced", "random"), "classes of the images: in turn, or drawn"),
    "eval.seed": Field(1000, SEED, "seed of the images"),
    "eval.features": Field("classifier", one_of("classifier", "inception"), "feature network of the metrics"),
    "eval.inception_path": Field("", TEXT, "file that `python -m cfd.convert inception` wrote"),
    "eval.reference": Field("", TEXT, ".npz of OpenAI's evaluator; '': the training split"),
    "eval.test_split": Field("test", TEXT, "held-out split on which the feature classifier is tested"),
    "eval.classifier_steps": Field(4000, at_least(1), "training steps of the feature classifier"),
    "xla.compilation_cache": Field("", TEXT, "folder of compiled programs that later starts use again; '': none"),
}

DEFAULTS: dict[str, Any] = {name: field.default for name, field in FIELDS.items()}
BEFORE: dict[str, Any] = {
    name: field.default if field.before is None else field.before for name, field in FIELDS.items()
}
"""The value of each field in a run that is older than the field."""


def complete(config: ConfigDict) -> Config:
    """A locked copy of `config` in which every field that it leaves out has its default.

    Raises ValueError, naming the field, its value and what was expected, at the first field that is unknown or invalid.
    Fields that follow from the data may still be 0; see `with_classes`.
    """
    whole = with_defaults(config)
    for name, value in _leaves(whole, ""):
        if not accepts(FIELDS[name].check, value):
            raise UserError(f"config.{name} is {value!r}; expected {FIELDS[name].check.words}")
    _check_together(whole)
    return whole.lock()


def with_defaults(config: ConfigDict) -> Config:
    """A copy of `config` with the missing fields added. Raises ValueError for an unknown field and checks no value."""
    stated = dict(_leaves(config, ""))
    for name in stated:
        check_name(name)
    whole: Config = ConfigDict()
    for name, value in (DEFAULTS | stated).items():
        group, _, field = name.rpartition(".")
        if group and group not in whole:
            whole[group] = ConfigDict()
        (whole[group] if group else whole)[field] = value
    return whole


def with_classes(config: Config, num_classes: int) -> Config:
    """A copy of a complete config in which all that follows from the data is filled in, for data of `num_classes`.

    These fields are data.num_classes, model.num_classes, classifier.num_classes and model.out_channels. Raises
    ValueError if the config states another number, or asks for a class that the data does not have.
    """
    filled: Config = ConfigDict(config.to_dict())
    for group in ("data", "model", "classifier"):
        filled[group].num_classes = config[group].num_classes or num_classes
    filled.model.out_channels = config.model.out_channels or config.data.channels
    _check_classes(filled, num_classes, "the number of classes of the data")
    return filled.lock()


def as_recorded(config: Config, recorded: Mapping[str, Any]) -> Config:
    """A copy of a complete config for a run whose config.json holds the fields `recorded`, by full name.

    Fields that the run does not record are younger than it. They take the value of BEFORE.
    """
    old: Config = ConfigDict(config.to_dict())
    for name, value in _leaves(config, ""):
        if name not in recorded and value != BEFORE[name]:
            group, _, field = name.rpartition(".")
            (old[group] if group else old)[field] = BEFORE[name]
    return old.lock()


def listing(config: Config) -> str:
    """The whole config as text, in the order of the table, with a blank line between groups.

    Each line has a field, its value, its meaning, the names to choose from, and the default if the value differs.
    """
    values, lines, group = dict(_leaves(config, "")), [], ""
    for name, field in FIELDS.items():
        if name.rpartition(".")[0] != group:
            group = name.rpartition(".")[0]
            lines.append("")
        choices = f"; {field.check.words}" if field.check.type is str and field.check is not TEXT else ""
        default = "" if values[name] == field.default else f" (default {field.default!r})"
        lines.append(f"{f'{name} = {values[name]!r}':<48}  # {field.meaning}{choices}{default}")
    return "\n".join(lines)


def check_name(name: str) -> None:
    """Raises ValueError, with the names to choose from, unless `name`, such as "train.num_steps", is a field."""
    if any(field.startswith(f"{name}.") for field in FIELDS):
        raise UserError(f"config.{name} is a group, not a field; the group has {_siblings(f'{name}.')}")
    if name not in FIELDS:
        raise UserError(f"config.{name} is not a field; the group has {_siblings(name)}")


def _check_together(config: Config) -> None:
    """Raises ValueError if fields contradict each other."""
    data, sample, train = config.data, config.sample, config.train
    for group in ("model", "classifier"):
        _check_network(group, config[group], data.image_size)
    if config.model.out_channels not in (0, data.channels):
        raise UserError(
            f"config.model.out_channels is {config.model.out_channels}, data.channels {data.channels}: "
            "set both to the same number, or leave model.out_channels out"
        )
    if config.process.logsnr_min >= config.process.logsnr_max:
        raise UserError(
            f"config.process.logsnr_min is {config.process.logsnr_min}; "
            f"it must be below logsnr_max, {config.process.logsnr_max}"
        )
    for group in ("train", "classifier_train"):
        if config[group].batch_size % train.num_microbatches:
            raise UserError(
                f"config.{group}.batch_size is {config[group].batch_size}, "
                f"which num_microbatches {train.num_microbatches} does not divide: make it a multiple"
            )
    if sample.sampler != "ancestral" and config.eval.v:
        raise UserError(
            f"config.eval.v is {config.eval.v}, but sample.sampler {sample.sampler!r} has no v: set eval.v to ()"
        )
    if data.num_classes:
        _check_classes(config, data.num_classes, "data.num_classes")
    if config.eval.features == "inception":
        if not config.eval.inception_path:
            raise UserError(
                "config.eval.features is 'inception' without eval.inception_path; "
                "make the file with `python -m cfd.convert inception FILE OUT`"
            )
        if data.channels != 3:
            raise UserError(
                f"config.eval.features is 'inception', which takes RGB, and data.channels is {data.channels}: "
                "set eval.features to 'classifier', or data.channels to 3"
            )


def _check_network(group: str, net: Config, image_size: int) -> None:
    """Raises ValueError if the fields of a network contradict each other or the size of the images."""
    if (net.head_channels > 0) == (net.num_heads > 0):
        raise UserError(
            f"config.{group}.head_channels is {net.head_channels} and num_heads {net.num_heads}: "
            "give one of them, and 0 for the other"
        )
    levels = [image_size // 2**i for i in range(len(net.channel_mult))]
    if set(net.attention_resolutions) - set(levels):
        raise UserError(
            f"config.{group}.attention_resolutions is {net.attention_resolutions}; the network works at {levels}: "
            "choose among these"
        )
    mults = [m for m, size in zip(net.channel_mult, levels, strict=True) if size in net.attention_resolutions]
    # The last level's channels are those of the middle block, which always has attention.
    for channels in (net.base_channels * m for m in (*mults, net.channel_mult[-1])):
        if channels % (net.head_channels or net.num_heads):
            raise UserError(
                f"config.{group}.head_channels is {net.head_channels} and num_heads {net.num_heads}; an attention "
                f"layer has {channels} channels: give a divisor"
            )
    factor = 2 ** (len(net.channel_mult) - 1)
    if image_size % factor:
        raise UserError(
            f"config.data.image_size is {image_size}; {len(net.channel_mult)} levels of {group}.channel_mult "
            f"need a multiple of {factor}"
        )


def _check_classes(config: Config, num_classes: int, source: str) -> None:
    """Raises ValueError unless the fields about classes agree with `num_classes`, which `source` gives."""
    for group in ("data", "model", "classifier"):
        if config[group].num_classes not in (0, num_classes):
            raise UserError(
                f"config.{group}.num_classes is {config[group].num_classes}, and {source} is {num_classes}: set both "
                f"to the same number, or leave {group}.num_classes out"
            )
    for label in config.sample.classes:
        if label >= num_classes:
            raise UserError(f"config.sample.classes has {label}; classes are 0 to {num_classes - 1}")


def _leaves(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The (full name, value) of every field of a config."""
    for name, value in group.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _siblings(name: str) -> str:
    group = name.rpartition(".")[0]
    known = [field.rpartition(".")[2] for field in FIELDS if field.rpartition(".")[0] == group]
    return ", ".join(known) or f"no group {group!r}; groups are {sorted({field.split('.')[0] for field in FIELDS})}"
