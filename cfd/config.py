"""A whole config from what an experiment states, checked, and text about it. `cfd.fields` is the table of all fields.

A config states what makes its experiment that experiment; `complete` adds the defaults of the table, and there are no
others. `python -m cfd.main --config=NAME --mode=config` prints the result.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from cfd import __version__
from cfd.checks import PATH, TEXT, accepts, has_type
from cfd.errors import RESTORE, CommandError, UserError
from cfd.fields import BEFORE, DEFAULTS, FIELDS, FOREIGN

Config: TypeAlias = Any
"""A ConfigDict that holds every field of FIELDS, with the types given there, once `complete` has returned it."""

ALWAYS_RECORDED = (
    *(f"data.{name}" for name in ("source", "image_size", "channels", "num_classes")),
    *(f"process.{name}" for name in ("logsnr_min", "logsnr_max")),
)
"""Fields that the config.json of every run records, also that of an imported network."""

GROUPS = tuple(dict.fromkeys(field.partition(".")[0] for field in FIELDS if "." in field))
"""The groups of a config, in the order in which they are shown."""


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
    outputs = config.data.channels * (2 if config.model.learn_variance else 1)
    filled.model.out_channels = config.model.out_channels or outputs
    _check_classes(filled, num_classes, "the number of classes of the data")
    return filled.lock()


def as_recorded(config: Config, recorded: Mapping[str, Any]) -> Config:
    """A copy of a complete config for a run whose config.json holds the fields `recorded`, by full name.

    Fields that `recorded` lacks are younger than the run. They take the value of BEFORE, unless the config states
    another value than the default.
    """
    old: Config = ConfigDict(config.to_dict())
    for name, value in _leaves(config, ""):
        if name not in recorded and value == DEFAULTS[name] != BEFORE[name]:
            group, _, field = name.rpartition(".")
            (old[group] if group else old)[field] = BEFORE[name]
    return old.lock()


def recorded_fields(file: str | os.PathLike[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, by full name, that the config.json `file` records, with tuples in place of the lists of JSON.

    It may lack fields that are younger than the run, or that an imported network does not have. Raises ValueError, with
    the file, for a field that this version does not have, for a value of another type than the field's, and if one of
    ALWAYS_RECORDED is missing.
    """
    values = {name: as_tuples(value) for name, value in fields.items()}
    if unknown := [name for name in values if name not in FIELDS and name not in GROUPS]:
        raise UserError(
            f"{os.fspath(file)} has the field {unknown[0]}, which this version of cfd, {__version__}, does not have: "
            "use the version that wrote it, which is a later one"
        )
    wrong = [
        f"{name} = {value!r}"
        for name, value in values.items()
        if name not in FIELDS or not has_type(FIELDS[name].check, value)
    ]
    if wrong or (wrong := [f"no {name}" for name in ALWAYS_RECORDED if name not in values]):
        raise UserError(f"{os.fspath(file)} is damaged, because it has {wrong[0]}: {RESTORE}")
    return values


