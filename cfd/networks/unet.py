"""The U-Net of ADM: Dhariwal and Nichol, Diffusion Models Beat GANs (arXiv:2105.05233), Section 3 and Table 4.

Bind the parameters to use a network as an `eps_fn`:
`lambda z, logsnr, labels: net.apply({"params": params}, z, logsnr, labels)`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from cfd.networks.layers import Conv, attention, concatenate, group_norm
from cfd.networks.times import network_time, sinusoidal


class UNet(nn.Module):
    """ε_θ(z, λ, c): a residual U-Net with attention, conditioned on λ and the class.

    `attention_resolutions` lists the heights of the feature maps that get attention; the middle block always has it.
    Set either `head_channels` or `num_heads`, and the other to 0. `num_classes` = 0 makes an unconditional network.
    `time` selects the embedded time (see `network_time`): "cosine" for networks trained here, "adm_cosine" or
    "adm_linear" for the discrete time of imported ones. `dtype` is the compute dtype; parameters, input and output are
    float32. With `remat`, the backward pass recomputes the activations of each block instead of keeping them.
    """

    num_classes: int
    out_channels: int
    base_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    head_channels: int
    num_heads: int
    resblock_updown: bool
    scale_shift_norm: bool
    dropout: float
    time: str
    dtype: str
    remat: bool

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b h w c"],
        logsnr: Float[Array, "b"],
        labels: Int[Array, "b"],
        train: bool = False,
    ) -> Float[Array, "b h w k"]:
        """ε, with the height and width of z and `out_channels` channels. Label NULL_LABEL (any label below 0) is ∅.

        `train` turns dropout on. Raises ValueError for sizes or fields that do not fit together.
        """
        emb = ConditionEmbedding(self.num_classes, self.base_channels, self.time, name="embed")(logsnr, labels)
        res, attend = blocks(self, emb.astype(self.dtype), train)
        h, skips = encode(self, res, attend, z)
        for level, mult in reversed(tuple(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                h = concatenate(h, skips.pop())
                h = res(f"up_{level}_{i}_res", h, mult * self.base_channels)
                if h.shape[1] in self.attention_resolutions:
                    h = attend(f"up_{level}_{i}_attn", h)
            if level > 0:
                if self.resblock_updown:
                    h = res(f"up_{level}_sample", h, h.shape[-1], "up")
                else:
                    h = Conv(h.shape[-1], self.dtype, name=f"up_{level}_sample")(upsample(h))

        h = Norm(silu=True, name="norm_out")(h.astype(jnp.float32))
        return Conv(self.out_channels, "float32", zero=True, name="conv_out")(h)


def blocks(net: Any, emb: Float[Array, "b d"], train: bool) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """Two functions that create and apply a residual block, and an attention block, inside `net`.

    `net` is a module with the fields of `UNet`.
    """

    def res(name: str, h: Array, channels: int, resample: str = "none") -> Array:
        block = nn.remat(ResBlock, static_argnums=(3,)) if net.remat else ResBlock
        return block(channels, resample, net.scale_shift_norm, net.dropout, net.dtype, name=name)(h, emb, train)

    def attend(name: str, h: Array) -> Array:
        block = nn.remat(AttentionBlock) if net.remat else AttentionBlock
        return block(net.head_channels, net.num_heads, net.dtype, name=name)(h)

    return res, attend


def encode(
    net: Any, res: Callable[..., Array], attend: Callable[..., Array], z: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b h2 w2 k"], list[Array]]:
    """The downward half of `net` and its middle: the lowest feature map, and those of the skip connections.

    Raises ValueError if the levels cannot halve the sides of z.
    """
    levels = len(net.channel_mult)
    if z.shape[1] % 2 ** (levels - 1) or z.shape[2] % 2 ** (levels - 1):
        raise ValueError(
            f"z is {z.shape[1]}x{z.shape[2]}, but {levels} levels need sides divisible by {2 ** (levels - 1)}: "
            "change image_size or channel_mult"
        )
    h = Conv(net.base_channels * net.channel_mult[0], net.dtype, name="conv_in")(z)
    skips = [h]
    for level, mult in enumerate(net.channel_mult):
        for i in range(net.num_res_blocks):
            h = res(f"down_{level}_{i}_res", h, mult * net.base_channels)
            if h.shape[1] in net.attention_resolutions:
                h = attend(f"down_{level}_{i}_attn", h)
            skips.append(h)
        if level < levels - 1:
            if net.resblock_updown:
                h = res(f"down_{level}_sample", h, h.shape[-1], "down")
            else:
                h = Conv(h.shape[-1], net.dtype, stride=2, name=f"down_{level}_sample")(h)
            skips.append(h)

    h = res("mid_0_res", h, h.shape[-1])
    h = attend("mid_attn", h)
    return res("mid_1_res", h, h.shape[-1]), skips


class ConditionEmbedding(nn.Module):
    """The embedding of (λ, c) for every residual block: an MLP of the time, plus the class vector, which is 0 for ∅."""

    num_classes: int
    base_channels: int
    time: str

    @nn.compact
    def __call__(self, logsnr: Float[Array, "b"], labels: Int[Array, "b"] | None) -> Float[Array, "b d"]:
        width = 4 * self.base_channels
        emb = sinusoidal(network_time(logsnr, self.time), self.base_channels)
        emb = nn.Dense(width, name="time_1")(nn.silu(nn.Dense(width, name="time_0")(emb)))
        if self.num_classes and labels is not None:
            vector = nn.Embed(self.num_classes, width, embedding_init=nn.initializers.normal(1.0), name="label")(labels)
            emb = emb + jnp.where(labels[:, None] >= 0, vector, 0.0)
        return emb


class ResBlock(nn.Module):
    """ADM's residual block: norm, SiLU, resampling, conv; norm modulated by the embedding, SiLU, dropout, conv.

    Without `scale_shift_norm`, the embedding is added to the features before the second norm.
    """

    channels: int
    resample: str  # "none", "down" or "up"
    scale_shift_norm: bool
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], emb: Float[Array, "b d"], train: bool) -> Float[Array, "b h2 w2 k"]:
        change = {"none": lambda h: h, "down": downsample, "up": upsample}[self.resample]
        h = change(Norm(silu=True, name="norm_0")(x))
        h = Conv(self.channels, self.dtype, name="conv_0")(h)
        emb = nn.Dense((1 + self.scale_shift_norm) * self.channels, dtype=self.dtype, name="emb")(nn.silu(emb))
        if self.scale_shift_norm:
            h = Norm(silu=True, name="norm_1")(h, *jnp.split(emb, 2, -1))
        else:
            h = Norm(silu=True, name="norm_1")(h + emb[:, None, None, :])
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.channels, self.dtype, zero=True, name="conv_1")(h)
        x = change(x)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, self.dtype, size=1, name="skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, with a residual connection."""

    head_channels: int
    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, channels = x.shape
        unit = self.num_heads or self.head_channels
        if not unit or channels % unit:
            raise ValueError(
                f"{channels} channels do not divide into heads with num_heads = {self.num_heads}, head_channels = "
                f"{self.head_channels}: set one of them to a divisor of {channels}, and the other to 0"
            )
        heads = self.num_heads or channels // unit
        qkv = Conv(3 * channels, self.dtype, size=1, name="qkv")(Norm(name="norm")(x))
        qkv = qkv.reshape(b, height * width, 3, heads, channels // heads)
        h = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(x.shape)
        return x + Conv(channels, self.dtype, size=1, zero=True, name="out")(h)


class Norm(nn.Module):
    """Group normalisation, then · (1 + scale) + shift if given (ADM's scale-shift norm), then SiLU if `silu`."""

    silu: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Float[Array, "b h w c"]:
        gain, bias = (jnp.broadcast_to(p, (x.shape[0], x.shape[3])) for p in Affine(name="group")(x.shape[3]))
        if scale is not None and shift is not None:
            scale, shift = scale.astype(jnp.float32), shift.astype(jnp.float32)
            gain, bias = gain * (1.0 + scale), bias * (1.0 + scale) + shift
        return group_norm(x, gain, bias, silu=self.silu)


class Affine(nn.Module):
    """The parameters of a normalisation: the gain, and the bias."""

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        return scale, self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)


def downsample(h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The means of 2x2 blocks, at half the resolution."""
    return nn.avg_pool(h, (2, 2), (2, 2))


def upsample(h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Each pixel repeated as a 2x2 block, at double the resolution."""
    return jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
