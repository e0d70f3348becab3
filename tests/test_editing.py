"""launch/editing.ipynb: the stored numbers say what the text says, and a slow test executes all cells."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from test_notebook import NOTEBOOK as COLAB
from test_notebook import cells, from_the_checkout, kernel, nbformat, pictures, printed, stopped
from tiny import ROOT

from cfd.data.digits import open_digits

NOTEBOOK = ROOT / "launch" / "editing.ipynb"
INSTALL, TRAIN, PROGRESSIVE, SHARED, INTERPOLATION, FLOW, IMAGES = TITLES = (
    "Install",
    "A trained network",
    "Progressive generation",
    "Images that share a latent",
    "Interpolation, coarse to fine",
    "Encoding and editing by the probability flow",
    "Image to image, with guidance",
)
LEVELS = [-8.0, -1.0, 1.0, 3.0]


def numbers(title: str) -> list[list[float]]:
    """The numbers behind " = " of each line that the stored cell printed; that of its name is the first."""
    lines = printed(cells(NOTEBOOK)[title].outputs).splitlines()
    return [[float(n) for n in re.findall(r"= (-?[\d.]+)", line)] for line in lines]


def test_the_stored_outputs_are_complete_and_small() -> None:
    assert NOTEBOOK.stat().st_size < 600_000
    code = cells(NOTEBOOK)
    assert tuple(code) == TITLES and code[INSTALL].source == cells(COLAB)[INSTALL].source
    assert [cell.execution_count for cell in code.values()] == list(range(1, len(code) + 1))
    assert [title for title, cell in code.items() if len(pictures(cell.outputs)) == 1] == list(TITLES[2:])
    text = NOTEBOOK.read_text()
    assert "/tmp/" not in text and str(Path.home()) not in text and str(ROOT) not in text and "Warning" not in text
    assert "widgets" not in nbformat.read(NOTEBOOK, as_version=4).metadata
    for title in TITLES[2:]:
        assert len(code[title].source.splitlines()) < 25


def test_the_chain_ends_with_its_prediction() -> None:
    levels, distances = np.transpose(numbers(PROGRESSIVE))
    assert (np.diff(levels) > 0).all() and levels[[0, -1]].tolist() == [-20, 20]
    assert (np.diff(distances) < 0).all() and distances[-1] == 0.0


def test_less_noise_leaves_less_to_the_chain() -> None:
    levels, spread, away = np.transpose(numbers(SHARED))
    assert levels.tolist() == LEVELS and (np.diff(spread) < 0).all() and (np.diff(away) < 0).all()
    levels, *ends = np.transpose(numbers(INTERPOLATION))
    assert levels.tolist() == LEVELS[::-1]
    for end in ends:
        assert end[0] < end[1] < min(end[2:])
    found = np.array(numbers(IMAGES))
    levels, plain, guided = found[::2, 0], found[::2, 2], found[1::2, 2]
    assert levels.tolist() == LEVELS[1:] and found[:, 1].tolist() == [0, 2] * 3
    assert (np.diff(plain) < 0).all() and (np.diff(guided) < 0).all() and (guided > plain).all()


def test_the_distances_are_those_of_digits() -> None:
    """At λ = −8, nothing of the image is left: z has less than a thousandth of its variance.

    Chains are then fresh draws of the class. Their spread and their distance from an image are those of real images.
    """
    assert expit(-8.0) < 1e-3
    source = open_digits("train", 8, 1)
    threes = np.stack([source.read(int(i))[0] for i in np.flatnonzero(source.read_labels() == 3)]).astype(float)
    test = open_digits("test", 8, 1)
    image = test.read(list(test.read_labels()).index(3))[0]
    spread = np.sqrt(threes.var(axis=0).mean())
    away = np.sqrt(np.square(threes - image).mean())
    _, found_spread, found_away = numbers(SHARED)[0]
    # The spread of ten is that of all by the factor sqrt(1 − 1/10), with an error of about a tenth.
    assert found_spread == pytest.approx(np.sqrt(0.9) * spread, rel=0.2)
    assert found_away == pytest.approx(away, rel=0.15)


def test_the_flow_goes_there_and_back() -> None:
    latents, back, *edits = numbers(FLOW)
    assert latents == [pytest.approx(1.0, abs=0.1), *latents[1:]] and back[0] < 0.01
    weights, distances, outside = np.transpose(edits)
    assert weights.tolist() == [0, 1, 3] and (np.diff(distances) > 0).all() and (np.diff(outside) > 0).all()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_cells_run_with_a_network_of_a_few_steps(tmp_path: Path) -> None:
    with kernel(tmp_path / "alone", PYTHONPATH=from_the_checkout()) as run:
        for title, cell in cells(NOTEBOOK).items():
            text = cell.source
            if title == TRAIN:
                for place, message in (("", "WORKDIR is empty"), ("/content/drive/MyDrive/x", "only Colab has")):
                    assert message in stopped(run(text.replace('WORKDIR = "runs/digits"', f'WORKDIR = "{place}"')))
                for steps in ("800", 0, None):
                    message = stopped(run(text.replace("STEPS = 800", f"STEPS = {steps!r}")))
                    assert message.startswith(f"STEPS is {steps!r}; expected an integer >= 1 and < 2^31.")
                text = text.replace("STEPS = 800", "STEPS = 3")
            executed: Any = run(text)
            printed(executed)
            assert len(pictures(executed)) == len(pictures(cell.outputs))
