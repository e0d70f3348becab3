"""`eval.racing`: the best cell of a sweep is found by a race, resumed after a stop, and measured as an ordinary row."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from meshes import mesh_of
from tiny import tiny_config

from cfd.devices import parallel, preemption
from cfd.errors import UserError
from cfd.evaluation.features import FeatureNetwork, Outputs
from cfd.modes import race, sweep
from cfd.runs import manifest, npz, results

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning"),
]

GRID: dict[str, Any] = {
    "eval__weights": (0.0, 3.0, 9.0),
    "eval__num_steps": (2,),
    "eval__num_samples": 800,
    "eval__racing": True,
    "sample__batch_size": 200,
}


def quarters(images: np.ndarray) -> Outputs:
    """Features without a network: the mean of each quarter of an image, and the same class for all."""
    pool = images.reshape(len(images), 4, -1).mean(axis=2) / 255.0
    return Outputs(pool, None, np.full((len(images), 10), 0.1))


@pytest.fixture
def run(mixing_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run at step 7 that is swept on one device, with the features `quarters`."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    network = FeatureNetwork("classifier", "0" * 64, quarters)
    monkeypatch.setattr(sweep, "open_features", lambda *_: network)
    return mixing_run


def race_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "race.csv") as file:
        return list(csv.DictReader(file))


def test_a_race_resumes_where_it_stopped(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: Any
) -> None:
    config, stopped = tiny_config(**GRID), tmp_path_factory.mktemp("stopped")
    (row,) = sweep.sweep(config, str(run), str(run))
    out, table = capsys.readouterr().out, race_rows(run)
    images = [int(standing["images"]) for standing in table]
    assert f"The race sampled {sum(images):,} of 2,400 images" in out and sum(images) <= 240
    assert "They have no rows in sweep.csv" in out and results.read_rows(str(run)) == [row]
    assert [standing["manifest"] for standing in table if standing["verdict"] == "best"] == [row["manifest"]]

    shutil.copytree(run / "features", stopped / "features")  # with the reference, which is not computed again
    asked = iter([False, True])
    monkeypatch.setattr(preemption, "requested", lambda: next(asked, False))
    with pytest.raises(preemption.Stopped, match="Stopped in the race at w = "):
        sweep.sweep(config, str(run), str(stopped))
    (kept,) = (stopped / "race").glob("*.npz")
    there = len(npz.read_npz(kept)["features"])
    assert not (stopped / "race.csv").exists() and there > 0
    sound = kept.read_bytes()
    kept.write_bytes(sound[:-1])
    with pytest.raises(UserError, match=rf"{kept.name} is not a sound .*remove the file, and --mode=sweep samples"):
        sweep.sweep(config, str(run), str(stopped))
    kept.write_bytes(sound)
    sampled, sampled_features = [], race.sampled_features

    def counting(*args: Any) -> Any:
        sampled.append(args[5] - args[4])
        return sampled_features(*args)

    monkeypatch.setattr(race, "sampled_features", counting)
    assert sweep.sweep(config, str(run), str(stopped)) == [row]
    assert race_rows(stopped) == table and sum(sampled) == sum(images) - there

    sampled.clear()
    assert sweep.sweep(config, str(run), str(stopped)) == [row]
    assert not sampled and "The race is finished: w = " in capsys.readouterr().out


@pytest.mark.slow
def test_the_best_of_a_race_is_that_of_the_whole_grid(run: Path) -> None:
    (row,) = sweep.sweep(tiny_config(**GRID), str(run), str(run))
    whole = sweep.sweep(tiny_config(**GRID | {"eval__racing": False}), str(run), str(run))
    assert len(whole) == 3 and min(whole, key=lambda one: one["fid"]) == row
    for one in whole:
        features = npz.read_npz(run / "race" / f"{one['manifest']}.npz")["features"]
        images = next(npz.npz_batches(results.samples_path(str(run), one), "arr_0", len(features)))
        np.testing.assert_allclose(features, quarters(images).pool, atol=1 / 255)


def test_a_race_refuses_several_seeds_and_too_few_images_before_it_samples(run: Path) -> None:
    with pytest.raises(UserError, match=r"eval.seeds has 2 seeds.*set eval.seeds to \(\) and eval.seed"):
        sweep.check(tiny_config(**GRID | {"eval__seeds": (0, 1)}), str(run))
    sweep.check(tiny_config(**GRID | {"eval__seeds": (), "eval__seed": 1}), str(run))
    with pytest.raises(UserError, match=r"set eval\.num_samples to 800, or eval\.racing to False"):
        sweep.check(tiny_config(**GRID | {"eval__num_samples": 100}), str(run))
    sweep.check(tiny_config(**GRID | {"eval__num_samples": 100, "eval__racing": False}), str(run))


@pytest.mark.parametrize("arrays", [{}, {"images": np.zeros((3, 4))}, {"features": np.zeros((3, 5), np.float32)}])
def test_a_file_of_other_features_is_named_with_the_remedy(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = str(tmp_path / "cell.npz")
    npz.write_npz(path, arrays)
    with pytest.raises(
        UserError, match=r"cell\.npz holds .*: remove the file, and --mode=sweep samples its images again"
    ):
        race.read_features(path, 4)
    npz.write_npz(path, {"features": np.ones((3, 4), np.float32)})
    np.testing.assert_array_equal(race.read_features(path, 4), np.ones((3, 4)))


def test_places_cover_every_axis_of_the_grid() -> None:
    config = tiny_config(**GRID | {"eval__intervals": ((), (-3.0, 1.0), (-1.0, 2.0)), "eval__weights": (0.0, 1.0)})
    rows = race.rows_of_grid(config, 7)
    places = race.places_of(rows)
    assert len(np.unique(places, axis=0)) == len(rows) == 6
    np.testing.assert_array_equal(places[:, 0], [0, 1] * 3)
    np.testing.assert_array_equal(places[::2, 1:], [[0, 1], [0.5, 0], [1, 0.5]])


def test_a_finished_race_of_other_cells_is_not_taken(run: Path) -> None:
    name = manifest.manifest_name
    rows = race.rows_of_grid(tiny_config(**GRID), 7)
    cells = [race.Cell(row, {"sampling": {"w": row["w"]}}) for row in rows]
    names = [name(cell.manifest) for cell in cells]
    assert race.winner(str(run), names) is None
    standings = [race.Standing(), race.Standing(20, 1.0, (0.9, 1.1), "best"), race.Standing()]
    race.write_standings(str(run), cells, standings)
    assert race.winner(str(run), names) == 1
    assert race.winner(str(run), names[:2]) is None and race.winner(str(run), [*names, "other"]) is None
    (run / "race.csv").write_text("damaged\n" + "line\n" * 3)
    assert race.winner(str(run), names) is None
