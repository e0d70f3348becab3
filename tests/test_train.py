"""The train step against independent derivations, and a loop that resumes to the bits it would have reached."""

import gc
import inspect
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image
from tiny import QUICK, tiny_config

import cfd.train
from cfd import checkpoint, data, parallel, preemption, workdir, xla
from cfd.config import describe
from cfd.train import TrainState, diffusion, fit, global_norm, initial_state, make_optimizer, row_major, train_step
from cfd.unet import UNet

pytestmark = pytest.mark.usefixtures("compile_once")


def mesh_of(data: int, fsdp: int = 1) -> Mesh:
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def init(key: Any) -> Any:
    return {"w": 0.1 * jax.random.normal(key, (64, 4)), "b": jnp.zeros(4)}


def forward(params: Any, x: Any) -> Any:
    return x.reshape(len(x), -1) @ params["w"] + params["b"][None]


def squares(key: Any, params: Any, x: Any, labels: Any) -> Any:
    """Without randomness: the mean square of what a linear map gets wrong of the label."""
    return jnp.mean((forward(params, x) - labels[:, None]) ** 2)


def noisy(key: Any, params: Any, x: Any, labels: Any) -> Any:
    return jnp.mean((forward(params, x) - jax.random.normal(key, (len(x), 4))) ** 2)


def batch_of(seed: int, rows: int = 16) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1.0, 1.0, (rows, 8, 8, 1)).astype(np.float32)
    return {"image": jnp.asarray(image), "label": jnp.asarray(rng.integers(0, 10, rows, np.int32))}


def step_of(loss_fn: Any, *, num_microbatches: int = 1, **changes: Any) -> tuple[TrainState, Callable]:
    """A fresh state, and the jitted step of the tiny config with changes."""
    settings = tiny_config(**{f"train__{name}": value for name, value in changes.items()}).train
    optimizer = make_optimizer(settings)
    step = partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        ema_decay=settings.ema_decay,
        ema_warmup=settings.ema_warmup,
        num_microbatches=num_microbatches,
        replicated=True,
        join_vectors=False,
    )
    return initial_state(init, optimizer, jax.random.key(1)), jax.jit(step)


def assert_same_bits(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


def test_a_step_is_a_function_of_its_arguments() -> None:
    state, step = step_of(noisy)
    before = jax.tree.map(np.array, state)
    key = jax.random.key(0)
    first, second = step(state, batch_of(0), key), step(state, batch_of(0), key)
    assert_same_bits(first, second)
    assert_same_bits(before, state)
    other_step = step(state._replace(step=state.step + 1), batch_of(0), key)
    assert float(other_step[1]["loss"]) != float(first[1]["loss"])  # the noise is the step's own


@pytest.mark.parametrize("vectors", [0, 3])
def test_joined_vectors_change_a_step_by_rounding_alone(vectors: int) -> None:
    def init(key: Any) -> Any:
        params = {"w": jax.random.normal(key, (64, 4)), "scalar": jnp.ones(())}
        return params | {f"b{i}": jnp.full(i, 0.1) for i in range(vectors)}  # one of them empty

    def loss_fn(key: Any, params: Any, x: Any, labels: Any) -> Any:
        out = x.reshape(len(x), -1) @ params["w"] * params["scalar"]
        return jnp.mean((out - labels[:, None]) ** 2) + sum(jnp.sum(params[f"b{i}"] ** 2) for i in range(vectors))

    settings = tiny_config(train__grad_clip=1e9, train__weight_decay=0.1, train__warmup_steps=0).train
    optimizer = make_optimizer(settings)
    state = initial_state(init, optimizer, jax.random.key(1))
    options: dict[str, Any] = dict(ema_decay=0.9, ema_warmup=True, num_microbatches=1, replicated=True)
    step = partial(train_step, loss_fn=loss_fn, optimizer=optimizer, **options)
    for i in range(3):
        results = [jax.jit(partial(step, join_vectors=j))(state, batch_of(i), jax.random.key(0)) for j in (False, True)]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, strict=True), *results)
        assert float(jnp.abs(results[0][0].params["w"] - state.params["w"]).min()) > 0.0
        state = results[0][0]


def test_microbatches_give_the_gradient_of_the_whole_batch() -> None:
    state, whole = step_of(squares, warmup_steps=0)
    _, parts = step_of(squares, warmup_steps=0, num_microbatches=4)
    (_, a), (_, b) = whole(state, batch_of(0), jax.random.key(0)), parts(state, batch_of(0), jax.random.key(0))
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-6)
    for _ in range(3):
        (state_a, _), (state_b, _) = (f(state, batch_of(0), jax.random.key(0)) for f in (whole, parts))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), state_a, state_b)
        state = state_a


