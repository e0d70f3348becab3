"""The U-Net of ADM: Dhariwal and Nichol, Diffusion Models Beat GANs (arXiv:2105.05233), Section 3 and Table 4.

Bind the parameters to use a network as an `eps_fn`:
`lambda z, logsnr, labels: net.apply({"params": params}, z, logsnr, labels)`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, PyTree, Shaped

from cfd.arguments import concrete
from cfd.networks.layers import Conv, Dense, concatenate, group_norm, self_attention
from cfd.networks.times import network_time, sinusoidal
from cfd.networks.weight import Weight, WeightedSum, weight_input


class UNet(nn.Module):
    """ε_θ(z, λ, c): a residual U-Net with attention, conditioned on λ and the class.

    `image_size` is the height and width, in pixels, of the images that the network is trained on. At that size, level i
    has feature maps of height `image_size` / 2^i. It has attention if this height is in `attention_resolutions`, and
    keeps it for z of any other size. The middle block always has attention.

    `num_classes` = 0 makes an unconditional network, which ignores labels. `out_channels` = 0 means as many as z has.
    Set either `head_channels` or `num_heads`, and the other to 0. `time` selects the embedded time (see
    `network_time`): "cosine" for networks trained here, "adm_cosine" or "adm_linear" for the discrete time of imported
    ones. `dtype` is the compute dtype; parameters, input and output are float32. With `remat`, the backward pass
    recomputes the activations of each block instead of keeping them. `fast` uses the forms of the layers that are fast
    on the platform. They have no forward mode: `jax.jvp`, `jax.jacfwd` and `jax.linearize` need `fast=False`, which is
    the same function up to rounding.

    `label_from` is the level of the upward half, as numbered by `channel_mult`, from which the class is seen; −1 means
    everywhere. The blocks before it, the trunk, see λ alone, and `scores` evaluates them once for two labels. The paper
    of classifier-free guidance (arXiv:2207.12598, Section 5) suggests to "inject conditioning late in the network".
    """

    image_size: int
    num_classes: int
    out_channels: int = 0
    base_channels: int = 128
    channel_mult: tuple[int | float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16, 8)
    head_channels: int = 64
    num_heads: int = 0
    resblock_updown: bool = True
    scale_shift_norm: bool = True
    dropout: float = 0.0
    time: str = "cosine"
    dtype: str = "float32"
    remat: bool = False
    fast: bool = True
    label_from: int = -1
    weight_range: tuple[float, ...] = ()

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "..."],
        logsnr: Float[Array, "..."],
        labels: Shaped[Array, "..."],
        train: bool = False,
        nulls: Shaped[Array, "..."] | None = None,
        w: Float[Array, "..."] | None = None,
    ) -> PyTree[Float[Array, "b h w k"]]:
        """ε, with the height and width of z and `out_channels` channels. Label NULL_LABEL (any label below 0) is ∅.

        z is [B, H, W, C], of any height and width that the levels can halve; logsnr and labels are [B]. `train` turns
        dropout on. Raises ValueError for shapes or fields that do not fit together, for labels that are no integers,
        and for a label that is not below `num_classes`. Under `jit`, labels are not known, and such a row is NaN.

        `nulls` are other labels for the same z and λ. With them, the result is a pair; see `scores`. A network with
        `weight_range` needs w [B], the guidance weights, and ε is then the guided score.
        """
        check_shapes(input_channels(self), z, logsnr=logsnr, labels=labels)
        if not -1 <= self.label_from < len(self.channel_mult):
            raise ValueError(
                f"label_from is {self.label_from}: give the number of a level, 0 to {len(self.channel_mult) - 1}, or "
                "-1 for a class that the whole network sees"
            )
        embed = ConditionEmbedding(self.num_classes, self.base_channels, self.time, name="embed")
        emb = embed(logsnr, labels).astype(self.dtype)
        weight = weight_input(self, w, emb)
        trunk = emb if self.label_from < 0 else embed(logsnr, None).astype(self.dtype)
        if nulls is not None:
            check_shapes(input_channels(self), z, nulls=nulls)
            if self.label_from < 0:
                raise ValueError("label_from is -1, so the network has no trunk to share: evaluate it for each label")
            emb = emb, embed(logsnr, nulls).astype(self.dtype)
        res, attend = blocks(self, trunk, train, weight)
        h, skips = encode(self, res, attend, z)
        levels = range(len(self.channel_mult))[::-1]
        shared = [level for level in levels if level > self.label_from >= 0]
        h = decode(self, res, attend, h, skips, shared)
        if self.label_from >= 0:
            h = jax.tree.map(lambda _: h, emb)
            res, attend = blocks(self, emb, train, weight)
        h = decode(self, res, attend, h, skips, levels[len(shared) :])
        return output(self, h, self.out_channels or z.shape[-1], weight)

    def scores(
        self,
        z: Float[Array, "..."],
        logsnr: Float[Array, "..."],
        labels: Shaped[Array, "..."],
        nulls: Shaped[Array, "..."],
        train: bool = False,
    ) -> tuple[Float[Array, "b h w k"], Float[Array, "b h w k"]]:
        """The outputs for `labels` and for `nulls`, with one evaluation of the trunk. Raises ValueError without one.

        They are those of two separate evaluations. Dropout in the trunk, with `train`, is the same for both.
        """
        return self(z, logsnr, labels, train, nulls)


def input_channels(net: Any, layer: str = "conv_in") -> int | None:
    """The number of inputs of a layer in the parameters of `net`; None while they are being made."""
    return net.get_variable("params", layer)["kernel"].shape[-2] if net.has_variable("params", layer) else None


def check_shapes(channels: int | None, z: Array, **per_image: Array) -> None:
    """Raises ValueError unless z is [B, H, W, C], with C = `channels` if that is known, and the others are [B]."""
    if z.ndim != 4 or channels not in (None, z.shape[3]):
        raise ValueError(
            f"z has shape {z.shape}; this network takes [B, H, W, {channels or 'C'}]. `guided_sample` makes z as "
            "[B, *shape]: give its `shape` as (H, W, C)"
        )
    for name, x in per_image.items():
        if x.shape != z.shape[:1]:
            raise ValueError(f"{name} has shape {x.shape}; give one value per image of z, shape {z.shape[:1]}")


def check_sides(net: Any, z: Array) -> None:
    """Raises ValueError if the levels of `net` cannot halve the sides of z [B, H, W, C] or `image_size`."""
    levels = len(net.channel_mult)
    for name, sides in (("image_size", [net.image_size] * 2), ("z", z.shape[1:3])):
        if any(side % 2 ** (levels - 1) for side in sides):
            raise ValueError(
                f"{name} is {sides[0]}x{sides[1]}, but {levels} levels need sides divisible by {2 ** (levels - 1)}: "
                "change the size or channel_mult"
            )


def levels_with_attention(net: Any) -> set[int]:
    """The levels of `net` whose height, for images of `image_size`, is in `attention_resolutions`.

    Raises ValueError if `attention_resolutions` has a height of no level.
    """
    heights = [net.image_size // 2**level for level in range(len(net.channel_mult))]
    if not set(net.attention_resolutions) <= set(heights):
        raise ValueError(
            f"attention_resolutions is {net.attention_resolutions}; with image_size {net.image_size} and "
            f"{len(heights)} levels, the network works at {heights}: choose among these"
        )
    return {level for level, height in enumerate(heights) if height in net.attention_resolutions}


def blocks(
    net: Any, emb: PyTree[Float[Array, "b d"]], train: bool, weight: Weight | None = None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Two functions that create and apply a residual block, and an attention block, inside `net`.

    `net` is a module with the fields of `UNet`. If `emb` is a tuple of embeddings, the functions take and return a
    tuple of as many feature maps, and apply the same block to each pair.
    """

    def res(name: str, h: PyTree[Array], channels: int, resample: str = "none") -> PyTree[Array]:
        block = nn.remat(ResBlock, static_argnums=(3,)) if net.remat else ResBlock
        module = block(channels, resample, net.scale_shift_norm, net.dropout, net.dtype, net.fast, name=name)
        return jax.tree.map(lambda h, emb: module(h, emb, train, weight), h, emb)

    def attend(name: str, h: PyTree[Array]) -> PyTree[Array]:
        block = nn.remat(AttentionBlock) if net.remat else AttentionBlock
        return jax.tree.map(block(net.head_channels, net.num_heads, net.dtype, net.fast, name=name), h)

    return res, attend


