"""The noisy classifier p(c | z) of classifier guidance: the encoder half of ADM's U-Net, attention pooling, a loss.

Dhariwal and Nichol, Diffusion Models Beat GANs (arXiv:2105.05233), Section 4. `cfd.guidance` computes the guidance
from such a classifier.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key, UInt32

from cfd.arguments import check_data, check_returned, known_labels, threefry
from cfd.networks.unet import ConditionEmbedding, Norm, blocks, check_shapes, encode, input_channels
from cfd.process import Schedule, cosine, diffuse

ClassifierFn = Callable[[Array, Array], Array]
"""(z [B, ...], logsnr [B]) -> logits [B, K], one per class."""


class Classifier(nn.Module):
    """Logits of p(c | z) at noise level λ. The fields are those of `UNet`, with the same meaning.

    The attention pooling learns one vector per position. Therefore a classifier accepts images of `image_size` alone.
    """

    image_size: int
    num_classes: int
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

    @nn.compact
    def __call__(self, z: Float[Array, "..."], logsnr: Float[Array, "..."], train: bool = False) -> Float[Array, "b k"]:
        """One float32 logit per class, for z [B, H, W, C] and logsnr [B]. `train` turns dropout on.

        Raises ValueError as `UNet` does, and for z of another size than `image_size`.
        """
        check_shapes(input_channels(self), z, logsnr=logsnr)
        if z.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"z is {z.shape[1]}x{z.shape[2]}, but this classifier takes {self.image_size}x{self.image_size} images "
                "alone, because its attention pooling has a vector for each position: resize z, or train a classifier "
                "at the size of z"
            )
        emb = ConditionEmbedding(0, self.base_channels, self.time, name="embed")(logsnr, None)
        h, _ = encode(self, *blocks(self, emb.astype(self.dtype), train), z)
        h = nn.silu(Norm(fast=self.fast, name="norm_out")(h.astype(jnp.float32)))
        return AttentionPool(self.num_classes, self.head_channels, self.num_heads, name="pool")(h)


class AttentionPool(nn.Module):
    """CLIP's attention pooling (arXiv:2103.00020): the mean of all positions attends to itself and to each of them."""

    out_features: int
    head_channels: int
    num_heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        b, height, width, channels = x.shape
        heads = self.num_heads or channels // self.head_channels
        x = x.reshape(b, height * width, channels)
        x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True), x], axis=1)
        init = nn.initializers.normal(channels**-0.5)
        x = x + self.param("position", init, (height * width + 1, channels), jnp.float32)[None]
        qkv = nn.Dense(3 * channels, name="qkv")(x).reshape(b, -1, 3, heads, channels // heads)
        h = jax.nn.dot_product_attention(qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2], implementation="xla")
        return nn.Dense(self.out_features, name="out")(h.reshape(b, channels))


def classifier_loss(
    key: Key[Array, ""] | UInt32[Array, "2"] | UInt32[Array, "4"],
    classifier_fn: ClassifierFn,
    x: Float[Array, "b ..."],
    labels: Int[Array, "b"],
    *,
    schedule: Schedule = cosine(-20.0, 20.0),
) -> Float[Array, ""]:
    """E[−log p(c | z_λ)]: the mean cross entropy over the batch, with λ sampled as in `eps_loss`.

    x [B, ...] is data in [−1, 1], and `labels` [B] are its classes. The key is as in `threefry`.

    Raises ValueError if x and labels do not agree, if a concrete label is no class, and if the classifier does not
    return logits [B, K]. Under `jit`, labels are not known; the loss and its gradient then are NaN.
    """
    labels = jnp.asarray(labels)
    check_data(x, labels.shape)
    key_u, key_eps = jax.random.split(threefry(key))
    logsnr = schedule(jax.random.uniform(key_u, x.shape[:1], jnp.float32))
    check_returned("schedule", logsnr, x.shape[:1], "λ for each u")
    z = diffuse(x, jax.random.normal(key_eps, x.shape, jnp.float32), logsnr)
    logits = classifier_fn(z, logsnr)
    check_returned("classifier_fn", logits, (len(x), None), "logits [B, K]")
    known = jnp.where(known_labels(labels, logits, lowest=0), 1.0, jnp.nan)
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(known[:, None] * jnp.take_along_axis(log_p, labels[:, None], axis=-1, mode="clip"))
