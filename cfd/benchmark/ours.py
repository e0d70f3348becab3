"""This package's side of the benchmark, on JAX's first device."""

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from PIL import Image

from cfd.benchmark.side import IMAGE_SIZE, NETWORKS, WEIGHTS, Built, Setting, common_input, seconds
from cfd.convert.adm_network import Hidden, adm_network
from cfd.convert.adm_weights import adm_params
from cfd.devices import memory, seeds, xla
from cfd.guidance import NULL_LABEL
from cfd.losses import eps_loss
from cfd.modes.sampler import to_uint8
from cfd.modes.train_step import LossFn, TrainState, initial_state, make_optimizer, train_step
from cfd.networks.model import build, module
from cfd.networks.times import adm_logsnr
from cfd.sampling import guided_sample


def our_side(setting: Setting) -> Built:
    """The rows of `setting`, compiled. With a peer, the network has the peer's weights."""
    print(f"Building {setting.network}.", flush=True)
    memory.set_up()
    fields = NETWORKS[setting.network] | dict(dtype=setting.dtype, remat=setting.remat)
    size = IMAGE_SIZE[setting.network]
    net, project = module(fields, size), build(fields, size, 3).project
    z, t, labels = map(jnp.asarray, common_input(setting))
    logsnr = adm_logsnr(t, "cosine")

    def init(key: Array) -> Any:
        return net.init(key, z[:1], logsnr[:1], labels[:1])["params"]

    def parameters() -> Any:
        if not setting.peer:
            return xla.compiled(init, seeds.key(0), once=True)(seeds.key(0))
        with np.load(os.path.join(setting.folder, WEIGHTS)) as file:
            state = dict(file)
        hidden = Hidden(z.shape[1], 64, 0, "new", "cosine")
        return adm_params(adm_network({k: x.shape for k, x in state.items()}, hidden), state)

    def eps_fn(params: Any) -> Callable[[Array, Array, Array], Array]:
        return lambda z, logsnr, labels: net.apply({"params": params}, z, logsnr, labels)[..., :3]  # pyright: ignore

    def forward(params: Any) -> Any:
        return net.apply({"params": params}, z, logsnr, labels)

    def loss_fn(key: Array, params: Any, x: Array, labels: Array) -> Array:
        return eps_loss(key, eps_fn(params), x, labels)

    def sampler(steps: int, **options: Any) -> Callable[[Any], Array]:
        return lambda params: guided_sample(
            seeds.key(0), eps_fn(params), labels, z.shape[1:], num_steps=steps, **options
        )

    def calls(params: Any) -> Array:
        def step(z: Array, _: None) -> tuple[Array, None]:
            eps = eps_fn(params)(z, logsnr, labels), eps_fn(params)(z, logsnr, jnp.full_like(labels, NULL_LABEL))
            return 0.5 * (eps[0] + eps[1]), None

        return jax.lax.scan(step, z, length=setting.sampler_steps)[0]

    programs: dict[str, Callable[[Any], Any]] = {
        "forward": forward,
        "gradient": lambda params: jax.value_and_grad(loss_fn, 1)(seeds.key(0), params, z, labels),
        "w0": sampler(1, w=0.0),
        "guided": sampler(1, w=1.0),
        "guided-doubled": sampler(1, w=1.0, doubled=True),
        "calls": calls,
        "sampler": sampler(setting.sampler_steps, w=1.0),
    }
    compile_seconds: dict[str, float] = {}

    def compiled(name: str, fun: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[..., Any]:
        print(f"Compiling {name}.", flush=True)
        start = time.perf_counter()
        program = xla.compiled(fun, *arguments, **options)
        compile_seconds[name] = time.perf_counter() - start
        return program

    # As in training, the programs are compiled before the parameters exist.
    current = [jax.eval_shape(init, seeds.key(0))]  # all rows read it, and a training step replaces it
    rows: dict[str, Callable[[], Any]] = {}
    for name, program in programs.items():
        if name in setting.rows or (name == "forward" and setting.peer):
            program = compiled(name, program, current[0])
            rows[name] = lambda program=program: program(current[0])
    if "train" in setting.rows:
        rows["train"] = our_train_step(compiled, loss_fn, project, current, {"image": to_uint8(z), "label": labels})
    current[0] = parameters()
    output = np.asarray(rows["forward"]()) if "forward" in rows else None
    if "forward" not in setting.rows:
        rows.pop("forward", None)  # and its program, which is not part of the memory that is measured
    if "input" in setting.rows:
        rows["input"] = input_pipeline(setting)

    facts = {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "parameters": sum(x.size for x in jax.tree.leaves(current[0])),
        "forward_flops": xla.flops(forward, current[0]),
        "compile_seconds": compile_seconds,
    }

    def measure() -> dict[str, Any]:
        print("Measuring the rate of a large matrix product.", flush=True)
        measured: dict[str, Any] = {"matrix_flops_per_second": matrix_rate(setting.dtype, setting.in_flight)}
        if setting.profile:
            print(f"Profiling {setting.profile}.", flush=True)
            measured["profile"] = operations(lambda: jax.block_until_ready(rows[setting.profile]()))
        return measured

    return Built(rows, jax.block_until_ready, output, facts, measure)


def training(
    loss_fn: LossFn, project: Callable[[Any], Any] | None, *, replicated: bool, join_small: bool
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """The optimizer and the training step that the benchmark measures. The arguments are those of `train_step`."""
    optimizer = make_optimizer(
        learning_rate=1e-4, warmup_steps=0, adam_b1=0.9, adam_b2=0.999, weight_decay=0.0, grad_clip=1.0
    )
    step = partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        ema_decay=0.9999,
        ema_warmup=False,
        num_microbatches=1,
        replicated=replicated,
        join_small=join_small,
        project=project,
    )
    return optimizer, step


def our_train_step(
    compiled: Callable[..., Any],
    loss_fn: LossFn,
    project: Callable[[Any], Any] | None,
    current: list[Any],
    batch: dict[str, Array],
) -> Callable[[], dict[str, Array]]:
    """`train_step` on a state that each call replaces. It also replaces the parameters in `current`.

    `current` may hold the shapes of the parameters until the first call, which begins with those that it then holds.
    """
    on_cpu = jax.default_backend() == "cpu"
    optimizer, step = training(loss_fn, project, replicated=True, join_small=on_cpu)

    def build(params: Any) -> TrainState:
        return initial_state(lambda _: params, optimizer, seeds.key(0))

    key = seeds.key(1)
    program = compiled("train", step, jax.eval_shape(build, current[0]), batch, key, donate_argnums=0)
    state: TrainState | None = None

    def once() -> dict[str, Array]:
        nonlocal state
        if state is None:
            state = jax.block_until_ready(xla.compiled(build, current[0], donate_argnums=0)(current[0]))
            memory.trim()
        after, metrics = program(state, batch, key)
        state, current[0] = after, after.params
        return metrics

    return once


def input_pipeline(setting: Setting) -> Callable[[], Any]:
    """`next` on batches of JPEG files of the network's size in a folder. A file is decoded when its batch is built."""
    from cfd.data.batches import batches  # Grain takes 32 MB, which are not part of the other rows' memory
    from cfd.data.sources import open_dataset

    size, noise = IMAGE_SIZE[setting.network], np.random.default_rng(0)
    folder = Path(setting.folder, "train", "class")
    folder.mkdir(parents=True)
    for i in range(256):
        smooth = Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).resize((size, size))
        smooth.save(folder / f"{i}.jpg", quality=90)
    dataset = open_dataset(
        source="folder",
        name="",
        split="train",
        path=setting.folder,
        image_size=size,
        channels=3,
        num_classes=1,
        on_bad_image="raise",
        in_memory=False,
    )
    stream = batches(dataset, seed=0, batch_size=setting.batch_size, flip=True, num_workers=0)
    return lambda: next(stream)


def matrix_rate(dtype: str, in_flight: int) -> float:
    """FLOP/s of the fastest of ten products of square matrices, of size 2048 on a CPU and 8192 on other devices."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    product = xla.jit(jnp.matmul)
    product(x, x).block_until_ready()
    return 2 * side**3 / min(seconds(lambda: product(x, x), jax.block_until_ready, in_flight) for _ in range(10))


def operations(call: Callable[[], Any]) -> dict[str, float]:
    """{kind of XLA operation: its seconds on the device in one call}, the longest first.

    A kind is the operation's name without its number. On a GPU, everything in CUDA graphs counts as one kind, unless
    XLA_FLAGS=--xla_gpu_enable_command_buffer= turns graphs off.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        spent: Counter[str] = Counter()
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op")
                    if operation is not None:
                        spent[re.sub(r"[.\d]+$", "", str(operation))] += event.duration_ns * 1e-9
    return dict(spent.most_common())
