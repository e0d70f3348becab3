"""The U-Net: its outputs against those of the original network, its parameter counts, and its fields."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adm_formula import printed, relative
from tiny import QUICK

from cfd.config import complete, with_classes
from cfd.guidance import NULL_LABEL
from cfd.networks.unet import UNet

SMALL: dict[str, Any] = dict(
    num_classes=4,
    out_channels=3,
    base_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(8,),
    head_channels=32,
    num_heads=0,
    resblock_updown=True,
    scale_shift_norm=True,
    dropout=0.0,
    time="cosine",
    dtype="float32",
    remat=False,
)


@pytest.mark.parametrize(
    "name", ["small", "plain", "uncond", "pattern64", pytest.param("pattern128", marks=pytest.mark.slow)]
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


def init(net: UNet, size: int) -> dict:
    """Random values for all parameters, also for those that are initialised to zero."""
    inputs = (jnp.zeros((1, size, size, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), shapes)


@pytest.mark.parametrize("base_channels", [32, 64])
def test_float32_under_x64(base_channels: int) -> None:
    """Parameters, outputs and gradients are float32 even with jax_enable_x64."""
    net: Any = UNet(**dict(SMALL, base_channels=base_channels))
    z, logsnr, labels = jnp.zeros((8, 8, 8, 3)), jnp.zeros(8), jnp.zeros(8, jnp.int32)

    def loss(params: dict, z: jax.Array) -> jax.Array:
        return jnp.sum(net.apply({"params": params}, z, logsnr, labels))

    with jax.enable_x64(True):
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
    net = UNet(**dict(model, out_channels=6))
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
    params = init(net, 8)
    inputs = (jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([-3.0, 5.0]), jnp.array([1, -1]))
    out, out_other = (jax.jit(n.apply, compiler_options=QUICK)({"params": params}, *inputs) for n in (net, other))
    assert out_other.dtype == jnp.float32
    assert relative(out_other, np.asarray(out)) < (0.03 if "dtype" in field else 1e-6)


def test_an_untrained_network_returns_zero() -> None:
    """Every residual branch and the output end in a layer that is initialised to zero."""
    net = UNet(**SMALL)
    inputs = (jnp.ones((1, 8, 8, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    apply = jax.jit(lambda key: net.apply(net.init(key, *inputs), *inputs), compiler_options=QUICK)
    assert not apply(jax.random.key(0)).any()


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        (dict(channel_mult=(1, 2)), 9, "sides divisible by 2"),
        (dict(head_channels=48), 8, "head_channels = 48"),
        (dict(head_channels=0), 8, "num_heads = 0"),
        (dict(time="linear"), 8, "adm_linear"),
    ],
)
def test_invalid_fields_are_refused_with_a_reason(fields: dict, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init(UNet(**dict(SMALL, **fields)), size)
