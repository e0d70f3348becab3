"""A transformer on the pixels of patches: JiT of Li and He (arXiv:2511.13720), attention and matrix products alone.

The blocks are those of DiT (Peebles and Xie, arXiv:2212.09748) with adaLN-Zero on λ and the class, RMS norms, SwiGLU,
rotary positions and normalised queries and keys. The tokens of the class that the paper adds to those of the image are
left out. The paper predicts x: set model.predict to "x".
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from cfd.networks.layers import Dense, attention
from cfd.networks.times import sinusoidal
from cfd.networks.unet import ConditionEmbedding, check_shapes, heads_of, input_channels

EPSILON = 1e-6
ROTARY_BASE = 100.0
"""The wavelengths of rotary positions are from 2π to nearly 2π times this, in patches."""


class Transformer(nn.Module):
    """A network of patches of `patch_size` x `patch_size` pixels, conditioned on λ and the class.

    `base_channels` is the width of a token, `depth` the number of blocks, and `bottleneck` the rank of the linear
    embedding of a patch; 0 leaves it full. The other fields are those of `UNet`, with the same meaning. At
    initialisation, the output is 0.
    """

    image_size: int
    num_classes: int
    out_channels: int = 0
    base_channels: int = 128
    patch_size: int = 4
    depth: int = 12
    bottleneck: int = 0
    head_channels: int = 64
    num_heads: int = 0
    dropout: float = 0.0
    time: str = "cosine"
    dtype: str = "float32"
    remat: bool = False
    fast: bool = True

    @nn.compact
    def __call__(
        self, z: Float[Array, "..."], logsnr: Float[Array, "..."], labels: Shaped[Array, "..."], train: bool = False
    ) -> Float[Array, "b h w k"]:
        """The prediction, with the height and width of z, which are multiples of `patch_size`.

        Arguments, `train` and errors are those of `UNet`.
        """
        inputs = input_channels(self, "patch_rank" if self.bottleneck else "patch_in")
        check_shapes(inputs and inputs // self.patch_size**2, z, logsnr=logsnr, labels=labels)
        check_patches(self, z)
        heads = rotary_heads(self)
        emb = ConditionEmbedding(self.num_classes, self.base_channels // 4, self.time, name="embed")(logsnr, labels)
        emb = nn.silu(emb).astype(self.dtype)
        h = to_patches(z, self.patch_size).astype(self.dtype)
        rows, columns = h.shape[1:3]
        h = h.reshape(len(z), rows * columns, -1)
        if self.bottleneck:
            h = Dense(self.bottleneck, self.dtype, use_bias=False, fast=self.fast, name="patch_rank")(h)
        h = Dense(self.base_channels, self.dtype, fast=self.fast, name="patch_in")(h)
        places = positions(rows, columns)
        h = h + fixed_embedding(places, self.base_channels)[None].astype(self.dtype)
        angles = rotary_angles(places, self.base_channels // heads)

        block = nn.remat(Block, static_argnums=(4,)) if self.remat else Block
        for i in range(self.depth):
            h = block(heads, self.dropout, self.dtype, self.fast, name=f"block_{i}")(h, emb, angles, train)

        shift, scale = modulation(self, "modulate_out", emb, 2, self.base_channels)
        h = modulate(h, shift, scale).astype(jnp.float32)
        channels = self.out_channels or z.shape[-1]
        h = nn.Dense(self.patch_size**2 * channels, kernel_init=nn.initializers.zeros, name="patch_out")(h)
        return from_patches(h.reshape(len(z), rows, columns, -1), self.patch_size)


class Block(nn.Module):
    """h + g · attention(norm(h)), then h + g · SwiGLU(norm(h)). Shifts, scales and gates g come from the embedding."""

    heads: int
    dropout: float
    dtype: str
    fast: bool

    @nn.compact
    def __call__(
        self, h: Float[Array, "b t c"], emb: Float[Array, "b d"], angles: Float[Array, "t r"], train: bool
    ) -> Float[Array, "b t c"]:
        (b, t, width), dtype = h.shape, self.dtype
        parts = modulation(self, "modulate", emb, 6, width)
        x = modulate(h, *parts[:2])
        qkv = Dense(3 * width, dtype, fast=self.fast, name="qkv")(x)
        qkv = qkv.reshape(b, t, 3, self.heads, width // self.heads)
        q, k = (
            rotate(rms_norm(qkv[:, :, i]) * gain(self, name, qkv.shape[-1]), angles).astype(dtype)
            for i, name in enumerate(("gain_q", "gain_k"))
        )
        x = attention(q, k, qkv[:, :, 2], fast=self.fast).reshape(h.shape)
        x = Dense(width, dtype, fast=self.fast, name="attention_out")(x)
        h = h + parts[2] * nn.Dropout(self.dropout, deterministic=not train)(x)

        x = modulate(h, *parts[3:5])
        hidden = hidden_width(width)
        up, gate = jnp.split(Dense(2 * hidden, dtype, fast=self.fast, name="mlp_in")(x), 2, -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(gate) * up)
        return h + parts[5] * Dense(width, dtype, fast=self.fast, name="mlp_out")(x)


def check_patches(net: Transformer, z: Array) -> None:
    """Raises ValueError if the patches of `net` do not tile z [B, H, W, C] or `image_size`."""
    p = net.patch_size
    for name, sides in (("image_size", [net.image_size] * 2), ("z", z.shape[1:3])):
        if any(side % p for side in sides):
            raise ValueError(
                f"{name} is {sides[0]}x{sides[1]}, which patches of {p}x{p} do not tile: change the size or patch_size"
            )


def rotary_heads(net: Transformer) -> int:
    """The number of attention heads. Raises ValueError as `heads_of` does, and unless 4 divides a head's channels."""
    heads = heads_of(net, net.base_channels)
    if net.base_channels // heads % 4:
        raise ValueError(
            f"{net.base_channels} channels do not divide into heads of a multiple of 4 channels with num_heads = "
            f"{net.num_heads}, head_channels = {net.head_channels}, and rotary positions need such heads: set "
            "head_channels to a divisor that is a multiple of 4, and num_heads to 0"
        )
    return heads


