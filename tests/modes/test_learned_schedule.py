"""process.schedule = "learned": the schedule is trained and saved beside the network, which does not read it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from tiny import tiny_config

from cfd.devices import parallel
from cfd.errors import UserError
from cfd.loading import Ema, load
from cfd.modes import finetune, settings, train
from cfd.networks.model import Model
from cfd.networks.monotone import SCHEDULE, initial_schedule, monotone
from cfd.process import linear

LEARNED: dict[str, Any] = dict(process__schedule="learned", train__low_discrepancy=True, train__warmup_steps=0)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))


def test_both_are_trained_and_the_network_reads_its_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(**LEARNED)
    real, both = settings.model_of(config), jax.eval_shape(train.diffusion(config)[0], jax.random.key(0))
    inputs = jnp.ones((2, 8, 8, 1)), jnp.zeros(2), jnp.array([3, -1])
    assert jax.eval_shape(real.apply, both, *inputs).shape == (2, 8, 8, 1)

    small = Model(lambda key: {"gain": jnp.float32(0.5)}, lambda params, z, *_, **options: params["gain"] * z)
    monkeypatch.setattr(settings, "model_of", lambda config: small)
    init, loss_fn = train.diffusion(config)
    params = init(jax.random.key(0))
    x, labels = jnp.full((64, 8, 8, 1), 0.3), jnp.zeros(64, jnp.int32)
    loss, gradient = jax.jit(jax.value_and_grad(loss_fn, argnums=1))(jax.random.key(1), params, x, labels)
    # The mean square of ε̂ − ε = gain α x + (gain σ − 1) ε over uniform λ.
    levels = np.linspace(-20.0, 20.0, 4001)
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-levels))), np.sqrt(1 / (1 + np.exp(levels)))
    of_gain = lambda gain: np.mean((gain * alpha * 0.3) ** 2 + (gain * sigma - 1.0) ** 2)  # noqa: E731
    assert float(loss) == pytest.approx(of_gain(0.5), rel=0.05)
    assert float(gradient["gain"]) == pytest.approx((of_gain(0.51) - of_gain(0.49)) / 0.02, rel=0.1)
    assert all(jnp.abs(g).max() > 0.0 for g in jax.tree.leaves(gradient[SCHEDULE]))


@pytest.mark.slow
def test_a_run_learns_its_schedule_and_loads_without_it(tmp_path: Path) -> None:
    config = tiny_config(**LEARNED, train__ema_decay=0.0)
    train.train(config, str(tmp_path))
    run = load(tmp_path)
    learned = run.params[SCHEDULE]
    assert learned.keys() == initial_schedule().keys()
    moved = {name: float(jnp.abs(learned[name] - start).max()) for name, start in initial_schedule().items()}
    assert min(moved.values()) > 1e-4
    ends = config.process.logsnr_min, config.process.logsnr_max
    assert (np.diff(monotone(learned, *ends)(jnp.linspace(0.0, 1.0, 99))) < 0).all()

    z, labels = jnp.ones((2, 8, 8, 1)), jnp.array([3, -1])
    network_alone = {name: array for name, array in run.params.items() if name != SCHEDULE}
    np.testing.assert_array_equal(
        run.eps_fn(z, jnp.zeros(2), labels), run.eps_fn.func(network_alone, z, jnp.zeros(2), labels)
    )


def test_the_network_begins_as_without_a_learned_schedule_which_stands_for_the_loss_of_linear() -> None:
    key = jax.random.key(0)
    plain, learned = (jax.eval_shape(train.diffusion(tiny_config(**fields))[0], key) for fields in ({}, LEARNED))
    assert learned.keys() - plain.keys() == {SCHEDULE} and SCHEDULE not in plain
    assert {name: shapes for name, shapes in learned.items() if name != SCHEDULE} == plain
    config = tiny_config(**LEARNED)
    u = jnp.linspace(0.0, 1.0, 9)
    schedules: Any = settings.training_schedule(config), settings.sampling_of(config).schedule
    for schedule in schedules:
        np.testing.assert_array_equal(schedule(u), linear(-20.0, 20.0)(u))


@pytest.mark.parametrize("of_source", [False, True])
def test_weights_of_a_run_without_a_schedule_leave_it_as_it_begins(of_source: bool) -> None:
    """And a run without a learned schedule takes none."""
    fresh: dict[str, Any] = {"conv_in": {"bias": jnp.zeros(3)}, SCHEDULE: initial_schedule()}
    source: dict[str, Any] = {"conv_in": {"bias": jnp.arange(3.0)}, SCHEDULE: {"line": jnp.ones(1)}}
    one, other = (fresh, source)
    if of_source:
        del one[SCHEDULE]
    else:
        del other[SCHEDULE]
    content = {"config": {"data": {"source": "digits"}}, "class_names": []}
    start = finetune.Start(finetune.Source("run", 3, "hash"), lambda: Ema(source, content, 3, "hash", ""))
    params = finetune.from_weights(start, tiny_config(), ())(jax.tree.map(jnp.asarray, fresh))
    np.testing.assert_array_equal(params["conv_in"]["bias"], [0.0, 1.0, 2.0])
    assert params.keys() == fresh.keys()
    for name, start_of in () if of_source else initial_schedule().items():
        np.testing.assert_array_equal(params[SCHEDULE][name], start_of)


@pytest.mark.parametrize("name, value", [("fourier", (3, 4)), ("predict", "v")])
def test_weights_of_another_kind_of_network_are_refused_with_the_flag(name: str, value: Any) -> None:
    there = tiny_config(**{f"model__{name}": value}).to_dict()
    with pytest.raises(UserError, match=rf"model\.{name} is .* here\..*--config\.model\.{name}="):
        finetune.check_network(tiny_config(), "RUN", {"config": there})
    finetune.check_network(tiny_config(**{f"model__{name}": value}), "RUN", {"config": there})
    del there["model"][name]
    finetune.check_network(tiny_config(), "RUN", {"config": there})
