"""One side of the benchmark: a process of its own, which builds the network and then times its rows when asked."""

import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32

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
NETWORKS |= {
    "mp_small": NETWORKS["small"] | dict(network="mp"),
    "mp64": NETWORKS["adm64"]
    | dict(network="mp", attention_resolutions=(16, 8)),  # the widths of EDM2-S, arXiv:2312.02696
}
IMAGE_SIZE = {"small": 32, "adm64": 64, "mp_small": 32, "mp64": 64}

PASSES = {"forward": 1, "gradient": 3, "train": 3, "w0": 1, "guided": 2, "guided-doubled": 2, "calls": 2, "sampler": 2}
"""{row: the number of forward passes of the model that its FLOPs are}, per step of the sampler."""

# The peer has one guided step, on a doubled batch. Both guided steps of this package are compared with it.
PEER_ROW = {"forward": "forward", "gradient": "gradient", "train": "train", "w0": "forward"} | dict.fromkeys(
    ("guided", "guided-doubled"), "guided"
)
"""{row of this package: the row of the peer that it is compared with}."""

WEIGHTS = "weights.npz"
"""The file of the peer's tensors in `Setting.folder`. The peer writes it, and this package's side reads it."""


class Setting(NamedTuple):
    """The arguments that both sides get."""

    network: str
    batch_size: int
    dtype: str
    remat: bool
    sampler_steps: int
    rows: tuple[str, ...]
    in_flight: int  # number of calls that the device gets before one is waited for
    profile: str  # the row to profile, or ""
    peer: str  # a checkout of openai/guided-diffusion, or ""
    folder: str  # for the JPEG files of the input pipeline, and for the peer's tensors


class Built(NamedTuple):
    """One side, ready to be timed.

    `rows` are the functions to time, and `wait` waits for the result of one. `output` is the network's output on
    `common_input`, or None if neither a row nor a peer needs it. `facts` are known when the side is built. `measure`
    gives those that are measured after the rounds, when the device is as warm as in the rounds: their memory is not
    part of the peak.
    """

    rows: dict[str, Callable[[], Any]]
    wait: Callable[[Any], Any]
    output: Float32[np.ndarray, "b h w k"] | None
    facts: dict[str, Any]
    measure: Callable[[], dict[str, Any]]


class Died(Exception):
    """The process of a side ended before it was asked to."""


class Side:
    """The process of one side. `output` and `facts` are those of `Built`; `facts` grows as more is measured."""

    def __init__(self, name: str, build: Callable[[Setting], Built], setting: Setting):
        self.name = name
        self.output: Any = None
        self.facts: dict[str, Any] = {}
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, build, setting), daemon=True)
        # A terminal sends Ctrl-C to the new process too. The new process inherits SIG_IGN, and its parent ends it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        end.close()

    def wait_until_built(self) -> None:
        """Waits until the rows can be timed. Raises Died if the process ends, as the other methods do."""
        self.output, self.facts = self._receive()

    def time(self, row: str) -> float:
        """The seconds of one call of a row."""
        self._send(row)
        seconds, peak = self._receive()
        self.facts["peak_memory_bytes"] = peak
        return seconds

    def close(self) -> None:
        """Adds the facts that are measured after the rounds, and ends the process."""
        self._send(None)
        self.facts |= self._receive()
        self.process.join()

    def kill(self) -> None:
        """Ends the process at once, if it still runs."""
        self.process.kill()
        self.process.join()

    def _send(self, row: str | None) -> None:
        try:
            self.pipe.send(row)
        except OSError as e:
            raise self._died() from e

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as e:
            raise self._died() from e

    def _died(self) -> Died:
        self.process.join(10)
        return Died(f"the process of side {self.name!r} ended with exit code {self.process.exitcode}")


def serve(pipe: Connection, build: Callable[[Setting], Built], setting: Setting) -> None:
    """The process of one side. It calls each row that it receives, and sends the seconds and the peak memory.

    None ends it: it sends the facts that are measured after the rounds.
    """
    built = build(setting)
    print("Calling each row once.", flush=True)
    for call in built.rows.values():
        built.wait(call())
    pipe.send((built.output, built.facts | {"peak_memory_bytes": peak_memory()}))
    while (row := pipe.recv()) is not None:
        pipe.send((seconds(built.rows[row], built.wait, setting.in_flight), peak_memory()))
    pipe.send(built.measure())


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any], in_flight: int) -> float:
    """The mean seconds of `in_flight` calls, of which only the last is waited for."""
    start = time.perf_counter()
    for _ in range(in_flight):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / in_flight


def peak_memory() -> int:
    """The peak bytes of the accelerator if they are known, otherwise of the process. They cover all rows of the run."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated()
    on_device = None if "torch" in sys.modules else jax.devices()[0].memory_stats()
    if on_device and "peak_bytes_in_use" in on_device:
        return on_device["peak_bytes_in_use"]
    return host_peak_memory()


def host_peak_memory() -> int:
    """The peak bytes of this process in main memory. They never fall."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def common_input(
    setting: Setting,
) -> tuple[Float32[np.ndarray, "b h w 3"], Float32[np.ndarray, "b"], Int32[np.ndarray, "b"]]:
    """z, ADM's time and the labels, equal on both sides."""
    size, b = IMAGE_SIZE[setting.network], setting.batch_size
    z = np.random.default_rng(0).standard_normal((b, size, size, 3), np.float32)
    return z, np.linspace(20, 980, b, dtype=np.float32), np.arange(b, dtype=np.int32) % 10
