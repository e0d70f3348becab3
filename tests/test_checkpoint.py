"""Checkpoints: whatever is done to the files or the process, what is restored is bit for bit what was saved.

T1 to T10 are done to real files and real processes; nothing of Orbax is replaced.
"""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from disk import file_size_limit, filled, small_disk
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from cfd import checkpoint, workdir
from cfd.checkpoint import CheckpointError
from cfd.unet import UNet

# Orbax leaves a failed read or write with other reads and writes under way, which complain of its closed event loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG_JSON = {"kind": "diffusion", "config": {"seed": 0}, "class_names": ["a", "b"], "conventions": {}}


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    opt_state: Any


def make_state(step: int, rows: int = 64) -> State:
    """A state that is a function of its step; its bits are random, so that no compression hides a file."""
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
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same_bits(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(same)


def save(manager: checkpoint.Manager, step: int, state: Any) -> None:
    checkpoint.save(manager, step, state, data_state={"next_step": step}, config_json=CONFIG_JSON)


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())


def litter(folder: Path) -> list[str]:
    trash = folder / "checkpoints" / "trash"
    return [p.name for p in (folder / "checkpoints").glob("*tmp*")] + [p.name for p in trash.glob("*")]


def only_litter_of(folder: Path, *failed: int) -> bool:
    """Writes still under way when a save fails may make its folder anew after it was removed."""
    return {name.partition(".")[0] for name in litter(folder)} <= {str(step) for step in failed}


@contextmanager
def opened(folder: Path, keep: int = 2) -> Iterator[checkpoint.Manager]:
    manager = checkpoint.open_manager(folder, keep=keep)
    yield manager
    checkpoint.close(manager)


@pytest.fixture
def two_steps(tmp_path: Path) -> Path:
    with opened(tmp_path) as manager:
        save(manager, 1, make_state(1))
        save(manager, 2, make_state(2))
    return tmp_path


def damage_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]


def test_everything_comes_back(tmp_path: Path) -> None:
    template = abstract(make_state(0))
    with opened(tmp_path) as manager:
        assert checkpoint.restore(manager, template) is None
        assert checkpoint.latest_step(manager) is None
        for step in (1, 2, 5):
            save(manager, step, make_state(step))
        assert checkpoint.latest_step(manager) == 5
    assert steps(tmp_path) == [2, 5] and not litter(tmp_path)
    with opened(tmp_path) as manager:
        restored = checkpoint.restore(manager, template)
        assert restored is not None
        step, state, data_state = restored
        assert (step, data_state) == (5, {"next_step": 5}) and same_bits(state, make_state(5))


def test_a_step_that_is_there_is_left_as_it_is(two_steps: Path) -> None:
    with opened(two_steps) as manager:
        save(manager, 2, make_state(7))
        restored = checkpoint.restore(manager, abstract(make_state(0)))
    assert restored is not None and same_bits(restored[1], make_state(2))


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    burn = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with opened(tmp_path) as manager:
        for step in range(1, 6):
            state = make_state(step, rows=2048)
            save(manager, step, state)
            jax.block_until_ready(burn(state))
            restored = checkpoint.restore(manager, abstract(make_state(0, rows=2048)))
            assert restored is not None and restored[0] == step and same_bits(restored[1], make_state(step, rows=2048))


def test_typed_keys_and_small_types_come_back(tmp_path: Path) -> None:
    state = {
        "key": jax.random.key(3),
        "flag": jnp.array([True, False]),
        "byte": jnp.arange(5, dtype=jnp.uint8),
        "half": jnp.arange(6, dtype=jnp.float16),
    }
    with opened(tmp_path) as manager:
        save(manager, 1, state)
        checkpoint.wait(manager)
        restored = checkpoint.restore(manager, abstract(state))
    assert restored is not None
    assert same_bits(
        restored[1] | {"key": jax.random.key_data(restored[1]["key"])},
        state | {"key": jax.random.key_data(state["key"])},
    )


