"""What a config may say: every field of every group with its type and range, checked before anything is compiled."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from ml_collections import ConfigDict

Config: TypeAlias = Any
"""A ConfigDict whose fields have the types that FIELDS gives, once it is validated."""


class Field(NamedTuple):
    """The type of a field, what it must satisfy, and that in words."""

    type: type
    holds: Callable[[Any], bool]
    words: str


def at_least(low: int) -> Field:
    return Field(int, lambda x: x >= low, f"an integer >= {low}")


def number(low: float, high: float = math.inf, *, above: bool = False) -> Field:
    words = f"a number {'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
    return Field(float, lambda x: (x > low if above else x >= low) and x <= high and math.isfinite(x), words)


def one_of(*values: str) -> Field:
    return Field(str, lambda x: x in values, f"one of {', '.join(values)}")


def each(field: Field, words: str, *, empty: bool = True) -> Field:
    return Field(tuple, lambda x: (empty or len(x) > 0) and all(fits(field, item) for item in x), words)


def fits(field: Field, value: Any) -> bool:
    """Whether a value has the type (an int passes for a float, a bool for nothing else) and the range of a field."""
    types = (int, float) if field.type is float else (field.type,)
    return isinstance(value, types) and (field.type is bool or not isinstance(value, bool)) and field.holds(value)


def distinct(field: Field, words: str) -> Field:
    field = each(field, words)
    return field._replace(holds=lambda x: field.holds(x) and len(set(x)) == len(x), words=f"{words}, none twice")


def is_interval(value: Any) -> bool:
    """Whether a value is () or (logsnr_lo, logsnr_hi) with lo <= hi."""
    finite = isinstance(value, tuple) and all(fits(FINITE, end) for end in value)
    return finite and (value == () or (len(value) == 2 and value[0] <= value[1]))


SEED = Field(int, lambda x: 0 <= x < 2**32, "an integer in [0, 2^32), the seeds of JAX")
ANY = Field(str, lambda _: True, "a string")
BOOL = Field(bool, lambda _: True, "True or False")
WEIGHTS = "a tuple of guidance weights, each finite and >= -1 (w = -1 is the unconditional model)"
FINITE = Field(float, math.isfinite, "a finite number")
LOGSNR = Field(float, lambda x: -80 <= x <= 80, "a number in [-80, 80]")  # α or σ is 0 in float32 from ±88 on
INTERVAL = "() or (logsnr_lo, logsnr_hi) with lo <= hi"

NETWORK = {
    "base_channels": Field(int, lambda x: x > 0 and x % 32 == 0, "a multiple of 32, the number of norm groups"),
    "channel_mult": each(at_least(1), "a tuple of integers >= 1", empty=False),
    "num_res_blocks": at_least(1),
    "attention_resolutions": each(at_least(1), "a tuple of integers >= 1"),
    "head_channels": at_least(0),
    "num_heads": at_least(0),
    "resblock_updown": BOOL,
    "scale_shift_norm": BOOL,
    "dropout": Field(float, lambda x: 0 <= x < 1, "a probability in [0, 1)"),
    "dtype": one_of("float32", "bfloat16"),
    "remat": BOOL,
    "time": one_of("cosine", "adm_cosine", "adm_linear"),
}

FIELDS: dict[str, Field] = {
    "seed": SEED,
    "data.source": one_of("digits", "folder", "tfds"),
    "data.name": ANY,
    "data.split": ANY,
    "data.path": ANY,
    "data.image_size": at_least(1),
    "data.channels": Field(int, lambda x: x in (1, 3), "1 or 3"),
    "data.num_classes": at_least(1),
    "data.flip": BOOL,
    "data.on_bad_image": one_of("raise", "skip"),
    "data.in_memory": BOOL,
    "data.num_workers": at_least(0),
    "model.num_classes": at_least(0),
    "model.out_channels": at_least(1),
    **{f"model.{name}": field for name, field in NETWORK.items()},
    "process.logsnr_min": LOGSNR,
    "process.logsnr_max": LOGSNR,
    "train.num_steps": at_least(1),
    "train.batch_size": at_least(1),
    "train.p_uncond": number(0.0, 1.0),
    "train.learning_rate": number(0.0, above=True),
    "train.warmup_steps": at_least(0),
    "train.adam_b1": Field(float, lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "train.adam_b2": Field(float, lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "train.weight_decay": number(0.0),
    "train.grad_clip": number(0.0, above=True),
    "train.ema_decay": Field(float, lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "train.ema_warmup": BOOL,
    "train.num_microbatches": at_least(1),
    "train.nonfinite_limit": at_least(1),
    "train.checkpoint_every_steps": at_least(1),
    "train.keep_checkpoints": at_least(1),
    "train.log_every_steps": at_least(1),
    "train.sample_every_steps": at_least(0),
    "train.watchdog_seconds": at_least(0),
    "classifier.num_classes": at_least(1),
    **{f"classifier.{name}": field for name, field in NETWORK.items()},
    "classifier_train.num_steps": at_least(1),
    "classifier_train.batch_size": at_least(1),
    "classifier_train.learning_rate": number(0.0, above=True),
    "classifier_train.weight_decay": number(0.0),
    "mesh.data": Field(int, lambda x: x == -1 or x >= 1, "-1 (what fsdp leaves) or an integer >= 1"),
    "mesh.fsdp": at_least(1),
    "sample.num_steps": at_least(1),
    "sample.sampler": one_of("ancestral", "ddim", "dpm_solver"),
    "sample.v": number(0.0, 1.0),
    "sample.w": each(number(-1.0), WEIGHTS, empty=False),
    "sample.guidance": one_of("classifier-free", "classifier"),
    "sample.interval": Field(tuple, is_interval, INTERVAL),
    "sample.doubled": BOOL,
    "sample.clip": BOOL,
    "sample.classes": each(at_least(0), "a tuple of class numbers; () for the first ten"),
    "sample.seeds": each(SEED, "a tuple of integers in [0, 2^32), the seeds of JAX", empty=False),
    "sample.batch_size": at_least(1),
    "eval.weights": distinct(number(-1.0), WEIGHTS),
    "eval.num_steps": distinct(at_least(1), "() for sample.num_steps, or a tuple of integers >= 1"),
    "eval.v": distinct(number(0.0, 1.0), "() for sample.v, or a tuple of numbers in [0, 1]"),
    "eval.intervals": distinct(
        Field(tuple, is_interval, INTERVAL), f"() for sample.interval, or a tuple of intervals, each {INTERVAL}"
    ),
    "eval.num_samples": at_least(4),
    "eval.labels": one_of("balanced", "random"),
    "eval.seed": SEED,
    "eval.features": one_of("classifier", "inception"),
    "eval.inception_path": ANY,
    "eval.reference": ANY,
    "eval.test_split": ANY,
    "eval.classifier_steps": at_least(1),
    "xla.compilation_cache": ANY,
}


CONVENTIONS = {
    "w": "the paper's weight: eps = (1 + w) eps(z, c) - w eps(z); w = 0 is conditional, w = -1 unconditional",
    "labels": "int32, 0 to num_classes - 1 in the order of class_names; -1 is the null label",
    "logsnr": "z = alpha x + sigma eps, alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr)",
    "images": "float32 [B, H, W, C] in [-1, 1]; uint8 is round((clip(x) + 1) * 127.5)",
}


def describe(kind: str, config: Config, class_names: Sequence[str]) -> dict[str, Any]:
    """The content of a run's config.json; `kind` says what the network is, "diffusion" or "classifier"."""
    return dict(kind=kind, config=config.to_dict(), class_names=list(class_names), conventions=CONVENTIONS)


