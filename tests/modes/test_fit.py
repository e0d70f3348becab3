"""The training loop: a run that was stopped resumes to the same bits, and a run that cannot continue is refused."""

import gc
import itertools
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.stages import Lowered
from linear import assert_same_bits, bad_at, bad_loss, init, noisy, run
from meshes import mesh_of
from PIL import Image
from tiny import tiny_config

from cfd.data.decode import BadImage
from cfd.devices import parallel, preemption, xla
from cfd.modes import fit as fit_module
from cfd.modes.settings import optimizer_of
from cfd.modes.train import diffusion
from cfd.modes.train_step import initial_state
from cfd.runs import checkpoint


def lines(folder: Path, *names: str) -> list[tuple]:
    """(step, value of each name) of every line of metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text()
    return [tuple(json.loads(line)[name] for name in ("step", *names)) for line in text.splitlines()]


def saved(folder: Path, init: Callable[[Any], Any] = init, mesh: Mesh | None = None) -> tuple[int, Any]:
    """(step, whole state) of the newest checkpoint."""
    optimizer = optimizer_of(tiny_config().train)
    abstract = jax.eval_shape(lambda key: initial_state(init, optimizer, key), jax.random.key(0))
    manager = checkpoint.open_manager(folder, keep=2)
    restored = checkpoint.restore(manager, parallel.with_shardings(mesh or mesh_of(1), abstract))
    checkpoint.close(manager)
    assert restored is not None
    return restored[0], jax.tree.map(np.asarray, restored[1])


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    run(folder)
    return folder


def test_a_run_logs_every_step_once_and_saves_its_last(straight: Path) -> None:
    assert [step for (step,) in lines(straight)] == [1, 2, 3, 4, 5, 6]
    step, state = saved(straight)
    assert step == int(state.step) == 6
    assert lines(straight, "nonfinite_steps", "skipped_images") == [(step, 0, 0) for step in range(1, 7)]
    shares = lines(straight, "goodput", "data_wait")
    assert shares[0][1] == 0.0 and all(0.0 < share < 1.0 for line in shares[1:] for share in line[1:])
    assert all(rate > 0 for _, rate in lines(straight, "images_per_second"))
    before = (straight / "metrics.jsonl").read_bytes()
    run(straight)  # nothing is left to do
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_a_run_uses_its_seed_and_flip_and_draws_its_ema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, shown, real = {}, [], fit_module.batches

    def batches(dataset: Any, **options: Any) -> Any:
        asked.update(options)
        return real(dataset, **options)

    monkeypatch.setattr(fit_module, "batches", batches)

    def draw(step: int, ema: Any) -> np.ndarray:
        shown.append(jax.tree.map(np.array, ema))
        return np.zeros((8, 8, 3), np.uint8)

    def loss_fn(key: Any, params: Any, x: Any, labels: Any) -> Any:
        return jax.random.normal(key) + 1e-3 * jnp.sum(params["w"] ** 2)

    run(tmp_path, loss_fn, draw=draw, seed=5, data__flip=True, train__keep_checkpoints=3, train__sample_every_steps=6)
    assert (asked["seed"], asked["flip"], asked["start_step"]) == (5, True, 0)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()) == ["2", "4", "6"]
    state = saved(tmp_path)[1]
    assert_same_bits(shown[-1], state.ema)
    assert (state.ema["w"] != state.params["w"]).any()
    key_init, key_steps = jax.random.split(jax.random.key(5))
    first = loss_fn(jax.random.fold_in(key_steps, 0), init(key_init), None, None)
    np.testing.assert_allclose(lines(tmp_path, "loss")[0][1], first, rtol=1e-6)


def test_the_logged_rate_counts_the_steps_since_the_previous_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count()
    monkeypatch.setattr(fit_module, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    run(tmp_path, train__log_every_steps=2)
    assert len({rate for _, rate in lines(tmp_path, "images_per_second")}) == 1


def test_a_run_that_is_past_its_last_step_says_so(straight: Path, capsys: pytest.CaptureFixture) -> None:
    run(straight, train__num_steps=4)
    assert "The run is past train.num_steps = 4: nothing is left to train." in capsys.readouterr().out
    assert saved(straight)[0] == 6


def assert_same_run(a: Path, b: Path) -> None:
    """The same losses and gradient norms, and the same bits in the last checkpoint."""
    assert lines(a, "loss", "grad_norm") == lines(b, "loss", "grad_norm")
    (step_a, state_a), (step_b, state_b) = saved(a), saved(b)
    assert step_a == step_b
    assert_same_bits(state_a, state_b)


@pytest.mark.parametrize("stops", [(3,), (6,), (1, 2, 5)])
def test_stopped_on_request_and_resumed_to_the_same_bits(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stops: tuple
) -> None:
    at = 0
    for stop in stops:
        calls = itertools.count(at + 1)
        with monkeypatch.context() as patch, pytest.raises(preemption.Stopped, match=f"step {stop} of 6"):
            patch.setattr(preemption, "requested", lambda calls=calls, stop=stop: next(calls) == stop)
            run(tmp_path)
        assert saved(tmp_path)[0] == at + (stop - at)
        at = stop
    run(tmp_path)
    said = capsys.readouterr().out
    assert f"Resuming {tmp_path} at step {at} of 6" in said
    assert len(re.findall(r"\d steps in .* s, goodput \d+\.\d%", said)) == len(stops) + (at < 6)
    assert_same_run(tmp_path, straight)


def test_bad_images_are_counted_across_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are as many files as a batch has rows, so every step skips each of the three bad ones once."""
    for i in range(16):
        file = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(file)
        if i in (3, 8, 13):
            file.write_bytes(file.read_bytes()[:40])
    fields: dict[str, Any] = dict(data__source="folder", data__path=str(tmp_path / "pictures"), data__num_classes=2)
    fields["sample__classes"] = (0, 1)
    calls = itertools.count(1)
    # As if a second process skipped as many images.
    doubled = SimpleNamespace(**vars(parallel) | {"total": lambda count: 2 * count})
    monkeypatch.setattr(fit_module, "parallel", doubled)
    with monkeypatch.context() as patch, pytest.raises(preemption.Stopped):
        patch.setattr(preemption, "requested", lambda: next(calls) == 3)
        run(tmp_path, **fields, data__on_bad_image="skip")
    run(tmp_path, **fields, data__on_bad_image="skip")
    assert lines(tmp_path, "skipped_images") == [(step, 6 * step) for step in range(1, 7)]
    with pytest.raises(BadImage, match=r"\.png cannot be decoded"):
        run(tmp_path, **fields, data__on_bad_image="raise", train__num_steps=7)
    shutil.copy(tmp_path / "pictures" / "a" / "0.png", tmp_path / "pictures" / "a" / "16.png")
    with pytest.raises(ValueError, match=r"was trained on 16 images, and the data set now has 17\. .*data\.path"):
        run(tmp_path, **fields, data__on_bad_image="skip", train__num_steps=7)


