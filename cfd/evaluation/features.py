"""The networks whose features the metrics use: a small classifier of the run's own images, InceptionV3 or DINOv2.

The classifier is for data sets about which Inception says little, such as 8x8 digits. It is trained on the training
images, never sees the diffusion model, and is stored in the run's folder. Metrics of its features are not comparable
with metrics of Inception's.
"""

import hashlib
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
from cfd.data.dataset import Dataset
from cfd.devices import parallel, preemption, seeds, watchdog, xla
from cfd.errors import UserError
from cfd.evaluation import dinov2, inception
from cfd.runs import files, npz

SATURATED = 0.95
"""A value of larger magnitude, in an image of values from −1 to 1, counts as saturated."""
HASHED_IMAGES = 16
"""The number of images of a data set whose pixels enter `data_hash`."""


class Outputs(NamedTuple):
    """Features and class probabilities of n images, and the share of saturated values in each of them.

    `spatial`, for sFID, and `probs`, for the Inception Score, are None if the network has no such layer. `saturation`,
    the function of this name of the images, is None if the outputs were made without it.
    """

    pool: Float[np.ndarray, "n d"]
    spatial: Float[np.ndarray, "n s"] | None
    probs: Float[np.ndarray, "n k"] | None
    saturation: Float[np.ndarray, " n"] | None = None


class FeatureNetwork(NamedTuple):
    """A feature network: its name, the SHA-256 of its weights file, and a function from images to `Outputs`.

    `extract` takes uint8 images [n, H, W, C], the same on every process, and gives all n outputs to every process.
    """

    name: str
    weights_hash: str
    extract: Callable[[UInt8[np.ndarray, "n h w c"]], Outputs]


def saturation(images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, " n"]:
    """The share of the values of each image that lie beyond SATURATED in magnitude, on the scale from −1 to 1."""
    beyond = np.abs(2 * images.astype(np.int16) - 255) > 255 * SATURATED
    return beyond.mean(axis=(1, 2, 3))


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
    `held_out`. classifier.json records the accuracy, and how the classifier was trained. Raises ValueError if the files
    are damaged, or if the classifier was trained for another number of steps or on other images, as `data_hash` says.
    """
    path = classifier_path(folder)
    net: Any = ImageClassifier(len(train.class_names))
    trained = recipe(train, num_steps=num_steps, flip=flip, seed=seed)
    recorded = read_recipe(folder, trained)
    parallel.barrier("feature classifier looked for")
    if recorded is not None:
        say_origin(path, recorded, trained)
    else:
        params = train_classifier(net, train, num_steps=num_steps, flip=flip, seed=seed)
        correct, count = count_correct(net, params, held_out)
        if jax.process_index() == 0:
            record = trained | {"held_out_accuracy": correct / count, "held_out_images": count}
            files.write_atomically(record_path(folder), json.dumps(record, indent=1))
            npz.write_npz(path, {"/".join(key): np.asarray(x) for key, x in flatten_dict(params).items()})
            print(f"Feature classifier, {count} held-out images: accuracy {correct / count:.4f}", flush=True)
        parallel.barrier("feature classifier")
    return read_classifier(path, mesh)


def read_classifier(path: str, mesh: Mesh) -> FeatureNetwork:
    """The feature classifier whose parameters are in the file `path`, such as features/classifier.npz of a run."""
    params = unflatten_dict({tuple(name.split("/")): x for name, x in npz.read_npz(path).items()})
    net: Any = ImageClassifier(len(params["Dense_1"]["bias"]))

    def network(params: Any, images: Array) -> tuple[Array, None, Array]:
        pool, logits = net.apply({"params": params}, images)
        return pool, None, nn.softmax(logits)

    return FeatureNetwork("classifier", inception.weights_hash(path), _extractor(network, params, mesh, 256))


def check_classifier(path: str, image_shape: tuple[int, int, int]) -> int:
    """The number of classes of the feature classifier in the file `path`, whose parameters are not read.

    Raises ValueError unless the file holds a feature classifier of images of this shape, (H, W, C).
    """
    give = "give the features/classifier.npz of a run with images of this shape"
    found = {name: header.shape for name, header in npz.npz_headers(path, remedy=give).items()}
    num_classes = max((1, *found.get("Dense_1/bias", ())))
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    shapes = jax.eval_shape(ImageClassifier(num_classes).init, jax.random.key(0), image)["params"]
    flat: dict[Any, Any] = flatten_dict(shapes)
    expected = {"/".join(key): x.shape for key, x in flat.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = wrong[0]
        raise UserError(
            f"{path} holds no feature classifier of images of shape {image_shape}, [H, W, C]: {name} is "
            f"{found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}: {give}"
        )
    return num_classes


def classifier_path(folder: str) -> str:
    """The file of the feature classifier in a run's folder."""
    return os.path.join(folder, "features", "classifier.npz")


def record_path(folder: str) -> str:
    """The file that says how the feature classifier in a run's folder was trained."""
    return os.path.join(folder, "features", "classifier.json")


def recipe(train: Dataset, *, num_steps: int, flip: bool, seed: int) -> dict[str, Any]:
    """How a feature classifier is trained, as classifier.json records it."""
    num_classes = len(train.class_names)
    return dict(classifier_steps=num_steps, flip=flip, seed=seed, num_classes=num_classes, data=data_hash(train))


