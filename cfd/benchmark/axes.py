"""The axes along which cost is measured as it grows: what is called at each size, and the exponent that it must have.

The network is two residual blocks of the U-Net, which compile quickly; attention, whose cost grows with the square of
the number of pixels, is left out.
"""

import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int

from cfd.benchmark.ours import training
from cfd.devices import parallel, seeds, xla
from cfd.evaluation import intervals, kid, leave_out, metrics, nearest
from cfd.losses import eps_loss
from cfd.modes.sampler import Network, SampleSpec, Sampling, compile_sampler
from cfd.modes.train_step import initial_state
from cfd.networks.layers import Conv, Dense
from cfd.networks.unet import ResBlock
from cfd.runs import manifest, results
from cfd.sampling import ancestral, guided_sample

FEATURES = 64
"""Features per image in the metrics. Their cost in it is known: linear, and for FID that of products of matrices."""
BATCH, CHANNELS = 32, 32


class Work(NamedTuple):
    """A call to be timed. `memory` is its memory in bytes by XLA's count; None stands for the rise of the process's."""

    call: Callable[[], Any]
    memory: int | None = None


class Axis(NamedTuple):
    """Work that is measured at several sizes, and the exponents of time and memory that cannot be avoided.

    `build(size)` gives the work. `virtual` says that the sizes are numbers of virtual CPU devices.
    """

    what: str
    sizes: tuple[int, ...]
    time: float
    memory: float
    build: Callable[[int], Work]
    virtual: bool = False


class Blocks(nn.Module):
    """Two residual blocks of the U-Net between two convolutions."""

    @nn.compact
    def __call__(self, z: Float[Array, "b h w 3"], logsnr: Float[Array, "b"], labels: Int[Array, "b"]) -> Array:
        condition = jnp.stack([logsnr, labels.astype(jnp.float32)], axis=1)
        emb = Dense(CHANNELS, "float32", name="emb")(condition)
        h = Conv(CHANNELS, "float32", name="conv_in")(z)
        for number in range(2):
            h = ResBlock(CHANNELS, "none", True, 0.0, "float32", True, name=f"block_{number}")(h, emb, False)
        return Conv(3, "float32", name="conv_out")(h)


def eps_of_params(params: Any) -> Callable[[Array, Array, Array], Array]:
    return lambda *inputs: Blocks().apply({"params": params}, *inputs)  # pyright: ignore[reportReturnType]


def params_of(side: int) -> Any:
    """Parameters for images of this side, without compiling their initialisation: their values cost nothing."""
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    inputs = (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32), one, jax.ShapeDtypeStruct((1,), jnp.int32))
    shapes = jax.eval_shape(Blocks().init, jax.eval_shape(lambda: seeds.key(0)), *inputs)["params"]
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.02 * numbers.standard_normal(x.shape, np.float32)), shapes)


def bytes_of(program: Any, devices: int = 1) -> int:
    """The memory of a compiled program on all devices."""
    found = program.memory_analysis()
    kinds = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return devices * (kinds + found.temp_size_in_bytes)


def train(batch: int = BATCH, side: int = 16) -> Work:
    """A training step on all devices."""
    mesh = parallel.make_mesh(-1, 1)

    def loss_fn(key: Any, params: Any, x: Any, labels: Any) -> Any:
        return eps_loss(key, eps_of_params(params), x, labels)

    optimizer, step = training(loss_fn, None, replicated=True, join_small=jax.default_backend() == "cpu")
    params = params_of(side)
    state = parallel.replicate(mesh, jax.jit(lambda p: initial_state(lambda _: p, optimizer, seeds.key(0)))(params))
    images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    labels = np.arange(batch, dtype=np.int32) % 10
    inputs = {"image": parallel.shard_rows(mesh, images), "label": parallel.shard_rows(mesh, labels)}
    key = parallel.replicate(mesh, seeds.key(1))
    program = xla.compiled(step, state, inputs, key, donate_argnums=0)

    def call() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(program(state, inputs, key))

    return Work(call, bytes_of(program, mesh.size))


def sample(steps: int) -> Work:
    """Guided samples by T steps."""
    params, labels = params_of(8), jnp.arange(BATCH) % 10

    def sampler(params: Any, w: Any) -> Any:
        return guided_sample(seeds.key(0), eps_of_params(params), labels, (8, 8, 3), w=w, num_steps=steps)

    program = xla.compiled(sampler, params, jnp.float32(1.0))
    return Work(lambda: jax.block_until_ready(program(params, jnp.float32(1.0))), bytes_of(program))


def sweep(images: int, weights: int = 1) -> Work:
    """The images of a sweep, by one program for all weights and batches."""
    sampling = Sampling(lambda v: ancestral(v), 8, 0.3, (), True, False, BATCH, -20.0, 20.0)
    sampler = compile_sampler(Network(eps_of_params, (8, 8, 3), 10), sampling, parallel.make_mesh(-1, 1))
    params = params_of(8)

    def spec(count: int, w: float) -> SampleSpec:
        index = np.arange(count, dtype=np.int32)
        return SampleSpec(np.zeros(count, np.uint32), index, index % 10, np.full(count, w, np.float32))

    def call() -> None:
        for number in range(weights):
            for _ in sampler(params, spec(images, 0.1 + number)):
                pass

    list(sampler(params, spec(BATCH, 1.0)))  # which compiles
    return Work(call)


