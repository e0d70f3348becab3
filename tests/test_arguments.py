"""Numbers of every type are checked where they are known, and what a seed draws does not depend on JAX's settings."""

import re
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from recursion import jaxtyping_off

from cfd import distillation, flow, guidance, likelihood, losses, process, reuse, rules, steps, tilt
from cfd.arguments import check_numbers, concrete, is_zero, threefry

THREEFRY = "threefry2x32"


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, np.asarray, jnp.float32, jnp.bfloat16])
def test_a_number_of_any_type_is_concrete(kind):
    assert concrete(kind(0.5)) == 0.5 and concrete([kind(0.5), 1]).tolist() == [0.5, 1.0]  # pyright: ignore
    assert is_zero(kind(0.0)) and not is_zero(kind(0.5)) and not is_zero(np.zeros(2))
    with pytest.raises(ValueError, match=r"x is 0\.5; give 1"):
        check_numbers("x", kind(0.5), lambda x: x == 1.0, "give 1")
    with pytest.raises(ValueError, match=r"x is 0\.5 at index 1; give 1"):
        check_numbers("x", [1.0, kind(0.5)], lambda x: x == 1.0, "give 1")


@pytest.mark.parametrize("value", [True, np.True_, np.ones(2, bool), "1", 1j, None, object()])
def test_what_is_no_real_number_is_refused(value):
    with pytest.raises(ValueError, match=r"x is .*; give a number"):
        check_numbers("x", value, lambda x: x == x, "give a number")


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
def test_traced_numbers_and_functions_are_not_checked(transform):
    def f(x):
        for value in (x, [1.0, x], lambda logsnr: logsnr):
            assert concrete(value) is None and check_numbers("x", value, lambda _: False, "") is None
            assert not is_zero(value)
        return x

    transform(f)(jnp.float32([1.0]) if transform is jax.vmap else jnp.float32(1.0))


class Reached(Exception):
    """Raised where a number was accepted and the network is evaluated."""


def reached(*_):
    raise Reached


KEY, X, LABELS = jax.random.key(0), jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
CONDITIONS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
LARGE: dict[str, Any] = {
    "eta": lambda x: rules.apg(x, 1.0, 0.0),
    "momentum": lambda x: rules.apg(0.0, 1.0, x),
    "alpha": lambda x: rules.power_law(x),
    "temperature": lambda x: rules.feedback(0.5, x, 0.0, 1.0),
    "offset": lambda x: rules.feedback(0.5, 1.0, x, 1.0),
    "noise": lambda x: rules.cads(reached, 0.0, 1.0, x, 0.0),
    "w": lambda x: guidance.guide(X, X, x),
    "w of a function": lambda x: rules.constant(x),
    "rate": lambda x: rules.exponential(1.0, x, 0.0),
    "logsnr": lambda x: rules.exponential(1.0, 1.0, x),
    "w_inside": lambda x: rules.negative_window(1.0, x, 0.0, 1.0),
    "logsnr_lo": lambda x: rules.ramp(1.0, x, 0.0),
    "logsnr_hi": lambda x: rules.middle(1.0, 0.0, x),
    "logsnr_hi - logsnr_lo": lambda x: rules.middle(1.0, -x / 3.0, x / 3.0),
    "cosine": lambda x: reuse.similar(x, 2),
    "v": lambda x: steps.ancestral(x),
    "c": lambda x: steps.check_corrector(steps.Langevin(x)),
    "logsnr_max": lambda x: process.cosine(0.0, x),
    "mean": lambda x: process.log_normal(0.0, 1.0, mean=x),
    "std": lambda x: process.log_normal(0.0, 1.0, std=x),
    "churn": lambda x: tilt.tilted_sample(KEY, reached, 0, (3,), w=1.0, num_particles=2, num_steps=3, churn=x),
    "bias": lambda x: losses.sigmoid_weight(process.cosine(), x),
    "weight": lambda x: losses.variance_loss(KEY, reached, X, LABELS, logsnr=[0.0, 1.0], weight=x),
    "variance": lambda x: likelihood.gaussian_decoder(x),
    "weights": lambda x: distillation.distillation_loss(KEY, reached, reached, X, LABELS, weights=(0.0, x)),
}
"""A call with each number of the mathematics, by its name in the message."""
SMALL: dict[str, Any] = {
    "norm": lambda x: rules.apg(0.0, x, 0.0),
    "w_max": lambda x: rules.feedback(0.5, 1.0, 0.0, x),
    "logsnr_hi - logsnr_lo": lambda x: rules.ramp(1.0, 0.0, x),
    "c": LARGE["c"],
    "std": LARGE["std"],
    "churn": LARGE["churn"],
    "variance": LARGE["variance"],
}


