"""A run's folder: its config cannot change unnoticed."""

import json
from pathlib import Path
from typing import Any

import pytest
from permissions import obeyed

from cfd.errors import UserError
from cfd.fields import FIELDS
from cfd.runs import workdir


def config_json(**changes: Any) -> dict[str, Any]:
    """The content of a config.json in which `model__dropout=0.5` sets model.dropout and `seed=1` sets seed."""
    config: dict[str, Any] = {
        "seed": 0,
        "data": {"source": "folder", "path": "a", "num_workers": 1, "image_size": 8},
        "model": {"channel_mult": [1, 2], "dropout": 0.0},
        "train": {"num_steps": 100, "batch_size": 32, "log_every_steps": 10, "learning_rate": 1e-3},
        "sample": {"w": [0.0, 1.0]},
        "eval": {"weights": [0.0]},
        "mesh": {"data": -1, "fsdp": 1},
    }
    for name, value in changes.items():
        group, _, field = name.partition("__")
        if field:
            config[group][field] = value
        else:
            config[group] = value
    return {"kind": "diffusion", "config": config, "class_names": ["a", "b"], "conventions": {"w": "paper"}}


def test_config_is_written_once_and_read_back(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, config_json(model__channel_mult=(1, 2)))
    assert workdir.read_config(tmp_path) == config_json()
    before = (tmp_path / "config.json").stat()
    workdir.write_config(tmp_path, config_json())
    assert (tmp_path / "config.json").stat().st_ino == before.st_ino
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"train__num_steps": 200},
        {"train__log_every_steps": 1},
        {"data__path": "elsewhere"},
        {"data__num_workers": 4},
        {"data__in_memory": True},
        {"mesh": {"data": 2, "fsdp": 4}},
        {"sample__w": [3.0]},
        {"eval": {"weights": [1.0, 2.0], "num_samples": 7}},
    ],
)
def test_fields_that_do_not_change_the_state_may_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    workdir.write_config(tmp_path, config_json())
    workdir.write_config(tmp_path, config_json(**changes))
    assert workdir.read_config(tmp_path) == config_json(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, ["seed: 0 there, 1 here"]),
        ({"train__batch_size": 64, "model__dropout": 0.1}, ["train.batch_size: 32", "model.dropout: 0.0 there, 0.1"]),
        ({"data__source": "tfds"}, ['data.source: "folder" there, "tfds" here']),
        ({"model__new": 3}, ["model.new: absent there, 3 here"]),
        ({"model": {"dropout": 0.0}}, ["model.channel_mult: [1, 2] there, absent here"]),
        ({"evaluation": 3}, ["evaluation: absent there, 3 here"]),
    ],
)
def test_another_config_is_refused_and_nothing_is_overwritten(
    tmp_path: Path, changes: dict[str, Any], named: list[str]
) -> None:
    workdir.write_config(tmp_path, config_json())
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(ValueError, match="another run's") as error:
        workdir.write_config(tmp_path, config_json(**changes))
    assert all(text in str(error.value) for text in named)
    assert "--workdir" in str(error.value) and "train.num_steps" in str(error.value)
    assert workdir.read_config(tmp_path) == config_json()


def test_a_run_of_another_kind_is_refused_with_remedies_that_work(tmp_path: Path) -> None:
    """--config=RUN takes the run of a diffusion model alone."""
    for kind in ("gan", "diffusion"):
        workdir.write_config(tmp_path / kind, config_json() | {"kind": kind})
        (tmp_path / kind / "checkpoints" / "2").mkdir(parents=True)
    refused = r"is the run of a gan, not of a diffusion model: give another --workdir$"
    with pytest.raises(UserError, match=refused):
        workdir.write_config(tmp_path / "gan", config_json() | {"kind": "diffusion"})
    with pytest.raises(UserError, match=r"seed: 0 there, 1 here\. Give another --workdir, or the same values \(only "):
        workdir.write_config(tmp_path / "gan", config_json(seed=1) | {"kind": "gan"})
    with pytest.raises(UserError, match=r"or the same config, which --config=.*diffusion is \(only "):
        workdir.write_config(tmp_path / "diffusion", config_json(seed=1) | {"kind": "diffusion"})


def test_no_other_field_may_change() -> None:
    def content(name: str, value: int) -> dict[str, Any]:
        group, _, field = name.rpartition(".")
        return {"config": {group: {field: value}} if group else {field: value}}

    changing = {name for name in FIELDS if not workdir.config_differences(content(name, 0), content(name, 1))}
    assert changing == {
        "data.path",
        "data.labels",
        "data.empty_classes",
        "data.transparency",
        "data.max_pixels",
        "data.num_workers",
        "data.on_bad_image",
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
        *(name for name in FIELDS if name.startswith(("mesh.", "sample.", "eval.", "likelihood.", "xla."))),
        *(name for name in FIELDS if name.startswith(("model_guide.", "guide_train."))),  # of the run RUN/guide
    }


