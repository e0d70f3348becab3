"""A trained model is loaded from a run's folder as it was saved, or the reason why it cannot be is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import State, damage_lines, opened, same_bits, shardings, steps
from tiny import tiny_config

from cfd import loading
from cfd.loading import load
from cfd.networks.classifier import Classifier
from cfd.networks.unet import UNet
from cfd.runs import checkpoint, workdir
from cfd.runs.checkpoint import CheckpointError

# After a failed read, Orbax closes its event loop, and reads that are still running complain of it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def digits_run(folder: Path) -> tuple[Any, Any]:
    """Makes a run's folder with a tiny untrained model. Returns ((net, ema), config_json)."""
    config = tiny_config()
    net = UNet(**config.model)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes["params"])
    rng = np.random.default_rng(0)
    ema = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), params)
    names = [str(i) for i in range(10)]
    config_json = {"kind": "diffusion", "config": json.loads(config.to_json()), "class_names": names, "conventions": {}}
    workdir.write_config(folder, config_json)
    with opened(folder, keep=3) as manager:
        for step in (1, 2, 3):
            scaled = jax.tree.map(lambda x, step=step: x * step, ema)
            state = State(jnp.asarray(step), params, scaled, optax.adam(1e-3).init(params))
            checkpoint.save(manager, step, state, data_state={}, config_json=config_json)
    return (net, ema), config_json


def test_load_gives_all_that_sampling_needs(tmp_path: Path) -> None:
    (net, ema), config_json = digits_run(tmp_path)
    (tmp_path / "config.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    run = load(tmp_path)
    assert (run.image_shape, run.num_classes, run.step) == ((8, 8, 1), 10, 3)
    assert run.class_names == tuple("0123456789") and run.config == config_json["config"]
    assert same_bits(run.params, jax.tree.map(lambda x: x * 3, ema))
    z, logsnr, labels = jnp.ones((2, 8, 8, 1)), jnp.zeros(2), jnp.array([4, -1])
    both = jax.jit(lambda eps_fn, params: (eps_fn(z, logsnr, labels), net.apply({"params": params}, z, logsnr, labels)))
    eps, expected = both(run.eps_fn, run.params)
    np.testing.assert_allclose(eps, expected, rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="label 10 is not below the number of classes, 10"):
        run.eps_fn(z, logsnr, jnp.array([0, 10]))
    assert same_bits(load(tmp_path, 1).params, ema)
    assert not (tmp_path / "canary").exists() and steps(tmp_path) == [1, 2, 3]


def test_load_on_a_mesh(tmp_path: Path) -> None:
    (_, ema), _ = digits_run(tmp_path)
    sharding = shardings()["replicated"](None)
    run = load(tmp_path, 1, sharding=sharding)
    assert same_bits(run.params, ema) and jax.tree.leaves(run.params)[0].sharding == sharding


def test_load_of_what_is_not_there_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the folder of a run"):
        load(tmp_path / "nowhere")
    _, config_json = digits_run(tmp_path)
    with pytest.raises(ValueError, match=r"has no step 7; its steps are \[1, 2, 3\]"):
        load(tmp_path, 7)
    with pytest.raises(ValueError, match="holds a diffusion run; a classifier run was expected"):
        loading.load_ema(tmp_path, "classifier")
    workdir.write_config(tmp_path / "empty", config_json)
    with pytest.raises(ValueError, match="has no step; its steps are"):
        load(tmp_path / "empty")
    config_json["config"]["model"]["dropout"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(ValueError, match=r"step 3 was not written with .*model\.dropout: 0\.0 there, 0\.5 here"):
        load(tmp_path)


def test_load_after_a_newer_version_resumed_the_run(tmp_path: Path) -> None:
    """Its config.json then has fields that the checkpoints lack. Fields that both have must still agree."""
    _, config_json = digits_run(tmp_path)
    config_json["config"]["train"]["younger"] = 3
    config_json["config"]["younger"] = {"field": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    run = load(tmp_path)
    assert run.step == 3 and run.config == config_json["config"]
    del config_json["config"]["train"]["ema_decay"]
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(ValueError, match=r"step 3 was not written with .*train\.ema_decay: .* there, absent here"):
        load(tmp_path)


def test_load_classifier_gives_logits_of_the_ema(tmp_path: Path) -> None:
    config = tiny_config()
    net = Classifier(**config.classifier)
    z, logsnr = jnp.ones((2, 8, 8, 1)), jnp.array([0.0, 3.0])
    ema = net.init(jax.random.key(0), z, logsnr)["params"]
    config_json = workdir.describe("classifier", config.to_dict(), [str(i) for i in range(10)])
    workdir.write_config(tmp_path, config_json)
    with opened(tmp_path) as manager:
        state = State(jnp.asarray(1), jax.tree.map(jnp.zeros_like, ema), ema, ())
        checkpoint.save(manager, 1, state, data_state={}, config_json=config_json)
    both = jax.jit(lambda classifier_fn, ema: (classifier_fn(z, logsnr), net.apply({"params": ema}, z, logsnr)))
    logits, expected = both(loading.load_classifier(tmp_path), ema)
    assert logits.shape == (2, 10)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"holds a classifier run; .*open this one with cfd\.loading\.load_classifier"):
        load(tmp_path)


def test_load_passes_over_damage_and_touches_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (_, ema), _ = digits_run(tmp_path)
    for path in (tmp_path / "checkpoints" / "3").rglob("_METADATA"):
        path.write_text("")  # as after a power cut
    run = load(tmp_path)
    assert run.step == 2 and same_bits(run.params, jax.tree.map(lambda x: x * 2, ema))
    assert len(damage_lines(caplog)) == 1 and steps(tmp_path) == [1, 2, 3]
    with pytest.raises(CheckpointError, match="step 3: "):
        load(tmp_path, 3)
    for step in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        load(tmp_path)
