"""sweep.csv: rows come back as they were written, damage is named, and rows that belong together are found."""

import csv
from pathlib import Path
from typing import Any

import pytest
from swept import sweep_again, swept

from cfd.runs import results

ROW: dict[str, Any] = {
    "step": 7, "ema": 0.0, "p_uncond": 0.1, "num_steps": 4, "sampler": "ancestral", "v": 0.3,
    "guidance": "classifier-free",
    "rule": "", "guide": "", "interval": "-30:0", "w": 1.0, "num_samples": 20, "labels": "balanced",
    "seed": 1000, "features": "classifier",
    "fid_name": "FID-20", "manifest": "00e1",
}  # fmt: skip


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    row = dict.fromkeys(results.COLUMNS) | ROW | {"fid": 1 / 3, "is": 2.0, "fid_low": 0.25, "kid_se": 1e-9}
    other = row | {"interval": "", "manifest": "1", "rule": "apg(eta=0, norm=2, momentum=-0.5)", "guide": 'a "b",c@1'}
    for added in (row, other):
        results.append_row(str(tmp_path), added)
    assert results.read_rows(str(tmp_path)) == [row, other]
    with open(tmp_path / "sweep.csv", newline="") as file:
        assert next(csv.reader(file)) == list(results.COLUMNS)


def test_rows_are_counted_as_they_are_read(tmp_path: Path) -> None:
    """A last line that was cut short, and empty lines, are no rows."""
    folder = str(swept(tmp_path / "run", 0.1))
    path = tmp_path / "run" / "sweep.csv"
    for text in ("", "\n", "5,0.0,0."):
        path.write_text(path.read_text() + text)
        assert results.count_rows(folder) == len(results.read_rows(folder)) == 4
    assert results.count_rows(str(tmp_path)) == 0


def test_the_name_of_the_distance_has_the_number_of_images_and_the_network() -> None:
    names = [(49_999, "classifier", "FID-49999"), (50_000, "inception", "FID"), (500, "dinov2", "FD-DINOv2-500")]
    for count, features, name in [*names, (50_000, "dinov2", "FD-DINOv2")]:
        assert results.fid_name(count, features) == name


def earlier(folder: Path, *lines: str) -> Path:
    """A sweep.csv as an earlier version wrote it, without rules, guides and intervals."""
    header = [column for column in results.COLUMNS if column not in results.YOUNGER]
    (folder / "sweep.csv").write_text("".join(f"{line}\n" for line in (",".join(header), *lines)))
    return folder / "sweep.csv"


OLD = "7,0.1,4,ancestral,0.3,classifier-free,,0.0,20,balanced,1000,classifier,3.5,,9.0,0.5,0.25,0.75,FID-20,00e1"


def test_the_rows_of_an_earlier_version_stay_when_one_is_added(tmp_path: Path) -> None:
    path = earlier(tmp_path, OLD, OLD.replace("3.5", "0.30000000000000004"))
    (first, second), empty = results.read_rows(str(tmp_path)), dict.fromkeys(results.COLUMNS)
    measured = {"fid": 3.5, "is": 9.0, "precision": 0.5, "recall": 0.25, "class_accuracy": 0.75}
    assert first == empty | ROW | {"interval": "", "w": 0.0} | measured
    assert Path(results.samples_path(str(tmp_path), first)).name == (
        "step-7_num_steps-4_sampler-ancestral_v-0.3_guidance-classifier-free_w-0.0_num_samples-20_labels-balanced"
        "_seed-1000_manifest-00e1.npz"
    )
    added = empty | ROW | {"rule": "cfgpp()", "fid": 1.0, "fid_low": 0.5}
    with open(path, "a") as file:
        file.write(OLD[:20])  # a kill while an earlier version wrote
    for rows in ([first, second, added], [first, second, added, added]):
        results.append_row(str(tmp_path), added)
        assert results.read_rows(str(tmp_path)) == rows
    assert len(path.read_text().splitlines()) == 5 and "0.30000000000000004" in path.read_text()


def test_a_damaged_row_of_an_earlier_version_is_named_before_and_after_one_is_added(tmp_path: Path) -> None:
    earlier(tmp_path, OLD, "7,0.1,x", OLD)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"sweep\.csv: line 3 is damaged: delete it"):
            results.read_rows(str(tmp_path))
        results.append_row(str(tmp_path), dict.fromkeys(results.COLUMNS) | ROW)


