"""Saving and restoring: the restored state is bit for bit the saved state, under any sharding.

Real files are written; nothing of Orbax is replaced.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import CONFIG_JSON, State, abstract, litter, make_state, opened, same_bits, save, shardings, steps

from cfd import loading
from cfd.runs import checkpoint, workdir
from cfd.runs.checkpoint import CheckpointError


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


def test_multiples_of_keep_every_are_kept_for_good(tmp_path: Path) -> None:
    with opened(tmp_path, keep=1, keep_every=4) as manager:
        for step in (2, 4, 5, 8, 9, 11):
            save(manager, step, make_state(step, rows=1))
    assert steps(tmp_path) == [4, 8, 11] and not litter(tmp_path)
    with opened(tmp_path, keep=1) as manager:  # asked to keep no more, a run deletes those that it kept
        save(manager, 12, make_state(12, rows=1))
    assert steps(tmp_path) == [12]


def test_snapshots_are_all_kept_and_never_written_again(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, CONFIG_JSON)
    emas = {step: {"ema": make_state(step, rows=1).ema} for step in (3, 6, 9)}
    for last in (6, 9):
        manager = checkpoint.open_snapshots(tmp_path)
        for step in range(3, last + 1, 3):
            ema = emas[step] if step == last or last == 6 else {"ema": make_state(0, rows=1).ema}
            checkpoint.save(manager, step, ema, data_state={}, config_json=CONFIG_JSON)
        checkpoint.close(manager)
    assert sorted(int(p.name) for p in (tmp_path / "snapshots").iterdir()) == [3, 6, 9]
    for step, state in emas.items():
        ema = loading.load_ema(tmp_path, "diffusion", step)
        assert ema.step == step and same_bits(ema.params, state["ema"])


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


@pytest.mark.parametrize(
    ("before", "after"), [("one", "fsdp"), ("fsdp", "one"), ("rows", "fsdp"), ("replicated", "other")]
)
def test_saved_on_some_devices_restored_on_others(tmp_path: Path, before: str, after: str) -> None:
    state = make_state(1)
    sharded = jax.tree.map(lambda x: jax.device_put(x, shardings()[before](x)), state)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings()[after](x)), state)
    with opened(tmp_path) as manager:
        save(manager, 1, sharded)
        checkpoint.wait(manager)
        restored = checkpoint.restore(manager, template)
    assert restored is not None and same_bits(restored[1], state)
    assert jax.tree.all(
        jax.tree.map(lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim), restored[1], template)
    )


def wrong_templates() -> dict[str, tuple[Callable[[State], Any], str]]:
    """{name: (a change of the state, a pattern of the message that it must cause)}."""
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
