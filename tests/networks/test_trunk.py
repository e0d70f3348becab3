"""A network whose class is seen from a level of the upward half on: both scores in one call, and who sees it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import EMITTERS

from cfd.attributes import joint_scores
from cfd.networks.model import build
from cfd.networks.unet import UNet
from cfd.sampling import guided_sample

FIELDS: dict[str, Any] = dict(
    num_classes=3, base_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(2,), head_channels=32
)
Z, LOGSNR = jax.random.normal(jax.random.key(0), (3, 4, 4, 1)), jnp.array([-3.0, 0.0, 5.0])
LABELS, NULLS = jnp.array([0, 1, 2], jnp.int32), jnp.array([-1, -1, 0], jnp.int32)


@functools.cache
def trained(label_from, **fields):
    """The network, and parameters none of which is 0."""
    net = UNet(image_size=4, label_from=label_from, **(FIELDS | fields))
    params = net.init(jax.random.key(1), Z, LOGSNR, LABELS)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    filled = [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return net, jax.tree.unflatten(tree, filled)


@pytest.mark.parametrize(("label_from", "dtype"), [(0, "float32"), pytest.param(1, "bfloat16", marks=pytest.mark.slow)])
def test_two_scores_of_a_trunk_are_two_evaluations_to_the_bit(label_from, dtype):
    net, params = trained(label_from, dtype=dtype, resblock_updown=label_from == 0)
    scores = functools.partial(net.apply, method="scores")
    both = jax.jit(scores, compiler_options=EMITTERS)(params, Z, LOGSNR, LABELS, NULLS)
    one = jax.jit(net.apply, compiler_options=EMITTERS)
    for ours, labels in zip(both, (LABELS, NULLS), strict=True):
        np.testing.assert_array_equal(ours, one(params, Z, LOGSNR, labels))
    assert np.abs(both[0] - both[1]).max() > 1e-3


def intermediate(net, params, labels):
    """The output of every residual block, by its name."""
    _, seen = net.apply(
        params, Z, LOGSNR, labels, capture_intermediates=lambda module, _: type(module).__name__ == "ResBlock"
    )
    return {name: np.asarray(value["__call__"][0]) for name, value in seen["intermediates"].items()}


@pytest.mark.parametrize(("label_from", "seeing"), [(-1, ""), (1, "up_"), (0, "up_0")])
def test_blocks_see_the_class_from_that_level_of_the_upward_half_on(label_from, seeing):
    net, params = trained(label_from)
    ours, theirs = (intermediate(net, params, labels) for labels in (LABELS, NULLS))
    assert ours.keys() == theirs.keys() and len(ours) == 10
    for name in ours:
        assert np.array_equal(ours[name], theirs[name]) != name.startswith(seeing), name


def test_the_parameters_are_those_of_a_network_without_a_trunk():
    jax.tree.map(np.testing.assert_array_equal, *(
        UNet(image_size=4, label_from=level, **FIELDS).init(jax.random.key(3), Z, LOGSNR, LABELS) for level in (-1, 0)
    ))  # fmt: skip


def test_both_scores_of_a_model_are_what_it_gives_for_each_label():
    """Of a network that predicts v and has a learned variance. The second score has none."""
    fields: dict[str, Any] = FIELDS | {"label_from": 0, "out_channels": 2, "predict": "v"}
    model, (_, params) = build(fields, 4, 1, variance=True), trained(0, out_channels=2)
    assert model.scores is not None and build(FIELDS, 4, 1).scores is None
    (eps, v), eps_null = model.scores(params["params"], Z, LOGSNR, LABELS, NULLS)
    for ours, theirs in zip((eps, v), model.apply(params["params"], Z, LOGSNR, LABELS), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(eps_null, model.apply(params["params"], Z, LOGSNR, NULLS)[0], atol=1e-6)


def test_the_sampler_asks_for_both_scores_at_once_and_draws_the_same_images():
    calls = []

    def eps_fn(scale, z, logsnr, labels):
        calls.append("one")
        return scale * z + labels[:, None]

    def scores(scale, z, logsnr, labels, nulls):
        calls.append("both")
        return scale * z + labels[:, None], scale * z + nulls[:, None]

    draw: Any = functools.partial(guided_sample, jax.random.key(4), labels=LABELS, shape=(2,), w=2.0, num_steps=3)
    two = draw(eps_fn=jax.tree_util.Partial(eps_fn, 0.5))
    assert set(calls) == {"one"}
    eps_fn.scores = scores  # pyright: ignore[reportFunctionMemberAccess]
    for given, expected in (({}, {"both"}), ({"w": 0.0}, {"one"}), ({"doubled": True}, {"one"})):
        calls.clear()
        images = draw(eps_fn=jax.tree_util.Partial(eps_fn, 0.5), **given)
        assert set(calls) == expected
        if given != {"w": 0.0}:
            np.testing.assert_allclose(images, two, atol=1e-5)


def test_a_wrapper_hides_the_function_that_gives_both_scores():
    def network(z, logsnr, labels):
        return z

    network.scores = lambda z, logsnr, labels, nulls: (z, z)  # pyright: ignore[reportFunctionMemberAccess]
    assert joint_scores(network) is network.scores  # pyright: ignore[reportFunctionMemberAccess]
    assert (
        joint_scores(functools.update_wrapper(lambda z, logsnr, labels: 2.0 * network(z, logsnr, labels), network))
        is None
    )
    assert joint_scores(lambda *given: network(*given)) is None


@pytest.mark.parametrize("label_from", [-2, 2])
def test_a_level_that_is_not_there_is_named(label_from):
    with pytest.raises(ValueError, match=f"^label_from is {label_from}: give the number of a level, 0 to 1"):
        UNet(image_size=4, label_from=label_from, **FIELDS).init(jax.random.key(0), Z, LOGSNR, LABELS)


def test_a_network_without_a_trunk_has_no_two_scores_in_one_call():
    net, params = trained(-1)
    with pytest.raises(ValueError, match=r"^label_from is -1, so the network has no trunk"):
        net.apply(params, Z, LOGSNR, LABELS, NULLS, method="scores")
