"""Training and sampling of a denoising diffusion GAN, for any two networks: arXiv:2112.07804, Sections 4 and 4.1.

A step goes from z at λ_t to z' at λ_{t+1}: z' ~ q(z' | z, x̂), where x̂ = G(z, ξ, λ_t, c) with fresh latents ξ.
The discriminator D(z', z, λ_t, c) tells true pairs from pairs whose z' the generator made.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import softplus
from jaxtyping import Float, Int, Key

from cfd.arguments import image_keys
from cfd.process import diffuse, eps_from_x, forward, posterior
from cfd.sampling import ancestral, guided_sample

DATA = 80.0
"""The λ of the data, after the last level. There α is 1 in float32 and σ is 4e-18: z' is x, and q(z' | z, x̂) is x̂."""
LATENTS = np.uint32(2**32 - 3)
"""The number for `fold_in` that draws the latents of an image. The noise has the numbers of steps."""


class Networks(NamedTuple):
    """A generator and a discriminator as functions of their parameters.

    `generate(params, z, latents [B, k], logsnr [B], labels [B])` gives x̂ of the shape of z, and
    `discriminate(params, z', z, logsnr [B], labels [B])` one logit per row, [B]. `latents` is k.
    """

    generate: Callable[[Any, Array, Array, Array, Array], Array]
    discriminate: Callable[[Any, Array, Array, Array, Array], Array]
    latents: int


class Pairs(NamedTuple):
    """True pairs: z' at `logsnr_next` [B] and z at `logsnr` [B], both [B, ...]."""

    z_next: Array
    z: Array
    logsnr: Array
    logsnr_next: Array


def levels(num_steps: int) -> Float[np.ndarray, " t"]:
    """λ of the T levels of Section 5, rising: the VP-SDE with β from 0.1 to 20 at equal times, of which the first is 1.

    λ(t) = −log(expm1(½ (20 − 0.1) t² + 0.1 t)), and the data are at t = 1e-3.
    """
    t = 1e-3 + (1.0 - 1e-3) * np.arange(num_steps, 0, -1) / num_steps
    return -np.log(np.expm1(0.5 * (20.0 - 0.1) * np.square(t) + 0.1 * t))


def pairs(key: Key[Array, ""], x: Float[Array, "b ..."], logsnr: Float[Array, "t"]) -> Pairs:
    """A true pair for each x, at a level drawn uniformly: z' ~ q(z' | x), z ~ q(z | z')."""
    key_t, key_next, key_z = jax.random.split(key, 3)
    t = jax.random.randint(key_t, x.shape[:1], 0, len(logsnr), jnp.int32)
    here, after = logsnr[t], jnp.append(logsnr[1:], DATA)[t]
    z_next = diffuse(x, jax.random.normal(key_next, x.shape, jnp.float32), after)
    return Pairs(z_next, forward(z_next, jax.random.normal(key_z, x.shape, jnp.float32), after, here), here, after)


def denoise(key: Key[Array, ""], x_hat: Float[Array, "b ..."], true: Pairs) -> Float[Array, "b ..."]:
    """ẑ' ~ q(z' | z, x̂): the step to which the generator's x̂ leads from the z of the pairs."""
    mean, std = posterior(true.z, x_hat, true.logsnr, true.logsnr_next, 0.0)
    return mean + std * jax.random.normal(key, mean.shape, jnp.float32)


def gradient_penalty(discriminate: Callable[[Array], Array], z_next: Float[Array, "b ..."]) -> Float[Array, ""]:
    """R1: E ‖∇_{z'} D(z', z)‖² over true z', for a discriminator whose row i depends on row i alone."""
    gradient = jax.grad(lambda z_next: jnp.sum(discriminate(z_next)))(z_next)
    return jnp.sum(jnp.square(gradient)) / len(z_next)


def loss(
    key: Key[Array, ""],
    networks: Networks,
    params: Any,
    x: Float[Array, "b ..."],
    labels: Int[Array, "b"],
    *,
    logsnr: Any,
    penalty: float = 0.02,
    penalty_every: int = 1,
) -> Float[Array, ""]:
    """The losses of both networks in one: each gets the gradient of its own loss, and both step at the same time.

        L_D = E softplus(−D(z', z)) + E softplus(D(ẑ', z)) + ½ penalty E‖∇_{z'} D(z', z)‖²
        L_G = E softplus(−D(ẑ', z))

    `params` are {"g": of the generator, "d": of the discriminator}. x [B, ...] is data, and `logsnr` [T] are the
    levels, rising. The penalty is taken in one of `penalty_every` steps, drawn by the key, and is not enlarged for it.
    """
    key_pairs, key_latents, key_step, key_penalty = jax.random.split(key, 4)
    generator, discriminator = params["g"], params["d"]
    true = pairs(key_pairs, x, jnp.asarray(logsnr, jnp.float32))
    latents = jax.random.normal(key_latents, (len(x), networks.latents), jnp.float32)
    fake = denoise(key_step, networks.generate(generator, true.z, latents, true.logsnr, labels), true)

    def logits(params: Any, z_next: Array) -> Array:
        return networks.discriminate(params, z_next, true.z, true.logsnr, labels)

    of_d = jnp.mean(softplus(-logits(discriminator, true.z_next)))
    of_d += jnp.mean(softplus(logits(discriminator, jax.lax.stop_gradient(fake))))
    of_g = jnp.mean(softplus(-logits(jax.lax.stop_gradient(discriminator), fake)))
    if penalty:
        of_d += jax.lax.cond(
            jax.random.uniform(key_penalty, (), jnp.float32) * penalty_every < 1.0,
            lambda params: 0.5 * penalty * gradient_penalty(lambda z_next: logits(params, z_next), true.z_next),
            lambda params: jnp.zeros((), jnp.float32),
            discriminator,
        )
    return of_d + of_g


def sample(
    key: Key[Array, "*b"],
    networks: Networks,
    params: Any,
    labels: Int[Array, "b"],
    shape: tuple[int, ...],
    *,
    logsnr: Any,
) -> Float[Array, "b ..."]:
    """One sample per label by T evaluations of the generator, with `params` of the generator: `guided_sample`.

    The key is as there. The latents of image i follow from its key.
    """
    keys = image_keys(key, len(labels))
    grid = jnp.asarray(logsnr, jnp.float32)

    def latents_of(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, LATENTS), (len(grid), networks.latents), jnp.float32)

    def eps_fn(z: Array, logsnr: Array, conditions: dict[str, Array]) -> Array:
        t = jnp.argmin(jnp.abs(grid - logsnr[0]))
        x_hat = networks.generate(params, z, conditions["latents"][:, t], logsnr, conditions["labels"])
        return eps_from_x(z, x_hat, logsnr)

    conditions = {"labels": labels, "latents": jax.vmap(latents_of)(keys)}
    return guided_sample(keys, eps_fn, conditions, shape, num_steps=grid, sampler=ancestral(0.0), clip=False)