def test_microbatches_have_noise_of_their_own() -> None:
    state, step = step_of(lambda key, params, x, labels: jax.random.normal(key) + 0.0 * params["b"].sum())
    parts = step_of(lambda key, params, x, labels: jax.random.normal(key) + 0.0 * params["b"].sum(), num_microbatches=4)
    key = jax.random.fold_in(jax.random.key(0), 0)
    draws = [float(jax.random.normal(jax.random.fold_in(key, i))) for i in range(4)]
    np.testing.assert_allclose(parts[1](state, batch_of(0), jax.random.key(0))[1]["loss"], np.mean(draws), rtol=1e-6)
    np.testing.assert_allclose(step(state, batch_of(0), jax.random.key(0))[1]["loss"], jax.random.normal(key))


def numpy_training(
    w: Any,
    b: Any,
    batches: list[Any],
    *,
    rate: float,
    warmup: int,
    b1: float,
    b2: float,
    clip: float,
    decay: float,
    ema_warmup: bool,
) -> Any:
    """Adam by its paper (arXiv:1412.6980, Algorithm 1) in float64, on the gradient derived by hand, clipped."""
    ema_w, m, v = w.copy(), np.zeros(260), np.zeros(260)
    norms = []
    for t, batch in enumerate(batches, 1):
        x, y = np.asarray(batch["image"], np.float64).reshape(-1, 64), np.asarray(batch["label"], np.float64)[:, None]
        residual = 2.0 * (x @ w + b - y) / (len(x) * 4)
        grad_w, grad_b = x.T @ residual, residual.sum(0)
        norm = np.sqrt((grad_w**2).sum() + (grad_b**2).sum())
        norms.append(norm)
        g = np.concatenate([grad_w.ravel(), grad_b]) * min(1.0, clip / norm)
        m, v = b1 * m + (1.0 - b1) * g, b2 * v + (1.0 - b2) * g**2
        at = rate * min((t - 1) / warmup, 1.0)
        change: Any = at * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        w, b = w - change[:256].reshape(64, 4), b - change[256:]
        kept = min(decay, t / (9 + t)) if ema_warmup else decay
        ema_w = kept * ema_w + (1.0 - kept) * w
    return w, ema_w, norms


@pytest.mark.parametrize("form", ["cpu", "default"])
@pytest.mark.parametrize("shapes", [[(3,), (), (7, 5), (3,)], [(16,), (3, 3, 128, 64), (16,), (12,), (3, 3, 128, 64)]])
def test_the_norm_is_that_of_all_elements(
    shapes: list[tuple[int, ...]], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, **forms: forms[form](*arguments))
    tree = {str(i): jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)}
    exact = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in tree.values()))
    norm = jax.jit(lambda tree: inspect.unwrap(global_norm)(tree))  # not what was traced in another form
    assert float(norm(tree)) == pytest.approx(exact, rel=1e-6)


def test_gradients_are_the_same_in_the_layout_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form for a GPU; of a transposed array, as cuDNN's are."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, cuda, default: cuda(*arguments))
    x = jax.random.normal(jax.random.key(0), (5, 3, 3, 4))
    grads = jax.jit(lambda x: row_major({"kernel": x.transpose(1, 2, 3, 0), "bias": x[:, 0, 0, 0]}))(x)
    assert_same_bits(grads, {"kernel": x.transpose(1, 2, 3, 0), "bias": x[:, 0, 0, 0]})


CLIP = 7.5


