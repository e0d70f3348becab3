"""The density that guidance is said to sample, p(x|c)^{1+w} p(x)^{−w}, sampled by Feynman-Kac correctors.

Skreta et al. (arXiv:2503.02819). Diffusion does not commute with the mix of the scores: no step rule makes
`guided_sample` draw from this density. A population of weighted particles does.

Let s_c and s_u be the scores of p(z|c) and p(z) at λ, and γ = (1 + w, −w). Every noised density satisfies
∂_λ log p = −½σ² (d + z·s + ∇·s + ‖s‖²), the Fokker-Planck equation of the reverse SDE. The sum of γ_i times these
equations is the equation of q_λ = p(z|c)^{1+w} p(z)^{−w}, whose score is s̃ = (1 + w) s_c − w s_u. It differs from the
equation of the reverse SDE with the score s̃ by ½σ² (‖s̃‖² − Σ γ_i ‖s_i‖²) = ½ w (1 + w) σ² ‖s_c − s_u‖², which a
particle accumulates as its log-weight. The difference of the two normalizers is left out.

    dz = ½σ² (z + (1 + κ) s̃) dλ + √κ σ dB,      d log W = ½ w (1 + w) σ² ‖s_c − s_u‖² dλ,

With κ = 1, this is the reverse SDE. Another κ adds or removes Langevin dynamics, which leaves q_λ invariant and the
weights as they are, because s̃ is the score of q_λ. In the paper's time, σ² dλ = g² dt.
"""

from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import sigmoid
from jax.typing import ArrayLike
from jaxtyping import Float, Key, PyTree, Real, UInt32

from cfd import steps
from cfd.arguments import (
    EPS_FN,
    check_called,
    check_count,
    check_function,
    check_number,
    check_output,
    check_representable,
    check_shape,
    threefry,
)
from cfd.attributes import check_trained, is_student
from cfd.guidance import NULL_LABEL, check_weight, guide, nulls_like
from cfd.process import alpha_sigma, check_ends, x_from_eps


class Tilted(NamedTuple):
    """Weighted samples: `jax.nn.softmax(log_weights)` are their probabilities.

    The log-weights are not normalized. logsumexp(log_weights) − log N estimates log ∫ p(x|c)^{1+w} p(x)^{−w} dx, which
    is w times the Rényi divergence of order 1 + w of p(x|c) from p(x).
    """

    samples: Float[Array, "n ..."]
    log_weights: Float[Array, "n"]
    ess: Float[Array, "t"]  # effective number of particles, 1 to N, at each λ before resampling


