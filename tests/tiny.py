"""The digits config, reduced so that a run takes seconds."""

import importlib.util
from pathlib import Path
from typing import Any

from cfd.config import complete, with_classes, with_defaults

ROOT = Path(__file__).parents[1]
QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options that halve the compile time, for programs that run once."""
EMITTERS = {"xla_cpu_use_fusion_emitters": True}
"""Compiler options with which XLA:CPU fuses as it does for users, contrary to XLA_FLAGS in conftest.py."""
DEFAULTS = EMITTERS | {"xla_backend_optimization_level": 3}
"""Compiler options with which it does all that it does for users."""


def read_config(path: Path) -> Any:
    """The config of a file, as it stands there."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


FIELDS: dict[str, Any] = {
    "model.channel_mult": (1,),
    "model.attention_resolutions": (),
    "train.num_steps": 6,
    "train.batch_size": 16,
    "train.warmup_steps": 2,
    "train.checkpoint_every_steps": 2,
    "train.log_every_steps": 1,
    "train.sample_every_steps": 0,
    "sample.num_steps": 4,
    "sample.w": (0.0, 2.0),
    "sample.classes": (0, 7),
    "sample.batch_size": 16,
    "eval.weights": (0.0, 1.0, 3.0),
    "eval.num_samples": 20,
    "eval.classifier_steps": 5,
}


def tiny_config(**changes: Any) -> Any:
    """configs/digits.py with FIELDS and then `changes` applied: `train__num_steps=3` sets train.num_steps."""
    config = with_defaults(read_config(ROOT / "configs" / "digits.py"))
    for name, value in (FIELDS | {name.replace("__", "."): value for name, value in changes.items()}).items():
        group, _, field = name.rpartition(".")
        (config[group] if group else config)[field] = value
    return with_classes(complete(config), config.data.num_classes or 10)


def flags_of(**changes: Any) -> list[str]:
    """The same changes as command-line flags of `python -m cfd.main --config=configs/digits.py`."""
    fields = FIELDS | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config.{name}={value}" for name, value in fields.items()]