def encode(
    net: Any, res: Callable[..., Array], attend: Callable[..., Array], z: Float[Array, "b h w c"]
) -> tuple[Float[Array, "b h2 w2 k"], list[Array]]:
    """The downward half of `net` and its middle: the lowest feature map, and those of the skip connections.

    Raises ValueError as `check_sides` does.
    """
    check_sides(net, z)
    attended = levels_with_attention(net)
    h = Conv(round(net.base_channels * net.channel_mult[0]), net.dtype, fast=net.fast, name="conv_in")(z)
    skips = [h]
    for level, mult in enumerate(net.channel_mult):
        for i in range(net.num_res_blocks):
            h = res(f"down_{level}_{i}_res", h, round(mult * net.base_channels))
            if level in attended:
                h = attend(f"down_{level}_{i}_attn", h)
            skips.append(h)
        if level < len(net.channel_mult) - 1:
            if net.resblock_updown:
                h = res(f"down_{level}_sample", h, h.shape[-1], "down")
            else:
                h = Conv(h.shape[-1], net.dtype, stride=2, fast=net.fast, name=f"down_{level}_sample")(h)
            skips.append(h)

    h = res("mid_0_res", h, h.shape[-1])
    h = attend("mid_attn", h)
    return res("mid_1_res", h, h.shape[-1]), skips


