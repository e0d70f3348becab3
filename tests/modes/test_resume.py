"""A run resumes only with the same data, and with the same meaning of a seed."""

import gc
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import mixing
import numpy as np
import pytest
from jax_settings import jax_setting
from linear import assert_same_bits, init, noisy
from meshes import mesh_of
from pictures import encoded, noise, write
from tiny import tiny_config

from cfd.devices import parallel, seeds
from cfd.loading import load_ema
from cfd.modes import fit as fit_module
from cfd.modes import settings, sweep
from cfd.modes import train as train_module
from cfd.modes.train import train


@pytest.fixture(autouse=True)
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` trains the linear map on one device."""
    monkeypatch.setattr(train_module, "diffusion", lambda config: (init, noisy))
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight images of two classes, all files of which have the same size."""
    for i in range(8):
        write(tmp_path / "pictures" / "train" / ("cat", "dog")[i % 2] / f"{i}.png", encoded(noise(i, channels=1)))
    assert len({file.stat().st_size for file in tmp_path.rglob("*.png")}) == 1
    return tmp_path / "pictures" / "train"


def run(folder: Path, data: Path | None = None, init_from: Path | None = None, **changes: Any) -> None:
    if data is not None:
        changes |= dict(data__source="folder", data__path=str(data.parent), data__num_classes=2, sample__classes=(0, 1))
    train(tiny_config(**{"train__num_steps": 2} | changes), str(folder), init_from=init_from and str(init_from))


def weights(folder: Path) -> Any:
    return jax.tree.map(np.asarray, load_ema(folder, "diffusion").params)


def exchange(data: Path) -> None:
    """A cat becomes a dog and a dog a cat; the number and the sizes of the files stay."""
    (data / "cat" / "0.png").rename(data / "x.png")
    (data / "dog" / "1.png").rename(data / "cat" / "0.png")
    (data / "x.png").rename(data / "dog" / "1.png")
    (data / "cat" / "0.png").rename(data / "cat" / "zzz.png")


def rename(data: Path) -> None:
    """The images keep their classes, but not their order."""
    (data / "cat" / "0.png").rename(data / "cat" / "9.png")


def replace(data: Path) -> None:
    write(data / "cat" / "0.png", encoded(np.zeros((8, 8), np.uint8)))


def relabel(data: Path) -> None:
    (data / "cat" / "6.png").rename(data / "dog" / "6.png")


@pytest.mark.parametrize("change", [exchange, rename, replace, relabel], ids=lambda change: change.__name__)
def test_a_run_is_not_resumed_on_other_data_of_the_same_number(
    pictures: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder, copy = tmp_path / "run", tmp_path / "copy"
    run(folder, pictures)
    shutil.copytree(pictures.parent, copy)
    change(pictures)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"another data set of the same 8 images in number: names, sizes or labels .*data\.path"
    ) as error:
        run(folder, pictures)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    run(folder, copy / "train", train__num_steps=4)  # where the data lie does not matter
    (source,) = re.findall(r"--init_from=(\S+) lets", str(error.value))
    run(tmp_path / "new", pictures, Path(source), train__num_steps=4)
    assert load_ema(tmp_path / "new", "diffusion").step == 4


def test_a_checkpoint_that_does_not_say_what_it_was_trained_on_is_resumed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of earlier versions; the next checkpoint says it."""
    with monkeypatch.context() as patch:
        patch.setattr(
            fit_module, "data_state_of", lambda dataset, step, skipped: dict(next_step=step, skipped_images=0)
        )
        run(tmp_path / "run", pictures)
    rename(pictures)
    run(tmp_path / "run", pictures, train__num_steps=4)
    rename_back = pictures / "cat" / "9.png"
    rename_back.rename(pictures / "cat" / "0.png")
    with pytest.raises(ValueError, match="another data set of the same 8 images"):
        run(tmp_path / "run", pictures, train__num_steps=6)


# Seeds


def test_training_does_not_depend_on_jax_s_default_prng(tmp_path: Path) -> None:
    run(tmp_path / "threefry", train__num_steps=4)
    with jax_setting("jax_default_prng_impl", "rbg"):
        run(tmp_path / "rbg", train__num_steps=4)
        run(tmp_path / "resumed")
    run(tmp_path / "resumed", train__num_steps=4)
    for name in ("rbg", "resumed"):
        assert_same_bits(weights(tmp_path / "threefry"), weights(tmp_path / name))


def test_a_run_under_a_setting_that_changes_its_seed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with (
        jax_setting("jax_threefry_partitionable", False),
        pytest.raises(ValueError, match="jax_threefry_partitionable"),
    ):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_another_prng(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(seeds, "PRNG", {"impl": "threefry2x32", "partitionable": False})
        run(tmp_path)
    with pytest.raises(ValueError, match=r"with the PRNG .*'partitionable': False.* or give another --workdir"):
        run(tmp_path, train__num_steps=4)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_a_line_says_that_an_earlier_version_may_have_drawn_other_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], implementation: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            fit_module, "data_state_of", lambda dataset, step, skipped: dict(next_step=step, skipped_images=0)
        )
        run(tmp_path)
    with jax_setting("jax_default_prng_impl", implementation):
        run(tmp_path, train__num_steps=4)
    said = "which drew with JAX's default PRNG, here 'rbg'. From this step on" in capsys.readouterr().out
    assert said == (implementation == "rbg")


# Garbage collection


def test_objects_that_the_host_program_has_frozen_stay_frozen(tmp_path: Path) -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        run(tmp_path)
        assert gc.get_freeze_count() >= frozen - 100  # objects that died meanwhile
    finally:
        gc.unfreeze()


# Measuring


def test_a_line_says_that_a_run_is_measured_with_other_data(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest checkpoint and a snapshot both know the data of their training."""
    fields: Any = dict(
        data__source="folder", data__path=str(pictures.parent), data__num_classes=2, sample__classes=(0,)
    )
    run(tmp_path / "run", pictures, train__snapshot_every_steps=1)
    before = settings.open_split(tiny_config(**fields), "train")
    exchange(pictures)
    after = settings.open_split(tiny_config(**fields), "train")
    some = mixing.opening(mixing.params())(tiny_config(), "").model_at(7)
    capsys.readouterr()
    for step in (None, 1):
        model = some._replace(data_identity=load_ema(tmp_path / "run", "diffusion", step).data_identity)
        sweep.say_if_other_data(model, before)
        sweep.say_if_other_data(some, after)  # of an earlier version, or imported
        assert capsys.readouterr().out == ""
        sweep.say_if_other_data(model, after)
        assert "trained on other data than those of data.path here" in capsys.readouterr().out
