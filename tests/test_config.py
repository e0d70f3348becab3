"""A config is completed by its defaults, and every bad field is refused by name, with its value and a remedy."""

import ast
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import ROOT, read_config, tiny_config

from cfd.checks import accepts
from cfd.config import as_recorded, check_name, complete, listing, with_classes, with_defaults
from cfd.fields import BEFORE, DEFAULTS, FIELDS
from cfd.runs.workdir import flatten

CONFIGS = sorted((ROOT / "configs").glob("*.py"))

BAD = [
    ("seed", -1),
    ("seed", 2**32),
    ("seed", 0.5),
    ("seed", True),
    ("data.source", "cifar"),
    ("data.image_size", 0),
    ("data.channels", 2),
    ("data.num_classes", -1),
    ("data.num_classes", 2.0),
    ("data.flip", 1),
    ("data.in_memory", 1),
    ("data.num_workers", -1),
    ("data.path", None),
    ("model.base_channels", 44),
    ("model.channel_mult", ()),
    ("model.channel_mult", (1, 0)),
    ("model.channel_mult", 2),
    ("model.dropout", 1.0),
    ("model.dropout", math.nan),
    ("model.dtype", "float16"),
    ("model.num_classes", -1),
    ("model.out_channels", -1),
    ("process.logsnr_min", -math.inf),
    ("process.logsnr_min", -100.0),
    ("process.logsnr_max", "20"),
    ("process.logsnr_max", 100.0),
    ("train.num_steps", 0),
    ("train.num_steps", None),
    ("train.num_steps", 10.0),
    ("train.batch_size", -128),
    ("train.p_uncond", -0.1),
    ("train.p_uncond", 1.5),
    ("train.p_uncond", math.nan),
    ("train.learning_rate", 0.0),
    ("train.learning_rate", math.inf),
    ("train.learning_rate", 1e39),
    ("train.sigmoid_bias", -1e39),
    ("sample.w", (1e39,)),
    ("sample.w", (10**400,)),
    ("eval.weights", (0.0, 1e39)),
    ("train.ema_decay", 1.0),
    ("train.grad_clip", 0.0),
    ("train.nonfinite_limit", 0),
    ("train.checkpoint_every_steps", 0),
    ("mesh.data", 0),
    ("mesh.data", -2),
    ("mesh.fsdp", -1),
    ("sample.step", -2),
    ("sample.num_steps", 0),
    ("sample.sampler", "heun"),
    ("sample.v", 1.01),
    ("sample.w", 1.0),
    ("sample.w", ()),
    ("sample.w", (0.0, -1.5)),
    ("sample.w", (math.nan,)),
    ("sample.w", (math.inf,)),
    ("sample.w", ((0.0, 1.0),)),
    ("sample.classes", (-1,)),
    ("sample.classes", (1.0,)),
    ("data.exif_orientation", 1),
    ("data.transparency", "pink"),
    ("data.max_pixels", 0),
    ("data.empty_classes", "no"),
    ("data.labels", None),
    ("sample.seeds", (2**32,)),
    ("sample.seeds", ()),
    ("eval.steps", (-1,)),
    ("eval.steps", (3, 3)),
    ("eval.weights", (0.0, "1")),
    ("eval.weights", (0.0, 1.0, 1)),
    ("eval.num_samples", 0),
    ("eval.seed", -3),
    ("eval.features", "vgg"),
    ("xla.compilation_cache", None),
]


def unlocked() -> Any:
    """A tiny config that a test may change."""
    return tiny_config().copy_and_resolve_references().unlock()


def changed(name: str, value: Any) -> Any:
    """The tiny config with one field changed, also to a value that ConfigDict itself might refuse."""
    config = unlocked()
    group, _, field = name.rpartition(".")
    with config.ignore_type():
        (config[group] if group else config)[field] = value
    return config


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        complete(changed(name, value))
    message = str(error.value)
    assert message.startswith(f"config.{name} is {value!r}; expected ") and "\n" not in message


@pytest.mark.parametrize("name", ["train.num_steps", "eval.num_samples", "sample.num_steps", "train.watchdog_seconds"])
def test_a_count_is_an_int32(name: str) -> None:
    complete(changed(name, 2**31 - 1))
    with pytest.raises(ValueError, match=rf"config\.{name} is 2147483648; expected an integer >= \d and < 2\^31"):
        complete(changed(name, 2**31))


