"""The magnitude-preserving U-Net: magnitudes at initialisation, weight normalisation, its fields, and its ε."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adm_formula import relative
from jax_settings import jax_setting
from tiny import QUICK

from cfd.fields import FOREIGN
from cfd.guidance import NULL_LABEL
from cfd.networks.mp_unet import SIGMA_DATA, MPUNet, mp_concatenate, mp_silu, mp_sum, normalized, precondition
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


def shapes_of(net: MPUNet, size: int = 8, channels: int = 3) -> Any:
    inputs = (jnp.zeros((1, size, size, channels)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    return jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]


@functools.cache
def random_params() -> Any:
    """Random values for all parameters of SMALL, also for the gains, which are initialised to zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes_of(MPUNet(**SMALL)))


@functools.cache
def small() -> Any:
    """The jitted function (params, z, logsnr, labels) -> ε of SMALL."""
    net: Any = MPUNet(**SMALL)
    return jax.jit(lambda params, *inputs: net.apply({"params": params}, *inputs), compiler_options=QUICK)


def inputs_of(batch: int = 3) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(z, logsnr, labels), with the null label in the last row."""
    z = jax.random.normal(jax.random.key(1), (batch, 8, 8, 3))
    return z, jnp.linspace(-3.0, 5.0, batch), jnp.arange(batch).at[-1].set(NULL_LABEL)


def mean_square(x: Any) -> float:
    return float(np.mean(np.square(np.asarray(x, np.float64))))


def test_the_parameter_counts_are_the_papers() -> None:
    """Table 2 of the paper has 125 M parameters for EDM2-XS and 280 M for EDM2-S on 64x64 maps with 1000 classes."""
    paper: dict[str, Any] = dict(channel_mult=(1, 2, 3, 4), num_res_blocks=3, attention_resolutions=(16, 8))
    for base_channels, millions in ((128, 125), (192, 280)):
        net = MPUNet(image_size=64, num_classes=1000, base_channels=base_channels, **paper)
        assert round(sum(x.size for x in jax.tree.leaves(shapes_of(net, 64))) / 1e6) == millions


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_silu_sum_and_concatenation_preserve_the_mean_square(t: float) -> None:
    """Of independent standard normal inputs, by quadrature for SiLU and by a large sample for the others."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    silu = np.asarray(mp_silu(jnp.float32(nodes)), np.float64)
    assert np.sum(weights * silu**2) / weights.sum() == pytest.approx(1.0, abs=2e-3)
    a, b = (jax.random.normal(jax.random.key(i), (8, 32, 32, n)) for i, n in enumerate((16, 48)))
    assert mean_square(mp_sum(a, b[..., :16], t)) == pytest.approx(1.0, abs=0.02)
    both = mp_concatenate(a, b)
    assert both.shape[-1] == 64 and mean_square(both) == pytest.approx(1.0, abs=0.02)
    # Each input gives half of the sum of squares, although one has three times the channels of the other.
    assert np.sum(np.square(both[..., :16])) == pytest.approx(np.sum(np.square(both[..., 16:])), rel=0.02)


