"""`guided_sample` inside a caller's jit, vmap, grad, pmap and shard_map, and the arguments that it refuses."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax_settings import jax_setting
from recursion import (
    KEY,
    LABELS,
    constant,
    exact_gaussian_samples,
    image_keys,
    jaxtyping_off,
    linear,
    network,
    noise_of_images,
    sample,
    sampler_of,
)

from cfd.guidance import Interval, classifier_guidance, shift_mean
from cfd.reuse import Reuse
from cfd.rules import Rule, cfgpp, dynamic_threshold, stateless
from cfd.sampling import SecondOrder, ancestral, ddim, dpm_solver, guided_sample, schedule

# Transformations


def test_the_sampler_is_one_loop():
    def loops(jaxpr) -> list[str]:
        found = []
        for eqn in jaxpr.eqns:
            found += [eqn.primitive.name] * (eqn.primitive.name in ("scan", "while"))
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    found += loops(getattr(inner, "jaxpr", inner))
        return found

    for w in (0.0, 1.0, Interval(1.0, -3.0, 3.0)):
        closed = jax.make_jaxpr(lambda key, w=w: guided_sample(key, network, LABELS, (3,), w=w, num_steps=64))(KEY)
        assert loops(closed.jaxpr) == ["scan"]


def test_the_program_does_not_read_labels_that_the_network_ignores():
    embeddings = jnp.ones((8, 50))
    closed = jax.make_jaxpr(lambda key, text: guided_sample(key, lambda z, *_: 0.5 * z, text, (3,)))(KEY, embeddings)
    assert not any(operand is closed.jaxpr.invars[1] for eqn in closed.jaxpr.eqns for operand in eqn.invars)


def test_vmap_over_keys():
    keys = jax.random.split(KEY, 3)
    many = jax.jit(jax.vmap(sample, (0, None, None)))(keys, LABELS, 0.5)
    assert many.shape == (3, 8, 3)
    for key, images in zip(keys, many, strict=True):
        np.testing.assert_allclose(images, sample(key, LABELS, 0.5), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_recursion():
    """d(sum of the images) / d(w, v, λ_max) in reverse mode equals central differences of the float64 recursion."""

    def total(w, v, logsnr_max):
        sampler = {"sampler": ancestral(v), "logsnr_max": logsnr_max}
        return jnp.sum(guided_sample(KEY, linear, LABELS, (3,), w=w, num_steps=16, clip=False, **sampler))

    def exact(w, v, logsnr_max):
        settings = {"v": v, "logsnr_max": logsnr_max, "num_steps": 16}
        return exact_gaussian_samples(noise_of_images(), LABELS, constant(w), **settings).images.sum()

    at, h = np.array([0.5, 0.3, 12.0]), 1e-4
    difference = [(exact(*(at + h * axis)) - exact(*(at - h * axis))) / (2 * h) for axis in np.eye(3)]
    with jaxtyping_off():
        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*at.tolist())
    np.testing.assert_allclose(gradient, difference, rtol=2e-3)


def test_eight_devices_equal_one():
    """In a caller's own pmap and shard_map with one image per device, and in jit with sharded arguments."""
    keys = image_keys(8)
    expected = sample(keys, LABELS, 0.7)

    mapped = jax.pmap(sample, in_axes=(0, 0, None))(keys[:, None], LABELS[:, None], 0.7)
    assert len(mapped.sharding.device_set) == 8
    np.testing.assert_allclose(mapped[:, 0], expected, rtol=1e-5, atol=1e-6)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), P("data"), P())
    sharded = jax.jit(jax.shard_map(sample, mesh=mesh, in_specs=specs, out_specs=P("data")))
    everywhere = Interval(jnp.float32(0.7), jnp.float32(-30), jnp.float32(30))
    np.testing.assert_allclose(sharded(keys, LABELS, everywhere), expected, rtol=1e-5, atol=1e-6)

    on_mesh = jax.device_put((keys, LABELS), jax.NamedSharding(mesh, P("data")))
    np.testing.assert_allclose(sample(*on_mesh, 0.7), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", [ancestral(0.3), dpm_solver()], ids=["ancestral", "dpm_solver"])
@pytest.mark.parametrize("specs", [(P(), P("data"), P()), (P(), P(), P("data"))], ids=["labels", "w"])
def test_a_replicated_key_in_shard_map(specs, sampler):
    """If only the labels, or only w, are divided over the devices, each device samples as it would alone."""

    @jax.jit
    def four(key, labels, w):
        return guided_sample(key, network, labels[:4], (3,), w=w[:4], num_steps=4, sampler=sampler)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    arguments = (KEY, LABELS.at[:4].set(-1), jnp.linspace(0.0, 3.0, 8))
    images = jax.jit(jax.shard_map(four, mesh=mesh, in_specs=specs, out_specs=P("data")))(*arguments)
    for rows in (slice(4), slice(4, 8)):
        own = [x[rows] if spec == P("data") else x for x, spec in zip(arguments, specs, strict=True)]
        np.testing.assert_allclose(images[rows], four(*own), rtol=1e-5, atol=1e-6)


def test_strict_promotion_and_float32_under_x64():
    for w in (0.0, 0.5, Interval(0.5, -1.0, 1.0)):
        for rule in (ancestral(0.3), ddim(), dpm_solver()):
            with jax.numpy_dtype_promotion("strict"):
                images = jax.eval_shape(sampler_of(network, sampler=rule), KEY, LABELS, w)
            assert images.dtype == jnp.float32
    with jax_setting("jax_enable_x64", True):
        images = jax.eval_shape(lambda key: guided_sample(key, network, LABELS, (3,), w=0.5, num_steps=2), KEY)
    assert images.dtype == jnp.float32


def test_a_bfloat16_network_gives_float32_images():
    def half(z, logsnr, labels):
        return network(z, logsnr, labels).astype(jnp.bfloat16)

    for w in (0.0, 0.5):
        images = jax.eval_shape(lambda key, w=w: guided_sample(key, half, LABELS, (3,), w=w, num_steps=2), KEY)
        assert images.dtype == jnp.float32


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0.*num_steps >= 1"),
        ({"num_steps": -3}, "num_steps is -3"),
        ({"num_steps": 2.5}, "num_steps is 2.5.*give an integer"),
        ({"logsnr_min": 20.0, "logsnr_max": -20.0}, "logsnr_min is 20.0 and logsnr_max -20.0"),
        ({"logsnr_min": -math.inf}, r"logsnr_min is -inf.*in \[-80, 80\]"),
        ({"logsnr_max": 90.0}, r"logsnr_max 90.0.*in \[-80, 80\]"),
        ({"num_steps": np.float32(4)}, "num_steps is 4.0.*give an integer"),
        ({"num_steps": np.int64(0)}, "num_steps is 0"),
        ({"num_steps": True}, "num_steps is True"),
        ({"num_steps": "16"}, "num_steps is '16'; it is a count: give an integer"),
        ({"shape": (-3,)}, r"shape is \(-3,\); it is that of one image.*give integers >= 1, such as \(8, 8, 1\)"),
        ({"shape": (0,)}, r"shape is \(0,\); it is that of one image"),
        ({"shape": (3.0,)}, r"shape is \(3\.0,\); it is that of one image"),
        ({"shape": None}, "shape is None; it is that of one image"),
        ({"shape": "3"}, "shape is '3'; it is that of one image"),
        ({"logsnr_min": np.float32(20), "logsnr_max": np.float32(-20)}, "logsnr_min is 20.0 and logsnr_max -20.0"),
        ({"logsnr_min": jnp.float32(math.nan)}, "logsnr_min is nan"),
        ({"w": math.nan}, "w is nan.*finite"),
        ({"w": np.float32(math.nan)}, "w is nan.*finite"),
        ({"w": jnp.full(8, math.inf)}, "w is inf at index 0.*finite"),
        ({"w": [0.0] * 7 + [math.nan]}, "w is nan at index 7.*finite"),
        ({"w": True}, "w is True.*finite"),
        ({"w": "1"}, "w is '1'.*finite"),
        ({"w": Interval(1.0, 3.0, -3.0)}, r"logsnr_lo=3.0.*give logsnr_lo <= logsnr_hi"),
        ({"w": jnp.ones(3)}, r"w has shape \(3,\).*\(8,\)"),
        ({"w": jnp.ones((8, 1))}, r"w has shape \(8, 1\)"),
        ({"w": lambda logsnr: jnp.ones(2)}, r"w has shape \(2,\)"),
        ({"w": Interval(jnp.ones(5), -1.0, 1.0)}, r"w has shape \(5,\)"),
        ({"labels": [0, 1]}, r"labels have leading shapes .*\[B, \.\.\.\].*jnp\.array\(\[0, 1\]\)"),
        ({"labels": 3}, "labels have leading shapes"),
        ({"labels": {}}, "labels have leading shapes"),
        ({"labels": {"a": jnp.zeros(2), "b": jnp.zeros(3)}}, r"labels have leading shapes \[\(2,\), \(3,\)\]"),
        ({"key": jax.random.split(KEY, 3)}, r"key has batch shape \(3,\) for 8 images"),
        ({"key": 0}, r"key is 0.*jax\.random\.key\(0\)"),
        ({"sampler": "ddim"}, r"sampler is 'ddim'.*such as the result of ancestral\(v\) or ddim\(\)"),
        ({"sampler": ddim}, r"sampler is ddim, which was not called: give sampler=ddim\(eta\)"),
        ({"sampler": SecondOrder(dpm_solver())}, "sampler is SecondOrder.*give a step rule"),  # pyright: ignore
        ({"null": {"text": jnp.zeros(4)}}, "null is .*must have the structure of labels"),
        ({"labels": {"text": jnp.zeros((8, 4))}}, "null is -1.*must have the structure of labels"),
        ({"labels": jnp.zeros((8, 4))}, r"null has shape \(\).*one label, \(4,\)"),
        ({"labels": LABELS.astype(jnp.uint8)}, "null is -1, which labels of dtype uint8 cannot represent.*int32"),
        ({"eps_fn": lambda z, *_: z[:, :1]}, r"eps_fn returned shape \(8, 1\).*\(8, 3\)"),
        ({"eps_fn": lambda z, *_: (z, z, z)}, r"eps_fn returned a tuple.*the noise of z.*\(8, 3\)"),
        ({"eps_fn": lambda z, *_: {"sample": z}}, "eps_fn returned a dict.*the noise of z"),
        ({"eps_fn": lambda z, *_: z.astype(jnp.int32)}, "eps_fn returned dtype int32.*float32"),
        ({"w": lambda logsnr: Interval(1.0, -1.0, 1.0)}, r"w is a function that returned Interval.*a number or \[B\]"),
        ({"eps_fn": None}, r"eps_fn is None; give a function \(z, logsnr, labels\)"),
        ({"guide": "runs/digits"}, "guide is 'runs/digits'; give a function"),
        ({"rule": cfgpp}, r"rule is cfgpp, which was not called: give rule=cfgpp\(\)"),
        ({"rule": "apg"}, r"rule is 'apg'; give the result of a function of cfd.rules, such as cfgpp\(\)"),
        ({"rule": Rule(lambda z: (), lambda *given: given[:2])}, r"rule.mix returned no triple.*\(z, ε̃, state\)"),
        ({"rule": stateless(lambda z, c, *_: (z, c[:, :1]))}, r"rule.mix returned shape \(8, 1\).*\(8, 3\)"),
        ({"rule": Rule(lambda z: (), lambda *given: given[1])}, "rule.mix returned no triple"),
        ({"reuse": 4}, r"reuse is 4; give every\(k\)"),
        ({"reuse": Reuse(0)}, "k is 0; it is a count"),
        ({"clip": 0.5}, r"clip is 0.5; give True, False, or a function of x̃"),
        ({"clip": None}, "clip is None; give True"),
        ({"clip": dynamic_threshold}, r"clip is dynamic_threshold, which was .*clip=dynamic_threshold\(percentile\)"),
        ({"clip": lambda x: dynamic_threshold(99.5)}, "clip returned a function.*x̃ after its threshold"),
        ({"clip": lambda x: x[:, :1]}, r"clip returned shape \(8, 1\).*\(8, 3\)"),
        ({"sampler": lambda z, x, *_: x}, r"the step rule returned no pair.*\(mean, standard deviation"),
        ({"sampler": lambda z, x, *_: (x[:, :1], None)}, r"the step rule returned shape \(8, 1\).*\(8, 3\)"),
        ({"sampler": lambda z, x, *_: (x, jnp.ones(8))}, r"a std of shape \(8,\); give \[B, 1, \.\.\.\]"),
        (
            {"sampler": ancestral(jnp.full(7, 0.3))},
            r"\(7,\) numbers for an array of shape \(8, 3\): give one, or one per",
        ),
        ({"start": jnp.zeros((8, 2))}, r"start has dtype float32 and shape \(8, 2\).*\(8, 3\)"),
        ({"start": np.zeros}, r"start is .*zeros.*; it is z at the first λ: give float32 of shape \(8, 3\)"),
        ({"start": [[0, 0, 0]] * 8}, r"start has dtype int32 and shape \(8, 3\).*float32"),
        ({"key": np.int64(7)}, r"key is .*7.*jax\.random\.key\(7\)"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    arguments = {"key": KEY, "eps_fn": network, "labels": LABELS, "shape": (3,), "w": 0.5, "num_steps": 2} | arguments
    with jaxtyping_off(), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: guided_sample(**arguments))


def test_lists_of_numbers_are_arrays():
    def draw(**settings):
        return guided_sample(KEY, network, LABELS, (3,), num_steps=2, **settings)

    with jaxtyping_off():
        np.testing.assert_array_equal(draw(w=[0.5] * 8), draw(w=jnp.full(8, 0.5)))
        started = draw(w=0.5, start=np.ones((8, 3)).tolist())
    np.testing.assert_array_equal(started, draw(w=0.5, start=jnp.ones((8, 3))))


@pytest.mark.parametrize("v", [-0.1, 1.1, math.nan])
def test_v_outside_0_to_1_is_refused(v):
    with pytest.raises(ValueError, match=rf"v is {v}.*\[0, 1\]"):
        ancestral(v)


def test_numbers_of_any_type_mean_the_same():
    def draw(**settings):
        return jax.jit(lambda key: guided_sample(key, network, LABELS, (3,), **settings))(KEY)

    expected = draw(w=0.5, num_steps=3, logsnr_min=-9.0, logsnr_max=11.0)
    given = draw(w=np.float16(0.5), num_steps=np.int64(3), logsnr_min=np.float32(-9), logsnr_max=11)
    np.testing.assert_array_equal(given, expected)


# Intervals that no step falls into, and noise levels that the network does not know


def shape_of(transform, **arguments):
    """Traces the sampler inside a transformation, with arguments that stay concrete."""
    arguments = {"w": 1.0, "num_steps": 4, "eps_fn": network} | arguments
    draw = lambda keys, labels: guided_sample(keys, labels=labels, shape=(3,), **arguments)  # noqa: E731
    return jax.eval_shape(transform(draw), image_keys(8), LABELS)


def sharded(draw):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(draw, mesh=mesh, in_specs=P("data"), out_specs=P("data")))


