"""The step of training as an axis of a sweep, and results in another folder than the run's."""

from pathlib import Path
from typing import Any

import mixing
import numpy as np
import pytest
from meshes import mesh_of
from swept import swept
from tiny import tiny_config

from cfd.devices import parallel
from cfd.evaluation.features import FeatureNetwork, Outputs
from cfd.modes import compare, sampler, settings, sweep, tables
from cfd.modes.report import report
from cfd.modes.sample import sample
from cfd.runs import manifest, npz, results, workdir
from cfd.runs.digest import weights_hash

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning"),
]


def quarters(images: np.ndarray) -> Outputs:
    """Features without a network: the mean of each quarter of an image, and a class by its brightness."""
    pool = images.reshape(len(images), 4, -1).mean(axis=2) / 255.0
    return Outputs(pool, None, np.eye(10)[(images.mean(axis=(1, 2, 3)) / 25.6).astype(int)])


def params_at(step: int) -> Any:
    params = mixing.params()
    return params | {"mix": np.float32(step / 7) * params["mix"]}


@pytest.fixture
def run(mixing_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run with the steps 3, 5 and 7, swept on one device."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    network = FeatureNetwork("classifier", "0" * 64, quarters)
    monkeypatch.setattr(sweep, "open_features", lambda *_: network)
    earlier = {step: params_at(step) for step in (3, 5)}
    monkeypatch.setattr(settings, "open_run", mixing.opening(params_at(7), earlier=earlier))
    workdir.write_config(mixing_run, workdir.describe("diffusion", tiny_config().to_dict(), mixing.DIGITS))
    return mixing_run


def images_of(folder: Path, row: results.Row) -> np.ndarray:
    return npz.read_npz(results.samples_path(str(folder), row))["arr_0"]


def test_a_sweep_over_steps_is_the_sweeps_of_each_step(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    traced, guided_sample = [], sampler.guided_sample
    monkeypatch.setattr(sampler, "guided_sample", lambda *a, **k: traced.append(1) or guided_sample(*a, **k))
    folder, config = str(run), tiny_config(eval__steps=(7, 3, 5), eval__weights=(0.0, 2.0))
    rows = sweep.sweep(config, folder, folder)
    assert len(traced) == 1, "one compiled program serves all steps"
    assert [(row["step"], row["w"]) for row in rows] == [(7, 0.0), (7, 2.0), (3, 0.0), (3, 2.0), (5, 0.0), (5, 2.0)]
    for row in rows:
        made = manifest.read_manifest(folder, row["manifest"])
        assert made is not None and made["weights"]["sha256"] == weights_hash(params_at(row["step"]))
    assert sweep.sweep(config, folder, folder) == rows and len(results.read_rows(folder)) == 6

    # Each step alone, in other folders: the same images, numbers and manifests.
    for step, expected in ((3, rows[2:4]), (-1, rows[:2])):
        out = tmp_path / f"alone{step}"
        alone = sweep.sweep(tiny_config(sample__step=step, eval__weights=(0.0, 2.0)), folder, str(out))
        assert alone == expected
        for row in alone:
            np.testing.assert_array_equal(images_of(out, row), images_of(run, row))

    said = capsys.readouterr().out
    assert "FID-20 step = 3 / 5 / 7" in said and "step 3  T 4  w 2  fid" in said
    assert list(tables.curves(rows)) == ["step = 3", "step = 5", "step = 7"]
    along = tables.curves(rows, axis="step")
    assert {name: [row["step"] for row in line] for name, line in along.items()} == {
        "w = 0": [3, 5, 7],
        "w = 2": [3, 5, 7],
    }
    assert (run / "sweep_steps.png").exists() and not (tmp_path / "alone3" / "sweep_steps.png").exists()
    assert len(list((run / "samples").glob("sweep_*.png"))) == 3
    page = Path(report(folder, folder)).read_text()
    assert "step = 7, T = 4" in page and "<h2>Steps</h2>" in page, "the explorer shows the newest step"


def test_a_sample_is_taken_at_its_step(run: Path) -> None:
    paths = {step: Path(sample(tiny_config(sample__step=step), str(run), str(run))) for step in (3, 7, -1)}
    assert paths[-1] == paths[7] and "step_0000003" in paths[3].name
    assert paths[3].name.replace("0000003", "0000007") == paths[7].name, "the step is no other setting"
    assert (
        npz.read_npz(str(paths[3])[:-4] + ".npz")["arr_0"] != npz.read_npz(str(paths[7])[:-4] + ".npz")["arr_0"]
    ).any()


def test_runs_are_compared_at_a_step(tmp_path: Path) -> None:
    folder = str(swept(tmp_path / "run", 0.1))
    assert [row["step"] for row in compare.rows_at(folder, -1)] == [5, 5]
    assert [row["step"] for row in compare.rows_at(folder, 3)] == [3, 3]
    with pytest.raises(ValueError, match=r"was swept at step 3, 5, and sample.step is 4: set it to one of these"):
        compare.rows_at(folder, 4)


def test_results_in_another_folder_leave_the_run_as_it_is(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before, out = sorted(run.rglob("*")), tmp_path_factory.mktemp("other") / "out"
    (row,) = sweep.sweep(tiny_config(eval__weights=(2.0,)), str(run), str(out))
    path = sample(tiny_config(), str(run), str(out))
    assert sorted(run.rglob("*")) == before
    assert results.read_rows(str(out)) == [row] and images_of(out, row).shape == (20, 8, 8, 1)
    assert Path(path).parent == out / "samples" and (out / "sweep.png").exists()
    assert not list(out.rglob("*.tmp"))


def test_the_feature_classifier_of_the_run_is_used_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    opened: list[str] = []
    network = FeatureNetwork("classifier", "f", quarters)
    monkeypatch.setattr(sweep, "open_classifier", lambda folder, *_, **__: opened.append(folder) or network)
    folder, out, config = tmp_path / "run", tmp_path / "out", tiny_config()
    train = settings.open_split(config, "train")
    for place in (folder, out):
        sweep.open_features(config, str(folder), str(out), mesh_of(1), train)
        (place / "features").mkdir(parents=True)
        (place / "features" / "classifier.npz").touch()
    sweep.open_features(config, str(folder), str(out), mesh_of(1), train)
    assert opened == [str(out), str(folder), str(out)]
    assert capsys.readouterr().out.count(f"The feature classifier is that of the run, in {folder}/features.") == 1
