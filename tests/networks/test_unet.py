"""The U-Net: its outputs against those of the original network, its parameter counts, and its fields."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adm_formula import printed, relative
from jax_settings import jax_setting
from tiny import QUICK

from cfd.config import complete, with_classes
from cfd.fields import FIELDS, NETWORK
from cfd.guidance import NULL_LABEL
from cfd.networks.classifier import Classifier
from cfd.networks.model import module
from cfd.networks.mp_unet import MPUNet
from cfd.networks.unet import UNet

SMALL: dict[str, Any] = dict(
    image_size=8,
    num_classes=4,
    base_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(8,),
    head_channels=32,
)


@pytest.mark.parametrize(
    "name", ["small", "plain", "uncond", "half", "pattern64", pytest.param("pattern128", marks=pytest.mark.slow)]
)
def test_outputs_are_those_of_the_original_network(name: str) -> None:
    """For three λ and classes: the recorded pixels of the original output, and the means of all pixels and squares."""
    ours = printed(name)
    stored, stride = ours.stored, int(ours.stored["stride"])
    logsnr, labels = jnp.float32(stored["logsnr"]), jnp.int32(stored["labels"])
    apply = jax.jit(ours.network.module().apply, compiler_options=QUICK)
    out = np.asarray(apply({"params": ours.params}, ours.z, logsnr, labels))
    assert relative(out[:, ::stride, ::stride], stored["out"]) < 1e-4
    assert relative(out.mean((1, 2), dtype=np.float64), stored["mean"]) < 1e-4
    assert relative(np.square(out, dtype=np.float64).mean((1, 2)), stored["square"]) < 1e-4
    assert sum(x.size for x in jax.tree.leaves(ours.params)) == stored["parameters"]


def init(net: Any, size: int) -> dict:
    """Random values for all parameters, also for those that are initialised to zero."""
    inputs = (jnp.zeros((1, size, size, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), shapes)


def inputs_of(batch: int, size: tuple[int, int] = (8, 8)) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(z, logsnr, labels), with the null label in the last row."""
    z = jax.random.normal(jax.random.key(1), (batch, *size, 3))
    return z, jnp.linspace(-3.0, 5.0, batch), jnp.arange(batch).at[-1].set(NULL_LABEL)


@pytest.mark.parametrize("base_channels", [32, 64])
def test_float32_under_x64(base_channels: int) -> None:
    """Parameters, outputs and gradients are float32 even with jax_enable_x64."""
    net: Any = UNet(**dict(SMALL, base_channels=base_channels))
    z, logsnr, labels = jnp.zeros((8, 8, 8, 3)), jnp.zeros(8), jnp.zeros(8, jnp.int32)

    def loss(params: dict, z: jax.Array) -> jax.Array:
        return jnp.sum(net.apply({"params": params}, z, logsnr, labels))

    with jax_setting("jax_enable_x64", True):
        params = jax.eval_shape(net.init, jax.random.key(0), z, logsnr, labels)["params"]
        shapes = params, jax.eval_shape(jax.value_and_grad(loss, (0, 1)), params, z)
    assert {str(x.dtype) for x in jax.tree.leaves(shapes)} == {"float32"}


