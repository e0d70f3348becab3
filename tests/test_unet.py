"""The U-Net against the original network's own outputs, its sizes, its time, and what its fields do."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adm_formula import printed, relative

from cfd import adm
from cfd.guidance import NULL_LABEL
from cfd.unet import UNet, cosine_time, network_time
from tests.tiny import QUICK

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
    """Over three λ and classes: the pixels kept of the original's output, and the sums of all of them."""
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
    """Random parameters, those that start at zero included."""
    inputs = (jnp.zeros((1, size, size, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), shapes)


@pytest.mark.parametrize("base_channels", [32, 64])
def test_float32_under_x64(base_channels: int) -> None:
    """Parameters, outputs and gradients, whatever jax_enable_x64 says."""
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
    """The count of `UNetModel` with the README's flags, which learn a variance: 3 more outputs than ours."""
    model = importlib.import_module(f"configs.{config}").get_config().model
    net = UNet(**dict(model, out_channels=6))
    inputs = (jnp.zeros((1, size, size, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
    assert model.out_channels == 3


def test_null_label_has_the_embedding_zero() -> None:
    """∅ is the class whose row of the table is zero."""
    net = UNet(**SMALL)
    params = init(net, 8)
    z, logsnr = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([-3.0, 5.0])
    table = params["embed"]["label"]["embedding"]
    zeroed = params | {"embed": params["embed"] | {"label": {"embedding": table.at[2].set(0.0)}}}
    apply = jax.jit(net.apply, compiler_options=QUICK)
    null = apply({"params": params}, z, logsnr, jnp.full(2, NULL_LABEL))
    np.testing.assert_array_equal(null, apply({"params": zeroed}, z, logsnr, jnp.full(2, 2)))
    assert np.abs(null - apply({"params": params}, z, logsnr, jnp.full(2, 2))).max() > 0.01


def test_rows_do_not_see_each_other() -> None:
    net = UNet(**SMALL)
    params = init(net, 8)
    z, logsnr = jax.random.normal(jax.random.key(1), (3, 8, 8, 3)), jnp.array([-3.0, 0.0, 5.0])
    apply = jax.jit(net.apply, compiler_options=QUICK)
    out = apply({"params": params}, z, logsnr, jnp.arange(3))
    flipped = apply({"params": params}, z[::-1], logsnr[::-1], jnp.arange(3)[::-1])
    np.testing.assert_allclose(out, flipped[::-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field", [dict(remat=True), dict(dtype="bfloat16")])
def test_fields_of_execution_do_not_change_the_function(field: dict) -> None:
    net, other = UNet(**SMALL), UNet(**dict(SMALL, **field))
    params = init(net, 8)
    inputs = (jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([-3.0, 5.0]), jnp.array([1, -1]))
    out, out_other = (jax.jit(n.apply, compiler_options=QUICK)({"params": params}, *inputs) for n in (net, other))
    assert out_other.dtype == jnp.float32
    assert relative(out_other, np.asarray(out)) < (0.03 if "dtype" in field else 1e-6)


def test_an_untrained_network_returns_zero() -> None:
    """Every branch and the output end in a layer that starts at zero."""
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
def test_what_cannot_be_built_says_why(fields: dict, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init(UNet(**dict(SMALL, **fields)), size)


# ADM's discrete time


def test_adm_cosine_table_telescopes() -> None:
    """ᾱ_t is f((t + 1) / 1000) / f(0) for f(s) = cos²(…) as long as no β is clipped, which is the last one alone."""
    f = np.cos((np.arange(1, 1000) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    table = adm.logsnr_table("cosine")
    np.testing.assert_allclose(table[:-1], np.log(f / (1 - f)), rtol=1e-9)
    last = f[-1] * 0.001
    np.testing.assert_allclose(table[-1], np.log(last / (1 - last)), rtol=1e-9)


def test_adm_linear_table_is_the_product() -> None:
    alpha_bar = 1.0
    for t in range(1000):
        alpha_bar *= 1.0 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert adm.logsnr_table("linear")[t] == pytest.approx(np.log(alpha_bar / (1.0 - alpha_bar)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_adm_time_and_logsnr_are_inverses(schedule: str) -> None:
    """Between steps too. Near the ends of the cosine schedule λ moves by whole units a step, elsewhere by 0.005."""
    t = jnp.linspace(0.0, 999.0, 4001)
    np.testing.assert_allclose(adm.adm_time(adm.adm_logsnr(t, schedule), schedule), t, atol=2e-3)
    table = adm.logsnr_table(schedule)
    logsnr = jnp.linspace(table[-1], table[0], 4001)
    np.testing.assert_allclose(adm.adm_logsnr(adm.adm_time(logsnr, schedule), schedule), logsnr, atol=1e-3)
    np.testing.assert_allclose(adm.adm_time(jnp.float32(table), schedule), np.arange(1000), atol=1e-3)
    assert (np.diff(table) < 0).all()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_adm_time_stays_at_the_ends_of_its_table(schedule: str) -> None:
    np.testing.assert_array_equal(adm.adm_time(jnp.array([-30.0, 30.0]), schedule), [999.0, 0.0])
    ends = adm.logsnr_table(schedule)[[0, -1]]
    np.testing.assert_allclose(adm.adm_logsnr(jnp.array([-5.0, 2000.0]), schedule), ends, rtol=1e-6)


def test_cosine_time_is_the_schedules_own() -> None:
    """λ(u) of the untruncated schedule is −2 log tan(π u / 2), and the time is 1000 u."""
    u = np.linspace(0.001, 0.999, 99)
    logsnr = jnp.float32(-2.0 * np.log(np.tan(np.pi * u / 2.0)))
    np.testing.assert_allclose(cosine_time(logsnr), 1000.0 * u, rtol=1e-4)
    np.testing.assert_array_equal(cosine_time(logsnr), network_time(logsnr, "cosine"))


def test_adm_schedule_of_another_name() -> None:
    with pytest.raises(ValueError, match="'sigmoid'"):
        adm.logsnr_table("sigmoid")
