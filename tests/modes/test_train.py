"""`--mode=train`: the network gets the settings and the images of its config, and previews show its samples."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from mixing import DIGITS, NETWORK, params
from ml_collections import ConfigDict
from PIL import Image
from tiny import QUICK, tiny_config

from cfd.config import complete, with_classes
from cfd.devices import parallel, preemption
from cfd.errors import UserError
from cfd.loading import load
from cfd.modes import settings, train, train_classifier
from cfd.modes.grid import grid_of, picture_of, spec_of
from cfd.modes.sampler import compile_sampler
from cfd.networks.unet import UNet
from cfd.runs import workdir


def test_each_network_is_trained_with_its_own_settings_on_the_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple] = []
    optimizers: list[dict[str, Any]] = []
    for mode in (train, train_classifier):
        monkeypatch.setattr(mode, "fit", lambda *arguments, **options: calls.append((*arguments, options)))
    real = settings.make_optimizer
    monkeypatch.setattr(settings, "make_optimizer", lambda **values: optimizers.append(values) or real(**values))
    config = tiny_config(classifier_train__num_steps=9, classifier_train__batch_size=8, seed=5, data__flip=True)
    images = settings.open_split(config, "train")
    train.train(config, str(tmp_path))
    train_classifier.train_classifier(config, str(tmp_path), allow_fresh_start=True)

    own, other = (training for training, *_ in calls)
    assert [folder for _, folder, *_ in calls] == [str(tmp_path), str(tmp_path / "classifier")]
    for (_, _, _, dataset, content, *_, options), kind in zip(calls, ("diffusion", "classifier"), strict=True):
        np.testing.assert_array_equal(dataset.labels, images.labels)
        assert content == workdir.describe(kind, config.to_dict(), DIGITS)
        none = {"start_from": None, "project": None} if kind == "diffusion" else {}
        assert options == dict(allow_fresh_start=kind == "classifier", **none)
    assert (own.seed, own.flip, own.num_workers) == (other.seed, other.flip, other.num_workers) == (5, True, 1)
    theirs = config.train.to_dict() | config.classifier_train.to_dict()
    for training, optimizer, group in zip((own, other), optimizers, (config.train, theirs), strict=True):
        fields = training._asdict().keys() - {"seed", "flip", "num_workers"}
        assert {name: getattr(training, name) for name in fields} == {name: group[name] for name in fields}
        assert optimizer == {name: group[name] for name in optimizer} and len(optimizer) == 6
    assert other.num_steps != own.num_steps and optimizers[0]["weight_decay"] != optimizers[1]["weight_decay"]
    assert optimizers[0]["warmup_steps"] == optimizers[1]["warmup_steps"] == config.train.warmup_steps


@pytest.fixture
def ants_and_bees(tmp_path: Path) -> Any:
    """A config for a folder of eight images in two classes. It states no number of classes and no output channels."""
    for i in range(8):
        file = tmp_path / "pictures" / ("ant", "bee")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 30 * i, np.uint8)).save(file)
    network = dict(base_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), head_channels=32)
    return ConfigDict(
        dict(
            data=dict(source="folder", path=str(tmp_path / "pictures"), image_size=8, channels=1),
            model=network,
            classifier=dict(network),
            train=dict(num_steps=2, batch_size=8, sample_every_steps=0),
            classifier_train=dict(num_steps=2, batch_size=8),
        )
    )


def test_a_folder_of_two_classes_is_trained_on_without_a_number_of_classes(
    ants_and_bees: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    folder = str(tmp_path / "run")
    train.train(ants_and_bees, folder)
    content = workdir.read_config(folder)
    assert content["class_names"] == ["ant", "bee"]
    for group in ("data", "model", "classifier"):
        assert content["config"][group]["num_classes"] == 2
    assert content["config"]["model"]["out_channels"] == 1
    run = load(folder)
    assert (run.num_classes, run.class_names, run.step) == (2, ("ant", "bee"), 2)
    assert run.eps_fn(jnp.zeros((3, 8, 8, 1)), jnp.zeros(3), jnp.array([0, 1, -1])).shape == (3, 8, 8, 1)
    with pytest.raises(ValueError, match="label 2 is not below the number of classes, 2"):
        run.eps_fn(jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.array([2]))
    described: list[dict[str, Any]] = []
    monkeypatch.setattr(train_classifier, "fit", lambda *arguments, **_: described.append(arguments[4]))
    train_classifier.train_classifier(ants_and_bees, folder)
    whole = with_classes(complete(ants_and_bees), 2).to_dict()
    assert described == [workdir.describe("classifier", whole, ("ant", "bee"))]
    opened = settings.open_run(ants_and_bees, folder)
    assert json.loads(opened.config.to_json()) == content["config"] and opened.model_at(-1).step == 2

    for group in ("data", "model", "classifier"):  # the same run, with its number of classes stated
        ants_and_bees[group].num_classes = 2
    train.train(ants_and_bees, folder)
    ants_and_bees.classifier.num_classes = 3
    with pytest.raises(ValueError, match=r"config\.classifier\.num_classes is 3, and .* is 2: set all of them"):
        train.train(ants_and_bees, folder)


def test_the_loss_has_the_settings_of_the_config_and_dropout_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(train__p_uncond=0.7, process__logsnr_min=-7.0, process__logsnr_max=9.0, model__dropout=0.5)
    seen: dict[str, Any] = {}
    apply = UNet.apply

    def seen_apply(*args: Any, rngs: Any, **options: Any) -> Any:
        seen["dropout"] = rngs["dropout"]
        return apply(*args, rngs=rngs, **options)

    def eps_loss(key: Any, eps_fn: Any, x: Any, labels: Any, **options: Any) -> Any:
        seen.update(loss=key, out=eps_fn(x, jnp.zeros(2), labels))
        seen["schedule"] = options.pop("schedule")
        assert options == dict(p_uncond=0.7, weight=None, low_discrepancy=False)
        return jnp.zeros(())

    monkeypatch.setattr(UNet, "apply", seen_apply)
    monkeypatch.setattr(train, "eps_loss", eps_loss)
    init, loss_fn = train.diffusion(config)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda p: jnp.asarray(random.normal(0.0, 0.1, p.shape), jnp.float32), shapes)

    def keys_and_output(key: Any) -> Any:
        loss_fn(key, params, jnp.ones((2, 8, 8, 1)), jnp.zeros(2, jnp.int32))
        return jnp.stack([jax.random.key_data(k) for k in (key, seen["loss"], seen["dropout"])]), seen["out"]

    jitted = jax.jit(keys_and_output, compiler_options=QUICK)
    (keys, one), (_, other) = jitted(jax.random.key(1)), jitted(jax.random.key(2))
    assert len(np.unique(keys, axis=0)) == 3
    np.testing.assert_allclose(seen["schedule"](jnp.array([0.0, 1.0])), [9.0, -7.0], rtol=1e-6)
    assert (one != other).any()


def test_a_preview_is_the_grid_of_the_config(mixing_run: Path) -> None:
    (mixing_run / "samples").mkdir()
    pixels = train.preview(tiny_config(), mesh_of(1), str(mixing_run), DIGITS)(12, params())
    with Image.open(mixing_run / "samples" / "step_0000012.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
    config = tiny_config()
    grid = grid_of(config, DIGITS, config.sample.w)
    sampler = compile_sampler(NETWORK, settings.sampling_of(config), mesh_of(1))
    images = np.concatenate(list(sampler(parallel.replicate(mesh_of(1), params()), spec_of(grid))))
    np.testing.assert_array_equal(picture_of(grid, images), pixels)


def test_a_preview_samples_no_more_rows_than_it_needs_and_stops_between_batches(
    mixing_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, compile_sampler = [], train.compile_sampler

    def counting(network: Any, sampling: Any, mesh: Any) -> Any:
        sizes.append(sampling.batch_size)
        return compile_sampler(network, sampling, mesh)

    monkeypatch.setattr(train, "compile_sampler", counting)

    def preview(devices: int, batch_size: int) -> Any:
        return train.preview(tiny_config(sample__batch_size=batch_size), mesh_of(devices), str(mixing_run), DIGITS)

    for devices, batch_size, rows in ((1, 16, 4), (8, 16, 8), (1, 2, 2)):
        preview(devices, batch_size)
        assert sizes[-1] == rows
    monkeypatch.setattr(preemption, "requested", lambda: True)
    assert preview(1, 2)(12, params()) is None and not (mixing_run / "samples").exists()
    assert preview(1, 16)(12, params()) is not None, "the picture is complete after its only batch"


def test_a_preview_has_no_weight_whose_scores_the_run_does_not_train(mixing_run: Path) -> None:
    def preview(**changes: Any) -> Any:
        return train.preview(tiny_config(**changes), mesh_of(1), str(mixing_run), DIGITS)

    with pytest.raises(ValueError, match="p_uncond = 0 does not train"):
        preview(train__p_uncond=0.0)
    by_classifier = preview(sample__guidance="classifier", train__p_uncond=0.0)(12, params())
    np.testing.assert_array_equal(by_classifier, preview(sample__w=(0.0,))(12, params()))


def test_steps_that_training_will_not_keep_are_refused_before_it(tmp_path: Path) -> None:
    """Checkpoints at 2, 4, 6 of 6 steps, of which two are kept; snapshots and kept checkpoints are there for good."""

    def missing(*steps: int, **changes: Any) -> str:
        try:
            train.check_steps(tiny_config(eval__steps=steps, **changes), str(tmp_path))
        except UserError as error:
            return str(error)
        return ""

    assert missing(4, 6) == missing() == ""
    assert "has 2, which will not be there when training ends at step 6; then there are 4, 6." in missing(2, 6)
    assert "set train.snapshot_every_steps to 3 or to a divisor of it" in missing(3)
    assert missing(3, train__snapshot_every_steps=3) == missing(1, 2, 3, train__keep_every_steps=1) == ""
    assert "has 5" in missing(5, train__sample_every_steps=5, train__keep_checkpoints=1)
    assert missing(5, train__sample_every_steps=5) == missing(2, train__keep_checkpoints=3) == ""
    assert "has 2" in missing(sample__step=2) and missing(sample__step=6) == ""

    # A run that has come to step 4: what it did not keep is gone, and step 2 goes with step 6.
    for place in ("checkpoints/2", "checkpoints/4", "snapshots/1"):
        (tmp_path / place).mkdir(parents=True)
    assert "then there are 1, 4, 6" in missing(2) and missing(1, 4, 6) == ""
    assert "has 3" in missing(3, train__snapshot_every_steps=3) and missing(2, train__keep_every_steps=2) == ""
    assert missing(2, 4, train__num_steps=4) == ""
