"""The guidance weight w as an input of a network: a student in the sense of Meng et al. (arXiv:2210.03142).

Meng et al. embed w as the time. Here, all that w adds to a network is multiplied by w or by the gate w / (1 + |w|).
At w = 0, the network is therefore exactly the same function as without this input, whatever the new layers have
learned. The guided score is linear in w for the same z, and so the last layer adds a multiple of w to the output.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cfd.networks.layers import Conv, Dense
from cfd.process import per_example

MODULES = ("weight", "weight_emb", "weight_out")
"""The names of the modules that the input w adds to a network."""


def is_of_weight(key: str) -> bool:
    """Whether a parameter belongs to the input w, by its key, such as "weight_out/map/kernel"."""
    return not set(MODULES).isdisjoint(key.split("/"))


class Weight(NamedTuple):
    """The input w [B] of one evaluation: w itself, the gate w / (1 + |w|), and an embedding of (λ, c, w) [B, D]."""

    w: Float[Array, "b"]
    gate: Float[Array, "b"]
    embedding: Float[Array, "b d"]


class WeightEmbedding(nn.Module):
    """An embedding of (λ, c, w): a layer of that of (λ, c), plus a layer of the gate and its square, then SiLU."""

    base_channels: int

    @nn.compact
    def __call__(self, emb: Float[Array, "b d"], gate: Float[Array, "b"]) -> Float[Array, "b d"]:
        width = 4 * self.base_channels
        of_gate = nn.Dense(width, name="gate")(jnp.stack([gate, jnp.square(gate)], axis=-1))
        return nn.silu(nn.Dense(width, name="condition")(nn.silu(emb)) + of_gate)


class WeightedSum(nn.Module):
    """y + f · L(x) with a linear map L that begins at zero; y itself without a weight.

    With `size` 1, f is the gate and L a matrix; x defaults to the embedding. With 3, f is w and L a 3x3 convolution.
    """

    dtype: str
    size: int = 1
    fast: bool = True

    @nn.compact
    def __call__(
        self, y: Float[Array, "b *s k"], weight: Weight | None, x: Float[Array, "b *t c"] | None = None
    ) -> Float[Array, "b *s k"]:
        if weight is None:
            return y
        x = weight.embedding if x is None else x
        if self.size == 3:
            factor, added = weight.w, Conv(y.shape[-1], self.dtype, zero=True, fast=self.fast, name="map")(x)
        else:
            matrix = Dense(y.shape[-1], self.dtype, use_bias=False, zero=True, fast=self.fast, name="map")
            factor, added = weight.gate, matrix(x)
        return y + per_example(factor, y).astype(self.dtype) * added


def weight_input(net: Any, w: Float[Array, "..."] | None, emb: Float[Array, "b d"]) -> Weight | None:
    """The input w of `net`, a module with `base_channels` and `weight_range`; None if it has no range.

    `emb` is its embedding of (λ, c). Call it inside a compact method of `net`. Raises ValueError if w is missing, or
    given to a network that does not take it.
    """
    if not net.weight_range:
        if w is not None:
            raise ValueError("w is given to a network without weight_range, which has no input for it: leave w out")
        return None
    if w is None or jnp.shape(w) != emb.shape[:1]:
        given = "missing" if w is None else f"of shape {jnp.shape(w)}"
        raise ValueError(
            f"w is {given}; the network is a student (weight_range): give one weight per image, ({len(emb)},)"
        )
    w = jnp.asarray(w, jnp.float32)
    gate = w / (1.0 + jnp.abs(w))
    return Weight(w, gate, WeightEmbedding(net.base_channels, name="weight")(emb, gate))
