"""The probability flow: the deterministic map between noise and data that has the marginals of the diffusion.

Song et al. (arXiv:2011.13456), Section 4.3, in λ: dz/dλ = ½ (σ² z − σ ε̂(z, λ)). It runs both ways. Towards noise, it
encodes an image as a latent that its label and the network determine; with another label or w on the way back, it edits
the image. The change of volume along the way gives the exact likelihood of the flow. At a large w, the way back is
stiff, and does not return to the same image.

The steps are uniform in λ, because the same steps in (z/α, σ/α), those of DDIM, lose an order for the density.
"""

import math
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import log_sigmoid
from jax.typing import ArrayLike
from jaxtyping import Float, Key, PyTree, Real, UInt32

from cfd.arguments import check_count, check_data, check_numbers, concrete, image_keys, random_signs
from cfd.attributes import check_trained
from cfd.guidance import NULL_LABEL, batch_size, check_reached, guided
from cfd.process import alpha_sigma, check_ends, per_example


def flow(
    eps_fn: Any,
    z: Float[Array, "b ..."],
    labels: PyTree,
    *,
    logsnr: Any,
    w: Any = 0.0,
    null: PyTree = NULL_LABEL,
) -> Float[Array, "b ..."]:
    """z [B, ...] at the first λ of the grid, carried along the flow to its last λ by Heun's steps. Pure.

    `logsnr` [n + 1] rises to sample and falls to encode. Each of its n steps costs two evaluations of the guided field.
    `labels`, `w` and `null` are as in `guided_sample`. At the last λ, z is α x and a little noise.

    Raises ValueError unless the grid has two or more values, all rising or all falling, in [−80, 80], and if the shapes
    do not agree.
    """
    check_data(z, (batch_size(labels),))
    remedy = "a flow goes one way: give a grid [n + 1] with n >= 1 that rises or falls, in [-80, 80]"

    def one_way(x: Any) -> Any:
        if x.ndim != 1 or len(x) < 2:
            return False
        steps = x[1:] - x[:-1]
        return ((steps > 0).all() or (steps < 0).all()) and (abs(x) <= 80.0).all()

    known = check_numbers("logsnr", logsnr, one_way, remedy)
    if known is not None:
        check_trained(eps_fn, known.min(), known.max())
        check_reached(w, known)
    field, levels = velocity(eps_fn, labels, w, null), jnp.asarray(logsnr, jnp.float32)

    def step(z: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
        return heun(field, z, *ends), None

    return jax.lax.scan(step, z.astype(jnp.float32), (levels[:-1], levels[1:]))[0]


def log_likelihood(
    key: Key[Array, "*b"] | UInt32[Array, "*b 2"] | UInt32[Array, "*b 4"],
    eps_fn: Any,
    x: Float[Array, "b ..."],
    labels: PyTree,
    *,
    logsnr_min: Real[ArrayLike, ""],
    logsnr_max: Real[ArrayLike, ""],
    num_steps: SupportsIndex = 64,
    w: Any = 0.0,
    null: PyTree = NULL_LABEL,
) -> tuple[Float[Array, "b"], Float[Array, "b ..."]]:
    """(log p(x) in nats [B], latent z [B, ...] at logsnr_min) of the flow that ends at z/α = x. Pure.

        log p(x) = log N(z; 0, I) + d/2 log α²(λ_min) + ½ ∫ σ div ε̂ dλ

    The divergence is Hutchinson's estimate vᵀ (∂ε̂/∂z) v, with one v of random signs per image for the whole way: Song
    et al., Section 4.3. It is unbiased along the exact path; the error of Heun's steps comes on top. Each of the
    `num_steps` costs two evaluations of the guided field and two vector-Jacobian products of it.

    log p is a density at λ_max, of data with noise of variance e^{−λ_max}. For uniformly dequantized images,
    x = u/127.5 − 1 + (U − ½)/127.5, bits per dimension are −log p / (d ln 2) + log2(127.5). Like the
    bound, it suffers where the network cannot tell the noise: choose logsnr_max on the training split.

    key: one PRNG key, from which image i takes `fold_in(key, i)`, or [B] keys. Raises ValueError as `flow` does.
    """
    batch = batch_size(labels)
    x = check_data(x, (batch,))
    count = check_count("num_steps", num_steps)
    check_ends(logsnr_min, logsnr_max)
    check_trained(eps_fn, logsnr_min, logsnr_max)
    first, last = concrete(logsnr_min), concrete(logsnr_max)
    if first is not None and last is not None:
        check_reached(w, np.linspace(first, last, count + 1))
    probe = jax.vmap(lambda key: random_signs(key, x.shape[1:]))(image_keys(key, batch))
    field = velocity(eps_fn, labels, w, null)
    axes = tuple(range(1, x.ndim))

    def with_divergence(state: tuple[Array, Array], logsnr: Array) -> tuple[Array, Array]:
        slope, pull = jax.vjp(lambda z: field(z, logsnr), state[0])
        return slope, jnp.sum(probe * pull(probe)[0], axes)

    def step(state: tuple[Array, Array], ends: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        return heun(with_divergence, state, *ends), None

    first, last = jnp.asarray(logsnr_max, jnp.float32), jnp.asarray(logsnr_min, jnp.float32)
    levels = jnp.linspace(first, last, count + 1)
    start = alpha_sigma(first)[0] * x, jnp.zeros(batch, jnp.float32) + jnp.sum(0.0 * x, axes)
    (z, volume), _ = jax.lax.scan(step, start, (levels[:-1], levels[1:]))
    d = math.prod(x.shape[1:])
    normal = -0.5 * jnp.sum(jnp.square(z), axes) - 0.5 * d * jnp.log(2.0 * jnp.pi)
    # The density of x = z/α has the factor α^d of the first λ.
    return normal + volume + 0.5 * d * log_sigmoid(first), z


def velocity(eps_fn: Any, labels: PyTree, w: Any, null: PyTree) -> Any:
    """The field (z, λ) -> dz/dλ = ½ (σ² z − σ ε̃)."""
    eps_of = guided(eps_fn, labels, w, null)

    def field(z: Array, logsnr: Array) -> Array:
        sigma = alpha_sigma(per_example(logsnr, z))[1]
        return 0.5 * sigma * (sigma * z - eps_of(z, logsnr))

    return field


def heun(field: Any, state: Any, logsnr: Array, logsnr_next: Array) -> Any:
    """One step of Heun's method for a field of any pytree: the mean of the slopes at both ends."""
    h = logsnr_next - logsnr
    slope = field(state, logsnr)
    ahead = field(jax.tree.map(lambda s, k: s + h * k, state, slope), logsnr_next)
    return jax.tree.map(lambda s, a, b: s + 0.5 * h * (a + b), state, slope, ahead)
