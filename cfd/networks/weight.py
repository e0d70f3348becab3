"""The guidance weight w as an input of a network: the student of Meng et al. (arXiv:2210.03142), Section 3.1."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cfd.networks.times import sinusoidal


class WeightEmbedding(nn.Module):
    """The embedding of w, which is added to that of λ: an MLP of sinusoids, as λ's own.

    The range of w is mapped to [0, 1000], the range of the time. The last layer begins at zero, so a network that gains
    this input is at first the same function as without it.
    """

    base_channels: int
    weight_range: tuple[float, float]

    @nn.compact
    def __call__(self, w: Float[Array, "b"]) -> Float[Array, "b d"]:
        (lo, hi), width = self.weight_range, 4 * self.base_channels
        emb = sinusoidal(1000.0 / (hi - lo) * (w - lo), self.base_channels)
        emb = nn.silu(nn.Dense(width, name="weight_0")(emb))
        return nn.Dense(width, kernel_init=nn.initializers.zeros, name="weight_1")(emb)


def weight_embedding(net: Any, w: Float[Array, "..."] | None, batch: int) -> Float[Array, "b d"] | None:
    """The embedding of w for `net`, a module with `base_channels` and `weight_range`; None if it has no range.

    Call it inside a compact method of `net`. Raises ValueError if w is missing, or given to a network that does not
    take it.
    """
    if not net.weight_range:
        if w is not None:
            raise ValueError("w is given to a network without weight_range, which has no input for it: leave w out")
        return None
    if w is None or jnp.shape(w) != (batch,):
        given = "missing" if w is None else f"of shape {jnp.shape(w)}"
        raise ValueError(
            f"w is {given}; the network is a student (weight_range): give one weight per image, ({batch},)"
        )
    return WeightEmbedding(net.base_channels, tuple(net.weight_range), name="weight")(jnp.asarray(w, jnp.float32))