def to_patches(z: Float[Array, "b h w c"], size: int) -> Float[Array, "b rows columns k"]:
    """The patches of images: size² · c values each, in the order of row, column and channel."""
    b, height, width, channels = z.shape
    split = z.reshape(b, height // size, size, width // size, size, channels)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // size, width // size, size**2 * channels)


def from_patches(patches: Float[Array, "b rows columns k"], size: int) -> Float[Array, "b h w c"]:
    """The images of patches, the inverse of `to_patches`."""
    b, rows, columns, values = patches.shape
    split = patches.reshape(b, rows, columns, size, size, values // size**2)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * size, columns * size, values // size**2)


def positions(rows: int, columns: int) -> Float[Array, "t 2"]:
    """The row and the column of each token."""
    grid = jnp.meshgrid(jnp.arange(rows, dtype=jnp.float32), jnp.arange(columns, dtype=jnp.float32), indexing="ij")
    return jnp.stack(grid, -1).reshape(rows * columns, 2)


def fixed_embedding(places: Float[Array, "t 2"], width: int) -> Float[Array, "t c"]:
    """Half of the channels for the sinusoids of the row, and half for those of the column."""
    return jnp.concatenate([sinusoidal(places[:, axis], width // 2) for axis in (0, 1)], -1)


def rotary_angles(places: Float[Array, "t 2"], channels: int) -> Float[Array, "t r"]:
    """The angles of `channels` / 2 planes: half with the row, half with the column (Heo et al., arXiv:2403.13298)."""
    rates = ROTARY_BASE ** (-jnp.arange(channels // 4, dtype=jnp.float32) / (channels // 4))
    return jnp.concatenate([places[:, axis, None] * rates[None] for axis in (0, 1)], -1)


def rotate(x: Float[Array, "b t n d"], angles: Float[Array, "t r"]) -> Float[Array, "b t n d"]:
    """x with channels i and i + d/2 turned by angle i: then q·k depends on the distance of two tokens alone.

    Su et al. (arXiv:2104.09864), Section 3.2.
    """
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def rms_norm(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """x / sqrt(mean(x²) + ε) over the channels, in float32: Zhang and Sennrich (arXiv:1910.07467)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)


def gain(module: nn.Module, name: str, channels: int) -> Float[Array, "1 1 1 c"]:
    """A learned factor of each channel."""
    return module.param(name, nn.initializers.ones, (channels,), jnp.float32)[None, None, None]


def modulation(module: Any, name: str, emb: Float[Array, "b d"], count: int, width: int) -> list[Array]:
    """`count` vectors [B, 1, width] of the embedding, 0 at initialisation: adaLN-Zero of Peebles and Xie."""
    out = Dense(count * width, module.dtype, zero=True, fast=module.fast, name=name)(emb)
    return jnp.split(out[:, None], count, -1)


def modulate(h: Float[Array, "b t c"], shift: Float[Array, "b 1 c"], scale: Float[Array, "b 1 c"]) -> Array:
    """rms_norm(h) · (1 + scale) + shift, in the dtype of h."""
    return rms_norm(h).astype(h.dtype) * (1.0 + scale) + shift


def hidden_width(width: int) -> int:
    """The width of SwiGLU's hidden layer: with 8/3 of the input's, its three matrices are as large as the usual two.

    Shazeer (arXiv:2002.05202). Rounded to a multiple of 32.
    """
    return max(32, round(width * 8 / 3 / 32) * 32)
