"""A run's folder: one writer, one config, and a log without a missing or doubled step."""

import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX import SummaryWriter

from cfd import workdir
from cfd.workdir import MetricsLog


def config_json(**changes: Any) -> dict[str, Any]:
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
    with pytest.raises(ValueError, match="another run's") as error:
        workdir.write_config(tmp_path, config_json(**changes))
    assert all(text in str(error.value) for text in named)
    assert "--workdir" in str(error.value) and "train.num_steps" in str(error.value)
    assert workdir.read_config(tmp_path) == config_json()


def test_other_classes_are_refused(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, config_json())
    with pytest.raises(ValueError, match="class_names"):
        workdir.write_config(tmp_path, config_json() | {"class_names": ["a", "c"]})


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


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_log_goes_on_from_a_step_without_a_gap_or_a_double(tmp_path: Path) -> None:
    with workdir.metrics_log(tmp_path, 0) as log:
        for step in range(1, 8):
            workdir.write_metrics(log, step, {"loss": 1.0 / step, "count": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    with workdir.metrics_log(tmp_path, 5) as log:
        workdir.write_metrics(log, 6, {"loss": 0.5, "count": 6})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert lines(tmp_path)[5] == {"step": 6, "loss": 0.5, "count": 6}


@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 3}', b'{"step": 3, "x": 1', b"\xff\x00", b"3\n", b'{"a": 1}\n'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    good = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + torn)
    with workdir.metrics_log(tmp_path, 3):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == good


def test_nan_is_null_and_each_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    with workdir.metrics_log(tmp_path, 0) as log:
        workdir.write_metrics(log, 1, {"loss": math.nan, "grad_norm": math.inf, "other": -math.inf, "fine": 1.5})
        assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "other": None, "fine": 1.5}]


def test_images_and_scalars_reach_tensorboard(tmp_path: Path) -> None:
    with workdir.metrics_log(tmp_path, 0) as log:
        workdir.write_metrics(log, 1, {"loss_of_this_test": 0.25})
        workdir.write_image(log, 1, "grid_of_this_test", np.zeros((4, 6, 3), np.uint8))
    content = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert b"loss_of_this_test" in content and b"grid_of_this_test" in content and b"PNG" in content


def test_other_processes_log_nothing() -> None:
    log = MetricsLog(None, None)
    workdir.write_metrics(log, 1, {"loss": 1.0})
    workdir.write_image(log, 1, "samples", np.zeros((4, 4, 3)))


def test_a_killed_run_and_its_restart_have_every_step_once(tmp_path: Path) -> None:
    """The log is cut at the step of the checkpoint, wherever the run was stopped."""
    for resumed, stopped in [(0, 7), (5, 6), (5, 12), (10, 15)]:
        with workdir.metrics_log(tmp_path, resumed) as log:
            assert isinstance(log.board, SummaryWriter)
            for step in range(resumed + 1, stopped + 1):
                workdir.write_metrics(log, step, {"loss": float(step)})
    assert lines(tmp_path) == [{"step": step, "loss": float(step)} for step in range(1, 16)]


def hold_lock(folder: str, ready: Any) -> None:
    with workdir.lock(folder):
        ready.set()
        time.sleep(60)


def test_second_job_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    first = context.Process(target=hold_lock, args=(str(tmp_path), ready))
    first.start()
    assert ready.wait(60)
    start = time.monotonic()
    host = os.uname().nodename
    with (
        pytest.raises(ValueError, match=f"locked by pid {first.pid} on {host} since 20.*--workdir"),
        workdir.lock(tmp_path),
    ):
        pass
    assert time.monotonic() - start < 5
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with workdir.lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        with pytest.raises(ValueError, match=f"locked by pid {os.getpid()}"), workdir.lock(tmp_path):
            pass
    with workdir.lock(tmp_path):
        pass


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), workdir.lock(tmp_path):
        raise KeyError
    with workdir.lock(tmp_path):
        pass
