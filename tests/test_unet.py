"""The U-Net against the original network's own outputs, its sizes, its time, and what its fields do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adm_formula import printed, relative

from cfd import adm
from cfd.guidance import NULL_LABEL
from cfd.unet import UNet, cosine_time, network_time

SMALL = dict(
    num_classes=4,
    out_channels=3,
    base_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    head_channels=32,
    num_heads=0,
    resblock_updown=True,
    scale_shift_norm=True,
    dropout=0.0,
    time="cosine",
    dtype="float32",
    remat=False,
)


@pytest.mark.parametrize("name", ["small", "plain", "uncond", "pattern64", "pattern128"])
def test_outputs_are_those_of_the_original_network(name: str) -> None:
    """Over three λ and classes: the pixels kept of the original's output, and the sums of all of them."""
    ours = printed(name)
    stored, stride = ours.stored, int(ours.stored["stride"])
    logsnr, labels = jnp.float32(stored["logsnr"]), jnp.int32(stored["labels"])
    out = np.asarray(jax.jit(ours.network.module().apply)({"params": ours.params}, ours.z, logsnr, labels))
    assert relative(out[:, ::stride, ::stride], stored["out"]) < 1e-4
    assert relative(out.mean((1, 2), dtype=np.float64), stored["mean"]) < 1e-4
    assert relative(np.square(out, dtype=np.float64).mean((1, 2)), stored["square"]) < 1e-4
    assert sum(x.size for x in jax.tree.leaves(ours.params)) == stored["parameters"]
