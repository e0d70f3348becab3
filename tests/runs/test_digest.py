"""Digests detect every change of an array, whatever sharding wrote it and whatever sharding reads it."""

import hashlib
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import make_state, old_digest, shardings

from cfd.runs import digest
from cfd.runs.digest import digests, recorded_hash, weights_hash, wrong_digests


def test_every_single_bit_and_any_swap_is_seen() -> None:
    x = np.random.default_rng(0).integers(0, 2**32, (4, 8), np.uint32)
    recorded, _ = digests({"x": jnp.asarray(x)})
    assert wrong_digests({"x": jnp.asarray(x)}, recorded) == []
    changed = [x[::-1], x[:, ::-1], np.zeros_like(x)]
    for place in np.ndindex(x.shape):
        for bit in range(32):
            changed.append(x.copy())
            changed[-1][place] ^= np.uint32(1 << bit)
    assert [y for y in changed if wrong_digests({"x": jnp.asarray(y)}, recorded) != ["x"]] == []


def arrays() -> dict[str, Any]:
    """One array of each size of element, and a scalar."""
    rng = np.random.default_rng(0)
    return {
        "float32": rng.normal(size=(16, 6, 4)).astype(np.float32),
        "bfloat16": rng.normal(size=(16, 8)).astype(jnp.bfloat16),
        "int8": rng.integers(-128, 128, 48).astype(np.int8),
        "bool": rng.integers(0, 2, (8, 3)).astype(bool),
        "scalar": np.int32(7),
    }


@pytest.mark.parametrize("before", shardings())
def test_a_digest_is_verified_under_every_sharding(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks that end within the parts, and for types of one, two and four bytes."""
    monkeypatch.setattr(digest, "BLOCK_BYTES", 100)
    good = arrays() | {"empty": np.zeros((0, 4), np.float32)}
    place = shardings()

    def put(tree: Any, name: str) -> Any:
        return {key: jax.device_put(x, place[name](x)) for key, x in tree.items()}

    recorded, nonfinite = digests(put(good, before))
    assert nonfinite == []
    for key, x in good.items():
        shape, dtype, parts = recorded[key]
        assert (shape, dtype) == (list(x.shape), str(x.dtype))
        for text, part in parts.items():
            index = tuple(slice(*map(int, axis.split(":"))) for axis in text.split(","))
            assert part == hashlib.sha256(np.atleast_1d(x)[index].tobytes()).hexdigest()
    for after in place:
        assert wrong_digests(put(good, after), recorded) == []
        for key in good.keys() - {"empty"}:
            bad = np.atleast_1d(good[key]).copy()
            bad.view(np.uint8).reshape(-1)[-1] ^= 1
            assert wrong_digests(put(good | {key: bad.reshape(good[key].shape)}, after), recorded) == [key]


def test_the_sums_of_earlier_versions_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "BLOCK_BYTES", 100)
    good = arrays()
    recorded = {key: [list(x.shape), str(x.dtype), old_digest(x)] for key, x in good.items()}
    for sharding_of in shardings().values():

        def put(tree: Any, sharding_of: Any = sharding_of) -> Any:
            return {key: jax.device_put(x, sharding_of(x)) for key, x in tree.items()}

        assert wrong_digests(put(good), recorded) == []
        for key, x in good.items():
            bad = np.atleast_1d(x).copy()
            bad.view(np.uint8).reshape(-1)[-1] ^= 1
            assert wrong_digests(put(good | {key: bad.reshape(x.shape)}), recorded) == [key]
    assert recorded_hash(recorded) is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_found_in_any_shard(dtype: Any, bad: float) -> None:
    x = jnp.ones((16, 6, 4), dtype)
    for sharding_of in shardings().values():
        state = {"good": x, "bad": x.at[13, 5, 3].set(bad), "count": jnp.full(3, 2**31 - 1)}
        assert digests(jax.tree.map(lambda y, put=sharding_of: jax.device_put(y, put(y)), state))[1] == ["bad"]


def test_hash_of_weights_covers_paths_types_shapes_and_values_under_every_sharding() -> None:
    weights = {"b": {"kernel": jnp.arange(16.0).reshape(2, 8)}, "a": {"bias": jnp.zeros(3)}}
    expected = hashlib.sha256()
    for text, array in (("a/bias float32 [3]", np.zeros(3, "<f4")), ("b/kernel float32 [2, 8]", np.arange(16.0))):
        expected.update(f"{text} {hashlib.sha256(array.astype('<f4').tobytes()).hexdigest()}\n".encode())
    assert weights_hash(weights) == weights_hash(jax.tree.map(np.asarray, weights)) == expected.hexdigest()
    for name, sharding_of in shardings().items():
        sharded = jax.tree.map(lambda x, put=sharding_of: jax.device_put(x, put(x)), weights)
        assert weights_hash(sharded) == expected.hexdigest()
        recorded = recorded_hash(digests(sharded)[0])
        assert recorded == (None if name in ("fsdp", "columns") else expected.hexdigest())
    others = [
        {"b": weights["b"]},
        weights | {"a": {"scale": jnp.zeros(3)}},
        weights | {"a": {"bias": jnp.zeros(3, jnp.int32)}},
        weights | {"b": {"kernel": weights["b"]["kernel"].reshape(8, 2)}},
        weights | {"b": {"kernel": weights["b"]["kernel"].at[1, 1].set(9.001)}},
    ]
    assert len({weights_hash(other) for other in [weights, *others]}) == 6


def test_no_copy_of_an_array_is_made() -> None:
    """Not when it is written, nor when it is read under another sharding than it was written with."""
    x = jnp.ones((4096, 2048))  # 32 MiB
    place = shardings()
    sharded = {"x": jax.device_put(x, place["fsdp"](x))}
    others = [{"x": jax.device_put(x, place[name](x))} for name in ("one", "columns")]
    tracemalloc.start()
    try:
        recorded, _ = digests(sharded)
        for other in others:
            assert wrong_digests(other, recorded) == []
            weights_hash(other)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 4


def test_long_computations_are_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_state(1)
    recorded, _ = digests(state)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(digest, "SLOW_BYTES", 1)
    digests(state)
    wrong_digests(state, recorded)
    weights_hash(state.ema)
    assert capsys.readouterr().out == "Computing the SHA-256 of 0.0 GB of arrays.\n" * 3
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    weights_hash(state.ema)
    assert capsys.readouterr().out == ""
