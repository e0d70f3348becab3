"""The cost of the network, of training and of sampling on this machine, alone or compared with openai/guided-diffusion.

    python -m cfd.benchmark --network=small
    python -m cfd.benchmark --network=adm64 --dtype=bfloat16 --batch_size=128 --in_flight=4 --json=h200.json
    python -m cfd.benchmark --network=small --peer=../guided-diffusion    # needs PyTorch
    python -m cfd.benchmark --network=adm64 --dtype=bfloat16 --compile_for=v5e:2x2    # needs jax[tpu], and no TPU
    python -m cfd.benchmark --growth --json=growth.json

It prints a line per round, then a table, and writes the result as JSON to --json. If it is stopped by Ctrl-C,
SIGTERM or a closed terminal, or if the process of a side dies, it prints and writes the results until then and exits
with code 1.

With --compile_for, it compiles for TPU chips and runs nothing: see `cfd.benchmark.ahead`. With --growth, it measures
how time and memory grow, and nothing else: see `cfd.benchmark.growth`.

With --peer, both networks have the same weights, and nothing is timed unless their outputs agree. Each side runs in a
process of its own. The sides take turns, and a ratio is the median over the rounds of time here / time there. Every
round times every row, so that rows can be compared with each other too.

A time is that of one finished call. With --in_flight=4, it is the mean over four calls that the device gets at once, as
training gives the device the next step before the last one has ended. FLOPs are those of the model: 2 per multiply-add,
and a training step is three forward passes. Their share is relative to the rate of this device in one large matrix
product. On a CPU the share can exceed 1, because `cfd.kernels.winograd` saves one half to two thirds of the
multiplications. The peak memory covers all rows of a run: ask for a single row to measure its own.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from jaxtyping import Float64

from cfd.benchmark import ahead, growth
from cfd.benchmark.ours import our_side
from cfd.benchmark.side import NETWORKS, PASSES, PEER_ROW, Died, Setting, Side
from cfd.devices import output
from cfd.errors import UserError
from cfd.runs.files import write_atomically

BATCH_SIZE = {"small": 16, "adm64": 2, "mp_small": 16, "mp64": 2}
AHEAD_BATCH_SIZE = 32  # per chip

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
"""{row: its name in the table}."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if --json is given.

    It exits with code 1 if the run was stopped or a side died, after the same output for what was measured until then.
    An error that a user can correct is printed in a line; every other error is raised.
    """
    flags = parse(arguments)
    with output.lasting(lambda _: None):  # the JSON file is written although nobody reads the table
        try:
            if flags.growth:
                reason = measure_growth(flags)
            else:
                reason = compile_for_tpus(flags) if flags.compile_for else benchmark(flags)
        except UserError as error:
            reason = f"error: {error}"
    if reason:
        sys.exit(reason)


def compile_for_tpus(flags: argparse.Namespace) -> str:
    """Compiles the rows for the chips of --compile_for, and reports them. Returns why it ended early, or ""."""
    setting = ahead.Setting(
        compile_for=flags.compile_for,
        slices=flags.slices,
        fsdp=flags.fsdp,
        network=flags.network,
        batch_size=flags.batch_size or AHEAD_BATCH_SIZE,
        dtype=flags.dtype,
        remat=flags.remat,
        rows=tuple(flags.rows.split(",")),
    )
    found, reason = [], ""
    try:
        with interruptible():
            for facts in ahead.compile_ahead(setting):
                found.append(facts)
                print(ahead.table(setting, found), flush=True)
    except UserError as error:
        reason = f"error: {error}"
    except KeyboardInterrupt as e:
        reason = f"error: {e}; {len(found)} of {len(setting.rows)} programs are compiled"
    if found and flags.json:
        result = {"setting": setting._asdict(), "programs": found}
        write_atomically(Path(flags.json), json.dumps(result, indent=1) + "\n")
    return reason


def measure_growth(flags: argparse.Namespace) -> str:
    """Measures the axes of --growth and reports them. Returns why it ended early, or ""."""
    found, reason = [], ""
    try:
        with interruptible():
            for point in growth.points(flags.growth):
                found.append(point)
    except UserError as error:
        reason = f"error: {error}"
    except KeyboardInterrupt as e:
        reason = f"error: {e}; {len(found)} points are measured"
    if found:
        print(growth.table(found), flush=True)
        if flags.json:
            result = {"points": found, "exponents": growth.fits(found)}
            write_atomically(Path(flags.json), json.dumps(result, indent=1) + "\n")
    return reason


def benchmark(flags: argparse.Namespace) -> str:
    """Runs the benchmark and reports it. Returns the reason why it ended early, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            network=flags.network,
            batch_size=flags.batch_size or BATCH_SIZE[flags.network],
            dtype=flags.dtype,
            remat=flags.remat,
            sampler_steps=flags.sampler_steps,
            rows=tuple(flags.rows.split(",")),
            in_flight=flags.in_flight,
            profile=flags.profile,
            peer=flags.peer,
            folder=folder,
        )
        result, reason = run(setting, flags.rounds)
    if any("ours" in times for times in result["seconds"].values()):
        print(table(result), flush=True)
        if flags.json:
            write_atomically(Path(flags.json), json.dumps(result, indent=1) + "\n")
    return reason


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cfd.benchmark", description="Speed on this machine.")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="small")
    parser.add_argument("--batch_size", type=int, default=0, help="0: 16 at 32x32, 2 at 64x64")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--remat", action="store_true", help="recompute activations in the gradient")
    parser.add_argument("--sampler_steps", type=int, default=256, help="T of the sampler")
    parser.add_argument("--rows", default="", help=f"what to time or compile: {','.join(MEANS)}")
    parser.add_argument("--compile_for", default="", help="TPU chips to compile for, such as v5e:2x2; none is needed")
    parser.add_argument("--slices", type=int, default=1, help="slices of TPU chips, with --compile_for")
    parser.add_argument("--fsdp", type=int, default=1, help="chips that share the parameters, with --compile_for")
    axes = ",".join(growth.AXES)
    parser.add_argument("--growth", nargs="?", const=axes, default="", help=f"how cost grows along axes: {axes}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--in_flight", type=int, default=1, help="calls that the device gets before one is waited for")
    parser.add_argument("--profile", default="", help="a row whose operations are listed, the longest first")
    parser.add_argument("--peer", default="", help="a checkout of openai/guided-diffusion")
    parser.add_argument("--json", default="", help="a file for the result, in addition to the table")
    flags = parser.parse_args(arguments)
    if flags.growth:
        others = [name for name in vars(flags) if getattr(flags, name) != parser.get_default(name)]
        if others := [f"--{name}" for name in others if name not in ("growth", "json")]:
            parser.error(f"--growth measures networks and sizes of its own: leave out {', '.join(others)}")
        flags.growth = tuple(dict.fromkeys(flags.growth.split(",")))
        if unknown := sorted(set(flags.growth) - set(growth.AXES)):
            parser.error(f"--growth has {unknown}: choose from {axes}")
    rows = ahead.PROGRAMS if flags.compile_for else tuple(MEANS)
    flags.rows = flags.rows or ("train,guided" if flags.compile_for else ",".join(rows))
    for name, least in dict(rounds=1, in_flight=1, sampler_steps=1, batch_size=0, slices=1, fsdp=1).items():
        if getattr(flags, name) < least:
            parser.error(f"--{name} is {getattr(flags, name)}: give an integer >= {least}")
    if unknown := set(flags.rows.split(",")) - set(rows):
        parser.error(f"--rows has {sorted(unknown)}: choose from {','.join(rows)}")
    for name in ("profile", "peer") if flags.compile_for else ():
        if getattr(flags, name):
            parser.error(f"--{name} is {getattr(flags, name)!r}: --compile_for runs nothing; leave one of them out")
    if flags.profile and flags.profile not in flags.rows.split(","):
        parser.error(f"--profile is {flags.profile!r}: choose one of --rows, {flags.rows}")
    if flags.peer and not Path(flags.peer, "guided_diffusion").is_dir():
        parser.error(f"--peer is {flags.peer!r}, which holds no guided_diffusion/: give a checkout of the repository")
    if flags.peer and NETWORKS[flags.network].get("network", "adm") != "adm":
        parser.error(f"--network={flags.network} is no network of --peer: give small or adm64, or leave --peer out")
    if flags.json and not os.access(Path(flags.json).absolute().parent, os.W_OK):
        parser.error(f"--json is {flags.json!r}, whose folder cannot be written: give a file in another")
    return flags