@pytest.mark.parametrize(
    ("config", "size", "parameters"), [("imagenet64", 64, 295_904_454), ("imagenet128", 128, 421_529_606)]
)
def test_the_configs_are_adms_models(config: str, size: int, parameters: int) -> None:
    """The parameter counts are those of ADM's `UNetModel` with the flags of its README.

    These flags add a learned variance, that is 3 more output channels than the configs have.
    """
    stated = importlib.import_module(f"configs.{config}").get_config()
    model = with_classes(complete(stated), 1000).model
    net = module(dict(model, out_channels=6), size)
    inputs = (jnp.zeros((1, size, size, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
    assert model.out_channels == 3


def test_null_label_has_the_embedding_zero() -> None:
    """∅ is equivalent to a class whose row of the embedding table is zero."""
    net = UNet(**SMALL)
    params = init(net, 8)
    z, logsnr = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([-3.0, 5.0])
    table = params["embed"]["label"]["embedding"]
    zeroed = params | {"embed": params["embed"] | {"label": {"embedding": table.at[2].set(0.0)}}}
    apply = jax.jit(net.apply, compiler_options=QUICK)
    null = apply({"params": params}, z, logsnr, jnp.full(2, NULL_LABEL))
    np.testing.assert_array_equal(null, apply({"params": zeroed}, z, logsnr, jnp.full(2, 2)))
    assert np.abs(null - apply({"params": params}, z, logsnr, jnp.full(2, 2))).max() > 0.01


def test_images_of_a_batch_do_not_affect_each_other() -> None:
    net = UNet(**SMALL)
    params = init(net, 8)
    z, logsnr = jax.random.normal(jax.random.key(1), (3, 8, 8, 3)), jnp.array([-3.0, 0.0, 5.0])
    apply = jax.jit(net.apply, compiler_options=QUICK)
    out = apply({"params": params}, z, logsnr, jnp.arange(3))
    flipped = apply({"params": params}, z[::-1], logsnr[::-1], jnp.arange(3)[::-1])
    np.testing.assert_allclose(out, flipped[::-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field", [dict(remat=True), dict(dtype="bfloat16")])
def test_remat_and_dtype_do_not_change_the_function(field: dict) -> None:
    net, other = UNet(**SMALL), UNet(**dict(SMALL, **field))
    params, inputs = init(net, 8), inputs_of(2)
    out, out_other = (jax.jit(n.apply, compiler_options=QUICK)({"params": params}, *inputs) for n in (net, other))
    assert out_other.dtype == jnp.float32
    assert relative(out_other, np.asarray(out)) < (0.03 if "dtype" in field else 1e-6)


def test_an_untrained_network_returns_zero() -> None:
    """Every residual branch and the output end in a layer that is initialised to zero."""
    net = UNet(**SMALL)
    inputs = (jnp.ones((1, 8, 8, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    apply = jax.jit(lambda key: net.apply(net.init(key, *inputs), *inputs), compiler_options=QUICK)
    assert not apply(jax.random.key(0)).any()


@pytest.mark.parametrize("network", [UNet, MPUNet])
@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        (dict(channel_mult=(1, 2)), 9, "z is 9x9, but 2 levels need sides divisible by 2"),
        (dict(channel_mult=(1, 2), image_size=9, attention_resolutions=()), 8, "image_size is 9x9, but 2 levels"),
        (dict(attention_resolutions=(8, 4)), 8, r"is \(8, 4\); .* works at \[8\]: choose among these"),
        (dict(head_channels=48), 8, "head_channels = 48"),
        (dict(head_channels=0), 8, "num_heads = 0"),
        (dict(time="linear"), 8, "adm_linear"),
    ],
)
def test_invalid_fields_are_refused_with_a_reason(network: Any, fields: dict, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init(network(**dict(SMALL, **fields)), size)


@pytest.mark.parametrize("network", [UNet, Classifier])
def test_defaults_are_those_of_the_config(network: Any) -> None:
    """`out_channels` and `num_classes` are 0 in a config for a number that follows from the data."""
    defaults = {name: f.default for name, f in network.__dataclass_fields__.items() if name not in ("parent", "name")}
    fields = {name.removeprefix("model."): field.default for name, field in FIELDS.items() if name.startswith("model.")}
    own = (set(fields) & set(defaults)) - {"num_classes"}
    assert {name: defaults[name] for name in own} == {name: fields[name] for name in own}
    assert set(NETWORK) <= set(defaults)
    assert set(defaults) - set(fields) == {"image_size", "fast"} and defaults["fast"]
    assert defaults.get("out_channels", 0) == FIELDS["model.out_channels"].default == 0


def test_a_network_of_defaults_has_the_channels_of_z() -> None:
    net = UNet(image_size=32, num_classes=10)
    z = jnp.zeros((2, 32, 32, 1))
    out, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), z, jnp.zeros(2), jnp.zeros(2, jnp.int32))
    assert out.shape == z.shape and out.dtype == jnp.float32


LEVELS = dict(SMALL, channel_mult=(1, 1), attention_resolutions=(8, 4))


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (16, 8), (8, 16), (32, 32), (4, 4), (6, 10)])
def test_every_attention_layer_matters_at_any_size(size: tuple[int, int]) -> None:
    """Attention belongs to the level as trained. Perturbing any attention layer changes the output at any size."""
    net: Any = UNet(**LEVELS)
    params, inputs = init(net, 8), inputs_of(1, size)
    layers = {name for name in params if name.endswith("_attn")}
    assert layers == {"down_0_0_attn", "down_1_0_attn", "mid_attn"} | {
        f"up_{i}_{j}_attn" for i in (0, 1) for j in (0, 1)
    }
    apply = jax.jit(net.apply, compiler_options=QUICK)
    out = apply({"params": params}, *inputs)
    assert out.shape == inputs[0].shape and jnp.isfinite(out).all()
    for layer in sorted(layers):
        other = params | {layer: jax.tree.map(lambda x: x + 5.0, params[layer])}
        assert jnp.abs(apply({"params": other}, *inputs) - out).max() > 1e-3, layer


def test_attention_of_another_size_stays_at_its_level() -> None:
    """A network with attention at level 0 alone has the same layers at 4x4 and at 16x16, where level 1 is 8x8."""
    net = UNet(**dict(LEVELS, attention_resolutions=(8,)))
    for size in (4, 16):
        names = {name for name in init(net, size) if name.endswith("_attn")}
        assert names == {"down_0_0_attn", "mid_attn", "up_0_0_attn", "up_0_1_attn"}


@pytest.mark.parametrize("network", [UNet, MPUNet])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(z=jnp.zeros((8, 8, 3))), r"z has shape \(8, 8, 3\); this network takes \[B, H, W, 3\]"),
        (dict(z=jnp.zeros((2, 8, 8, 1))), r"z has shape \(2, 8, 8, 1\); this network takes \[B, H, W, 3\]"),
        (dict(logsnr=jnp.zeros(())), r"logsnr has shape \(\); give one value per image of z, shape \(2,\)"),
        (dict(labels=jnp.zeros((1,), jnp.int32)), r"labels has shape \(1,\); give one value per image"),
        (dict(labels=jnp.zeros(2)), "labels have dtype float32: give them as int32"),
        (dict(labels=jnp.zeros(2, bool)), "labels have dtype bool: give them as int32"),
        (dict(labels=jnp.array([0, 4])), "label 4 is not below the number of classes, 4"),
        (dict(labels=jnp.array([0, 255], jnp.uint8)), "label 255 is not below the number of classes, 4"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(network: Any, change: dict, message: str) -> None:
    net: Any = network(**SMALL)
    inputs = dict(zip(("z", "logsnr", "labels"), inputs_of(2), strict=True)) | change
    params = jax.tree.map(jnp.zeros_like, init(net, 8))
    with pytest.raises(ValueError, match=message):
        net.apply({"params": params}, **inputs)


@pytest.mark.parametrize("num_classes", [1, 4])
def test_rows_of_an_unknown_class_are_nan_under_jit(num_classes: int) -> None:
    """Also with one class, where Flax's table lookup ignores the label. The other rows are unaffected."""
    net: Any = UNet(**dict(SMALL, num_classes=num_classes))
    params, (z, logsnr, _) = init(net, 8), inputs_of(3)
    apply = jax.jit(net.apply, compiler_options=QUICK)
    out = apply({"params": params}, z, logsnr, jnp.array([0, num_classes, NULL_LABEL]))
    assert jnp.isnan(out[1]).all() and jnp.isfinite(out[jnp.array([0, 2])]).all()
    np.testing.assert_array_equal(out, apply({"params": params}, z, logsnr, jnp.array([0, num_classes + 7, -5])))
    small = apply({"params": params}, z, logsnr, jnp.array([0, 0, 255], jnp.uint8))
    assert jnp.isnan(small[2]).all() and jnp.isfinite(small[:2]).all()


def test_plain_layers_are_the_same_function_and_have_a_forward_mode() -> None:
    """The values and gradients agree; and ⟨J v, u⟩ = ⟨v, Jᵀ u⟩, with J the derivative by the parameters, z and λ."""
    fast, plain = UNet(**SMALL), UNet(**SMALL, fast=False)
    params, (z, logsnr, labels) = init(fast, 8), inputs_of(2)
    point = (params, z, logsnr)
    rng = np.random.default_rng(1)
    u, v = (jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), like) for like in (z, point))

    def reverse(net: Any, *point: Any) -> Any:
        out, pullback = jax.vjp(lambda *p: net.apply({"params": p[0]}, *p[1:], labels), *point)
        return out, pullback(u)

    def both(net: Any, *point: Any) -> Any:
        forward = jax.jvp(lambda *p: net.apply({"params": p[0]}, *p[1:], labels), point, v)[1]
        return *reverse(net, *point), forward

    out, gradient = jax.jit(reverse, static_argnums=0, compiler_options=QUICK)(fast, *point)
    expected, expected_gradient, forward = jax.jit(both, static_argnums=0, compiler_options=QUICK)(plain, *point)
    assert relative(out, np.asarray(expected)) < 1e-5
    largest = max(float(jnp.abs(b).max()) for b in jax.tree.leaves(expected_gradient))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        # The exact gradient of a bias is zero if groups of one channel are normalised after it: only rounding remains.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()) + 1e-6 * largest)
    products = jax.tree.leaves(jax.tree.map(jnp.vdot, expected_gradient, v))
    assert float(jnp.vdot(forward, u)) == pytest.approx(float(sum(products)), rel=1e-4)


def test_plain_layers_have_jacfwd_and_linearize() -> None:
    """The Jacobian by columns is that by rows."""
    net: Any = UNet(**dict(SMALL, attention_resolutions=()), fast=False)
    params, (z, logsnr, labels) = init(net, 8), inputs_of(1, (2, 2))

    def function(z: jax.Array) -> Any:
        return net.apply({"params": params}, z[None], logsnr, labels)[0]

    def jacobians(z: jax.Array) -> Any:
        return jax.jacfwd(function)(z), jax.jacrev(function)(z), jax.linearize(function, z)[1](jnp.ones_like(z))

    forward, reverse, along_ones = jax.jit(jacobians, compiler_options=QUICK)(z[0])
    np.testing.assert_allclose(forward, reverse, rtol=0, atol=1e-5 * float(jnp.abs(reverse).max()))
    np.testing.assert_allclose(along_ones, forward.sum((3, 4, 5)), rtol=0, atol=1e-4 * float(jnp.abs(along_ones).max()))
