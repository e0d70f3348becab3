"""Helpers of the tests that save and restore: states, shardings, and the content of a folder of checkpoints."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from cfd.runs import checkpoint

CONFIG_JSON = {"kind": "diffusion", "config": {"seed": 0, "model": {}}, "class_names": ["a", "b"], "conventions": {}}


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    opt_state: Any


def make_state(step: int, rows: int = 64) -> State:
    """A state that is a function of its step. Its bits are random because compression could hide a damaged file."""
    rng = np.random.default_rng(step)
    params = {
        "conv": {"kernel": rng.normal(size=(rows, 256)), "bias": rng.normal(size=(3,))},
        "out": rng.normal(size=(8, 4, 2)),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    opt_state = optax.adam(1e-3).init(params)
    return State(jnp.asarray(step, jnp.int32), half, jax.tree.map(lambda x: x * 2, params), opt_state)


def abstract(state: Any) -> Any:
    """The template that restores a state."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two pytrees have the same structure, dtypes and bits."""
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(same)


def save(manager: checkpoint.Manager, step: int, state: Any) -> None:
    checkpoint.save(manager, step, state, data_state={"next_step": step}, config_json=CONFIG_JSON)


def steps(folder: Path) -> list[int]:
    """The steps in the folder of a run."""
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())


def litter(folder: Path) -> list[str]:
    """The names of half-written steps, and of deleted steps still in the trash."""
    trash = folder / "checkpoints" / "trash"
    return [p.name for p in (folder / "checkpoints").glob("*tmp*")] + [p.name for p in trash.glob("*")]


def only_litter_of(folder: Path, *failed: int) -> bool:
    """Whether all litter is of the `failed` steps: writes still running when a save fails may make its folder again."""
    return {name.partition(".")[0] for name in litter(folder)} <= {str(step) for step in failed}


@contextmanager
def opened(folder: str | Path, keep: int = 2, keep_every: int = 0) -> Iterator[checkpoint.Manager]:
    """The checkpoints of a folder, closed at the end."""
    manager = checkpoint.open_manager(folder, keep=keep, keep_every=keep_every)
    yield manager
    checkpoint.close(manager)


def damage_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log messages about damaged steps."""
    return [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]


def files_of(step: Path) -> list[Path]:
    """All files of a step."""
    return sorted(p for p in step.rglob("*") if p.is_file())


def flip_weights(step: Path) -> None:
    """Changes bytes of the largest file, the one with the arrays."""
    largest = max(files_of(step), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    for place in range(len(content) // 4, len(content), 997):
        content[place] ^= 1
    largest.write_bytes(bytes(content))


def old_digest(x: Any) -> str:
    """The digest of the first versions: sums modulo 2^32 over the bits v and the place i of every value."""
    x = np.atleast_1d(np.asarray(x))
    h, g, mask = 0, 0, 2**32 - 1
    for i, v in enumerate(x.view(f"u{x.dtype.itemsize}").reshape(-1).tolist()):
        a = (v ^ (i * 0x9E3779B1 & mask)) * 0x85EBCA6B & mask
        a = (a ^ (a >> 13)) * 0xC2B2AE35 & mask
        b = (v + i) * 0x27D4EB2F & mask
        b = (b ^ (b >> 15)) * 0x165667B1 & mask
        h, g = h + (a ^ (a >> 16)), g + (b ^ (b >> 12))
    return f"{h & mask:08x}{g & mask:08x}"


def make_older(step: Path, state: Any) -> None:
    """Gives a step of `state` the metadata that the first versions wrote."""
    path = step / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["sha256"]
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    for place, x in flat:
        meta["arrays"][jax.tree_util.keystr(place, simple=True, separator="/")][2] = old_digest(x)
    meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(meta))


def shardings() -> dict[str, Any]:
    """Named functions that map an array to a sharding over eight devices."""
    devices = jax.devices()
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))

    def fsdp(x: Any) -> NamedSharding:
        sizes = [("fsdp" if n % 2 == 0 and n > 1 else None) for n in x.shape]
        first = sizes.index("fsdp") if "fsdp" in sizes else None
        return NamedSharding(mesh, P(*("fsdp" if a == first else None for a in range(x.ndim))))

    def rows(x: Any) -> NamedSharding:
        return NamedSharding(mesh, P(("data", "fsdp")) if x.ndim and x.shape[0] % 8 == 0 else P())

    def columns(x: Any) -> NamedSharding:
        return NamedSharding(mesh, P(*(None for _ in x.shape[1:]), "data") if x.ndim and x.shape[-1] % 4 == 0 else P())

    return {
        "one": lambda x: SingleDeviceSharding(devices[0]),
        "other": lambda x: SingleDeviceSharding(devices[5]),
        "replicated": lambda x: NamedSharding(mesh, P()),
        "fsdp": fsdp,
        "rows": rows,
        "columns": columns,
    }