def meshes() -> dict[str, Any]:
    devices = jax.devices()
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))

    def fsdp(x: Any) -> NamedSharding:
        sizes = [("fsdp" if n % 2 == 0 and n > 1 else None) for n in x.shape]
        first = sizes.index("fsdp") if "fsdp" in sizes else None
        return NamedSharding(mesh, P(*("fsdp" if a == first else None for a in range(x.ndim))))

    def rows(x: Any) -> NamedSharding:
        return NamedSharding(mesh, P(("data", "fsdp")) if x.ndim and x.shape[0] % 8 == 0 else P())

    return {
        "one": lambda x: SingleDeviceSharding(devices[0]),
        "other": lambda x: SingleDeviceSharding(devices[5]),
        "replicated": lambda x: NamedSharding(mesh, P()),
        "fsdp": fsdp,
        "rows": rows,
    }


@pytest.mark.parametrize(
    ("before", "after"), [("one", "fsdp"), ("fsdp", "one"), ("rows", "fsdp"), ("replicated", "other")]
)
def test_saved_on_some_devices_restored_on_others(tmp_path: Path, before: str, after: str) -> None:
    state = make_state(1)
    placed = jax.tree.map(lambda x: jax.device_put(x, meshes()[before](x)), state)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes()[after](x)), state)
    with opened(tmp_path) as manager:
        save(manager, 1, placed)
        checkpoint.wait(manager)
        restored = checkpoint.restore(manager, template)
    assert restored is not None and same_bits(restored[1], state)
    assert jax.tree.all(
        jax.tree.map(lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim), restored[1], template)
    )


def test_digest_sees_every_single_bit_and_any_swap() -> None:
    x = np.random.default_rng(0).integers(0, 2**32, (4, 8), np.uint32)

    def digest(x: np.ndarray) -> str:
        return checkpoint._describe({"x": jnp.asarray(x)})[0]["x"][2]

    digests = {digest(x)}
    for place in np.ndindex(x.shape):
        for bit in range(32):
            y = x.copy()
            y[place] ^= np.uint32(1 << bit)
            digests.add(digest(y))
    digests |= {digest(x[::-1]), digest(x[:, ::-1]), digest(np.zeros_like(x)), digest(np.zeros((8, 4), np.uint32) + 1)}
    assert len(digests) == 1 + 4 * 8 * 32 + 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_])
def test_digest_is_the_same_on_the_host_on_a_device_and_in_shards(dtype: Any) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6, 4)) * 50, dtype)
    whole = np.asarray(checkpoint._shard_sums(x)).sum(axis=0, dtype=np.uint32)
    device = checkpoint._sums_on_device(x, np.zeros(3, np.uint32), np.array([24, 4, 1], np.uint32))
    np.testing.assert_array_equal(device, whole)
    for place in meshes().values():
        shards = checkpoint._shard_sums(jax.device_put(x, place(x)))
        np.testing.assert_array_equal(np.asarray(shards).sum(axis=0, dtype=np.uint32), whole)


