"""The noisy classifier against the outputs of the original network, and its loss against an exact classifier."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adm_formula import printed, relative
from jax import Array
from mixtures import log_densities
from tiny import QUICK

from cfd.guidance import class_gradient
from cfd.networks.classifier import Classifier, classifier_loss


@pytest.mark.parametrize(
    "name",
    [
        "classifier_small",
        "classifier_plain",
        "classifier_pattern64",
        pytest.param("classifier_pattern128", marks=pytest.mark.slow),
    ],
)
def test_logits_and_gradients_are_those_of_the_original_network(name: str) -> None:
    ours = printed(name)
    net, stored, stride = ours.network.module(), ours.stored, int(ours.stored["stride"])
    assert isinstance(net, Classifier)
    logsnr, labels = jnp.float32(stored["logsnr"]), jnp.int32(stored["labels"])

    def both(z: Array) -> tuple[Array, Array]:
        def classifier_fn(z: Array, logsnr: Array) -> Any:
            return net.apply({"params": ours.params}, z, logsnr)

        return classifier_fn(z, logsnr), class_gradient(classifier_fn, z, logsnr, labels)

    logits, gradient = jax.jit(both, compiler_options=QUICK)(ours.z)
    assert relative(logits, stored["out"]) < 1e-4
    assert relative(gradient[:, ::stride, ::stride], stored["grad"]) < 1e-4
    assert relative(np.square(gradient, dtype=np.float64).mean((1, 2)), stored["square"]) < 1e-4
    assert sum(x.size for x in jax.tree.leaves(ours.params)) == stored["parameters"]


@pytest.mark.parametrize(
    ("size", "depth", "mult", "parameters"),
    [(64, 4, (1, 2, 3, 4), 65_438_568), (128, 2, (1, 1, 2, 3, 4), 42_568_040)],
)
def test_adms_classifiers_have_its_parameters(size: int, depth: int, mult: tuple, parameters: int) -> None:
    """The parameter counts are those of ADM's `create_classifier` with the flags of its README."""
    net = Classifier(
        num_classes=1000,
        base_channels=128,
        channel_mult=mult,
        num_res_blocks=depth,
        attention_resolutions=(32, 16, 8),
        head_channels=64,
        num_heads=0,
        resblock_updown=True,
        scale_shift_norm=True,
        dropout=0.0,
        time="adm_linear",
        dtype="float32",
        remat=False,
    )
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros(1))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


# Class-conditional Gaussians, for which the classifier is exact.

MEANS = np.array([[0.8, 0.1], [-0.5, 0.6], [-0.2, -0.7]])
STDS = np.array([0.3, 0.5, 0.2])


def exact_classifier(z: Array, logsnr: Array) -> Array:
    """log p(z | c) + log p(c), up to a term that is the same for all classes."""
    return log_densities(z, logsnr, jnp.float32(MEANS), jnp.float32(STDS))


def test_loss_of_a_uniform_classifier_is_the_log_of_the_number_of_classes() -> None:
    loss = classifier_loss(
        jax.random.key(0), lambda z, logsnr: jnp.zeros((8, 5)), jnp.zeros((8, 4, 4, 1)), jnp.arange(8) % 5
    )
    assert float(loss) == pytest.approx(math.log(5.0), rel=1e-6)


def test_loss_is_least_at_the_exact_classifier() -> None:
    """The cross entropy is a proper score: on data of the mixture, other logits have a higher loss.

    The loss also passes the classifier the λ at which z is, because a shifted λ has a higher loss.
    """
    key_x, key_loss = jax.random.split(jax.random.key(0))
    labels = jnp.arange(6000) % 3
    x = jnp.float32(MEANS)[labels] + jnp.float32(STDS)[labels, None] * jax.random.normal(key_x, (6000, 2))

    def loss(classifier_fn) -> float:
        return float(classifier_loss(key_loss, classifier_fn, x, labels, logsnr_min=-6.0, logsnr_max=6.0))

    exact = loss(exact_classifier)
    for other in (
        lambda z, logsnr: 1.5 * exact_classifier(z, logsnr),
        lambda z, logsnr: exact_classifier(z, logsnr + 1.0),
        lambda z, logsnr: exact_classifier(z, logsnr - 1.0),
        lambda z, logsnr: exact_classifier(z + 0.1, logsnr),
    ):
        assert exact < loss(other)
