"""What the network, training and sampling cost on this machine, and beside openai/guided-diffusion.

    python -m cfd.benchmark --network=small
    python -m cfd.benchmark --network=adm64 --dtype=bfloat16 --batch_size=128 --in_flight=4 --json=h200.json
    python -m cfd.benchmark --network=small --peer=../guided-diffusion    # needs PyTorch

Prints a table, and writes JSON where --json says. With --peer, both networks hold the same weights and must give the
same outputs before anything is timed; each runs in a process of its own, they take turns, and a ratio is the median
over the rounds of time here / time there. Every round times every row, so that rows can be compared as well. A time is
of one call that has finished; with --in_flight=4 it is the mean of four given to the device at once, as training gives
it the next step before the last has ended. FLOPs are the model's (2 a multiply-add; a training step is three forward
passes), and their share is of this device's rate in one large matrix product. A CPU can exceed it: `cfd.convolution`
spares a half to two thirds of the multiplications.
Peak memory is of all the rows of a run: ask for one to know its own.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict
from PIL import Image

from cfd import data, train, xla
from cfd.adm import adm_logsnr
from cfd.adm_import import Hidden, adm_network, adm_params
from cfd.guidance import NULL_LABEL
from cfd.losses import eps_loss
from cfd.sampling import guided_sample
from cfd.unet import UNet

COMMON = dict(
    num_heads=0, resblock_updown=True, scale_shift_norm=True, dropout=0.0, time="adm_cosine", head_channels=64
)
NETWORKS = {
    "small": COMMON
    | dict(num_classes=10, out_channels=3, base_channels=64, channel_mult=(1, 2, 2), num_res_blocks=2)
    | dict(attention_resolutions=(16, 8)),
    "adm64": COMMON
    | dict(num_classes=1000, out_channels=6, base_channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3)
    | dict(attention_resolutions=(32, 16, 8)),
}
IMAGE_SIZE = {"small": 32, "adm64": 64}
BATCH_SIZE = {"small": 16, "adm64": 2}

# Name of a row: the forward passes of the model that its FLOPs are worth.
PASSES = {"forward": 1, "gradient": 3, "train": 3, "w0": 1, "guided": 2, "guided-doubled": 2, "calls": 2, "sampler": 2}
MEANS = {
    "forward": "forward",
    "gradient": "loss and gradient",
    "train": "train step (clip, AdamW, EMA)",
    "w0": "sampling step, w = 0",
    "guided": "guided step, two passes",
    "guided-doubled": "guided step, one doubled batch",
    "calls": "the network calls of the sampler alone",
    "sampler": "guided sampler, all its steps",
    "input": "input pipeline, a batch of JPEGs",
}
# The peer has one guided step, on a doubled batch; ours are compared with it.
PEER_ROW = {"forward": "forward", "gradient": "gradient", "train": "train", "w0": "forward"} | dict.fromkeys(
    ("guided", "guided-doubled"), "guided"
)
WEIGHTS = "weights.npz"


class Setting(NamedTuple):
    """What both processes are told."""

    network: str
    batch_size: int
    dtype: str
    remat: bool
    sampler_steps: int
    rows: tuple[str, ...]
    in_flight: int  # calls that are given to the device before one is waited for
    profile: str  # a row, or "" for none
    peer: str  # a checkout of openai/guided-diffusion; "" for none
    folder: str  # for the JPEGs of the input pipeline, and the peer's tensors


class Built(NamedTuple):
    """One side, ready: what to time, how to wait for it, its output on the common input, and what else is found.

    The output is a NumPy array, or None where neither a row nor a peer asks for it. `facts` is called after the rounds:
    it is no part of their memory, and the device is as warm as in them.
    """

    rows: dict[str, Callable[[], Any]]
    wait: Callable[[Any], Any]
    output: Any
    facts: Callable[[], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the JSON file if one is asked for."""
    flags = parse(arguments)
    rows = tuple(flags.rows.split(","))
    batch_size = flags.batch_size or BATCH_SIZE[flags.network]
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            flags.network,
            batch_size,
            flags.dtype,
            flags.remat,
            flags.sampler_steps,
            rows,
            flags.in_flight,
            flags.profile,
            flags.peer,
            folder,
        )
        result = run(setting, flags.rounds)
    print(table(result))
    if flags.json:
        Path(flags.json).write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cfd.benchmark", description="Speed on this machine.")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="small")
    parser.add_argument("--batch_size", type=int, default=0, help="0: 16 for small, 2 for adm64")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--remat", action="store_true", help="recompute activations in the gradient")
    parser.add_argument("--sampler_steps", type=int, default=256, help="T of the sampler")
    parser.add_argument("--rows", default=",".join(MEANS), help="what to time")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--in_flight", type=int, default=1, help="calls given to the device before one is waited for")
    parser.add_argument("--profile", default="", help="a row whose operations are to be listed, the longest first")
    parser.add_argument("--peer", default="", help="a checkout of openai/guided-diffusion")
    parser.add_argument("--json", default="", help="also write the result here")
    flags = parser.parse_args(arguments)
    for name, least in (("rounds", 1), ("in_flight", 1), ("sampler_steps", 1), ("batch_size", 0)):
        if getattr(flags, name) < least:
            parser.error(f"--{name} is {getattr(flags, name)}: give an integer >= {least}")
    if unknown := set(flags.rows.split(",")) - set(MEANS):
        parser.error(f"--rows has {sorted(unknown)}: choose from {','.join(MEANS)}")
    if flags.profile and flags.profile not in flags.rows.split(","):
        parser.error(f"--profile is {flags.profile!r}: choose one of --rows, {flags.rows}")
    if flags.peer and not Path(flags.peer, "guided_diffusion").is_dir():
        parser.error(f"--peer is {flags.peer!r}, which holds no guided_diffusion/: give a checkout of the repository")
    return flags


