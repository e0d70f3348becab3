"""`--mode=cost`: the cost of a guided image beside its FID, for every way to guide that was swept.

Network evaluations and their floating-point operations are counted; for a rule that decides by the images, while a
batch is sampled. The time is measured: one process samples batches of all ways in turns, on one device.
"""

import csv
import functools
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from cfd.config import Config
from cfd.devices import parallel
from cfd.errors import UserError
from cfd.fields import DEFAULTS
from cfd.modes import compare, figures, guides, settings, tables
from cfd.modes.cells import STEPS, interval_of
from cfd.modes.measuring import Model, sampling_of_row
from cfd.modes.sampler import Network, SampleSpec, compile_sampler, evaluation_flops, evaluations, second_flops
from cfd.runs import files, manifest, results
from cfd.runs.results import SETTINGS, Row

ROUNDS = 5
"""Batches of each way whose time is measured, after one that compiles."""
COSTS = ("evaluations", "flops", "cost", "seconds", "time")
"""The costs of each row: evaluations per image, of the network and of the guide together; floating-point
operations, and seconds, per image; and both as a multiple of those of an unguided image of the run."""
SHOWN = (
    ("evaluations", "g", 1.0),
    ("flops", ".3g", 1e-9),
    ("cost", ".3f", 1.0),
    ("seconds", ".3g", 1e3),
    ("time", ".2f", 1.0),
)
"""The costs in a table: a format, and the factor of the unit."""
OWN = ("w", "seed")
"""The settings in which the rows of one way differ."""


class Way(NamedTuple):
    """A row of a sweep, its costs without those of time, and the function that samples a batch."""

    row: Row
    costs: dict[str, float]
    draw: Callable[[], None]


def cost(config: Config, folder: str, others: Sequence[str], out: str) -> str:
    """The cost and the FID of an image, in each cell of the sweeps of the run in `folder` and of other runs.

    It takes the rows that `compare` takes. On a CPU, the time is that of all its threads, which other jobs disturb
    less. Writes cost.csv, cost.md and cost.png to `out`, and returns the table. Raises ValueError as `compare` and
    `check_settings` do.
    """
    places = {results.swept_folder(folder, out): folder, **{run: run for run in others}}
    _, means = compare.rows_of_runs(list(places), config.sample.step)
    mesh = Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    base = means[0] | {"rule": "", "guide": "", "interval": "", "w": 0.0}
    ways = []
    for run, place in places.items():
        here = config if place == folder else settings.config_of_run(place)
        rows = [row for row in means if row["run"] == run]
        ways += ways_of(here, place, rows if ways else [base, *rows], mesh)
    seconds = time_of([way.draw for way in ways], min(config.sample.batch_size, base["num_samples"]))
    unguided, lines = ways[0].costs["flops"], []
    for way, own in zip(ways[1:], seconds[1:], strict=True):
        ratio = statistics.median(ours / theirs for ours, theirs in zip(own, seconds[0], strict=True))
        found = {"cost": way.costs["flops"] / unguided, "seconds": statistics.median(own), "time": ratio}
        lines.append(way.row | way.costs | found)
    text = "\n\n".join(filter(None, [table(lines), tables.caption(lines), note()]))
    files.write_atomically(os.path.join(out, "cost.md"), text + "\n")
    files.write_atomically(os.path.join(out, "cost.csv"), to_csv(lines))
    figures.save_figure(os.path.join(out, "cost.png"), figure(lines))
    return text


