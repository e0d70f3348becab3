"""sweep.csv: rows come back as they were written, damage is named, and rows that belong together are found."""

import csv
from pathlib import Path
from typing import Any

import pytest
from swept import sweep_again, swept

from cfd.runs import results

ROW: dict[str, Any] = {
    "step": 7, "p_uncond": 0.1, "num_steps": 4, "sampler": "ancestral", "v": 0.3, "guidance": "classifier-free",
    "interval": "-30:0", "w": 1.0, "num_samples": 20, "labels": "balanced", "seed": 1000, "features": "classifier",
    "fid_name": "FID-20", "manifest": "00e1",
}  # fmt: skip


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    row = ROW | dict.fromkeys(results.MEASURED) | {"fid": 1 / 3, "is": 2.0}
    other = row | {"interval": "", "manifest": "1"}
    for added in (row, other):
        results.append_row(str(tmp_path), added)
    assert results.read_rows(str(tmp_path)) == [row, other]
    with open(tmp_path / "sweep.csv", newline="") as file:
        assert next(csv.reader(file)) == list(results.COLUMNS)
    assert results.fid_name(49_999) == "FID-49999" and results.fid_name(50_000) == "FID"


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
