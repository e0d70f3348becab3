"""The transformer: a block against NumPy, what attention and patches are equivariant to, and refusals."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from tiny import QUICK, tiny_config

from cfd.devices import parallel
from cfd.networks import transformer
from cfd.networks.transformer import Block, Transformer

FIELDS: dict[str, Any] = dict(
    image_size=8, num_classes=10, base_channels=32, patch_size=2, depth=2, head_channels=16, bottleneck=3
)


def net_of(**changes: Any) -> Transformer:
    return Transformer(**FIELDS | changes)


def inputs(count: int = 4, size: int = 8) -> tuple[Any, Any, Any]:
    z = jax.random.normal(jax.random.key(1), (count, size, size, 1))
    return z, jnp.linspace(-3.0, 3.0, count), jnp.arange(count, dtype=jnp.int32) - 1


def params_of(net: Transformer) -> Any:
    """Random parameters, among which none is 0: those that are at initialisation hide everything else."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs())["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(0.0, 0.3 / np.sqrt(x.shape[0] if x.ndim > 1 else 1), x.shape) for x in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(x, jnp.float32) for x in arrays])


def applied(net: Transformer, params: Any, *given: Any, **options: Any) -> np.ndarray:
    run = jax.jit(lambda params, *given: net.apply({"params": params}, *given, **options), compiler_options=QUICK)
    return np.asarray(run(params, *given))


def test_the_output_is_0_at_initialisation_and_every_parameter_is_used() -> None:
    net = net_of()
    fresh = jax.jit(net.init, compiler_options=QUICK)(jax.random.key(0), *inputs())["params"]
    assert not applied(net, fresh, *inputs()).any()
    squares = jax.grad(lambda p: jnp.square(jnp.asarray(net.apply({"params": p}, *inputs()))).sum())
    grads = jax.jit(squares, compiler_options=QUICK)(params_of(net))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    assert not any(x.ndim > 2 for x in jax.tree.leaves(fresh)), "matrix products alone"


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def test_a_block_is_its_equations_in_numpy() -> None:
    """One image, head by head and pair of channels by pair of channels, in float64."""
    rng, heads, width, tokens = np.random.default_rng(3), 2, 32, 4
    block = Block(heads, 0.0, "float32", True)
    h, emb = rng.normal(size=(1, tokens, width)), rng.normal(size=(1, 8))
    places = np.array([[r, c] for r in range(2) for c in range(2)])
    angles = np.asarray(transformer.rotary_angles(jnp.asarray(places, jnp.float32), 16))
    shapes = jax.eval_shape(partial(block.init, train=False), jax.random.key(0), h, emb, angles)["params"]
    p = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape), shapes)

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ p[name]["kernel"] + p[name]["bias"]

    shift, scale, gate, shift_2, scale_2, gate_2 = np.split(dense("modulate", emb)[0], 6)
    qkv = dense("qkv", rms(h[0]) * (1 + scale) + shift)
    outputs = []
    for n in range(heads):
        q, k, v = (qkv[:, i * width + 16 * n : i * width + 16 * (n + 1)] for i in range(3))
        turned = []
        for x, gain in ((q, p["gain_q"]), (k, p["gain_k"])):
            x = rms(x) * gain
            pairs = (x[:, :8] + 1j * x[:, 8:]) * np.exp(1j * angles)  # a plane is a complex number
            turned.append(np.concatenate([pairs.real, pairs.imag], -1))
        scores = turned[0] @ turned[1].T / np.sqrt(16)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        outputs.append(weights @ v)
    middle = h[0] + gate * dense("attention_out", np.concatenate(outputs, -1))
    up, silu = np.split(dense("mlp_in", rms(middle) * (1 + scale_2) + shift_2), 2, -1)
    expected = middle + gate_2 * dense("mlp_out", up * silu / (1 + np.exp(-silu)))
    given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ({"params": p}, h, emb))
    np.testing.assert_allclose(block.apply(*given, jnp.asarray(angles), False)[0], expected, rtol=2e-4, atol=2e-4)


def test_patches_are_blocks_of_pixels() -> None:
    z = np.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    patches = transformer.to_patches(jnp.asarray(z), 2)
    assert patches.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(2, 2, 3), z[1, 2:4, 4:6])
    np.testing.assert_array_equal(transformer.from_patches(patches, 2), z)


