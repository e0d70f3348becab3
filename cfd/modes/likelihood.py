"""`--mode=likelihood`: the variational bound of a run in bits per dimension, on the training and the held-out split.

likelihood.csv has a row per split, kind of labels and weight, and a manifest says how each was made. With
likelihood.classes, the row of the held-out split with labels and w = 0 also has the accuracy of the implicit
classifier: Ho and Salimans (arXiv:2207.12598), Section 3.2. likelihood.png is the progressive code of the held-out
split: distortion and rate at each level, and one against the other, as in Fig. 5 of Ho, Jain and Abbeel
(arXiv:2006.11239).
"""

import csv
import functools
import io
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

import cfd
from cfd.config import Config
from cfd.data.batches import load_arrays
from cfd.data.sources import Dataset
from cfd.devices import parallel, preemption, seeds, watchdog, xla
from cfd.errors import UserError
from cfd.evaluation.reference import evenly_spaced
from cfd.fields import DEFAULTS
from cfd.guidance import NULL_LABEL
from cfd.likelihood import Bound, bound, decoder_costs, rate_distortion
from cfd.loading import Loaded
from cfd.modes import figures, settings, students, tables
from cfd.process import linear
from cfd.runs import files, manifest, results
from cfd.sampling import grid

COLUMNS = (
    "step",
    "ema",
    "split",
    "labels",
    "w",
    "num_steps",
    "logsnr_max",
    "v",
    "prior",
    "diffusion",
    "reconstruction",
)
COLUMNS += ("total", "standard_error", "num_images", "class_accuracy", "manifest")
FIRST = 4.0
"""The smallest λ at which the chain may end. Before it, the decoder would have to code whole digits of a pixel."""


class Terms(NamedTuple):
    """The bound of n images: bits per dimension, with the decoder at each of the last levels; see `Bound`."""

    prior: Float[np.ndarray, " n"]
    kl: Float[np.ndarray, "s n"]
    decoder: Float[np.ndarray, "c n"]
    squared_error: Float[np.ndarray, "t n"]

    def totals(self) -> Float[np.ndarray, "c n"]:
        """The bound of the chains that end at each of the last levels."""
        spent = self.prior + np.cumsum(self.kl, axis=0)
        return spent[len(spent) - len(self.decoder) :] + self.decoder


