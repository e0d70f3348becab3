"""Rules, guides and seeds as axes of a sweep: images are equal where two cells mean the same; resumed at any cell."""

import csv
from pathlib import Path
from typing import Any

import mixing
import numpy as np
import pytest
from meshes import mesh_of
from swept import pixels
from tiny import tiny_config

from cfd.devices import parallel, preemption
from cfd.evaluation.features import FeatureNetwork
from cfd.modes import measuring, sampler, settings, sweep
from cfd.runs import manifest, npz, results
from cfd.runs.digest import weights_hash

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning"),
]


def earlier() -> Any:
    """The parameters of step 3."""
    params = mixing.params()
    return params | {"mix": 0.5 * params["mix"]}


@pytest.fixture
def run(mixing_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run with the steps 3 and 7, swept on one device."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    monkeypatch.setattr(sweep, "open_features", lambda *_: FeatureNetwork("classifier", "f" * 64, pixels))
    monkeypatch.setattr(settings, "open_run", mixing.opening(mixing.params(), earlier={3: earlier()}))
    return mixing_run


def swept(run: Path, **changes: Any) -> list[results.Row]:
    return sweep.sweep(tiny_config(**changes), str(run), str(run))


def images_of(run: Path, row: results.Row) -> np.ndarray:
    return npz.read_npz(results.samples_path(str(run), row))["arr_0"]


@pytest.mark.slow
def test_cells_that_mean_the_same_have_the_same_images(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile_sampler = [], sampler.compile_sampler
    monkeypatch.setattr(
        measuring, "compile_sampler", lambda *given: compiled.append(given[1:]) or compile_sampler(*given)
    )
    alone = ("interval(-2, 30)", "apg(eta=1, norm=inf, momentum=0)", "other_labels()")
    both, one = (0.0, 2.0), (2.0,)
    rows = swept(run, eval__rules=("", ("constant()", both), *((rule, one) for rule in alone)), eval__weights=both)
    rows += swept(run, eval__intervals=((-2.0, 30.0),), eval__weights=one)
    rows += swept(run, eval__rules=("", ("cfgpp()", one)), eval__guides=("@7", "@3"), eval__weights=both)
    rows += swept(run, eval__seeds=(5, 1000), eval__weights=(0.0,))
    images = {
        (row["rule"].partition("(")[0], row["guide"], row["interval"], row["seed"], row["w"]): images_of(run, row)
        for row in rows
    }
    assert len(rows) == 7 + 1 + 6 + 2 and len(images) == len({row["manifest"] for row in rows}) == len(rows) - 1

    plain, guided = images["", "", "", 1000, 0.0], images["", "", "", 1000, 2.0]
    np.testing.assert_array_equal(images["constant", "", "", 1000, 2.0], guided)
    np.testing.assert_array_equal(images["constant", "", "", 1000, 0.0], plain)
    np.testing.assert_array_equal(images["interval", "", "", 1000, 2.0], images["", "", "-2:30", 1000, 2.0])
    mixing.assert_same_images(images["apg", "", "", 1000, 2.0], guided)
    np.testing.assert_array_equal(images["", "@3", "", 1000, 0.0], plain)
    for name in ("", "cfgpp"):  # leading away from oneself does nothing
        mixing.assert_same_images(images[name, "@7", "", 1000, 2.0], plain)
    different = [
        plain, guided, images["", "", "", 5, 0.0], images["", "", "-2:30", 1000, 2.0],
        images["other_labels", "", "", 1000, 2.0], images["", "@3", "", 1000, 2.0],
        images["cfgpp", "@3", "", 1000, 2.0],
    ]  # fmt: skip
    assert len({image.tobytes() for image in different}) == len(different)
    # A program per rule, of which interval() needs none of its own; both guides share theirs.
    assert len(compiled) == 4 + 1 + 2 + 1

    made = {row["guide"]: manifest.read_manifest(str(run), row["manifest"]) for row in rows}
    assert {guide: found and found["guide"] for guide, found in made.items()} == {
        "": {},
        "@7": {"sha256": weights_hash(mixing.params()), "step": 7, "run": ""},
        "@3": {"sha256": weights_hash(earlier()), "step": 3, "run": ""},
    }


def test_a_sweep_over_rules_and_guides_is_resumed_at_any_cell(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid: dict[str, Any] = dict(
        eval__rules=("rescale(0.5)", ("cfgpp()", (-1.0,))), eval__guides=("", "@3"), eval__weights=(0.0, 2.0)
    )
    asked = iter([False] * 7 + [True])
    monkeypatch.setattr(preemption, "requested", lambda: next(asked, False))
    with pytest.raises(preemption.Stopped):
        swept(run, **grid)
    before = results.read_rows(str(run))
    assert 0 < len(before) < 6
    capsys.readouterr()
    rows = swept(run, **grid)
    said = capsys.readouterr().out
    assert f"{len(before)} of 6 cells are in" in said and "rescale(phi=0.5)  @3  w 2  fid" in said
    cells = [(row["guide"], row["rule"], row["w"]) for row in rows]
    rules = [("rescale(phi=0.5)", 0.0), ("rescale(phi=0.5)", 2.0), ("cfgpp()", -1.0)]
    assert cells == [(guide, *rule) for guide in ("", "@3") for rule in rules]
    assert rows[: len(before)] == before and results.read_rows(str(run)) == rows
    assert swept(run, **grid) == rows


def test_the_rows_of_an_earlier_version_are_measured_again_and_stay(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = swept(run, eval__weights=(2.0,))
    made = manifest.read_manifest(str(run), row["manifest"])
    assert made is not None
    del made["guide"], made["sampling"]["rule"], made["sampling"]["guide"]
    manifest.write_manifest(str(run), made)
    old = row | {"manifest": manifest.manifest_name(made)}
    columns = [column for column in results.COLUMNS if column not in results.YOUNGER]
    with open(run / "sweep.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerow(old)
    capsys.readouterr()
    assert swept(run, eval__weights=(2.0,)) == [row]
    assert "1 cells have rows of an earlier version" in capsys.readouterr().out
    first, second = results.read_rows(str(run))
    assert second == row and first == old | dict.fromkeys(results.YOUNGER) | {"ema": 0.0, "rule": "", "guide": ""}
    assert results.latest(str(run)) == [row], "the two belong to one curve"


def test_a_network_without_an_unconditional_score_is_guided_by_a_guide(run: Path) -> None:
    """p_uncond = 0. Plain guidance and rules that need ∅ are refused."""
    rows = swept(run, train__p_uncond=0.0, eval__guides=("@3",), eval__weights=(2.0,))
    rows += swept(run, train__p_uncond=0.0, eval__rules=("other_labels()",), eval__weights=(2.0,))
    assert all(row["fid"] is not None for row in rows)
    for rule, words in (("", "w = 2 needs"), ("rescale(0.5)", r"the rule 'rescale\(phi=0\.5\)' needs")):
        with pytest.raises(ValueError, match=f"{words} the unconditional score"):
            sweep.check(tiny_config(train__p_uncond=0.0, eval__rules=(rule,), eval__weights=(2.0,)), str(run))
    with pytest.raises(ValueError, match="needs the conditional score"):
        config = tiny_config(train__p_uncond=1.0, eval__guides=("@3",), eval__weights=(-1.0,))
        sweep.check(config, str(run))


def test_a_rule_s_interval_without_a_step_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"the guidance interval \(-1, 1\) .* has no effect with 4 steps"):
        sweep.check(tiny_config(eval__rules=("interval(-1, 1)",)), str(run))


def test_the_operations_of_a_guide_of_another_size_are_counted() -> None:
    """It is evaluated in the second evaluation of a step, inside the interval alone."""
    small = sampler.Network(lambda params: lambda z, logsnr, labels: params * z, (8, 8, 1))
    guide, params = sampler.Guide(small, np.float32(1.0)), mixing.params()
    config = tiny_config(eval__rules=("", "rescale(0.5)"), eval__weights=(0.0, 2.0), eval__guides=("small",))
    sampling = settings.sampling_of(config)
    model = measuring.Model(
        mixing.NETWORK, sampling, lambda *_: params, None, mesh_of(1), lambda text: guide if text else None
    )
    cells = [sweep.Cell(row, {}) for row in sweep.rows_of_grid(config, 7)]
    costs = [
        sampler.evaluations(measuring.sampling_of_row(model, row), row["w"], measuring.interval_of(row))
        for row, _ in cells
    ]
    assert costs == [4, 8, 8, 8]
    own, theirs = sampler.evaluation_flops(mixing.NETWORK, params), sampler.evaluation_flops(small, guide.params)
    assert measuring.total_flops(model, cells, costs) == pytest.approx(20 * (16 * own + 12 * theirs))
