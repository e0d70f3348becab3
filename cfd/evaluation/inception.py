"""InceptionV3 as FID uses it: the TensorFlow graph of 2015-12-05, with the outputs that ADM's evaluator reads.

It differs from the InceptionV3 of the paper (arXiv:1512.00567) in three ways: its average pools do not count the
padding, its last block has a max pool, and it has 1008 classes. The batch norms are fixed and therefore folded into the
convolutions.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import Float, UInt8

from cfd.errors import UserError
from cfd.runs import files, npz

SIZE = 299
BATCH_NORM_EPS = 1e-3
# By default, GPUs multiply float32 in TF32 and TPUs in bfloat16, which changes the second decimal of FID.
PRECISION = jax.lax.Precision.HIGHEST

Layer = tuple[int, tuple[int, int]]  # (output features, kernel size)


class Features(NamedTuple):
    """The outputs for FID, sFID and IS, in this order.

    They are the graph's pool_3, the first 7 channels of its mixed_6/conv, and the softmax of the logits without bias.
    """

    pool: Float[Array, "b 2048"]
    spatial: Float[Array, "b 2023"]
    probs: Float[Array, "b 1008"]


class Conv(nn.Module):
    """Convolution and ReLU. If `padding` is None, it is SAME at stride 1 and VALID at stride 2."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        padding = self.padding or ("SAME" if self.stride == 1 else "VALID")
        conv = nn.Conv(self.features, self.kernel, self.stride, padding, precision=PRECISION, name="conv")
        return nn.relu(conv(x))


def chain(x: Float[Array, "b h w c"], name: str, *layers: Layer, stride: int = 1) -> Float[Array, "b h2 w2 d"]:
    """One branch: the convolutions name_1, name_2, ... The last one has the stride `stride`, the others 1."""
    for i, (features, kernel) in enumerate(layers, 1):
        x = Conv(features, kernel, stride if i == len(layers) else 1, name=f"{name}_{i}")(x)
    return x


def pooled(x: Float[Array, "b h w c"], features: int, pool: str = "average") -> Float[Array, "b h w d"]:
    """The pooling branch: a 3x3 pool, "average" or "max", at stride 1, and then a 1x1 convolution."""
    if pool == "average":
        x = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
    else:
        x = nn.max_pool(x, (3, 3), (1, 1), "SAME")
    return Conv(features, (1, 1), name="branch_pool")(x)


