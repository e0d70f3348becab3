"""A run's folder: one writer, one config, and a log without a missing or doubled step."""

import errno
import fcntl
import json
import math
import multiprocessing
import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from disk import file_size_limit
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from cfd import workdir
from cfd.config import FIELDS
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


def test_no_other_field_may_change() -> None:
    def content(name: str, value: int) -> dict[str, Any]:
        group, _, field = name.rpartition(".")
        return {"config": {group: {field: value}} if group else {field: value}}

    changing = {name for name in FIELDS if not workdir.config_differences(content(name, 0), content(name, 1))}
    assert changing == {
        "data.path",
        "data.num_workers",
        "data.on_bad_image",
        "data.in_memory",
        "train.num_steps",
        "train.nonfinite_limit",
        "train.checkpoint_every_steps",
        "train.keep_checkpoints",
        "train.log_every_steps",
        "train.sample_every_steps",
        "train.watchdog_seconds",
        "classifier_train.num_steps",
        *(name for name in FIELDS if name.startswith(("mesh.", "sample.", "eval.", "xla."))),
    }


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
    with pytest.raises(ValueError, match=r"has checkpoints and no config\.json: put it back.*--workdir"):
        workdir.write_config(tmp_path, config_json())
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"config": []}, '"config"'), ({"class_names": None}, '"class_names"'), ({"kind": 0}, '"kind"')],
)
def test_a_part_that_a_config_lacks_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json() | change))
    with pytest.raises(ValueError, match=rf"config\.json has no sound {named}: restore it"):
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


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_log_goes_on_from_a_step_without_a_gap_or_a_double(tmp_path: Path) -> None:
    log = workdir.metrics_log(tmp_path, 0)
    for step in range(1, 8):
        workdir.write_metrics(log, step, {"loss": 1.0 / step, "count": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    log = workdir.metrics_log(tmp_path, 5)
    workdir.write_metrics(log, 6, {"loss": 0.5, "count": 6})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert lines(tmp_path)[5] == {"step": 6, "loss": 0.5, "count": 6}


def test_lines_of_later_steps_are_not_dropped_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
    workdir.metrics_log(tmp_path, 5)
    assert "the newest checkpoint is of step 5; 2 lines of later steps are dropped." in capsys.readouterr().out
    workdir.metrics_log(tmp_path, 0)
    assert "there is no checkpoint, training starts at step 0; 5 lines" in capsys.readouterr().out
    workdir.metrics_log(tmp_path, 0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 3}', b'{"step": 3, "x": 1', b"\xff\x00", b"3\n", b'{"a": 1}\n'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    good = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + torn)
    workdir.metrics_log(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == good


def test_nan_is_null_and_each_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    log = workdir.metrics_log(tmp_path, 0)
    workdir.write_metrics(log, 1, {"loss": math.nan, "grad_norm": math.inf, "other": -math.inf, "fine": 1.5})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "other": None, "fine": 1.5}]


def events(folder: Path) -> list[list[Any]]:
    """The records of every TensorBoard file, the oldest first; their check sums must be right, and none torn."""
    protocol: Any = event_pb2  # its classes are made when it is imported
    files = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, found = path.read_bytes(), []
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event, sums = data[12 : 12 + size], (data[8:12], data[12 + size : 16 + size])
            assert sums == tuple(struct.pack("<I", masked_crc32c(part)) for part in (data[:8], event))
            found.append(protocol.Event.FromString(event))
            data = data[16 + size :]
        files.append(found)
    return files


def test_every_start_has_a_file_that_hides_later_steps_of_the_one_before(tmp_path: Path) -> None:
    for start in (0, 4):
        log = workdir.metrics_log(tmp_path, start)
        for step in (5, 6):
            workdir.write_metrics(log, step, {"loss": step / 4, "count": step})
    for start, (version, purge, *rest) in zip((0, 4), events(tmp_path), strict=True):
        assert version.file_version == "brain.Event:2"
        assert (purge.step, purge.session_log.status) == (start + 1, purge.session_log.START)
        values = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in rest]
        assert values == [(step, {"loss": step / 4, "count": step}) for step in (5, 6)]


def test_what_a_full_disk_refuses_is_written_when_there_is_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Exactly once, though a part of a line was written; an image is lost no more than a scalar is."""
    log = workdir.metrics_log(tmp_path, 0)
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    workdir.write_metrics(log, 1, {"loss": 1.0})
    with file_size_limit(150):
        for step in range(2, 20):
            workdir.write_metrics(log, step, {"loss": 1.0 / step})
        workdir.write_image(log, 19, "grid", picture)
    assert (tmp_path / "metrics.jsonl").stat().st_size == 150
    assert "metrics.jsonl was not written: File too large" in caplog.text and "tfevents" in caplog.text
    workdir.write_metrics(log, 20, {"loss": 1.0 / 20})
    assert lines(tmp_path) == [{"step": step, "loss": 1.0 / step} for step in range(1, 21)]
    tags = [(e.step, e.summary.value[0].tag) for e in events(tmp_path)[0][2:]]
    assert tags == [(step, "loss") for step in range(1, 20)] + [(19, "grid"), (20, "loss")]


def test_another_error_of_the_disk_is_raised(tmp_path: Path) -> None:
    log = workdir.metrics_log(tmp_path, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        workdir.write_metrics(log, 1, {"loss": 1.0})


def test_images_and_scalars_reach_tensorboard(tmp_path: Path) -> None:
    log = workdir.metrics_log(tmp_path, 0)
    workdir.write_metrics(log, 1, {"loss_of_this_test": 0.25})
    workdir.write_image(log, 1, "grid_of_this_test", np.zeros((4, 6, 3), np.uint8))
    content = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert b"loss_of_this_test" in content and b"grid_of_this_test" in content and b"PNG" in content


def test_other_processes_log_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = workdir.metrics_log(tmp_path, 0)
    assert log == MetricsLog(None, None)
    workdir.write_metrics(log, 1, {"loss": 1.0})
    workdir.write_image(log, 1, "samples", np.zeros((4, 4, 3)))
    assert not list(tmp_path.iterdir())


def test_a_killed_run_and_its_restart_have_every_step_once(tmp_path: Path) -> None:
    """The log is cut at the step of the checkpoint, wherever the run was stopped."""
    for resumed, stopped in [(0, 7), (5, 6), (5, 12), (10, 15)]:
        log = workdir.metrics_log(tmp_path, resumed)
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


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(ValueError, match=r"lock cannot be locked \(.*\): mount its file system with flock"),
        workdir.lock(tmp_path),
    ):
        pass


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), workdir.lock(tmp_path):
        raise KeyError
    with workdir.lock(tmp_path):
        pass