def test_attention_depends_on_the_distance_of_tokens_alone() -> None:
    """q at (r, c) · k at (r', c') is that at places moved by the same rows and columns."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(a: tuple[int, int], b: tuple[int, int]) -> float:
        turned = [
            transformer.rotate(x, transformer.rotary_angles(jnp.asarray([place], jnp.float32), 16))
            for x, place in ((q, a), (k, b))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product((1, 2), (3, 0)) == pytest.approx(product((5, 4), (7, 2)), abs=1e-5)
    assert product((0, 0), (0, 0)) == pytest.approx(float((q * k).sum()), abs=1e-5)
    assert len({round(product((0, 0), b), 4) for b in ((1, 0), (0, 1), (2, 0), (1, 1))}) == 4


def test_without_positions_a_permutation_of_patches_is_a_permutation_of_outputs(monkeypatch: Any) -> None:
    net = net_of()
    params, (z, logsnr, labels) = params_of(net), inputs()
    order = np.random.default_rng(0).permutation(16)

    def moved(x: Any) -> Any:
        patches = transformer.to_patches(jnp.asarray(x), 2).reshape(len(x), 16, -1)
        return transformer.from_patches(patches[:, order].reshape(len(x), 4, 4, -1), 2)

    out = applied(net, params, z, logsnr, labels)
    assert np.abs(applied(net, params, moved(z), logsnr, labels) - moved(out)).max() > 1e-2
    monkeypatch.setattr(transformer, "positions", lambda rows, columns: jnp.zeros((rows * columns, 2)))
    out = applied(net, params, z, logsnr, labels)
    np.testing.assert_allclose(applied(net, params, moved(z), logsnr, labels), moved(out), atol=1e-5)


def test_null_is_the_zero_vector_of_the_class() -> None:
    net = net_of()
    params, (z, logsnr, _) = params_of(net), inputs()
    null = applied(net, params, z, logsnr, jnp.full(4, -1))
    table = params["embed"]["label"]["embedding"]
    emptied = params | {"embed": params["embed"] | {"label": {"embedding": 0 * table}}}
    np.testing.assert_array_equal(null, applied(net, emptied, z, logsnr, jnp.full(4, 3)))
    assert np.abs(null - applied(net, params, z, logsnr, jnp.full(4, 3))).max() > 1e-3


def test_an_image_does_not_depend_on_its_batch_or_the_devices() -> None:
    net = net_of()
    params, given = params_of(net), inputs(8)
    whole = applied(net, params, *given)
    for i in (0, 5):
        one = applied(net, params, *(x[i : i + 1] for x in given))
        np.testing.assert_allclose(one[0], whole[i], rtol=1e-5, atol=1e-5)
    mesh = mesh_of(4, 2)
    divided = parallel.with_shardings(mesh, jax.eval_shape(lambda: params))
    assert any(x.sharding.spec != P() for x in jax.tree.leaves(divided)), "parameters are divided too"
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, divided)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    shared = applied(net, placed, *(jax.device_put(x, rows) for x in given))
    np.testing.assert_allclose(shared, whole, rtol=1e-5, atol=1e-5)


def test_bfloat16_remat_and_other_sizes() -> None:
    net, given = net_of(), inputs()
    params = params_of(net)
    whole = applied(net, params, *given)
    half = applied(net_of(dtype="bfloat16"), params, *given)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - whole).max() < 0.1 * np.abs(whole).max()
    kept = applied(net_of(remat=True), params, *given)
    np.testing.assert_allclose(kept, whole, atol=1e-6)
    assert applied(net, params, *inputs(size=12)).shape == (4, 12, 12, 1)
    wide = net_of(out_channels=2)
    assert jax.eval_shape(wide.init_with_output, jax.random.key(0), *given)[0].shape == (4, 8, 8, 2)


def test_dropout_is_of_training_alone() -> None:
    net = net_of(dropout=0.5)
    params, given = params_of(net), inputs()
    np.testing.assert_array_equal(applied(net, params, *given), applied(net_of(), params, *given))
    first, second = (applied(net, params, *given, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert (first != second).any()


def test_forward_mode_needs_the_plain_layers() -> None:
    net, (z, logsnr, labels) = net_of(fast=False), inputs()
    params, tangent = params_of(net), jax.random.normal(jax.random.key(2), z.shape)

    def f(z: Any) -> Any:
        return net.apply({"params": params}, z, logsnr, labels)

    other = jax.random.normal(jax.random.key(3), z.shape)
    run = jax.jit(lambda z: (jax.jvp(f, (z,), (tangent,)), jax.vjp(f, z)[1](other)[0]), compiler_options=QUICK)
    (value, slope), back = run(z)
    assert float((slope * other).sum()) == pytest.approx(float((back * tangent).sum()), rel=1e-3)
    np.testing.assert_allclose(value, applied(net_of(), params, z, logsnr, labels), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        (dict(patch_size=3), 8, r"image_size is 8x8, which patches of 3x3 do not tile"),
        (dict(), 7, r"z is 7x7, which patches of 2x2 do not tile: change the size or patch_size"),
        (dict(head_channels=24), 8, r"32 channels do not divide into heads .* head_channels = 24"),
        (dict(head_channels=0), 8, r"num_heads = 0, head_channels = 0: set one of them"),
        (dict(head_channels=0, num_heads=16), 8, r"heads of a multiple of 4 channels with num_heads = 16"),
        (dict(time="tdpm"), 8, r"time is 'tdpm'"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes: dict[str, Any], size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(net_of(**changes).init, jax.random.key(0), *inputs(size=size))


def test_inputs_that_do_not_fit_are_refused() -> None:
    net, (z, logsnr, labels) = net_of(), inputs()
    variables = {"params": params_of(net)}
    with pytest.raises(ValueError, match=r"z has shape \(4, 8, 8, 3\); this network takes \[B, H, W, 1\]"):
        net.apply(variables, jnp.zeros((4, 8, 8, 3)), logsnr, labels)
    with pytest.raises(ValueError, match=r"logsnr has shape \(1,\); give one value per image"):
        net.apply(variables, z, logsnr[:1], labels)
    with pytest.raises(ValueError, match="label 10 is not below the number of classes, 10"):
        net.apply(variables, z, logsnr, labels + 8)


CONFIG: dict[str, Any] = dict(model__network="transformer", model__patch_size=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (CONFIG | dict(model__patch_size=3), r"model\.patch_size is 3, which does not divide data\.image_size 8"),
        (CONFIG | dict(model__head_channels=24), r"a token has 32 channels \(base_channels\): give a divisor"),
        (CONFIG | dict(model__head_channels=0, model__num_heads=16), r"with a multiple of 4 channels in each head"),
        (CONFIG | dict(model__label_from=0), r"model\.label_from is 0.* network 'transformer'"),
        (dict(model__depth=3), r"model\.depth is 3, which the network 'adm' does not have"),
    ],
)
def test_a_config_with_fields_that_do_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config(**changes)
    tiny_config(**CONFIG)
