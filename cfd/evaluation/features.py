"""The networks whose features the metrics use: a small classifier of the run's own images, or InceptionV3.

The classifier is for data sets about which Inception says little, such as 8x8 digits. It is trained on the training
images, never sees the diffusion model, and is stored in the run's folder. Metrics of its features are not comparable
with metrics of Inception's.
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
from tqdm import tqdm

from cfd.data.batches import batches, load_arrays
from cfd.data.sources import Dataset
from cfd.devices import parallel, preemption, watchdog, xla
from cfd.errors import UserError
from cfd.evaluation import inception
from cfd.runs import npz


class Outputs(NamedTuple):
    """Features and class probabilities of n images. `spatial`, for sFID, is None if the network has no such layer."""

    pool: Float[np.ndarray, "n d"]
    spatial: Float[np.ndarray, "n s"] | None
    probs: Float[np.ndarray, "n k"]


class FeatureNetwork(NamedTuple):
    """A feature network: its name, the SHA-256 of its weights file, and a function from images to `Outputs`.

    `extract` takes uint8 images [n, H, W, C], the same on every process, and gives all n outputs to every process.
    """

    name: str
    weights_hash: str
    extract: Callable[[UInt8[np.ndarray, "n h w c"]], Outputs]


class ImageClassifier(nn.Module):
    """A small convolutional classifier of uint8 images. Returns (64 features, logits) per image."""

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
    folder: str, mesh: Mesh, train: Dataset, held_out: Dataset, *, num_steps: int, flip: bool, seed: int
) -> FeatureNetwork:
    """The classifier in features/classifier.npz of a run's folder.

    If there is no such file yet, trains the classifier on `train` for `num_steps` steps, and prints its accuracy on
    `held_out`, which classifier.json records. Raises ValueError if the files are damaged, or if the classifier was
    trained for another number of steps.
    """
    path = os.path.join(folder, "features", "classifier.npz")
    net: Any = ImageClassifier(len(train.class_names))
    found = os.path.exists(path)
    parallel.barrier("feature classifier looked for")
    if found:
        try:
            with open(path.replace(".npz", ".json")) as file:
                trained_steps = json.load(file)["classifier_steps"]
            npz.read_npz(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{os.path.dirname(path)} is damaged ({error}): remove this folder, and --mode=sweep creates it again"
            ) from None
        if trained_steps != num_steps:
            raise UserError(
                f"{path} was trained with eval.classifier_steps = {trained_steps}, not {num_steps}: set it to "
                f"{trained_steps}, or delete the features folder and sweep.csv, whose metrics use this classifier"
            )
    else:
        params = train_classifier(net, train, num_steps=num_steps, flip=flip, seed=seed)
        correct, count = count_correct(net, params, held_out)
        report = {"classifier_steps": num_steps, "held_out_accuracy": correct / count, "held_out_images": count}
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
    """InceptionV3 as FID uses it, with the weights that `python -m cfd.convert inception` wrote to `path`.

    Raises ValueError if the file does not hold these weights.
    """
    net = inception.InceptionV3()
    extract = _extractor(
        lambda params, images: net.apply({"params": params}, images), inception.load_params(path), mesh, 32
    )
    return FeatureNetwork("inception", inception.weights_hash(path), extract)


def _extractor(network: Callable, params: Any, mesh: Mesh, batch: int) -> Callable[[np.ndarray], Outputs]:
    """`FeatureNetwork.extract` of `network(params, images)`, which runs on `batch` images, divided among all devices.

    `batch` is rounded up to a multiple of the number of devices, and the last batch is padded with black images.
    """
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


def train_classifier(net: Any, dataset: Dataset, *, num_steps: int, flip: bool, seed: int) -> Any:
    """The parameters of `net`, trained on `num_steps` batches of 128 images by AdamW with a cosine decay.

    Raises `preemption.Stopped` on request. Nothing is saved then: the next call starts from the beginning.
    """
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

    with closing(batches(dataset, seed=seed, batch_size=128, flip=flip, num_workers=1)) as stream:
        for _ in tqdm(range(num_steps), "train feature classifier", unit="step", disable=None):
            if preemption.requested():
                raise preemption.Stopped("Stopped in the sweep, while training the feature classifier")
            watchdog.alive(slow=True)
            batch = next(stream)
            images = np.round((batch["image"] + 1.0) * 127.5).astype(np.uint8)
            params, opt_state = step(params, opt_state, images, batch["label"])
    return params


def count_correct(net: Any, params: Any, held_out: Dataset) -> tuple[int, int]:
    """(images that are classified correctly, images in all) of the held-out set, without its bad images.

    Raises ValueError if no image can be read.
    """
    predict = xla.jit(lambda images: net.apply({"params": params}, images)[1].argmax(-1))
    correct = count = 0
    with tqdm(total=len(held_out), desc="test feature classifier", unit="image", disable=None) as bar:
        for first in range(0, len(held_out), 500):
            rows = np.arange(first, min(first + 500, len(held_out)))
            images, labels = load_arrays(held_out, rows)
            correct += int((np.asarray(predict(images)) == labels).sum())
            count += len(labels)
            bar.update(len(rows))
    if not count:
        raise UserError("eval.test_split holds no image that can be read: check its files, or name another split")
    return correct, count
