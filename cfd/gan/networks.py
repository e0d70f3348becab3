"""The networks of a denoising diffusion GAN: the package's U-Net and classifier for images, or MLPs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from cfd.gan.losses import Networks
from cfd.networks.classifier import Classifier
from cfd.networks.model import module
from cfd.networks.unet import ConditionEmbedding, UNet, blocks, decode, encode, output

Init = Callable[[Array], Any]
"""key -> {"g": parameters of the generator, "d": of the discriminator}."""


class Generator(nn.Module):
    """x̂ = G(z, ξ, λ, c): a U-Net whose embedding has the latents ξ added, mapped by four layers (arXiv:2112.07804).

    `unet` has the fields of the U-Net. The output is between −1 and 1.
    """

    unet: UNet

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b h w c"],
        latents: Float[Array, "b k"],
        logsnr: Float[Array, "b"],
        labels: Int[Array, "b"],
    ) -> Float[Array, "b h w c"]:
        net = self.unet
        emb = ConditionEmbedding(net.num_classes, net.base_channels, net.time, name="embed")(logsnr, labels)
        h = latents * jax.lax.rsqrt(jnp.mean(jnp.square(latents), axis=1, keepdims=True) + 1e-8)
        for i in range(4):
            h = nn.silu(nn.Dense(256, name=f"latents_{i}")(h))
        emb = emb + nn.Dense(emb.shape[1], name="latents_out")(h)
        res, attend = blocks(net, emb.astype(net.dtype), False)
        h, skips = encode(net, res, attend, z)
        h = decode(net, res, attend, h, skips, range(len(net.channel_mult))[::-1])
        return jnp.tanh(output(net, h, z.shape[-1]))


def image_networks(
    model: Mapping[str, Any], classifier: Mapping[str, Any], image_size: int, channels: int, latents: int
) -> tuple[Init, Networks]:
    """The networks for images, from the groups `model`, of a U-Net, and `classifier`.

    The discriminator is the classifier of z' and z, stacked in channels. It has one output per class, of which the
    label picks one; without classes it has a single output.
    """
    generator = Generator(module(model, image_size))
    num_outputs = max(1, model["num_classes"])
    discriminator = Classifier(image_size=image_size, **{**classifier, "num_classes": num_outputs})

    def init(key: Array) -> Any:
        key_g, key_d = jax.random.split(key)
        z, one, label = jnp.zeros((1, image_size, image_size, channels)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
        return {
            "g": generator.init(key_g, z, jnp.zeros((1, latents)), one, label)["params"],
            "d": discriminator.init(key_d, jnp.concatenate([z, z], axis=-1), one)["params"],
        }

    def generate(params: Any, z: Array, latents: Array, logsnr: Array, labels: Array) -> Any:
        return generator.apply({"params": params}, z, latents, logsnr, labels)

    def discriminate(params: Any, z_next: Array, z: Array, logsnr: Array, labels: Array) -> Array:
        logits: Any = discriminator.apply({"params": params}, jnp.concatenate([z_next, z], axis=-1), logsnr)
        of_label = labels if num_outputs > 1 else jnp.zeros_like(labels)
        return jnp.take_along_axis(logits, of_label[:, None], axis=1)[:, 0]

    return init, Networks(generate, discriminate, latents)


class MLP(nn.Module):
    """Four hidden layers of `width`, on its inputs, λ and α² = sigmoid(λ)."""

    width: int
    outputs: int

    @nn.compact
    def __call__(self, *inputs: Float[Array, "b _d"], logsnr: Float[Array, "b"]) -> Float[Array, "b k"]:
        h = jnp.concatenate([*inputs, 0.2 * logsnr[:, None], jax.nn.sigmoid(logsnr)[:, None]], axis=1)
        for i in range(4):
            h = nn.leaky_relu(nn.Dense(self.width, name=f"layer_{i}")(h), 0.2)
        return nn.Dense(self.outputs, name="out")(h)


def mlp_networks(
    shape: tuple[int, ...], width: int, latents: int, *, num_classes: int = 0, bounded: bool = False
) -> tuple[Init, Networks]:
    """MLPs for points, or small images, of this shape. `bounded` limits x̂ to [−1, 1]. Labels enter as one-hot."""
    size = math.prod(shape)
    generator, discriminator = MLP(width, size), MLP(width, 1)

    def flat(x: Array, labels: Array) -> tuple[Array, Array]:
        return x.reshape(len(x), size), jax.nn.one_hot(labels, num_classes)

    def of_generator(z: Array, latents: Array, labels: Array) -> tuple[Array, ...]:
        return *flat(z, labels), latents

    def of_discriminator(z_next: Array, z: Array, labels: Array) -> tuple[Array, ...]:
        return *flat(z_next, labels), z.reshape(len(z), size)

    def init(key: Array) -> Any:
        key_g, key_d = jax.random.split(key)
        z, one, label = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
        return {
            "g": generator.init(key_g, *of_generator(z, jnp.zeros((1, latents)), label), logsnr=one)["params"],
            "d": discriminator.init(key_d, *of_discriminator(z, z, label), logsnr=one)["params"],
        }

    def generate(params: Any, z: Array, latents: Array, logsnr: Array, labels: Array) -> Array:
        out: Any = generator.apply({"params": params}, *of_generator(z, latents, labels), logsnr=logsnr)
        x_hat = out.reshape(z.shape)
        return jnp.tanh(x_hat) if bounded else x_hat

    def discriminate(params: Any, z_next: Array, z: Array, logsnr: Array, labels: Array) -> Array:
        logits: Any = discriminator.apply({"params": params}, *of_discriminator(z_next, z, labels), logsnr=logsnr)
        return logits[:, 0]

    return init, Networks(generate, discriminate, latents)
