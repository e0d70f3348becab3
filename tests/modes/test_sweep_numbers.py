"""The numbers of a sweep depend neither on the batch size nor on the devices."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from meshes import mesh_of
from tiny import tiny_config

from cfd.devices import parallel
from cfd.evaluation import reference
from cfd.evaluation.features import ImageClassifier, open_classifier
from cfd.evaluation.scores import score
from cfd.modes import measuring, settings, sweep
from cfd.modes.sampler import Network, compile_sampler
from cfd.networks.model import module
from cfd.runs import npz

pytestmark = pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning")


def save_classifier(folder: Path) -> None:
    """Writes a feature classifier that was never trained."""
    params = ImageClassifier(10).init(jax.random.key(1), jnp.zeros((1, 8, 8, 1), jnp.uint8))["params"]
    (folder / "features").mkdir()
    (folder / "features" / "classifier.json").write_text('{"classifier_steps": 5}')
    arrays = {"/".join(key): np.asarray(x) for key, x in flatten_dict(params).items()}
    npz.write_npz(folder / "features" / "classifier.npz", arrays)


def random_params(config: Any) -> Any:
    """Parameters of the U-Net of which none is zero, so that guidance has an effect."""
    size = config.data.image_size
    shapes = jax.eval_shape(
        module(dict(config.model), size).init,
        jax.random.key(0),
        jnp.zeros((1, size, size, config.data.channels)),
        jnp.zeros(1),
        jnp.zeros(1, jnp.int32),
    )["params"]
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(numbers.normal(0, 0.1, x.shape), jnp.float32), shapes)


def convolutions(params: Any) -> Any:
    """Two convolutions in place of the U-Net."""

    def eps_fn(z: jax.Array, logsnr: jax.Array, labels: jax.Array) -> jax.Array:
        classes = jnp.broadcast_to(labels[:, None, None, None] / 10, z.shape)
        h = jnp.concatenate([z, classes.astype(jnp.float32)], axis=-1)
        for kernel in (params["in"], params["out"]):
            h = jax.lax.conv_general_dilated(
                jnp.tanh(h), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return h

    return eps_fn


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_neither_batches_nor_devices_change_the_numbers(whole: bool, tmp_path: Path) -> None:
    """Two convolutions in place of the network, and in the slow test the U-Net itself."""
    save_classifier(tmp_path)
    config, numbers = tiny_config(), np.random.default_rng(0)
    kernels = {"in": numbers.normal(0, 0.3, (3, 3, 2, 8)), "out": numbers.normal(0, 0.3, (3, 3, 8, 1))}
    params = random_params(config) if whole else jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), kernels)
    network = settings.network_of(config) if whole else Network(convolutions, (8, 8, 1))
    row = sweep.rows_of_grid(tiny_config(eval__weights=(1.0,), eval__num_samples=150), 7)[0] | {"manifest": "0"}
    train = settings.open_split(config, "train")
    measured = []
    for batch_size, devices in ((7, 1), (64, 8)):
        mesh, folder = mesh_of(devices), str(tmp_path / f"{devices} devices")
        features = open_classifier(str(tmp_path), mesh, train, train, num_steps=5, flip=False, seed=0)
        base = reference.open_reference(
            folder, features, train, "hash", path="", image_shape=(8, 8, 1), num_workers=config.data.num_workers
        )
        sampling = settings.sampling_of(tiny_config(sample__batch_size=batch_size))
        replicated = parallel.replicate(mesh, params)
        model = measuring.Model(network, sampling, lambda *_, params=replicated: params, None, mesh)
        batches = measuring.sampled(model, compile_sampler(network, sampling, mesh), row, folder, 10)
        measured.append(score(batches, 150, features, base))
    one, eight = (scores.values for scores in measured)
    assert one["fid"] and one["fid"] > 0.1
    for key in ("fid", "is", "precision", "recall", "class_accuracy"):
        assert abs(one[key] - eight[key]) < 0.005, key