def test_the_name_of_a_file_of_images_is_safe_and_short_whatever_the_rule(tmp_path: Path) -> None:
    long = ROW | {"rule": "feedback(pi=0.9, temperature=1e-3, offset=0, w_max=4) + dynamic_threshold(percentile=99.5)"}
    long |= {"guide": "gs://a-bucket/runs/of an experiment/that has a name:é@123456", "seed": 2**32 - 1}
    long |= {"interval": "-12.345678901234567:12.345678901234567", "num_samples": 50_000, "w": 0.30000000000000004}
    name = Path(results.samples_path(str(tmp_path), long | {"manifest": "0" * 16, "step": 1_000_000})).name
    assert "rule-feedback_pi_0.9" in name and len(f"{name}.1234567.tmp") <= 255
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_what_was_measured_of_parts_comes_back(tmp_path: Path) -> None:
    without = {"fid": [1.0, 1 / 3], "kid": [-1e-9, 0.0]}
    assert results.read_without(str(tmp_path), ROW) is None
    results.write_without(str(tmp_path), ROW["manifest"], without)
    assert results.read_without(str(tmp_path), ROW) == without
    for damaged in ("{", "3", '{"fid": 3}', '{"fid": [1.0, "2"]}', '{"fid": [true]}', '{"fid": null, "kid": [0.0]}'):
        (tmp_path / "intervals" / "00e1.json").write_text(damaged)
        assert results.read_without(str(tmp_path), ROW) is None
    classes = [{"class": "a, b", "images": 3, "precision": None}, {"class": "c", "images": 4, "precision": 0.5}]
    results.write_classes(str(tmp_path), ROW["manifest"], classes)
    with open(tmp_path / "classes" / "00e1.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [list(line.values()) for line in found] == [["a, b", "3", ""], ["c", "4", "0.5"]]


def test_the_name_of_a_file_of_images_has_no_colon(tmp_path: Path) -> None:
    """`scp` and `rsync` take what is before a colon for a host. Files of earlier versions, which had one, are found."""
    path = Path(results.samples_path(str(tmp_path), ROW))
    assert ":" not in path.name and "interval--30_0_w-1.0" in path.name
    earlier = path.with_name(path.name.replace("-30_0", "-30:0"))
    earlier.parent.mkdir()
    earlier.touch()
    assert results.samples_path(str(tmp_path), ROW) == str(earlier)
    path.touch()
    assert results.samples_path(str(tmp_path), ROW) == str(path)


@pytest.mark.parametrize("damage", ["5\n", "7,0.1,x\n", "\xff\n"])
def test_a_damaged_row_is_named(tmp_path: Path, damage: str) -> None:
    results.append_row(str(tmp_path), ROW | dict.fromkeys(results.MEASURED, 1.0))
    with open(tmp_path / "sweep.csv", "a", encoding="latin-1") as file:
        file.write(damage)
    with pytest.raises(ValueError, match=r"sweep\.csv: line 3 is damaged: delete it"):
        results.read_rows(str(tmp_path))


@pytest.mark.parametrize("setting", ["step", "p_uncond", "num_steps", "v", "w", "num_samples", "seed"])
def test_a_row_without_a_setting_is_damaged(tmp_path: Path, setting: str) -> None:
    """A measure may be missing, and a setting that is a number may not."""
    results.append_row(str(tmp_path), ROW | {"fid": None})
    assert results.read_rows(str(tmp_path))[0]["fid"] is None
    results.append_row(str(tmp_path), ROW | {setting: None})
    with pytest.raises(ValueError, match=r"sweep\.csv: line 3 is damaged: delete it"):
        results.read_rows(str(tmp_path))


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.csv").write_text("w,fid\n0.0,3.0\n")
    with pytest.raises(ValueError, match="has other columns than this version writes"):
        results.read_rows(str(tmp_path))


def test_a_curve_has_one_reference(tmp_path: Path) -> None:
    """A weight that is swept with another feature network replaces the whole curve, not one point of it."""
    folder = swept(tmp_path / "run", 0.1)
    rows = results.latest(str(folder))
    assert [(row["step"], row["w"]) for row in rows] == [(3, 0.0), (3, 4.0), (5, 0.0), (5, 4.0)]
    sweep_again(folder, 0.1, eval__weights=(1.0,))  # one more weight of the same sweep
    assert [row["w"] for row in results.latest(str(folder)) if row["step"] == 5] == [0.0, 4.0, 1.0]
    sweep_again(folder, 0.1, features_hash="g", eval__weights=(1.0,))
    assert [row["w"] for row in results.latest(str(folder))] == [1.0, 1.0]
    assert len(results.read_rows(str(folder))) == 8
    sweep_again(folder, 0.1, eval__weights=(1.0, 2.0))  # brings the first rows back
    assert sorted(row["w"] for row in results.latest(str(folder)) if row["step"] == 5) == [0.0, 1.0, 2.0, 4.0]
