"""DINOv2 (arXiv:2304.07193) as FD-DINOv2 uses it (Stein et al., arXiv:2306.04675): the class token of its ViT-L/14.

Images are resized and normalized as EDM2's evaluator does it by default (NVlabs/edm2, `calculate_metrics.py`): bicubic
with antialiasing, in float32, without clipping. By default, the evaluator of Stein et al. (layer6ai-labs/dgm-eval)
resizes with Pillow instead, which has the same filter but rounds and clips to uint8.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import Float, UInt8

from cfd.errors import UserError
from cfd.runs import npz

SIZE = 224
PATCH = 14
HEAD_CHANNELS = 64
EPS = 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Those of ImageNet's colours in [0, 1]."""
# By default, GPUs multiply float32 in TF32 and TPUs in bfloat16.
PRECISION = jax.lax.Precision.HIGHEST
MAX_BYTES = 2**31  # the weights of ViT-L/14 take 1.22 GB


class Block(nn.Module):
    """A transformer block with normalization before, and a scale for each channel after, attention and MLP."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], _: None) -> tuple[Float[Array, "b n d"], None]:
        width, heads = x.shape[-1], x.shape[-1] // HEAD_CHANNELS

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, precision=PRECISION, name=name)

        def scale(name: str) -> Float[Array, "b n d"]:
            return jnp.broadcast_to(self.param(name, nn.initializers.ones, (width,)), x.shape)

        qkv = dense(3 * width, "qkv")(norm("norm1")(x)).reshape(*x.shape[:2], 3, heads, HEAD_CHANNELS)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("bihc,bjhc->bhij", q / HEAD_CHANNELS**0.5, k, precision=PRECISION)
        mixed = jnp.einsum("bhij,bjhc->bihc", nn.softmax(scores), v, precision=PRECISION)
        x = x + dense(width, "proj")(mixed.reshape(x.shape)) * scale("ls1")
        hidden = nn.gelu(dense(4 * width, "fc1")(norm("norm2")(x)), approximate=False)
        return x + dense(width, "fc2")(hidden) * scale("ls2"), None


class DINOv2(nn.Module):
    """`VIT_L.apply({"params": params}, images)` gives the features [b, 1024] of images [b, h, w, 3] in [0, 255].

    The images are uint8 or float, of any size; they are resized to 224x224. The positions of the patches were trained
    on a grid of `grid` by `grid`, and are interpolated to 16 by 16. Raises ValueError unless the images have three
    channels.
    """

    width: int
    depth: int
    grid: int

    @nn.compact
    def __call__(self, images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        if images.shape[-1] != 3:
            raise UserError(f"DINOv2 takes RGB images, got shape {images.shape}: repeat a grey channel three times")
        x = resize(images.astype(jnp.float32), SIZE) / 255.0
        x = (x - jnp.broadcast_to(jnp.array(MEAN), x.shape)) / jnp.broadcast_to(jnp.array(STD), x.shape)
        patches = nn.Conv(self.width, (PATCH, PATCH), PATCH, "VALID", precision=PRECISION, name="patch_embed")(x)
        cls_token = self.param("cls_token", nn.initializers.zeros, (1, self.width))
        positions = self.param("pos_embed", nn.initializers.zeros, (1 + self.grid**2, self.width))
        tokens = jnp.broadcast_to(cls_token, (len(x), 1, self.width))
        x = jnp.concatenate([tokens, patches.reshape(len(x), -1, self.width)], axis=1)
        x = x + interpolate_positions(positions, SIZE // PATCH)[None]
        # XLA compiles one block for all: ViT-L, unrolled, takes eight times as long to compile on a CPU.
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        x, _ = blocks(name="blocks")(x, None)
        return norm("norm")(x[:, 0])


def norm(name: str) -> nn.LayerNorm:
    """Layer normalization. The variance is that of the differences from the mean, as in PyTorch."""
    return nn.LayerNorm(EPS, use_fast_variance=False, name=name)


def resize(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b s s c"]:
    """PyTorch's bicubic `interpolate` to [size, size] with `antialias=True`, which has Pillow's weights."""
    rows, columns = (jnp.asarray(antialiased(old, size), jnp.float32) for old in images.shape[1:3])
    narrow = jnp.einsum("xw,bhwc->bhxc", columns, images, precision=PRECISION)
    return jnp.einsum("yh,bhxc->byxc", rows, narrow, precision=PRECISION)


def interpolate_positions(positions: Float[Array, "n d"], size: int) -> Float[Array, "m d"]:
    """The class token's position and those of size² patches, from those of a square of another number of patches.

    DINOv2 without registers (its hub's interpolate_antialias=False and interpolate_offset=0.1) calls PyTorch's bicubic
    `interpolate` with the scale factor (size + 0.1) / old, which the source coordinates then follow.
    """
    old = round((len(positions) - 1) ** 0.5)
    if old == size:
        return positions
    weights = jnp.asarray(with_offset(old, size), jnp.float32)
    grid = positions[1:].reshape(old, old, -1)
    narrow = jnp.einsum("xw,hwd->hxd", weights, grid, precision=PRECISION)
    patches = jnp.einsum("yh,hxd->yxd", weights, narrow, precision=PRECISION)
    return jnp.concatenate([positions[:1], patches.reshape(size**2, -1)])


def antialiased(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of a bicubic resize whose filter widens with the old image's share, and ends at the image's edge."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    weights = cubic((np.arange(old) - at[:, None]) / max(old / new, 1.0), -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def with_offset(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of a bicubic resize by the factor (new + 0.1) / old, which repeats the values at the edge."""
    at = (np.arange(new) + 0.5) * old / (new + 0.1) - 0.5
    weights = np.zeros((new, old))
    for neighbour in range(-1, 3):
        source = np.floor(at) + neighbour
        np.add.at(weights, (np.arange(new), np.clip(source, 0, old - 1).astype(int)), cubic(source - at, -0.75))
    return weights


def cubic(x: Float[np.ndarray, "..."], a: float) -> Float[np.ndarray, "..."]:
    """Keys' cubic convolution kernel (1981, equation 4, where a = -0.5); a is its slope at 1."""
    x = np.abs(x)
    near, far = ((a + 2.0) * x - (a + 3.0)) * x**2 + 1.0, a * (((x - 5.0) * x + 8.0) * x - 4.0)
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


VIT_L = DINOv2(width=1024, depth=24, grid=37)
"""ViT-L/14 as published. FD-DINOv2 is of no other network."""


def param_shapes() -> dict[tuple[str, ...], tuple[int, ...]]:
    """{path of a parameter: its shape}, for every parameter of VIT_L. The blocks are stacked along the first axis."""
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.tree.map(jnp.shape, flatten_dict(jax.eval_shape(VIT_L.init, jax.random.key(0), image)["params"]))


def save_params(path: str | Path, params: Mapping[str, Any]) -> None:
    """Writes the params as an `.npz` with one array per parameter, named by the parameter's path."""
    npz.write_npz(path, {"/".join(key): np.asarray(array) for key, array in flatten_dict(dict(params)).items()})


def load_params(path: str | Path) -> dict[str, Any]:
    """The params that `save_params` wrote.

    Raises ValueError, before any array is read, unless the file holds exactly VIT_L's arrays.
    """
    make = "make the file with `python -m cfd.convert dinov2 FILE OUT`"
    found = {name: header.shape for name, header in npz.npz_headers(path, remedy=make).items()}
    expected = {"/".join(key): shape for key, shape in param_shapes().items()}
    wrong = [
        f"{name}: {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise UserError(
            f"{path} does not hold DINOv2's ViT-L/14: {len(wrong)} arrays differ, the first is {wrong[0]}: {make}"
        )
    arrays = npz.read_npz(path, max_bytes=MAX_BYTES, remedy=make)
    return unflatten_dict({tuple(name.split("/")): np.asarray(x, np.float32) for name, x in arrays.items()})