def ways_of(config: Config, folder: str, rows: Sequence[Row], mesh: Mesh) -> list[Way]:
    """The ways that the rows of a run stand for."""
    run = settings.open_run(config, folder)
    check_settings(run.config, folder, rows)
    _, guide_at = guides.open_guides(run.config, run, mesh, sorted({row["guide"] for row in rows}))
    first = run.model_at(rows[0]["step"], rows[0]["ema"])
    network = settings.network_of_run(first)
    params, classifier = parallel.replicate(mesh, first.params), parallel.replicate(mesh, run.classifier)
    guide_at = functools.cache(functools.partial(guide_at, network))
    model = Model(network, settings.sampling_of(run.config), lambda *_: params, classifier, mesh, guide_at)
    sampler_at = functools.cache(functools.partial(compile_sampler, network, mesh=mesh))
    flops = evaluation_flops(network, params)
    second_of = functools.cache(lambda text: second_flops(network, params, flops, guide_at(text)))

    def way_of(row: Row) -> Way:
        sampling, guide = sampling_of_row(model, row), guide_at(row["guide"])
        sampler = sampler_at(sampling, guide=guide and guide.network)
        draw = functools.partial(draw_batch, model, sampler, row)
        count: float = evaluations(sampling, row["w"], interval_of(row), network.student)
        if sampling.guidance.reuse is not None and sampling.guidance.reuse.cosine > -1.0 and row["w"]:
            count = counted(model, row)
        second = (count - row["num_steps"]) * second_of(row["guide"]) if count > row["num_steps"] else 0.0
        return Way(row, {"evaluations": count, "flops": row["num_steps"] * flops + second}, draw)

    return [way_of(row) for row in rows]


def check_settings(config: Config, folder: str, rows: Sequence[Row]) -> None:
    """Raises ValueError if the config samples rows in another way than they were, in what is no column of sweep.csv."""
    sample, trained = config.sample, config.process.schedule
    here = {name: sample[name] for name in ("clip", "clean_end", "schedule", *STEPS)}
    defaults = {name: DEFAULTS[f"sample.{name}"] for name in ("clean_end", *STEPS)}
    for row in rows:
        made = json.loads(row["weights"])[1]
        there = here | defaults | made | made.get("process", {})
        there["schedule"] = sample.schedule if there["schedule"] == (sample.schedule or trained) else there["schedule"]
        if differ := [name for name in here if there[name] != here[name]]:
            flags = " ".join(f"--config.sample.{name}={there[name]!r}" for name in differ)
            raise UserError(
                f"{folder} was swept with {flags}, and the cost would be that of other images: give --config={folder} "
                "with these flags, or sweep it again without them"
            )


def draw_batch(model: Model, sampler: Any, row: Row) -> None:
    """Samples one batch of the images of a row."""
    count = min(model.sampling.batch_size, row["num_samples"])
    labels = manifest.labels_of("balanced", 0, count, model.network.num_classes, None)
    index = np.arange(count, dtype=np.int32)
    spec = SampleSpec(np.zeros(count, np.uint32), index, labels, np.full(count, row["w"], np.float32))
    guide = model.guide_at(row["guide"])
    weights = {"classifier": model.classifier, "guide": guide and guide.params}
    for _ in sampler(model.params_at(row["step"], row["ema"]), spec, v=row["v"], interval=interval_of(row), **weights):
        pass


def counted(model: Model, row: Row) -> float:
    """The network evaluations per image of one batch of a row, counted as they happen."""
    calls = []

    def counting(network: Network) -> Network:
        def eps_of_params(params: Any) -> Any:
            eps_fn = network.eps_of_params(params)

            def counted_fn(z: Any, logsnr: Any, labels: Any) -> Any:
                jax.debug.callback(lambda _: calls.append(1), logsnr[0])
                return eps_fn(z, logsnr, labels)

            return counted_fn

        return network._replace(eps_of_params=eps_of_params)

    guide = model.guide_at(row["guide"])
    second = None if guide is None else counting(guide.network)
    draw_batch(model, compile_sampler(counting(model.network), sampling_of_row(model, row), model.mesh, second), row)
    jax.effects_barrier()
    return float(len(calls))