@pytest.mark.parametrize("num_microbatches, ema_warmup, decay", [(1, False, 0.9), (4, False, 0.9), (1, True, 0.3)])
def test_adam_warm_up_clipping_and_ema_against_numpy(num_microbatches: int, ema_warmup: bool, decay: float) -> None:
    """A warm-up of the EMA ends at decay 0.3 in the fourth of the eight steps."""
    options: dict[str, Any] = dict(learning_rate=0.01, warmup_steps=4, grad_clip=CLIP, adam_b1=0.8, adam_b2=0.99)
    options |= dict(ema_decay=decay, ema_warmup=ema_warmup, num_microbatches=num_microbatches)
    state, step = step_of(squares, **options)
    batches = [batch_of(seed) for seed in range(8)]
    w, b = np.float64(state.params["w"]), np.float64(state.params["b"])
    fixed: dict[str, Any] = dict(rate=0.01, warmup=4, b1=0.8, b2=0.99, clip=CLIP)
    w, ema_w, norms = numpy_training(w, b, batches, **fixed, decay=decay, ema_warmup=ema_warmup)
    measured = []
    for batch in batches:
        state, metrics = step(state, batch, jax.random.key(0))
        measured.append(metrics["grad_norm"])
    np.testing.assert_allclose(measured, norms, rtol=1e-5)  # logged before it is clipped
    assert min(norms) < CLIP < max(norms)
    np.testing.assert_allclose(state.params["w"], w, atol=2e-5)
    np.testing.assert_allclose(state.ema["w"], ema_w, atol=2e-5)
    assert int(state.step) == 8 and int(state.nonfinite_steps) == 0


def test_weight_decay_is_decoupled() -> None:
    """With a gradient of zero, p shrinks by rate * decay at every step (arXiv:1711.05101), and by nothing else."""
    state, step = step_of(
        lambda key, params, x, labels: 0.0 * params["w"].sum(), learning_rate=0.1, warmup_steps=0, weight_decay=0.5
    )
    after, _ = step(state, batch_of(0), jax.random.key(0))
    np.testing.assert_allclose(after.params["w"], 0.95 * state.params["w"], rtol=1e-6)


def bad_loss(kind: str, is_bad: Callable[[Any], Any]) -> Callable:
    """`noisy`, made non-finite in its value, in its gradient alone, or by its input, where is_bad(key)."""

    def loss_fn(key: Any, params: Any, x: Any, labels: Any) -> Any:
        bad = is_bad(key)
        if kind == "data":
            x = jnp.where(bad, jnp.nan, x)
        loss = noisy(key, params, x, labels)
        if kind == "loss":
            loss = loss + jnp.where(bad, jnp.inf, 0.0)
        if kind == "gradient":  # the root has the value 0 and an infinite slope there
            loss = loss + jnp.sqrt(jnp.where(bad, 0.0, 1.0) * (1.0 + jnp.sum(params["b"] ** 2)))
        return loss

    return loss_fn


def bad_at(key: Any, steps: list[int]) -> Callable[[Any], Any]:
    """Whether a step's key is that of one of `steps`, counted from 1."""
    keys = jnp.stack([jax.random.key_data(jax.random.fold_in(key, s - 1)) for s in steps])
    return lambda key: jnp.any(jnp.all(keys == jax.random.key_data(key)[None], axis=-1))


@pytest.mark.parametrize("kind", ["loss", "gradient", "data"])
def test_non_finite_steps_change_nothing_and_are_counted(kind: str) -> None:
    """T24: 1, 3 and 10 such steps in a row."""
    key = jax.random.key(0)
    bad = [2, *range(4, 7), *range(8, 18)]
    state, step = step_of(bad_loss(kind, bad_at(key, bad)), warmup_steps=0)
    good, count, in_a_row = state, 0, 0
    for number in range(1, 20):
        state, metrics = step(state, batch_of(number), key)
        finite = bool(np.isfinite([metrics["loss"], metrics["grad_norm"]]).all())
        assert finite == (number not in bad)
        count, in_a_row = count + (not finite), 0 if finite else in_a_row + 1
        assert (int(metrics["nonfinite_steps"]), int(metrics["nonfinite_in_a_row"])) == (count, in_a_row)
        assert int(state.step) == number
        if finite:
            assert (np.asarray(state.params["w"]) != np.asarray(good.params["w"])).any()
            good = state
        else:
            for name in ("params", "ema", "opt_state"):
                assert_same_bits(getattr(good, name), getattr(state, name))
    assert count == 14


def run(
    folder: Path,
    loss_fn: Any = noisy,
    *,
    mesh: Mesh | None = None,
    init: Callable[[Any], Any] = init,
    draw: Callable[[int, Any], np.ndarray | None] | None = None,
    **changes: Any,
) -> None:
    """`fit` with the tiny config, by default of the linear map and on one device."""
    config = tiny_config(**changes)
    dataset = data.from_config(config.data, config.data.split)
    fit(
        config.train,
        str(folder),
        mesh or mesh_of(1),
        dataset,
        describe("diffusion", config, dataset.class_names),
        init,
        loss_fn,
        draw,
        seed=config.seed,
        loading=config.data,
    )