def run(setting: Setting, rounds: int) -> dict[str, Any]:
    """Seconds of every row and round, the sides taking turns, and their facts. ValueError if their outputs differ."""
    theirs = Side(peer_side, setting) if setting.peer else None
    ours = Side(our_side, setting)
    difference = None
    if theirs is not None:
        difference = float(np.abs(ours.output - theirs.output).max() / np.abs(theirs.output).max())
        if not difference <= (1e-3 if setting.dtype == "float32" else 5e-2):
            raise ValueError(f"the outputs differ by {difference:.2g} of the largest: nothing was timed")
        print(f"Same weights; outputs agree to {difference:.1e} of the largest value.", flush=True)

    timed: dict[str, dict[str, list[float]]] = {name: {} for name in setting.rows}
    for i in range(rounds):
        for name in setting.rows:
            turns = [("ours", ours, name)]
            if theirs is not None and name in PEER_ROW:
                turns.append(("peer", theirs, PEER_ROW[name]))
            for who, side, row in turns if i % 2 else reversed(turns):
                timed[name].setdefault(who, []).append(side.time(row))
    facts = {"ours": ours.close()} | ({"peer": theirs.close()} if theirs is not None else {})
    return {
        "setting": {key: value for key, value in setting._asdict().items() if key != "folder"} | {"rounds": rounds},
        "difference": difference,
        "facts": facts,
        "seconds": timed,
    }


class Side:
    """A process that builds one side and then times its rows when asked."""

    def __init__(self, build: Callable[[Setting], Built], setting: Setting):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, build, setting), daemon=True)
        self.process.start()
        end.close()
        self.output = self.pipe.recv()

    def time(self, row: str) -> float:
        self.pipe.send(row)
        return self.pipe.recv()

    def close(self) -> dict[str, Any]:
        self.pipe.send(None)
        facts = self.pipe.recv()
        self.process.join()
        return facts


def serve(pipe: Connection, build: Callable[[Setting], Built], setting: Setting) -> None:
    """The process of one side: each row that is named is called, and its seconds are sent; None asks for the facts."""
    built = build(setting)
    for call in built.rows.values():
        built.wait(call())
    pipe.send(built.output)
    while (row := pipe.recv()) is not None:
        pipe.send(seconds(built.rows[row], built.wait, setting.in_flight))
    facts = {"peak_memory_bytes": peak_memory()} | built.facts()
    if setting.profile and build is our_side:
        facts["profile"] = operations(lambda: built.wait(built.rows[setting.profile]()))
    pipe.send(facts)


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any], in_flight: int) -> float:
    """The mean over as many calls, of which only the last is waited for."""
    start = time.perf_counter()
    for _ in range(in_flight):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / in_flight


