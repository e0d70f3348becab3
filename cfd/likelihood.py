"""The variational bound of a diffusion model in bits per dimension, and what follows from it.

Ho, Jain and Abbeel (arXiv:2006.11239), Section 3, in λ: the chain of a grid λ_1 < … < λ_T, with the variances of
`ancestral(v)`, is a latent-variable model of the data, and for every grid, v and guidance weight

    −log p(x) <= prior + Σ_{t<T} KL_t + decoder.

The bound holds for guided chains too. It says how well the chain codes an image, and not how good its images look.

Two choices decide the number. Beyond the λ where the network can still tell the noise, each unit of λ costs up to half
a nat per dimension, and the decoder could do the same for less: choose λ_T on the training split. The levels should be
uniform in λ (`cfd.process.linear`), because the cosine grid has few levels where the bound needs them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import softplus
from jax.scipy.special import log_ndtr
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Key, PyTree, Real, UInt32

from cfd.arguments import (
    check_count,
    check_data,
    check_function,
    check_number,
    check_numbers,
    check_returned,
    check_switch,
    image_keys,
)
from cfd.attributes import check_trained
from cfd.guidance import NULL_LABEL, batch_size, guided
from cfd.process import alpha_sigma, check_grid, check_v, diffuse, step_divergence, x_from_eps

LEVELS = 256
"""The values of a pixel: x = k / 127.5 − 1 for k = 0 … 255."""

Decoder = Callable[[Array, Array, Array, Array], Array]
"""(x, z, x̂, λ) -> −log p(x | z) in nats, of the shape of x, where z is at the last λ and x̂ its prediction of x."""


class Bound(NamedTuple):
    """The terms of the bound for each image, in bits per dimension, and the error of x̂ at each level.

    Each is an unbiased estimate from one draw of the noise per level.
    """

    prior: Float[Array, "b"]
    kl: Float[Array, "s b"]  # of the T − 1 steps, from noise to data
    decoder: Float[Array, "b"]
    squared_error: Float[Array, "t b"]  # the mean over dimensions of (x − x̂)², at the T levels

    @property
    def total(self) -> Float[Array, "b"]:
        """The bound: bits per dimension of each image."""
        return self.prior + self.kl.sum(0) + self.decoder


def softmax_decoder(x: Array, z: Array, x_hat: Array, logsnr: Array) -> Array:
    """p(x | z) ∝ exp(−½ e^λ (z/α − x)²) over the 256 values of a pixel: Kingma et al. (arXiv:2107.00630).

    It has no parameter. Its sum runs over one value at a time, and takes the memory of a few images.
    """
    y, pixel = to_levels(z / alpha_sigma(logsnr)[0]), jnp.round(to_levels(x))
    nearest, precision = jnp.clip(jnp.round(y), 0, LEVELS - 1), jnp.exp(logsnr) / 127.5**2

    def exponent(k: Array) -> Array:
        # −½ e^λ (y − k)², relative to the nearest value, as a product: squares would cancel.
        return -0.5 * precision * (nearest - k) * (2.0 * y - nearest - k)

    # k is an int under `jax.disable_jit`.
    total = jax.lax.fori_loop(
        0, LEVELS, lambda k, s: s + jnp.exp(exponent(jnp.asarray(k, jnp.float32))), jnp.zeros_like(y) * y
    )
    return jnp.log(total) - exponent(pixel)


def gaussian_decoder(variance: Real[ArrayLike, ""]) -> Decoder:
    """The integral of N(x̂, variance) over the bin of a pixel, which is open at −1 and 1: arXiv:2006.11239, Eq. 13.

    DDPM's released code has the variance of its step before the last, 5.45e-5 for its schedule. Raises ValueError
    unless the variance is positive.
    """
    check_number("variance", variance, lambda x: (x > 0.0) & (x < math.inf), "give a finite number > 0, in float32")

    def decoder(x: Array, z: Array, x_hat: Array, logsnr: Array) -> Array:
        std, middle = 127.5 * jnp.sqrt(jnp.asarray(variance, jnp.float32)), 0.5 * (LEVELS - 1)
        value, mean = jnp.round(to_levels(x)) - middle, to_levels(x_hat) - middle
        # Reflected, so that the bin lies below the mean: there log Φ is precise.
        sign = jnp.where(value <= mean, 1.0, -1.0)
        value, mean = sign * value, sign * mean
        low = jnp.where(value <= -middle, -jnp.inf, (value - 0.5 - mean) / std)
        high = jnp.where(value >= middle, jnp.inf, (value + 0.5 - mean) / std)
        ratio = jnp.exp(jnp.minimum(log_ndtr(low) - log_ndtr(high), 0.0))
        return -(log_ndtr(high) + jnp.log1p(-ratio))

    return decoder


def to_levels(x: Any) -> Any:
    """x in [−1, 1] in units of pixel values, 0 to 255. Values of pixels are integers there, and edges of bins exact."""
    return (x + 1.0) * 127.5


def bound(
    key: Key[Array, "*b"] | UInt32[Array, "*b 2"] | UInt32[Array, "*b 4"],
    eps_fn: Any,
    x: Float[Array, "b ..."],
    labels: PyTree,
    *,
    logsnr: Any,
    v: Real[ArrayLike, ""] = 0.0,
    w: Any = 0.0,
    null: PyTree = NULL_LABEL,
    clip: bool = True,
    decoder: Decoder = softmax_decoder,
) -> Bound:
    """The bound of the chain with the levels `logsnr` [T], rising, and the variances of `ancestral(v)`. Pure.

        prior = ½ Σ (α_1² (x² − 1) − log σ_1²),      KL_t = ½ r (e^{λ_{t+1}} − e^{λ_t}) ‖x − x̂_t‖² + d/2 (r − 1 − log r)

    with r = (σ²_{t+1} / σ²_t)^v: arXiv:2006.11239, Eq. 5. With v = 0, KL_t is its Eq. 12 with β̃, and the discrete loss
    of arXiv:2107.00630; with v = 1, Eq. 12 with β.

    Args:
      key: one PRNG key, from which image i takes `fold_in(key, i)`, or [B] keys. The noise of level t of an image
        follows from its key and t alone.
      eps_fn: `(z, logsnr, labels) -> eps`. It is evaluated T times, and with w != 0 twice at each level.
      x: data in [−1, 1]; for the default decoder, the values k / 127.5 − 1.
      labels: as in `guided_sample`; ∅ for all gives the unconditional bound.
      logsnr: the grid, such as `grid(256, linear(-20.0, 13.3))`. It may be traced.
      v, w, null: as in `ancestral` and `guided_sample`.
      clip: clip x̂ to [−1, 1], which can only lower the bound of data in there.
      decoder: `softmax_decoder`, `gaussian_decoder(variance)`, or any function like them.

    Raises: ValueError on concrete numbers out of range, and on arguments whose shapes do not agree.
    """
    check_function("decoder", decoder, "(x, z, x̂, λ) -> −log p(x | z), such as gaussian_decoder(5e-5)")
    batch = batch_size(labels)
    x = check_data(x, (batch,))
    if decoder is softmax_decoder:
        check_pixels(x)
    check_grid(logsnr, "logsnr")
    check_v(v)
    check_trained(eps_fn, logsnr[0], logsnr[-1])
    check_switch("clip", clip)
    levels, v = jnp.asarray(logsnr, jnp.float32), jnp.asarray(v, jnp.float32)
    keys = image_keys(key, batch)
    eps_of = guided(eps_fn, labels, w, null)
    d = math.prod(x.shape[1:])

    def at_level(t: Array, logsnr: Array) -> tuple[Array, Array]:
        z = diffuse(x, _noise(keys, t, x.shape[1:]), logsnr)
        x_hat = x_from_eps(z, eps_of(z, logsnr), logsnr)
        return z, jnp.clip(x_hat, -1.0, 1.0) if clip else x_hat

    def mean(values: Array) -> Array:
        return jnp.mean(values.reshape(batch, d), axis=1)

    def term(_: None, at: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
        t, logsnr, logsnr_next = at
        error = mean(jnp.square(x - at_level(t, logsnr)[1]))
        return None, (step_divergence(error, logsnr, logsnr_next, v), error)

    count = len(levels)
    _, (kl, errors) = jax.lax.scan(term, None, (jnp.arange(1, count), levels[:-1], levels[1:]))
    z, x_hat = at_level(jnp.asarray(count), levels[-1])
    alpha_squared = jax.nn.sigmoid(levels[0])
    prior = 0.5 * mean(alpha_squared * (jnp.square(x) - 1.0) + softplus(levels[0]))
    costs = decoder(x, z, x_hat, levels[-1])
    check_returned("decoder", costs, x.shape, "−log p(x | z) in nats")
    bits = 1.0 / math.log(2.0)
    return Bound(
        bits * prior,
        bits * kl,
        bits * mean(costs),
        jnp.concatenate([errors, mean(jnp.square(x - x_hat))[None]]),
    )


def decoder_costs(
    key: Key[Array, "*b"] | UInt32[Array, "*b 2"] | UInt32[Array, "*b 4"],
    x: Float[Array, "b ..."],
    *,
    logsnr: Any,
    first: int = 0,
) -> Float[Array, "c b"]:
    """The cost of `softmax_decoder` in bits per dimension if the chain of `bound` ended at each level from `first` on.

    The noise is that of `bound` with the same key and levels. With them, prior + cumsum(kl) + costs are the bounds of
    all these chains, from one evaluation of `bound`. Raises ValueError as `bound` does.
    """
    check_grid(logsnr, "logsnr")
    check_pixels(x)
    x = jnp.asarray(x, jnp.float32)
    levels, d, keys = jnp.asarray(logsnr, jnp.float32), math.prod(x.shape[1:]), image_keys(key, len(x))
    if check_count("first", first, 0) >= len(levels):
        raise ValueError(f"first is {first}; it is one of {len(levels)} levels: give an integer from 0 on, below that")

    def cost(at: tuple[Array, Array]) -> Array:
        t, logsnr = at
        z = diffuse(x, _noise(keys, t, x.shape[1:]), logsnr)
        return softmax_decoder(x, z, x, logsnr).reshape(len(x), d).mean(1) / math.log(2.0)

    return jax.lax.map(cost, (jnp.arange(first + 1, len(levels) + 1), levels[first:]))


def _noise(keys: Array, t: Array, shape: tuple[int, ...]) -> Array:
    """The noise of level t for each image."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape, jnp.float32))(keys)