def lines(folder: Path, *names: str) -> list[tuple]:
    """(step, value of each name) of every line of metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text()
    return [tuple(json.loads(line)[name] for name in ("step", *names)) for line in text.splitlines()]


def saved(folder: Path, init: Callable[[Any], Any] = init, mesh: Mesh | None = None) -> tuple[int, Any]:
    """The newest checkpoint: its step and the whole state."""
    optimizer = make_optimizer(tiny_config().train)
    abstract = jax.eval_shape(lambda key: initial_state(init, optimizer, key), jax.random.key(0))
    manager = checkpoint.open_manager(folder, keep=2)
    restored = checkpoint.restore(manager, parallel.placed(mesh or mesh_of(1), abstract))
    checkpoint.close(manager)
    assert restored is not None
    return restored[0], jax.tree.map(np.asarray, restored[1])


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
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


def test_a_run_has_its_own_seed_and_flips_and_shows_its_ema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, shown, real = {}, [], data.batches
    monkeypatch.setattr(data, "batches", lambda dataset, **options: asked.update(options) or real(dataset, **options))

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


def test_the_rate_is_that_of_the_steps_since_the_line_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.count()
    monkeypatch.setattr(cfd.train, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    run(tmp_path, train__log_every_steps=2)
    assert len({rate for _, rate in lines(tmp_path, "images_per_second")}) == 1


def test_a_noisy_classifier_is_of_the_run_in_whose_folder_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir.write_config(tmp_path, describe("diffusion", tiny_config(), tuple("0123456789")))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"was trained with data.image_size = 8, not 4"):
        cfd.train.train_classifier(tiny_config(data__image_size=4), str(tmp_path))
    assert not (tmp_path / "classifier").exists()
    names = ("zero", *"123456789")
    workdir.write_config(tmp_path / "other", describe("diffusion", tiny_config(), names))
    with pytest.raises(ValueError, match=r"class 0 is 'zero' in the run .* and '0' in data.split 'train'"):
        cfd.train.train_classifier(tiny_config(), str(tmp_path / "other"))
    # Its own settings are its own.
    monkeypatch.setattr(cfd.train, "fit", lambda *_, **__: None)
    cfd.train.train_classifier(tiny_config(classifier_train__learning_rate=1.0, train__p_uncond=0.5), str(tmp_path))


def test_each_network_is_trained_with_its_own_settings_on_the_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(cfd.train, "fit", lambda *arguments, **options: asked.append((*arguments, options)))
    config = tiny_config(classifier_train__num_steps=9, classifier_train__batch_size=8, seed=5)
    images = data.from_config(config.data, "train")
    for train in (cfd.train.train, cfd.train.train_classifier):
        train(config, str(tmp_path))
    for settings, _, _, dataset, *_, options in asked:
        np.testing.assert_array_equal(dataset.labels, images.labels)
        assert settings.warmup_steps == config.train.warmup_steps
        assert options == dict(seed=5, loading=config.data, allow_fresh_start=False)
    (own, folder, *_), (other, inner, *_) = asked
    assert own == config.train and folder == str(tmp_path) and inner == str(tmp_path / "classifier")
    assert {name: other[name] for name in config.classifier_train} == config.classifier_train.to_dict()
    assert other.num_steps != own.num_steps and other.weight_decay != own.weight_decay


def test_a_run_that_is_past_its_last_step_says_so(straight: Path, capsys: pytest.CaptureFixture) -> None:
    run(straight, train__num_steps=4)
    assert "train.num_steps = 4 was passed already: nothing is left to train." in capsys.readouterr().out
    assert saved(straight)[0] == 6


def same_run(a: Path, b: Path) -> None:
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
    same_run(tmp_path, straight)


def test_bad_images_are_counted_across_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T25: as many files as a batch has rows, so that every step passes over each of the three bad ones."""
    for i in range(16):
        file = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(file)
        if i in (3, 8, 13):
            file.write_bytes(file.read_bytes()[:40])
    fields: dict[str, Any] = dict(data__source="folder", data__path=str(tmp_path / "pictures"), data__num_classes=2)
    calls = itertools.count(1)
    monkeypatch.setattr(parallel, "total", lambda count: 2 * count)  # of two processes that pass over as many
    with monkeypatch.context() as patch, pytest.raises(preemption.Stopped):
        patch.setattr(preemption, "requested", lambda: next(calls) == 3)
        run(tmp_path, **fields, data__on_bad_image="skip")
    run(tmp_path, **fields, data__on_bad_image="skip")
    assert lines(tmp_path, "skipped_images") == [(step, 6 * step) for step in range(1, 7)]
    with pytest.raises(data.BadImage, match=r"\.png cannot be decoded"):
        run(tmp_path, **fields, data__on_bad_image="raise", train__num_steps=7)
    shutil.copy(tmp_path / "pictures" / "a" / "0.png", tmp_path / "pictures" / "a" / "16.png")
    with pytest.raises(ValueError, match=r"was trained on 16 images, and data.path .* has 17"):
        run(tmp_path, **fields, data__on_bad_image="skip", train__num_steps=7)