def test_blocks_have_unit_variance_at_initialisation() -> None:
    """The root mean square after each block and layer, to 5 %, over eight initialisations, for inputs of mean square 1.

    The pixels of an image are equal, because a mean over different positions, as attention takes it, is smaller. The
    zeros around an image lower the magnitude too, and therefore only its middle is measured.
    """
    fields: dict[str, Any] = dict(base_channels=64, channel_mult=(1, 2), attention_resolutions=(16,), image_size=32)
    net = MPUNet(**SMALL | fields)
    z = jax.random.normal(jax.random.key(0), (4, 1, 1, 15))
    z = z / jnp.sqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True))
    # At λ = -20, the preconditioning leaves z as it is.
    inputs = jnp.broadcast_to(z, (4, 32, 32, 15)), jnp.full(4, -20.0), jnp.arange(4)

    def activations(key: jax.Array) -> Any:
        params = net.init(key, *inputs)["params"]
        _, seen = net.apply({"params": params}, *inputs, capture_intermediates=True, mutable=["intermediates"])
        found = {"/".join(str(k.key) for k in at[:-2]): x for at, x in _leaves(seen["intermediates"])}
        return {name: jnp.mean(jnp.square(x[:, x.shape[1] // 2, x.shape[2] // 2])) for name, x in found.items()}

    measure = jax.jit(activations, compiler_options=QUICK)
    seeds = [measure(key) for key in jax.random.split(jax.random.key(2), 8)]
    mean_squares = {name: np.mean([seed[name] for seed in seeds]) for name in seeds[0]}
    blocks = {"down_0_0", "down_0_sample", "down_1_0", "mid_0", "mid_1", "up_1_0", "up_1_1", "up_1_sample"}
    blocks |= {"up_0_0", "up_0_1", "conv_in", "embed/time", "embed"}
    for name in sorted(blocks):
        assert mean_squares[name] ** 0.5 == pytest.approx(1.0, abs=0.05), name


def _leaves(seen: Any) -> Any:
    return [(at, x) for at, x in jax.tree_util.tree_flatten_with_path(seen)[0] if x.ndim == 4 and len(at) > 2]


def test_normalisation_is_idempotent_and_does_not_change_the_function() -> None:
    """Each output's weight vector has mean square 1, gains stay, and fresh weights are already normalised."""
    params, inputs = random_params(), inputs_of()
    once = normalized(params)
    for at, weight in jax.tree_util.tree_flatten_with_path(once)[0]:
        if weight.ndim > 1:
            mean = np.mean(np.square(np.asarray(weight, np.float64)), axis=tuple(range(weight.ndim - 1)))
            np.testing.assert_allclose(mean, 1.0, rtol=1e-5)
        else:
            assert "gain" in jax.tree_util.keystr(at)
    gains = [x for x in jax.tree.leaves(params) if x.ndim == 1]
    assert gains and all(map(np.array_equal, gains, [x for x in jax.tree.leaves(once) if x.ndim == 1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), once, normalized(once))
    assert not normalized({"kernel": jnp.zeros((3, 4))})["kernel"].any()

    def scaled(weight: jax.Array) -> jax.Array:
        factors = jnp.linspace(0.1, 30.0, weight.shape[-1]).reshape(*[1] * (weight.ndim - 1), -1)
        return weight * factors if weight.ndim > 1 else weight

    out = np.asarray(small()(params, *inputs))
    for other in (once, jax.tree.map(scaled, params)):
        assert relative(small()(other, *inputs), out) < 1e-5


def test_gradients_are_orthogonal_to_weight_vectors() -> None:
    """Therefore a step of gradient descent can only lengthen a weight vector: Section 2.3 of the paper."""
    net: Any = MPUNet(**SMALL)
    params, inputs = random_params(), inputs_of()
    target = jax.random.normal(jax.random.key(3), inputs[0].shape)

    def loss(params: Any) -> jax.Array:
        return jnp.mean(jnp.square(net.apply({"params": params}, *inputs) - target))

    gradients = jax.jit(jax.grad(loss), compiler_options=QUICK)(params)
    for weight, gradient in zip(jax.tree.leaves(params), jax.tree.leaves(gradients), strict=True):
        if weight.ndim == 1:
            assert abs(float(gradient[0])) > 0.0
            continue
        w, g = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (weight, gradient))
        lengths = np.linalg.norm(w, axis=0) * np.linalg.norm(g, axis=0)
        assert lengths.max() > 0.0
        np.testing.assert_array_less(np.abs(np.sum(w * g, axis=0)), 1e-4 * lengths.max())


def test_epsilon_is_that_of_the_paper_s_denoiser() -> None:
    """c_skip, c_out and c_in of Table 1 of arXiv:2206.00364, in float64, for the image z / α with noise e^{−λ/2}."""
    rng = np.random.default_rng(0)
    z, outputs = rng.normal(size=(2, 7, 4, 4, 3))
    logsnr = np.linspace(-9.0, 9.0, 7)[:, None, None, None]
    alpha, sigma = 1.0 / np.sqrt(1.0 + np.exp(-logsnr)), 1.0 / np.sqrt(1.0 + np.exp(logsnr))
    noise, noisy, data = np.exp(-logsnr / 2.0), z / alpha, 0.5
    c_skip, c_out = data**2 / (noise**2 + data**2), noise * data / np.sqrt(noise**2 + data**2)
    eps = (noisy - (c_skip * noisy + c_out * outputs)) / noise
    per_std = 1.0 / np.sqrt(sigma**2 + data**2 * alpha**2)
    np.testing.assert_allclose(per_std * z, noisy / np.sqrt(noise**2 + data**2), rtol=1e-12)
    given = (jnp.asarray(x, jnp.float32) for x in (z, outputs, alpha, sigma, per_std))
    np.testing.assert_allclose(precondition(*given), eps, rtol=2e-4, atol=2e-5)


def test_an_untrained_network_is_exact_for_normal_images() -> None:
    """E[ε | z] = σ z / (σ² + α² s²) for images N(0, s²), at both ends of λ too. s is 0.5, the paper's σ_data.

    The outputs of a learned variance have no such part: their gain of 0 shows. Fresh weights are normalised.
    """
    net: Any = MPUNet(**SMALL, out_channels=6)
    z, labels = jax.random.normal(jax.random.key(1), (5, 8, 8, 3)), jnp.arange(5) - 1
    logsnr = jnp.array([-20.0, -4.0, 0.0, 4.0, 20.0])
    fresh = jax.jit(net.init_with_output, compiler_options=QUICK)
    out, variables = fresh(jax.random.key(0), z, logsnr, labels)
    exact = np.asarray(logsnr, np.float64)[:, None, None, None]
    alpha, sigma = 1.0 / np.sqrt(1.0 + np.exp(-exact)), 1.0 / np.sqrt(1.0 + np.exp(exact))
    assert SIGMA_DATA == 0.5
    np.testing.assert_allclose(out[..., :3], sigma * z / (sigma**2 + 0.25 * alpha**2), rtol=1e-5)
    assert out.shape == (5, 8, 8, 6) and not out[..., 3:].any()
    params = variables["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), params, normalized(params))


def test_null_label_has_the_class_vector_zero() -> None:
    """∅ is equivalent to a class whose row of the table is zero."""
    params, (z, logsnr, _) = random_params(), inputs_of()
    table = params["embed"]["label"]["embedding"]
    zeroed = params | {"embed": params["embed"] | {"label": {"embedding": table.at[2].set(0.0)}}}
    null = small()(params, z, logsnr, jnp.full(3, NULL_LABEL))
    np.testing.assert_array_equal(null, small()(zeroed, z, logsnr, jnp.full(3, 2)))
    assert np.abs(null - small()(params, z, logsnr, jnp.full(3, 2))).max() > 0.01


def test_images_of_a_batch_do_not_affect_each_other_and_unknown_classes_are_nan() -> None:
    params, (z, logsnr, _) = random_params(), inputs_of()
    out = small()(params, z, logsnr, jnp.arange(3))
    flipped = small()(params, z[::-1], logsnr[::-1], jnp.arange(3)[::-1])
    np.testing.assert_allclose(out, flipped[::-1], rtol=1e-5, atol=1e-5)
    unknown = small()(params, z, logsnr, jnp.array([0, 4, NULL_LABEL]))
    assert jnp.isnan(unknown[1]).all() and jnp.isfinite(unknown[jnp.array([0, 2])]).all()
    np.testing.assert_array_equal(unknown[0], out[0])


@pytest.mark.parametrize("field", [dict(remat=True), dict(dtype="bfloat16")])
def test_remat_and_dtype_do_not_change_the_function(field: dict) -> None:
    other: Any = MPUNet(**dict(SMALL, **field))
    params, inputs = random_params(), inputs_of()
    out, out_other = small()(params, *inputs), jax.jit(other.apply, compiler_options=QUICK)({"params": params}, *inputs)
    assert out_other.dtype == jnp.float32
    assert relative(out_other, np.asarray(out)) < (0.05 if "dtype" in field else 1e-5)


def test_plain_layers_are_the_same_function_and_have_a_forward_mode() -> None:
    """The values agree; and ⟨J v, u⟩ = ⟨v, Jᵀ u⟩, with J the derivative of the plain form by z."""
    plain: Any = MPUNet(**SMALL, fast=False)
    params, (z, logsnr, labels) = random_params(), inputs_of()
    u, v = (jax.random.normal(jax.random.key(i), z.shape) for i in (3, 4))

    def function(z: jax.Array) -> Any:
        return plain.apply({"params": params}, z, logsnr, labels)

    def both(z: jax.Array) -> Any:
        out, pullback = jax.vjp(function, z)
        return out, jnp.vdot(jax.jvp(function, (z,), (v,))[1], u), jnp.vdot(pullback(u)[0], v)

    out, forward, reverse = jax.jit(both, compiler_options=QUICK)(z)
    assert relative(small()(params, z, logsnr, labels), np.asarray(out)) < 1e-5
    assert float(forward) == pytest.approx(float(reverse), rel=1e-4)


@pytest.mark.parametrize("fields", [dict(dtype="bfloat16", dropout=0.1, remat=True), dict(fast=False)])
def test_nothing_is_promoted_and_all_is_float32(fields: dict) -> None:
    """Under the strict promotion of dtypes, and with jax_enable_x64: parameters, outputs and gradients."""
    net: Any = MPUNet(**SMALL | fields)
    z, logsnr, labels = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2), jnp.zeros(2, jnp.int32)

    def loss(params: Any, z: jax.Array) -> jax.Array:
        key = jax.random.key(0)
        return jnp.sum(net.apply({"params": params}, z, logsnr, labels, train=True, rngs={"dropout": key}))

    with jax.numpy_dtype_promotion("strict"):
        params = shapes_of(net)
        jax.jit(jax.grad(loss)).lower(params, z)
    with jax_setting("jax_enable_x64", True):
        found = shapes_of(net), jax.eval_shape(jax.value_and_grad(loss, (0, 1)), params, z)
    assert {str(x.dtype) for x in jax.tree.leaves(found)} == {"float32"}


def test_fields_and_their_defaults_are_those_of_the_other_network() -> None:
    mine, theirs = ({name: f.default for name, f in net.__dataclass_fields__.items()} for net in (MPUNet, UNet))
    assert mine.items() <= theirs.items()
    assert set(theirs) - set(mine) == {"resblock_updown", "scale_shift_norm", *FOREIGN["mp"]} & set(theirs)