SCALARS: dict[str, Any] = {
    **{name: LARGE[name] for name in ("eta", "momentum", "alpha", "temperature", "offset", "noise", "c", "cosine")},
    **{name: LARGE[name] for name in ("mean", "std", "churn", "bias", "weight", "variance")},
    "norm": SMALL["norm"],
    "w_max": SMALL["w_max"],
    "pi": lambda x: rules.feedback(x, 1.0, 0.0, 1.0),
    "phi": rules.rescale,
    "zero_until": rules.cfg_zero_star,
    "psi": lambda x: rules.cads(reached, 0.0, 1.0, 0.1, x),
    "eta of ddim": steps.ddim,
    "logsnr_lo": lambda x: guidance.check_weight(guidance.Interval(1.0, x, 2.0)),
    "ess_fraction": lambda x: tilt.tilted_sample(
        KEY, reached, 0, (3,), w=1.0, num_particles=2, num_steps=3, ess_fraction=x
    ),
}
"""A call with each number of which there is one for all images."""


@pytest.mark.parametrize("name", SCALARS)
def test_an_array_in_place_of_one_number_is_refused_traced_or_not(name):
    """It would be broadcast over the channels of the images if there are as many of them as numbers."""
    message = rf"{name.removesuffix(' of ddim')} has shape \(2,\); it is one number: .*give "
    with jaxtyping_off(), pytest.raises(ValueError, match=message):
        SCALARS[name](np.full(2, 0.5, np.float32))
    with jaxtyping_off(), pytest.raises(ValueError, match=message):
        jax.eval_shape(SCALARS[name], jax.ShapeDtypeStruct((2,), jnp.float32))


@pytest.mark.parametrize("name", LARGE)
def test_numbers_that_are_infinite_in_float32_are_refused(name):
    # The ends of the window are finite there, at 3e38, and their difference is not.
    for number in (9e38, np.float64(9e38), -9e38):
        with pytest.raises(
            ValueError,
            match=rf"{re.escape(name.removesuffix(' of a function'))} (is )?-?(9|6|5[.]9*5)e\+38[;:] .*give ",
        ):
            LARGE[name](number)


@pytest.mark.parametrize("name", SMALL)
def test_numbers_that_are_0_in_float32_are_refused_where_0_is(name):
    for number in (1e-50, np.float64(1e-50)):
        with pytest.raises(ValueError, match=re.escape(name) + r" is 1e-50; .*give "):
            SMALL[name](number)


def test_numbers_are_compared_as_float32():
    """1 + 1e-9 is 1 there, and two λ that round to the same one make no grid."""
    steps.ancestral(1.0 + 1e-9)
    for grid in ([1.0, 1.0 + 1e-9], np.array([1.0, 1.0 + 1e-9])):
        with pytest.raises(ValueError, match="each larger than the one before"):
            steps.schedule(grid)
        with pytest.raises(ValueError, match="a flow goes one way"):
            flow.flow(reached, X, LABELS, logsnr=grid)


