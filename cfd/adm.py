"""The discrete time of ADM's networks: λ to t in [0, 999] and back, for the schedules its models were trained with.

Dhariwal and Nichol (arXiv:2105.05233) train on 1000 steps with ᾱ_t = Π_{s≤t} (1 − β_s): the cosine schedule of Nichol
and Dhariwal (arXiv:2102.09672), Eq. 17, at 64x64, and the linear schedule of Ho et al. (arXiv:2006.11239), Section 4,
at every other size. Their networks take t itself, fractions included.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float64

NUM_STEPS = 1000


@functools.cache
def logsnr_table(schedule: str) -> Float64[np.ndarray, "t"]:
    """λ_t = log ᾱ_t − log(1 − ᾱ_t) for t = 0 … 999, falling with t, in float64. `schedule`: "cosine" or "linear"."""
    if schedule == "cosine":
        edge = np.cos((np.arange(NUM_STEPS + 1) / NUM_STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1.0 - edge[1:] / edge[:-1], 0.999)
    elif schedule == "linear":
        beta = np.linspace(1e-4, 0.02, NUM_STEPS)
    else:
        raise ValueError(f'schedule is {schedule!r}; ADM has two: give "cosine" or "linear"')
    log_alpha_bar = np.cumsum(np.log1p(-beta))
    return log_alpha_bar - np.log(-np.expm1(log_alpha_bar))


def adm_time(logsnr: Float[Array, "*b"], schedule: str) -> Float[Array, "*b"]:
    """The t at which ADM's schedule has log-SNR λ, linear in λ between two steps.

    Beyond the ends of the table, where ADM never trained, t stays at 0 (little noise) or 999 (much noise).
    """
    table = logsnr_table(schedule)
    steps = np.arange(NUM_STEPS, dtype=np.float32)
    return jnp.interp(logsnr, np.float32(table[::-1]), steps[::-1])


def adm_logsnr(t: Float[Array, "*b"], schedule: str) -> Float[Array, "*b"]:
    """λ at time t of ADM's schedule, the inverse of `adm_time`; t below 0 or above 999 gives the λ of that end."""
    return jnp.interp(t, np.arange(NUM_STEPS, dtype=np.float32), np.float32(logsnr_table(schedule)))
