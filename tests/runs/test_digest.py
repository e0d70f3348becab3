"""Digests detect every change of an array, under every sharding, and weights_hash covers all of the weights."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_state, shardings

from cfd.runs import digest
from cfd.runs.digest import digests, weights_hash


def test_digest_sees_every_single_bit_and_any_swap() -> None:
    x = np.random.default_rng(0).integers(0, 2**32, (4, 8), np.uint32)

    def of(x: np.ndarray) -> str:
        return digests({"x": jnp.asarray(x)})[0]["x"][2]

    found = {of(x)}
    for place in np.ndindex(x.shape):
        for bit in range(32):
            y = x.copy()
            y[place] ^= np.uint32(1 << bit)
            found.add(of(y))
    found |= {of(x[::-1]), of(x[:, ::-1]), of(np.zeros_like(x)), of(np.zeros((8, 4), np.uint32) + 1)}
    assert len(found) == 1 + 4 * 8 * 32 + 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_])
def test_digest_is_the_same_on_the_host_on_a_device_and_in_shards(dtype: Any) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6, 4)) * 50, dtype)
    whole = np.asarray(digest._shard_sums(x)).sum(axis=0, dtype=np.uint32)
    device = digest._sums_on_device(x, np.zeros(3, np.uint32), np.array([24, 4, 1], np.uint32))
    np.testing.assert_array_equal(device, whole)
    for sharding_of in shardings().values():
        shards = digest._shard_sums(jax.device_put(x, sharding_of(x)))
        np.testing.assert_array_equal(np.asarray(shards).sum(axis=0, dtype=np.uint32), whole)


def test_hash_of_weights_covers_paths_types_shapes_and_values() -> None:
    weights = {"b": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "a": {"bias": jnp.zeros(3)}}
    expected = hashlib.sha256()
    for text, array in (("a/bias float32 (3,)", np.zeros(3, "<f4")), ("b/kernel float32 (2, 3)", np.arange(6.0))):
        expected.update(text.encode() + array.astype("<f4").tobytes())
    assert weights_hash(weights) == expected.hexdigest()
    others = [
        {"b": weights["b"]},
        weights | {"a": {"scale": jnp.zeros(3)}},
        weights | {"a": {"bias": jnp.zeros(3, jnp.int32)}},
        weights | {"b": {"kernel": weights["b"]["kernel"].reshape(3, 2)}},
        weights | {"b": {"kernel": weights["b"]["kernel"].at[1, 1].set(4.001)}},
    ]
    assert len({weights_hash(other) for other in [weights, *others]}) == 6


def test_long_computations_are_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_state(1)
    digests(state)
    weights_hash(state.ema)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(digest, "SLOW_DIGEST_BYTES", 1)
    monkeypatch.setattr(digest, "SLOW_HASH_BYTES", 1)
    digests(state)
    weights_hash(state.ema)
    first, second = capsys.readouterr().out.splitlines()
    assert "digests of 0.0 GB" in first and "SHA-256 of 0.0 GB" in second
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    digests(state)
    assert capsys.readouterr().out == ""
