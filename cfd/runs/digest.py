"""SHA-256 digests that tell whether an array that is read is the array that was written.

An array is hashed in the parts into which its sharding divides it, and a part is named by its range in the array:
{"0:64,0:128": digest} for an array that every device holds whole. Any other sharding can verify these digests, because
a part is put together from what this process holds. A digest covers the bytes of its part in C order.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from cfd.devices import parallel
from cfd.errors import UserError

BLOCK_BYTES = 2**20
MAX_THREADS = 8
# Work on this many bytes can take more than a few seconds: one CPU core hashes 0.4 to 2 GB/s.
SLOW_BYTES = 2**32

Span: TypeAlias = tuple[tuple[int, int], ...]
"""A range of an array: (first, last + 1) along each axis. A scalar is an array of one element."""

Pieces: TypeAlias = Mapping[Span, np.ndarray]
"""Ranges of one array, with their content."""


def digests(tree: Any) -> tuple[dict[str, list[Any]], list[str]]:
    """({key: [shape, dtype, {range: digest}]} of every array of a pytree, the keys of arrays that have NaN or Inf).

    A key is a path such as "ema/conv_in/kernel". Every process must call this. Each hashes parts that it holds, and all
    of them return the same. Raises ValueError for a leaf that is not a jax array.
    """
    named = leaves(tree)
    for key, x in named:
        if not isinstance(x, Array):
            raise UserError(f"{key} of the state is a {type(x).__name__}; a state is made of jax arrays")
    arrays = [_data(x) for _, x in named]
    _announce(arrays)
    owners = [_owners(x.sharding, x.shape) for x in arrays]
    here = jax.process_index()

    def own(number: int) -> dict[Span, tuple[str, bool]]:
        mine = [span for span, owner in owners[number].items() if owner == here]
        pieces = _pieces(arrays[number]) if mine else {}
        return {span: _sha256_finite(_blocks(pieces, span)) for span in mine}

    found = _share(owners, _each(own, range(len(arrays))))
    entries, nonfinite = {}, []
    for (key, x), parts in zip(named, found, strict=True):
        entries[key] = [list(x.shape), str(x.dtype), {_text(span): digest for span, (digest, _) in parts.items()}]
        if not all(finite for _, finite in parts.values()):
            nonfinite.append(key)
    return entries, nonfinite


def wrong_digests(tree: Any, recorded: Mapping[str, list[Any]]) -> list[str]:
    """The keys of the arrays of a pytree in which this process finds other bytes than `recorded` by `digests`.

    Every process must call this. Together they read every part: each process reads those that it holds whole. An array
    that is now divided over processes in another way is gathered, one array at a time.
    """
    keys = [key for key, _ in leaves(tree)]
    arrays = [_data(x) for _, x in leaves(tree)]
    _announce(arrays)
    parts = [_recorded(recorded[key][2], x.shape) for key, x in zip(keys, arrays, strict=True)]
    held = [[_covers(_spans_here(x), span) for span in spans] for x, spans in zip(arrays, parts, strict=True)]
    held_somewhere = _any_process(held)

    def agrees(number: int) -> bool:
        if not all(held_somewhere[number]):
            return True  # it is gathered below
        mine = [part for part, is_held in zip(parts[number].items(), held[number], strict=True) if is_held]
        return _agree(_pieces(arrays[number]), mine) if mine else True

    good = _each(agrees, range(len(arrays)))
    for number, somewhere in enumerate(held_somewhere):
        if not all(somewhere):
            whole = np.atleast_1d(parallel.gather(arrays[number]))
            mine = list(parts[number].items())[jax.process_index() :: jax.process_count()]
            good[number] = _agree({_whole(whole.shape): whole}, mine)
    return [key for key, is_good in zip(keys, good, strict=True) if not is_good]


def weights_hash(params: Any) -> str:
    """The SHA-256 of a pytree of arrays, 64 hexadecimal digits; the same for every sharding.

    It covers the path, dtype, shape and SHA-256 of every array, in the order of the paths.
    """
    named = leaves(params)
    _announce([x for _, x in named])

    def entry(x: Any) -> list[Any]:
        span = _whole(x.shape)
        pieces = _pieces(x) if isinstance(x, Array) else {span: np.atleast_1d(x)}
        return [list(x.shape), str(x.dtype), {_text(span): _sha256(_blocks(pieces, span))}]

    def is_divided(x: Any) -> bool:
        return isinstance(x, Array) and not _covers(_spans_here(x), _whole(x.shape))

    entries = _each(entry, [parallel.gather(x) if is_divided(x) else x for _, x in named])
    return _combined(dict(zip([key for key, _ in named], entries, strict=True)))


def recorded_hash(recorded: Mapping[str, list[Any]]) -> str | None:
    """`weights_hash` of arrays whose digests are `recorded`; None unless each array is recorded in one part."""
    for shape, _, parts in recorded.values():
        if isinstance(parts, str) or list(parts) != [_text(_whole(shape))]:
            return None
    return _combined(recorded)


def _combined(recorded: Mapping[str, list[Any]]) -> str:
    combined = hashlib.sha256()
    for key, (shape, dtype, parts) in sorted(recorded.items()):
        (digest,) = parts.values()
        combined.update(f"{key} {dtype} {list(shape)} {digest}\n".encode())
    return combined.hexdigest()


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """[(key, leaf)] of a pytree. The key is the same for a NamedTuple and a dict: "ema/conv_in/kernel"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def _announce(arrays: Iterable[Any]) -> None:
    nbytes = sum(x.size * x.dtype.itemsize for x in arrays)
    if nbytes >= SLOW_BYTES and jax.process_index() == 0:
        print(f"Computing the SHA-256 of {nbytes / 1e9:.1f} GB of arrays.", flush=True)