def likelihood(config: Config, folder: str, out: str) -> str:
    """Compute the bound of the run in `folder` as the config's `likelihood` says, and write likelihood.csv to `out`.

    All chains end at the level that is best for the training split with its labels. Returns the table. Raises
    ValueError if the config asks for a score that the run does not train, and `preemption.Stopped` on request; the
    next start computes everything again.
    """
    read_rows(out)  # before hours of computing
    run = settings.open_run(by_labels(config), folder)
    config, mesh, asked = run.config, parallel.make_mesh(**run.config.mesh), run.config.likelihood
    if students.is_student(config):
        raise UserError(
            f"{folder} is the run of a student, which learned the guided score and not the bound: give the run that it "
            "learned from"
        )
    parallel.check_batch("sample.batch_size", config.sample.batch_size, mesh)
    levels = levels_of(config)
    splits = {name: settings.open_split(config, name) for name in (config.data.split, config.eval.test_split)}
    model = run.model_at(config.sample.step, config.sample.ema)
    costs_of, compute = compile_bound(model, config, mesh, levels)
    kinds = [("class", float(w)) for w in asked.weights] if run.class_names and config.train.p_uncond < 1 else []
    settings.check_weights(config, [w for _, w in kinds] or (-1.0,))
    if config.train.p_uncond > 0 or not run.class_names:
        kinds.append(("none", 0.0))
    found: dict[tuple[str, str, float], Terms] = {}
    if kinds[0][0] == "none" and tuple(asked.weights) != (0.0,):
        settings.print_once((f"likelihood.weights is not used: {folder} was trained without labels.",))
    if asked.classes and kinds[0][0] == "none":
        raise UserError(f"likelihood.classes is True, and {folder} was trained without labels: set it to False")
    if asked.classes and ("class", 0.0) not in kinds:
        raise UserError(
            f"likelihood.classes is True, which is about w = 0, and likelihood.weights is {tuple(asked.weights)}: add "
            "0.0 to them, or set likelihood.classes to False"
        )
    of_classes = range(len(run.class_names)) if asked.classes else ()
    scores: list[Terms] = []
    counts = {name: min(len(split), asked.num_images or len(split)) for name, split in splits.items()}
    total = len(kinds) * sum(counts.values()) + len(of_classes) * counts[config.eval.test_split]
    with tqdm(total=total, desc="likelihood", unit="image", disable=None) as bar:
        for name, dataset in splits.items():
            images, labels, index = chosen(dataset, asked.num_images, config.data.num_workers)
            costs = costs_of(images, index)
            for kind, w in kinds:
                given = labels if kind == "class" else np.full_like(labels, NULL_LABEL)
                found[name, kind, w] = compute(images, index, given, w, costs, bar.update)
            if name == config.eval.test_split:
                scores = [compute(images, index, np.full_like(labels, c), 0.0, costs, bar.update) for c in of_classes]
                true = labels
    first = (config.data.split, *kinds[0])
    last = int(found[first].totals().mean(axis=1).argmin())
    end = len(levels) - len(found[first].decoder) + last  # the index of the last level
    rows = []
    for (split, kind, w), terms in found.items():
        made = manifest_of(config, model, splits[split], levels, kind, w)
        rows.append(row_of(terms, last, end) | dict(step=model.step, split=split, labels=kind, w=w))
        rows[-1] |= dict(
            ema=float(config.sample.ema), num_steps=end + 1, logsnr_max=float(levels[end]), v=float(asked.v)
        )
        rows[-1]["manifest"] = manifest.manifest_name(made)
        if scores and (split, kind, w) == (config.eval.test_split, "class", 0.0):
            rows[-1]["class_accuracy"] = accuracy([terms.totals()[last] for terms in scores], true)
        if jax.process_index() == 0:
            manifest.write_manifest(out, made)
    published = tables.literature(tables.published_of(config, run.class_names), bits=True)
    text = "\n\n".join(filter(None, [table(rows), published]))
    if jax.process_index() == 0:
        write_rows(out, rows)
        held_out = found[config.eval.test_split, *kinds[0]]
        terms = held_out.prior, held_out.kl, held_out.decoder[-1], held_out.squared_error
        rate, rmse = map(np.asarray, rate_distortion(Bound(*(jnp.asarray(term, jnp.float32) for term in terms))))
        kind, w = kinds[0]
        given = f"with their labels, w = {w:g}" if kind == "class" else "without labels"
        title = f"step {model.step}, {len(held_out.prior):,} images of the split {config.eval.test_split!r} {given}"
        figures.save_figure(os.path.join(out, "likelihood.png"), figures.rate_figure(rate, rmse, levels, title))
    return text


def by_labels(config: Config) -> Config:
    """A copy of a config whose guidance is classifier-free, as that of the chains is.

    Raises ValueError if another guidance is asked for with a weight. Prints a line about the fields of `sample` that
    the guided chains do not use.
    """
    sample = config.sample
    if any(config.likelihood.weights):
        if sample.guidance != "classifier-free":
            raise UserError(
                f"config.sample.guidance is {sample.guidance!r}, and the weights of likelihood.weights are those of "
                "classifier-free guidance: set sample.guidance to 'classifier-free', or likelihood.weights to (0.0,)"
            )
        unread = [f"sample.{name}" for name in ("rule", "guide", "interval") if sample[name]]
        if unread:
            settings.print_once((f"{', '.join(unread)}: not used by the chains of likelihood.weights.",))
    copy: Config = ConfigDict(config.to_dict())
    copy.sample.guidance = "classifier-free"
    return copy.lock()