@pytest.mark.parametrize("count", [2**31, 2**40])
def test_counts_beyond_int32_are_refused(count):
    for call in (reuse.every, steps.schedule, lambda n: steps.check_corrector(steps.Langevin(0.1, n))):
        with pytest.raises(ValueError, match=rf"is {count}; it is a count: give an integer \w+ >= 1 and < 2\^31"):
            call(count)
    assert reuse.every(2**31 - 1).k == 2**31 - 1


# Keys


def draw(key):
    return np.asarray(jax.random.normal(key, (3,)))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg", THREEFRY])
@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_a_seed_draws_the_same_whatever_the_implementation(impl, seed):
    expected = draw(jax.random.key(seed, impl=THREEFRY))
    key = jax.random.key(seed, impl=impl)
    kinds: tuple[Any, ...] = (key, jax.random.key_data(key), np.asarray(jax.random.key_data(key)))
    for given in kinds:
        with jaxtyping_off():
            np.testing.assert_array_equal(draw(threefry(given)), expected)
            np.testing.assert_array_equal(jax.jit(lambda given: draw_traced(threefry(given)))(given), expected)


def draw_traced(key):
    return jax.random.normal(key, (3,))


def test_keys_that_rbg_derives_are_those_of_threefry():
    rbg, fry = (jax.random.key(7, impl=impl) for impl in ("rbg", THREEFRY))
    for derive in (lambda key: jax.random.fold_in(key, 3), lambda key: jax.random.split(key, (2, 3))):
        of_rbg, of_fry = (jax.random.key_data(threefry(derive(key))) for key in (rbg, fry))
        np.testing.assert_array_equal(of_rbg, of_fry)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_a_row_of_keys_draws_what_it_draws_alone(impl):
    """JAX itself draws all rows of such keys from the first one."""
    keys = jax.random.split(jax.random.key(2, impl=impl), 4)
    together = jax.vmap(lambda key: draw_traced(threefry(key)))(keys)
    for key, numbers in zip(keys, together, strict=True):
        np.testing.assert_array_equal(numbers, draw(threefry(key)))
    assert len(np.unique(together)) == 12


def test_labels_and_conditions_do_not_depend_on_the_implementation():
    labels, impl = jnp.arange(5), "rbg"
    expected = rules.other_labels(jax.random.key(4, impl=THREEFRY), labels, 5)
    np.testing.assert_array_equal(rules.other_labels(jax.random.key(4, impl=impl), labels, 5), expected)

    def noised(name):
        seeds = jax.random.key_data(jax.random.split(jax.random.key(4, impl=name), 3))
        return rules.cads(lambda z, logsnr, c: c, -2.0, 2.0, 0.5, 1.0)(
            jnp.zeros((3, 1)), jnp.zeros(3), (CONDITIONS, seeds)
        )

    expected = noised(THREEFRY)
    with jax.default_prng_impl(impl):
        np.testing.assert_array_equal(noised(impl), expected)


def test_a_key_of_another_implementation_is_refused():
    own = jax.extend.random.define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jnp.zeros(2, jnp.uint32),
        split=lambda key, shape: jnp.zeros((*shape, 2), jnp.uint32),
        random_bits=lambda key, width, shape: jnp.zeros(shape, jnp.uint32),
        fold_in=lambda key, data: key,
        name="own",
        tag="own",
    )
    with pytest.raises(ValueError, match=rf'implementation own.*jax\.random\.key\(seed, impl="{THREEFRY}"\)'):
        threefry(jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl=own))


@pytest.mark.parametrize("key", [3, np.int64(3), "3", None, jnp.zeros(2), jnp.zeros(3, jnp.uint32), np.arange(2)])
def test_what_is_no_key_is_refused(key):
    with jaxtyping_off(), pytest.raises(ValueError, match=r"key is .*jax\.random\.key\(\d\)"):
        threefry(key)


def test_another_meaning_of_all_seeds_is_refused():
    with (
        jax.threefry_partitionable(False),
        pytest.raises(ValueError, match=r'jax\.config\.update\("jax_threefry_partitionable", True\)'),
    ):
        threefry(jax.random.key(0))
