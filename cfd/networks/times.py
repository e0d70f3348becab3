"""The time that a network embeds: λ itself, the time of the cosine schedule, or ADM's discrete time t, and back.

Dhariwal and Nichol (arXiv:2105.05233) train on 1000 steps with ᾱ_t = Π_{s≤t} (1 − β_s): at 64x64 with the cosine
schedule of Nichol and Dhariwal (arXiv:2102.09672), Eq. 17, and at every other size with the linear schedule of Ho et
al. (arXiv:2006.11239), Section 4. Their networks take t itself, fractions included.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float64

NUM_STEPS = 1000


def network_time(logsnr: Float[Array, "b"], time: str) -> Float[Array, "b"]:
    """The time in [0, 1000], from data to noise: `time` is "cosine", "logsnr", "adm_cosine" or "adm_linear".

    "logsnr" is 25 (20 − λ), in which all λ are equally far apart, as in Kingma et al. (arXiv:2107.00630). "cosine"
    hardly tells those beyond 13 apart, which matters to the bound, and not to images. Raises ValueError for another.
    """
    if time == "logsnr":
        return 25.0 * (20.0 - logsnr)
    if time == "cosine":
        return cosine_time(logsnr)
    if time in ("adm_cosine", "adm_linear"):
        return adm_time(logsnr, time.removeprefix("adm_"))
    raise ValueError(f'time is {time!r}: choose "cosine", "logsnr", "adm_cosine" or "adm_linear"')


def cosine_time(logsnr: Float[Array, "b"]) -> Float[Array, "b"]:
    """1000 · (2/π) · arctan(e^{−λ/2}): the cosine schedule's own time, in [0, 1000], from data to noise."""
    return (2000.0 / jnp.pi) * jnp.arctan(jnp.exp(-0.5 * logsnr))


def adm_time(logsnr: Float[Array, "*b"], schedule: str) -> Float[Array, "*b"]:
    """The time t in [0, 999] at which ADM's schedule has log-SNR λ, interpolated linearly in λ between steps.

    ADM never trained beyond the ends of its table. There, t stays at 0 (little noise) or 999 (much noise).
    """
    # All levels are compared at once. The search of `jnp.interp` is a loop, which takes longer to compile.
    rising = np.float32(logsnr_table(schedule)[::-1])
    above = jnp.searchsorted(rising, logsnr, side="right", method="compare_all").clip(1, NUM_STEPS - 1)
    low, high = jnp.asarray(rising)[above - 1], jnp.asarray(rising)[above]
    t = (NUM_STEPS - above).astype(jnp.float32) - (logsnr - low) / (high - low)
    return t.clip(0.0, NUM_STEPS - 1.0)


def adm_logsnr(t: Float[Array, "*b"], schedule: str) -> Float[Array, "*b"]:
    """λ at time t of ADM's schedule, the inverse of `adm_time`. A t below 0 or above 999 gives the λ of that end."""
    return jnp.interp(t, np.arange(NUM_STEPS, dtype=np.float32), np.float32(logsnr_table(schedule)))


@functools.cache
def logsnr_table(schedule: str) -> Float64[np.ndarray, "t"]:
    """λ_t = log ᾱ_t − log(1 − ᾱ_t) for t = 0 … 999, decreasing, in float64, for schedule "cosine" or "linear".

    Raises ValueError for another schedule.
    """
    if schedule == "cosine":
        edge = np.cos((np.arange(NUM_STEPS + 1) / NUM_STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1.0 - edge[1:] / edge[:-1], 0.999)
    elif schedule == "linear":
        beta = np.linspace(1e-4, 0.02, NUM_STEPS)
    else:
        raise ValueError(f'schedule is {schedule!r}, which ADM does not have: choose "cosine" or "linear"')
    log_alpha_bar = np.cumsum(np.log1p(-beta))
    return log_alpha_bar - np.log(-np.expm1(log_alpha_bar))


def respaced(steps: str | int, schedule: str) -> Float64[np.ndarray, "t"]:
    """The λ, rising, of some of ADM's 1000 steps: `guided_sample(num_steps=respaced("250", "cosine"))`, float64 [T].

    "250", ADM's published setting, is 250 steps from t = 0 to t = 999, spaced equally and then rounded. "10,20,30" does
    the same in each third of the 1000 steps. "ddim25" is every 40th step from t = 0 to t = 960, because 40 is the
    smallest stride of 25 steps.

    Raises ValueError if there are no such steps, and for a schedule that `logsnr_table` lacks.
    """
    return logsnr_table(schedule)[_respaced_times(str(steps))][::-1]


def _respaced_times(steps: str) -> list[int]:
    """ADM's times t of its option timestep_respacing, rising."""
    problem = f"steps is {steps!r}, which ADM's {NUM_STEPS} steps do not give"
    if steps.startswith("ddim"):
        strides = [stride for stride in range(1, NUM_STEPS) if f"ddim{-(-NUM_STEPS // stride)}" == steps]
        if not strides:
            raise ValueError(f'{problem}: give "ddimN", N = 1000 / stride rounded up, such as "ddim25" or "ddim50"')
        return list(range(0, NUM_STEPS, strides[0]))
    parts = [part.strip() for part in steps.split(",")]
    sizes = [len(part) for part in np.array_split(np.arange(NUM_STEPS), len(parts))]
    first, times = 0, []
    for part, size in zip(parts, sizes, strict=True):
        count = int(part) if part.isdecimal() else 0
        if not 1 <= count <= size:
            raise ValueError(f'{problem}: give "T", or "T1,T2,..." for equal sections, each T from 1 to {size}')
        # Sums of the stride, as in ADM. Products would be rounded to other steps.
        strides = [(size - 1) / (count - 1)] * (count - 1) if count > 1 else []
        times += [first + round(t) for t in np.cumsum([0.0, *strides])]
        first += size
    return times


def sinusoidal(time: Float[Array, "b"], width: int) -> Float[Array, "b d"]:
    """[cos, sin] of the time at width/2 frequencies from 1 down to 1/10000: Vaswani et al. (arXiv:1706.03762)."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = time[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
