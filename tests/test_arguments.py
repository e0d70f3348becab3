"""Numbers of every type are checked where they are known, and what a seed draws does not depend on JAX's settings."""

from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from recursion import jaxtyping_off

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
