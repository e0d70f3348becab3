"""A magnitude-preserving U-Net, after configuration G of Karras et al. (arXiv:2312.02696).

Every layer keeps the expected magnitude of its input: activations have a mean square of 1 at initialisation, and stay
near it. There are no group norms and no biases. Instead, each weight vector is divided by its own norm in the forward
pass. A training step must also normalise the weights that it stores, by `normalized`, because an optimizer would
otherwise let them grow, and its relative step size shrink with them.

Differences from the paper:
- The norm of a weight vector has no added constant, because normalisation must be idempotent.
- `pixel_norm` adds its constant to the mean square, not to the norm.
- The time enters by fixed sinusoids, not by random Fourier features.
- Activations are not clipped.
- The learning rate does not decay with the inverse square root of the step.
- The loss has no learned uncertainty of each noise level.

The constants are those known of the paper. They were not compared with its text.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from cfd.kernels import cpu
from cfd.networks.layers import concatenate, convolve, self_attention
from cfd.networks.times import network_time, sinusoidal
from cfd.networks.unet import (
    check_labels,
    check_shapes,
    check_sides,
    downsample,
    heads_of,
    input_channels,
    levels_with_attention,
    upsample,
)
from cfd.process import alpha_sigma

SIGMA_DATA = 0.5
"""The standard deviation of images in [-1, 1] that the preconditioning assumes."""
RESIDUAL = 0.3
"""The share t of a residual branch, and of attention, in `mp_sum`."""
SILU_MAGNITUDE = 0.596
"""The root mean square of SiLU of a standard normal variable."""


class MPUNet(nn.Module):
    """ε_θ(z, λ, c): a magnitude-preserving U-Net, conditioned on λ and the class.

    The fields are those of `UNet`, with the same meaning. Middle blocks have attention once. Resolutions always change
    in residual blocks, and the embedding always scales features. An untrained network predicts the linear part of the
    preconditioning alone, because the gain of its output is 0.
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
    dropout: float = 0.0
    time: str = "cosine"
    dtype: str = "float32"
    remat: bool = False
    fast: bool = True

    @nn.compact
    def __call__(
        self, z: Float[Array, "..."], logsnr: Float[Array, "..."], labels: Shaped[Array, "..."], train: bool = False
    ) -> Float[Array, "b h w k"]:
        """ε, with the height and width of z and `out_channels` channels. Label NULL_LABEL (any label below 0) is ∅.

        Outputs beyond the channels of z, of a learned variance, are the network's own. Arguments, `train` and errors
        are those of `UNet`.
        """
        inputs = input_channels(self)
        check_shapes(inputs and inputs - 1, z, logsnr=logsnr, labels=labels)  # one is the constant 1
        check_sides(self, z)
        emb = Embedding(self.num_classes, self.base_channels, self.time, self.fast, name="embed")(logsnr, labels)
        alpha, sigma = (x[:, None, None, None] for x in alpha_sigma(logsnr))
        per_std = jax.lax.rsqrt(jnp.square(sigma) + SIGMA_DATA**2 * jnp.square(alpha))
        h = self._outputs(per_std * z, emb.astype(self.dtype), train, self.out_channels or z.shape[-1])
        eps, others = jnp.split(h, (min(z.shape[-1], h.shape[-1]),), -1)
        return jnp.concatenate((precondition(z, eps, alpha, sigma, per_std), others), -1)

    def _outputs(self, x: Array, emb: Array, train: bool, channels: int) -> Float[Array, "b h w k"]:
        """F_θ of the paper: the network itself, of an input of unit variance."""
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        shared = self.dropout, self.head_channels, self.num_heads, self.dtype, self.fast

        def apply(name: str, h: Array, width: int, *, encoder: bool, attend: bool, resample: str = "none") -> Array:
            return block(width, encoder, attend, resample, *shared, name=name)(h, emb, train)

        attended = levels_with_attention(self)
        widths = [round(mult * self.base_channels) for mult in self.channel_mult]
        ones = jnp.ones((*x.shape[:-1], 1), x.dtype)
        h = Conv(widths[0], self.dtype, fast=self.fast, name="conv_in")(jnp.concatenate((x, ones), -1))
        skips = [h]
        for level, width in enumerate(widths):
            for i in range(self.num_res_blocks):
                h = apply(f"down_{level}_{i}", h, width, encoder=True, attend=level in attended)
                skips.append(h)
            if level < len(widths) - 1:
                h = apply(f"down_{level}_sample", h, width, encoder=True, attend=False, resample="down")
                skips.append(h)
        h = apply("mid_0", h, widths[-1], encoder=False, attend=True)
        h = apply("mid_1", h, widths[-1], encoder=False, attend=False)
        for level, width in reversed(tuple(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                h = mp_concatenate(h, skips.pop(), fast=self.fast)
                h = apply(f"up_{level}_{i}", h, width, encoder=False, attend=level in attended)
            if level > 0:
                h = apply(f"up_{level}_sample", h, width, encoder=False, attend=False, resample="up")
        h = Conv(channels, self.dtype, fast=self.fast, name="conv_out")(h)
        return h.astype(jnp.float32) * self.param("gain_out", nn.initializers.zeros, (1,), jnp.float32)[0]


def precondition(
    z: Float[Array, "b h w c"],
    outputs: Float[Array, "b h w c"],
    alpha: Float[Array, "b 1 1 1"],
    sigma: Float[Array, "b 1 1 1"],
    per_std: Float[Array, "b 1 1 1"],
) -> Float[Array, "b h w c"]:
    """ε of the network's outputs F: the preconditioning of Karras et al. (arXiv:2206.00364), Table 1, in terms of λ.

    There, the noisy image is z / α with noise of σ' = σ / α = e^{−λ/2}, and the denoised image is x = c_skip z / α +
    c_out F with c_skip = σ_data² / (σ'² + σ_data²) and c_out = σ' σ_data / sqrt(σ'² + σ_data²). With s² = σ² + σ_data²
    α², it follows that c_in z / α = z / s, and that ε = (z / α − x) / σ' = (σ z / s − α σ_data F) / s. `per_std` is
    1 / s. No term overflows at either end of λ.
    """
    return per_std * (sigma * per_std * z - SIGMA_DATA * alpha * outputs)


class Embedding(nn.Module):
    """The embedding of (λ, c): SiLU of the sum of a linear map of the time and the class vector, which is 0 for ∅."""

    num_classes: int
    base_channels: int
    time: str
    fast: bool

    @nn.compact
    def __call__(self, logsnr: Float[Array, "b"], labels: Shaped[Array, "b"]) -> Float[Array, "b 1 1 d"]:
        """The embedding. Raises ValueError as `UNet` does for labels; the row of an unknown class is NaN."""
        width = 4 * self.base_channels
        # The mean square of a cosine and its sine is 1/2.
        waves = 2**0.5 * sinusoidal(network_time(logsnr, self.time), self.base_channels)
        emb = Conv(width, "float32", size=1, fast=self.fast, name="time")(waves[:, None, None, :])
        if self.num_classes:
            known = check_labels(labels, self.num_classes)
            vector = Table(self.num_classes, width, name="label")(labels)
            vector = jnp.where(known[:, None], vector, jnp.nan)
            vector = jnp.where(labels[:, None] >= 0, vector, 0.0)
            emb = mp_sum(emb, vector[:, None, None, :], 0.5)
        return mp_silu(emb)


class Table(nn.Module):
    """A vector for each class: the linear map of a one-hot vector times the root of the number of classes."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, labels: Shaped[Array, "b"]) -> Float[Array, "b d"]:
        table = self.param("embedding", unit_normal, (self.num_classes, self.width), jnp.float32)
        return jnp.take(unit(table), labels, axis=0, mode="clip")


class Block(nn.Module):
    """A residual block of the encoder or the decoder, with attention at its end if `attend`.

    An encoder's block normalises the features of each pixel, because nothing else limits the main path.
    """

    channels: int
    encoder: bool
    attend: bool
    resample: str  # "none", "down" or "up"
    dropout: float
    head_channels: int
    num_heads: int
    dtype: str
    fast: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b 1 1 d"], train: bool
    ) -> Float[Array, "b h2 w2 k"]:
        def conv(name: str, x: Array, size: int = 3) -> Array:
            return Conv(self.channels, self.dtype, size, self.fast, name=name)(x)

        x = {"none": lambda h: h, "down": downsample, "up": upsample}[self.resample](x)
        changes = x.shape[-1] != self.channels
        if self.encoder:
            x = pixel_norm(conv("skip", x, 1) if changes else x)
        gain = self.param("gain", nn.initializers.zeros, (1,), jnp.float32)[0].astype(self.dtype)
        h = conv("conv_0", mp_silu(x)) * (1.0 + gain * conv("emb", emb, 1))
        h = nn.Dropout(self.dropout, deterministic=not train)(mp_silu(h))
        h = conv("conv_1", h)
        if not self.encoder and changes:
            x = conv("skip", x, 1)
        x = mp_sum(x, h, RESIDUAL)
        return (
            Attention(self.head_channels, self.num_heads, self.dtype, self.fast, name="attn")(x) if self.attend else x
        )


class Attention(nn.Module):
    """Cosine self-attention over the positions of a feature map, with a residual connection.

    Queries, keys and values are normalised per position and head. Their products are therefore √d times a cosine.
    """

    head_channels: int
    num_heads: int
    dtype: str
    fast: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, channels = x.shape
        heads = heads_of(self, channels)
        qkv = Conv(3 * channels, self.dtype, size=1, fast=self.fast, name="qkv")(x)
        qkv = pixel_norm(qkv.reshape(b, height * width, 3, heads, channels // heads))
        h = self_attention(qkv, fast=self.fast).reshape(x.shape)
        return mp_sum(x, Conv(channels, self.dtype, size=1, fast=self.fast, name="out")(h), RESIDUAL)


class Conv(nn.Module):
    """A convolution without bias, 3x3 with padding 1 or 1x1, whose effective kernels have norm 1 for each output."""

    channels: int
    dtype: str
    size: int = 3
    fast: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w k"]:
        window = (self.size, self.size) if self.size > 1 else ()
        shape = (*window, x.shape[-1], self.channels)
        kernel = unit(self.param("kernel", unit_normal, shape, jnp.float32))
        kernel = kernel * (self.size**2 * x.shape[-1]) ** -0.5
        x = x.astype(self.dtype)
        if not self.fast:
            return convolve(x, kernel, 1, fast=False)

        # Without the barrier, XLA:CPU recomputes x inside the transpose for the kernel's gradient.
        return convolve(cpu.materialize_on_cpu(x), kernel, 1)


def unit(weight: Float[Array, "*n k"]) -> Float[Array, "*n k"]:
    """The weight vector of each output, which is all axes but the last, divided by its root mean square.

    A vector of zeros stays so. A second call changes nothing but the last bits.
    """
    mean = jnp.mean(jnp.square(weight), axis=tuple(range(weight.ndim - 1)), keepdims=True)
    return weight * jax.lax.rsqrt(jnp.maximum(mean, 1e-30))


def unit_normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal weights, normalised: an initializer of Flax."""
    return unit(jax.random.normal(key, shape, dtype))


def normalized(params: Any) -> Any:
    """The parameters of an `MPUNet` with all weight vectors normalised, as each training step must leave them.

    Forced weight normalisation: Karras et al. (arXiv:2312.02696), Section 2.3. Gains, the arrays of one axis, are
    unchanged. The network is the same function of both.
    """
    return jax.tree.map(lambda weight: unit(weight) if weight.ndim > 1 else weight, params)


def pixel_norm(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """x / sqrt(mean of x² over the channels + 1e-4), computed in float32 and returned in the dtype of x."""
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-4).astype(x.dtype)


def mp_silu(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """SiLU, divided by its root mean square for standard normal x."""
    return jax.nn.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Float[Array, "*b c"], b: Float[Array, "*b c"], t: float) -> Float[Array, "*b c"]:
    """((1 − t) a + t b) / sqrt((1 − t)² + t²): of mean square 1 if a and b are, and are uncorrelated."""
    norm = ((1.0 - t) ** 2 + t**2) ** 0.5
    return a * ((1.0 - t) / norm) + b * (t / norm)


def mp_concatenate(
    a: Float[Array, "b h w c"], b: Float[Array, "b h w k"], *, fast: bool = True
) -> Float[Array, "b h w c+k"]:
    """[a, b] along the channels, scaled to equal contributions to the sum of squares, and to mean square 1."""
    n, m = a.shape[-1], b.shape[-1]
    return concatenate(a * ((n + m) / (2 * n)) ** 0.5, b * ((n + m) / (2 * m)) ** 0.5, fast=fast)
