"""Damaged checkpoints: the restored state is bit for bit a state that was saved, or an error is raised.

The damage is done to real files. In the last test, two real processes must agree about it.
"""

import multiprocessing
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    CONFIG_JSON,
    abstract,
    damage_lines,
    files_of,
    flip_weights,
    make_older,
    make_state,
    opened,
    same_bits,
    save,
    shardings,
    steps,
)
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ports import free_port

from cfd import loading
from cfd.runs import access, checkpoint, workdir
from cfd.runs.checkpoint import CheckpointError
from cfd.runs.digest import weights_hash
from cfd.runs.reading import read_verified


def damaged_copies(path: Path) -> Iterator[str]:
    """Damages a file in several ways, one after the other, and repairs it after each."""
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
    """Flips random bits of the files of a step, one after the other; every byte is equally likely."""
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
    """For every damage of step 2: either step 2 is restored unchanged, or it is set aside and step 1 is restored.

    After every `save_every`-th restore of step 1, step 2 is saved and restored again. Returns how often each happened.
    """
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


def test_all_steps_damaged_is_an_error_and_never_a_silent_start(two_steps: Path) -> None:
    for step in (1, 2):
        flip_weights(two_steps / "checkpoints" / str(step))
    template = abstract(make_state(0))
    for _ in range(2):  # as when a launcher starts the job again
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


def one_of_two(index: int, port: int, folder: str, said: Any) -> None:
    """Process `index` of two with two devices each, which restore a damaged state that is sharded over all four.

    They restore it divided by rows, as it was saved, or by columns, which divides each saved part over both processes.
    """
    jax.config.update("jax_num_cpu_devices", 2)
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, 2, index, coordinator_bind_address=address)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))

    def rows(x: Any) -> NamedSharding:
        return NamedSharding(mesh, P("fsdp") if x.ndim and x.shape[0] % 4 == 0 else P())

    def columns(x: Any) -> NamedSharding:
        return NamedSharding(mesh, P(None, "fsdp") if x.ndim > 1 else P())

    def shard(x: Any) -> jax.Array:
        return jax.make_array_from_callback(x.shape, rows(x), lambda i: np.asarray(x)[i])

    def good(state: Any, step: int) -> bool:
        same = jax.tree.map(
            lambda x, y: all(
                np.asarray(s.data).tobytes() == np.asarray(y)[s.index].tobytes() for s in x.addressable_shards
            ),
            state,
            make_state(step),
        )
        return jax.tree.all(same)

    states = {step: jax.tree.map(shard, make_state(step)) for step in (1, 2)}
    other = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=columns(x)), make_state(0))
    step_2 = Path(folder) / "checkpoints" / "2"
    workdir.write_config(folder, CONFIG_JSON)
    with access.lock(folder), opened(Path(folder)) as manager:
        for step, state in states.items():
            save(manager, step, state)
        checkpoint.wait(manager)
        if index == 0:
            flip_weights(step_2)
        multihost_utils.sync_global_devices("damaged")
        result = read_verified(step_2, lambda meta: other)
        assert isinstance(result, str)  # a flipped byte gives wrong values, or a file that cannot be decoded
        restored = checkpoint.restore(manager, abstract(states[1]))
        assert restored is not None and restored[0] == 1 and good(restored[1], 1)
        save(manager, 2, states[2])
        checkpoint.wait(manager)
        restored = checkpoint.restore(manager, abstract(states[1]))
        assert restored is not None and restored[0] == 2 and good(restored[1], 2)
        restored = checkpoint.restore(manager, other)
        assert restored is not None and restored[0] == 2 and good(restored[1], 2)
        ema = loading.load_ema(folder, "diffusion")
        assert ema.step == 2 and same_bits(ema.params, make_state(2).ema)
        assert ema.weights_hash == weights_hash(make_state(2).ema) == weights_hash(restored[1].ema)
        multihost_utils.sync_global_devices("read")
        if index == 0:
            make_older(step_2, make_state(2))
        multihost_utils.sync_global_devices("older")
        for template in (other, abstract(states[1])):
            restored = checkpoint.restore(manager, template)
            assert restored is not None and restored[0] == 2 and good(restored[1], 2)
    said.put(index)


@pytest.mark.parametrize("after", ["one", "fsdp", "columns"])
@pytest.mark.parametrize("older", [False, True])
def test_a_flipped_bit_is_seen_under_every_sharding(tmp_path: Path, after: str, older: bool) -> None:
    """Also in a checkpoint of an earlier version. The files are undamaged, but one value in them is another one."""
    state = make_state(1)
    kernel = np.array(state.ema["conv"]["kernel"])
    kernel.view(np.uint8)[40, 100] ^= 1
    other = state._replace(ema=state.ema | {"conv": state.ema["conv"] | {"kernel": jnp.asarray(kernel)}})
    for name, content in (("run", state), ("other", other)):
        with opened(tmp_path / name) as manager:
            save(manager, 1, jax.tree.map(lambda x: jax.device_put(x, shardings()["fsdp"](x)), content))
    step = tmp_path / "run" / "checkpoints" / "1"
    if older:
        make_older(step, state)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings()[after](x)), state)
    with opened(tmp_path / "run") as manager:
        restored = checkpoint.restore(manager, template)
        assert restored is not None and same_bits(restored[1], state)
        shutil.rmtree(step / "state")
        shutil.copytree(tmp_path / "other" / "checkpoints" / "1" / "state", step / "state")
        with pytest.raises(CheckpointError, match="wrong digest of ema/conv/kernel"):
            checkpoint.restore(manager, template)


def test_two_processes_agree_on_what_is_damaged(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    port = free_port()
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
