"""The input w of a network adds nothing at w = 0, and a multiple of w in the last layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from cfd.networks.unet import UNet
from cfd.networks.weight import Weight, WeightedSum, is_of_weight

FIELDS: dict[str, Any] = dict(
    image_size=4,
    num_classes=3,
    base_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    head_channels=32,
)
INPUTS = (jax.random.normal(jax.random.key(1), (2, 4, 4, 1)), jnp.array([-3.0, 2.0]), jnp.array([0, 2]))


@pytest.fixture(scope="module")
def params():
    """Parameters of a student, of which none is 0."""
    shapes = jax.eval_shape(UNet(**FIELDS, weight_range=(-0.5, 4.0)).init, jax.random.key(0), *INPUTS, w=jnp.ones(2))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.float32(0.3 * rng.normal(size=x.shape)), shapes["params"])


@jax.jit
def evaluate(params, w):
    return UNet(**FIELDS, weight_range=(-0.5, 4.0)).apply({"params": params}, *INPUTS, w=w)


def student(params, w):
    return evaluate(params, jnp.float32(w))


def test_at_zero_the_student_is_the_network_without_the_input(params):
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    own: Any = unflatten_dict({key: x for key, x in flat.items() if not is_of_weight(key)}, sep="/")
    plain = jax.eval_shape(UNet(**FIELDS).init, jax.random.key(0), *INPUTS)
    assert jax.tree.structure(plain["params"]) == jax.tree.structure(own)
    assert not is_of_weight("weighted/kernel") and not is_of_weight("norm/weights")
    expected = jax.jit(UNet(**FIELDS).apply)({"params": own}, *INPUTS)
    np.testing.assert_allclose(student(params, [0.0, 0.0]), expected, atol=5e-5)
    mixed = student(params, [0.0, 2.0])
    np.testing.assert_allclose(mixed[0], expected[0], atol=5e-5)
    assert abs(mixed[1] - expected[1]).max() > 1e-2


def test_the_last_layer_alone_is_linear_in_w(params):
    blocks = {key: x for key, x in flatten_dict(params).items() if key[0] != "weight_out" and "map" in key}
    params = unflatten_dict({**flatten_dict(params), **jax.tree.map(jnp.zeros_like, blocks)})
    zero, one, other = (student(params, w) for w in ([0.0, 0.0], [1.0, 1.0], [-0.5, 3.0]))
    slope = one - zero
    assert abs(slope).max() > 1e-2
    np.testing.assert_allclose(other - zero, jnp.array([-0.5, 3.0]).reshape(2, 1, 1, 1) * slope, rtol=1e-4, atol=1e-5)


def test_a_weighted_sum_is_y_plus_the_gate_times_a_matrix():
    y, x = jnp.arange(6.0).reshape(2, 3), jnp.array([[1.0, -1.0], [2.0, 0.5]])
    matrix = jnp.array([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]])
    weight = Weight(jnp.array([1.0, -0.5]), jnp.array([0.5, -1.0 / 3.0]), x)
    total: Any = WeightedSum("float32").apply({"params": {"map": {"kernel": matrix}}}, y, weight)
    expected = np.array([[0.25, 2.0, 4.0], [3.0 - 2.25 / 3.0, 4.0 - 4.0 / 3.0, 5.0 - 5.5 / 3.0]])
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_w_and_its_range_belong_together(params):
    for fields, w in ((FIELDS, jnp.ones(2)), (dict(FIELDS, weight_range=(-0.5, 4.0)), None)):
        with pytest.raises(ValueError, match="w is "):
            UNet(**fields).apply({"params": params}, *INPUTS, w=w)