def test_fields_younger_than_a_run_are_taken_to_have_had_their_defaults(tmp_path: Path) -> None:
    """A run of an older version resumes. Its config.json is then complete, and a changed field is still refused."""
    defaults = {"model.new": (1, 2), "younger.field": 0.5, "model.dropout": 0.3, "seed": 7}
    workdir.write_config(tmp_path, config_json())
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    resumed = config_json(model__new=[1, 2], younger={"field": 0.5})
    with pytest.raises(ValueError, match=r"model\.new: absent there, \[1, 2\] here"):
        workdir.check_config(tmp_path, resumed)
    assert workdir.check_config(tmp_path, resumed, defaults) == config_json()
    for change, named in (
        ({"model__new": [1, 3]}, r"model\.new: \[1, 2\] there, \[1, 3\] here"),
        ({"younger": {"field": 0.25}}, r"younger\.field: 0\.5 there, 0\.25 here"),
        ({"model__dropout": 0.3}, r"model\.dropout: 0\.0 there, 0\.3 here"),
        ({"other": 1}, r"other: absent there, 1 here"),
    ):
        changed = config_json(**{"model__new": [1, 2], "younger": {"field": 0.5}} | change)
        with pytest.raises(ValueError, match=rf"another run's: {named}\."):
            workdir.write_config(tmp_path, changed, defaults)
    assert workdir.read_config(tmp_path) == config_json()
    workdir.write_config(tmp_path, resumed, defaults)
    assert workdir.read_config(tmp_path) == resumed
    with pytest.raises(ValueError, match=r"model\.new: \[1, 2\] there, absent here"):
        workdir.write_config(tmp_path, config_json(), defaults)


def test_a_run_of_other_images_is_named(tmp_path: Path) -> None:
    data = {"image_size": 8, "channels": 1, "num_classes": 10}
    described = workdir.describe("diffusion", {"data": data, "model": {}}, ("a", "b"))
    workdir.write_config(tmp_path, described)
    assert workdir.read_config(tmp_path) == described
    workdir.check_images(tmp_path, image_size=8, channels=1, num_classes=10)
    with pytest.raises(ValueError, match=r"was trained with data\.channels = 1, not 3: give the config"):
        workdir.check_images(tmp_path, image_size=8, channels=3, num_classes=10)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, config_json())
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(ValueError, match="class_names"):
        workdir.write_config(tmp_path, config_json() | {"class_names": ["a", "c"]})


def test_a_run_without_a_checkpoint_takes_another_config(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    workdir.write_config(tmp_path, config_json())
    (tmp_path / "checkpoints").mkdir()
    workdir.write_config(tmp_path, config_json(seed=1))
    assert workdir.read_config(tmp_path) == config_json(seed=1)
    assert "has no checkpoint yet and takes this config: seed: 0 there, 1 here." in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="another run's"):
        workdir.write_config(tmp_path, config_json(seed=2))


def test_checkpoints_without_their_config_are_not_taken_for_this_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has checkpoints but no config\.json: restore it from.*--workdir"):
        workdir.write_config(tmp_path, config_json())
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": []}, '"config"'),
        ({"class_names": None}, '"class_names"'),
        ({"class_names": [0, 1]}, '"class_names"'),
        ({"kind": 0}, '"kind"'),
        ({"init_from": "runs/old"}, '"init_from"'),
        ({"init_from": {"run": "runs/old"}}, '"init_from"'),
    ],
)
def test_a_part_that_a_config_lacks_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json() | change))
    with pytest.raises(ValueError, match=rf"config\.json has no valid {named}: restore it"):
        workdir.read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "diffusion"}', "\x00\xff"])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        workdir.read_config(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        workdir.write_config(tmp_path, config_json())
    assert (tmp_path / "config.json").read_text() == text


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the folder of a run"):
        workdir.read_config(tmp_path)


def test_no_config_of_a_folder_is_executed(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, config_json())
    (tmp_path / "config.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    workdir.read_config(tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("folder", ["s3://bucket/run", "gs:/bucket/run", "a[1]", "back\\slash"])
def test_no_run_begins_where_its_checkpoints_could_not_be_read(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a program that trains without the command line. Nothing is made, such as a local folder `gs:`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"(give|form) gs://BUCKET|give a --workdir whose path has none of"):
        workdir.write_config(folder, config_json())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, config_json())
    (tmp_path / "config.json").chmod(0o000)
    with obeyed(), pytest.raises(ValueError, match=r"config\.json cannot be read \(Permission denied\): .* chmod"):
        workdir.read_config(tmp_path)
