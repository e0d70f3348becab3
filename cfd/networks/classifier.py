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

from cfd.networks.unet import ConditionEmbedding, Norm, blocks, encode
from cfd.process import cosine_logsnr, diffuse

ClassifierFn = Callable[[Array, Array], Array]
"""(z [B, ...], logsnr [B]) -> logits [B, K], one per class."""


class Classifier(nn.Module):
    """Logits of p(c | z) at noise level λ. The fields are those of `UNet`, with the same meaning.

    The attention pooling learns one vector per position. Therefore a trained classifier accepts a single image size.
    """

    num_classes: int
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
        self, z: Float[Array, "b h w c"], logsnr: Float[Array, "b"], train: bool = False
    ) -> Float[Array, "b k"]:
        """One float32 logit per class. `train` turns dropout on. Raises ValueError as `UNet` does."""
        emb = ConditionEmbedding(0, self.base_channels, self.time, name="embed")(logsnr, None)
        h, _ = encode(self, *blocks(self, emb.astype(self.dtype), train), z)
        h = nn.silu(Norm(name="norm_out")(h.astype(jnp.float32)))
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
        h = jax.nn.dot_product_attention(qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2])
        return nn.Dense(self.out_features, name="out")(h.reshape(b, channels))


def classifier_loss(
    key: Key[Array, ""] | UInt32[Array, "2"],
    classifier_fn: ClassifierFn,
    x: Float[Array, "b ..."],
    labels: Int[Array, "b"],
    *,
    logsnr_min: float = -20.0,
    logsnr_max: float = 20.0,
) -> Float[Array, ""]:
    """E[−log p(c | z_λ)]: the mean cross entropy over the batch, with λ sampled as in `eps_loss`.

    x [B, ...] is data in [−1, 1], and `labels` [B] are its classes.
    """
    key_u, key_eps = jax.random.split(key)
    logsnr = cosine_logsnr(jax.random.uniform(key_u, x.shape[:1], jnp.float32), logsnr_min, logsnr_max)
    z = diffuse(x, jax.random.normal(key_eps, x.shape, jnp.float32), logsnr)
    log_p = jax.nn.log_softmax(classifier_fn(z, logsnr))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=-1))