def levels_of(config: Config) -> Float[np.ndarray, " t"]:
    """The grid, uniform in λ, from the first λ of the process to likelihood.logsnr_max or the last of the process."""
    asked, process = config.likelihood, config.process
    low = max(FIRST, process.logsnr_min)
    why = f"a chain must end above λ = {low:g}, because its decoder would otherwise code most of the image"
    if process.logsnr_max <= low:
        raise UserError(f"process.logsnr_max is {process.logsnr_max:g}, and {why}: take a run with a larger one")
    if asked.logsnr_max <= low:
        raise UserError(
            f"config.likelihood.logsnr_max is {asked.logsnr_max:g}, and {why}: give a larger one, such as "
            f"{min(DEFAULTS['likelihood.logsnr_max'], process.logsnr_max):g}"
        )
    return np.asarray(grid(asked.num_steps, linear(process.logsnr_min, min(asked.logsnr_max, process.logsnr_max))))


def chosen(
    dataset: Dataset, count: int, num_workers: int
) -> tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """(images, labels, numbers) of `count` images of a split, evenly spaced, or of all for 0. Bad ones are left out."""
    index = np.flatnonzero(evenly_spaced(len(dataset), count or len(dataset)))
    images, labels = load_arrays(dataset, index, num_workers=num_workers)
    return images, labels.astype(np.int32), np.arange(len(images), dtype=np.int32)


def compile_bound(model: Loaded, config: Config, mesh: Mesh, levels: Float[np.ndarray, " t"]) -> tuple[Any, Any]:
    """Two functions: (images, numbers) -> costs of the decoder, and (images, numbers, labels, w, costs, done) -> Terms.

    The costs depend on the images alone, so that those of a split serve all labels and weights. Image i has the noise
    of the key fold_in(key(seed), i). `done(count)` is called after each batch.
    """
    network, asked = settings.network_of_run(model), config.likelihood
    size = max(config.sample.batch_size, mesh.size)
    first = int(np.argmax(levels > FIRST))

    def keys_and_data(x: Array, index: Array) -> tuple[Array, Array]:
        keys = jax.vmap(lambda i: jax.random.fold_in(seeds.key(config.eval.seed), i))(index)
        return keys, x.astype(jnp.float32) / 127.5 - 1.0

    def decoder(x: Array, index: Array) -> tuple[Array, ...]:
        keys, x = keys_and_data(x, index)
        return (decoder_costs(keys, x, logsnr=levels, first=first).T,)

    def chain(x: Array, index: Array, labels: Array, params: Any, w: Any) -> tuple[Array, ...]:
        keys, x = keys_and_data(x, index)
        terms = bound(keys, network.eps_of_params(params), x, labels, logsnr=levels, v=asked.v, w=w)
        return terms.prior, terms.kl.T, terms.squared_error.T

    compiled_decoder, guided = xla.jit(decoder), xla.jit(chain)
    unguided = xla.jit(functools.partial(chain, w=0.0))  # one evaluation of the network per level
    params = parallel.replicate(mesh, model.params)

    def in_batches(program: Callable[..., Any], columns: Sequence[Any], *others: Any, done: Any) -> list[np.ndarray]:
        parts = []
        for start in range(0, len(columns[0]), size):
            watchdog.alive(slow=True)
            rows = [np.resize(a[start : start + size], (size, *a.shape[1:])) for a in columns]
            outputs = program(*(parallel.shard_rows(mesh, a) for a in rows), *others)
            count = min(size, len(columns[0]) - start)
            parts.append([parallel.gather(output)[:count] for output in outputs])
            done(count)
            if preemption.requested():
                where = "Stopped while computing the likelihood, of which nothing is written yet"
                raise preemption.Stopped(where, "the same command starts over")
        return [np.concatenate(column).astype(np.float64).T for column in zip(*parts, strict=True)]

    def costs_of(images: Any, index: Any) -> np.ndarray:
        return in_batches(compiled_decoder, (images, index), done=lambda _: None)[0]

    def compute(images: Any, index: Any, labels: Any, w: float, costs: np.ndarray, done: Any) -> Terms:
        program, weight = (guided, (np.float32(w),)) if w else (unguided, ())
        prior, kl, error = in_batches(program, (images, index, labels), params, *weight, done=done)
        return Terms(prior, kl, costs, error)

    return costs_of, compute


