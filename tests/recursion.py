"""Algorithm 2 as an exact linear-Gaussian recursion in float64, and the samplers that are compared with it."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from mixtures import gaussian_eps

from cfd.sampling import guided_sample

# Two classes and ∅, the last row.
MEANS = np.array([[0.6, -0.4, 0.1], [-0.3, 0.5, 0.8], [0.1, 0.0, 0.4]])
STDS = np.array([0.3, 0.6, 0.9])
ROUNDING = float(np.finfo(np.float32).eps)

KEY = jax.random.key(20)
LABELS = jnp.arange(8, dtype=jnp.int32) % 2
linear = gaussian_eps(MEANS, STDS)


def network(z, logsnr, labels):
    """A network that is neither linear nor elementwise; label −1 selects the zero row of its table."""
    table = jnp.sin(jnp.arange(4 * 6.0)).reshape(4, 6).at[-1].set(0.0)
    mix = jnp.cos(jnp.arange(18.0)).reshape(3, 6)
    hidden = jax.nn.silu(z @ mix + table[labels] + 0.1 * logsnr[:, None])
    return 0.5 * z + 0.3 * hidden @ mix.T


class Exact(NamedTuple):
    images: np.ndarray  # [B, d], from the given noise
    mean: np.ndarray  # [B, d], over the noise
    variance: np.ndarray  # [B]
    rounding: np.ndarray  # [B], a bound on the rounding error of float32


def exact_gaussian_samples(
    noise, classes, w, *, v, num_steps, null=-1, logsnr_min=-20.0, logsnr_max=20.0, clip=False, second_order=False
) -> Exact:
    """Algorithm 2 in float64 from the paper's Eqs. 1 to 6, with ε of `gaussian_eps`; v = None is DDIM.

    noise [B, >= num_steps, d] holds z_1 and then the noise of each step. Without clipping, z is affine in the noise, so
    the mean, the variance and the growth of the rounding error follow exactly. w is a function of λ that returns [B].
    With `second_order`, x̃ is D of arXiv:2211.01095, Algorithm 2, line 7, except in the first step and the last.
    """
    b = math.atan(math.exp(-logsnr_max / 2))
    a = math.atan(math.exp(-logsnr_min / 2)) - b
    u = [1 - (t - 1) / max(num_steps - 1, 1) for t in range(1, num_steps + 1)]
    logsnr = [-2 * math.log(math.tan(a * value + b)) for value in u]

    z, mean, parts = noise[:, 0], np.zeros_like(noise[:, 0]), np.zeros(noise.shape[:2])
    parts[:, 0] = 1  # coefficient of each noise in z
    rounding = x_error = np.zeros(len(noise))
    x_before = x_mean_before = x_parts_before = 0.0
    for t in range(num_steps):
        alpha, sigma = exact_alpha_sigma(logsnr[t])
        weight = w(logsnr[t])
        (slope_c, offset_c), (slope_0, offset_0) = (eps_line(alpha, sigma, label) for label in (classes, null))
        x_slope = (1 - sigma * ((1 + weight) * slope_c - weight * slope_0)) / alpha
        x_offset = -sigma / alpha * ((1 + weight)[:, None] * offset_c - weight[:, None] * offset_0)
        x = x_slope[:, None] * z + x_offset
        # x is the difference of these terms divided by α. Each term is rounded a few times.
        terms = 1 + sigma * (np.abs(1 + weight) * slope_c + np.abs(weight) * slope_0)
        terms = terms * (np.abs(z).max(axis=1) + alpha)
        x_rounding = 2 * ROUNDING * terms / alpha
        x = np.clip(x, -1, 1) if clip else x
        if t == num_steps - 1:
            x_rounding = x_rounding + np.abs(x_slope) * rounding
            variance = np.square(x_slope[:, None] * parts).sum(axis=1)
            return Exact(x, x_slope[:, None] * mean + x_offset, variance, x_rounding)

        alpha_next, sigma_next = exact_alpha_sigma(logsnr[t + 1])
        if v is None:
            from_z, std = sigma_next / sigma, 0.0
            from_x = alpha_next - from_z * alpha
        else:
            kept = math.exp(logsnr[t] - logsnr[t + 1])
            from_z, from_x = kept * alpha_next / alpha, (1 - kept) * alpha_next
            std = math.sqrt(((1 - kept) * sigma_next**2) ** (1 - v) * ((1 - kept) * sigma**2) ** v)
        extra = 0.0  # 1 / (2 r); r is the ratio of the previous gap in λ to this one
        if second_order and 0 < t < num_steps - 2:
            extra = 0.5 * (logsnr[t + 1] - logsnr[t]) / (logsnr[t] - logsnr[t - 1])
        x_mean, x_parts = x_slope[:, None] * mean + x_offset, x_slope[:, None] * parts
        z = from_z * z + from_x * ((1 + extra) * x - extra * x_before) + std * noise[:, t + 1]
        mean = from_z * mean + from_x * ((1 + extra) * x_mean - extra * x_mean_before)
        parts = from_z * parts + from_x * ((1 + extra) * x_parts - extra * x_parts_before)
        parts[:, t + 1] += std
        x_before, x_mean_before, x_parts_before = x, x_mean, x_parts
        added = (1 + extra) * x_rounding + extra * x_error
        x_error = x_rounding + np.abs(x_slope) * rounding
        slope = from_z + from_x * (1 + extra) * x_slope
        rounding = np.abs(slope) * rounding + from_x * added + 2 * ROUNDING * (np.abs(z).max(axis=1) + 1)
    raise AssertionError("num_steps >= 1")


def exact_alpha_sigma(logsnr):
    snr = math.exp(logsnr)
    return math.sqrt(snr / (1 + snr)), math.sqrt(1 / (1 + snr))


def eps_line(alpha, sigma, label):
    """(slope, offset) of ε(z, label) = slope z + offset; slope is [B] or a scalar, offset is [B, d] or [d]."""
    slope = np.asarray(sigma / (alpha**2 * STDS[label] ** 2 + sigma**2))
    return slope, -slope[..., None] * alpha * MEANS[label]


def constant(w):
    return lambda logsnr: np.full(8, w)


@functools.cache
def noise_of_images(count=8, num_steps=16):
    """The noise of the images of KEY, [B, T, 3] in float64; step t of image i uses fold_in(fold_in(KEY, i), t)."""

    @jax.vmap
    def draw(key):
        keys = jax.vmap(lambda t: jax.random.fold_in(key, t))(jnp.arange(num_steps))
        return jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)

    return np.asarray(jax.jit(lambda: draw(image_keys(count)))(), np.float64)


@functools.partial(jax.jit, static_argnums=0)
def image_keys(count):
    return jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(count))


def sampler_of(eps_fn, **kwargs):
    """One compiled sampler of `eps_fn`: (keys, labels, w) -> images."""
    settings: dict[str, Any] = {"num_steps": 8} | kwargs
    return jax.jit(lambda keys, labels, w: guided_sample(keys, eps_fn, labels, (3,), w=w, **settings))


# Shared by many tests; each compiles one program per shape of w.
sample, sample_doubled = sampler_of(network), sampler_of(network, doubled=True)


class jaxtyping_off:
    """Within it, calls are as in user code; otherwise the suite's shape checks would refuse these arguments first."""

    def __enter__(self):
        jaxtyping.config.update("jaxtyping_disable", True)

    def __exit__(self, *_):
        jaxtyping.config.update("jaxtyping_disable", False)