def read_recipe(folder: str, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """How the feature classifier in a run's folder was trained; None if there is none.

    Raises ValueError if its files are damaged, and as `check_trained` does.
    """
    path = classifier_path(folder)
    if not files.exists(path):
        return None
    record = record_path(folder)
    remedy = f"remove the folder {os.path.dirname(path)}, and --mode=sweep creates it again"
    try:
        content = files.read_bytes(record)
    except OSError as error:
        raise UserError(f"{record} cannot be read ({error.strerror}): {files.how_to_allow(record)}") from error
    try:
        recorded = None if content is None else json.loads(content)
    except ValueError as error:
        raise UserError(f"{record} is no JSON ({error}): {remedy}") from None
    if not isinstance(recorded, dict) or "classifier_steps" not in recorded:
        raise UserError(f"{record} is missing, or does not say how the classifier was trained: {remedy}")
    npz.read_npz(path, remedy=remedy)
    check_trained(path, recorded, wanted)
    return recorded


def check_trained(path: str, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError if the feature classifier at `path`, trained as `recorded`, is not for data as in `wanted`.

    Another seed and other flips are accepted, because runs are compared with the classifier of one of them. So is a
    classifier of an earlier version, which recorded only the number of steps.
    """
    if other := differences(recorded, wanted, ("classifier_steps", "num_classes", "data")):
        raise UserError(
            f"the feature classifier {path} was trained in another way: {', '.join(other)}. Give the config and the "
            f"data with which it was trained, or remove {os.path.dirname(path)}, and --mode=sweep trains another one "
            "and measures every row with it"
        )


def say_origin(path: str, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Prints, on process 0, in which respects `check_trained` has accepted another classifier."""
    if jax.process_index() != 0:
        return
    if other := differences(recorded, wanted, ("seed", "flip")):
        print(f"The feature classifier {path} is that of another run: {', '.join(other)}.", flush=True)
    if not wanted.keys() <= recorded.keys():
        print(
            f"{path} is of an earlier version, which did not record the images of its training: it is used as if they "
            f"were these. If they have changed since, remove {os.path.dirname(path)}.",
            flush=True,
        )


def differences(recorded: dict[str, Any], wanted: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """ "field: value there, value here" for each of the recorded fields in `names` that differs."""
    words = {
        "classifier_steps": "eval.classifier_steps",
        "flip": "data.flip",
        "num_classes": "the number of classes",
        "data": "the hash of the images",
    }
    return [
        f"{words.get(name, name)} is {str(recorded[name])[:12]} there and {str(wanted[name])[:12]} here"
        for name in names
        if name in recorded and recorded[name] != wanted[name]
    ]


def data_hash(dataset: Dataset) -> str:
    """The SHA-256, in hexadecimal, of a data set's identity and of the pixels of HASHED_IMAGES of its images.

    The identity covers the names, sizes and labels of all images. Other pixels in a file of the same name and size are
    seen only if the image is one of those, which are spread evenly over the data set.
    """
    digest = hashlib.sha256(dataset.identity.encode())
    count = min(HASHED_IMAGES, len(dataset))
    for array in load_arrays(dataset, np.arange(count) * len(dataset) // count):
        digest.update(array.tobytes())
    return digest.hexdigest()


def open_inception(path: str, mesh: Mesh) -> FeatureNetwork:
    """InceptionV3 as FID uses it, with the weights that `python -m cfd.convert inception` wrote to `path`.

    Raises ValueError if the file does not hold these weights.
    """
    net = inception.InceptionV3()
    extract = _extractor(
        lambda params, images: net.apply({"params": params}, images), inception.load_params(path), mesh, 32
    )
    return FeatureNetwork("inception", inception.weights_hash(path), extract)


def open_dinov2(path: str, mesh: Mesh) -> FeatureNetwork:
    """DINOv2 as FD-DINOv2 uses it, with the weights that `python -m cfd.convert dinov2` wrote to `path`.

    It has neither class probabilities nor a spatial layer. An image of any size takes 0.16 TFLOP. Raises ValueError if
    the file does not hold these weights.
    """

    def network(params: Any, images: Array) -> tuple[Any, None, None]:
        return dinov2.VIT_L.apply({"params": params}, images), None, None

    extract = _extractor(network, dinov2.load_params(path), mesh, 32)
    return FeatureNetwork("dinov2", inception.weights_hash(path), extract)


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
        pool, spatial, probs = whole
        return Outputs(pool, spatial, probs, saturation(images))

    return extract


def train_classifier(net: Any, dataset: Dataset, *, num_steps: int, flip: bool, seed: int) -> Any:
    """The parameters of `net`, trained on `num_steps` batches of 128 images by AdamW with a cosine decay.

    Raises `preemption.Stopped` on request. Nothing is saved then: the next call starts from the beginning.
    """
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, num_steps), weight_decay=1e-3)
    image = jnp.zeros((1, dataset.image_size, dataset.image_size, dataset.channels), jnp.uint8)

    def init(key: Array) -> tuple[Any, Any]:
        params = net.init(key, image)["params"]
        return params, optimizer.init(params)

    key = seeds.key(seed)
    params, opt_state = xla.compiled(init, key, once=True)(key)

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
            params, opt_state = step(params, opt_state, batch["image"], batch["label"])
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