def run(setting: Setting, rounds: int) -> tuple[dict[str, Any], str]:
    """The result, with the seconds of every row and round, and the reason why the run ended early, or "".

    Raises ValueError if the outputs of the sides differ.
    """
    sides: dict[str, Side] = {}
    seconds: dict[str, dict[str, list[float]]] = {row: {} for row in setting.rows}
    difference, whole_rounds, reason = None, 0, ""
    try:
        with interruptible():
            difference = build(setting, sides)
            for number in range(1, rounds + 1):
                time_round(sides, number, seconds)
                whole_rounds = number
                print(f"Round {number} of {rounds}; medians so far: {medians(seconds)}.", flush=True)
            for side in sides.values():
                side.close()
    except (KeyboardInterrupt, Died) as e:
        reason = f"error: {e}; {whole_rounds} of {rounds} rounds are whole"
    finally:
        for side in sides.values():
            side.kill()
    result = {
        "setting": {key: value for key, value in setting._asdict().items() if key != "folder"} | {"rounds": rounds},
        "difference": difference,
        "whole_rounds": whole_rounds,
        "facts": {name: sides[name].facts for name in ("ours", "peer") if name in sides},
        "seconds": seconds,
    }
    return result, reason


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, Ctrl-C, SIGTERM and a closed terminal raise a KeyboardInterrupt that names the signal."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup
        numbers.remove(signal.SIGHUP)
    handlers = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def build(setting: Setting, sides: dict[str, Side]) -> float | None:
    """Builds the sides and adds them to `sides`.

    Returns the largest difference of their outputs, relative to the largest value, or None if there is no peer.
    """
    if setting.peer:
        try:
            from cfd.benchmark.peer import peer_side
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise UserError("--peer needs PyTorch: pip install torch") from None

        # The peer is first, because it writes the weights that this package's side reads.
        sides["peer"] = Side("peer", peer_side, setting)
        sides["peer"].wait_until_built()
    sides["ours"] = Side("ours", our_side, setting)
    sides["ours"].wait_until_built()
    if not setting.peer:
        return None
    ours, theirs = sides["ours"].output, sides["peer"].output
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not difference <= (1e-3 if setting.dtype == "float32" else 5e-2):
        raise UserError(f"the outputs differ by {difference:.2g} of the largest: nothing was timed")
    print(f"Same weights; outputs agree to {difference:.1e} of the largest value.", flush=True)
    return difference


