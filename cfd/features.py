"""The networks whose features the metrics use: a small classifier of the run's own images, or InceptionV3.

The classifier is for data sets that Inception says little about (8x8 digits). It is trained on the training images,
never sees the diffusion model, and is kept in the run's folder. Its numbers are not comparable with Inception's.
"""

import json
import os
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from cfd import data, inception, npz, parallel, preemption, watchdog, xla


class Outputs(NamedTuple):
    """What a feature network makes of n images; `spatial` is for sFID, and None where the network has no such layer."""

    pool: Float[np.ndarray, "n d"]
    spatial: Float[np.ndarray, "n s"] | None
    probs: Float[np.ndarray, "n k"]


class FeatureNetwork(NamedTuple):
    """Its name, the SHA-256 of its weights, and uint8 images [n, H, W, C] -> Outputs, whole on every process."""

    name: str
    weights_hash: str
    extract: Callable[[UInt8[np.ndarray, "n h w c"]], Outputs]


class ImageClassifier(nn.Module):
    """A small convolutional classifier of uint8 images: 64 features and the logits."""

    num_classes: int

    @nn.compact
    def __call__(self, images: UInt8[Array, "b h w c"]) -> tuple[Float[Array, "b 64"], Float[Array, "b k"]]:
        width = 32
        x = nn.silu(nn.Conv(width, (3, 3))(images.astype(jnp.float32) / 127.5 - 1.0))
        while x.shape[1] > 4:
            width = min(2 * width, 128)
            x = nn.silu(nn.GroupNorm(8)(nn.Conv(width, (3, 3), 2)(x)))
        x = nn.silu(nn.Conv(width, (3, 3))(x))
        features = nn.silu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return features, nn.Dense(self.num_classes)(features)


def open_classifier(
    folder: str, mesh: Mesh, train: data.Dataset, held_out: data.Dataset, *, num_steps: int, flip: bool, seed: int
) -> FeatureNetwork:
    """The classifier in features/classifier.npz of a run's folder; trained at its first use, its accuracy reported."""
    path = os.path.join(folder, "features", "classifier.npz")
    net: Any = ImageClassifier(len(train.class_names))
    found = os.path.exists(path)
    parallel.barrier("feature classifier looked for")
    if found:
        try:
            with open(path.replace(".npz", ".json")) as file:
                made_with = json.load(file)["classifier_steps"]
            npz.read_npz(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{os.path.dirname(path)} is damaged ({error}): remove the folder, and --mode=sweep makes it anew"
            ) from None
        if made_with != num_steps:
            raise ValueError(
                f"{path} was trained with eval.classifier_steps = {made_with}, not {num_steps}: give {made_with}, or "
                "delete the features folder and sweep.csv, whose numbers come from it"
            )
    else:
        params = train_classifier(net, train, num_steps=num_steps, flip=flip, seed=seed)
        right, seen = score(net, params, held_out)
        report = {"classifier_steps": num_steps, "held_out_accuracy": right / seen, "held_out_images": seen}
        if jax.process_index() == 0:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path.replace(".npz", ".json"), "w") as file:
                json.dump(report, file, indent=1)
            npz.write_npz(path, {"/".join(key): np.asarray(x) for key, x in flatten_dict(params).items()})
        print(
            "Feature classifier, {held_out_images} held-out images: accuracy {held_out_accuracy:.4f}".format(**report)
        )
        parallel.barrier("feature classifier")
    params = unflatten_dict({tuple(name.split("/")): x for name, x in npz.read_npz(path).items()})

    def network(params: Any, images: Array) -> tuple[Array, None, Array]:
        pool, logits = net.apply({"params": params}, images)
        return pool, None, nn.softmax(logits)

    return FeatureNetwork("classifier", inception.weights_hash(path), _extractor(network, params, mesh, 256))


def open_inception(path: str, mesh: Mesh) -> FeatureNetwork:
    """FID's InceptionV3 with the weights that `python -m cfd.convert inception` wrote to `path`."""
    net = inception.InceptionV3()
    extract = _extractor(
        lambda params, images: net.apply({"params": params}, images), inception.load_params(path), mesh, 32
    )
    return FeatureNetwork("inception", inception.weights_hash(path), extract)


def _extractor(network: Callable, params: Any, mesh: Mesh, batch: int) -> Callable[[np.ndarray], Outputs]:
    compiled = xla.jit(network)
    params = parallel.replicate(mesh, params)
    size = -(-batch // mesh.size) * mesh.size

    def extract(images: np.ndarray) -> Outputs:
        parts = []
        for first in range(0, len(images), size):
            rows = images[first : first + size]
            padded = np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), np.uint8)])
            outputs = compiled(params, parallel.shard_rows(mesh, padded))
            parts.append([None if x is None else parallel.gather(x)[: len(rows)] for x in outputs])
        whole: Any = [None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True)]
        return Outputs(*whole)

    return extract


def train_classifier(net: Any, dataset: data.Dataset, *, num_steps: int, flip: bool, seed: int) -> Any:
    """`num_steps` batches of 128 training images; AdamW with a cosine decay. Returns the parameters."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, num_steps), weight_decay=1e-3)
    image = jnp.zeros((1, dataset.image_size, dataset.image_size, dataset.channels), jnp.uint8)
    params = net.init(jax.random.key(seed), image)["params"]
    opt_state = optimizer.init(params)

    def loss_fn(params: Any, images: Array, labels: Array) -> Array:
        logits = net.apply({"params": params}, images)[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @xla.jit
    def step(params: Any, opt_state: Any, images: Array, labels: Array) -> tuple[Any, Any]:
        grads = jax.grad(loss_fn)(params, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    with closing(data.batches(dataset, seed=seed, batch_size=128, flip=flip, num_workers=1)) as batches:
        for _ in range(num_steps):
            if preemption.requested():
                raise preemption.Stopped("Stopped in the sweep, in training its feature classifier")
            watchdog.alive(slow=True)
            batch = next(batches)
            images = np.round((batch["image"] + 1.0) * 127.5).astype(np.uint8)
            params, opt_state = step(params, opt_state, images, batch["label"])
    return params


def score(net: Any, params: Any, held_out: data.Dataset) -> tuple[int, int]:
    """The number of held-out images whose class the classifier names, and of all that are not bad."""
    predict = xla.jit(lambda images: net.apply({"params": params}, images)[1].argmax(-1))
    right = seen = 0
    for first in range(0, len(held_out), 500):
        images, labels = data.load_arrays(held_out, np.arange(first, min(first + 500, len(held_out))))
        right += int((np.asarray(predict(images)) == labels).sum())
        seen += len(labels)
    if not seen:
        raise ValueError("eval.test_split holds no image that can be read")
    return right, seen