def test_a_stop_adds_no_line_to_the_log_and_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)
    with monkeypatch.context() as patch, pytest.raises(preemption.Stopped):
        patch.setattr(preemption, "requested", lambda: next(calls) == 3)
        run(tmp_path, draw=lambda *_: pytest.fail("it did"), train__log_every_steps=4, train__sample_every_steps=3)
    assert lines(tmp_path) == []
    run(tmp_path, train__log_every_steps=4)
    assert lines(tmp_path) == [(4,), (6,)]


def test_full_collections_pass_over_what_tracing_left(tmp_path: Path) -> None:
    frozen = []

    def draw(step: int, ema: Any) -> np.ndarray:
        frozen.append(gc.get_freeze_count())
        return np.zeros((8, 8, 3), np.uint8)

    run(tmp_path, draw=draw, train__sample_every_steps=3)
    assert len(frozen) == 2 and gc.get_freeze_count() < min(frozen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_it_came_at(straight: Path, tmp_path: Path, number: int) -> None:
    def send(step: int, ema: Any) -> np.ndarray:
        os.kill(os.getpid(), number)
        return np.zeros((8, 8, 3), np.uint8)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        preemption.install()
        with pytest.raises(preemption.Stopped):  # the signal comes after step 3 asked, so step 4 is the last
            run(tmp_path, draw=send, train__sample_every_steps=3)
        preemption.install()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert saved(tmp_path)[0] == 4
    run(tmp_path)
    same_run(tmp_path, straight)


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
    same_run(tmp_path, straight)


@pytest.mark.parametrize("crash", [1, 5, 6])
def test_an_error_in_drawing_loses_no_step(straight: Path, tmp_path: Path, crash: int) -> None:
    def fail(step: int, ema: Any) -> np.ndarray:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, draw=fail, train__sample_every_steps=crash)
    assert saved(tmp_path)[0] == crash
    run(tmp_path, draw=fail, train__sample_every_steps=crash, train__num_steps=crash)  # nothing is left to do
    run(tmp_path)
    same_run(tmp_path, straight)


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_stops_in_drawing(straight: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(preemption.Stopped, match=f"Stopped at step {step} of 6"):
        run(tmp_path, draw=lambda *_: None, train__sample_every_steps=step)
    assert saved(tmp_path)[0] == step
    run(tmp_path)
    same_run(tmp_path, straight)


def test_float32_under_x64() -> None:
    optimizer = make_optimizer(tiny_config().train)
    settings = dict(optimizer=optimizer, ema_decay=0.9, ema_warmup=False, num_microbatches=2, replicated=True)
    params = {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4), "gain": jnp.zeros(4)}

    def loss_fn(key: Any, params: Any, x: Any, labels: Any) -> Any:
        return global_norm(params) + jnp.mean(x)

    batch = {"image": jnp.zeros((4, 8, 8, 1)), "label": jnp.zeros(4, jnp.int32)}
    with jax.enable_x64(True):
        state = jax.eval_shape(lambda key: initial_state(lambda _: params, optimizer, key), jax.random.key(0))
        for join_vectors in (False, True):
            step: Any = partial(train_step, loss_fn=loss_fn, join_vectors=join_vectors, **settings)
            after, metrics = jax.eval_shape(step, state, batch, jax.random.key(0))
            assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
            assert metrics["loss"].dtype == jnp.float32