def tilted_sample(
    key: Key[Array, ""] | UInt32[Array, "2"] | UInt32[Array, "4"],
    eps_fn: Any,
    label: PyTree,
    shape: tuple[int, ...],
    *,
    w: Real[ArrayLike, ""],
    num_particles: SupportsIndex,
    num_steps: SupportsIndex,
    null: PyTree = NULL_LABEL,
    logsnr_min: Real[ArrayLike, ""] = -20.0,
    logsnr_max: Real[ArrayLike, ""] = 20.0,
    ess_fraction: Real[ArrayLike, ""] = 0.5,
    churn: Real[ArrayLike, ""] = 4.0,
) -> Tilted:
    """Draw weighted samples of p(x|c)^{1+w} p(x)^{−w}: Feynman-Kac correctors, Skreta et al. Pure: jit or vmap it.

    This is a reference for small problems, exact as N and T grow if eps_fn is. One call costs 2 T evaluations of eps_fn
    with batches of N. It holds about six arrays [N, *shape] besides the memory of the network, which an eps_fn can
    bound with `jax.lax.map(..., batch_size=...)`.

    Accuracy degenerates with w before it does with the dimension. Measured with N = 1000: the (sliced) W1 distance to
    the exact density, divided by that of 1000 exact samples, for w = 1 / 3 / 10.

                                             T = 64            T = 256           T = 1024
        three Gaussians on a line            3.7 / 4.2 / 6.3   1.2 / 1.6 / 2.0   1.1 / 1.2 / 1.0
        three Gaussians in the plane         2.3 / 8.0 / 19    1.1 / 1.3 / 5.2   1.2 / 1.1 / 1.6
        three Gaussians in 256 dimensions    2.7 / 2.6 / 2.7   1.3 / 1.1 / 1.1   1.2 / 1.1 / 1.1
        digits (64 dimensions, 10 classes)   -                 1.3 / 5.0 / 16    1.5 / 1.6 / 2.2

    Too few steps show in `ess`: with T >= 256, it fell below N / 100 in every cell above 3. The log-integral suffers
    first: in 256 dimensions, it is wrong by 63 at w = 10 and T = 256, and by 0.8 at T = 1024. A small κ does not show
    in `ess`: with κ = 1, the paper's process, the digits at w = 3 and T = 1024 are at 6.1 instead of 1.6, because
    resampled copies hardly separate.

    Args:
      key: one PRNG key, of the whole population. Resampling couples the particles: another N gives other samples.
      eps_fn: `(z, logsnr, labels) -> eps`. The scores of a network are only approximately those of noised densities.
      label: c, one label without a batch axis: an integer, or any pytree of arrays.
      shape: the shape of one sample.
      w: the guidance weight, one number, traced. Between −1 and 0, the density is a geometric mean of the two.
      num_particles, num_steps: N and T. The grid in λ is that of `guided_sample`.
      null: ∅, with the structure and shape of `label`.
      logsnr_min, logsnr_max: the first and the last λ, in [−80, 80].
      ess_fraction: resample (systematically) where the effective sample size is less than this fraction of N, in
        [0, 1]. 0 never resamples. With 1, all returned weights are equal.
      churn: κ > 0, the variance of the noise relative to the reverse SDE. A larger κ separates resampled copies sooner,
        keeps the weights more even, and needs more steps.

    Returns: `Tilted`, in float32: samples [N, *shape], log-weights [N], not normalized, and effective sizes [T].

    Raises: ValueError on concrete numbers out of range, on a w that varies with λ, on λ outside the `logsnr_range` of
    eps_fn, and on arguments whose shapes do not agree.
    """
    count, num_steps = check_count("num_particles", num_particles), check_count("num_steps", num_steps, 3)
    shape = check_shape(shape)
    check_function("eps_fn", eps_fn, EPS_FN)
    check_representable(label)
    check_ends(logsnr_min, logsnr_max)
    check_trained(eps_fn, logsnr_min, logsnr_max)
    if is_student(eps_fn):
        raise ValueError("eps_fn is a student, which has no unconditional score: give the network that it learned from")
    check_called("w", w)
    if callable(w) or jnp.ndim(w) != 0:
        raise ValueError(f"w is {w!r}; the density has one exponent: give one number")
    check_weight(w)
    check_number("ess_fraction", ess_fraction, lambda x: (x >= 0) & (x <= 1), "it is a share of N: give one in [0, 1]")
    check_number("churn", churn, lambda x: (x > 0) & (x < np.inf), "it multiplies a variance: give a number > 0")
    key = threefry(key)
    if key.shape != ():
        raise ValueError(f"key has batch shape {key.shape}; give one key: the particles are one population")
    labels = jax.tree.map(lambda c: jnp.broadcast_to(jnp.asarray(c), (count, *jnp.shape(c))), label)
    nulls, w = nulls_like(labels, null), jnp.asarray(w, jnp.float32)

    logsnr = steps.schedule(num_steps, logsnr_min, logsnr_max)
    logsnr_next = jnp.append(logsnr[1:], logsnr[-1] + 1.0)  # no step follows the last λ
    # Second order, as in `SecondOrder`: x̃ is extrapolated to the middle of every step but the first and the last.
    reach = steps.reach(logsnr, logsnr_next)

    def evaluate(z: Array, logsnr: Array, labels: PyTree) -> Array:
        return check_output("eps_fn", eps_fn(z, jnp.broadcast_to(logsnr, (count,)), labels), z.shape)[0]

    def step(carry: tuple[Array, Array, Array], at: tuple[Array, ...]) -> tuple[tuple[Array, Array, Array], Array]:
        (z, x_before, log_weights), (t, logsnr, logsnr_next, reach, potential) = carry, at
        noise_key, resample_key = jax.random.split(jax.random.fold_in(key, t))
        eps_cond, eps_uncond = evaluate(z, logsnr, labels), evaluate(z, logsnr, nulls)
        squared = jnp.sum(jnp.square(eps_cond - eps_uncond).reshape(count, -1), axis=1)
        log_weights = log_weights + 0.5 * w * (1.0 + w) * potential * squared
        x = x_from_eps(z, guide(eps_cond, eps_uncond, w), logsnr)

        shares = jax.nn.softmax(log_weights)
        ess = 1.0 / jnp.sum(jnp.square(shares))
        resampled = ess < jnp.asarray(ess_fraction, jnp.float32) * count
        mean_weight = jax.nn.logsumexp(log_weights) - jnp.log(jnp.float32(count))
        log_weights = jnp.where(resampled, mean_weight, log_weights)
        parents = jnp.where(resampled, _systematic(resample_key, shares), jnp.arange(count))
        z, x, x_before = z[parents], x[parents], x_before[parents]

        mean, std = _churned(z, x + reach * (x - x_before), logsnr, logsnr_next, churn)
        z_next = mean + std * jax.random.normal(noise_key, z.shape, jnp.float32)
        return (jnp.where(t == num_steps, x, z_next), x, log_weights), ess

    z = jax.random.normal(jax.random.fold_in(key, 0), (count, *shape), jnp.float32)
    inputs = jnp.arange(1, num_steps + 1), logsnr, logsnr_next, reach, _quadrature(logsnr)
    (samples, _, log_weights), ess = jax.lax.scan(step, (z, z, jnp.zeros(count, jnp.float32)), inputs)
    return Tilted(samples, log_weights, ess)