def check_pixels(x: Any) -> None:
    """Raises ValueError unless x has the values of uint8 images, k / 127.5 − 1. Traced numbers are not checked."""

    def is_pixel(x: np.ndarray) -> Any:
        values = to_levels(x)
        return (abs(x) < 1.001) & (abs(values - np.round(values)) < 0.01)

    check_numbers("x", x, is_pixel, "the decoder knows 256 values: give x / 127.5 - 1 of uint8 images")


def rate_distortion(terms: Bound) -> tuple[Float[Array, "t"], Float[Array, "t"]]:
    """(rate, distortion) of the progressive code at each level: arXiv:2006.11239, Section 4.3.

    The rate is the bits per dimension that the prior and the steps up to the level have cost. The distortion is the
    root mean squared error of x̂, on the scale of 0 to 255. Both are those of all images together.
    """
    spent = jnp.concatenate([jnp.zeros((1, 1), jnp.float32), jnp.cumsum(terms.kl.mean(1, keepdims=True), axis=0)])
    return terms.prior.mean() + spent[:, 0], 127.5 * jnp.sqrt(terms.squared_error.mean(1))


def class_scores(
    key: Key[Array, "*b"] | UInt32[Array, "*b 2"] | UInt32[Array, "*b 4"],
    eps_fn: Any,
    x: Float[Array, "b ..."],
    num_classes: SupportsIndex,
    **options: Any,
) -> Float[Array, "b k"]:
    """Minus the bound of each image under each class, in nats: log p(x | c) of the implicit classifier, at least.

    With equal priors, its softmax over the classes is p(c | x), and its argmax the class: Ho and Salimans
    (arXiv:2207.12598), Section 3.2. All classes have the same noise. `options` are those of `bound`, `logsnr` among
    them. It costs `num_classes` bounds.
    """
    count, d = check_count("num_classes", num_classes), math.prod(np.shape(x)[1:])

    def score(label: Int[Array, ""]) -> Array:
        return -math.log(2.0) * d * bound(key, eps_fn, x, jnp.full(len(x), label), **options).total

    return jax.lax.map(score, jnp.arange(count, dtype=jnp.int32)).T