def test_a_stop_adds_no_line_to_the_log_and_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)
    with monkeypatch.context() as patch, pytest.raises(preemption.Stopped):
        patch.setattr(preemption, "requested", lambda: next(calls) == 3)
        run(
            tmp_path,
            draw=lambda *_: pytest.fail("it drew"),
            train__log_every_steps=4,
            train__sample_every_steps=3,
        )
    assert lines(tmp_path) == []
    run(tmp_path, train__log_every_steps=4)
    assert lines(tmp_path) == [(4,), (6,)]


def test_garbage_collections_skip_the_objects_that_tracing_left(tmp_path: Path) -> None:
    frozen = []

    def draw(step: int, ema: Any) -> np.ndarray:
        frozen.append(gc.get_freeze_count())
        return np.zeros((8, 8, 3), np.uint8)

    run(tmp_path, draw=draw, train__sample_every_steps=3)
    assert len(frozen) == 2 and gc.get_freeze_count() < min(frozen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_at_which_it_arrives(straight: Path, tmp_path: Path, number: int) -> None:
    def send(step: int, ema: Any) -> np.ndarray:
        os.kill(os.getpid(), number)
        return np.zeros((8, 8, 3), np.uint8)

    # Step 3 looked for signals before this one, so step 4 is the last.
    with preemption.stopping_on_request(), pytest.raises(preemption.Stopped):
        run(tmp_path, draw=send, train__sample_every_steps=3)
    assert saved(tmp_path)[0] == 4
    run(tmp_path)
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize("crash", [1, 5])
def test_an_error_in_the_loop_loses_only_steps_after_the_last_checkpoint(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    calls = itertools.count(1)

    def fail() -> bool:
        if next(calls) == crash:
            raise RuntimeError("out of memory")
        return False

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(preemption, "requested", fail)
        run(tmp_path)
    run(tmp_path)
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize("crash", [1, 5, 6])
def test_an_error_while_drawing_loses_no_step(straight: Path, tmp_path: Path, crash: int) -> None:
    def fail(step: int, ema: Any) -> np.ndarray:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, draw=fail, train__sample_every_steps=crash)
    assert saved(tmp_path)[0] == crash
    run(tmp_path, draw=fail, train__sample_every_steps=crash, train__num_steps=crash)  # nothing is left to do
    run(tmp_path)
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_can_be_stopped_while_drawing(straight: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(preemption.Stopped, match=f"Stopped at step {step} of 6"):
        run(tmp_path, draw=lambda *_: None, train__sample_every_steps=step)
    assert saved(tmp_path)[0] == step
    run(tmp_path)
    assert_same_run(tmp_path, straight)


def test_nothing_is_compiled_if_nothing_is_left_to_train(
    straight: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(xla, "compiled", lambda *_, **__: pytest.fail("it was compiled"))
    board = sorted((straight / "tensorboard").iterdir())
    run(straight)
    assert "at step 6 of 6" in capsys.readouterr().out and sorted((straight / "tensorboard").iterdir()) == board


def test_an_error_of_the_thread_that_compiles_the_initial_state_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def compile_badly(program: Lowered) -> Any:
        if threading.current_thread() is threading.main_thread():
            return compiled(program)
        threads.append(threading.current_thread())
        raise jax.errors.JaxRuntimeError("out of memory")

    compiled = Lowered.compile
    monkeypatch.setattr(Lowered, "compile", compile_badly)
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        run(tmp_path)
    assert threads[0] is not threading.main_thread() and not threads[0].is_alive()


def test_an_error_of_the_step_is_raised_after_that_thread_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt  # a second Ctrl-C

    before = threading.active_count()
    monkeypatch.setattr(xla, "compiled", fails)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert threading.active_count() <= before and gc.get_freeze_count() == 0


def test_a_request_to_stop_during_compilation_ends_the_run_after_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = xla.compiled

    def asked_meanwhile(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return compiled(*arguments, **options)

    monkeypatch.setattr(xla, "compiled", asked_meanwhile)
    with preemption.stopping_on_request(), pytest.raises(preemption.Stopped, match="step 1 of 6"):
        run(tmp_path)
    assert saved(tmp_path)[0] == 1


def test_isolated_non_finite_steps_do_not_stop_a_run(tmp_path: Path) -> None:
    key = jax.random.split(jax.random.key(0))[1]
    run(tmp_path, bad_loss("gradient", bad_at(key, [2, 3, 5])))
    assert lines(tmp_path, "nonfinite_steps", "nonfinite_in_a_row") == [
        (1, 0, 0),
        (2, 1, 1),
        (3, 2, 2),
        (4, 2, 0),
        (5, 3, 1),
        (6, 3, 0),
    ]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved(tmp_path)[1]))


def test_non_finite_steps_in_a_row_stop_the_run_and_name_the_checkpoint(tmp_path: Path) -> None:
    key = jax.random.split(jax.random.key(0))[1]
    loss_fn = bad_loss("data", bad_at(key, list(range(3, 13))))
    for _ in range(2):  # started again from the checkpoint, it meets the same steps
        with pytest.raises(FloatingPointError) as error:
            run(tmp_path, loss_fn, train__num_steps=20)
        assert "at step 5 " in str(error.value) and "the last good checkpoint is step 4 " in str(error.value)
        step, state = saved(tmp_path)
        assert step == 4 and all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_run_that_is_never_finite_saves_nothing_and_reports_it(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="the last good checkpoint is none"):
        run(
            tmp_path,
            lambda key, params, x, labels: jnp.nan * params["b"].sum(),
            train__nonfinite_limit=1,
            train__checkpoint_every_steps=1,
        )
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()]


def test_a_batch_that_the_devices_do_not_divide_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for mesh, parts in ((mesh_of(3), 1), (mesh_of(6), 2)):
        with pytest.raises(ValueError, match=r"train\.batch_size.* do not divide: use a multiple such as"):
            run(tmp_path, mesh=mesh, train__num_microbatches=parts)
    assert not list(tmp_path.iterdir())


def test_another_config_is_refused_and_nothing_is_overwritten(straight: Path) -> None:
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"learning_rate: 0\.001 there, 0\.5 here.*another --workdir"):
        run(straight, train__learning_rate=0.5)
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def network(name: str) -> tuple[dict[str, Any], Any]:
    """(init and loss_fn, changes to the tiny config) for 40 steps of the linear map or of the diffusion model."""
    changes: Any = dict(train__num_steps=40, train__checkpoint_every_steps=40, model__dropout=0.1)
    if name == "linear":
        return dict(init=init, loss_fn=noisy), changes
    return dict(zip(("init", "loss_fn"), diffusion(tiny_config(**changes)), strict=True)), changes