class BlockA(nn.Module):
    """A block at 35x35: 1x1, 5x5, double 3x3 and pooling branches."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        single = Conv(64, (1, 1), name="branch1x1")(x)
        wide = chain(x, "branch5x5", (48, (1, 1)), (64, (5, 5)))
        double = chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)))
        return jnp.concatenate([single, wide, double, pooled(x, self.pool_features)], axis=-1)


class BlockB(nn.Module):
    """The block that reduces 35x35 to 17x17."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        single = Conv(384, (3, 3), 2, name="branch3x3")(x)
        double = chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), stride=2)
        return jnp.concatenate([single, double, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class BlockC(nn.Module):
    """A block at 17x17: 1x1, 7x7, double 7x7 and pooling branches. Each 7x7 is factored into 1x7 and 7x1."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        w, row, column = self.width, (1, 7), (7, 1)
        single = Conv(192, (1, 1), name="branch1x1")(x)
        seven = chain(x, "branch7x7", (w, (1, 1)), (w, row), (192, column))
        double = chain(x, "branch7x7dbl", (w, (1, 1)), (w, column), (w, row), (w, column), (192, row))
        return jnp.concatenate([single, seven, double, pooled(x, 192)], axis=-1)


class BlockD(nn.Module):
    """The block that reduces 17x17 to 8x8."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        three = chain(x, "branch3x3", (192, (1, 1)), (320, (3, 3)), stride=2)
        seven = chain(x, "branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)), stride=2)
        return jnp.concatenate([three, seven, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class BlockE(nn.Module):
    """A block at 8x8. Its 3x3 and double 3x3 branches end in a 1x3 and a 3x1 convolution in parallel."""

    pool: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        single = Conv(320, (1, 1), name="branch1x1")(x)
        three = Conv(384, (1, 1), name="branch3x3_1")(x)
        double = chain(x, "branch3x3dbl", (448, (1, 1)), (384, (3, 3)))
        fork = [
            Conv(384, kernel, name=f"{name}{side}")(branch)
            for branch, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
            for side, kernel in (("a", (1, 3)), ("b", (3, 1)))
        ]
        return jnp.concatenate([single, *fork, pooled(x, 192, self.pool)], axis=-1)


class InceptionV3(nn.Module):
    """`InceptionV3().apply({"params": params}, images)` gives the `Features` of images [b, h, w, 3] in [0, 255].

    The images are uint8 or float, of any size; they are resized to 299x299 as TensorFlow 1 does it. Raises ValueError
    unless they have three channels.
    """

    @nn.compact
    def __call__(self, images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"]) -> Features:
        if images.shape[-1] != 3:
            raise UserError(
                f"InceptionV3 takes RGB images, got shape {images.shape}: repeat a grey channel three times"
            )
        x = (resize_tf1(images.astype(jnp.float32), SIZE) - 128.0) / 128.0
        x = Conv(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = Conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = BlockA(32, name="Mixed_5b")(x)
        x = BlockA(64, name="Mixed_5c")(x)
        x = BlockA(64, name="Mixed_5d")(x)
        x = BlockB(name="Mixed_6a")(x)
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        # The graph calls this block mixed_6. Its 1x1 branch, mixed_6/conv after the ReLU, comes first in the output of
        # the block. Flatten it as ADM's evaluator does, channel last, to match the `mu_s` and `sigma_s` in its files.
        spatial = x[..., :7].reshape(len(x), -1)
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE("average", name="Mixed_7b")(x)
        x = BlockE("max", name="Mixed_7c")(x)
        pool = jnp.mean(x, axis=(1, 2))
        logits = nn.Dense(1008, use_bias=False, precision=PRECISION, name="fc")(pool)
        return Features(pool, spatial, nn.softmax(logits))


def resize_tf1(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b s s c"]:
    """TensorFlow 1's bilinear resize to [size, size]: it samples pixel i at i · (old / size), without antialiasing."""

    def resize(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        old = x.shape[axis]
        at = np.arange(size, dtype=np.float32) * np.float32(old / size)
        low = np.minimum(at.astype(np.int32), old - 1)
        fraction = (at - low).reshape(-1, *[1] * (x.ndim - 1 - axis))
        below, above = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, old - 1), axis)
        return below + (above - below) * jnp.broadcast_to(fraction, below.shape)

    return resize(resize(images, 2), 1)


def param_shapes() -> dict[tuple[str, ...], tuple[int, ...]]:
    """{path of a parameter: its shape}, for every parameter of InceptionV3."""
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    tree = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    return jax.tree.map(jnp.shape, flatten_dict(tree))


def save_params(path: str | Path, params: Mapping[str, Any]) -> None:
    """Writes the params as an `.npz` with one array per parameter, named by the parameter's path."""
    npz.write_npz(path, {"/".join(key): np.asarray(array) for key, array in flatten_dict(dict(params)).items()})


def load_params(path: str | Path) -> dict[str, Any]:
    """The params that `save_params` wrote. Raises ValueError unless the file holds exactly InceptionV3's arrays."""
    make = "make the file with `python -m cfd.convert inception FILE OUT`"
    arrays = {tuple(name.split("/")): array for name, array in npz.read_npz(path, remedy=make).items()}
    expected = param_shapes()
    wrong = [
        f"{'/'.join(key)}: {getattr(arrays.get(key), 'shape', 'missing')}, expected {expected.get(key, 'nothing')}"
        for key in sorted(expected.keys() | arrays.keys())
        if key not in arrays or arrays[key].shape != expected.get(key)
    ]
    if wrong:
        raise UserError(
            f"{path} does not hold InceptionV3: {len(wrong)} arrays differ, the first is {wrong[0]}: {make}"
        )
    return unflatten_dict({key: np.asarray(array, np.float32) for key, array in arrays.items()})


def weights_hash(path: str | Path) -> str:
    """The SHA-256 of a weights file, in hexadecimal. Results identify their feature network by it."""
    with files.downloaded(path) as copy, open(copy, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