def _quadrature(logsnr: Array) -> Array:
    """Coefficients k [T] with Σ_t k_t ‖Δε_t‖² ≈ ∫ ‖Δε‖² dλ: the trapezoidal rule in α², for Δε = ε_c − ε_u.

    dλ = dα² / (α² σ²). At both ends, ‖Δε‖² / (α² σ²) tends to a constant, while ‖Δε‖² changes by orders of magnitude
    within one step. The values at the two ends are replaced by their neighbors', because 1 / (α² σ²), up to 5e8 there,
    would amplify the errors of a network.
    """
    rise = sigmoid(logsnr[1:]) - sigmoid(logsnr[:-1])
    fall = sigmoid(-logsnr[:-1]) - sigmoid(-logsnr[1:])
    half = 0.5 * jnp.where(logsnr[1:] < 0.0, rise, fall)  # both are Δα² / 2; each is precise at its own end
    half = half.at[0].multiply(2.0).at[-1].multiply(2.0)
    return jnp.pad((half[1:] + half[:-1]) / (sigmoid(logsnr) * sigmoid(-logsnr))[1:-1], 1)


def _churned(z: Array, x: Array, logsnr: Array, logsnr_next: Array, churn: Any) -> tuple[Array, Array]:
    """Mean and standard deviation of a step of the SDE with noise κ, exact for constant x̃.

    Xue et al., SA-Solver (arXiv:2309.05019), with τ² = κ. κ = 1 is `ancestral(0.0)`, and κ = 0 would be `ddim()`.
    """
    churn = jnp.asarray(churn, jnp.float32)
    sigma, (alpha_next, sigma_next) = alpha_sigma(logsnr)[1], alpha_sigma(logsnr_next)
    half = 0.5 * (logsnr_next - logsnr)
    mean = sigma_next / sigma * jnp.exp(-churn * half) * z - jnp.expm1(-(1.0 + churn) * half) * alpha_next * x
    return mean, sigma_next * jnp.sqrt(-jnp.expm1(-2.0 * churn * half))


def _systematic(key: Array, shares: Array) -> Array:
    """The parents [N] of N particles: particle i is copied N share_i times, rounded up or down. One uniform draw."""
    count = len(shares)
    places = (jnp.arange(count, dtype=jnp.float32) + jax.random.uniform(key, dtype=jnp.float32)) / count
    cumulative = jnp.cumsum(shares)
    return jnp.minimum(jnp.searchsorted(cumulative / cumulative[-1], places, side="right"), count - 1)
