"""The forms of the layers for a TPU, on this platform: against float64, and alone in programs lowered for TPUs."""

from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from cfd.kernels import tpu
from cfd.networks import layers


def heads(dtype: str, t: int = 256, s: int = 256) -> list[Array]:
    return [jax.random.normal(jax.random.key(i), (1, n, 2, 8), dtype) for i, n in enumerate((t, s, s))]


@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_attention_by_blocks_is_the_softmax_of_scaled_products(dtype: str, error: float) -> None:
    q, k, v = (np.asarray(x, np.float64) for x in heads(dtype, 256, 320))
    scores = np.exp(np.einsum("btnd,bsnd->bnts", q, k) / 8**0.5)
    expected = np.einsum("bnts,bsnd->btnd", scores / scores.sum(axis=-1, keepdims=True), v)
    found = np.asarray(tpu.attention(*heads(dtype, 256, 320)), np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=error)


def test_gradients_of_attention_by_blocks_are_those_of_the_plain_form() -> None:
    q, k, v = heads("float32")
    g = jax.random.normal(jax.random.key(9), q.shape)
    expected = jax.vjp(lambda *x: layers.attention(*x, fast=False), q, k, v)[1](g)
    for ours, theirs in zip(jax.vjp(tpu.attention, q, k, v)[1](g), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_self_attention_is_that_of_its_queries_keys_and_values() -> None:
    qkv, g = (jax.random.normal(jax.random.key(i), (2, 256, *shape)) for i, shape in enumerate(((3, 3, 8), (3, 8))))

    def plain(qkv: Array) -> Array:
        return layers.attention(*jnp.moveaxis(qkv, 2, 0), fast=False)

    for form in (tpu.self_attention, layers.self_attention):
        for ours, theirs in zip(value_and_gradient(form, qkv, g), value_and_gradient(plain, qkv, g), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def value_and_gradient(f: Callable[[Array], Array], x: Array, g: Array) -> tuple[Array, Array]:
    y, vjp = jax.vjp(f, x)
    return y, *vjp(g)


@pytest.mark.parametrize("t, s, loops", [(256, 256, True), (64, 64, False), (257, 257, False)])
def test_only_large_attention_goes_by_blocks_and_only_on_a_tpu(t: int, s: int, loops: bool) -> None:
    for platform in ("tpu", "cpu", "rocm"):
        program = layers.attention.trace(*heads("bfloat16", t, s)).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in program) == (loops and platform == "tpu")
        qkv = jax.ShapeDtypeStruct((1, t, 3, 2, 8), jnp.bfloat16)
        program = jax.jit(layers.self_attention).trace(qkv).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in program) == (loops and platform == "tpu")


def images(size: int = 1) -> tuple[Array, Array, Array]:
    """x and a cotangent in bfloat16, and a float32 kernel. Values are whole numbers, and their products are exact."""
    x, g = (jax.random.randint(jax.random.key(i), (8, 8, 8, 4), -8, 9).astype(jnp.bfloat16) for i in range(2))
    window = (3, 3) if size == 3 else ()
    return x, jax.random.normal(jax.random.key(2), (*window, 4, 4)), g


@pytest.fixture
def take_tpu_forms(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A function after whose call the layers take a TPU's forms. JAX forgets its traces of the layers then, and again
    at the end.
    """

    def take() -> None:
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, **forms: forms.get("tpu", forms["default"])(*a))
        jax.clear_caches()

    yield take
    jax.clear_caches()


@pytest.mark.parametrize("size", [1, 3])
def test_the_gradient_of_a_kernel_is_a_float32_sum(size: int, take_tpu_forms: Callable[[], None]) -> None:
    """Sums of 512 products of whole numbers are exact in float32, and are rounded in bfloat16."""
    x, kernel, g = images(size)
    wide = [np.asarray(a, np.float64) for a in (x, g)]
    if size == 3:
        padded = np.pad(wide[0], ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [[padded[:, i : i + 8, j : j + 8] for j in range(3)] for i in range(3)]
        exact = np.array([[np.einsum("bhwc,bhwk->ck", tap, wide[1]) for tap in row] for row in taps])
    else:
        exact = np.einsum("bhwc,bhwk->ck", *wide)

    def gradient(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(lambda x, kernel: layers.convolve(x, kernel, 1), x, kernel)[1](g)

    dx, _ = gradient(x, kernel, g)
    take_tpu_forms()
    dx_on_tpu, summed = gradient(x, kernel, g)
    assert summed.dtype == jnp.float32 and dx_on_tpu.dtype == jnp.bfloat16
    np.testing.assert_array_equal(summed, exact)
    assert (exact.astype(jnp.bfloat16) != exact).any()
    np.testing.assert_array_equal(np.asarray(dx_on_tpu, np.float32), np.asarray(dx, np.float32))


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_gradients_of_a_dense_layer_are_float32_sums(with_bias: bool, take_tpu_forms: Callable[[], None]) -> None:
    """512 rows of whole numbers: see above. The output is that of float32, rounded once."""
    (x, kernel, g), bias = images(), jnp.full(4, 1 + 2**-12) if with_bias else None
    rows = [a.reshape(2, 256, 4) for a in (x, g + 8)]  # sums of g itself may be exact in bfloat16
    exact = [np.einsum("btc,btk->ck", *(np.asarray(a, np.float64) for a in rows))]
    exact += [np.asarray(rows[1], np.float64).sum((0, 1))] * with_bias

    def gradients() -> list[Array]:
        parameters = (kernel, bias) if with_bias else (kernel,)
        apply = lambda *p: layers.dense(rows[0], p[0], *(p[1:] or (None,)))  # noqa: E731
        return list(jax.vjp(apply, *parameters)[1](rows[1]))

    rounded = gradients()
    take_tpu_forms()
    for ours, theirs, sums in zip(gradients(), rounded, exact, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, sums)
        assert (np.asarray(theirs) != sums).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_dense_layer_is_that_of_flax_elsewhere(dtype: str, use_bias: bool) -> None:
    """The same initialisation, outputs and gradients, to the bit but for the order of sums in a kernel's gradient."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    found = []
    for layer in (layers.Dense(5, dtype, use_bias=use_bias), nn.Dense(5, use_bias=use_bias, dtype=dtype)):
        params = layer.init(jax.random.key(1), x)
        shifted = jax.tree.map(lambda p: p + 0.1, params)
        y, vjp = jax.vjp(lambda p, x, layer=layer: jnp.asarray(layer.apply(p, x)), shifted, x)  # pyright: ignore
        found.append((params, y, vjp(jnp.ones_like(y))))
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=2e-7)


def test_the_gradient_of_a_kernel_is_summed_over_devices_in_float32(take_tpu_forms: Callable[[], None]) -> None:
    x, kernel, g = images()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    take_tpu_forms()

    def gradient(x: Array, kernel: Array, g: Array) -> Array:
        def apply(kernel: Array) -> Array:
            inputs, kernel = layers.cast_varying(x, kernel)
            return layers.convolve(inputs, kernel, 1)

        return jax.vjp(apply, kernel)[1](g)[0]

    found = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(rows, whole, rows), out_specs=whole))(x, kernel, g)
    exact = np.einsum("bhwc,bhwk->ck", np.asarray(x, np.float64), np.asarray(g, np.float64))
    np.testing.assert_array_equal(found, exact)
