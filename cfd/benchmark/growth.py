"""How time and memory grow with the batch, the image, T, the weights, the images, the devices and the rows of a sweep.

    python -m cfd.benchmark --growth
    python -m cfd.benchmark --growth=T,recall --json=growth.json

Each point is measured in a process of its own, because the peak memory of a process never falls. The exponent of a
power law is fitted to the points of an axis, and stands beside the one that the axis cannot avoid. The time is that of
the fastest of REPEATS calls: on a CPU, CPU time of all threads, which other programs disturb less. The memory of a
training step and of a sampler is XLA's count for the program, in all devices together; that of other work is the rise
of the process's peak in the first call, on top of its input.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from cfd.benchmark.axes import AXES, Axis
from cfd.benchmark.side import host_peak_memory
from cfd.errors import UserError

REPEATS = 3
ENOUGH_SECONDS = 2.0
"""After so many seconds, a call is not repeated."""
LEAST_BYTES = 2**25
"""A smaller rise of the peak counts as this one: a process's memory varies by as much from one call to the next."""
TOLERANCE = 0.2
"""An exponent that exceeds the unavoidable one by more is marked."""


def exponent(sizes: Sequence[int | float], values: Sequence[int | float]) -> float:
    """The k of the power law values = c sizes^k that fits best: least squares of the logarithms.

    Raises ValueError if there are fewer than two different sizes, or if a number is not positive and finite.
    """
    x, y = np.asarray(sizes, np.float64), np.asarray(values, np.float64)
    numbers = np.concatenate([x, y])
    if len(x) != len(y) or len(set(x.tolist())) < 2 or not ((numbers > 0) & (numbers < np.inf)).all():
        raise ValueError(
            f"a power law needs positive finite values at two different sizes or more, got {list(values)} at "
            f"{list(sizes)}: measure more sizes"
        )
    x, y = np.log(x), np.log(y)
    x -= x.mean()
    return float(x @ y / (x @ x))


def measured(axis: Axis, size: int) -> dict[str, Any]:
    """The seconds and the bytes of one point, measured in this process."""
    work = axis.build(size)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    spent, before = [], host_peak_memory()
    while len(spent) < REPEATS and sum(spent) < ENOUGH_SECONDS:
        start = clock()
        work.call()
        spent.append(clock() - start)
        if len(spent) == 1:
            rise = max(host_peak_memory() - before, LEAST_BYTES)
    memory = rise if work.memory is None else work.memory
    return {"seconds": min(spent), "bytes": memory, "device": jax.devices()[0].device_kind}


def points(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each point of these axes as soon as its process ends. Raises UserError if a process fails."""
    total = sum(len(AXES[name].sizes) for name in names)
    number = 0
    for name in names:
        for size in AXES[name].sizes:
            number += 1
            point = {"axis": name, "size": size} | in_own_process(name, size)
            shown = f"{point['seconds'] * 1e3:.4g} ms, {point['bytes'] / 1e6:.4g} MB"
            print(f"{number:{len(str(total))}} of {total}  {AXES[name].what} = {size:,}: {shown}", flush=True)
            yield point


def in_own_process(name: str, size: int) -> dict[str, Any]:
    """`measured`, in a new process. Raises UserError with the last line of its errors if it fails."""
    environment = dict(os.environ)
    if AXES[name].virtual:
        flags = [environment.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={size}"]
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags).strip()}
        environment.pop("JAX_NUM_CPU_DEVICES", None)
    command = [sys.executable, "-m", "cfd.benchmark.growth", name, str(size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        others = ",".join(other for other in AXES if other != name)
        raise UserError(f"{AXES[name].what} = {size:,} was not measured ({reason}): leave it out, --growth={others}")
    return json.loads(done.stdout.splitlines()[-1])


def fits(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{axis: the exponents of its time and memory}, of the axes with two points or more."""
    fitted = {}
    for name in dict.fromkeys(point["axis"] for point in found):
        own = [point for point in found if point["axis"] == name]
        if len(own) > 1:
            sizes = [point["size"] for point in own]
            fitted[name] = {key: exponent(sizes, [point[key] for point in own]) for key in ("seconds", "bytes")}
    return fitted


def table(found: Sequence[dict[str, Any]]) -> str:
    """The points and the exponents as a Markdown table: the fitted one, and the unavoidable one in brackets.

    An exponent that is larger than it must be is marked with "!".
    """
    fitted = fits(found)
    lines = ["| | sizes | ms | time | MB | memory |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(point["axis"] for point in found):
        own, axis = [point for point in found if point["axis"] == name], AXES[name]
        cells = [" / ".join(f"{point['size']:,}" for point in own)]
        for key, unit, least in (("seconds", 1e3, axis.time), ("bytes", 1e-6, axis.memory)):
            values = [f"{'< ' * (point[key] == LEAST_BYTES)}{rounded(point[key] * unit)}" for point in own]
            cells.append(" / ".join(values))
            k = round(fitted[name][key], 2) + 0.0 if name in fitted else None  # + 0.0: no −0
            cells.append("–" if k is None else f"{k:.2f} ({least:g}){'!' * (k > least + TOLERANCE)}")
        lines.append(f"| {axis.what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rounded(value: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    print(json.dumps(measured(AXES[sys.argv[1]], int(sys.argv[2]))))
