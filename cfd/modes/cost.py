"""`--mode=cost`: the cost of a guided image beside its FID, for every way to guide that was swept.

Network evaluations and their floating-point operations are counted; for a rule that decides by the images, while a
batch is sampled. The time is measured: one process samples batches of all ways in turns, on one device. It depends on
the weight only through the number of evaluations. Rows with the same program and the same number are timed once.
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
from cfd.modes import compare, figures, guides, rules, settings, tables
from cfd.modes.cells import STEPS, interval_of
from cfd.modes.measuring import Model, sampling_of_row
from cfd.modes.sampler import Guide, Network, SampleSpec, compile_sampler, evaluation_flops, evaluations, second_flops
from cfd.runs import files, manifest, results
from cfd.runs.results import SETTINGS, Row

ROUNDS = 5
"""Batches of each way whose time is measured, after one that compiles."""
CPU_IMAGES = 64
"""Images per batch on a CPU, at most: 250 of digits take 6 % less time per image. Elsewhere, sample.batch_size."""
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
GUIDED = ("rule", "guide", "interval")
"""The settings that do not change unguided images."""


class Counted(NamedTuple):
    """A row of a sweep, and its costs without those of time.

    `draw` samples a batch. Its time is that of all rows with the same `program`: a network, how it is sampled, the
    network of the guide, and the number of evaluations.
    """

    row: Row
    costs: dict[str, float]
    program: tuple[Any, ...]
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
    images = min(config.sample.batch_size, *(row["num_samples"] for row in means))
    if jax.default_backend() == "cpu":
        images = min(images, CPU_IMAGES)
    counted: list[Counted] = []
    for run, place in places.items():
        here = config if place == folder else settings.config_of_run(place)
        rows = [row for row in means if row["run"] == run]
        counted += counted_rows(here, place, rows if counted else [base, *rows], mesh, images)
    unguided, ratios = time_of(counted)
    lines = []
    for row, costs, program, _ in counted[1:]:
        of_unguided = {"cost": costs["flops"] / counted[0].costs["flops"], "time": ratios[program]}
        lines.append(row | costs | of_unguided | {"seconds": ratios[program] * unguided / images})
    text = "\n\n".join(filter(None, [table(lines), tables.caption(lines), note(images)]))
    files.write_atomically(os.path.join(out, "cost.md"), text + "\n")
    files.write_atomically(os.path.join(out, "cost.csv"), to_csv(lines))
    figures.save_figure(os.path.join(out, "cost.png"), figure(lines))
    return text


def counted_rows(config: Config, folder: str, rows: Sequence[Row], mesh: Mesh, images: int) -> list[Counted]:
    """The rows of a run, each with its evaluations and operations, and with a function that samples `images` of it."""
    run = settings.open_run(config, folder)
    check_settings(run.config, folder, rows)
    _, guide_at = guides.open_guides(run.config, run, mesh, sorted({row["guide"] for row in rows}))
    first = run.model_at(rows[0]["step"], rows[0]["ema"])
    network = settings.network_of_run(first)
    params, classifier = parallel.replicate(mesh, first.params), parallel.replicate(mesh, run.classifier)
    guide_at = functools.cache(functools.partial(guide_at, network))
    sampling = settings.sampling_of(run.config)._replace(batch_size=images)
    model = Model(network, sampling, lambda *_: params, classifier, mesh, guide_at)
    draw, count_of = drawer(model), counter(model)
    flops = evaluation_flops(network, params)
    second_of = functools.cache(lambda text: second_flops(network, params, flops, guide_at(text)))

    def counted(row: Row) -> Counted:
        sampling, guide = sampling_of_row(model, row), guide_at(row["guide"])
        count: float = evaluations(sampling, row["w"], interval_of(row), network.student)
        reuse = sampling.guidance.reuse
        if reuse is not None and reuse.cosine > -1.0 and count > row["num_steps"]:
            count = count_of(row)
        guided = (count - row["num_steps"]) * second_of(row["guide"]) if count > row["num_steps"] else 0.0
        costs = {"evaluations": count, "flops": row["num_steps"] * flops + guided}
        program = network, sampling, guide and guide.network, count
        return Counted(row, costs, program, functools.partial(draw, row))

    return [counted(row) for row in rows]


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


def drawer(model: Model) -> Callable[[Row], None]:
    """A function that samples one batch of the images of a row. Rows that are sampled alike share a program."""
    sampler_at = functools.cache(functools.partial(compile_sampler, model.network, mesh=model.mesh))
    count = model.sampling.batch_size
    labels = manifest.labels_of("balanced", 0, count, model.network.num_classes, None)
    index = np.arange(count, dtype=np.int32)

    def draw(row: Row) -> None:
        guide = model.guide_at(row["guide"])
        sampler = sampler_at(sampling_of_row(model, row), guide=guide and guide.network)
        params, w = model.params_at(row["step"], row["ema"]), np.full(count, row["w"], np.float32)
        spec = SampleSpec(np.zeros(count, np.uint32), index, labels, w)
        weights = {"classifier": model.classifier, "guide": guide and guide.params}
        for _ in sampler(params, spec, v=row["v"], interval=interval_of(row), **weights):
            pass

    return draw


def counter(model: Model) -> Callable[[Row], float]:
    """A function that counts the network evaluations per image of one batch of a row, as they happen."""
    calls = []

    def counting(network: Network) -> Network:
        def eps_of_params(params: Any) -> Any:
            eps_fn = network.eps_of_params(params)

            def counted_fn(z: Any, logsnr: Any, labels: Any) -> Any:
                jax.debug.callback(lambda _: calls.append(1), logsnr[0])
                return eps_fn(z, logsnr, labels)

            return counted_fn

        return network._replace(eps_of_params=eps_of_params)

    @functools.cache
    def guide_at(text: str) -> Guide | None:
        guide = model.guide_at(text)
        return guide and guide._replace(network=counting(guide.network))

    draw = drawer(model._replace(network=counting(model.network), guide_at=guide_at))

    def count_of(row: Row) -> float:
        print(f"Counting the evaluations of {in_words(row)} in a batch.", flush=True)
        calls.clear()
        draw(row)
        jax.effects_barrier()
        return float(len(calls))

    return count_of


def time_of(counted: Sequence[Counted]) -> tuple[float, dict[tuple[Any, ...], float]]:
    """The seconds of a batch of the first row, and {program: its time as a multiple of that}.

    A program is timed at the first of its rows. Each of its batches is compared with one of the first row just before,
    in ROUNDS rounds in which all programs take turns. A line says when a program is compiled, and when a round ends.
    """
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    programs: dict[tuple[Any, ...], Counted] = {}
    for one in counted:
        programs.setdefault(one.program, one)

    def seconds(one: Counted) -> float:
        start = clock()
        one.draw()
        return clock() - start

    for number, one in enumerate(programs.values(), 1):
        start = time.perf_counter()
        one.draw()
        count, spent = one.costs["evaluations"], time.perf_counter() - start
        where = f"{number:{len(str(len(programs)))}} of {len(programs)}"
        print(f"{where}  {in_words(one.row)}: {count:g} evaluations, ready in {spent:.1f} s", flush=True)
    pairs: dict[tuple[Any, ...], list[tuple[float, float]]] = {program: [] for program in programs}
    for number in range(1, ROUNDS + 1):
        start = time.perf_counter()
        for program, one in programs.items():
            pairs[program].append((seconds(counted[0]), seconds(one)))
        print(f"Round {number} of {ROUNDS}: {time.perf_counter() - start:.1f} s", flush=True)
    unguided = statistics.median(first for own in pairs.values() for first, _ in own)
    return unguided, {key: statistics.median(ours / first for first, ours in own) for key, own in pairs.items()}


def in_words(row: Row) -> str:
    """A row in a line of progress."""
    run = os.path.basename(os.path.normpath(row["run"]))
    return "  ".join(filter(None, [run, row["rule"], row["guide"], row["interval"], f"w {row['w']:g}"]))


def ways(lines: Sequence[Row]) -> dict[str, list[Row]]:
    """{name: the rows of a way, in the order of w}. Unguided images are a way of their own.

    A way is named by its run, if there are several, and by the settings that vary within its run.
    """
    runs: dict[str, list[Row]] = {}
    for line in lines:
        runs.setdefault(line["run"], []).append(line)
    varied = {run: [key for key in tables.varied(own) if key not in OWN] for run, own in runs.items()}
    grouped: dict[str, list[Row]] = {}
    for line in sorted(lines, key=lambda line: line["w"]):
        name = [os.path.basename(os.path.normpath(line["run"]))] if len(runs) > 1 else []
        unguided = is_unguided(line)
        keys = [key for key in varied[line["run"]] if line[key] != "" and not (unguided and key in GUIDED)]
        named = tables.in_full(line, (key for key in keys if key != "rule"))
        rule = "w = 0" if unguided else line["rule"] if "rule" in keys else "guided"
        grouped.setdefault(", ".join(filter(None, [*name, rule, named])), []).append(line)
    return grouped


def is_unguided(line: Row) -> bool:
    """Whether the images of a row have no guidance: w is 0, and the rule has none of its own."""
    return not line["w"] and not rules.guidance_of(line["rule"]).always


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


def note(images: int) -> str:
    """How the costs were found."""
    device = jax.local_devices()[0].device_kind
    clock = "CPU time of all threads" if jax.default_backend() == "cpu" else "time"
    return (
        "Evaluations, GFLOP and ms are per image. GFLOP are those of the network evaluations, as XLA counts them; ms "
        f"are {clock} of a batch of {images} images on one {device} device. All ways take turns in {ROUNDS} rounds. A "
        "batch is divided by one of unguided images just before; the ratio is the median over the rounds, and ms are "
        "its product with the median of unguided images. Weights at which a way has the same number of evaluations are "
        "timed once."
    )


def figure(lines: Sequence[Row]) -> Any:
    """A matplotlib Figure with a row per way, in the order of cost: its cost, and its FID at each weight.

    It has the weights at which several ways were measured, or all if there are none.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    grouped = sorted(ways(lines).items(), key=lambda item: min(line["cost"] for line in item[1]), reverse=True)
    guided = [line for _, own in grouped for line in own if line["w"]]
    weights = sorted({line["w"] for line in guided})
    weights = [w for w in weights if sum(line["w"] == w for line in guided) > 1] or weights
    drawn = Figure(figsize=(5 + 2.2 * (1 + len(weights)), 1.6 + 0.24 * len(grouped)), layout="constrained")
    costs, *every = drawn.subplots(1, 1 + len(weights), sharey=True, squeeze=False)[0]
    for key, colour, label in (("cost", "C0", "operations"), ("time", "C1", "time")):
        points = [(line[key], y) for y, (_, own) in enumerate(grouped) for line in own]
        costs.plot(*zip(*points, strict=True), "o", color=colour, label=label, markersize=5, alpha=0.8)
    costs.set(title="cost", xlabel="x unguided", yticks=range(len(grouped)), yticklabels=[name for name, _ in grouped])
    costs.legend(loc="lower left", fontsize="small")
    for axes, w in zip(every, weights, strict=True):
        here = [(y, line) for y, (_, own) in enumerate(grouped) for line in own if line["w"] in (0.0, w)]
        for y, line in here:
            colour = "0.5" if is_unguided(line) else "C2"
            filled = not is_unguided(line) and not any(beats(o, line) for _, o in here if not is_unguided(o))
            axes.plot(line["fid"], y, "o", color=colour, markersize=5, markerfacecolor=colour if filled else "white")
            if ends := figures.interval_of(line, "fid"):
                axes.hlines(y, *ends, color=colour, linewidth=1.0, zorder=1)
        fids = [line["fid"] for _, line in here]
        axes.set(title=f"w = {w:g}", xlabel=tables.measure_name("fid", lines))
        if max(fids) > 10 * min(fids) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in (costs, *every):
        axes.grid(alpha=0.3)
    drawn.supxlabel("Filled: no way that costs no more operations has a lower FID. Grey: unguided.", fontsize="small")
    return drawn


def beats(line: Row, other: Row) -> bool:
    """Whether a row has a lower FID than another one, and needs no more operations."""
    return line["fid"] < other["fid"] and line["cost"] <= other["cost"]


def to_csv(lines: Sequence[Row]) -> str:
    """The settings of each row, its costs, and its FID with the ends of its interval."""
    columns = ("run", *SETTINGS, *COSTS, "fid", "fid_low", "fid_high", "class_accuracy")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
