"""Programs compiled for a TPU that is not there, by its own compiler: `python -m cfd.benchmark --compile_for=v5e:2x2`.

The compiler tells the FLOPs, the bytes, the temporary memory and the collectives of a training step and of a sampling
step. With the published rates of a chip, they give the time that the step takes at least.
"""

import importlib.util
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding

from cfd import platforms
from cfd.benchmark import hlo
from cfd.benchmark.ours import training
from cfd.benchmark.side import IMAGE_SIZE, NETWORKS, PASSES
from cfd.devices import parallel, seeds, xla
from cfd.errors import UserError, reason_of
from cfd.losses import eps_loss
from cfd.modes.train_step import initial_state
from cfd.networks import layers, mp_unet, unet
from cfd.networks.model import build, module
from cfd.sampling import guided_sample

PROGRAMS = ("forward", "train", "w0", "guided")
"""The rows of the benchmark that can be compiled."""

SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""The slices of v5e and v6e, in chips: docs.cloud.google.com/tpu/docs/v6e."""


class Chip(NamedTuple):
    """The published rates of a chip, per second: bfloat16 FLOPs, bytes of main memory, bytes to other chips."""

    flops: float
    memory: float
    links: float


CHIPS = {"v5e": Chip(197e12, 800e9, 200e9), "v6e": Chip(918e12, 1600e9, 400e9)}
"""From docs.cloud.google.com/tpu/docs/v6e, which compares both. The links' 1,600 and 3,200 Gbps are all four ports."""


HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
"""The environment of a TPU's host. Without it, libtpu prints errors. It does not change the chips to compile for."""


class Setting(NamedTuple):
    """The programs to compile, and the chips. `batch_size` is per chip."""

    compile_for: str
    slices: int
    fsdp: int
    network: str
    batch_size: int
    dtype: str
    remat: bool
    rows: tuple[str, ...]


def compile_ahead(setting: Setting) -> Iterator[dict[str, Any]]:
    """The facts of each program in `setting.rows`, as soon as it is compiled.

    Raises UserError if the chips are unknown, if libtpu is missing, if fsdp does not divide the chips, or if a program
    needs more memory than a chip has.
    """
    mesh = mesh_of(setting)
    size = IMAGE_SIZE[setting.network]
    fields = NETWORKS[setting.network] | dict(dtype=setting.dtype, remat=setting.remat)
    net, project = module(fields, size), build(fields, size, 3).project
    compiler_options = xla.TPU_OPTIONS | (xla.TPU_FSDP_OPTIONS if setting.fsdp > 1 else {})
    for number, name in enumerate(setting.rows, 1):
        fun, arguments, options = program(name, net, project, mesh, setting.batch_size * mesh.size)
        words = f"Compiling {name} ({number} of {len(setting.rows)}) for {mesh.size} chips"
        start = time.perf_counter()
        try:
            # As `devices.xla` traces it on a TPU. The gradient of all forms together would keep arrays of each.
            with platforms.of_platform("tpu"):
                lowered = jax.jit(fun, compiler_options=compiler_options, **options).lower(*arguments)
            compiled = aside(words, lowered.compile)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"{name} does not fit into the memory of a chip ({reason_of(error)}): give a smaller --batch_size, "
                "which is per chip, --remat, or a larger --fsdp"
            ) from None
        seconds = time.perf_counter() - start
        yield facts(setting, net, name, compiled) | {"compile_seconds": seconds}