def features(count: int, seed: int = 0) -> Float32[np.ndarray, "n d"]:
    """Features as a layer after a ReLU has them."""
    x = np.random.default_rng(seed).standard_normal((count, FEATURES), np.float32)
    return np.maximum(x, 0.0, out=x)


def fid(images: int) -> Work:
    """FID of images whose features come in batches, which do not stay."""
    batch, mu, sigma = features(1000), np.zeros(FEATURES), np.eye(FEATURES)

    def call() -> None:
        total = None
        for _ in range(images // len(batch)):
            total = metrics.add(total, batch)
        assert total is not None
        metrics.frechet_distance(mu, sigma, *metrics.mean_and_cov(total))

    return Work(call)


def fid_interval(images: int) -> Work:
    x, group = features(images), intervals.groups(np.arange(images) % 10)
    mu, sigma, root = np.zeros(FEATURES), np.eye(FEATURES), np.eye(FEATURES)
    whole = metrics.moments(x)
    return Work(lambda: leave_out.frechet_distance(mu, sigma, root, x, group, whole))


def inception_score(images: int) -> Work:
    """The Inception Score and its interval."""
    probs, group = features(images) + 1e-3, intervals.groups(np.arange(images) % 10)
    probs /= probs.sum(axis=1, keepdims=True)
    index = np.arange(images)
    return Work(lambda: leave_out.inception_score(probs, group, metrics.score_sums(probs, index, images)))


def precision_recall(images: int) -> Work:
    """Precision and recall of as many images as references."""
    metrics.precision_recall(features(50), features(60, 1))  # what it compiles first is not part of the memory
    x, y = features(images), features(images, 1)
    return Work(lambda: metrics.precision_recall(x, y))


def precision_recall_interval(images: int) -> Work:
    metrics.precision_recall(features(50), features(60, 1))
    x, y, group = features(images), features(images, 1), intervals.groups(np.arange(images) % 10)
    return Work(lambda: leave_out.precision_recall(x, y, group))


def kid_interval(images: int) -> Work:
    """KID and its interval, of as many images as references."""
    x, y, labels = features(images), features(images, 1), np.arange(images) % 10
    return Work(lambda: kid.kid(x, y, labels, intervals.groups(labels), 1.0))


def nearest_images(images: int) -> Work:
    """The nearest of so many training images for each of 1,000 samples."""
    nearest.nearest_rows(features(50), features(60, 1))
    x, y = features(1000), features(images, 1)
    return Work(lambda: nearest.nearest_rows(x, y))


def rows(count: int) -> Work:
    """Writing the rows of a sweep one by one, each with its manifest, and reading them."""
    settings = dict.fromkeys(results.COLUMNS, 0) | {name: "a" for name in results.WORDS}

    def call() -> None:
        folder = tempfile.mkdtemp()
        try:
            for number in range(count):
                made = {"sampling": {"w": float(number)}}
                manifest.write_manifest(folder, made)
                row = settings | {"w": float(number), "manifest": manifest.manifest_name(made)}
                results.append_row(folder, row)
                results.count_rows(folder)
            assert len(results.latest(folder)) == count
        finally:
            shutil.rmtree(folder)

    return Work(call)


AXES = {
    "batch": Axis("training step: images in the batch", (16, 64, 256), 1, 1, lambda n: train(batch=n)),
    "side": Axis("training step: side of the image", (8, 16, 32, 64), 2, 2, lambda n: train(16, n)),
    "devices": Axis(
        "training step: virtual devices, same batch", (1, 2, 4, 8), 0, 0, lambda _: train(256), virtual=True
    ),
    "T": Axis("sampler: steps T", (8, 32, 128), 1, 0, sample),
    "weights": Axis("sweep: weights", (1, 4, 16), 1, 0, lambda n: sweep(BATCH, n)),
    "images": Axis("sweep: images per weight", (32, 128, 512), 1, 0, sweep),
    "rows": Axis("sweep: rows of sweep.csv", (10, 100, 1000), 1, 0, rows),
    "fid": Axis("FID: images", (16_000, 64_000, 256_000), 1, 0, fid),
    "fid_interval": Axis("FID, interval: images", (16_000, 64_000, 256_000), 1, 1, fid_interval),
    "is": Axis("IS with interval: images", (16_000, 64_000, 256_000), 1, 1, inception_score),
    "kid": Axis("KID with interval: images, references", (2500, 5000, 10_000), 2, 1, kid_interval),
    "recall": Axis("precision, recall: images, references", (6000, 12_000, 24_000), 2, 0, precision_recall),
    "recall_interval": Axis(
        "precision, recall, interval: images, references", (6000, 12_000, 24_000), 2, 0, precision_recall_interval
    ),
    "nearest": Axis("nearest of so many training images", (32_000, 64_000, 128_000), 1, 0, nearest_images),
}
"""{name: axis}, in the order of the table."""
