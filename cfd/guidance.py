"""Classifier-free guidance: the null label, the label dropout that trains it, and the mix of the two scores.

Ho and Salimans, Classifier-Free Diffusion Guidance (arXiv:2207.12598), Section 3.2. w is the paper's weight:
w = 0 is the conditional model, w = −1 the unconditional one. (A `guidance_scale` s elsewhere is s = 1 + w.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key, UInt32

from cfd.process import per_example

NULL_LABEL = -1
"""∅, the label of the unconditional model: "input zeros for the class identifier" (Section 3.2)."""


def drop_labels(
    key: Key[Array, ""] | UInt32[Array, "2"], labels: Int[Array, "b"], p_uncond: Float[Array, ""] | float
) -> Int[Array, "b"]:
    """Each label replaced by NULL_LABEL with probability p_uncond, independently: Algorithm 1, line 3.

    Raises ValueError if p_uncond is a number outside [0, 1].
    """
    if isinstance(p_uncond, (int, float)) and not 0.0 <= p_uncond <= 1.0:
        raise ValueError(f"p_uncond is {p_uncond}; it is a probability: give a value in [0, 1]")
    return jnp.where(jax.random.bernoulli(key, p_uncond, labels.shape), NULL_LABEL, labels)


def guide(
    eps_cond: Float[Array, "..."], eps_uncond: Float[Array, "..."], w: Float[Array, "*b"] | float
) -> Float[Array, "..."]:
    """ε̃ = (1 + w) ε(z, c) − w ε(z): Eq. 6. w is a scalar or [B]. Exact at w = 0 and at w = −1."""
    w = per_example(w, eps_cond)
    return (1.0 + w) * eps_cond - w * eps_uncond


class Interval(NamedTuple):
    """Guidance of weight w while logsnr_lo <= λ <= logsnr_hi, and none outside.

    Kynkäänniemi et al., Applying Guidance in a Limited Interval (arXiv:2404.07724). All three are traced: new
    values never recompile. Outside the interval the sampler makes one network evaluation a step, not two.
    """

    w: Float[Array, "*b"] | float
    logsnr_lo: Float[Array, ""] | float
    logsnr_hi: Float[Array, ""] | float