def decode(
    net: Any,
    res: Callable[..., Any],
    attend: Callable[..., Any],
    h: PyTree[Float[Array, "b _h _w _k"]],
    skips: list[Array],
    levels: Sequence[int],
) -> PyTree[Float[Array, "b _h2 _w2 _k2"]]:
    """Consecutive levels of the upward half of `net`, the lowest resolution first.

    h is the feature map that they begin with, or several, as `blocks` takes them. `skips` are those of `encode`, from
    whose end each residual block removes one.
    """
    attended = levels_with_attention(net)
    for level in levels:
        width = round(net.channel_mult[level] * net.base_channels)
        for i in range(net.num_res_blocks + 1):
            skip = skips.pop()
            h = jax.tree.map(lambda h, skip=skip: concatenate(h, skip, fast=net.fast), h)
            h = res(f"up_{level}_{i}_res", h, width)
            if level in attended:
                h = attend(f"up_{level}_{i}_attn", h)
        if level > 0:
            if net.resblock_updown:
                h = res(f"up_{level}_sample", h, width, "up")
            else:
                conv = Conv(width, net.dtype, fast=net.fast, name=f"up_{level}_sample")
                h = jax.tree.map(lambda h, conv=conv: conv(upsample(h)), h)
    return h


def output(
    net: Any, h: PyTree[Float[Array, "b h w _k"]], channels: int, weight: Weight | None = None
) -> PyTree[Float[Array, "b h w c"]]:
    """The last norm and convolution of `net`, for each feature map, in float32. It is 0 at initialisation."""
    norm = Norm(silu=True, fast=net.fast, name="norm_out")
    conv = Conv(channels, "float32", zero=True, fast=net.fast, name="conv_out")
    add = WeightedSum("float32", 3, net.fast, name="weight_out")
    return jax.tree.map(lambda h: add(conv(x := norm(h.astype(jnp.float32))), weight, x), h)


class ConditionEmbedding(nn.Module):
    """The embedding of (λ, c) for every residual block: an MLP of the time, plus the class vector, which is 0 for ∅."""

    num_classes: int
    base_channels: int
    time: str

    @nn.compact
    def __call__(self, logsnr: Float[Array, "b"], labels: Shaped[Array, "b"] | None) -> Float[Array, "b d"]:
        """The embedding. Raises ValueError as `UNet` does for labels; the row of an unknown class is NaN."""
        width = 4 * self.base_channels
        emb = sinusoidal(network_time(logsnr, self.time), self.base_channels)
        emb = nn.Dense(width, name="time_1")(nn.silu(nn.Dense(width, name="time_0")(emb)))
        if self.num_classes and labels is not None:
            known = check_labels(labels, self.num_classes)
            vector = nn.Embed(self.num_classes, width, embedding_init=nn.initializers.normal(1.0), name="label")(labels)
            # `nn.Embed` gives every label the only row of a table for one class.
            vector = jnp.where(known[:, None], vector, jnp.nan)
            emb = emb + jnp.where(labels[:, None] >= 0, vector, 0.0)
        return emb


