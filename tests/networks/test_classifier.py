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
from cfd.process import cosine


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
    fields: dict = dict(channel_mult=mult, num_res_blocks=depth, attention_resolutions=(32, 16, 8), time="adm_linear")
    net = Classifier(image_size=size, num_classes=1000, **fields)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros(1))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


SMALL: dict = dict(
    image_size=8,
    num_classes=4,
    base_channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(4,),
    head_channels=32,
)


@pytest.mark.parametrize(
    ("shape", "logsnr", "message"),
    [
        ((2, 16, 16, 3), jnp.zeros(2), "z is 16x16, but this classifier takes 8x8 images alone"),
        ((2, 8, 16, 3), jnp.zeros(2), "z is 8x16, but this classifier takes 8x8"),
        ((2, 8, 8, 1), jnp.zeros(2), r"z has shape \(2, 8, 8, 1\); this network takes \[B, H, W, 3\]"),
        ((8, 8, 3), jnp.zeros(8), r"z has shape \(8, 8, 3\)"),
        ((2, 8, 8, 3), jnp.zeros(3), r"logsnr has shape \(3,\); give one value per image of z, shape \(2,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shape: tuple, logsnr: Array, message: str) -> None:
    net = Classifier(**SMALL)
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.apply, params, jnp.zeros(shape), logsnr)


def test_plain_layers_are_the_same_classifier_and_have_a_forward_mode() -> None:
    """⟨J v, u⟩ = ⟨v, Jᵀ u⟩, with the forward mode of the plain layers and the reverse mode of the fast ones."""
    net: Any = Classifier(**SMALL)
    plain: Any = Classifier(**SMALL, fast=False)
    z, v = (jax.random.normal(jax.random.key(i), (2, 8, 8, 3)) for i in (1, 2))
    logsnr, u = jnp.array([-1.0, 2.0]), jax.random.normal(jax.random.key(3), (2, 4))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), z, logsnr)
    params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), shapes)

    def derivatives(z: Array) -> tuple[Array, ...]:
        out, pullback = jax.vjp(lambda z: net.apply(params, z, logsnr), z)
        expected, forward = jax.jvp(lambda z: plain.apply(params, z, logsnr), (z,), (v,))
        return out, expected, jnp.vdot(forward, u), jnp.vdot(v, *pullback(u))

    out, expected, forward, reverse = jax.jit(derivatives, compiler_options=QUICK)(z)
    assert relative(out, np.asarray(expected)) < 1e-5
    assert float(forward) == pytest.approx(float(reverse), rel=1e-4)


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
        return float(classifier_loss(key_loss, classifier_fn, x, labels, schedule=cosine(-6.0, 6.0)))

    exact = loss(exact_classifier)
    for other in (
        lambda z, logsnr: 1.5 * exact_classifier(z, logsnr),
        lambda z, logsnr: exact_classifier(z, logsnr + 1.0),
        lambda z, logsnr: exact_classifier(z, logsnr - 1.0),
        lambda z, logsnr: exact_classifier(z + 0.1, logsnr),
    ):
        assert exact < loss(other)


@pytest.mark.parametrize("bad", [3, -1])
def test_a_label_that_is_no_class_is_refused_and_under_jit_the_loss_and_its_gradient_are_nan(bad: int) -> None:
    labels, x = (jnp.arange(8) % 3).at[2].set(bad), jnp.zeros((8, 2))

    def loss(scale, labels):
        return classifier_loss(jax.random.key(0), lambda z, logsnr: scale * exact_classifier(z, logsnr), x, labels)

    with pytest.raises(ValueError, match=rf"label is {bad} at index 2; the classifier has K = 3 classes.*0 to 2"):
        loss(1.0, labels)
    assert np.all(np.isnan(jax.jit(jax.value_and_grad(loss))(1.0, labels)))
    assert np.all(np.isfinite(jax.jit(jax.value_and_grad(loss))(1.0, labels.at[2].set(0))))


def test_the_loss_checks_its_numbers_and_takes_a_key_of_any_implementation() -> None:
    def loss(key, **schedule) -> float:
        return float(classifier_loss(key, exact_classifier, jnp.zeros((3, 2)), jnp.arange(3), **schedule))

    expected, *others = (loss(jax.random.key(1, impl=impl)) for impl in ("threefry2x32", "rbg", "unsafe_rbg"))
    assert others == [expected] * 2
    with pytest.raises(ValueError, match=r"schedule returned shape \(\); it must return λ for each u"):
        loss(jax.random.key(1), schedule=lambda u: u[0])
    with pytest.raises(ValueError, match=r"classifier_fn returned a tuple; it must return logits"):
        classifier_loss(jax.random.key(1), lambda *args: args, jnp.zeros((3, 2)), jnp.arange(3))  # pyright: ignore