TRANSFORMS = {"none": lambda draw: draw, "jit": jax.jit, "shard_map": sharded}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_an_interval_between_two_steps_is_refused(transform):
    """The four steps are at λ = −20, −1.0985, 1.0985 and 20."""
    for lo, hi, nearest in (
        (-1.0, 1.0, r"-1\.098"),
        (np.float32(-0.5), jnp.float32(1.0), r"1\.098"),
        (3.0, 15.0, r"1\.098"),
        (21.0, math.inf, "20:"),
    ):
        with pytest.raises(ValueError, match=rf"none of the 4 steps falls into the interval.*λ = {nearest}"):
            shape_of(transform, w=Interval(4.0, lo, hi))
        assert shape_of(transform, w=Interval(4.0, lo, hi), num_steps=64 if lo < 20 else 4, logsnr_max=23.0)


@pytest.mark.parametrize("ends", [(-20.0, 20.0), (-6.0, 4.0), (10.0, 20.0), (-80.0, 80.0)])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_an_interval_of_one_step_is_accepted(num_steps, ends):
    for logsnr in schedule(num_steps, *ends):
        w = Interval(4.0, logsnr, logsnr)
        assert shape_of(jax.jit, w=w, num_steps=num_steps, logsnr_min=ends[0], logsnr_max=ends[1])


