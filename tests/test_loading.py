"""A trained model is loaded from a run's folder as it was saved, or the reason why it cannot be is named."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import State, damage_lines, opened, same_bits, shardings, steps
from jax import Array
from tiny import EMITTERS, QUICK, tiny_config

from cfd import loading
from cfd.attributes import joint_scores
from cfd.loading import load
from cfd.networks.classifier import Classifier
from cfd.networks.model import module
from cfd.networks.times import respaced
from cfd.runs import checkpoint, workdir
from cfd.runs.checkpoint import CheckpointError
from cfd.sampling import ancestral, ddim, dpm_solver, guided_sample, sde_dpm_solver
from cfd.steps import LearnedVariance


def digits_run(folder: Path, num_classes: int = 10, without: tuple[str, ...] = (), **changes: Any) -> tuple[Any, Any]:
    """Makes a run's folder with a tiny untrained model, whose config lacks the groups `without`.

    Returns ((net, ema), config_json).
    """
    config = tiny_config(**changes).copy_and_resolve_references()
    config.model.num_classes = num_classes
    net = module(dict(config.model), 8)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes["params"])
    rng = np.random.default_rng(0)
    ema = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), params)
    names = [str(i) for i in range(10)]
    config_json = {"kind": "diffusion", "config": json.loads(config.to_json()), "class_names": names, "conventions": {}}
    for group in without:
        del config_json["config"][group]
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
    run = load(tmp_path)
    assert (run.image_shape, run.num_classes, run.step) == ((8, 8, 1), 10, 3)
    assert run.class_names == tuple("0123456789") and run.config == config_json["config"]
    assert same_bits(run.params, jax.tree.map(lambda x: x * 3, ema))
    z, logsnr, labels = jnp.ones((2, 8, 8, 1)), jnp.zeros(2), jnp.array([4, -1])

    def both(eps_fn: Any, params: Any) -> Any:
        return eps_fn(z, logsnr, labels), net.apply({"params": params}, z, logsnr, labels)

    eps, expected = jax.jit(both, compiler_options=QUICK)(run.eps_fn, run.params)
    np.testing.assert_allclose(eps, expected, rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="label 10 is not below the number of classes, 10"):
        run.eps_fn(z, logsnr, jnp.array([0, 10]))
    assert same_bits(load(tmp_path, 1).params, ema)
    assert not (tmp_path / "canary").exists() and steps(tmp_path) == [1, 2, 3]


NARROW: dict[str, Any] = dict(process__logsnr_min=-10.0, process__logsnr_max=9.0)


def test_load_gives_the_process_and_the_sampler_of_the_run(tmp_path: Path) -> None:
    """As keywords of `guided_sample`, which refuses the λ range of another process."""
    digits_run(tmp_path, **NARROW, sample__v=0.9, sample__clip=False, sample__num_steps=3)
    run = load(tmp_path)
    assert run.process == {"logsnr_min": -10.0, "logsnr_max": 9.0}
    assert (run.sampling["num_steps"], run.sampling["clip"]) == (3, False)
    step = jnp.ones((1, 8, 8, 1)), jnp.zeros((1, 8, 8, 1)), jnp.zeros(()), jnp.ones(())
    assert same_bits(run.sampling["sampler"](*step), ancestral(0.9)(*step))

    @partial(jax.jit, compiler_options=QUICK)
    def sample(key: Array, eps_fn: Any, labels: Array) -> Array:
        return guided_sample(key, eps_fn, labels, run.image_shape, **run.process, **run.sampling)

    assert jnp.isfinite(sample(jax.random.key(0), run.eps_fn, jnp.array([3, 7]))).all()
    for call in (lambda f: f, jax.jit):  # the range is known under `jit` too
        with pytest.raises(ValueError, match=r"-20.*-10"):
            call(lambda eps_fn: guided_sample(jax.random.key(0), eps_fn, jnp.arange(2), run.image_shape))(run.eps_fn)


def test_load_gives_the_grid_of_another_schedule(tmp_path: Path) -> None:
    digits_run(tmp_path, **NARROW, process__schedule="linear", sample__num_steps=3)
    run = load(tmp_path)
    assert run.process == {"logsnr_min": -10.0, "logsnr_max": 9.0}
    np.testing.assert_allclose(run.sampling["num_steps"], [-10.0, -0.5, 9.0], rtol=1e-6)


def test_load_gives_the_steps_and_the_variance_of_the_run(tmp_path: Path) -> None:
    """The sampler of a learned variance, if the network is asked for it."""
    table = dict(process__logsnr_min=-10.1177, process__logsnr_max=9.21024, process__schedule="adm_linear")
    learned: dict[str, Any] = dict(model__learn_variance=True, sample__variance="learned", sample__respacing="4")
    digits_run(tmp_path, **table, **learned, sample__num_steps=4)
    for variance in (True, False):
        run = load(tmp_path, variance=variance)
        np.testing.assert_allclose(run.sampling["num_steps"], respaced("4", "linear"), rtol=1e-6)
        assert isinstance(run.sampling["sampler"], LearnedVariance) == variance


@pytest.mark.parametrize(
    ("sampler", "v", "rule"),
    [
        ("ddim", 0.3, ddim()),
        ("dpm_solver", 0.3, dpm_solver()),
        ("ancestral", 0.0, ancestral(0)),
        ("sde_dpm_solver", 0.4, sde_dpm_solver(0.4)),
    ],
)
def test_sampler_names_are_step_rules(sampler: str, v: float, rule: Any) -> None:
    found = loading.STEP_RULES[sampler](v)
    assert type(found) is type(rule)
    step = jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.zeros(()), jnp.ones(())
    first_order: Any = getattr(found, "rule", found)
    assert same_bits(first_order(*step), getattr(rule, "rule", rule)(*step))


def test_a_model_refuses_what_it_was_not_trained_on(tmp_path: Path) -> None:
    """Concrete λ and labels raise. Under `jit`, the rows of such λ and labels are NaN, and no other row changes."""
    digits_run(tmp_path, **NARROW)
    eps_fn = load(tmp_path).eps_fn
    z, labels = jnp.ones((4, 8, 8, 1)), jnp.array([0, 1, 2, -1])
    for bad in (-10.1, 9.1, 20.0, jnp.nan):
        with pytest.raises(ValueError, match=rf"logsnr is {bad}.*trained on \[-10, 9\].*\*\*run\.process"):
            eps_fn(z, jnp.array([0.0, bad, 0.0, 0.0]), labels)
    with pytest.raises(ValueError, match="label 10 is not below the number of classes, 10"):
        eps_fn(z, jnp.zeros(4), jnp.array([0, 10, 2, -1]))
    with pytest.raises(ValueError, match="labels have dtype float32"):
        eps_fn(z, jnp.zeros(4), jnp.zeros(4))
    with pytest.raises(ValueError, match=r"z has shape \(4, 8, 8, 3\); this network takes \[B, H, W, 1\]"):
        eps_fn(jnp.ones((4, 8, 8, 3)), jnp.zeros(4), labels)

    jitted = jax.jit(lambda eps_fn, *inputs: eps_fn(*inputs), compiler_options=QUICK)
    within = jitted(eps_fn, z, jnp.array([-10.0, 9.0, -10.0 - 1e-3, 0.0]), labels)
    assert jnp.isfinite(within).all()
    beyond = jitted(eps_fn, z, jnp.array([-10.0, 20.0, -10.0 - 1e-3, 0.0]), labels.at[2].set(10))
    assert jnp.isnan(beyond[1:3]).all()
    np.testing.assert_array_equal(beyond[jnp.array([0, 3])], within[jnp.array([0, 3])])


def test_an_unconditional_model_has_no_classes(tmp_path: Path) -> None:
    """A label of a class is refused, or gives NaN under `jit`, because the network would ignore it."""
    digits_run(tmp_path, num_classes=0)
    eps_fn, z, logsnr = load(tmp_path).eps_fn, jnp.ones((2, 8, 8, 1)), jnp.zeros(2)
    with pytest.raises(ValueError, match="label 3 is not below the number of classes, 0"):
        eps_fn(z, logsnr, jnp.array([-1, 3]))
    rows = jax.jit(lambda eps_fn, labels: eps_fn(z, logsnr, labels), compiler_options=QUICK)(eps_fn, jnp.array([-1, 3]))
    assert jnp.isfinite(rows[0]).all() and jnp.isnan(rows[1]).all()


def test_a_model_of_plain_layers_has_a_forward_mode(tmp_path: Path) -> None:
    """⟨J v, u⟩ = ⟨v, Jᵀ u⟩, with the reverse mode of the fast layers. The size is not that of the training."""
    digits_run(tmp_path)
    z, v, u = (jax.random.normal(jax.random.key(i), (1, 16, 8, 1)) for i in range(3))

    @partial(jax.jit, compiler_options=QUICK)
    def products(fast: Any, plain: Any) -> tuple[Array, Array]:
        inputs = jnp.zeros(1), jnp.array([3])
        _, forward = jax.jvp(lambda z: plain(z, *inputs), (z,), (v,))
        _, pullback = jax.vjp(lambda z: fast(z, *inputs), z)
        return jnp.vdot(forward, u), jnp.vdot(v, *pullback(u))

    forward, reverse = products(load(tmp_path, 1).eps_fn, load(tmp_path, 1, fast=False).eps_fn)
    assert float(forward) == pytest.approx(float(reverse), rel=1e-4) and forward != 0


def test_runs_without_a_sampler_or_a_process_load(tmp_path: Path) -> None:
    """Imported runs have no sampler, and the oldest no process: `guided_sample` then uses its own defaults."""
    digits_run(tmp_path, without=("sample", "process"))
    run = load(tmp_path)
    assert run.process == {} and run.sampling == {}
    jitted = jax.jit(lambda eps_fn, *inputs: eps_fn(*inputs), compiler_options=QUICK)
    assert jnp.isfinite(jitted(run.eps_fn, jnp.ones((1, 8, 8, 1)), jnp.full(1, 40.0), jnp.zeros(1, jnp.int32))).all()


def test_load_on_a_mesh(tmp_path: Path) -> None:
    (_, ema), _ = digits_run(tmp_path)
    sharding = shardings()["replicated"](None)
    run = load(tmp_path, 1, sharding=sharding)
    assert same_bits(run.params, ema) and jax.tree.leaves(run.params)[0].sharding == sharding


def test_load_of_what_is_not_there_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the folder of a run"):
        load(tmp_path / "nowhere")
    _, config_json = digits_run(tmp_path)
    with pytest.raises(ValueError, match=r"has no step 7; its steps are \[1, 2, 3\]"):
        load(tmp_path, 7)
    with pytest.raises(ValueError, match="holds a diffusion run; a classifier run was expected"):
        loading.load_ema(tmp_path, "classifier")
    workdir.write_config(tmp_path / "empty", config_json)
    with pytest.raises(ValueError, match="has no step; its steps are"):
        load(tmp_path / "empty")
    config_json["config"]["model"]["dropout"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(ValueError, match=r"step 3 was not written with .*model\.dropout: 0\.0 there, 0\.5 here"):
        load(tmp_path)


def test_a_length_of_0_is_the_runs_own_ema_and_others_are_refused(tmp_path: Path) -> None:
    (_, ema), _ = digits_run(tmp_path)
    assert same_bits(load(tmp_path, 1, ema=0.0).params, ema)
    for length in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"ema is {length}; expected .*\[0, 0\.288675\], or None"):
            load(tmp_path, ema=length)
    with pytest.raises(ValueError, match=r"an EMA of length 0\.1 is asked for, and .* keeps no averages"):
        load(tmp_path, ema=0.1)


def test_load_after_a_newer_version_resumed_the_run(tmp_path: Path) -> None:
    """Its config.json then has fields that the checkpoints lack. Fields that both have must still agree."""
    _, config_json = digits_run(tmp_path)
    config_json["config"]["train"]["younger"] = 3
    config_json["config"]["younger"] = {"field": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    run = load(tmp_path)
    assert run.step == 3 and run.config == config_json["config"]
    del config_json["config"]["train"]["ema_decay"]
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(ValueError, match=r"step 3 was not written with .*train\.ema_decay: .* there, absent here"):
        load(tmp_path)


def test_load_classifier_gives_logits_of_the_ema(tmp_path: Path) -> None:
    config = tiny_config(**NARROW)
    net = Classifier(image_size=8, **config.classifier)
    z, logsnr = jnp.ones((2, 8, 8, 1)), jnp.array([0.0, 3.0])
    ema = jax.jit(net.init, compiler_options=QUICK)(jax.random.key(0), z, logsnr)["params"]
    config_json = workdir.describe("classifier", config.to_dict(), [str(i) for i in range(10)])
    workdir.write_config(tmp_path, config_json)
    with opened(tmp_path) as manager:
        state = State(jnp.asarray(1), jax.tree.map(jnp.zeros_like, ema), ema, ())
        checkpoint.save(manager, 1, state, data_state={}, config_json=config_json)

    def both(classifier_fn: Any, ema: Any, logsnr: Array) -> Any:
        return classifier_fn(z, logsnr), net.apply({"params": ema}, z, logsnr)

    jitted = jax.jit(both, compiler_options=QUICK)
    logits, expected = jitted(loading.load_classifier(tmp_path), ema, logsnr)
    assert logits.shape == (2, 10)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    classifier_fn = loading.load_classifier(tmp_path, fast=False)
    with pytest.raises(ValueError, match=r"logsnr is 20\.0.*trained on \[-10, 9\]"):
        classifier_fn(z, jnp.array([0.0, 20.0]))
    with pytest.raises(ValueError, match="z is 16x16, but this classifier takes 8x8"):
        classifier_fn(jnp.ones((2, 16, 16, 1)), logsnr)
    rows, _ = jitted(classifier_fn, ema, jnp.array([0.0, 20.0]))
    np.testing.assert_allclose(rows[0], expected[0], rtol=1e-5, atol=1e-5)
    assert jnp.isnan(rows[1]).all()
    with pytest.raises(ValueError, match=r"holds a classifier run; .*open this one with cfd\.loading\.load_classifier"):
        load(tmp_path)


def test_load_passes_over_damage_and_touches_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (_, ema), _ = digits_run(tmp_path)
    for path in (tmp_path / "checkpoints" / "3").rglob("_METADATA"):
        path.write_text("")  # as after a power cut
    run = load(tmp_path)
    assert run.step == 2 and same_bits(run.params, jax.tree.map(lambda x: x * 2, ema))
    assert len(damage_lines(caplog)) == 1 and steps(tmp_path) == [1, 2, 3]
    with pytest.raises(CheckpointError, match="no undamaged step 3 in"):
        load(tmp_path, 3)
    for step in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        load(tmp_path)


def test_a_learned_variance_is_given_where_the_network_has_one(tmp_path: Path) -> None:
    """v = (o + 1) / 2 of the second half of the outputs. What is refused of ε is refused of v."""
    (net, ema), _ = digits_run(tmp_path / "both", **NARROW, model__out_channels=2, model__time="adm_linear")
    run, alone = load(tmp_path / "both", 1, variance=True), load(tmp_path / "both", 1)
    inputs = jnp.ones((3, 8, 8, 1)), jnp.array([-9.0, 0.0, 9.0]), jnp.array([4, -1, 2])

    @partial(jax.jit, compiler_options=QUICK | EMITTERS)  # fuses alike what is computed twice
    def all_three(eps_fn: Any, alone: Any, params: Any, logsnr: Array) -> Any:
        z, _, labels = inputs
        outputs = net.apply({"params": params}, z, logsnr, labels)
        return eps_fn(z, logsnr, labels), alone(z, logsnr, labels), outputs

    (eps, v), eps_alone, outputs = all_three(run.eps_fn, alone.eps_fn, ema, inputs[1])
    np.testing.assert_array_equal(eps, eps_alone)
    np.testing.assert_allclose(eps, outputs[..., :1], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(2.0 * v - 1.0, outputs[..., 1:], rtol=1e-4, atol=1e-3)
    (eps, v), *_ = all_three(run.eps_fn, alone.eps_fn, ema, jnp.array([-9.0, 12.0, 9.0]))
    assert np.isnan(eps[1]).all() and np.isnan(v[1]).all() and np.isfinite(v[::2]).all()


def test_a_learned_variance_that_is_not_there_is_refused(tmp_path: Path) -> None:
    digits_run(tmp_path)
    with pytest.raises(ValueError, match=r"no learned variance: .* 1 outputs for 1 channels.*--keep-variance"):
        load(tmp_path, variance=True)
    assert load(tmp_path).eps_fn is not None  # the remedy: leave variance out


def test_a_shared_trunk_is_loaded_with_the_function_for_both_scores(tmp_path: Path) -> None:
    """Rows of unknown labels are NaN in both. A run that never saw ∅ has no such function."""
    digits_run(tmp_path / "run", model__label_from=0)
    run = load(tmp_path / "run")
    z, logsnr, labels, nulls = jnp.ones((2, 8, 8, 1)), jnp.zeros(2), jnp.array([4, 12]), jnp.array([-1, 5])
    scores = joint_scores(run.eps_fn)
    assert scores is not None
    both = jax.jit(scores, compiler_options=QUICK)(z, logsnr, labels, nulls)
    one = jax.jit(run.eps_fn, compiler_options=QUICK)
    for ours, given in zip(both, (labels, nulls), strict=True):
        np.testing.assert_allclose(ours, one(z, logsnr, given), rtol=1e-4, atol=1e-4)
    assert np.isnan(both[0]).all(axis=(1, 2, 3)).tolist() == [False, True] and np.isfinite(both[1]).all()
    with pytest.raises(ValueError, match="label 12 is not below the number of classes, 10"):
        scores(z, logsnr, labels, nulls)
    digits_run(tmp_path / "labelled", model__label_from=0, train__p_uncond=0.0)
    assert joint_scores(load(tmp_path / "labelled").eps_fn) is None
