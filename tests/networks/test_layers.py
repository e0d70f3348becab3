"""The layers against float64 NumPy and against JAX's and Flax's layers, gradients included.

Each test runs with the layers' forms for a CPU, for a GPU and for other platforms, and with the plain forms of
`fast=False`. cuDNN's attention needs a GPU and is not tested here.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Float64
from tiny import QUICK

from cfd.networks.layers import Conv, Dense, attention, convolve, group_norm

Inputs = tuple[Array, Array, Array]


@pytest.fixture(params=["cpu", "cuda", "tpu", "default", "plain"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The platform whose forms `jax.lax.platform_dependent` selects, whatever the device is, or the plain forms."""
    if request.param == "plain":
        for name in ("Conv", "attention", "group_norm"):
            monkeypatch.setitem(globals(), name, partial(globals()[name], fast=False))
        yield
        return

    def form_for_platform(*arguments: Any, **forms: Callable[..., Any]) -> Any:
        return forms.get(request.param, forms["default"])(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", form_for_platform)
    jax.clear_caches()
    yield
    jax.clear_caches()


def normal(seed: int, shape: tuple[int, ...]) -> Array:
    """Standard normal float32 numbers, which take no compilation."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def once(f: Callable[..., Any], *arguments: Any) -> Any:
    """f(*arguments) as one program, because the fixture above forgets all programs."""
    return jax.jit(f, compiler_options=QUICK)(*arguments)


def gradients_of(f: Callable[..., Any], cotangent: Array, *arguments: Any) -> Any:
    """The value of f, and the gradients of its arguments for this cotangent."""

    def both(cotangent: Array, *arguments: Any) -> Any:
        value, pullback = jax.vjp(f, *arguments)
        return value, pullback(cotangent)

    return once(both, cotangent, *arguments)


def inputs(channels: int, offset: float = 0.0, height: int = 6) -> Inputs:
    x = np.float32(offset) + np.asarray(normal(channels, (4, height, 5, channels)))
    return jnp.asarray(x), normal(1, (4, channels)), normal(2, (4, channels))


def plain(x: Float[Array, "b h w c"], gain: Array, shift: Array, silu: bool) -> Float[Array, "b h w c"]:
    """Group normalisation, group by group, as in the paper."""
    groups = x.reshape(*x.shape[:3], 32, -1)
    y = jax.nn.standardize(groups, axis=(1, 2, 4), epsilon=1e-5, variance=jnp.var(groups, (1, 2, 4), keepdims=True))
    y = y.reshape(x.shape) * gain[:, None, None] + shift[:, None, None]
    return jax.nn.silu(y) if silu else y


def float64(x: Array, gain: Array, shift: Array, silu: bool) -> Float64[np.ndarray, "b h w c"]:
    """Group normalisation in float64."""
    wide, gains, shifts = (np.asarray(a, np.float64) for a in (x, gain, shift))
    y = np.empty_like(wide)
    size = x.shape[-1] // 32
    for image in range(len(wide)):
        for first in range(0, x.shape[-1], size):
            block = wide[image, ..., first : first + size]
            y[image, ..., first : first + size] = (block - block.mean()) / np.sqrt(block.var() + 1e-5)
    y = y * gains[:, None, None] + shifts[:, None, None]
    return y / (1 + np.exp(-y)) if silu else y


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels", [32, 96])
def test_values_are_those_of_float64(channels: int, silu: bool) -> None:
    arrays = inputs(channels)
    ours = once(partial(group_norm, silu=silu), *arrays)
    np.testing.assert_allclose(ours, float64(*arrays, silu), rtol=0, atol=1e-5)


def test_a_large_mean_adds_no_more_error_than_the_rounding_of_x() -> None:
    """E x² − (E x)² would lose all digits here."""
    arrays = inputs(64, offset=1000.0)
    ours = once(partial(group_norm, silu=True), *arrays)
    np.testing.assert_allclose(ours, float64(*arrays, True), rtol=0, atol=2e-3)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "height"), [(64, 6), (96, 6), (96, 8)])
def test_gradients_are_those_of_the_plain_form(channels: int, height: int, silu: bool) -> None:
    arrays = inputs(channels, height=height)
    cotangent = normal(9, arrays[0].shape)
    _, ours = gradients_of(partial(group_norm, silu=silu), cotangent, *arrays)
    _, theirs = gradients_of(partial(plain, silu=silu), cotangent, *arrays)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_extreme_inputs_have_finite_values_and_gradients() -> None:
    """Constant images, an outlier, and inputs of SiLU so far below 0 that e^{−u} overflows."""
    _, gain, shift = inputs(32)
    x = np.zeros((4, 6, 5, 32), np.float32)
    x[0, 0, 0, 0] = 1e6
    value, gradients = gradients_of(
        partial(group_norm, silu=True), jnp.ones(x.shape), x, gain, np.asarray(shift) - 200.0
    )
    assert all(np.isfinite(a).all() for a in (value, *gradients))


def test_bfloat16_is_rounded_once() -> None:
    """Moments and SiLU are float32: the result is within half a unit in bfloat16's last place of the exact one."""
    x, gain, shift = inputs(64)
    x = x.astype(jnp.bfloat16)
    y = once(partial(group_norm, silu=True), x, gain, shift)
    assert y.dtype == jnp.bfloat16
    exact = float64(x, gain, shift, True)
    assert (np.abs(np.asarray(y, np.float64) - exact) <= 2.0**-8 * np.abs(exact) + 1e-5).all()


def test_group_norm_works_under_vmap_and_shard_map() -> None:
    """The gradients are those of the whole batch, under vmap over single images and under shard_map over devices."""

    def loss(x: Array, gain: Array, shift: Array) -> Array:
        return jnp.sum(jnp.sin(group_norm(x, gain, shift, silu=True)))

    arrays = inputs(32)
    whole = once(jax.grad(loss, (0, 1, 2)), *arrays)
    of_one = jax.grad(lambda x, gain, shift: loss(x[None], gain[None], shift[None]), (0, 1, 2))
    single = once(jax.vmap(of_one), *arrays)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows = PartitionSpec("data")
    sharded = once(jax.shard_map(jax.grad(loss, (0, 1, 2)), mesh=mesh, in_specs=rows, out_specs=rows), *arrays)
    for a, b, c in zip(whole, single, sharded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [32, 64, 192])
def test_a_replicated_parameter_has_the_gradient_of_the_whole_batch(channels: int) -> None:
    """Inside a caller's shard_map over images. From 64 channels on, the convolution is a Winograd form on a CPU."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            gain, shift = self.param("gain", nn.initializers.ones, (channels,)), self.param("shift", ones, (channels,))
            x = group_norm(x, *(jnp.tile(p, (len(x), 1)) for p in (gain, shift)), silu=True)
            return Conv(channels, "float32")(Conv(channels, "float32", size=1)(x))

    ones, net = nn.initializers.ones, Block()
    x, mix = (normal(i, (4, 24, 16, channels)) for i in range(2))
    params = once(net.init, jax.random.key(2), x)

    def loss(params: Any, x: Array, mix: Array) -> Array:
        return jnp.sum(jnp.sin(net.apply(params, x)) * mix)  # pyright: ignore[reportArgumentType]

    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    specs = (PartitionSpec(), PartitionSpec("data"), PartitionSpec("data"))
    within = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    for a, b in zip(*(jax.tree.leaves(once(f, params, x, mix)) for f in (jax.grad(loss), within)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(a).max())


def test_channels_that_the_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="48 channels do not divide into 32 groups"):
        group_norm(jnp.zeros((1, 2, 2, 48)), jnp.ones((1, 48)), jnp.zeros((1, 48)), silu=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bias_of_a_convolution_has_the_values_and_gradients_of_a_sum(dtype: str) -> None:
    """With x in bfloat16, the bias is still a float32 parameter, and its gradient is summed in float32.

    The kernel is the identity, so that the convolution changes nothing.
    """
    x, bias, cotangent = (normal(i, shape) for i, shape in enumerate([(3, 8, 6, 5), (5,), (3, 8, 6, 5)]))
    x, cotangent = x.astype(dtype), cotangent.astype(dtype)
    identity = jnp.eye(5, dtype=dtype)
    y, pullback = jax.vjp(lambda x, bias: convolve(x, identity, 1, bias), x, bias)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, x + bias.astype(dtype)[None, None, None])
    of_x, of_bias = pullback(cotangent)
    assert of_x.dtype == dtype and of_bias.dtype == jnp.float32
    np.testing.assert_array_equal(of_x, cotangent)
    exact = np.asarray(cotangent, np.float64).sum((0, 1, 2))
    np.testing.assert_allclose(of_bias, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("positions, others", [(20, 12), (640, 512)])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2.0**-7)])
def test_attention_is_that_of_jax(dtype: str, tolerance: float, positions: int, others: int) -> None:
    """Values and gradients, with different numbers of queries and keys. A CPU computes the larger case head by head."""
    q, k, v, cotangent = (
        normal(i, (2, length, 3, 16)).astype(dtype) for i, length in enumerate((positions, others, others, positions))
    )
    ours = gradients_of(attention, cotangent, q, k, v)
    wide = (x.astype(jnp.float32) for x in (cotangent, q, k, v))
    theirs = gradients_of(jax.nn.dot_product_attention, *wide)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (1, 1)])
def test_conv_is_that_of_flax(size: int, stride: int, dtype: str) -> None:
    x = normal(0, (2, 6, 8, 5))
    ours = Conv(7, dtype, size=size, stride=stride)
    theirs = nn.Conv(7, (size, size), stride, padding=size // 2, dtype=dtype)
    params: dict[str, Any] = {**once(ours.init, jax.random.key(1), x)["params"], "bias": jnp.arange(7.0)}
    window = params | {"kernel": params["kernel"].reshape(size, size, 5, 7)}
    y = once(ours.apply, {"params": params}, x)
    assert isinstance(y, Array) and y.dtype == dtype
    expected = np.asarray(once(theirs.apply, {"params": window}, x), np.float32)
    tolerance = 1e-6 if dtype == "float32" else 2.0**-7
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (1, 1)])
def test_large_convs_have_values_and_gradients_of_flax(size: int, stride: int, dtype: str) -> None:
    """The shapes are large enough for Winograd's form in float32. Parameters and their gradients are float32."""
    x = normal(0, (4, 12, 12, 64))
    ours = Conv(96, dtype, size=size, stride=stride)
    theirs = nn.Conv(96, (size, size), stride, padding=size // 2)
    params: dict[str, Any] = {**once(ours.init, jax.random.key(1), x)["params"], "bias": jnp.arange(96.0)}

    def reference(params: dict[str, Any], x: Array) -> Any:
        return theirs.apply({"params": params | {"kernel": params["kernel"].reshape(size, size, 64, 96)}}, x)

    cotangent = normal(2, (4, 12 // stride, 12 // stride, 96)).astype(dtype)
    y, gradients = gradients_of(lambda params, x: ours.apply({"params": params}, x), cotangent, params, x)
    expected, wanted = gradients_of(reference, cotangent.astype(jnp.float32), params, x)
    assert isinstance(y, Array) and y.dtype == dtype
    tolerance = 2e-6 if dtype == "float32" else 2.0**-6
    for a, b in zip(jax.tree.leaves((y, gradients)), jax.tree.leaves((expected, wanted)), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))


def test_a_convolution_may_start_at_zero() -> None:
    x = jnp.ones((1, 4, 4, 3))
    for zero in (True, False):
        layer = Conv(2, "float32", zero=zero)
        y: Any = layer.apply(layer.init(jax.random.key(0), x), x)
        assert bool(jnp.any(y)) is not zero


@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (1, 1)])
def test_an_initialisation_gives_outputs_of_the_right_shape(size: int, stride: int) -> None:
    """Layers after it depend on that. With an odd height, and with either dtype."""
    x = jnp.ones((2, 5, 4, 3))
    for layer in (Conv(7, "bfloat16", size=size, stride=stride), Dense(7, "float32")):
        made: Any
        made, params = layer.init_with_output(jax.random.key(0), x)
        wanted: Any = layer.apply(params, x)
        assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype)