def _each(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`function` of every item, in threads: hashlib, NumPy and copies from a device release Python's lock."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        return list(pool.map(function, items))


# The parts of an array.


def _data(x: Array) -> Array:
    """The array itself, or the integers of a typed PRNG key."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _whole(shape: Sequence[int]) -> Span:
    return tuple((0, n) for n in shape) or ((0, 1),)


def _span(index: tuple[slice, ...], shape: Sequence[int]) -> Span:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)) or ((0, 1),)


@lru_cache(maxsize=4096)
def _owners(sharding: Sharding, shape: tuple[int, ...]) -> dict[Span, int]:
    """The parts of an array, and for each the process that hashes it; the same on every process that shares it."""
    holders: dict[Span, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        holders.setdefault(_span(index, shape), set()).add(device.process_index)
    chosen = {}
    for number, (span, processes) in enumerate(sorted(holders.items())):
        chosen[span] = sorted(processes)[number % len(processes)]
    return chosen


def _spans_here(x: Array) -> set[Span]:
    return {_span(shard.index, x.shape) for shard in x.addressable_shards}


def _pieces(x: Array) -> Pieces:
    """The distinct parts of an array that this process holds."""
    shards = {_span(shard.index, x.shape): shard.data for shard in x.addressable_shards}
    return {span: np.atleast_1d(np.asarray(data)) for span, data in shards.items()}


def _covers(spans: set[Span], part: Span) -> bool:
    """Whether disjoint ranges hold every element of a part."""
    if part in spans:
        return True
    common = [_common(span, part) for span in spans]
    return sum(map(_size, common)) == _size(part)


def _common(a: Span, b: Span) -> Span:
    return tuple((max(p[0], q[0]), max(min(p[1], q[1]), p[0], q[0])) for p, q in zip(a, b, strict=True))


def _size(span: Span) -> int:
    return math.prod(end - start for start, end in span)


def _inside(span: Span, outer: Span) -> tuple[slice, ...]:
    """The index of `span` in an array that holds the range `outer`."""
    return tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(span, outer, strict=True))


def _blocks(pieces: Pieces, part: Span) -> Iterator[np.ndarray]:
    """The content of a part in C order, as vectors of about BLOCK_BYTES: views if the pieces allow it, else copies."""
    (first, end), *others = part
    dtype = next(iter(pieces.values())).dtype
    row_bytes = dtype.itemsize * math.prod(b - a for a, b in others)
    rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for start in range(first, end, rows):
        block = ((start, min(start + rows, end)), *others)
        outer = next((span for span in pieces if _common(span, block) == block), None)
        if outer is not None:
            yield np.ascontiguousarray(pieces[outer][_inside(block, outer)]).reshape(-1)
            continue
        copy = np.empty([b - a for a, b in block], dtype)
        for span, data in pieces.items():
            common = _common(span, block)
            if _size(common):
                copy[_inside(common, block)] = data[_inside(common, span)]
        yield copy.reshape(-1)


def _text(span: Span) -> str:
    return ",".join(f"{start}:{end}" for start, end in span)


def _parsed(text: str) -> Span:
    pairs = (axis.split(":") for axis in text.split(","))
    return tuple((int(start), int(end)) for start, end in pairs)


def _recorded(parts: dict[str, str] | str, shape: Sequence[int]) -> dict[Span, str]:
    """{range: digest} of an entry. Earlier versions recorded one sum of 16 digits over the whole array."""
    if isinstance(parts, str):
        return {_whole(shape): parts}
    return {_parsed(text): digest for text, digest in parts.items()}


# The digest of a part.


def _sha256(blocks: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block.view(np.uint8).data)
    return digest.hexdigest()


def _sha256_finite(blocks: Iterable[np.ndarray]) -> tuple[str, bool]:
    """(SHA-256, whether every value is finite)."""
    finite = True

    def watched() -> Iterator[np.ndarray]:
        nonlocal finite
        for block in blocks:
            finite = finite and (not jnp.issubdtype(block.dtype, jnp.inexact) or bool(np.isfinite(block).all()))
            yield block

    return _sha256(watched()), finite


def _agree(pieces: Pieces, parts: Iterable[tuple[Span, str]]) -> bool:
    """Whether every part has its recorded digest."""
    return all(
        (_sums if len(recorded) == 16 else _sha256)(_blocks(pieces, span)) == recorded for span, recorded in parts
    )


def _sums(blocks: Iterable[np.ndarray]) -> str:
    """The digest of earlier versions, for arrays of up to 32 bits: two sums that mix bits and positions."""
    h, g, first = 0, 0, 0
    for block in blocks:
        v = block.view(f"u{block.dtype.itemsize}").astype(np.uint32)
        i = np.arange(first, first + len(v)).astype(np.uint32)
        a = (v ^ (i * np.uint32(0x9E3779B1))) * np.uint32(0x85EBCA6B)
        a = (a ^ (a >> 13)) * np.uint32(0xC2B2AE35)
        b = (v + i) * np.uint32(0x27D4EB2F)
        b = (b ^ (b >> 15)) * np.uint32(0x165667B1)
        h, g, first = h + int((a ^ (a >> 16)).sum()), g + int((b ^ (b >> 12)).sum()), first + len(v)
    return f"{h % 2**32:08x}{g % 2**32:08x}"


# Results shared among the processes.


def _share(owners: list[dict[Span, int]], found: list[dict[Span, Any]]) -> list[dict[Span, tuple[str, bool]]]:
    """The (digest, finite) of every part, from the process that owns it."""
    if jax.process_count() == 1:
        return found
    here = jax.process_index()
    rows = [
        [*bytes.fromhex(found[number][span][0]), found[number][span][1]] if owner == here else [0] * 33
        for number, parts in enumerate(owners)
        for span, owner in parts.items()
    ]
    table = np.asarray(multihost_utils.process_allgather(np.array(rows, np.uint8).reshape(-1, 33)))
    everywhere = iter(range(table.shape[1]))
    shared = []
    for parts in owners:
        at = {span: table[owner, next(everywhere)] for span, owner in parts.items()}
        shared.append({span: (row[:32].tobytes().hex(), bool(row[32])) for span, row in at.items()})
    return shared


def _any_process(flags: list[list[bool]]) -> list[list[bool]]:
    """For each flag, whether it is set on any process."""
    if jax.process_count() == 1:
        return flags
    flat = np.array([flag for row in flags for flag in row], np.uint8)
    merged = iter(np.asarray(multihost_utils.process_allgather(flat)).max(axis=0).tolist())
    return [[bool(next(merged)) for _ in row] for row in flags]
