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
    text = compare(tiny_config(), str(half), [str(tenth)])
    assert text.splitlines() == [
        "| w | FID-20 p_uncond = 0.1 / 0.5 | IS p_uncond = 0.1 / 0.5 |",
        "|---|---|---|",
        "| 0 | 1.00 / 5.00 | 20.00 / 20.00 |",
        "| 4 | 5.00 / 9.00 | 16.00 / 16.00 |",
    ]
    assert (half / "compare.md").read_text() == text + "\n" and (half / "compare.png").exists()


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    half, tenth = run(tmp_path / "half", 0.5), run(tmp_path / "tenth", 0.1)
    text = compare(tiny_config(), str(half), [str(tenth)])
    with pytest.raises(ValueError, match="nothing tells them apart"):
        compare(tiny_config(), str(half), [str(run(tmp_path / "again", 0.5))])
    with pytest.raises(ValueError, match="different references or feature networks"):
        compare(tiny_config(), str(half), [str(run(tmp_path / "fifth", 0.2, features_hash="g"))])
    with pytest.raises(ValueError, match="has no sweep"):
        compare(tiny_config(), str(half), [str(tmp_path)])
    sweep_again(half, 0.5, features_hash="g")
    with pytest.raises(ValueError, match="different references or feature networks"):
        compare(tiny_config(), str(half), [str(tenth)])
    sweep_again(half, 0.5)  # the remedy
    assert compare(tiny_config(), str(half), [str(tenth)]) == text


@pytest.mark.parametrize("damaged", [b"{}", b"[1]", b"null", b"\xff\xfe"])
def test_a_damaged_manifest_is_named_with_the_remedy(tmp_path: Path, damaged: bytes) -> None:
    half, tenth = run(tmp_path / "half", 0.5), run(tmp_path / "tenth", 0.1)
    text = compare(tiny_config(), str(half), [str(tenth)])
    last = results.latest(str(half))[-1]
    manifest = half / "manifests" / f"{last['manifest']}.json"
    manifest.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=rf"{manifest.name} is missing or damaged: sweep .* again at w = {last['w']:g}"
    ):
        compare(tiny_config(), str(half), [str(tenth)])
    sweep_again(half, 0.5)  # the remedy
    assert compare(tiny_config(), str(half), [str(tenth)]) == text
