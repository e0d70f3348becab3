"""Guidance with exact scores: `python .github/images/mixture.py` writes mixture.png beside itself.

Each of three classes is a Gaussian in the plane: x | c ~ N(m_c, s² I). After diffusion, z | c ~ N(α m_c, (α² s² + σ²)
I). Therefore ε(z, c) = σ (z − α m_c) / (α² s² + σ²), and ε(z) is the mean of the three, weighted by p(c | z). No
network and no training are involved. The picture follows Figure 2 of Ho and Salimans (arXiv:2207.12598), with densities
estimated from samples. A cross marks the mean of a class in the data, and a dashed circle two standard deviations.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter

from cfd.process import alpha_sigma
from cfd.sampling import ddim, guided_sample

MEANS = 0.6 * np.array([[0.0, 1.0], [-0.87, -0.5], [0.87, -0.5]])
STD = 0.3
COLOURS = np.array([[213, 94, 0], [0, 114, 178], [0, 158, 115]]) / 255  # Okabe and Ito, for colour-blind readers
WEIGHTS = (0.0, 1.0, 2.0, 4.0)
NUM_SAMPLES = 300_000
X_RANGE, Y_RANGE, BINS = (-1.55, 1.55), (-1.3, 1.8), 160


def eps_fn(z: jax.Array, logsnr: jax.Array, labels: jax.Array) -> jax.Array:
    """The exact ε of z [B, 2] at logsnr [B] for labels [B]. The label −1 is ∅, the mixture of the three classes."""
    alpha, sigma = (x[:, None, None] for x in alpha_sigma(logsnr))
    variance = alpha**2 * STD**2 + sigma**2
    offset = z[:, None] - alpha * jnp.asarray(MEANS, jnp.float32)[None]  # [B, 3, 2]
    posterior = jax.nn.softmax(-0.5 * jnp.sum(offset**2, axis=2) / variance[:, :, 0], axis=1)
    p = jnp.where(labels[:, None] < 0, posterior, jax.nn.one_hot(labels, 3))
    return jnp.sum(p[:, :, None] * sigma * offset / variance, axis=1)


@jax.jit
def sample(key: jax.Array, labels: jax.Array, w: float) -> jax.Array:
    """One point of the plane per label."""
    return guided_sample(key, eps_fn, labels, (2,), w=w, num_steps=128, sampler=ddim(), clip=False)


def density(points: np.ndarray) -> np.ndarray:
    """A smoothed histogram [BINS, BINS] of points [N, 2], with a maximum of 1."""
    counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], BINS, [Y_RANGE, X_RANGE])
    smooth = gaussian_filter(counts, 1.8)
    return smooth / smooth.max()


labels = jnp.arange(NUM_SAMPLES) % 3
turn = np.linspace(0, 2 * np.pi, 100)
circle = 2 * STD * np.stack([np.cos(turn), np.sin(turn)])
figure = Figure(figsize=(10, 2.8), dpi=140, layout="constrained")
for axis, w in zip(figure.subplots(1, len(WEIGHTS)), WEIGHTS, strict=True):
    points = np.asarray(sample(jax.random.key(0), labels, w))
    ink = sum(density(points[labels == c])[..., None] * (1 - COLOURS[c]) for c in range(3))
    axis.imshow(1 - np.clip(ink, 0, 1), origin="lower", extent=(*X_RANGE, *Y_RANGE), interpolation="bilinear")
    for mean, colour in zip(MEANS, COLOURS, strict=True):
        axis.plot(*mean, "+", color="black", markersize=7)
        axis.plot(*(mean[:, None] + circle), "--", color=colour, linewidth=1)
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set_color("0.8")
    axis.set_title(f"w = {w:g}" + ", the data" * (w == 0), fontsize=15)
figure.savefig(Path(__file__).with_suffix(".png"))
