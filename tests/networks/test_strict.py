"""The networks and the training losses work where a user's program refuses implicit promotion of dtypes and ranks.

The rank promotion "raise" holds in the whole suite.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from cfd.guidance import class_gradient
from cfd.losses import eps_loss
from cfd.networks.classifier import Classifier, classifier_loss
from cfd.networks.unet import UNet

SMALL: dict[str, Any] = dict(
    image_size=8,
    num_classes=4,
    base_channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(8,),
    head_channels=32,
)


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(dtype="bfloat16"),
        dict(dtype="bfloat16", fast=False),
        dict(time="adm_cosine", resblock_updown=False, scale_shift_norm=False, dropout=0.1, remat=True),
        dict(time="adm_linear", num_heads=2, head_channels=0, fast=False),
    ],
)
def test_networks_and_losses_promote_nothing(fields: dict) -> None:
    """Tracing and lowering raise if a dtype is promoted. Outputs and gradients are float32."""
    net: Any = UNet(**SMALL | fields)
    classifier: Any = Classifier(**SMALL | fields)
    z, logsnr, labels = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    key = jax.random.key(0)
    noise = dict(train=True, rngs={"dropout": key})

    def loss(params: Any, x: Array) -> Array:
        return eps_loss(key, lambda *inputs: net.apply(params, *inputs, **noise), x, labels)

    def loss_of_classifier(params: Any, x: Array) -> Array:
        return classifier_loss(key, lambda *inputs: classifier.apply(params, *inputs, **noise), x, labels)

    def gradient(params: Any, z: Array) -> Array:
        return class_gradient(lambda *inputs: classifier.apply(params, *inputs), z, logsnr, labels)

    with jax.numpy_dtype_promotion("strict"):
        params = jax.eval_shape(net.init, key, z, logsnr, labels)
        params_of_classifier = jax.eval_shape(classifier.init, key, z, logsnr)
        programs = [
            jax.jit(net.apply).lower(params, z, logsnr, labels),
            jax.jit(jax.grad(loss)).lower(params, z),
            jax.jit(classifier.apply).lower(params_of_classifier, z, logsnr),
            jax.jit(jax.grad(loss_of_classifier)).lower(params_of_classifier, z),
            jax.jit(gradient).lower(params_of_classifier, z),
        ]
    assert {leaf.dtype for program in programs for leaf in jax.tree.leaves(program.out_info)} == {jnp.dtype("float32")}
