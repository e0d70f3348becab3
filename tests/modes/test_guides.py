"""Guides: what their text names, and that a run that does not fit is refused before hours of training."""

from pathlib import Path
from typing import Any

import mixing
import pytest
from meshes import mesh_of
from tiny import tiny_config

from cfd.modes import guides, train
from cfd.runs import workdir


@pytest.mark.parametrize(
    ("guide", "expected"),
    [
        ("@100", ("", 100)),
        ("runs/small", ("runs/small", None)),
        ("runs/small@20", ("runs/small", 20)),
        ("a@b", ("a@b", None)),
        ("a@b@7", ("a@b", 7)),
    ],
)
def test_a_guide_is_a_run_and_a_step(guide: str, expected: tuple[str, int | None]) -> None:
    assert guides.split(guide) == expected
    assert tiny_config(sample__guide=guide).sample.guide == guide


def other_run(
    folder: Path, kind: str = "diffusion", names: Any = mixing.DIGITS, steps: Any = (), **changes: Any
) -> str:
    """The folder of another run, which has checkpoints of these steps in name alone."""
    workdir.write_config(folder, workdir.describe(kind, tiny_config(**changes).to_dict(), names))
    for step in steps:
        (folder / workdir.CHECKPOINTS / str(step)).mkdir(parents=True)
    return str(folder)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (dict(kind="classifier"), "is no run of a diffusion model"),
        (dict(data__image_size=4), r"has images of shape \(4, 4, 1\), and the run of shape \(8, 8, 1\)"),
        (dict(names=mixing.DIGITS[:9], data__num_classes=9), "has 9 classes, and the run 10"),
        (dict(names=(*mixing.DIGITS[:9], "nine")), "class 9 is 'nine' in the guide .* and '9' in the run"),
        (dict(train__p_uncond=1.0), r"was trained without labels \(train\.p_uncond = 1\)"),
        (dict(process__logsnr_max=5.0), r"was trained on λ in \[-20, 5\], which does not cover the run's \[-20, 20\]"),
        (dict(), r"names a checkpoint that is not there: name another run, or leave the guide out"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(tmp_path: Path, made: dict[str, Any], words: str) -> None:
    place = other_run(tmp_path / "other", **made)
    with pytest.raises(ValueError, match=words):
        guides.check(tiny_config(), ("", "@3", place), mixing.DIGITS)


def test_a_guide_is_asked_for_at_a_step_that_it_has(tmp_path: Path) -> None:
    place = other_run(tmp_path / "other", steps=(20, 40))
    guides.check(tiny_config(), (place, f"{place}@20"), mixing.DIGITS)
    with pytest.raises(ValueError, match=r"names a step 30 that is not there: take one of \[20, 40\], as .*other@STEP"):
        guides.check(tiny_config(), (f"{place}@30",), mixing.DIGITS)
    with pytest.raises(ValueError, match=rf"names {tmp_path}/none, which is no run of a diffusion model"):
        guides.check(tiny_config(), (f"{tmp_path}/none@30",), mixing.DIGITS)


def test_a_step_of_the_run_itself_must_be_there_when_training_ends(tmp_path: Path) -> None:
    """The remedy is followed."""
    with pytest.raises(
        ValueError, match=r"or a guide has 1, which will not be there .* set train\.snapshot_every_steps"
    ):
        train.check_steps(tiny_config(eval__guides=("", "@1")), str(tmp_path))
    train.check_steps(tiny_config(eval__guides=("", "@1"), train__snapshot_every_steps=1), str(tmp_path))


def test_sample_grids_of_training_have_no_guide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample\.guide is '@2', and sample grids are drawn during training"):
        train.preview(tiny_config(sample__guide="@2"), mesh_of(1), str(tmp_path), mixing.DIGITS)