def damaged_copies(path: Path) -> Iterator[str]:
    """Damages a file in one way after the other, and mends it."""
    good = path.read_bytes()
    for name in ("deleted", "empty", "half", "one byte"):
        if name == "deleted":
            path.unlink()
        elif name == "one byte":
            if not good:
                continue
            path.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 0xFF]) + good[len(good) // 2 + 1 :])
        else:
            path.write_bytes(good[: {"empty": 0, "half": len(good) // 2}[name]])
        yield name
        path.write_bytes(good)


def flipped_bits(files: list[Path], number: int) -> Iterator[str]:
    """Random bits of the step, each byte of its files as likely as any other."""
    rng = random.Random(0)
    sizes = [path.stat().st_size for path in files]
    for _ in range(number):
        path = rng.choices(files, sizes)[0]
        good = path.read_bytes()
        bit = rng.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(bad))
        yield f"{path.name} bit {bit}"
        path.write_bytes(good)


def check_damage(
    folder: Path, damages: Iterator[str], caplog: pytest.LogCaptureFixture, save_every: int = 10
) -> dict[str, int]:
    """T4 and T5 for every damage of step 2: either it comes back as it was, or step 1 does and 2 is saved again (which
    is tried after every `save_every`-th)."""
    count = {"not read": 0, "fell back": 0}
    template, aside = abstract(make_state(0)), folder / "checkpoints" / "quarantine" / "2.0"
    states = {step: make_state(step) for step in (1, 2)}
    for what in damages:
        caplog.clear()
        with opened(folder) as manager:
            restored = checkpoint.restore(manager, template)
            assert restored is not None, what
            step, state, data_state = restored
            assert same_bits(state, states[step]) and data_state == {"next_step": step}, what
            if step == 2:
                assert not damage_lines(caplog) and not aside.exists(), what
                count["not read"] += 1
                continue
            assert len(damage_lines(caplog)) == 1 and "step 2 " in damage_lines(caplog)[0], what
            assert len(damage_lines(caplog)[0]) < 600 and steps(folder) == [1] and aside.is_dir(), what
            count["fell back"] += 1
            if count["fell back"] % save_every == 1 % save_every:
                save(manager, 2, states[2])
                checkpoint.wait(manager)
                restored = checkpoint.restore(manager, template)
                assert restored is not None and restored[0] == 2 and same_bits(restored[1], states[2]), what
                shutil.rmtree(folder / "checkpoints" / "2")
        aside.rename(folder / "checkpoints" / "2")
    print(count)
    return count


def files_of(step: Path) -> list[Path]:
    return sorted(p for p in step.rglob("*") if p.is_file())


def test_every_damaged_file_of_the_newest_step(two_steps: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = files_of(two_steps / "checkpoints" / "2")
    count = check_damage(two_steps, (what for path in files for what in damaged_copies(path)), caplog)
    assert count["fell back"] >= len(files), count


@pytest.mark.parametrize("number", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_random_bit_flips(two_steps: Path, caplog: pytest.LogCaptureFixture, number: int) -> None:
    files = files_of(two_steps / "checkpoints" / "2")
    count = check_damage(two_steps, flipped_bits(files, number), caplog, save_every=10 if number < 100 else 1)
    assert sum(count.values()) == number and count["fell back"] > number / 2, count


def test_a_missing_part_of_the_newest_step(two_steps: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("state", "meta"):
        path = two_steps / "checkpoints" / "2" / part

        def gone(path: Path = path) -> Iterator[str]:
            shutil.copytree(path, two_steps / "copy")
            shutil.rmtree(path)
            yield f"no {path}"
            shutil.move(two_steps / "copy", path)

        assert check_damage(two_steps, gone(), caplog) == {"not read": 0, "fell back": 1}


def flip_weights(step: Path) -> None:
    """Changes bytes of the largest file, which holds the arrays."""
    largest = max(files_of(step), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    for place in range(len(content) // 4, len(content), 997):
        content[place] ^= 1
    largest.write_bytes(bytes(content))


def test_all_steps_damaged_is_an_error_and_never_a_silent_start(two_steps: Path) -> None:
    for step in (1, 2):
        flip_weights(two_steps / "checkpoints" / str(step))
    template = abstract(make_state(0))
    for _ in range(2):  # a launcher starts the job again
        with (
            opened(two_steps) as manager,
            pytest.raises(CheckpointError, match=r"step 2: .*step 1: .*allow_fresh") as e,
        ):
            checkpoint.restore(manager, template)
        assert str(two_steps / "checkpoints") in str(e.value) and steps(two_steps) == [1, 2]
    with opened(two_steps) as manager:
        assert checkpoint.restore(manager, template, allow_fresh_start=True) is None
        save(manager, 1, make_state(1))
        checkpoint.wait(manager)
        restored = checkpoint.restore(manager, template)
    assert restored is not None and restored[0] == 1 and same_bits(restored[1], make_state(1))
    assert sorted(p.name for p in (two_steps / "checkpoints" / "quarantine").iterdir()) == ["1.0", "2.0"]


def wrong_templates() -> dict[str, tuple[Callable[[State], Any], str]]:
    other = {
        "sgd": optax.sgd(1e-3, momentum=0.9),
        "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
        "nesterov-free": optax.sgd(1e-3),
    }
    return {
        "shape": (lambda s: s._replace(ema=s.ema | {"out": jnp.zeros((8, 4, 3))}), r"ema/out is float32\[8, 4, 2\]"),
        "rank": (lambda s: s._replace(ema=s.ema | {"out": jnp.zeros((64,))}), r"ema/out .*float32\[64\] in the state"),
        "float to half": (lambda s: s._replace(ema=s.ema | {"out": jnp.zeros((8, 4, 2), jnp.bfloat16)}), "bfloat16"),
        "float to int": (lambda s: s._replace(ema=s.ema | {"out": jnp.zeros((8, 4, 2), jnp.int32)}), "ema/out .*int32"),
        "half to float": (
            lambda s: s._replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), s.params)),
            "params/",
        ),
        "missing": (lambda s: s._replace(ema={"out": s.ema["out"]}), "ema/conv/bias of the checkpoint is not in"),
        "extra": (lambda s: s._replace(ema=s.ema | {"new": jnp.zeros(3)}), "ema/new is not in the checkpoint"),
        "renamed": (
            lambda s: s._replace(ema={"convolution": s.ema["conv"], "out": s.ema["out"]}),
            "ema/convolution/bias",
        ),
        "other optimizer": (lambda s: s._replace(opt_state=other["sgd"].init(s.ema)), "opt_state/0/trace"),
        "another chain": (
            lambda s: s._replace(opt_state=other["clipped"].init(s.ema)),
            "opt_state/1/0/count is not in",
        ),
        "no optimizer": (lambda s: s._replace(opt_state=other["nesterov-free"].init(s.ema)), "opt_state/0/count of"),
        "ema off": (lambda s: s._replace(ema=None), "ema/conv/bias of the checkpoint is not in the state"),
    }


@pytest.mark.parametrize("name", wrong_templates())
def test_a_state_of_another_config_is_refused_and_nothing_moves(two_steps: Path, name: str) -> None:
    change, named = wrong_templates()[name]
    with opened(two_steps) as manager, pytest.raises(CheckpointError, match=f"(?s)step 2 .*{named}") as error:
        checkpoint.restore(manager, abstract(change(make_state(0))))
    assert len(str(error.value)) < 500 and "--workdir" in str(error.value)
    assert steps(two_steps) == [1, 2] and not (two_steps / "checkpoints" / "quarantine").exists()


def test_a_template_without_shardings_is_refused(two_steps: Path) -> None:
    with opened(two_steps) as manager, pytest.raises(ValueError, match="no sharding for step"):
        checkpoint.restore(manager, jax.eval_shape(lambda: make_state(0)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["params", "ema"])
def test_nan_and_inf_are_never_written(two_steps: Path, bad: float, where: str) -> None:
    state = make_state(3)
    tree = getattr(state, where)
    state = state._replace(**{where: tree | {"out": tree["out"].at[3, 2, 1].set(bad)}})
    with opened(two_steps) as manager:
        with pytest.raises(CheckpointError, match=f"step 3 .*{where}/out.*last good checkpoint .* step 2"):
            save(manager, 3, state)
        assert steps(two_steps) == [1, 2] and not litter(two_steps)
        save(manager, 3, make_state(3))
    assert steps(two_steps) == [2, 3]


def test_a_state_that_is_not_of_arrays_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as manager, pytest.raises(ValueError, match="step of the state is a int"):
        save(manager, 1, make_state(1)._replace(step=1))


def check_failed_saves(folder: Path, full: Callable[[], Any], caplog: pytest.LogCaptureFixture, rows: int) -> list[int]:
    """T7 with a disk that is full within `full()`: the steps that are kept at its end."""

    def failures() -> list[Any]:
        return [r for r in caplog.records if "was not written" in r.getMessage()]

    template = abstract(make_state(0, rows))
    with opened(folder) as manager:
        save(manager, 1, make_state(1, rows))
        checkpoint.wait(manager)
        with full():
            save(manager, 2, make_state(2, rows))
            save(manager, 3, make_state(3, rows))
            assert "step 2 was not written" in failures()[0].getMessage() and len(failures()) == 1
            checkpoint.wait(manager)
            assert len(failures()) == 2 and steps(folder) == [1] and only_litter_of(folder, 2, 3)
        restored = checkpoint.restore(manager, template)
        assert restored is not None and restored[0] == 1 and same_bits(restored[1], make_state(1, rows))
        late = folder / "checkpoints" / "3.orbax-checkpoint-tmp" / "state"
        late.mkdir(parents=True, exist_ok=True)  # as a write that was under way when step 3 failed may do
        for step in (4, 5, 6):
            save(manager, step, make_state(step, rows))
            assert not late.exists()
        checkpoint.wait(manager)
        assert steps(folder) == [5, 6] and not litter(folder) and len(failures()) == 2
        with full():
            save(manager, 7, make_state(7, rows))
            save(manager, 8, make_state(8, rows))
            save(manager, 9, make_state(9, rows))
            with pytest.raises(CheckpointError, match=r"3 saves in a row failed .* step 9: .* is step 6; free space"):
                save(manager, 10, make_state(10, rows))
        assert steps(folder) == [5, 6] and only_litter_of(folder, 7, 8, 9)
        with full():
            save(manager, 11, make_state(11, rows))
            with pytest.raises(CheckpointError):
                checkpoint.wait(manager)
        save(manager, 12, make_state(12, rows))
    with opened(folder) as manager:
        assert not litter(folder)
        restored = checkpoint.restore(manager, template)
        assert restored is not None and restored[0] == 12 and same_bits(restored[1], make_state(12, rows))
    return steps(folder)


def test_litter_that_cannot_be_deleted_is_no_error(
    two_steps: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed save may still write to it; it goes after the next save."""
    half = two_steps / "checkpoints" / "3.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", os.readlink)  # an OSError
        manager = checkpoint.open_manager(two_steps, keep=2)
    assert "3.orbax-checkpoint-tmp was not deleted: OSError" in caplog.text
    save(manager, 3, make_state(3))
    checkpoint.close(manager)
    assert steps(two_steps) == [2, 3] and not litter(two_steps)


def test_failed_saves_by_a_limit_on_file_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert check_failed_saves(tmp_path, lambda: file_size_limit(20_000), caplog, rows=64) == [6, 12]


def test_the_last_save_of_a_run_must_not_fail_unheard(two_steps: Path) -> None:
    manager = checkpoint.open_manager(two_steps, keep=2)
    with file_size_limit(20_000):
        save(manager, 3, make_state(3))
        with pytest.raises(CheckpointError, match="the last checkpoint, step 3, was not written"):
            checkpoint.close(manager)
    assert steps(two_steps) == [1, 2] and only_litter_of(two_steps, 3)
    with opened(two_steps):
        assert not litter(two_steps)


@pytest.mark.slow
def test_failed_saves_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """T7 on a file system of its own where this process may mount one, else by the limit with a larger state."""
    disk = tmp_path / "disk"
    with small_disk(disk, megabytes=200) as mounted:
        full = partial(filled, disk, but=2_000_000) if mounted else partial(file_size_limit, 1_000_000)
        assert check_failed_saves(disk, full, caplog, rows=16384) == [6, 12]


def digits_run(folder: Path) -> tuple[Any, Any]:
    """A run's folder with a tiny untrained model: ((net, ema), config_json)."""
    from configs.digits import get_config

    config: Any = get_config()
    config.model.update(channel_mult=(1,), attention_resolutions=())
    net = UNet(**config.model)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes["params"])
    rng = np.random.default_rng(0)
    ema = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), params)
    names = [str(i) for i in range(10)]
    config_json = {"kind": "diffusion", "config": json.loads(config.to_json()), "class_names": names, "conventions": {}}
    workdir.write_config(folder, config_json)
    with opened(folder, keep=3) as manager:
        for step in (1, 2, 3):
            scaled = jax.tree.map(lambda x, step=step: x * step, ema)
            state = State(jnp.asarray(step), params, scaled, optax.adam(1e-3).init(params))
            checkpoint.save(manager, step, state, data_state={}, config_json=config_json)
    return (net, ema), config_json


def test_load_gives_all_that_sampling_needs(tmp_path: Path) -> None:
    (net, ema), config_json = digits_run(tmp_path)
    (tmp_path / "config.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    run = checkpoint.load(tmp_path)
    assert (run.image_shape, run.num_classes, run.step) == ((8, 8, 1), 10, 3)
    assert run.class_names == tuple("0123456789") and run.config == config_json["config"]
    assert same_bits(run.params, jax.tree.map(lambda x: x * 3, ema))
    z, logsnr, labels = jnp.ones((2, 8, 8, 1)), jnp.zeros(2), jnp.array([4, -1])
    both = jax.jit(lambda eps_fn, params: (eps_fn(z, logsnr, labels), net.apply({"params": params}, z, logsnr, labels)))
    eps, expected = both(run.eps_fn, run.params)
    np.testing.assert_allclose(eps, expected, rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="label 10 is not below the number of classes, 10"):
        run.eps_fn(z, logsnr, jnp.array([0, 10]))
    assert same_bits(checkpoint.load(tmp_path, 1).params, ema)
    assert not (tmp_path / "canary").exists() and steps(tmp_path) == [1, 2, 3]


def test_load_on_a_mesh(tmp_path: Path) -> None:
    (_, ema), _ = digits_run(tmp_path)
    sharding = meshes()["replicated"](None)
    run = checkpoint.load(tmp_path, 1, sharding=sharding)
    assert same_bits(run.params, ema) and jax.tree.leaves(run.params)[0].sharding == sharding


def test_load_of_what_is_not_there_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the folder of a run"):
        checkpoint.load(tmp_path / "nowhere")
    _, config_json = digits_run(tmp_path)
    with pytest.raises(ValueError, match=r"has no step 7; its steps are \[1, 2, 3\]"):
        checkpoint.load(tmp_path, 7)
    with pytest.raises(ValueError, match="holds a diffusion run; a classifier run was expected"):
        checkpoint.load_ema(tmp_path, "classifier")
    workdir.write_config(tmp_path / "empty", config_json)
    with pytest.raises(ValueError, match="has no step; its steps are"):
        checkpoint.load(tmp_path / "empty")
    config_json["config"]["model"]["dropout"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(ValueError, match=r"step 3 was not written with .*model\.dropout: 0\.0 there, 0\.5 here"):
        checkpoint.load(tmp_path)


def test_load_passes_over_damage_and_touches_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (_, ema), _ = digits_run(tmp_path)
    for path in (tmp_path / "checkpoints" / "3").rglob("_METADATA"):
        path.write_text("")  # as a power cut leaves it
    run = checkpoint.load(tmp_path)
    assert run.step == 2 and same_bits(run.params, jax.tree.map(lambda x: x * 2, ema))
    assert len(damage_lines(caplog)) == 1 and steps(tmp_path) == [1, 2, 3]
    with pytest.raises(CheckpointError, match="step 3: "):
        checkpoint.load(tmp_path, 3)
    for step in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        checkpoint.load(tmp_path)


def count_to(folder: str, said: Any, steps: int, pause: float, rows: int) -> None:
    """A job that saves one step after the other, and tells what it does; its state is a function of the step."""
    template = abstract(make_state(0, rows))
    with workdir.lock(folder), opened(Path(folder)) as manager:
        restored = checkpoint.restore(manager, template)
        said.put(("resumed", 0 if restored is None else restored[0], litter(Path(folder))))
        assert restored is None or same_bits(restored[1], make_state(restored[0], rows))
        start = 0 if restored is None else restored[0]
        for step in range(start + 1, start + 1 + steps):
            state = make_state(step, rows)
            said.put(("saving", step))
            save(manager, step, state)
            checkpoint.wait(manager)
            said.put(("saved", step))
            time.sleep(pause)
    said.put(("done",))


@contextmanager
def job(folder: Path, steps: int, pause: float = 0.0, rows: int = 64) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """`count_to` in a process of its own, and a function that gives the next thing it said."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "cfd.checkpoint"])
    said = context.SimpleQueue()
    process = context.Process(target=count_to, args=(str(folder), said, steps, pause, rows))
    process.start()

    def listen() -> Any:
        end = time.monotonic() + 120
        while said.empty():
            if not process.is_alive() and said.empty():
                return ("ended", process.exitcode)
            assert time.monotonic() < end, "the job is stuck"
            time.sleep(0.002)
        return said.get()

    try:
        yield process, listen
    finally:
        process.kill()
        process.join()


def test_a_second_job_costs_the_first_no_save(tmp_path: Path) -> None:
    with job(tmp_path, steps=8, pause=0.2) as (first, listen):
        assert listen() == ("resumed", 0, [])
        assert listen() == ("saving", 1)
        with job(tmp_path, steps=8) as (second, listen_to_second):
            assert listen_to_second() == ("ended", 1)
        heard = [("saving", 1), *(listen() for _ in range(16))]
        assert heard == [*((what, step) for step in range(1, 9) for what in ("saving", "saved")), ("done",)]
        first.join()
        assert first.exitcode == 0 and second.pid != first.pid
    assert steps(tmp_path) == [7, 8] and not litter(tmp_path)


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_while_it_saves(tmp_path: Path, kills: int) -> None:
    """T1 and T3: SIGKILL within 0.4 s of the start of a save of 50 MB, again and again in one folder."""
    rng = random.Random(0)
    saved = 0
    for _ in range(kills):
        with job(tmp_path, steps=1000, rows=14_000) as (process, listen):
            heard = listen()
            assert heard[0] == "resumed" and heard[1] >= saved and not heard[2], (heard, saved)
            for _ in range(rng.randrange(1, 3)):
                while (heard := listen())[0] != "saving":
                    saved = heard[1]
            time.sleep(rng.uniform(0.0, 0.4))
            process.kill()
            process.join()
            while (heard := listen())[0] != "ended":
                saved = heard[1] if heard[0] == "saved" else saved
            assert heard == ("ended", -signal.SIGKILL)
    with job(tmp_path, steps=0, rows=14_000) as (process, listen):
        assert listen()[1] >= saved and listen() == ("done",)
        process.join()
        assert process.exitcode == 0
    assert not litter(tmp_path) and len(steps(tmp_path)) <= 2
    size = sum(x.nbytes for x in jax.tree.leaves(make_state(0, 14_000)))
    used = sum(p.stat().st_size for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    assert used <= 3 * size
    assert not (tmp_path / "checkpoints" / "quarantine").exists()


def save_and_die(folder: str, said: Any, deadly: int) -> None:
    """Saves step 3 of a folder with steps 1 and 2, and is killed before its `deadly`-th change of the file system."""
    manager = checkpoint.open_manager(folder, keep=2)
    lock, changes = threading.Lock(), [0]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, args: tuple[Any, ...]) -> None:
        opened_to_write = event == "open" and isinstance(args[2], int) and args[2] & writing
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or opened_to_write:
            if folder not in str(args[0]) and event not in ("os.remove", "os.rmdir"):
                return
            with lock:
                changes[0] += 1
                if changes[0] == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(manager, 3, make_state(3))
    checkpoint.close(manager)
    said.put(changes[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_every_change_of_the_file_system(two_steps: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """T2: one save that also deletes the oldest step. (TensorStore's calls, in the unfinished step, are T1's.)"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "cfd.checkpoint"])
    template = abstract(make_state(0))
    newest = []
    for deadly in itertools.count(1):
        folder = tmp_path_factory.mktemp("run")
        shutil.copytree(two_steps, folder, dirs_exist_ok=True)
        said = context.SimpleQueue()
        process = context.Process(target=save_and_die, args=(str(folder), said, deadly))
        process.start()
        process.join()
        with opened(folder) as manager:
            assert not litter(folder)
            listed = steps(folder)
            assert listed in ([1, 2], [1, 2, 3], [2, 3]), (deadly, listed)
            newest.append(listed[-1])
            for step in reversed(listed):
                restored = checkpoint.restore(manager, template)
                assert restored is not None and restored[0] == step and same_bits(restored[1], make_state(step)), deadly
                shutil.rmtree(folder / "checkpoints" / str(step))
                manager.orbax.reload()
        if process.exitcode == 0:
            assert said.get() == deadly - 1
            break
        assert process.exitcode == -signal.SIGKILL
        shutil.rmtree(folder)
    assert len(newest) > 10 and newest == sorted(newest) and newest[-1] == 3
    print(f"killed at {len(newest) - 1} points")


def one_of_two(index: int, port: int, folder: str, said: Any) -> None:
    """T4 and T5 as process `index` of two with two devices each, the state sharded over both."""
    jax.config.update("jax_num_cpu_devices", 2)
    address = f"localhost:{port}"
    jax.distributed.initialize(address, 2, index, coordinator_bind_address=address)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))

    def place(x: Any) -> jax.Array:
        spec = P("fsdp") if x.ndim and x.shape[0] % 4 == 0 else P()
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: np.asarray(x)[i])

    def good(state: Any, step: int) -> bool:
        same = jax.tree.map(
            lambda x, y: all(
                np.asarray(s.data).tobytes() == np.asarray(y)[s.index].tobytes() for s in x.addressable_shards
            ),
            state,
            make_state(step),
        )
        return jax.tree.all(same)

    states = {step: jax.tree.map(place, make_state(step)) for step in (1, 2)}
    workdir.write_config(folder, CONFIG_JSON)
    with workdir.lock(folder), opened(Path(folder)) as manager:
        for step, state in states.items():
            save(manager, step, state)
        checkpoint.wait(manager)
        if index == 0:
            flip_weights(Path(folder) / "checkpoints" / "2")
        multihost_utils.sync_global_devices("damaged")
        restored = checkpoint.restore(manager, abstract(states[1]))
        assert restored is not None and restored[0] == 1 and good(restored[1], 1)
        save(manager, 2, states[2])
        checkpoint.wait(manager)
        restored = checkpoint.restore(manager, abstract(states[1]))
        assert restored is not None and restored[0] == 2 and good(restored[1], 2)
        ema, _, step = checkpoint.load_ema(folder, "diffusion")
        assert step == 2 and same_bits(ema, make_state(2).ema)
    said.put(index)


def test_two_processes_agree_on_what_is_damaged(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    said = context.SimpleQueue()
    pair = [context.Process(target=one_of_two, args=(index, port, str(tmp_path), said)) for index in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(200)
        process.kill()
    assert sorted(said.get() for _ in pair if not said.empty()) == [0, 1]
    assert [p.name for p in (tmp_path / "checkpoints" / "quarantine").iterdir()] == ["2.0"]
    with opened(tmp_path) as manager:
        restored = checkpoint.restore(manager, abstract(make_state(0)))
    assert restored is not None and restored[0] == 2 and same_bits(restored[1], make_state(2))
