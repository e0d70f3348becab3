"""Every bad field is refused by name, with its value and what was expected; every config of configs/ is accepted."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import FIELDS, ROOT, read_config, tiny_config

from cfd import config as cfd_config
from cfd.config import describe, validate

CONFIGS = sorted((ROOT / "configs").glob("*.py"))

BAD = [
    ("seed", -1),
    ("seed", 2**32),
    ("seed", 0.5),
    ("seed", True),
    ("data.source", "cifar"),
    ("data.image_size", 0),
    ("data.channels", 2),
    ("data.num_classes", 0),
    ("data.flip", 1),
    ("data.in_memory", 1),
    ("data.num_workers", -1),
    ("data.path", None),
    ("model.base_channels", 48),
    ("model.channel_mult", ()),
    ("model.channel_mult", (1, 0)),
    ("model.channel_mult", 2),
    ("model.dropout", 1.0),
    ("model.dropout", math.nan),
    ("model.dtype", "float16"),
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
    ("train.ema_decay", 1.0),
    ("train.grad_clip", 0.0),
    ("train.nonfinite_limit", 0),
    ("train.checkpoint_every_steps", 0),
    ("mesh.data", 0),
    ("mesh.data", -2),
    ("mesh.fsdp", -1),
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
    ("sample.seeds", (2**32,)),
    ("sample.seeds", ()),
    ("eval.weights", (0.0, "1")),
    ("eval.weights", (0.0, 1.0, 1)),
    ("eval.num_samples", 0),
    ("eval.seed", -3),
    ("eval.features", "vgg"),
    ("xla.compilation_cache", None),
]


def changed(name: str, value: Any) -> Any:
    """The tiny config with one field that holds what ConfigDict itself might refuse."""
    config = tiny_config().copy_and_resolve_references().unlock()
    group, _, field = name.rpartition(".")
    with config.ignore_type():
        (config[group] if group else config)[field] = value
    return config


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        validate(changed(name, value))
    message = str(error.value)
    assert message.startswith(f"config.{name} is {value!r}; expected ") and "\n" not in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.num_classes": 9}, ("model.num_classes is 9", "10", "the same")),
        ({"classifier.num_classes": 9}, ("classifier.num_classes is 9", "10", "the same")),
        ({"model.out_channels": 3}, ("model.out_channels is 3", "1", "the same")),
        ({"model.num_heads": 4}, ("num_heads 4", "head_channels is 32", "0 for the other")),
        ({"model.head_channels": 0}, ("head_channels is 0", "give one of them")),
        ({"model.head_channels": 48}, ("model.head_channels is 48", "an attention layer has 32 channels", "divisor")),
        ({"classifier.head_channels": 0, "classifier.num_heads": 5}, ("num_heads 5", "channels: give a divisor")),
        ({"data.image_size": 9, "model.channel_mult": (1, 2)}, ("image_size is 9", "multiple of 2")),
        ({"classifier.channel_mult": (1,) * 5}, ("image_size is 8", "classifier.channel_mult", "multiple of 16")),
        ({"model.attention_resolutions": (4,)}, ("model.attention_resolutions is (4,)", "works at [8]")),
        ({"process.logsnr_min": 20.0}, ("logsnr_min is 20.0", "below logsnr_max")),
        ({"train.num_microbatches": 3}, ("batch_size is 16", "3", "multiple")),
        ({"classifier_train.batch_size": 9, "train.num_microbatches": 2}, ("classifier_train.batch_size is 9", "2")),
        ({"sample.interval": (1.0,)}, ("interval is (1.0,)", "(logsnr_lo, logsnr_hi)")),
        ({"sample.interval": (5.0, -5.0)}, ("interval is (5.0, -5.0)", "lo <= hi")),
        ({"sample.sampler": "ddim", "eval.v": (0.3,)}, ("eval.v is (0.3,)", "'ddim' has no v")),
        ({"sample.classes": (3, 10)}, ("sample.classes has 10", "0 to 9")),
        ({"eval.features": "inception"}, ("inception_path", "cfd.convert")),
        ({"eval.features": "inception", "eval.inception_path": "a.npz"}, ("RGB", "data.channels is 1", "'classifier'")),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    config = tiny_config().copy_and_resolve_references().unlock()
    for name, value in changes.items():
        group, _, field = name.rpartition(".")
        config[group][field] = value
    with pytest.raises(ValueError) as error:
        validate(config)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_and_missing_fields_are_named_with_their_neighbours() -> None:
    for group, field in (("train", "lr"), ("model", "depth")):
        config = tiny_config().copy_and_resolve_references().unlock()
        config[group][field] = 1
        with pytest.raises(ValueError, match=rf"config\.{group}\.{field} is not a field; the group has .*, "):
            validate(config)
    config = tiny_config().copy_and_resolve_references().unlock()
    del config.train.ema_decay
    with pytest.raises(ValueError, match=r"config\.train\.ema_decay is missing.*a number in \[0, 1\)"):
        validate(config)
    config = tiny_config().copy_and_resolve_references().unlock()
    config.trian = dict(num_steps=1)
    with pytest.raises(ValueError, match=r"config\.trian\.num_steps is not a field; .*no group 'trian'.*'train'"):
        validate(config)
    config = tiny_config().copy_and_resolve_references().unlock()
    with config.ignore_type():
        config.train = 3
    with pytest.raises(ValueError, match=r"config\.train"):
        validate(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_are_valid_and_write_out_every_field(path: Path) -> None:
    config = read_config(path)
    validate(config)
    assert {name for name, _ in cfd_config._leaves(config, "")} == cfd_config.FIELDS.keys()


def test_values_at_the_edges_are_accepted() -> None:
    for name, value in (
        ("seed", 2**32 - 1),
        ("train.p_uncond", 0),
        ("train.p_uncond", 1.0),
        ("train.warmup_steps", 0),
        ("train.num_steps", 1),
        ("sample.w", (-1, 0, 4.0)),
        ("sample.v", 0),
        ("sample.num_steps", 1),
        ("sample.interval", (-3.0, 3.0)),
        ("eval.weights", ()),
        ("mesh.data", -1),
    ):
        validate(changed(name, value))
    with pytest.raises(ValueError):  # a NumPy number would not survive config.json
        validate(changed("train.num_steps", np.int64(5)))


def test_the_tiny_config_is_valid_and_described_in_json() -> None:
    config = tiny_config()
    validate(config)
    content = describe("diffusion", config, ("a", "b"))
    assert content["kind"] == "diffusion" and content["class_names"] == ["a", "b"]
    assert content["config"]["train"]["num_steps"] == FIELDS["train.num_steps"]
    assert "unconditional" in content["conventions"]["w"]