@pytest.mark.parametrize(
    "name",
    ["data.path", "data.labels", "eval.reference", "eval.inception_path", "eval.dinov2_path", "xla.compilation_cache"],
)
def test_a_path_may_be_the_url_of_a_bucket_and_no_other_url(name: str) -> None:
    for url in ("s3://b/x", "s3:/b/x", "http://h/x", "file:///x", "hdfs://h/x", "gs:/b/x", "/mnt/gs://b/x"):
        with pytest.raises(ValueError, match=rf"config\.{name} is '{url}'; expected a path, or a URL gs://BUCKET/NAME"):
            complete(changed(name, url))
    for path in ("gs://bucket/x", "", "/x", "~/x", "a:b/c", "./gs:/x"):
        complete(changed(name, path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.num_classes": 9}, ("model.num_classes is 9", "10", "the same")),
        ({"classifier.num_classes": 9}, ("classifier.num_classes is 9", "10", "the same")),
        ({"model.out_channels": 3}, ("model.out_channels is 3", "set model.out_channels to 1,")),
        ({"model.num_heads": 4}, ("num_heads 4", "head_channels is 32", "0 for the other")),
        ({"model.head_channels": 0}, ("head_channels is 0", "give one of them")),
        ({"model.head_channels": 48}, ("model.head_channels is 48", "an attention layer has 32 channels", "divisor")),
        ({"classifier.head_channels": 0, "classifier.num_heads": 5}, ("num_heads 5", "channels: give a divisor")),
        ({"data.image_size": 9, "model.channel_mult": (1, 2)}, ("image_size is 9", "multiple of 2")),
        ({"classifier.channel_mult": (1,) * 5}, ("image_size is 8", "classifier.channel_mult", "multiple of 16")),
        ({"model.channel_mult": (1.5,)}, ("channel_mult is (1.5,)", "base_channels 32", "[48.0] channels", "of 32")),
        ({"model.attention_resolutions": (4,)}, ("model.attention_resolutions is (4,)", "works at [8]")),
        ({"process.logsnr_min": 20.0}, ("logsnr_min is 20.0", "below logsnr_max")),
        ({"train.num_microbatches": 3}, ("batch_size is 16", "3", "multiple")),
        ({"classifier_train.batch_size": 9, "train.num_microbatches": 2}, ("classifier_train.batch_size is 9", "2")),
        ({"sample.interval": (1.0,)}, ("interval is (1.0,)", "(logsnr_lo, logsnr_hi)")),
        ({"sample.interval": (5.0, -5.0)}, ("interval is (5.0, -5.0)", "lo <= hi")),
        ({"sample.sampler": "ddim", "eval.v": (0.3,)}, ("eval.v is (0.3,)", "'ddim' has no v")),
        ({"sample.classes": (3, 10)}, ("sample.classes has 10", "0 to 9")),
        ({"eval.features": "inception"}, ("inception_path", "cfd.convert")),
        ({"eval.features": "dinov2"}, ("eval.dinov2_path", "`python -m cfd.convert dinov2 FILE OUT`")),
        ({"eval.features": "dinov2", "eval.dinov2_path": "a.npz"}, ("'dinov2', which takes RGB", "data.channels is 1")),
        ({"eval.features": "inception", "eval.inception_path": "a.npz"}, ("RGB", "data.channels is 1", "'classifier'")),
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    config = unlocked()
    for name, value in changes.items():
        group, _, field = name.rpartition(".")
        config[group][field] = value
    with pytest.raises(ValueError) as error:
        complete(config)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("network", "name", "value", "having"),
    [
        ("adm", "depth", 3, "'transformer'"),
        ("mp", "depth", 3, "'transformer'"),
        ("mp", "resblock_updown", False, "'adm' or 'transformer'"),
        ("transformer", "label_from", 0, "'adm'"),
    ],
)
def test_a_field_that_a_network_lacks_is_refused_with_the_networks_that_have_it(
    network: str, name: str, value: Any, having: str
) -> None:
    """The remedy is followed, with each of these networks."""
    config = unlocked()
    config.model.network, config.model[name] = network, value
    words = rf"config\.model\.{name} is {value}, .* {network!r} does not have: .* or set model\.network to {having}$"
    with pytest.raises(ValueError, match=words):
        complete(config)
    for other in having.replace("'", "").split(" or "):
        config.model.network = other
        complete(config)


def test_an_unknown_field_or_group_is_named_with_its_neighbours() -> None:
    for group, field in (("train", "lr"), ("model", "width")):
        config = unlocked()
        config[group][field] = 1
        with pytest.raises(ValueError, match=rf"config\.{group}\.{field} is not a field; the group has .*, "):
            complete(config)
    config = unlocked()
    config.trian = dict(num_steps=1)
    with pytest.raises(ValueError, match=r"config\.trian\.num_steps is not a field; there is no group 'trian', and "):
        complete(config)
    with pytest.raises(ValueError, match=r"config\.batch is not a field; the group has seed"):
        complete(ConfigDict(dict(batch=1)))


@pytest.mark.parametrize(
    "name, meant",
    [
        ("trian.num_steps", ["train.num_steps"]),
        ("train.num_stepz", ["train.num_steps"]),
        ("batch_size", ["train.batch_size", "sample.batch_size"]),
        ("sed", ["seed"]),
        ("train.nothing_like_it", []),
    ],
)
def test_the_field_that_a_wrong_name_means_is_suggested(name: str, meant: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        check_name(name)
    _, _, suggested = str(refusal.value).partition(" (did you mean ")
    assert all(f"config.{field}" in suggested for field in meant) and bool(suggested) == bool(meant)


@pytest.mark.parametrize("value", [3, None, "100"])
def test_a_value_in_the_place_of_a_group_is_refused(value: Any) -> None:
    for config in (changed("train", value), ConfigDict(dict(train=value))):
        with pytest.raises(ValueError, match=r"config\.train is a group, not a field; the group has num_steps, "):
            complete(config)
    with pytest.raises(ValueError, match=r"config\.train\.num_steps\.more is not a field"):
        complete(ConfigDict(dict(train=dict(num_steps=dict(more=1)))))


def test_every_default_satisfies_its_own_condition_and_every_field_has_a_meaning() -> None:
    for name, field in FIELDS.items():
        assert accepts(field.check, field.default), name
        assert type(field.default) is field.check.type, name
        assert field.meaning and field.check.words, name
        check_name(name)
    assert {name: field.default for name, field in FIELDS.items()} == DEFAULTS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_completed_by_the_defaults_alone(path: Path) -> None:
    stated = flatten(read_config(path).to_dict())
    config = complete(read_config(path))
    assert flatten(config.to_dict()) == DEFAULTS | stated
    assert stated.keys() < DEFAULTS.keys()
    assert with_defaults(read_config(path)).to_dict() == config.to_dict()


def test_completing_a_whole_config_changes_nothing() -> None:
    config = tiny_config()
    assert flatten(config.to_dict()).keys() == DEFAULTS.keys()
    for again in (complete(config), with_classes(config, 10), complete(complete(config))):
        assert again.to_dict() == config.to_dict()
    assert complete(ConfigDict(config.to_dict())).to_dict() == config.to_dict()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_leaving_out_a_field_or_stating_its_default_is_the_same(path: Path) -> None:
    """A config that states every field names the same run as one that states only what differs."""
    whole = complete(read_config(path))
    only_differences: dict[str, Any] = {}
    for name, value in flatten(whole.to_dict()).items():
        if value != DEFAULTS[name]:
            group, _, field = name.rpartition(".")
            only_differences.setdefault(group, {})[field] = value
    assert complete(ConfigDict(only_differences)).to_dict() == whole.to_dict()


def test_a_complete_config_is_a_locked_copy() -> None:
    stated: Any = ConfigDict(dict(train=dict(num_steps=3)))
    config = complete(stated)
    assert stated.to_dict() == dict(train=dict(num_steps=3))
    for group in (config, config.train):
        with pytest.raises(AttributeError):
            group.lr = 1
    stated.train.num_steps = 4
    assert config.train.num_steps == 3


@pytest.mark.parametrize("stated", [(), ("data",), ("model",), ("data", "model", "classifier")])
def test_the_number_of_classes_and_channels_follow_from_the_data(stated: tuple[str, ...]) -> None:
    config = complete(ConfigDict({group: dict(num_classes=7) for group in stated} | {"sample": dict(classes=(0, 6))}))
    before = config.to_dict()
    filled = with_classes(config, 7)
    assert [filled[group].num_classes for group in ("data", "model", "classifier")] == [7, 7, 7]
    assert filled.model.out_channels == filled.data.channels == 3
    assert config.to_dict() == before
    followed = {f"{group}.num_classes" for group in ("data", "model", "classifier")} | {"model.out_channels"}
    rest = [
        {name: value for name, value in flatten(whole.to_dict()).items() if name not in followed}
        for whole in (filled, config)
    ]
    assert rest[0] == rest[1]
    with pytest.raises(AttributeError):
        filled.train.lr = 1


@pytest.mark.parametrize("group", ["data", "model", "classifier"])
def test_another_number_of_classes_than_that_of_the_data_is_refused(group: str) -> None:
    config = complete(ConfigDict({group: dict(num_classes=7)}))
    words = rf"config\.{group}\.num_classes is 7, and the number of classes of the data is 8: set all .* leave "
    with pytest.raises(ValueError, match=words):
        with_classes(config, 8)


def test_a_class_that_the_data_does_not_have_is_refused() -> None:
    config = complete(ConfigDict(dict(sample=dict(classes=(3, 8)))))
    assert with_classes(config, 9).sample.classes == (3, 8)
    with pytest.raises(ValueError, match=r"config\.sample\.classes has 8; classes are 0 to 7"):
        with_classes(config, 8)


def test_values_at_the_edges_are_accepted() -> None:
    for name, value in (
        ("seed", 2**32 - 1),
        ("data.num_classes", 0),
        ("model.num_classes", 0),
        ("model.out_channels", 0),
        ("train.p_uncond", 0),
        ("train.p_uncond", 1.0),
        ("train.warmup_steps", 0),
        ("train.num_steps", 1),
        ("model.channel_mult", (2.0,)),
        ("sample.w", (-1, 0, 4.0)),
        ("sample.v", 0),
        ("sample.num_steps", 1),
        ("sample.interval", (-3.0, 3.0)),
        ("eval.weights", ()),
        ("mesh.data", -1),
    ):
        complete(changed(name, value))
    with pytest.raises(ValueError):  # a NumPy number would not survive config.json
        complete(changed("train.num_steps", np.int64(5)))


def test_all_wrong_numbers_of_classes_are_named_at_once() -> None:
    config = complete(ConfigDict({group: dict(num_classes=10) for group in ("data", "model", "classifier")}))
    words = r"config\.data\.num_classes is 10, config\.model\.num_classes is 10, config\.classifier\.num_classes is 10"
    with pytest.raises(ValueError, match=rf"{words}, and the number of classes of the data is 2: .* or leave them out"):
        with_classes(config, 2)


def test_a_field_that_is_younger_than_a_run_keeps_its_old_meaning_unless_the_config_states_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BEFORE, "sample.v", 0.5)
    recorded = [name for name in flatten(tiny_config().to_dict()) if name not in ("sample.v", "sample.step")]
    old = as_recorded(tiny_config(), dict.fromkeys(recorded))
    assert (old.sample.v, old.sample.step) == (0.5, -1)
    stated = as_recorded(tiny_config(sample__v=0.9, sample__step=3), dict.fromkeys(recorded))
    assert (stated.sample.v, stated.sample.step) == (0.9, 3)


def test_the_listing_has_a_line_per_field_with_its_value_meaning_and_default() -> None:
    config = tiny_config(train__learning_rate=0.5, data__path="a folder # of images", sample__sampler="ddim")
    values = flatten(config.to_dict())
    lines = listing(config).splitlines()
    assert [line.split(" = ")[0] for line in lines if line] == list(FIELDS)
    assert lines.count("") == len(config) - 1, "a blank line between groups"
    for line in filter(None, lines):
        name, _, rest = line.partition(" = ")
        value, _, comment = rest.rpartition("  # ")
        assert ast.literal_eval(value.strip()) == values[name]
        default = FIELDS[name].default
        assert comment.startswith(FIELDS[name].meaning)
        assert comment.endswith(f" (default {default!r})") == (values[name] != default)
    assert "one of ancestral, ddim, dpm_solver, sde_dpm_solver (default 'ancestral')" in listing(config)
