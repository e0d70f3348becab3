"""The length of the EMA as an axis of a sweep, and as that of a guide."""

import csv
from pathlib import Path

import mixing
import numpy as np
import pytest
from meshes import mesh_of
from swept import cell, pixels, sweep_again
from tiny import tiny_config

from cfd.devices import parallel
from cfd.evaluation.features import FeatureNetwork
from cfd.modes import compare, emas, guides, race, sampler, sweep, tables
from cfd.modes.report import report
from cfd.modes.sample import sample
from cfd.runs import manifest, npz, results, workdir
from cfd.runs.digest import weights_hash

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning"),
]


@pytest.fixture
def run(mixing_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run at step 7, swept on one device, whose EMA of length s has 1 − s times its weights."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    monkeypatch.setattr(sweep, "open_features", lambda *_: FeatureNetwork("classifier", "0" * 64, pixels))
    workdir.write_config(mixing_run, workdir.describe("diffusion", tiny_config().to_dict(), mixing.DIGITS))
    return mixing_run


def images_of(folder: Path, row: results.Row) -> np.ndarray:
    return npz.read_npz(results.samples_path(str(folder), row))["arr_0"]


def test_a_sweep_over_lengths_is_the_sweeps_of_each_length(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    traced, guided_sample = [], sampler.guided_sample
    monkeypatch.setattr(sampler, "guided_sample", lambda *a, **k: traced.append(1) or guided_sample(*a, **k))
    folder, config = str(run), tiny_config(eval__emas=(0.1, 0.0, 0.05), eval__weights=(0.0, 2.0))
    rows = sweep.sweep(config, folder, folder)
    assert len(traced) == 1, "one compiled program serves all lengths"
    assert [(row["ema"], row["w"]) for row in rows] == [(e, w) for e in (0.1, 0.0, 0.05) for w in (0.0, 2.0)]
    assert {row["step"] for row in rows} == {7}
    for row in rows:
        made = manifest.read_manifest(folder, row["manifest"])
        expected = {name: np.float32(1 - row["ema"]) * x for name, x in mixing.params().items()}
        assert made is not None and made["weights"]["sha256"] == weights_hash(expected)
        recorded = {"ema": row["ema"]} if row["ema"] else {"ema_decay": config.train.ema_decay}
        assert {key: x for key, x in made["weights"].items() if key.startswith("ema")} == recorded
        assert ("_ema-" in results.samples_path(folder, row)) == (row["ema"] > 0)
    assert sweep.sweep(config, folder, folder) == rows and len(results.read_rows(folder)) == 6

    # Each length alone, in other folders: the same images, numbers and manifests.
    for length, expected in ((0.1, rows[:2]), (0.0, rows[2:4])):
        out = tmp_path / f"alone{length}"
        alone = sweep.sweep(tiny_config(sample__ema=length, eval__weights=(0.0, 2.0)), folder, str(out))
        assert alone == expected
        np.testing.assert_array_equal(images_of(out, alone[1]), images_of(run, expected[1]))

    said = capsys.readouterr().out
    assert "FID-20 ema = the run's own / 0.05 / 0.1" in said and "EMA 0.1  T 4  w 2  fid" in said
    assert (run / "sweep_emas.png").exists() and not (tmp_path / "alone0.1" / "sweep_emas.png").exists()
    assert "<h2>EMA lengths</h2>" in Path(report(folder, folder)).read_text()
    assert race.places_of(rows).shape == (6, 2), "a race knows both axes"


def test_a_guide_has_a_length_of_its_own(run: Path) -> None:
    config = tiny_config(eval__guides=("~0.1", "@7~0.2"), eval__emas=(0.0, 0.1), eval__weights=(1.0,))
    rows = sweep.sweep(config, str(run), str(run))
    found = {(row["ema"], row["guide"]): row for row in rows}
    assert len(found) == 4
    made = manifest.read_manifest(str(run), found[0.0, "@7~0.2"]["manifest"])
    assert made is not None and made["guide"]["ema"] == 0.2 and made["guide"]["step"] == 7
    # A network guided by itself is not guided.
    (plain,) = sweep.sweep(tiny_config(sample__ema=0.1, eval__weights=(0.0,)), str(run), str(run))
    mixing.assert_same_images(images_of(run, found[0.1, "~0.1"]), images_of(run, plain))
    assert (images_of(run, found[0.0, "~0.1"]) != images_of(run, found[0.0, "@7~0.2"])).any()


@pytest.mark.parametrize(
    ("guide", "place", "step", "length"),
    [
        ("~0.1", "", None, 0.1),
        ("@100~.05", "", 100, 0.05),
        ("runs/small~0.2", "runs/small", None, 0.2),
        ("runs/small@20~0.25", "runs/small", 20, 0.25),
        ("runs/a~1", "runs/a~1", None, 0.0),
        ("~/runs/a@3", "~/runs/a", 3, 0.0),
    ],
)
def test_a_guide_names_a_length(guide: str, place: str, step: int | None, length: float) -> None:
    assert guides.length_of(guide) == length
    assert tiny_config(sample__guide=guide).sample.guide == guide
    if not place.startswith("~"):
        assert guides.split(guide) == (place, step)


def test_a_guide_with_a_length_out_of_range_is_refused() -> None:
    for guide in ("~0.3", "runs/a~0.0", "runs/a@3~1.5"):
        with pytest.raises(ValueError, match=r"expected .*'~EMA' at its end, .* a number > 0 and <= 0\.288675"):
            tiny_config(sample__guide=guide)


def test_a_guide_of_another_run_without_averages_is_refused(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, workdir.describe("diffusion", tiny_config().to_dict(), mixing.DIGITS))
    (tmp_path / workdir.CHECKPOINTS / "3").mkdir(parents=True)
    guides.check(tiny_config(), (f"{tmp_path}@3",), mixing.DIGITS)
    with pytest.raises(ValueError, match=r"length 0\.1 is asked for, and .* keeps no averages"):
        guides.check(tiny_config(), (f"{tmp_path}@3~0.1",), mixing.DIGITS)


def test_a_sample_names_its_length(run: Path) -> None:
    paths = [Path(sample(tiny_config(sample__ema=length), str(run), str(run))) for length in (0.0, 0.1)]
    images = [npz.read_npz(str(path)[:-4] + ".npz")["arr_0"] for path in paths]
    assert paths[0] != paths[1] and (images[0] != images[1]).any()


def test_rows_of_an_earlier_version_have_the_own_ema(tmp_path: Path) -> None:
    """A sweep.csv without the column is read, and gets it with the next row."""
    sweep_again(tmp_path, 0.1)
    path = tmp_path / "sweep.csv"
    with open(path) as file:
        before = list(csv.DictReader(file))
    with open(path, "w") as file:
        writer = csv.DictWriter(file, [key for key in before[0] if key != "ema"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(before)
    old = results.read_rows(str(tmp_path))
    assert len(old) == 4 and {row["ema"] for row in old} == {0.0}
    sweep_again(tmp_path, 0.1, eval__weights=(0.0, 1.0, 4.0), eval__emas=(0.0, 0.1))
    rows = results.read_rows(str(tmp_path))
    assert [row["ema"] for row in rows[:4]] == [0.0] * 4 and {row["ema"] for row in rows[4:]} == {0.0, 0.1}
    assert rows[:4] == old and len(compare.rows_at(str(tmp_path), 5)) == 6


def test_the_picture_has_a_map_for_each_guide() -> None:
    def row(ema: float, w: float, fid: float, guide: str = "") -> results.Row:
        return cell("", guide, w, {"fid": (fid, fid - 0.1, fid + 0.1)}, ema=ema, **{"is": None})

    plane = [row(e, w, 3 + (e - 0.1) ** 2 + (w - 1) ** 2) for e in (0.0, 0.05, 0.1) for w in (0.0, 1.0)]
    figure = emas.figure([*plane, row(0.05, 1.0, 2.0, "@3"), row(0.1, 1.0, 2.5, "@3")], (1.0, 1.5))
    left, right, *others = (axes for axes in figure.axes if axes.get_label() != "<colorbar>")
    assert len(others) == 2 and left.get_title() == "guide = classifier-free"
    assert [text.get_text() for text in left.get_yticklabels()] == ["the run's own", "0.05", "0.1"]
    (frame,) = (patch for patch in left.patches)
    assert frame.get_xy() == (0.5, 1.5), "the best is at w = 1 and 0.1"
    assert {text.get_text() for text in left.texts} >= {"4.01", "3"}
    curves = [line for line in right.get_lines() if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in curves] == [[0.05, 0.1]] * 2
    assert tables.in_words("ema", 0.0) == "the run's own"