def test_nothing_is_compiled_where_nothing_is_left_to_train(
    straight: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(xla, "compiled", lambda *_, **__: pytest.fail("it was"))
    board = sorted((straight / "tensorboard").iterdir())
    run(straight)
    assert "at step 6 of 6" in capsys.readouterr().out and sorted((straight / "tensorboard").iterdir()) == board


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
    for _ in range(2):  # the same command again meets the same steps, from the checkpoint
        with pytest.raises(FloatingPointError) as error:
            run(tmp_path, loss_fn, train__num_steps=20)
        assert "at step 5 " in str(error.value) and "the last good checkpoint is step 4 " in str(error.value)
        step, state = saved(tmp_path)
        assert step == 4 and all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_run_that_is_never_finite_saves_nothing_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="the last good checkpoint is none"):
        run(
            tmp_path,
            lambda key, params, x, labels: jnp.nan * params["b"].sum(),
            train__nonfinite_limit=1,
            train__checkpoint_every_steps=1,
        )
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()]


def test_a_batch_that_the_devices_do_not_divide_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for mesh, parts in ((mesh_of(3), 1), (mesh_of(8), 4)):
        with pytest.raises(ValueError, match=r"train\.batch_size.* do not divide: use a multiple such as"):
            run(tmp_path, mesh=mesh, train__num_microbatches=parts)
    assert not list(tmp_path.iterdir())


def test_another_config_is_refused_and_nothing_is_overwritten(straight: Path) -> None:
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"learning_rate: 0\.001 there, 0\.5 here.*another --workdir"):
        run(straight, train__learning_rate=0.5)
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_the_loss_is_that_of_the_config_with_dropout_of_its_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(train__p_uncond=0.7, process__logsnr_min=-7.0, process__logsnr_max=9.0, model__dropout=0.5)
    seen: dict[str, Any] = {}
    apply = UNet.apply

    def seen_apply(*args: Any, rngs: Any, **options: Any) -> Any:
        seen["dropout"] = rngs["dropout"]
        return apply(*args, rngs=rngs, **options)

    def eps_loss(key: Any, eps_fn: Any, x: Any, labels: Any, **options: Any) -> Any:
        seen.update(loss=key, out=eps_fn(x, jnp.zeros(2), labels))
        assert options == dict(p_uncond=0.7, logsnr_min=-7.0, logsnr_max=9.0)
        return jnp.zeros(())

    monkeypatch.setattr(UNet, "apply", seen_apply)
    monkeypatch.setattr(cfd.train, "eps_loss", eps_loss)
    init, loss_fn = diffusion(config)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda p: jnp.asarray(random.normal(0.0, 0.1, p.shape), jnp.float32), shapes)

    def seen_with(key: Any) -> Any:
        loss_fn(key, params, jnp.ones((2, 8, 8, 1)), jnp.zeros(2, jnp.int32))
        return jnp.stack([jax.random.key_data(k) for k in (key, seen["loss"], seen["dropout"])]), seen["out"]

    jitted = jax.jit(seen_with, compiler_options=QUICK)
    (keys, one), (_, other) = jitted(jax.random.key(1)), jitted(jax.random.key(2))
    assert len(np.unique(keys, axis=0)) == 3
    assert (one != other).any()


def network(name: str) -> tuple[dict[str, Any], Any]:
    """(init and loss_fn, changes to the tiny config) for 40 steps of the linear map, or of the diffusion model."""
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
def test_eight_devices_train_as_one_does(on_one_device: tuple[str, Path], tmp_path: Path, fsdp: int) -> None:
    name, folder = on_one_device
    functions, changes = network(name)
    run(tmp_path, mesh=mesh_of(8 // fsdp, fsdp), **functions, **changes)
    one, many = (np.array(lines(at, "loss", "grad_norm")) for at in (folder, tmp_path))
    assert len(one) == 40
    np.testing.assert_allclose(many, one, rtol=1e-5)


def test_fsdp_divides_the_state_and_restores_on_another_mesh(tmp_path: Path) -> None:
    mesh = mesh_of(2, 4)
    run(tmp_path, mesh=mesh)
    optimizer = make_optimizer(tiny_config().train)
    abstract = parallel.placed(mesh, jax.eval_shape(lambda key: initial_state(init, optimizer, key), jax.random.key(0)))
    manager = checkpoint.open_manager(tmp_path, keep=2)
    restored = checkpoint.restore(manager, abstract)
    checkpoint.close(manager)
    assert restored is not None
    for tree in (restored[1].params, restored[1].ema, optax.tree.get(restored[1].opt_state, "mu")):
        assert tree["w"].addressable_shards[0].data.shape == (16, 4)
        assert tree["b"].addressable_shards[0].data.shape == (1,)
    other = saved(tmp_path, mesh=mesh_of(8))
    assert_same_bits(other[1], jax.tree.map(np.asarray, restored[1]))