def check_labels(labels: Shaped[Array, "b"], num_classes: int) -> Bool[Array, "b"]:
    """Whether each label is below `num_classes`, for labels of any integer dtype.

    Raises ValueError if labels are not integers, and if a concrete one is not below `num_classes`.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels have dtype {labels.dtype}: give them as int32")

    def known(x: Any) -> Any:
        # A Python number in a comparison takes the dtype of x, which must be able to represent it.
        return x <= min(num_classes - 1, int(jnp.iinfo(x.dtype).max)) if num_classes else x < 0

    given = concrete(labels)
    if given is not None and not np.all(known(given)):
        raise ValueError(f"label {given.max()} is not below the number of classes, {num_classes}; -1 is no class")
    return known(labels)


class ResBlock(nn.Module):
    """ADM's residual block: norm, SiLU, resampling, conv; norm modulated by the embedding, SiLU, dropout, conv.

    Without `scale_shift_norm`, the embedding is added to the features before the second norm.
    """

    channels: int
    resample: str  # "none", "down" or "up"
    scale_shift_norm: bool
    dropout: float
    dtype: str
    fast: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b d"], train: bool, weight: Weight | None = None
    ) -> Float[Array, "b h2 w2 k"]:
        change = {"none": lambda h: h, "down": downsample, "up": upsample}[self.resample]
        h = change(Norm(silu=True, fast=self.fast, name="norm_0")(x))
        h = Conv(self.channels, self.dtype, fast=self.fast, name="conv_0")(h)
        width = (1 + self.scale_shift_norm) * self.channels
        emb = Dense(width, self.dtype, fast=self.fast, name="emb")(nn.silu(emb))
        emb = WeightedSum(self.dtype, fast=self.fast, name="weight_emb")(emb, weight)
        norm = Norm(silu=True, fast=self.fast, name="norm_1")
        h = norm(h, *jnp.split(emb, 2, -1)) if self.scale_shift_norm else norm(h + emb[:, None, None, :])
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.channels, self.dtype, zero=True, fast=self.fast, name="conv_1")(h)
        x = change(x)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, self.dtype, size=1, fast=self.fast, name="skip")(x)
        x = x + h
        return WeightedSum(self.dtype, fast=self.fast, name="weight_out")(x, weight, x)


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, with a residual connection."""

    head_channels: int
    num_heads: int
    dtype: str
    fast: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, channels = x.shape
        heads = heads_of(self, channels)
        qkv = Conv(3 * channels, self.dtype, size=1, fast=self.fast, name="qkv")(Norm(fast=self.fast, name="norm")(x))
        qkv = qkv.reshape(b, height * width, 3, heads, channels // heads)
        h = self_attention(qkv, fast=self.fast).reshape(x.shape)
        return x + Conv(channels, self.dtype, size=1, zero=True, fast=self.fast, name="out")(h)


def heads_of(net: Any, channels: int) -> int:
    """The number of attention heads of a module with the fields `num_heads` and `head_channels`.

    Raises ValueError if it states neither, or heads into which the channels do not divide.
    """
    divisor = net.num_heads or net.head_channels
    if not divisor or channels % divisor:
        raise ValueError(
            f"{channels} channels do not divide into heads with num_heads = {net.num_heads}, head_channels = "
            f"{net.head_channels}: set one of them to a divisor of {channels}, and the other to 0"
        )
    return net.num_heads or channels // divisor


class Norm(nn.Module):
    """Group normalisation, then · (1 + scale) + shift if given (ADM's scale-shift norm), then SiLU if `silu`."""

    silu: bool = False
    fast: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Float[Array, "b h w c"]:
        gain, bias = (jnp.broadcast_to(p, (x.shape[0], x.shape[3])) for p in Affine(name="group")(x.shape[3]))
        if self.is_initializing():
            return jnp.zeros_like(x)
        if scale is not None and shift is not None:
            scale, shift = scale.astype(jnp.float32), shift.astype(jnp.float32)
            gain, bias = gain * (1.0 + scale), bias * (1.0 + scale) + shift
        return group_norm(x, gain, bias, silu=self.silu, fast=self.fast)


class Affine(nn.Module):
    """The parameters of a normalisation: the gain, and the bias."""

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        return scale, self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)


def downsample(h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The means of 2x2 blocks, at half the resolution."""
    # `nn.avg_pool` divides by an integer array, which `jax_numpy_dtype_promotion="strict"` refuses.
    return nn.pool(h, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4.0


def upsample(h: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Each pixel repeated as a 2x2 block, at double the resolution."""
    return jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