def best_grid(
    squared_error: Float[np.ndarray, " n"], logsnr: Float[np.ndarray, " n"], num_steps: SupportsIndex
) -> Float[np.ndarray, " t"]:
    """The `num_steps` of n levels with the lowest bound at v = 0, the first and the last among them, by Bellman.

    Watson et al. (arXiv:2106.03802). A step from λ_i to λ_j costs ½ (e^{λ_j} − e^{λ_i}) of the squared error at λ_i,
    such as `bound(...).squared_error.mean(1)`, and costs add up. The best grid for the bound is not the one with the
    best FID. Raises ValueError if num_steps is not from 2 to n, or if the arrays do not fit.
    """
    error, levels = np.asarray(squared_error, np.float64), np.asarray(logsnr, np.float64)
    check_grid(levels, "logsnr")
    count = check_count("num_steps", num_steps, 2)
    if error.shape != levels.shape or count > len(levels):
        raise ValueError(
            f"squared_error has shape {error.shape}, logsnr {levels.shape}, and num_steps is {count}: give one error "
            "per level, and num_steps from 2 to their number"
        )
    check_numbers("squared_error", error, lambda x: (x >= 0.0) & (x < math.inf), "give a finite mean square per level")
    cost = 0.5 * error[:, None] * (np.exp(levels)[None, :] - np.exp(levels)[:, None])
    cost = np.where(levels[None, :] > levels[:, None], cost, np.inf)
    least, before = np.full(len(levels), np.inf), []
    least[0] = 0.0
    for _ in range(count - 1):
        through = least[:, None] + cost
        before.append(through.argmin(axis=0))
        least = through.min(axis=0)
    chosen = [len(levels) - 1]
    for parents in reversed(before):
        chosen.append(int(parents[chosen[-1]]))
    return levels[chosen[::-1]]
