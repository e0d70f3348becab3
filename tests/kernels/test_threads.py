"""The forms for a CPU, and a network of them, have the same bits on one core and on two."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from tiny import ROOT

from cfd.devices import xla

YNN = "xla_cpu_experimental_ynn_fusion_type"
pytestmark = pytest.mark.skipif(YNN not in xla.compiler_options(), reason="this XLA has no YNN library")

PROGRAM = """
import hashlib, json, os, sys

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])

import jax
import jax.numpy as jnp
import numpy as np
from cfd.devices import xla

noise = np.random.default_rng(0)

def array(*shape):
    return jnp.asarray(noise.standard_normal(shape, np.float32))

def with_gradients(fun, *arguments):
    y, backward = jax.vjp(fun, *arguments)
    return y, backward(jnp.cos(y))

def hashes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for path, x in leaves}
"""

FORMS = (
    PROGRAM
    + """
from cfd.networks.layers import attention, convolve, dense, group_norm

def convolution(b, size, channels, outputs):
    return lambda x, kernel: convolve(x, kernel, 1), array(b, size, size, channels), array(3, 3, channels, outputs)

cases = {
    "Winograd, 128 to 64": convolution(2, 16, 128, 64),
    "Winograd's gradient, 32 to 32": convolution(64, 8, 32, 32),
    "Winograd's gradient, 64 to 32": convolution(64, 4, 64, 32),
    "few positions": convolution(1, 8, 128, 128),
    "one input": convolution(2, 16, 1, 32),
    "one output": convolution(1, 8, 32, 1),
    "six outputs": convolution(1, 16, 128, 6),
    "1x1": (lambda *a: convolve(*a[:2], 1, a[2]), array(2, 32, 32, 64), array(64, 128), array(128)),
    "tokens": (dense, array(2, 1024, 64), array(64, 128), array(128)),
    "group norm": (lambda *a: group_norm(*a, silu=True), array(2, 16, 16, 64), array(2, 64), array(2, 64)),
    "attention": (attention, array(1, 256, 1, 32), array(1, 256, 1, 32), array(1, 256, 1, 32)),
}
results = {}
for name, (fun, *arguments) in cases.items():
    compiled = xla.jit(lambda *arguments, fun=fun: with_gradients(fun, *arguments))
    results |= {f"{name}{path}": value for path, value in hashes(compiled(*arguments)).items()}
print(json.dumps(results))
"""
)

NETWORK = (
    PROGRAM
    + """
from cfd.losses import eps_loss
from cfd.networks.unet import UNet
from cfd.sampling import guided_sample

net = UNet(8, 10, base_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_channels=32)
x, labels = array(64, 8, 8, 1), jnp.arange(64) % 10
shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(64), labels)["params"]
params = jax.tree.map(lambda s: array(*s.shape) / s.size**0.25, shapes)

def eps_fn(params):
    return lambda z, logsnr, labels: net.apply({"params": params}, z, logsnr, labels)

step = jax.value_and_grad(lambda params: eps_loss(jax.random.key(1), eps_fn(params), x, labels))
sample = lambda params: guided_sample(jax.random.key(2), eps_fn(params), labels, (8, 8, 1), w=1.0, num_steps=4)
print(json.dumps(hashes({"step": xla.jit(step)(params), "sample": xla.jit(sample)(params)})))
"""
)

LOOP = (
    PROGRAM
    + """
from jax.sharding import NamedSharding
from cfd.devices import parallel

kernel, x = array(3, 3, 64, 32) / 24, np.asarray(array(128, 8, 8, 64))

def program(x):
    def add(i, total):
        return 0.5 * total + jax.lax.conv_general_dilated(
            x + 0.001 * i, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return jax.lax.fori_loop(0, 800, add, jnp.zeros((*x.shape[:3], 32)))

mesh = parallel.make_mesh(2, 1)
on_two = xla.jit(program, out_shardings=NamedSharding(mesh, parallel.BATCH))
found = np.asarray(on_two(parallel.shard_rows(mesh, np.concatenate([x, x]))))
print(np.abs(found - np.tile(jax.jit(program)(x), (2, 1, 1, 1))).max())
"""
)


def on_one_core_and_on_two(program: str) -> list[dict[str, str]]:
    """The results of `program` on one core and on two."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this process has one core")
    environment: dict[str, Any] = os.environ | dict(JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    runs = [
        subprocess.Popen([sys.executable, "-c", program, cores], stdout=subprocess.PIPE, text=True, env=environment)
        for cores in ("1", "2")
    ]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    return [json.loads(output) for output in outputs]


def test_every_form_and_its_gradients_have_the_same_bits_on_one_core_and_on_two() -> None:
    one, two = on_one_core_and_on_two(FORMS)
    assert {name for name in one if one[name] != two[name]} == set()
    assert len(one) == 11 * 3 + 4  # the result, and a gradient of each argument


def test_convolutions_in_a_loop_have_the_same_values_on_two_devices() -> None:
    """With XLA's own convolution, rows 0 to 6 of each device are wrong on two cores."""
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment = os.environ | dict(JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT)) | two
    done = subprocess.run([sys.executable, "-c", LOOP, "2"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4


@pytest.mark.slow
def test_a_training_step_and_guided_samples_have_the_same_bits_on_one_core_and_on_two() -> None:
    one, two = on_one_core_and_on_two(NETWORK)
    assert {name for name in one if one[name] != two[name]} == set()
    assert one.keys() == two.keys() and len(one) > 100
