"""Training of the magnitude-preserving U-Net: normalised weights after each step, devices, and runs."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear import assert_same_bits
from meshes import mesh_of
from tiny import QUICK, tiny_config

from cfd.devices import parallel
from cfd.fields import FOREIGN
from cfd.loading import load, load_ema
from cfd.modes import settings, train
from cfd.modes.train_step import initial_state, train_step
from cfd.networks.mp_unet import normalized

MP: dict[str, Any] = dict(model__network="mp", train__warmup_steps=0, train__learning_rate=1e-2, train__ema_decay=0.9)


def is_normalized(params: Any) -> bool:
    """Whether the weight vector of every output has mean square 1."""
    weights = [np.asarray(x, np.float64) for x in jax.tree.leaves(params) if x.ndim > 1]
    return all(np.allclose(np.mean(w**2, axis=tuple(range(w.ndim - 1))), 1.0, atol=1e-5) for w in weights)


@pytest.mark.slow
def test_each_step_normalises_the_weights_before_the_average_on_any_devices() -> None:
    """On one device with joined arrays, and with the parameters divided over four of eight."""
    config = tiny_config(**MP)
    (init, loss_fn), optimizer = train.diffusion(config), settings.optimizer_of(config.train)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
    batch = {"image": jnp.asarray(pixels), "label": jnp.arange(16, dtype=jnp.int32) % 10}
    fresh = jax.jit(partial(initial_state, init, optimizer), compiler_options=QUICK)(jax.random.key(0))
    assert is_normalized(fresh.params)
    project = settings.model_of(config).project

    def two_steps(mesh: Any, join_small: bool) -> Any:
        step = partial(train_step, loss_fn=loss_fn, optimizer=optimizer, ema_decay=0.9, ema_warmup=False)
        step = partial(step, num_microbatches=1, replicated=mesh.size == 1, join_small=join_small, project=project)
        shardings = jax.tree.map(lambda x: x.sharding, parallel.with_shardings(mesh, jax.eval_shape(lambda: fresh)))
        state, states = jax.device_put(fresh, shardings), []
        rows = jax.device_put(batch, parallel.divide(mesh, 16).sharding)
        jitted = jax.jit(step, out_shardings=(shardings, None), compiler_options=QUICK)
        for _ in range(2):
            state, _ = jitted(state, rows, jax.random.key(1))
            states.append(jax.device_get(state))
        return states

    one, many = two_steps(mesh_of(1), True), two_steps(mesh_of(2, 4), False)
    for a, b in zip(one, many, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-4), a.params, b.params)
        assert is_normalized(a.params) and is_normalized(b.params)
    ema = jax.tree.map(lambda p, q, r: 0.81 * p + 0.09 * q + 0.1 * r, fresh.params, one[0].params, one[1].params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one[1].ema, ema)
    moved = [jnp.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (fresh.params, one[1].params)), strict=True)]
    assert max(moved) > 1e-3


def test_the_other_networks_have_nothing_that_a_step_adds() -> None:
    assert settings.model_of(tiny_config()).project is None
    assert settings.model_of(tiny_config(**MP)).project is normalized


@pytest.mark.parametrize("group", ["model", "model_guide"])
@pytest.mark.parametrize("name, value", [("scale_shift_norm", False), ("resblock_updown", False), ("predict", "x")])
def test_fields_that_the_network_does_not_have_are_refused(group: str, name: str, value: Any) -> None:
    """Each remedy of the message is then accepted."""
    assert name in FOREIGN["mp"]
    with pytest.raises(
        ValueError, match=rf"config\.{group}\.{name} is {value!r}, which the network 'mp' does not have"
    ):
        tiny_config(**{f"{group}__network": "mp", f"{group}__{name}": value})
    tiny_config(**{f"{group}__network": "adm", f"{group}__{name}": value})
    tiny_config(**{f"{group}__network": "mp"})


@pytest.mark.slow
def test_a_run_is_trained_loaded_and_begun_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its eps_fn is that of the network, and the remedy of an error about another network is accepted."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(2, 4))
    place = str(tmp_path / "run")
    train.train(tiny_config(**MP, train__num_steps=3), place)
    run = load(place)
    inputs = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.array([-5.0, 0.0, 5.0]), jnp.array([0, 7, -1])
    apply = jax.jit(settings.model_of(tiny_config(**MP)).apply, compiler_options=QUICK)
    expected = apply(run.params, *inputs)
    np.testing.assert_allclose(run.eps_fn(*inputs), expected, rtol=1e-4, atol=1e-5)
    # The average of normalised weights is shorter than they are, and the network is the same function of both.
    assert not is_normalized(run.params)
    np.testing.assert_allclose(apply(normalized(run.params), *inputs), expected, rtol=1e-3, atol=1e-4)

    with pytest.raises(ValueError, match=r'--config\.model\.network="mp"'):
        train.train(tiny_config(train__num_steps=1), str(tmp_path / "tuned"), init_from=place)
    train.train(tiny_config(**MP, train__num_steps=1), str(tmp_path / "tuned"), init_from=place)
    assert load(tmp_path / "tuned").step == 1


@pytest.mark.slow
def test_a_run_is_resumed_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalised weights, their EMA and both post-hoc averages: in two starts as in one."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    fields = MP | dict(train__posthoc_ema=(0.05, 0.1), train__posthoc_every_steps=1)
    train.train(tiny_config(**fields, train__num_steps=4), str(tmp_path / "one"))
    for steps in (2, 4):
        train.train(tiny_config(**fields, train__num_steps=steps), str(tmp_path / "two"))
    for length in (None, 0.07):
        one, two = (load_ema(tmp_path / name, "diffusion", None, length).params for name in ("one", "two"))
        assert_same_bits(one, two)
