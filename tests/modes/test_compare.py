"""`--mode=compare`: the sweeps of several runs in one table, if they can be compared."""

from pathlib import Path

import pytest
from swept import sweep_again, swept
from tiny import tiny_config

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


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    half, tenth = run(tmp_path / "half", 0.5), run(tmp_path / "tenth", 0.1)
    text = compare(tiny_config(), str(half), [str(tenth)], str(half))
    with pytest.raises(ValueError, match="nothing tells them apart"):
        compare(tiny_config(), str(half), [str(run(tmp_path / "again", 0.5))], str(half))
    with pytest.raises(ValueError, match="different references or feature networks"):
        compare(tiny_config(), str(half), [str(run(tmp_path / "fifth", 0.2, features_hash="g"))], str(half))
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
        ValueError, match=rf"{manifest.name} is missing or damaged: sweep .* again at w = {last['w']:g}"
    ):
        compare(tiny_config(), str(half), [str(tenth)], str(half))
    sweep_again(half, 0.5)  # the remedy
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
