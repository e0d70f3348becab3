"""The metrics of a cell are computed while the next cell is sampled, and errors and stops in between lose no row."""

import threading
from pathlib import Path
from typing import Any

import jax
import mixing
import numpy as np
import pytest
from meshes import mesh_of
from pairs import in_processes
from swept import pixels
from tiny import tiny_config

from cfd.devices import parallel, preemption
from cfd.evaluation import scores
from cfd.evaluation.features import FeatureNetwork
from cfd.evaluation.reference import Reference
from cfd.modes import measuring, settings, sweep
from cfd.runs import results

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning"),
]


@pytest.fixture
def run(mixing_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run at step 7 that is swept on one device, with the features `pixels`."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    monkeypatch.setattr(sweep, "open_features", lambda *_: FeatureNetwork("classifier", "f" * 64, pixels))
    monkeypatch.setattr(sweep, "measure_real", lambda *_: None)  # which scores real images, not cells
    return mixing_run


def swept(folder: Path, **changes: Any) -> list[results.Row]:
    return sweep.sweep(tiny_config(**changes), str(folder), str(folder))


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_a_cell_is_sampled_while_the_one_before_is_measured(
    run: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metrics of each cell but the last wait until the next cell is being sampled; the rows are the same."""
    folder = tmp_path_factory.mktemp("other")
    expected, ours = swept(folder), threading.get_ident()
    sampling, distance, sampled = [threading.Event() for _ in range(4)], scores.groups, measuring.sampled
    cells, measured = iter(sampling), iter([*sampling[1:3], None])

    def announced(*arguments: Any) -> Any:
        next(cells).set()
        return sampled(*arguments)

    def waiting(*arguments: Any) -> Any:
        assert threading.get_ident() != ours
        event = next(measured)
        assert event is None or event.wait(100), "the next cell is not sampled meanwhile"
        return distance(*arguments)

    monkeypatch.setattr(measuring, "sampled", announced)
    monkeypatch.setattr(scores, "groups", waiting)
    assert swept(run) == expected
    assert (run / "sweep.csv").read_bytes() == (folder / "sweep.csv").read_bytes()
    assert "metrics" not in names_of_threads()


def test_images_that_a_killed_sweep_left_unfinished_are_removed(run: Path) -> None:
    (row, *_) = swept(run)
    path = Path(results.samples_path(str(run), row))
    (run / "sweep.csv").unlink()
    path.with_name(f"{path.name}.123.tmp").write_bytes(b"half")
    swept(run)
    assert not list(run.rglob("*.tmp"))


def test_an_error_of_the_metrics_ends_the_sweep_with_its_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distance, calls = scores.groups, iter(range(9))

    def broken(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise ZeroDivisionError("in the second cell")
        return distance(*arguments)

    monkeypatch.setattr(scores, "groups", broken)
    with pytest.raises(ZeroDivisionError, match="in the second cell") as caught:
        swept(run)
    assert {"broken", "score_outputs", "measure_cells"} <= {entry.name for entry in caught.traceback}
    assert [row["w"] for row in results.read_rows(str(run))] == [0.0]
    monkeypatch.setattr(scores, "groups", distance)
    assert [row["w"] for row in swept(run)] == [0.0, 1.0, 3.0]
    assert "metrics" not in names_of_threads()


@pytest.mark.parametrize("what", ["stop", "error", "lost"])
def test_a_cell_that_is_sampled_is_written_before_the_sweep_ends(
    what: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second cell, when the first one is still being measured. A job that has lost its lock writes nothing."""
    ended, begun, distance, sampled = threading.Event(), [], scores.groups, measuring.sampled
    errors = dict(lost=preemption.Lost("taken over"), error=ValueError("NaN"))

    def waiting(*arguments: Any) -> Any:
        assert ended.wait(100)
        return distance(*arguments)

    def requested() -> bool:
        if len(begun) < 2:
            return False
        ended.set()
        if what in errors:
            raise errors[what]
        return True

    monkeypatch.setattr(scores, "groups", waiting)
    monkeypatch.setattr(measuring, "sampled", lambda *arguments: begun.append(1) or sampled(*arguments))
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "requested", requested)
        with pytest.raises(errors.get(what, preemption.Stopped("")).__class__):
            swept(run)
    assert [row["w"] for row in results.read_rows(str(run))] == ([] if what == "lost" else [0.0])
    assert [row["w"] for row in swept(run)] == [0.0, 1.0, 3.0]


def test_the_stream_of_a_thread_can_be_given_up() -> None:
    scoring = scores.start_scoring(10, "classifier", Reference(np.zeros(2), np.eye(2)))
    scoring.put(KeyError("given up"))
    with pytest.raises(KeyError, match="given up"):
        scoring.result.result(100)


def failing(folder: str) -> str:
    """The error in this process of a sweep whose reference has other features than the images."""
    cell = sweep.Cell(sweep.rows_of_grid(tiny_config(eval__weights=(1.0,)), 7)[0], {})
    features = FeatureNetwork("classifier", "f" * 64, pixels)
    mesh = parallel.make_mesh(-1, 1)
    params, config = parallel.replicate(mesh, mixing.params()), tiny_config()
    model = measuring.Model(mixing.NETWORK, settings.sampling_of(config), lambda *_: params, None, mesh)
    with pytest.raises(ValueError) as caught:
        measuring.measure_cells(model, folder, [cell], 10, features, Reference(np.zeros(2), np.eye(2)))
    return f"{jax.process_index()}: {caught.value}"


def test_all_processes_end_if_the_first_cannot_measure(tmp_path: Path) -> None:
    first, second = in_processes(failing, str(tmp_path))
    assert first.startswith("0: the statistics differ in size")
    assert second == "1: process 0 could not measure T 4  w 1, and says why"
    assert not (tmp_path / "sweep.csv").exists()
