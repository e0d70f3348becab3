"""`--mode=compare`: the sweeps of several runs in one table, if they can be compared."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from swept import cell, sweep_again, swept, write_cells
from tiny import tiny_config

from cfd.modes import figures, fronts
from cfd.modes.compare import compare
from cfd.runs import results, workdir


def run(folder: Path, p_uncond: float, features_hash: str = "f") -> Path:
    """The folder of a run that has been swept, with its config.json."""
    swept(folder, p_uncond, features_hash)
    config = tiny_config(train__p_uncond=p_uncond).to_dict()
    workdir.write_config(folder, workdir.describe("diffusion", config, tuple("0123456789")))
    return folder


def test_runs_are_compared_in_the_layout_of_the_paper(tmp_path: Path) -> None:
    half, tenth = run(tmp_path / "half", 0.5), run(tmp_path / "tenth", 0.1)
    text = compare(tiny_config(), str(half), [str(tenth)], str(half))
    assert text.splitlines() == [
        "| w | FID-20 p_uncond = 0.1 / 0.5 | IS p_uncond = 0.1 / 0.5 |",
        "|---|---|---|",
        "| 0 | 1.00 / 5.00 | 20.00 / 20.00 |",
        "| 4 | 5.00 / 9.00 | 16.00 / 16.00 |",
    ]
    assert (half / "compare.md").read_text() == text + "\n" and (half / "compare.png").exists()


@pytest.mark.usefixtures("no_pictures")
def test_runs_of_other_weights_and_the_same_settings_are_named(tmp_path: Path) -> None:
    """As those of two networks are. A name that two runs share becomes the path of the run."""
    ours = run(tmp_path / "ours", 0.5)
    for place in (tmp_path / "theirs", tmp_path / "copies" / "ours"):
        place.mkdir(parents=True)
        sweep_again(place, 0.5, weights=str(place))
    text = compare(tiny_config(), str(ours), [str(tmp_path / "theirs")], str(ours))
    assert text.splitlines()[0] == "| w | FID-20 run = ours / theirs | IS run = ours / theirs |"
    other = str(tmp_path / "copies" / "ours")
    named = f"run = {other} / {ours}"
    assert compare(tiny_config(), str(ours), [other], str(ours)).startswith(f"| w | FID-20 {named} | IS {named} |")
    sweep_again(tmp_path / "theirs", 0.1, weights="others")
    text = compare(tiny_config(), str(ours), [str(tmp_path / "theirs")], str(ours))
    names = "run, p_uncond = ours, 0.5 / theirs, 0.1 / theirs, 0.5"
    assert text.startswith(f"| w | FID-20 {names} | IS {names} |")


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    half, tenth = run(tmp_path / "half", 0.5), run(tmp_path / "tenth", 0.1)
    text = compare(tiny_config(), str(half), [str(tenth)], str(half))
    with pytest.raises(ValueError, match=r"nothing tells them apart\. Give --runs without those that hold the rows"):
        compare(tiny_config(), str(half), [str(run(tmp_path / "again", 0.5))], str(half))
    with pytest.raises(ValueError, match="nothing tells them apart"):
        compare(tiny_config(), str(half), [str(tenth), str(half)], str(half))
    with pytest.raises(ValueError, match="different references or feature networks: copy the features folder"):
        compare(tiny_config(), str(half), [str(run(tmp_path / "fifth", 0.2, features_hash="g"))], str(half))
    (tmp_path / "other").mkdir()
    other = sweep_again(tmp_path / "other", 0.2, data="other", reference="other")
    with pytest.raises(
        ValueError, match=r"they have different data sets\. Give --runs without those of other data, or "
    ):
        compare(tiny_config(), str(half), [str(other), str(tenth)], str(half))
    with pytest.raises(ValueError, match="has no sweep"):
        compare(tiny_config(), str(half), [str(tmp_path)], str(half))
    sweep_again(half, 0.5, features_hash="g")
    with pytest.raises(ValueError, match="different references or feature networks"):
        compare(tiny_config(), str(half), [str(tenth)], str(half))
    sweep_again(half, 0.5)  # the remedy
    assert compare(tiny_config(), str(half), [str(tenth)], str(half)) == text


@pytest.mark.parametrize("damaged", [b"{}", b"[1]", b"null", b"\xff\xfe"])
def test_a_damaged_manifest_is_named_with_the_remedy(tmp_path: Path, damaged: bytes) -> None:
    half, tenth = run(tmp_path / "half", 0.5), run(tmp_path / "tenth", 0.1)
    text = compare(tiny_config(), str(half), [str(tenth)], str(half))
    last = results.latest(str(half))[-1]
    manifest = half / "manifests" / f"{last['manifest']}.json"
    manifest.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=rf"missing or damaged in .*: {manifest.name}; sweep {half} again at w = {last['w']:g}$"
    ):
        compare(tiny_config(), str(half), [str(tenth)], str(half))
    sweep_again(half, 0.5)  # the remedy
    assert compare(tiny_config(), str(half), [str(tenth)], str(half)) == text


def test_all_manifests_that_are_missing_are_named_at_once(tmp_path: Path) -> None:
    half, tenth = run(tmp_path / "half", 0.5), run(tmp_path / "tenth", 0.1)
    text = compare(tiny_config(), str(half), [str(tenth)], str(half))
    shutil.rmtree(half / "manifests")
    with pytest.raises(ValueError, match=rf"in {half}/manifests: .*; sweep {half} again at w = 0, 4$"):
        compare(tiny_config(), str(half), [str(tenth)], str(half))
    shutil.rmtree(tenth / "manifests")
    both = rf"sweep {half} again at w = 0, 4, and in {tenth}/manifests: .*; sweep {tenth} again at w = 0, 4$"
    with pytest.raises(ValueError, match=both):
        compare(tiny_config(), str(half), [str(tenth)], str(half))
    sweep_again(half, 0.5)  # the remedy
    sweep_again(tenth, 0.1)
    assert compare(tiny_config(), str(half), [str(tenth)], str(half)) == text


def test_another_folder_can_be_written_to(tmp_path: Path) -> None:
    """The table is the same, and nothing is added to the run. A sweep in the other folder takes the run's place."""
    half, tenth, out = run(tmp_path / "half", 0.5), run(tmp_path / "tenth", 0.1), tmp_path / "new" / "out"
    before = sorted(half.rglob("*"))
    text = compare(tiny_config(), str(half), [str(tenth)], str(out))
    assert sorted(half.rglob("*")) == before and (out / "compare.md").read_text() == text + "\n"
    assert compare(tiny_config(), str(half), [str(tenth)], str(half)) == text
    elsewhere = swept(tmp_path / "elsewhere", 0.2)
    text = compare(tiny_config(), str(half), [str(tenth)], str(elsewhere))
    assert "p_uncond = 0.1 / 0.2" in text and (elsewhere / "compare.md").read_text() == text + "\n"


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures, which take seconds, are not drawn."""
    monkeypatch.setattr(figures, "save_curve", lambda *args, **options: None)
    monkeypatch.setattr(fronts, "front_figure", lambda *args: None)
    monkeypatch.setattr(figures, "save_figure", lambda *args, **options: None)


def guided(folder: Path, rules: tuple[str, ...] = ("", "apg(0)"), **changes: Any) -> Path:
    """The folder of a run whose sweep has two rules. Each has a share of 0.5 + 0.1 w, and "apg(0)" has 1 less FID."""
    folder.mkdir()
    config = tiny_config().to_dict()
    workdir.write_config(folder, workdir.describe("diffusion", config, tuple("0123456789")))
    rows = []
    for rule in rules:
        for w in (0.0, 1.0, 2.0):
            fid, share = 5 + w - (rule != ""), 0.5 + 0.1 * w
            values = {"fid": [fid, fid - 0.1, fid + 0.1], "is": [9.0], "class_accuracy": [share, share, share]}
            rows.append(cell(rule, "", w, values | {"recall": [0.9]}, **changes))
    return write_cells(folder, rows)


def test_rules_are_compared_at_matched_strength_and_by_their_fronts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = guided(tmp_path / "both")
    text = compare(tiny_config(), str(both), [], str(both))
    assert f"Wrote {both}/fronts.png, matched.md and matched.csv." in capsys.readouterr().out
    assert "| apg(0) | 1 | 5.00 ± 1.27 |" in text
    found = (both / "matched.md").read_text()
    assert text.endswith(found.rstrip("\n")) and (both / "compare.md").read_text() == text + "\n"
    assert found.count("| apg(0) | classifier-free | 1 | 5.00 ± 1.27 |") == 1
    assert found.count(" | -1.00 ± 0.00 | better |") == 3
    assert len((both / "matched.csv").read_text().splitlines()) == 7
    with Image.open(both / "fronts.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.usefixtures("no_pictures")
def test_rules_of_several_runs_are_compared_as_those_of_one(tmp_path: Path) -> None:
    both = guided(tmp_path / "both")
    compare(tiny_config(), str(both), [], str(both))
    found = (both / "matched.md").read_text()
    plain, rule = guided(tmp_path / "plain", ("",)), guided(tmp_path / "rule", ("apg(0)",))
    compare(tiny_config(), str(plain), [str(rule)], str(tmp_path / "out"))
    apart = (tmp_path / "out" / "matched.md").read_text()
    assert apart == found
    with pytest.raises(ValueError, match="nothing tells them apart"):
        compare(tiny_config(), str(both), [str(rule)], str(both))


@pytest.mark.usefixtures("no_pictures")
def test_what_real_images_score_stands_below_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "save_curve", lambda *args, real, baselines: drawn.append(real))
    both = guided(tmp_path / "both")
    spread = {"mean": 2.03, "sd": 0.1, "low": 1.77, "high": 2.29}
    real = {
        "reference": "reference",
        "num_samples": 20,
        "draws": 9,
        "balanced": True,
        "fid": spread,
        "kid": None,
        "saturation": 0.03,
    }
    held_out = {"split": "test", "images": 12, "precision": 0.9, "recall": 0.8, "is": None}
    (both / "floor.json").write_text(json.dumps(real | {"held_out": held_out}))
    line = (
        "Real images: FID-20 2.03 ± 0.26 (95 % of 9 draws from the reference, each with equally many images of each "
        "class). The 12 images of the split 'test': precision 0.9, recall 0.8. Saturation of the reference: 0.03."
    )
    text = compare(tiny_config(), str(both), [], str(both))
    assert text.count(line) == 1 and (both / "matched.md").read_text().endswith(f"\n\n{line}\n")
    assert drawn == [(1.77, 2.29)]
    for other in ({"reference": "another"}, {"num_samples": 21}):
        (both / "floor.json").write_text(json.dumps(real | {"held_out": held_out} | other))
        assert "Real images" not in compare(tiny_config(), str(both), [], str(both)) and drawn.pop() is None


@pytest.mark.usefixtures("no_pictures")
def test_rules_of_different_networks_or_steps_are_not_compared_with_each_other(tmp_path: Path) -> None:
    plain, rule = guided(tmp_path / "plain", ("",)), guided(tmp_path / "rule", ("apg(0)",), weights="others")
    text = compare(tiny_config(), str(plain), [str(rule)], str(plain))
    assert text.count("no plain guidance to compare with") == 3 and "better" not in text.split("Each rule is")[0]
    respaced = guided(tmp_path / "respaced", ("apg(0)",), unlisted={"respacing": "4"})
    text = compare(tiny_config(), str(plain), [str(respaced)], str(plain))
    assert text.count("no plain guidance to compare with") == 3


@pytest.mark.usefixtures("no_pictures")
def test_sweeps_without_intervals_are_compared_without_them(tmp_path: Path) -> None:
    both = guided(tmp_path / "both")
    shutil.rmtree(both / "intervals")
    found = compare(tiny_config(), str(both), [], str(both))
    assert found.count("| -1 | no interval |") == 3


@pytest.mark.usefixtures("no_pictures")
def test_rows_of_several_seeds_are_one_curve(tmp_path: Path) -> None:
    run = guided(tmp_path / "run", ("",), seed=1)
    rows = [row | {"run": "", "weights": "weights", "without": {}} for row in results.latest(str(run))]
    write_cells(run, [row | {"seed": 2, "fid": row["fid"] + 1} for row in rows])
    text = compare(tiny_config(), str(run), [], str(run))
    assert text.splitlines()[:3] == ["| w | FID-20 | IS |", "|---|---|---|", "| 0 | 5.50 ± 6.35 | 9.00 ± 0.00 |"]
    assert text.endswith("the mean over 2 seeds (Student's t).")


@pytest.mark.usefixtures("no_pictures")
def test_without_recall_and_classes_there_are_tables_and_no_fronts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = guided(tmp_path / "both")
    rows = [row | {"run": "", "weights": "weights", "without": {}} for row in results.latest(str(both))]
    other = tmp_path / "other"
    guided(other, ())
    write_cells(other, [row | {"recall": None, "class_accuracy": None} for row in rows])
    text = compare(tiny_config(), str(other), [], str(other))
    assert "fronts.png needs recall or the asked class" in capsys.readouterr().out
    assert not (other / "fronts.png").exists() and text.count("asked class is not measured") == 6
