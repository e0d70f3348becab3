"""The folder of a run, and its config.json, which says whose run it is.

    config.json             the whole config, the class names and the conventions
    checkpoints/<step>/     written by cfd.runs.checkpoint
    snapshots/<step>/       the EMA alone, likewise, kept for good
    posthoc/<step>/         the averages of train.posthoc_ema, likewise
    metrics.jsonl           written by cfd.runs.log: one object per line, in the order of the steps
    tensorboard/            written by cfd.runs.log: the same scalars, and images

All processes of the run must see the folder, in a bucket or on a file system with atomic renames and `flock`.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from cfd.devices import parallel
from cfd.errors import RESTORE, CommandError, InputError, UserError
from cfd.runs import files
from cfd.runs.access import check_run_path
from cfd.runs.log import METRICS

CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
POSTHOC = "posthoc"
CONFIG = "config.json"

CONVENTIONS = {
    "w": "the paper's weight: eps = (1 + w) eps(z, c) - w eps(z); w = 0 is conditional, w = -1 unconditional",
    "labels": "int32, 0 to num_classes - 1 in the order of class_names; -1 is the null label",
    "logsnr": "z = alpha x + sigma eps, alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr)",
    "images": "float32 [B, H, W, C] in [-1, 1]; uint8 is round((clip(x) + 1) * 127.5)",
}
"""Recorded in every config.json. Manifests contain "w" and "images": a change of these words orphans old results."""

PARTS: dict[str, Callable[[Any], bool]] = {
    "kind": lambda x: isinstance(x, str),
    "config": lambda x: isinstance(x, dict),
    "class_names": lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x),
    "init_from": lambda x: x is None or (isinstance(x, dict) and x.keys() == {"run", "step", "weights_hash"}),
}
"""The parts of a config.json that are read, and a condition that each satisfies. "init_from" may be missing."""

FREE_FIELDS = (
    "data.path",
    "data.labels",
    "data.empty_classes",
    "data.num_workers",
    "data.on_bad_image",
    "data.transparency",
    "data.max_pixels",
    "data.in_memory",
    "train.num_steps",
    "train.nonfinite_limit",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.keep_every_steps",
    "train.snapshot_every_steps",
    "train.posthoc_every_steps",
    "train.log_every_steps",
    "train.sample_every_steps",
    "train.watchdog_seconds",
    "classifier_train.num_steps",
    "model_guide",
    "guide_train",
    "mesh",
    "sample",
    "eval",
    "likelihood",
    "xla",
)
"""Fields, and groups of fields, that may change on resume because they do not affect what a step computes.

`data.path` and `data.labels` say where the data set is, not which data set it is. `data.on_bad_image`,
`data.transparency`, `data.max_pixels` and `train.nonfinite_limit` decide whether a step is reached: a run that has met
an image that cannot be used resumes with another value. `mesh` changes a step only by rounding, in float32 or in the
bfloat16 of `model.dtype`.
"""


def describe(kind: str, config: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    """The content of a run's config.json; `kind` says which network it trains, "diffusion" or "classifier"."""
    return dict(kind=kind, config=dict(config), class_names=list(class_names), conventions=CONVENTIONS)


def write_config(
    workdir: str | os.PathLike[str], config_json: Mapping[str, Any], defaults: Mapping[str, Any] = {}
) -> None:
    """Writes config.json, or checks that an existing one describes the same run and updates it.

    The fields of FREE_FIELDS may differ from the file's. In a run that has neither a checkpoint nor metrics yet, every
    field may. `defaults` is as for `config_differences`. Every process must call this. Raises ValueError if another
    field differs, if there are checkpoints without a config.json, or if this process does not see the file that process
    0 wrote.
    """
    check_run_path(workdir)
    path = os.path.join(workdir, CONFIG)
    new = json.loads(json.dumps(config_json, allow_nan=False))
    content = (json.dumps(new, indent=2) + "\n").encode()
    has_steps = _has_steps(workdir)
    if jax.process_index() == 0 and not has_config(workdir) and not has_steps:
        files.rewrite(path, lambda found: found or content)
    parallel.barrier("cfd.workdir.write_config")
    if not has_config(workdir) and has_steps:
        raise UserError(f"{os.fspath(workdir)} has checkpoints but no {CONFIG}: {RESTORE}, or give another --workdir")
    if not has_config(workdir):
        raise UserError(
            f"process 0 wrote {path}, but this process does not see it: put the workdir on a disk that all processes "
            "share, or in a bucket"
        )
    old = check_config(workdir, new, defaults) if has_begun(workdir) else read_config(workdir)
    parallel.barrier("cfd.workdir.write_config.compared")
    if jax.process_index() == 0 and new != old:
        if differences := config_differences(old, new, defaults):
            print(
                f"{os.fspath(workdir)} has no checkpoint yet and takes this config: {abbreviate(differences)}.",
                flush=True,
            )

        def update(found: bytes) -> bytes:
            if found != content and _parsed(path, found) != old:
                raise UserError(f"{path} has just been changed by another job: end one of the two, and start again")
            return content

        files.rewrite(path, update)


def has_config(workdir: str | os.PathLike[str]) -> bool:
    """Whether the folder has a config.json: it is then the folder of a run."""
    path = os.path.join(workdir, CONFIG)
    try:
        return files.exists(path)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): {files.how_to_allow(path)}") from None


