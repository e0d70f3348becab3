"""Seeds: what they draw does not depend on the settings of JAX, or the setting is refused by its name."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import jax_setting

from cfd.devices import seeds


def draws() -> list[np.ndarray]:
    """Numbers of all kinds that the package draws, from the keys of two seeds, one by one and under `vmap`."""

    def draw(key: jax.Array) -> Any:
        key = jax.random.fold_in(key, 3)
        normal = jax.random.normal(jax.random.split(key)[0], (5,), jnp.float32)
        return normal, jax.random.uniform(key, (4,), jnp.float32), jax.random.bernoulli(key, 0.3, (64,))

    alone = [draw(seeds.key(seed)) for seed in (0, 7)]
    together = jax.jit(jax.vmap(lambda seed: draw(seeds.key(seed))))(jnp.array([0, 7], jnp.uint32))
    return [np.asarray(x) for x in jax.tree.leaves((alone, together))]


@pytest.fixture(scope="module")
def usual() -> list[np.ndarray]:
    return draws()


def test_a_seed_draws_what_it_draws_in_jax_by_default(usual: list[np.ndarray]) -> None:
    key = jax.random.split(jax.random.fold_in(jax.random.key(7), 3))[0]
    np.testing.assert_array_equal(usual[3], jax.random.normal(key, (5,)))
    for alone, together in zip(usual[:3], usual[6:], strict=True):
        np.testing.assert_array_equal(alone, together[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_default_prng_impl", "rbg"),
        ("jax_default_prng_impl", "unsafe_rbg"),
        ("jax_enable_custom_prng", True),
        ("jax_legacy_prng_key", "error"),
        ("jax_numpy_dtype_promotion", "strict"),
    ],
)
def test_a_seed_draws_the_same_under_other_settings(usual: list[np.ndarray], name: str, value: Any) -> None:
    with jax_setting(name, value):
        for one, other in zip(usual, draws(), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [("jax_threefry_partitionable", False), ("jax_random_seed_offset", 5), ("jax_enable_x64", True)],
)
def test_a_setting_that_changes_the_meaning_of_a_seed_is_refused_with_the_remedy(name: str, value: Any) -> None:
    with jax_setting(name, value):
        with pytest.raises(
            ValueError, match=rf"{name} is {value}, .* unset {name.upper()} in the environment"
        ) as error:
            seeds.key(0)
        (remedy,) = re.findall(r"jax\.config\.update\([^)]*\)", str(error.value))
        exec(remedy, {"jax": jax})
        seeds.key(0)


def test_a_setting_that_changes_the_meaning_of_a_seed_does_change_it() -> None:
    """The reason for refusing each of them: a plain key of JAX draws other numbers."""

    def plain() -> Any:
        key = jax.random.key(7, impl="threefry2x32")
        return np.asarray(jax.random.normal(key, (5,), jnp.float32)), np.asarray(jax.random.bernoulli(key, 0.5, (64,)))

    before = plain()
    for name, value, changed in (
        ("jax_threefry_partitionable", False, (True, True)),
        ("jax_random_seed_offset", 5, (True, True)),
        ("jax_enable_x64", True, (False, True)),
    ):
        with jax_setting(name, value):
            assert tuple((a != b).any() for a, b in zip(before, plain(), strict=True)) == changed
