"""The networks of the GAN and its two commands: shapes, a tiny run that stops and resumes, and errors in one line."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ROOT, tiny_config

from cfd.config import with_classes
from cfd.devices import preemption
from cfd.gan import gaussians, losses
from cfd.gan.__main__ import check_generator, config_of, main, measure, networks_of, parse

CONFIG = str(ROOT / "configs" / "digits.py")
TINY = (
    "train.num_steps=4",
    "train.batch_size=16",
    "train.checkpoint_every_steps=2",
    "train.log_every_steps=1",
    "model.channel_mult=(1,)",
    "model.attention_resolutions=()",
    "classifier.channel_mult=(1,)",
    "classifier.attention_resolutions=()",
    "eval.num_samples=40",
    "eval.classifier_steps=5",
)


def of_config(classes: int, width: int) -> tuple[Any, Any, Any]:
    """Parameters without values, and the loss and samples as functions of them."""
    config = tiny_config().unlock()
    config.model.num_classes = classes
    init, networks = networks_of(config, 5, width)
    x, labels = jnp.zeros((3, 8, 8, 1)), jnp.arange(3, dtype=jnp.int32) - (classes == 0)

    def loss(params: Any) -> Any:
        return losses.loss(jax.random.key(1), networks, params, x, labels, logsnr=losses.levels(4))

    def sample(params: Any) -> Any:
        return losses.sample(jax.random.key(2), networks, params["g"], labels, (8, 8, 1), logsnr=losses.levels(4))

    return jax.eval_shape(init, jax.random.key(0)), loss, sample


def test_the_networks_of_a_config_fit_the_losses() -> None:
    """Abstractly: the loss is a scalar with a gradient for every parameter, through the gradient of the penalty."""
    params, loss, _ = of_config(10, 0)
    value, grads = jax.eval_shape(jax.value_and_grad(loss), params)
    assert value.shape == () and jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    assert params["d"]["conv_in"]["kernel"].shape[2] == 2  # z' and z
    assert "label" in params["g"]["embed"] and params["d"]["pool"]["out"]["kernel"].shape[1] == 10
    params = of_config(0, 0)[0]
    assert "label" not in params["g"]["embed"] and params["d"]["pool"]["out"]["kernel"].shape[1] == 1


@pytest.mark.parametrize("classes", [0, 10])
def test_the_mlps_do_too_and_labels_matter_to_them(classes: int) -> None:
    params, loss, sample = of_config(classes, 16)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32), params)
    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    images = jax.jit(sample)(params)
    assert images.shape == (3, 8, 8, 1) and np.abs(images).max() <= 1.0 + 1e-4


def test_errors_are_one_line_and_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are final for a supervisor, because the command itself is wrong, or a new run does not find its data."""
    monkeypatch.setenv("CFD_SUPERVISED", "1")
    for arguments, expected in (
        (["nowhere.py", str(tmp_path)], r"nowhere\.py is no config \(FileNotFoundError: there is no such file\): give"),
        (["nowhere", str(tmp_path)], "nowhere names no config; choose one of cifar10, "),
        ([CONFIG, str(tmp_path), "train.num_steps=many"], "config.train.num_steps is 'many'; expected an integer >= 1"),
        ([CONFIG, str(tmp_path), "train.num_step=3"], "train.num_step"),
        ([CONFIG, str(tmp_path), "train.num_steps=0"], "config.train.num_steps is 0; expected an integer >= 1"),
        (
            [CONFIG, str(tmp_path), "model.label_from=0"],
            r"model.label_from is 0, .* add model.label_from=-1, or --mlp=256",
        ),
        (["digits"], "error: the following arguments are required: WORKDIR$"),
        (["digits", str(tmp_path), "--mpl=8"], "^error: --mpl=8 is no flag: choose among --levels, --latents, --mlp"),
        (["digits", str(tmp_path), "--mpl=8", "train.num_steps=3"], "^error: --mpl=8 is no flag: choose among"),
        (["digits", str(tmp_path), "--mlp=-1"], "--mlp is -1; give an integer >= 0"),
        (["digits", str(tmp_path), "--penalty=nan"], "--penalty is nan; give a finite number >= 0"),
        (["digits", "s3://bucket/run"], "WORKDIR is 's3://bucket/run'"),
    ):
        with pytest.raises(SystemExit, match=expected) as found:
            main(arguments)
        assert "\n" not in str(found.value) and capfd.readouterr().out == "cfd-final:\n"
    with pytest.raises(SystemExit, match="nowhere"):
        main([CONFIG, str(tmp_path / "run"), "--mlp=8", "data.source=folder", "data.path=nowhere"])
    assert "cfd-final:\n" in capfd.readouterr().out
    assert config_of("digits", []) == config_of(CONFIG, [])
    assert config_of(CONFIG, ["train.num_steps=3", "data.split=test"]).data.split == "test"
    check_generator(config_of(CONFIG, ["model.label_from=-1"]))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cfd.gan.__main__.train", train)
    with pytest.raises(SystemExit, match=r"error: .* cannot be written \(No space left on device\): free space"):
        main([CONFIG, str(tmp_path)])


def test_a_request_to_stop_ends_the_drawing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse([CONFIG, str(tmp_path), "--mlp=8", "--latents=4", *TINY, "sample.batch_size=16"])
    config = config_of(args.CONFIG, args.FIELDS)
    init, _ = networks_of(with_classes(config, 10), args.latents, args.mlp)
    monkeypatch.setattr("cfd.gan.__main__.load_ema", lambda *_: SimpleNamespace(params=init(jax.random.key(0)), step=4))
    answers = iter([False, True])
    monkeypatch.setattr(preemption, "requested", lambda: next(answers))
    with pytest.raises(preemption.Stopped, match="Stopped after 32 of 40 images"):
        measure(config, str(tmp_path), args)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("networks", [(), ("--mlp=32",)])
def test_a_run_that_stops_resumes_to_the_same_images(
    networks: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main([CONFIG, str(whole), *networks, *TINY]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(preemption, "requested", lambda: True)
        assert main([CONFIG, str(stopped), *networks, *TINY]) == 75
    assert "the same command resumes" in capfd.readouterr().out
    assert main([CONFIG, str(stopped), *networks, *TINY]) == 0
    assert "Resuming" in capfd.readouterr().out
    images = [np.load(folder / "gan.npz")["arr_0"] for folder in (whole, stopped)]
    np.testing.assert_array_equal(*images)
    assert images[0].shape == (40, 8, 8, 1)
    scores = json.loads((whole / "gan.json").read_text())
    assert scores == json.loads((stopped / "gan.json").read_text())
    assert scores["step"] == 4 and scores["fid"] > 0 and 0 <= scores["recall"] <= 1
    content = json.loads((whole / "config.json").read_text())
    assert content["kind"] == "gan" and len(content["gan"]["levels"]) == 4
    np.testing.assert_array_equal(np.bincount(np.load(whole / "gan.npz")["arr_1"]), [4] * 10)


def test_the_25_gaussians_need_a_step_and_a_level(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--steps=0", "--levels=-1"):
        with pytest.raises(SystemExit):
            gaussians.main([argument])
        assert f"{argument.replace('=', ' is ')}; give an integer >= 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_25_gaussians_are_learned_a_little(capsys: pytest.CaptureFixture[str]) -> None:
    """Of uniform points in the square of the grid, 25 π 0.15² / 8² = 2.8 % are good: training must double that."""
    gaussians.main(["--steps", "6000"])
    modes, good = capsys.readouterr().out.partition(": ")[2].split(" of 25 modes, ")
    assert int(modes) > 18 and float(good.partition("%")[0]) > 5.5