def accuracy(bits: Sequence[Float[np.ndarray, " n"]], labels: Int[np.ndarray, " n"]) -> float:
    """The share of images whose class has the lowest bound of all classes: `cfd.likelihood.class_scores`."""
    return float((np.stack(bits).argmin(axis=0) == labels).mean())


def row_of(terms: Terms, last: int, end: int) -> dict[str, Any]:
    """The means over images of the chain that ends at level `end`, the number `last` of the last levels.

    "standard_error" is None for one image, which has none.
    """
    total = terms.totals()[last]
    return dict(
        prior=float(terms.prior.mean()),
        diffusion=float(terms.kl[:end].sum(0).mean()),
        reconstruction=float(terms.decoder[last].mean()),
        total=float(total.mean()),
        standard_error=float(total.std(ddof=1) / math.sqrt(len(total))) if len(total) > 1 else None,
        num_images=len(total),
    )


def manifest_of(
    config: Config, model: Loaded, split: Dataset, levels: Float[np.ndarray, " t"], kind: str, w: float
) -> dict[str, Any]:
    """How a row is made: weights, data, and every setting."""
    return {
        "weights": {"sha256": model.weights_hash, "step": model.step},
        "data": {"identity": split.identity},
        "likelihood": {k: x for k, x in config.likelihood.items() if k != "classes"} | {"labels": kind, "w": w},
        "levels": [float(levels[0]), float(levels[-1]), len(levels)],
        "process": config.process.to_dict(),
        "seeds": "image i has the noise of the key fold_in(key(seed), i)",
        "seed": config.eval.seed,
        "prng": seeds.PRNG,
        "cfd": cfd.__version__,
    }


def read_rows(out: str) -> list[dict[str, Any]]:
    """The rows of likelihood.csv as texts; [] if there is none. Raises ValueError if it is not of this kind."""
    path = os.path.join(out, "likelihood.csv")
    lines = csv.DictReader(results.whole_lines(path))
    try:
        names, rows = {*(lines.fieldnames or COLUMNS)}, list(lines)
        sound = {"manifest"} <= names <= {*COLUMNS} and all(row["manifest"] and None not in row for row in rows)
    except csv.Error:
        sound, rows = False, []
    if not sound:
        raise UserError(f"{path} is damaged, or has columns that this version does not write: move it away")
    return rows


def write_rows(out: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to likelihood.csv. Rows of the same manifest are replaced."""
    names = {row["manifest"] for row in rows}
    before = [row for row in read_rows(out) if row["manifest"] not in names]
    path, text = os.path.join(out, "likelihood.csv"), io.StringIO()
    writer: Any = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*before, *rows])
    files.write_atomically(path, text.getvalue())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| split | labels | w | prior | diffusion | reconstruction | bits/dim | images |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = " | ".join(f"{row[name]:.4f}" for name in ("prior", "diffusion", "reconstruction"))
        error = row["standard_error"]
        total = f"{row['total']:.4f}" + ("" if error is None else f" ± {1.96 * error:.4f}")
        lines.append(f"| {row['split']} | {row['labels']} | {row['w']:g} | {parts} | {total} | {row['num_images']:,} |")
    lines += [
        f"\nThe class with the lowest bound at w = 0 is the right one for {row['class_accuracy']:.1%} of the "
        f"{row['num_images']:,} images of the split {row['split']!r}."
        for row in rows
        if row.get("class_accuracy") is not None
    ]
    ends = f"The chain ends at λ = {rows[0]['logsnr_max']:.2f} after {rows[0]['num_steps']} levels, "
    return "\n".join([*lines, "", ends + "the best for the training split. ± is 1.96 standard errors over images."])