def time_of(draws: Sequence[Callable[[], None]], images: int) -> list[list[float]]:
    """The seconds per image of each function that samples a batch, in each of ROUNDS rounds of all of them."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds: list[list[float]] = [[] for _ in draws]
    for number in range(1 + ROUNDS):
        for draw, own in zip(draws, seconds, strict=True):
            start = clock()
            draw()
            if number > 0:
                own.append((clock() - start) / images)
    return seconds


def ways(lines: Sequence[Row]) -> dict[str, list[Row]]:
    """{name: the rows of a way, in the order of w}. Unguided images are a way of their own."""
    keys = [key for key in tables.varied(lines) if key not in OWN]
    several = len({line["run"] for line in lines}) > 1
    grouped: dict[str, list[Row]] = {}
    for line in sorted(lines, key=lambda line: line["w"]):
        run = os.path.basename(os.path.normpath(line["run"])) if several else ""
        named = (tables.in_full(line, keys) or "guided") if line["w"] else "w = 0"
        grouped.setdefault(", ".join(filter(None, [run, named])), []).append(line)
    return grouped


def table(lines: Sequence[Row]) -> str:
    """A Markdown table with a line per way: its costs, the ends of those that depend on w, and FID at every weight."""
    weights, body = sorted({line["w"] for line in lines}), []
    for name, own in ways(lines).items():
        fid = {line["w"]: tables.with_interval(line, "fid") for line in own}
        body.append([name, *(span(own, *shown) for shown in SHOWN), *(fid.get(w, "–") for w in weights)])
    fid = tables.measure_name("fid", lines)
    header = ["", "evaluations", "GFLOP", "x w = 0", "ms", "x w = 0", *(f"{fid} at w = {w:g}" for w in weights)]
    return tables.markdown(header, body)


def span(lines: Sequence[Row], key: str, form: str, factor: float) -> str:
    """A cost of a way: one number, or its ends over w."""
    written = list(dict.fromkeys(f"{factor * value:{form}}" for value in sorted(line[key] for line in lines)))
    return written[0] if len(written) == 1 else f"{written[0]} to {written[-1]}"


def note() -> str:
    """How the costs were found."""
    device = jax.local_devices()[0].device_kind
    clock = "CPU time of all threads" if jax.default_backend() == "cpu" else "time"
    return (
        "Evaluations, GFLOP and ms are per image. GFLOP are those of the network evaluations, as XLA counts them; ms "
        f"are {clock} of a batch on one {device} device, the median of {ROUNDS} rounds in which all ways take turns, "
        "and their ratio is the median of the ratios within a round."
    )


def figure(lines: Sequence[Row]) -> Any:
    """A matplotlib Figure: FID with its 95 % interval against the cost of an image, with axes for each weight."""
    from matplotlib.figure import Figure

    weights, grouped = sorted({line["w"] for line in lines if line["w"]}), ways(lines)
    drawn = Figure(figsize=(3.2 * max(2, len(weights)), 3.6 + 0.2 * len(grouped)), layout="constrained")
    every = drawn.subplots(1, max(1, len(weights)), squeeze=False)[0]
    for (name, own), style in zip(grouped.items(), figures.styles(len(grouped)), strict=True):
        for axes, w in zip(every, weights, strict=False):
            here = [line for line in own if line["w"] in (0.0, w)]
            axes.plot([line["cost"] for line in here], [line["fid"] for line in here], "o", label=name, **style)
            figures.bars(axes, here, "cost", "fid", style["color"])
    for axes, w in zip(every, weights, strict=False):
        axes.set(title=f"w = {w:g}", xlabel="FLOP of an image, x unguided")
        axes.grid(alpha=0.3)
    every[0].set_ylabel(tables.measure_name("fid", lines))
    drawn.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", fontsize="small")
    return drawn


def to_csv(lines: Sequence[Row]) -> str:
    """The settings of each row, its costs, and its FID with the ends of its interval."""
    columns = ("run", *SETTINGS, *COSTS, "fid", "fid_low", "fid_high", "class_accuracy")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
