"""The files that `--mode=sample` writes."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from mixing import DIGITS, NETWORK, assert_same_images, brighter, opening, params
from PIL import Image
from tiny import tiny_config

from cfd.devices import parallel, preemption
from cfd.modes import settings
from cfd.modes.grid import grid_of, spec_of
from cfd.modes.sample import sample
from cfd.modes.sampler import compile_sampler, evaluation_flops
from cfd.runs import npz


def sampled(config: Any, folder: str) -> str:
    """The grid of a sample that is written to the folder of its run."""
    return sample(config, folder, folder)


def test_sample_writes_a_grid_and_openais_npz(mixing_run: Path, capsys: pytest.CaptureFixture) -> None:
    config = tiny_config(sample__seeds=(0, 5))
    path = sampled(config, str(mixing_run))
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.mode == "RGB"
        assert image.height > 4 * 64 and image.width > 2 * 64  # one row per class and seed, one column per weight
    arrays = npz.read_npz(path.replace(".png", ".npz"))
    assert list(arrays) == ["arr_0", "arr_1"]
    assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].shape == (8, 8, 8, 1)
    assert arrays["arr_1"].tolist() == [0, 0, 0, 0, 7, 7, 7, 7]
    spec = spec_of(grid_of(config, DIGITS, (0.0, 2.0)))
    sampler = compile_sampler(NETWORK, settings.sampling_of(config), mesh_of(8))
    assert_same_images(arrays["arr_0"], np.concatenate(list(sampler(parallel.replicate(mesh_of(8), params()), spec))))
    flops = 8 * evaluation_flops(NETWORK, params())
    out = capsys.readouterr().out
    assert re.search(rf"8 images, 8 network evaluations or {re.escape(f'{flops:.3g}')} FLOP .* images/s", out)


def test_a_sample_is_guided_by_the_classifier_of_the_run(mixing_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = []
    for strength in (0.0, 3.0):
        classifier = jax.tree_util.Partial(brighter, {"strength": jnp.float32(strength)})
        monkeypatch.setattr(settings, "open_run", opening(params(), classifier))
        path = sampled(tiny_config(sample__guidance="classifier"), str(mixing_run))
        images.append(npz.read_npz(path.replace(".png", ".npz"))["arr_0"])
    indifferent, decided = images
    np.testing.assert_array_equal(indifferent[0::2], indifferent[1::2])
    np.testing.assert_array_equal(decided[0::2], indifferent[0::2])
    assert (decided[3] != indifferent[3]).any(), "class 7 at w = 2"


def test_a_stop_says_that_the_same_command_samples_all_images(
    mixing_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "requested", lambda: True)
    with pytest.raises(preemption.Stopped, match="after 4 of 4 images; the same command samples all of them"):
        sampled(tiny_config(), str(mixing_run))
    assert not (mixing_run / "samples").exists()


def test_other_settings_do_not_overwrite(mixing_run: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"sample__w": (0.0, 3.0)}, {"sample__v": 1.0}, {"sample__seeds": (1,)}]
    paths = [sampled(tiny_config(**change), str(mixing_run)) for change in changes]
    assert len(set(paths)) == len(paths) and len(list((mixing_run / "samples").iterdir())) == 2 * len(paths)
    before = Path(paths[0]).read_bytes()
    assert sampled(tiny_config(), str(mixing_run)) == paths[0]
    assert Path(paths[0]).read_bytes() == before