@pytest.fixture(scope="module", params=["linear", pytest.param("unet", marks=pytest.mark.slow)])
def on_one_device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    functions, changes = network(request.param)
    run(folder, **functions, **changes)
    return request.param, folder


@pytest.mark.parametrize("fsdp", [1, 2])
def test_eight_devices_train_like_one(on_one_device: tuple[str, Path], tmp_path: Path, fsdp: int) -> None:
    name, folder = on_one_device
    functions, changes = network(name)
    run(tmp_path, mesh=mesh_of(8 // fsdp, fsdp), **functions, **changes)
    one, many = (np.array(lines(at, "loss", "grad_norm")) for at in (folder, tmp_path))
    assert len(one) == 40
    np.testing.assert_allclose(many, one, rtol=1e-5)


def test_fsdp_divides_the_state_and_restores_on_another_mesh(tmp_path: Path) -> None:
    mesh = mesh_of(2, 4)
    run(tmp_path, mesh=mesh)
    optimizer = optimizer_of(tiny_config().train)
    abstract = parallel.with_shardings(
        mesh, jax.eval_shape(lambda key: initial_state(init, optimizer, key), jax.random.key(0))
    )
    manager = checkpoint.open_manager(tmp_path, keep=2)
    restored = checkpoint.restore(manager, abstract)
    checkpoint.close(manager)
    assert restored is not None
    for tree in (restored[1].params, restored[1].ema, optax.tree.get(restored[1].opt_state, "mu")):
        assert tree["w"].addressable_shards[0].data.shape == (16, 4)
        assert tree["b"].addressable_shards[0].data.shape == (1,)
    other = saved(tmp_path, mesh=mesh_of(8))
    assert_same_bits(other[1], jax.tree.map(np.asarray, restored[1]))