def mesh_of(setting: Setting) -> Mesh:
    """The mesh of the chips that `setting` names. It needs no TPU. Raises UserError as `compile_ahead` does."""
    kind, _, shape = setting.compile_for.partition(":")
    if kind not in CHIPS or shape not in SHAPES:
        raise UserError(
            f"--compile_for is {setting.compile_for!r}: give {' or '.join(CHIPS)}, a colon and a slice's shape among "
            f"{', '.join(SHAPES)}, such as v5e:2x2"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--compile_for needs the compiler of TPUs: pip install 'jax[tpu]=={jax.__version__}'")
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if shape == "1x1" else {}
    options |= {"num_slices": setting.slices} if setting.slices > 1 else {}
    missing = {name: value for name, value in HOST.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        devices = topologies.get_topology_desc(setting.compile_for, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(
            f"libtpu cannot be used ({reason_of(error)}): if another program uses it, wait until that one ends, or set "
            "ALLOW_MULTIPLE_LIBTPU_LOAD=1"
        ) from None
    finally:
        for name in missing:
            del os.environ[name]
    if len(devices) // setting.slices % setting.fsdp:
        raise UserError(
            f"--fsdp is {setting.fsdp}, which does not divide the {len(devices) // setting.slices} chips of a slice: "
            "give a divisor"
        )
    devices = sorted(devices, key=lambda device: (getattr(device, "slice_index", None) or 0, device.id))
    grid = np.array(devices).reshape(-1, setting.fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def program(
    name: str, net: Any, project: Callable[[Any], Any] | None, mesh: Mesh, batch_size: int
) -> tuple[Callable[..., Any], tuple, dict[str, Any]]:
    """A function, the shapes of its arguments on the mesh, and the options of its `jax.jit`."""
    size, rows = net.image_size, NamedSharding(mesh, parallel.BATCH)

    def image_rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)

    def init(key: Array) -> Any:
        return net.init(key, jnp.zeros((1, size, size, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]

    def eps_fn(params: Any) -> Callable[[Array, Array, Array], Array]:
        return lambda z, logsnr, labels: net.apply({"params": params}, z, logsnr, labels)[..., :3]  # pyright: ignore

    key, labels = jax.eval_shape(lambda: seeds.key(0)), image_rows(jnp.int32)
    if name == "train":
        optimizer, step = training(
            lambda key, params, x, labels: eps_loss(key, eps_fn(params), x, labels),
            project,
            replicated=mesh.shape["fsdp"] == 1,
            join_small=False,
        )
        state = parallel.with_shardings(mesh, jax.eval_shape(lambda k: initial_state(init, optimizer, k), key))
        batch = {"image": image_rows(jnp.uint8, size, size, 3), "label": labels}
        shardings = jax.tree.map(lambda x: x.sharding, state)
        return step, (state, batch, key), dict(donate_argnums=0, out_shardings=(shardings, None))
    params = parallel.with_shardings(mesh, jax.eval_shape(init, key))
    if name == "forward":
        inputs = image_rows(jnp.float32, size, size, 3), image_rows(jnp.float32), labels
        return lambda params, *inputs: eps_fn(params)(*inputs), (params, *inputs), dict(out_shardings=rows)

    def sample(params: Any, keys: Array, labels: Array) -> Array:
        w = 1.0 if name == "guided" else 0.0
        return guided_sample(keys, eps_fn(params), labels, (size, size, 3), w=w, num_steps=1)

    return sample, (params, image_rows(key.dtype), labels), dict(out_shardings=rows)


def aside(words: str, call: Callable[[], Any]) -> Any:
    """`call()`, in a thread. Prints `words` at once, and every 30 s how long it has taken.

    A signal, such as that of Ctrl-C, interrupts the wait. In the main thread, Python would handle it only after XLA has
    compiled, which takes minutes.
    """
    result, start = Future[Any](), time.perf_counter()
    print(f"{words}: this takes minutes.", flush=True)

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([result], timeout=30.0).done:
        print(f"{words}: {time.perf_counter() - start:.0f} s so far.", flush=True)
    return result.result()


def facts(setting: Setting, net: Any, name: str, compiled: Any) -> dict[str, Any]:
    """The compiler's counts of a program, per chip. FLOPs are those of the model: 2 per multiply-add."""
    computations = hlo.parse(compiled.as_text())
    exchanged, chip = hlo.collectives(computations), CHIPS[setting.compile_for.partition(":")[0]]
    memory, shape = compiled.memory_analysis(), (1, net.image_size, net.image_size, 3)
    inputs = [jax.ShapeDtypeStruct(*x) for x in ((shape, jnp.float32), ((1,), jnp.float32), ((1,), jnp.int32))]
    params = jax.eval_shape(net.init, jax.eval_shape(lambda: seeds.key(0)), *inputs)
    forward = xla.flops(lambda params, *inputs: net.apply(params, *inputs), params, *inputs)
    found = {
        "program": name,
        "flops": PASSES[name] * setting.batch_size * forward,
        "bytes_accessed": compiled.cost_analysis()["bytes accessed"],
        "main_memory_bytes": hlo.main_memory_bytes(computations),
        "least_bytes": least_bytes(net, name, setting.batch_size),
        "least_bytes_padded": least_bytes(net, name, setting.batch_size, size_of=padded_size),
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "collectives": hlo.summary(exchanged),
        "collective_bytes": sum(one.bytes for one in exchanged),
        "overlapped_bytes": sum(one.bytes for one in exchanged if one.overlaps),
    }
    # A ring sends and receives each byte of a sum twice. Sums between slices do not use the links.
    sent = sum(one.bytes * (2 if one.kind == "all-reduce" else 1) for one in exchanged if one.kind in hlo.COLLECTIVES)
    found["seconds"] = {
        "FLOPs": found["flops"] / chip.flops,
        "memory": found["main_memory_bytes"] / chip.memory,
        "links": sent / chip.links,
    }
    return found


def padded_size(shape: tuple[int, ...]) -> int:
    """The elements of an array with the padding to whole tiles of 8 x 128, in the order of axes that needs the least.

    Neither the axes nor their lengths are changed: a TPU's compiler can only choose which two are the last.
    """
    if len(shape) < 2:
        return math.ceil(math.prod(shape) / 128) * 128
    pairs = itertools.permutations(shape, 2)
    return min(math.prod(shape) // (n * m) * math.ceil(n / 8) * 8 * math.ceil(m / 128) * 128 for n, m in pairs)


LAYERS: dict[type, tuple[tuple[int, int], tuple[int, int]]] = {
    layers.Conv: ((1, 1), (2, 2)),
    mp_unet.Conv: ((1, 1), (2, 2)),
    unet.Norm: ((1, 1), (2, 1)),
    unet.ResBlock: ((0, 1), (0, 1)),
    mp_unet.Block: ((0, 1), (0, 1)),
    unet.AttentionBlock: ((0, 5), (0, 9)),
    mp_unet.Attention: ((0, 5), (0, 9)),
}
"""{layer: (passes over its input and its output in the forward pass, the same in its gradient)}.

Convolutions include their biases, and the norms of ADM their SiLU. Attention reads q, k and v and writes
its output. The last layer of a residual branch reads the other branch to add it. In the gradient, a convolution reads
its input and, twice, the gradient of its output; a norm reads its input and that gradient; attention reads q, k, v, its
output and that gradient. All else is taken as a part of one of these.
"""


def least_bytes(net: Any, name: str, batch_size: int, size_of: Callable[[tuple[int, ...]], int] = math.prod) -> float:
    """The least bytes of main memory, if each layer's output is written once and read once by each of its users.

    LAYERS has the bytes of each layer. Parameters are float32: each pass reads them once. AdamW and the EMA read the
    parameters, the EMA, two moments and the gradient, and write all but the gradient. `size_of` gives the elements of
    an array of a shape.
    """
    width, sums = jnp.dtype(net.dtype).itemsize, [0, 0]  # elements that pass forward and backward

    def note(call: Callable[..., Any], inputs: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        outputs = call(*inputs, **options)
        if context.method_name == "__call__" and type(context.module) in LAYERS:
            x, y = (size_of((batch_size, *array.shape[1:])) for array in (inputs[0], outputs))
            for place, (of_input, of_output) in enumerate(LAYERS[type(context.module)]):
                sums[place] += of_input * x + of_output * y
        return outputs

    def apply(key: Array) -> Any:
        z = jnp.zeros((1, net.image_size, net.image_size, 3))
        return net.init(key, z, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]

    with nn.intercept_methods(note):
        params = jax.eval_shape(apply, jax.eval_shape(lambda: seeds.key(0)))
    size = 4 * sum(size_of(x.shape) for x in jax.tree.leaves(params))
    forward, backward = (width * elements for elements in sums)
    if name == "train":
        return float(forward + backward + (2 + 1 + 9) * size)
    return float(PASSES[name] * (forward + size))


def table(setting: Setting, found: list[dict[str, Any]]) -> str:
    """The facts as text, per chip."""
    kind, _, shape = setting.compile_for.partition(":")
    chips, rates = setting.slices * math.prod(map(int, shape.split("x"))), CHIPS[kind]
    lines = [
        f"{setting.network}, {setting.batch_size} images per chip, {setting.dtype}, {chips} chips of {kind}"
        + (f" in {setting.slices} slices" if setting.slices > 1 else "")
        + f", fsdp = {setting.fsdp}; all figures are per chip and step, at {rates.flops / 1e12:.0f} TFLOP/s and "
        f"{rates.memory / 1e9:.0f} GB/s",
        f"{'program':10s}{'TFLOP':>8s}{'GB in all':>11s}{'GB in HBM':>11s}{'/ least':>9s}{'temporary GB':>14s}"
        f"{'FLOPs ms':>10s}{'HBM ms':>9s}{'links ms':>10s}{'images/s <=':>13s}  collectives",
    ]
    for one in found:
        times = one["seconds"]
        lines.append(
            f"{one['program']:10s}{one['flops'] / 1e12:8.3g}{one['bytes_accessed'] / 1e9:11.4g}"
            f"{one['main_memory_bytes'] / 1e9:11.4g}{one['main_memory_bytes'] / one['least_bytes_padded']:9.2f}"
            f"{one['temporary_bytes'] / 1e9:14.4g}{times['FLOPs'] * 1e3:10.3g}{times['memory'] * 1e3:9.3g}"
            f"{times['links'] * 1e3:10.3g}{setting.batch_size * chips / max(times.values()):13.4g}"
            f"  {one['collectives']}"
        )
    return "\n".join(lines)