def operations(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds on the device of each kind of XLA's operations in one call, the longest first.

    A kind is the operation's name without its number. On a GPU all that is in CUDA graphs counts as one kind, unless
    XLA_FLAGS=--xla_gpu_enable_command_buffer= makes no graphs.
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


def peak_memory() -> int:
    """The accelerator's peak where it is known, else the process's; of all the rows of the run."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated()
    on_device = None if "torch" in sys.modules else jax.devices()[0].memory_stats()
    if on_device and "peak_bytes_in_use" in on_device:
        return on_device["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def common_input(setting: Setting) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z [B, H, W, 3], ADM's time [B] and labels [B], the same on both sides."""
    size, b = IMAGE_SIZE[setting.network], setting.batch_size
    z = np.random.default_rng(0).standard_normal((b, size, size, 3), np.float32)
    return z, np.linspace(20, 980, b, dtype=np.float32), np.arange(b, dtype=np.int32) % 10


def our_side(setting: Setting) -> Built:
    """This package, on the first device of jax."""
    xla.return_freed_memory()
    fields = NETWORKS[setting.network] | dict(dtype=setting.dtype, remat=setting.remat)
    net = UNet(**fields)
    z, t, labels = map(jnp.asarray, common_input(setting))
    logsnr = adm_logsnr(t, "cosine")
    if setting.peer:
        with np.load(os.path.join(setting.folder, WEIGHTS)) as file:
            state = dict(file)
        hidden = Hidden(z.shape[1], 64, 0, "new", "cosine")
        params = adm_params(adm_network({k: x.shape for k, x in state.items()}, hidden), state)
        del state
    else:
        params = jax.jit(net.init)(jax.random.key(0), z[:1], logsnr[:1], labels[:1])["params"]

    def eps_fn(params: Any) -> Callable[[Array, Array, Array], Array]:
        return lambda z, logsnr, labels: net.apply({"params": params}, z, logsnr, labels)[..., :3]  # pyright: ignore

    def forward(params: Any) -> Any:
        return net.apply({"params": params}, z, logsnr, labels)

    def loss_fn(key: Array, params: Any, x: Array, labels: Array) -> Array:
        return eps_loss(key, eps_fn(params), x, labels)

    def sampler(steps: int, **options: Any) -> Callable[[Any], Array]:
        return lambda params: guided_sample(
            jax.random.key(0), eps_fn(params), labels, z.shape[1:], num_steps=steps, **options
        )

    def calls(params: Any) -> Array:
        def step(z: Array, _: None) -> tuple[Array, None]:
            eps = eps_fn(params)(z, logsnr, labels), eps_fn(params)(z, logsnr, jnp.full_like(labels, NULL_LABEL))
            return 0.5 * (eps[0] + eps[1]), None

        return jax.lax.scan(step, z, length=setting.sampler_steps)[0]

    programs: dict[str, Callable[[Any], Any]] = {
        "forward": forward,
        "gradient": lambda params: jax.value_and_grad(loss_fn, 1)(jax.random.key(0), params, z, labels),
        "w0": sampler(1, w=0.0),
        "guided": sampler(1, w=1.0),
        "guided-doubled": sampler(1, w=1.0, doubled=True),
        "calls": calls,
        "sampler": sampler(setting.sampler_steps, w=1.0),
    }
    compile_seconds: dict[str, float] = {}

    def compiled(name: str, fun: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[..., Any]:
        start = time.perf_counter()
        program = xla.compiled(fun, *arguments, **options)
        compile_seconds[name] = time.perf_counter() - start
        return program

    held = [params]  # by all rows; a training step replaces them
    rows: dict[str, Callable[[], Any]] = {}
    for name, program in programs.items():
        if name in setting.rows or (name == "forward" and setting.peer):
            program = compiled(name, program, params)
            rows[name] = lambda program=program: program(held[0])
    output = np.asarray(rows["forward"]()) if "forward" in rows else None
    if "forward" not in setting.rows:
        rows.pop("forward", None)  # and its program, which is no part of the memory that is measured
    if "train" in setting.rows:
        rows["train"] = our_train_step(compiled, loss_fn, held, {"image": z, "label": labels})
    if "input" in setting.rows:
        rows["input"] = input_pipeline(setting)

    def facts() -> dict[str, Any]:
        return {
            "device": jax.devices()[0].device_kind,
            "backend": jax.default_backend(),
            "jax": jax.__version__,
            "parameters": sum(x.size for x in jax.tree.leaves(held[0])),
            "forward_flops": xla.flops(forward, held[0]),
            "matrix_flops_per_second": matrix_rate(setting.dtype, setting.in_flight),
            "compile_seconds": compile_seconds,
        }

    return Built(rows, jax.block_until_ready, output, facts)


def our_train_step(
    compiled: Callable[..., Any], loss_fn: train.LossFn, held: list[Any], batch: dict[str, Array]
) -> Callable[[], dict[str, Array]]:
    """`train.train_step` on a state that each call replaces, and with it the parameters that are held."""
    settings = dict(learning_rate=1e-4, warmup_steps=0, adam_b1=0.9, adam_b2=0.999, weight_decay=0.0, grad_clip=1.0)
    optimizer = train.make_optimizer(ConfigDict(settings))
    build = jax.jit(lambda p: train.initial_state(lambda _: p, optimizer, jax.random.key(0)), donate_argnums=0)
    key = jax.random.key(1)

    def step(state: train.TrainState, batch: dict[str, Array], key: Array) -> Any:
        return train.train_step(
            state,
            batch,
            key,
            loss_fn=loss_fn,
            optimizer=optimizer,
            ema_decay=0.9999,
            ema_warmup=False,
            num_microbatches=1,
            replicated=True,
            join_vectors=jax.default_backend() == "cpu",
        )

    program = compiled("train", step, jax.eval_shape(build, held[0]), batch, key, donate_argnums=0)
    state: train.TrainState = build(held[0])
    held[0] = state.params

    def once() -> dict[str, Array]:
        nonlocal state
        state, metrics = program(state, batch, key)
        held[0] = state.params
        return metrics

    return once


def input_pipeline(setting: Setting) -> Callable[[], Any]:
    """`next` on batches of JPEGs of the network's size from a folder, decoded as they are asked for."""
    size, noise = IMAGE_SIZE[setting.network], np.random.default_rng(0)
    place = Path(setting.folder, "train", "class")
    place.mkdir(parents=True)
    for i in range(256):
        smooth = Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).resize((size, size))
        smooth.save(place / f"{i}.jpg", quality=90)
    dataset = data.open_dataset(
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
    batches = data.batches(dataset, seed=0, batch_size=setting.batch_size, flip=True, num_workers=0)
    return lambda: next(batches)


def matrix_rate(dtype: str, in_flight: int) -> float:
    """FLOP/s of the best of several square matrix products: 2048 on a CPU, 8192 elsewhere."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    product = xla.jit(jnp.matmul)
    product(x, x).block_until_ready()
    return 2 * side**3 / min(seconds(lambda: product(x, x), jax.block_until_ready, in_flight) for _ in range(10))


def peer_side(setting: Setting) -> Built:
    """openai/guided-diffusion as shipped; its tensors are written to the file WEIGHTS."""
    from cfd import benchmark_peer

    wanted = {PEER_ROW[row] for row in setting.rows if row in PEER_ROW}
    net = benchmark_peer.network(setting.peer, NETWORKS[setting.network], IMAGE_SIZE[setting.network], setting.remat)
    tensors: dict[str, Any] = benchmark_peer.tensors(net)
    np.savez(os.path.join(setting.folder, WEIGHTS), **tensors)
    rows, output = benchmark_peer.rows(net, *common_input(setting), setting.dtype, "train" in wanted)
    return Built({name: rows[name] for name in wanted}, benchmark_peer.wait, output, benchmark_peer.version)


def table(result: dict[str, Any]) -> str:
    """The result as text: medians, quartiles of the rounds, and where there is a peer the ratio to it."""
    setting, facts, timed = result["setting"], result["facts"]["ours"], result["seconds"]
    rate = facts["matrix_flops_per_second"]
    lines = [
        "{network}, batch {batch_size}, {dtype}, T = {sampler_steps}, {in_flight} in flight".format(**setting)
        + f" on {facts['device']}: {facts['parameters']:,} parameters, "
        f"{facts['forward_flops'] / setting['batch_size'] / 1e9:.2f} GFLOP an image forward; "
        f"matrix products run at {rate / 1e12:.3g} TFLOP/s",
        f"{'median of ' + str(setting['rounds']) + ' [quartiles]':40s}{'ms':>34s}{'images/s':>10s}{'TFLOP/s':>9s}"
        f"{'share':>7s}{'compile s':>11s}" + ("   / peer [quartiles]" if "peer" in result["facts"] else ""),
    ]
    for name, sides in timed.items():
        ours = np.array(sides["ours"])
        low, middle, high = np.quantile(ours, (0.25, 0.5, 0.75))
        steps = setting["sampler_steps"] if name in ("calls", "sampler") else 1
        line = f"{MEANS[name]:40s}{f'{middle * 1e3:.4g} [{low * 1e3:.4g}, {high * 1e3:.4g}]':>34s}"
        line += f"{setting['batch_size'] / middle:10.4g}"
        if name in PASSES:
            flops = PASSES[name] * steps * facts["forward_flops"] / middle
            line += f"{flops / 1e12:9.3g}{flops / rate:7.1%}{facts['compile_seconds'][name]:11.1f}"
        if "peer" in sides:
            low, middle, high = np.quantile(ours / np.array(sides["peer"]), (0.25, 0.5, 0.75))
            line += f"   {middle:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(line)
    for one, other in (("w0", "guided"), ("guided", "guided-doubled"), ("sampler", "calls"), ("input", "train")):
        if {one, other} <= set(timed):
            ratios = np.array(timed[one]["ours"]) / np.array(timed[other]["ours"])
            lines.append(f"{MEANS[one]} / {MEANS[other]}: {np.median(ratios):.3f}")
    profile = facts.get("profile", {})
    for operation, spent in list(profile.items())[:8]:
        share = spent / sum(profile.values())
        lines.append(f"{operation:40s}{spent * 1e3:10.4g} ms{share:7.1%} of {setting['profile']}")
    for who, found in result["facts"].items():
        lines.append(f"peak memory, {who}: {found['peak_memory_bytes'] / 1e9:.2f} GB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