@contextlib.contextmanager
def inputs_are_final(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block, an InputError is raised as a CommandError, which is final, if the folder has no config.json."""
    try:
        yield
    except InputError as error:
        if has_config(workdir):
            raise
        raise CommandError(str(error)) from error


def has_begun(workdir: str | os.PathLike[str]) -> bool:
    """Whether a run has a checkpoint, a snapshot or metrics: its config is then settled."""
    return _has_steps(workdir) or bool(files.read_bytes(os.path.join(workdir, METRICS)))


def _has_steps(workdir: str | os.PathLike[str]) -> bool:
    from cfd.runs.steps import steps_of  # imported here because it imports this module

    return any(steps_of(files.place(workdir, name)) for name in (CHECKPOINTS, SNAPSHOTS, POSTHOC))


def check_config(
    workdir: str | os.PathLike[str], config_json: Mapping[str, Any], defaults: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """The content of config.json.

    Raises ValueError if a field outside of FREE_FIELDS differs from `config_json`. `defaults` is as for
    `config_differences`.
    """
    old, path = read_config(workdir), os.path.join(workdir, CONFIG)
    if old["kind"] != config_json["kind"]:
        raise CommandError(
            f"{path} is another run's: {os.fspath(workdir)} is the run of a {_in_words(old)}, not of a "
            f"{_in_words(config_json)}: give another --workdir"
        )
    if differences := config_differences(old, json.loads(json.dumps(config_json)), defaults):
        is_diffusion = old["kind"] == "diffusion"
        is_student = bool(old["config"].get("model", {}).get("weight_range"))
        is_source = is_diffusion and not is_student and _has_steps(workdir) and _same_network(differences)
        same = f"the same config, which --config={os.fspath(workdir)} is" if is_diffusion else "the same values"
        same += f" (only {', '.join(FREE_FIELDS)} may change)"
        trains_on = f". --init_from={os.fspath(workdir)} with another --workdir trains its weights on"
        raise CommandError(
            f"{path} is another run's: {abbreviate(differences)}. Give another --workdir, or {same}"
            + (trains_on if is_source else "")
        )
    return old


def check_kind(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of config.json. Raises UserError unless it is that of a diffusion model."""
    content, place = read_config(workdir), files.place(workdir)
    if content["kind"] != "diffusion":
        usual = f"its diffusion model, which is usually {place.parent}"
        other = usual if content["kind"] == "classifier" else "a diffusion model"
        raise UserError(f"{os.fspath(workdir)} is the run of a {content['kind']}: give the folder of {other}")
    return content


def _in_words(content: Mapping[str, Any]) -> str:
    """The kind of a run, in words."""
    return "diffusion model" if content["kind"] == "diffusion" else content["kind"]


def _same_network(differences: Sequence[str]) -> bool:
    """Whether a network fits the weights of another one, from which its config differs by `differences`."""
    fixed = ("kind", "model.", "data.channels", "data.image_size")
    free = ("model.num_classes:", "model.dropout:", "model.dtype:", "model.remat:")
    return not any(name.startswith(fixed) and not name.startswith(free) for name in differences)


def check_images(workdir: str | os.PathLike[str], *, image_size: int, channels: int, num_classes: int) -> None:
    """Raises ValueError unless the run in the folder was trained on images of this size, with these classes.

    A number of classes that is 0, here or there, stands for any number.
    """
    recorded = read_config(workdir)["config"]["data"]
    expected = dict(image_size=image_size, channels=channels, num_classes=num_classes)
    for name, value in expected.items():
        if recorded[name] != value and 0 not in (recorded[name], value):
            raise UserError(
                f"{os.fspath(workdir)} was trained with data.{name} = {recorded[name]}, not {value}: give the config "
                "of its run, or move the folder away and train again"
            )


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of config.json, read as JSON only: nothing in a run's folder is ever executed.

    Raises ValueError if there is no such file, if it is damaged, or if this job may not read it.
    """
    path = os.path.join(workdir, CONFIG)
    try:
        content = files.read_bytes(path)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): {files.how_to_allow(path)}") from None
    if content is None:
        raise UserError(
            f"{path} does not exist: {os.fspath(workdir)} is not the folder of a run: train one there first, or give "
            "another folder"
        )
    return _parsed(path, content)


def _parsed(path: str, text: bytes) -> dict[str, Any]:
    """The content of config.json, from its bytes."""
    try:
        content = json.loads(text)
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}): {RESTORE}") from None
    content = content if isinstance(content, dict) else {}
    if wrong := [f'"{name}"' for name, holds in PARTS.items() if not holds(content.get(name))]:
        raise UserError(f"{path} has no valid {', '.join(wrong)}: {RESTORE}")
    if content["kind"] == "diffusion" and "model" not in content["config"]:
        raise UserError(f'{path} has no "model" in its "config": {RESTORE}')
    return content


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any] = {}) -> list[str]:
    """ "field: value there, value here" for every field, outside of FREE_FIELDS, in which two configs differ.

    Where a run took its first weights from is not compared.

    `old` and `new` are contents of config.json. `defaults` maps full field names ("train.num_steps") to values: a field
    that `old` lacks is younger than the run that wrote it, and is taken to have had its default.
    """
    free = ("init_from.", *(f"config.{field}." for field in FREE_FIELDS))
    there, here = flatten(old), flatten(new)
    younger = {f"config.{name}": value for name, value in defaults.items()}
    there |= {name: value for name, value in younger.items() if name in here and name not in there}
    a, b = ({name: json.dumps(value) for name, value in flat.items()} for flat in (there, here))
    return [
        f"{name.removeprefix('config.')}: {a.get(name, 'absent')} there, {b.get(name, 'absent')} here"
        for name in (a | b)
        if a.get(name) != b.get(name) and not f"{name}.".startswith(free)
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.num_steps": value} of nested mappings; an empty mapping is a value."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def abbreviate(items: Sequence[str], *, separator: str = "; ", limit: int = 4) -> str:
    """The first `limit` items in one line, and the number of those left out."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
