"""Digests that tell whether an array that is read is the array that was written."""

import hashlib
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.experimental import multihost_utils

from cfd.errors import UserError

# Work on this many bytes can take more than a few seconds. Measured on one CPU core: the sums of `digests` process 0.1
# to 0.5 GB/s, and the SHA-256 of `weights_hash` processes 1.1 GB/s.
SLOW_DIGEST_BYTES = 2**29
SLOW_HASH_BYTES = 2**32


def digests(tree: Any) -> tuple[dict[str, list[Any]], list[str]]:
    """({key: [shape, dtype, digest]} of every array of a pytree, the keys of the arrays that contain NaN or Inf).

    A key is a path such as "ema/conv_in/kernel"; a digest is 16 hexadecimal digits. Every process must call this: each
    sums over its own shards, and the sums are then added up, so no array is gathered. Raises ValueError for a leaf that
    is not a jax array, and for types of more than 32 bits.
    """
    # A CRC or SHA-256 depends on the order of the bytes: a checkpoint could be verified only under the sharding that
    # saved it. Sums also run on the accelerator, and the checkpoints of existing runs record them.
    named = leaves(tree)
    for key, x in named:
        if not isinstance(x, Array):
            raise UserError(f"{key} of the state is a {type(x).__name__}; a state is made of jax arrays")
    nbytes = sum(x.size * x.dtype.itemsize for _, x in named)
    if nbytes >= SLOW_DIGEST_BYTES and jax.default_backend() == "cpu":
        _announce(f"Computing the digests of {nbytes / 1e9:.1f} GB of arrays.")
    sums = jax.device_get([_shard_sums(x) for _, x in named])
    totals = np.stack([np.sum(np.reshape(s, (-1, 3)), axis=0, dtype=np.uint32) for s in sums])
    if jax.process_count() > 1:
        everywhere = np.asarray(multihost_utils.process_allgather(totals)).sum(axis=0, dtype=np.uint32)
        local = np.array([[x.is_fully_addressable] for _, x in named])
        totals = np.where(local, totals, everywhere)
    arrays = {
        key: [list(x.shape), str(x.dtype), f"{h:08x}{g:08x}"] for (key, x), (h, g, _) in zip(named, totals, strict=True)
    }
    return arrays, [key for (key, _), (*_, nonfinite) in zip(named, totals, strict=True) if nonfinite]


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """[(key, leaf)] of a pytree. The key is the same for a NamedTuple and a dict: "ema/conv_in/kernel"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def weights_hash(params: Any) -> str:
    """The SHA-256 of nested dicts of arrays, 64 hexadecimal digits.

    It covers the path, dtype, shape and values of every array, in the order of the paths.
    """
    arrays = sorted(flatten_dict(params).items())
    nbytes = sum(x.nbytes for _, x in arrays)
    if nbytes >= SLOW_HASH_BYTES:
        _announce(f"Computing the SHA-256 of {nbytes / 1e9:.1f} GB of weights.")
    digest = hashlib.sha256()
    for path, x in arrays:
        array = np.ascontiguousarray(x)
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _announce(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _shard_sums(x: Array) -> list[Any]:
    """`_sums` of every shard that this process saves. Those of an accelerator are not fetched yet."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype.itemsize > 4:
        raise UserError(f"an array of the state is {x.dtype}; digests are of types of up to 32 bits")
    strides = np.array([math.prod(x.shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)], np.uint32)
    sums = []
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            offsets = np.array([span.start or 0 for span in shard.index], np.uint32)
            if shard.device.platform == "cpu":  # NumPy gives the same bits without compiling for every shape
                with np.errstate(invalid="ignore"):  # NumPy warns about NaN in bfloat16, which is looked for here
                    sums.append(_sums(np.asarray(shard.data), offsets, strides, np))
            else:
                sums.append(_sums_on_device(shard.data, offsets, strides))
    return sums


def _sums(x: Any, offsets: Any, strides: Any, xp: Any) -> Any:
    """Two sums over a shard that mix bits and positions, and its number of NaN and Inf; uint32 [3].

    `offsets` is where the shard begins in the global array, and `strides` are those of the global array, in elements.
    Sums modulo 2^32 do not depend on the order, hence not on the sharding. Each term of each sum is a bijection of the
    bits of its value, so a change of a single value is always detected.
    """
    nonfinite = xp.sum(~xp.isfinite(x), dtype=xp.uint32) if jnp.issubdtype(x.dtype, jnp.inexact) else xp.uint32(0)
    v = x.view({1: xp.uint8, 2: xp.uint16, 4: xp.uint32}[x.dtype.itemsize]).astype(xp.uint32).reshape(-1)
    i = xp.zeros(x.shape, xp.uint32)
    for axis, size in enumerate(x.shape):
        along = (xp.arange(size, dtype=xp.uint32) + offsets[axis]) * strides[axis]
        i = i + along.reshape([size if a == axis else 1 for a in range(x.ndim)])
    i = i.reshape(-1)
    h = (v ^ (i * xp.uint32(0x9E3779B1))) * xp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * xp.uint32(0xC2B2AE35)
    g = (v + i) * xp.uint32(0x27D4EB2F)
    g = (g ^ (g >> 15)) * xp.uint32(0x165667B1)
    return xp.stack([xp.sum(h ^ (h >> 16), dtype=xp.uint32), xp.sum(g ^ (g >> 12), dtype=xp.uint32), nonfinite])


_sums_on_device = jax.jit(partial(_sums, xp=jnp))