def as_tuples(value: Any) -> Any:
    """A value of JSON with tuples in place of lists."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def listing(config: Config) -> str:
    """The whole config as text, in the order of the table, with a blank line between groups.

    Each line has a field, its value, its meaning, the names to choose from, and the default if the value differs.
    """
    values, lines, group = dict(_leaves(config, "")), [], ""
    for name, field in FIELDS.items():
        if name.rpartition(".")[0] != group:
            group = name.rpartition(".")[0]
            lines.append("")
        choices = f"; {field.check.words}" if field.check.type is str and field.check not in (TEXT, PATH) else ""
        default = "" if values[name] == field.default else f" (default {field.default!r})"
        lines.append(f"{f'{name} = {values[name]!r}':<48}  # {field.meaning}{choices}{default}")
    return "\n".join(lines)


def check_name(name: str) -> None:
    """Raises ValueError, with the names to choose from, unless `name`, such as "train.num_steps", is a field."""
    if any(field.startswith(f"{name}.") for field in FIELDS):
        raise CommandError(f"config.{name} is a group, not a field; {_siblings(f'{name}.')}")
    if name not in FIELDS:
        raise CommandError(f"config.{name} is not a field; {_siblings(name)}{_meant(name)}")


def _check_together(config: Config) -> None:
    """Raises ValueError if fields contradict each other."""
    data, sample, train = config.data, config.sample, config.train
    for group in ("model", "classifier"):
        _check_network(group, config[group], data.image_size)
    for group in ("model", "model_guide"):
        _check_foreign(group, config[group])
    _check_outputs(config)
    for name, value in (("model.predict", config.model.predict), ("train.weight", train.weight)):
        if value == "mean" and not config.model.time.startswith("adm_"):
            raise UserError(
                f"config.{name} is 'mean', the mean of a step in a table of levels, and model.time is "
                f"{config.model.time!r}, which has no table: set model.time to 'adm_linear', DDPM's, or to 'adm_cosine'"
            )
    if train.sigmoid_bias and train.weight != "sigmoid":
        raise UserError(
            f"config.train.sigmoid_bias is {train.sigmoid_bias:g}, and train.weight {train.weight!r} has no bias: set "
            "train.weight to 'sigmoid', or train.sigmoid_bias to 0.0"
        )
    if config.model.label_from >= (levels := len(config.model.channel_mult)):
        raise UserError(
            f"config.model.label_from is {config.model.label_from}, and model.channel_mult has {levels} levels: give "
            f"the number of one, from 0 to {levels - 1}, or -1 for a network that sees the class everywhere"
        )
    if sample.respacing and not sample.clean_end:
        raise UserError(
            f"config.sample.respacing is {sample.respacing!r}, a grid of its own, and sample.clean_end False: set "
            "sample.respacing to '', or sample.clean_end to True"
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
    guides = [guide for guide in (sample.guide, *config.eval.guides) if guide]
    if guides and sample.doubled:
        raise UserError(
            f"config.sample.doubled is True, and the guide {guides[0]!r} is another network, which cannot be evaluated "
            "in one batch with the run's own: set sample.doubled to False, or sample.guide and eval.guides to '' and ()"
        )
    by_classifier = sample.guidance != "classifier-free"
    if by_classifier and (others := [*guides, *filter(None, (sample.rule, *config.eval.rules))]):
        raise UserError(
            f"config.sample.guidance is {sample.guidance!r}, which has no second score for {others[0]!r}: set "
            "sample.guidance to 'classifier-free', or sample.rule and sample.guide to '', and eval.rules and "
            "eval.guides to ()"
        )
    _check_steps(config)
    features = config.eval.features
    if features in ("inception", "dinov2"):
        if not config.eval[f"{features}_path"]:
            raise UserError(
                f"config.eval.features is {features!r} without eval.{features}_path; "
                f"make the file with `python -m cfd.convert {features} FILE OUT`"
            )
        if data.channels != 3:
            raise UserError(
                f"config.eval.features is {features!r}, which takes RGB, and data.channels is {data.channels}: "
                "set eval.features to 'classifier', or data.channels to 3"
            )


def _check_outputs(config: Config) -> None:
    """Raises ValueError if the outputs of the network, its variance and its training contradict each other."""
    model, train, channels = config.model, config.train, config.data.channels
    both = model.learn_variance or model.time.startswith("adm_")  # an imported network may have kept its variance
    if model.out_channels not in (0, channels * (not model.learn_variance), 2 * channels * both):
        expected = 2 * channels if model.learn_variance else channels
        raise UserError(
            f"config.model.out_channels is {model.out_channels}, data.channels {channels} and model.learn_variance "
            f"{model.learn_variance}: set model.out_channels to {expected}, or leave it out"
        )
    contradicts = {
        "train.weight": train.weight != "eps",
        "train.low_discrepancy": train.low_discrepancy,
        "process.schedule": config.process.schedule == "learned",
    }
    if model.learn_variance and (name := next(filter(contradicts.get, contradicts), None)):
        group, _, field = name.partition(".")
        raise UserError(
            f"config.{name} is {config[group][field]!r}, and model.learn_variance trains ε unweighted at independent "
            f"levels: set {name} to {DEFAULTS[name]!r}, or model.learn_variance to False"
        )
    if config.sample.variance == "learned" and not model.learn_variance and model.out_channels != 2 * channels:
        raise UserError(
            "config.sample.variance is 'learned', and the network has no outputs for a variance: set sample.variance "
            "to 'fixed', train with model.learn_variance, or import with python -m cfd.convert adm --keep-variance"
        )


def _check_steps(config: Config) -> None:
    """Raises ValueError if the fields of `sample` about steps, variances and clipping contradict each other."""
    sample, evaluate = config.sample, config.eval
    for name, value in (("variance", "learned"), ("guidance", "classifier-mean")):
        if sample[name] == value and sample.sampler != "ancestral":
            raise UserError(
                f"config.sample.{name} is {value!r}, and sample.sampler {sample.sampler!r}, which has no variance of "
                f"its own: set sample.sampler to 'ancestral', or sample.{name} to {DEFAULTS[f'sample.{name}']!r}"
            )
    if sample.corrector and sample.guidance == "classifier-mean":
        raise UserError(
            f"config.sample.corrector is {sample.corrector:g}, and sample.guidance 'classifier-mean' guides the "
            "sampler alone, and not the corrector: set sample.guidance to 'classifier', or sample.corrector to 0.0"
        )
    if sample.variance == "learned" and evaluate.v:
        raise UserError(
            f"config.eval.v is {evaluate.v}, and sample.variance is 'learned', which takes v from the network: set "
            "eval.v to (), or sample.variance to 'fixed'"
        )
    if sample.respacing and (sample.schedule or evaluate.num_steps):
        name, value = ("sample.schedule", "") if sample.schedule else ("eval.num_steps", ())
        raise UserError(
            f"config.sample.respacing is {sample.respacing!r}, which is a whole grid: set {name} to {value!r}, or "
            "sample.respacing to ''"
        )
    if sample.clip_first and not (sample.clip and sample.guidance == "classifier"):
        raise UserError(
            f"config.sample.clip_first is True, with sample.clip {sample.clip} and sample.guidance "
            f"{sample.guidance!r}: it concerns clipping under 'classifier' alone ('classifier-mean' shifts after it "
            "always): set it to False, or the two to True and 'classifier'"
        )


def _check_network(group: str, net: Config, image_size: int) -> None:
    """Raises ValueError if the fields of a network contradict each other or the size of the images."""
    if (net.head_channels > 0) == (net.num_heads > 0):
        raise UserError(
            f"config.{group}.head_channels is {net.head_channels} and num_heads {net.num_heads}: "
            "give one of them, and 0 for the other"
        )
    if net.get("network") == "transformer":
        _check_transformer(group, net, image_size)
        return
    levels = [image_size // 2**i for i in range(len(net.channel_mult))]
    if set(net.attention_resolutions) - set(levels):
        raise UserError(
            f"config.{group}.attention_resolutions is {net.attention_resolutions}; the network works at {levels}: "
            "choose among these"
        )
    widths = [net.base_channels * m for m in net.channel_mult]
    multiple, why = (8, "") if net.get("network") == "mp" else (32, ", the number of norm groups")
    if any(width % multiple for width in widths):
        raise UserError(
            f"config.{group}.channel_mult is {net.channel_mult} and base_channels {net.base_channels}; levels have "
            f"{widths} channels: make all of them multiples of {multiple}{why}"
        )
    attended = [width for width, size in zip(widths, levels, strict=True) if size in net.attention_resolutions]
    # The last level's channels are those of the middle block, which always has attention.
    for channels in (*attended, widths[-1]):
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


def _check_transformer(group: str, net: Config, image_size: int) -> None:
    """Raises ValueError if the fields of a transformer contradict each other or the size of the images."""
    if image_size % net.patch_size:
        raise UserError(
            f"config.{group}.patch_size is {net.patch_size}, which does not divide data.image_size {image_size}: give "
            "a divisor"
        )
    width, heads = net.base_channels, net.num_heads or net.base_channels // net.head_channels
    if not heads or width % heads or (net.head_channels and width % net.head_channels) or width // heads % 4:
        raise UserError(
            f"config.{group}.head_channels is {net.head_channels} and num_heads {net.num_heads}; a token has {width} "
            "channels (base_channels): give a divisor, with a multiple of 4 channels in each head"
        )


def _check_foreign(group: str, net: Config) -> None:
    """Raises ValueError if a field that the network does not have is set to another value than its default."""
    if other := [name for name in FOREIGN[net.network] if net[name] != DEFAULTS[f"model.{name}"]]:
        default = DEFAULTS[f"model.{other[0]}"]
        having = " or ".join(repr(network) for network, foreign in FOREIGN.items() if other[0] not in foreign)
        raise UserError(
            f"config.{group}.{other[0]} is {net[other[0]]!r}, which the network {net.network!r} does not have: leave "
            f"it at {default!r}, or set {group}.network to {having}"
        )


def _check_classes(config: Config, num_classes: int, source: str) -> None:
    """Raises ValueError unless the fields about classes agree with `num_classes`, which `source` gives."""
    stated = {f"config.{group}.num_classes": config[group].num_classes for group in ("data", "model", "classifier")}
    if wrong := {name: number for name, number in stated.items() if number not in (0, num_classes)}:
        raise UserError(
            f"{', '.join(f'{name} is {number}' for name, number in wrong.items())}, and {source} is {num_classes}: set "
            "all of them to the same number, or leave them out"
        )
    for label in config.sample.classes if num_classes else ():
        if isinstance(label, int) and label >= num_classes:
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
    if known := [field.rpartition(".")[2] for field in FIELDS if field.rpartition(".")[0] == group]:
        return f"the group has {', '.join(known)}"
    return f"there is no group {group!r}, and the groups are {', '.join(GROUPS)}"


def _meant(name: str) -> str:
    """A question with the fields that have the name in another group, or a name like it; "" if there are none."""
    elsewhere = [field for field in FIELDS if field.rpartition(".")[2] == name.rpartition(".")[2]]
    like = difflib.get_close_matches(name, elsewhere or FIELDS, n=3, cutoff=0 if elsewhere else 0.8)
    return f" (did you mean {' or '.join(f'config.{field}' for field in like)}?)" if like else ""