def trained_network(z, logsnr, labels):
    return network(z, logsnr, labels)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_a_network_is_not_asked_outside_the_noise_levels_of_its_training(transform):
    """The remedies that the message names work: both ends, also in float32."""
    trained_network.logsnr_range = (-10.12, 9.21)  # pyright: ignore[reportFunctionMemberAccess]
    partial = jax.tree_util.Partial(trained_network)
    for eps_fn in (trained_network, partial, classifier_guidance(partial, lambda z, logsnr: z, 1.0)):
        for ends in (
            {},
            {"logsnr_min": np.float32(-10.12)},
            {"logsnr_max": 9.21},
            {"logsnr_min": -9, "logsnr_max": 12},
        ):
            with pytest.raises(ValueError, match=r"trained on λ in \[-10\.12, 9\.21\]: give logsnr_min=-10\.12 and"):
                shape_of(transform, eps_fn=eps_fn, **ends)
        for kind in (float, np.float32, jnp.float32):
            shape_of(transform, eps_fn=eps_fn, logsnr_min=kind(-10.12), logsnr_max=kind(9.21))
        shape_of(transform, eps_fn=eps_fn, logsnr_min=-3.0, logsnr_max=3.0)


def test_a_loaded_model_is_asked_inside_jit_too():
    """Its Partial is an argument of the jitted function."""
    trained_network.logsnr_range = (-10.0, 9.0)  # pyright: ignore[reportFunctionMemberAccess]
    draw = jax.jit(lambda eps_fn, **ends: guided_sample(KEY, eps_fn, LABELS, (3,), num_steps=2, **ends))
    with pytest.raises(ValueError, match=r"trained on λ in \[-10\.0, 9\.0\]"):
        draw(jax.tree_util.Partial(trained_network))


def test_the_import_is_light():
    heavy = ("tensorflow", "orbax", "grain", "tensorflow_datasets", "flax", "optax", "matplotlib", "sklearn")
    code = f"import sys, cfd.sampling; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_shift_mean_takes_a_step_rule():
    with jaxtyping_off(), pytest.raises(ValueError, match=r"sampler is SecondOrder.*give ancestral\(v\)"):
        shift_mean(dpm_solver(), lambda z, logsnr: z, LABELS, 1.0)  # pyright: ignore[reportArgumentType]
