"""The metrics of a run: no step is missing or doubled after kills, restarts and full disks."""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from disk import file_size_limit
from event_files import records

from cfd.runs.log import MetricsLog, metrics_log, write_image, write_metrics


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in found]


def test_each_line_has_the_time_at_which_it_was_written(tmp_path: Path) -> None:
    log, before = metrics_log(tmp_path, 0), time.time()
    for step in (1, 2):
        write_metrics(log, step, {"loss": 1.0})
    first, second = (json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert before - 1e-3 <= first <= second <= time.time() + 1e-3


def test_the_log_goes_on_from_a_step_without_a_gap_or_a_double(tmp_path: Path) -> None:
    log = metrics_log(tmp_path, 0)
    for step in range(1, 8):
        write_metrics(log, step, {"loss": 1.0 / step, "count": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    log = metrics_log(tmp_path, 5)
    write_metrics(log, 6, {"loss": 0.5, "count": 6})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert lines(tmp_path)[5] == {"step": 6, "loss": 0.5, "count": 6}


def test_lines_of_later_steps_are_not_dropped_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
    metrics_log(tmp_path, 5)
    assert "the newest checkpoint is step 5; dropped 2 lines of later steps." in capsys.readouterr().out
    metrics_log(tmp_path, 0)
    assert "there is no checkpoint, training starts at step 0; dropped 5 lines" in capsys.readouterr().out
    metrics_log(tmp_path, 0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 3}', b'{"step": 3, "x": 1', b"\xff\x00", b"3\n", b'{"a": 1}\n'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    good = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + torn)
    metrics_log(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == good


def test_nan_is_null_and_each_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    log = metrics_log(tmp_path, 0)
    write_metrics(log, 1, {"loss": math.nan, "grad_norm": math.inf, "other": -math.inf, "fine": 1.5})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "other": None, "fine": 1.5}]


def events(folder: Path) -> list[list[Any]]:
    """The records of every TensorBoard file, oldest first."""
    return [records(path.read_bytes()) for path in sorted((folder / "tensorboard").iterdir())]


def test_every_start_has_a_file_that_hides_later_steps_of_the_one_before(tmp_path: Path) -> None:
    for start in (0, 4):
        log = metrics_log(tmp_path, start)
        for step in (5, 6):
            write_metrics(log, step, {"loss": step / 4, "count": step})
    for start, (version, purge, *rest) in zip((0, 4), events(tmp_path), strict=True):
        assert version.file_version == "brain.Event:2"
        assert (purge.step, purge.session_log.status) == (start + 1, purge.session_log.START)
        values = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in rest]
        assert values == [(step, {"loss": step / 4, "count": step}) for step in (5, 6)]


def test_what_a_full_disk_refuses_is_written_when_there_is_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Exactly once, although a part of a line was written before. No image is lost either."""
    log = metrics_log(tmp_path, 0)
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    write_metrics(log, 1, {"loss": 1.0})
    with file_size_limit(150):
        for step in range(2, 20):
            write_metrics(log, step, {"loss": 1.0 / step})
        write_image(log, 19, "grid", picture)
    assert (tmp_path / "metrics.jsonl").stat().st_size == 150
    assert "metrics.jsonl was not written: File too large" in caplog.text and "tfevents" in caplog.text
    write_metrics(log, 20, {"loss": 1.0 / 20})
    assert lines(tmp_path) == [{"step": step, "loss": 1.0 / step} for step in range(1, 21)]
    tags = [(e.step, e.summary.value[0].tag) for e in events(tmp_path)[0][2:]]
    assert tags == [(step, "loss") for step in range(1, 20)] + [(19, "grid"), (20, "loss")]


def test_another_error_of_the_disk_is_raised(tmp_path: Path) -> None:
    log = metrics_log(tmp_path, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        write_metrics(log, 1, {"loss": 1.0})


def test_images_and_scalars_reach_tensorboard(tmp_path: Path) -> None:
    log = metrics_log(tmp_path, 0)
    write_metrics(log, 1, {"loss_of_this_test": 0.25})
    write_image(log, 1, "grid_of_this_test", np.zeros((4, 6, 3), np.uint8))
    content = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert b"loss_of_this_test" in content and b"grid_of_this_test" in content and b"PNG" in content


def test_other_processes_log_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = metrics_log(tmp_path, 0)
    assert log == MetricsLog(None, None)
    write_metrics(log, 1, {"loss": 1.0})
    write_image(log, 1, "samples", np.zeros((4, 4, 3)))
    assert not list(tmp_path.iterdir())


def test_a_killed_run_and_its_restart_have_every_step_once(tmp_path: Path) -> None:
    """The log is cut at the step of the checkpoint from which the run resumes, wherever the run was stopped."""
    for resumed, stopped in [(0, 7), (5, 6), (5, 12), (10, 15)]:
        log = metrics_log(tmp_path, resumed)
        for step in range(resumed + 1, stopped + 1):
            write_metrics(log, step, {"loss": float(step)})
    assert lines(tmp_path) == [{"step": step, "loss": float(step)} for step in range(1, 16)]