def time_round(sides: dict[str, Side], number: int, seconds: dict[str, dict[str, list[float]]]) -> None:
    """Adds one time of every row to `seconds`. The peer is first in odd rounds, and this package in even ones."""
    for row, times in seconds.items():
        turns = [("ours", row)]
        if "peer" in sides and row in PEER_ROW:
            turns.insert(number % 2 == 0, ("peer", PEER_ROW[row]))
        for name, side_row in turns:
            times.setdefault(name, []).append(sides[name].time(side_row))


def medians(seconds: dict[str, dict[str, list[float]]]) -> str:
    """The medians of all rows in one line, with the ratio to the peer if there is one."""
    return ", ".join(
        f"{row} {np.median(times['ours']) * 1e3:.4g} ms"
        + (f" ({np.median(ratios(times['ours'], times['peer'])):.2f} of the peer's)" if "peer" in times else "")
        for row, times in seconds.items()
    )


def ratios(a: Sequence[float], b: Sequence[float]) -> Float64[np.ndarray, "rounds"]:
    """a / b in every round that has both: in an interrupted round, one may be missing."""
    rounds = min(len(a), len(b))
    return np.array(a[:rounds], np.float64) / np.array(b[:rounds], np.float64)


def table(result: dict[str, Any]) -> str:
    """The result as text: medians and quartiles over the rounds, and the ratio to the peer if there is one.

    The share is "-" if the run was stopped before the rate of matrix products was measured.
    """
    setting, facts = result["setting"], result["facts"]["ours"]
    timed = {row: times for row, times in result["seconds"].items() if "ours" in times}
    rate, median = facts.get("matrix_flops_per_second"), f"median of {max(1, result['whole_rounds'])} [quartiles]"
    lines = [
        "{network}, batch {batch_size}, {dtype}, T = {sampler_steps}, {in_flight} in flight".format(**setting)
        + f" on {facts['device']}: {facts['parameters']:,} parameters, "
        f"{facts['forward_flops'] / setting['batch_size'] / 1e9:.2f} GFLOP per image forward"
        + (f"; matrix products run at {rate / 1e12:.3g} TFLOP/s" if rate else ""),
        f"{median:40s}{'ms':>34s}{'images/s':>10s}{'TFLOP/s':>9s}"
        f"{'share':>7s}{'compile s':>11s}" + ("   / peer [quartiles]" if "peer" in result["facts"] else ""),
    ]
    for row, times in timed.items():
        low, middle, high = np.quantile(times["ours"], (0.25, 0.5, 0.75))
        steps = setting["sampler_steps"] if row in ("calls", "sampler") else 1
        line = f"{MEANS[row]:40s}{f'{middle * 1e3:.4g} [{low * 1e3:.4g}, {high * 1e3:.4g}]':>34s}"
        line += f"{setting['batch_size'] / middle:10.4g}"
        if row in PASSES:
            flops = PASSES[row] * steps * facts["forward_flops"] / middle
            line += f"{flops / 1e12:9.3g}{f'{flops / rate:.1%}' if rate else '-':>7s}"
            line += f"{facts['compile_seconds'][row]:11.1f}"
        if "peer" in times:
            low, middle, high = np.quantile(ratios(times["ours"], times["peer"]), (0.25, 0.5, 0.75))
            line += f"   {middle:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(line)
    for one, other in (("w0", "guided"), ("guided", "guided-doubled"), ("sampler", "calls"), ("input", "train")):
        if {one, other} <= set(timed):
            ratio = np.median(ratios(timed[one]["ours"], timed[other]["ours"]))
            lines.append(f"{MEANS[one]} / {MEANS[other]}: {ratio:.3f}")
    profile = facts.get("profile", {})
    for operation, spent in list(profile.items())[:8]:
        share = spent / sum(profile.values())
        lines.append(f"{operation:40s}{spent * 1e3:10.4g} ms{share:7.1%} of {setting['profile']}")
    for name, found in result["facts"].items():
        lines.append(f"peak memory, {name}: {found['peak_memory_bytes'] / 1e9:.2f} GB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
