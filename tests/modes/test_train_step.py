"""The training step against independent derivations, and in every form that it takes on a platform."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import jax_setting
from linear import assert_same_bits, bad_at, bad_loss, init, noisy, squares
from tiny import tiny_config

from cfd.modes.settings import optimizer_of
from cfd.modes.train_step import TrainState, global_norm, initial_state, row_major, to_float, train_step


def batch_of(seed: int, rows: int = 16) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (rows, 8, 8, 1), np.uint8)
    return {"image": jnp.asarray(image), "label": jnp.asarray(rng.integers(0, 10, rows, np.int32))}


def step_of(loss_fn: Any, *, num_microbatches: int = 1, **changes: Any) -> tuple[TrainState, Callable]:
    """A fresh state, and the jitted step of the tiny config with `changes` to its `train` group."""
    settings = tiny_config(**{f"train__{name}": value for name, value in changes.items()}).train
    optimizer = optimizer_of(settings)
    step = partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        ema_decay=settings.ema_decay,
        ema_warmup=settings.ema_warmup,
        num_microbatches=num_microbatches,
        replicated=True,
        join_small=False,
    )
    return initial_state(init, optimizer, jax.random.key(1)), jax.jit(step)


def test_a_step_is_a_function_of_its_arguments() -> None:
    state, step = step_of(noisy)
    before = jax.tree.map(np.array, state)
    key = jax.random.key(0)
    first, second = step(state, batch_of(0), key), step(state, batch_of(0), key)
    assert_same_bits(first, second)
    assert_same_bits(before, state)
    other_step = step(state._replace(step=state.step + 1), batch_of(0), key)
    assert float(other_step[1]["loss"]) != float(first[1]["loss"])  # each step has its own noise


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_a_loss_gets_pixels_scaled_to_the_bits_of_numpy(num_microbatches: int) -> None:
    """All 256 values, also where XLA fuses the scaling with the arithmetic of a loss."""
    pixels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    wanted = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    for scale in (to_float, jax.jit(to_float)):
        np.testing.assert_array_equal(scale(jnp.asarray(pixels)), wanted)

    def loss_fn(key: Any, params: Any, x: Any, labels: Any) -> Any:
        order = labels[:, None] * 64 + jnp.arange(64)[None]
        equal = jax.lax.bitcast_convert_type(x.reshape(-1, 64), jnp.int32) == jnp.asarray(bits)[order]
        return jnp.mean(equal) + 0.0 * jnp.sum(params["w"])

    bits = wanted.ravel().view(np.int32)
    state, step = step_of(loss_fn, num_microbatches=num_microbatches)
    batch = {"image": jnp.asarray(pixels), "label": jnp.arange(4, dtype=jnp.int32)}
    assert float(step(state, batch, jax.random.key(0))[1]["loss"]) == 1.0


@pytest.mark.parametrize("vectors, projected", [(0, False), (3, False), (3, True)])
def test_joining_small_arrays_changes_a_step_only_by_rounding(vectors: int, projected: bool) -> None:
    """With matrices of more than RARE elements and of less, and with a projection of the matrices."""

    def init(key: Any) -> Any:
        params = {"large": jax.random.normal(key, (64, 2052)), "scalar": jnp.ones(())}
        params |= {"w": jax.random.normal(key, (64, 4)), "w2": jax.random.normal(key, (4, 8))}
        return params | {f"b{i}": jnp.full(i, 0.1) for i in range(vectors)}  # b0 is empty

    def loss_fn(key: Any, params: Any, x: Any, labels: Any) -> Any:
        out = x.reshape(len(x), -1) @ (params["w"] + params["large"][:, -4:]) * params["scalar"] @ params["w2"]
        return jnp.mean((out - labels[:, None]) ** 2) + sum(jnp.sum(params[f"b{i}"] ** 2) for i in range(vectors))

    settings = tiny_config(train__grad_clip=1e9, train__weight_decay=0.1, train__warmup_steps=0).train
    optimizer = optimizer_of(settings)
    state = initial_state(init, optimizer, jax.random.key(1))
    options: dict[str, Any] = dict(ema_decay=0.9, ema_warmup=True, num_microbatches=1, replicated=True)
    unit = partial(jax.tree.map, lambda x: x / jnp.linalg.norm(x) if x.ndim > 1 else x)
    options["project"] = unit if projected else None
    step = partial(train_step, loss_fn=loss_fn, optimizer=optimizer, **options)
    for i in range(3):
        results = [jax.jit(partial(step, join_small=j))(state, batch_of(i), jax.random.key(0)) for j in (False, True)]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, strict=True), *results)
        for name in ("w", "w2"):
            assert float(jnp.abs(results[0][0].params[name] - state.params[name]).min()) > 0.0
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


def test_each_microbatch_has_its_own_noise() -> None:
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
    """Adam as in its paper (arXiv:1412.6980, Algorithm 1) in float64, on the clipped gradient, derived by hand."""
    ema_w, m, v = w.copy(), np.zeros(260), np.zeros(260)
    norms = []
    for t, batch in enumerate(batches, 1):
        x, y = np.asarray(batch["image"], np.float64).reshape(-1, 64), np.asarray(batch["label"], np.float64)[:, None]
        x = 2.0 * x / 255.0 - 1.0
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
def test_the_global_norm_is_that_of_all_elements(
    shapes: list[tuple[int, ...]], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, **forms: forms[form](*arguments))
    tree = {str(i): jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)}
    exact = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in tree.values()))
    # Unwrapped, because jit would reuse what it traced in the other form.
    norm = jax.jit(lambda tree: inspect.unwrap(global_norm)(tree))
    assert float(norm(tree)) == pytest.approx(exact, rel=1e-6)


def test_row_major_gradients_are_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for a GPU, of a transposed array, which is how cuDNN returns gradients of kernels."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, cuda, default: cuda(*arguments))
    x = jax.random.normal(jax.random.key(0), (5, 3, 3, 4))
    grads = jax.jit(lambda x: row_major({"kernel": x.transpose(1, 2, 3, 0), "bias": x[:, 0, 0, 0]}))(x)
    assert_same_bits(grads, {"kernel": x.transpose(1, 2, 3, 0), "bias": x[:, 0, 0, 0]})


CLIP = 7.5


@pytest.mark.parametrize("num_microbatches, ema_warmup, decay", [(1, False, 0.9), (4, False, 0.9), (1, True, 0.3)])
def test_adam_warm_up_clipping_and_ema_against_numpy(num_microbatches: int, ema_warmup: bool, decay: float) -> None:
    """With ema_warmup and decay 0.3, the warm-up of the EMA ends at the fourth of the eight steps."""
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
    np.testing.assert_allclose(measured, norms, rtol=1e-5)  # the norm before clipping
    assert min(norms) < CLIP < max(norms)
    np.testing.assert_allclose(state.params["w"], w, atol=2e-5)
    np.testing.assert_allclose(state.ema["w"], ema_w, atol=2e-5)
    assert int(state.step) == 8 and int(state.nonfinite_steps) == 0


def test_weight_decay_is_decoupled() -> None:
    """With a gradient of zero, a step multiplies p by 1 − rate · decay and changes nothing else (arXiv:1711.05101)."""
    state, step = step_of(
        lambda key, params, x, labels: 0.0 * params["w"].sum(), learning_rate=0.1, warmup_steps=0, weight_decay=0.5
    )
    after, _ = step(state, batch_of(0), jax.random.key(0))
    np.testing.assert_allclose(after.params["w"], 0.95 * state.params["w"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["loss", "gradient", "data"])
def test_non_finite_steps_change_nothing_and_are_counted(kind: str) -> None:
    """Runs of 1, 3 and 10 consecutive non-finite steps."""
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


def test_float32_under_x64() -> None:
    optimizer = optimizer_of(tiny_config().train)
    settings = dict(optimizer=optimizer, ema_decay=0.9, ema_warmup=False, num_microbatches=2, replicated=True)
    params = {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4), "gain": jnp.zeros(4)}

    def loss_fn(key: Any, params: Any, x: Any, labels: Any) -> Any:
        return global_norm(params) + jnp.mean(x)

    batch = {"image": jnp.zeros((4, 8, 8, 1), jnp.uint8), "label": jnp.zeros(4, jnp.int32)}
    with jax_setting("jax_enable_x64", True):
        state = jax.eval_shape(lambda key: initial_state(lambda _: params, optimizer, key), jax.random.key(0))
        for join_small in (False, True):
            step: Any = partial(train_step, loss_fn=loss_fn, join_small=join_small, **settings)
            after, metrics = jax.eval_shape(step, state, batch, jax.random.key(0))
            assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
            assert metrics["loss"].dtype == jnp.float32
