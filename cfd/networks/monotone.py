"""The learned schedule of Kingma et al., Variational Diffusion Models (arXiv:2107.00630): a monotone network of time.

`cfd.losses.learned_loss` trains it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cfd.process import Schedule, as_time, check_ends

UNITS = 1024
SCHEDULE = "schedule"
"""The place of these parameters beside those of a network."""


def initial_schedule() -> dict[str, Float[Array, "..."]]:
    """The parameters of `monotone` with which it is nearly linear: steps of four widths, evenly spread over [0, 1]."""
    slope = jnp.tile(jnp.array([4.0, 10.0, 25.0, 64.0], jnp.float32), UNITS // 4)
    centre = (jnp.arange(UNITS, dtype=jnp.float32) + 0.5) / UNITS
    # Adam moves each parameter by up to its learning rate per step. Small ones change their share of the sum soon.
    height = jnp.full(UNITS, 0.1, jnp.float32)
    return {"line": jnp.full(1, 0.1, jnp.float32), "slope": slope, "shift": -slope * centre, "height": height}


def monotone(params: dict[str, Float[Array, "..."]], logsnr_min: float, logsnr_max: float) -> Schedule:
    """λ(u), falling from logsnr_max to logsnr_min: Kingma et al. (arXiv:2107.00630), with the ends given.

        λ = λ_max − (λ_max − λ_min) (γ(u) − γ(0)) / (γ(1) − γ(0)),    γ(u) = |a| u + mean_k |h_k| sigmoid(|s_k| u + b_k)

    The parameters are a "line", h "height", s "slope" and b "shift". λ is exact at both ends, and differentiable in u
    and in the parameters. Raises ValueError as `check_ends` does.
    """
    check_ends(logsnr_min, logsnr_max)

    slope, shift, height = jnp.abs(params["slope"]), params["shift"], jnp.abs(params["height"])

    def share(u: Array) -> Array:
        start, here, end = (jax.nn.sigmoid(slope * time + shift) for time in (0.0, u, 1.0))
        line = jnp.abs(params["line"][0])
        before = line * u + jnp.mean(height * (here - start))
        after = line * (1.0 - u) + jnp.mean(height * (end - here))
        return before / (before + after)  # exactly 0 and 1 at the ends

    def schedule(u: Any) -> Array:
        u = as_time(u)
        shares = jax.vmap(share)(u.ravel()).reshape(u.shape)
        return (1.0 - shares) * logsnr_max + shares * logsnr_min

    return schedule
