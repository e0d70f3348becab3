"""Seeds: the one place where a number becomes a PRNG key.

Every key is a threefry key, whatever JAX's default is. Keys of JAX's "rbg", which is common on TPUs, draw numbers under
`vmap` that depend on the row of the batch. Settings of JAX that change what threefry draws from a seed are refused.
"""

import jax
from jax import Array
from jaxtyping import Int, Key, UInt32

from cfd.errors import UserError

PRNG = {"impl": "threefry2x32", "partitionable": True}
"""The generator behind every seed, as checkpoints and manifests record it."""

SETTINGS = {"jax_threefry_partitionable": True, "jax_random_seed_offset": 0, "jax_enable_x64": False}
"""Settings of JAX under which a seed has another meaning, and the values that they must have, JAX's defaults.

With 64-bit types, dropout and the dropping of labels draw from float64.
"""


def key(seed: int | Int[Array, ""] | UInt32[Array, ""]) -> Key[Array, ""]:
    """The key of a seed. Raises UserError as `check` does, under `jit` when the program is traced."""
    check()
    return jax.random.key(seed, impl=PRNG["impl"])


def check() -> None:
    """Raises UserError if a setting of JAX changes what a seed means."""
    for name, default in SETTINGS.items():
        value = getattr(jax.config, name, default)  # a version of JAX without the setting behaves as its default
        if value != default:
            raise UserError(
                f"{name} is {value}, with which a seed draws other numbers: unset {name.upper()} in the environment, "
                f"or call jax.config.update({name!r}, {default}), JAX's default"
            )