def validate(config: Config) -> None:
    """Raises ValueError, naming the field, its value and what was expected, at the first that does not hold."""
    values = dict(_leaves(config, ""))
    for name in FIELDS.keys() - values.keys():
        raise ValueError(f"config.{name} is missing; every field is written out: add it as {FIELDS[name].words}")
    for name in values:
        check_name(name)
    for name, field in FIELDS.items():
        if not fits(field, values[name]):
            raise ValueError(f"config.{name} is {values[name]!r}; expected {field.words}")
    _validate_together(config)


def check_name(name: str) -> None:
    """Raises ValueError, with the names to choose from, unless `name`, such as "train.num_steps", is a field."""
    if name not in FIELDS:
        raise ValueError(f"config.{name} is not a field; the group has {_siblings(name)}")


def _validate_together(config: Config) -> None:
    """The conditions that join two fields."""
    data, model, sample, train = config.data, config.model, config.sample, config.train
    for group, net in (("model", model), ("classifier", config.classifier)):
        if net.num_classes != data.num_classes:
            raise ValueError(
                f"config.{group}.num_classes is {net.num_classes}, data.num_classes {data.num_classes}: "
                "set both the same"
            )
        if (net.head_channels > 0) == (net.num_heads > 0):
            raise ValueError(
                f"config.{group}.head_channels is {net.head_channels} and num_heads {net.num_heads}: "
                "give one of them, and 0 for the other"
            )
        levels = [data.image_size // 2**i for i in range(len(net.channel_mult))]
        if set(net.attention_resolutions) - set(levels):
            raise ValueError(
                f"config.{group}.attention_resolutions is {net.attention_resolutions}; the network works at {levels}: "
                "choose of these"
            )
        mults = [m for m, size in zip(net.channel_mult, levels, strict=True) if size in net.attention_resolutions]
        for channels in (net.base_channels * m for m in (*mults, net.channel_mult[-1])):  # the last: of the middle
            if channels % (net.head_channels or net.num_heads):
                raise ValueError(
                    f"config.{group}.head_channels is {net.head_channels} and num_heads {net.num_heads}; an attention "
                    f"layer has {channels} channels: give a divisor"
                )
        factor = 2 ** (len(net.channel_mult) - 1)
        if data.image_size % factor:
            raise ValueError(
                f"config.data.image_size is {data.image_size}; {len(net.channel_mult)} levels of {group}.channel_mult "
                f"need a multiple of {factor}"
            )
    if model.out_channels != data.channels:
        raise ValueError(
            f"config.model.out_channels is {model.out_channels}, data.channels {data.channels}: set both the same"
        )
    if config.process.logsnr_min >= config.process.logsnr_max:
        raise ValueError(
            f"config.process.logsnr_min is {config.process.logsnr_min}; "
            f"it must be below logsnr_max, {config.process.logsnr_max}"
        )
    for group in ("train", "classifier_train"):
        if config[group].batch_size % train.num_microbatches:
            raise ValueError(
                f"config.{group}.batch_size is {config[group].batch_size}, "
                f"which num_microbatches {train.num_microbatches} does not divide: make it a multiple"
            )
    if sample.sampler != "ancestral" and config.eval.v:
        raise ValueError(
            f"config.eval.v is {config.eval.v}, but sample.sampler {sample.sampler!r} has no v: set eval.v to ()"
        )
    for label in sample.classes:
        if label >= data.num_classes:
            raise ValueError(f"config.sample.classes has {label}; classes are 0 to {data.num_classes - 1}")
    if config.eval.features == "inception":
        if not config.eval.inception_path:
            raise ValueError(
                "config.eval.features is 'inception' without eval.inception_path; "
                "make the file with `python -m cfd.convert inception FILE OUT`"
            )
        if data.channels != 3:
            raise ValueError(
                f"config.eval.features is 'inception', which takes RGB, and data.channels is {data.channels}: "
                "set eval.features to 'classifier', or data.channels and model.out_channels to 3"
            )


def _leaves(group: ConfigDict, prefix: str) -> list[tuple[str, Any]]:
    leaves = []
    for name, value in group.items():
        leaves += _leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [(prefix + name, value)]
    return leaves


def _siblings(name: str) -> str:
    group = name.rpartition(".")[0]
    known = [field.rpartition(".")[2] for field in FIELDS if field.rpartition(".")[0] == group]
    return ", ".join(known) or f"no group {group!r}; groups are {sorted({field.split('.')[0] for field in FIELDS})}"
