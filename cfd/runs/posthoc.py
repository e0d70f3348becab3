"""An EMA of a run of any length, reconstructed from the averages that it stored while it trained.

posthoc/<step>/ holds the averages of the lengths train.posthoc_ema, and so does every checkpoint.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax import Array
from jax.sharding import Sharding

from cfd.devices import parallel
from cfd.errors import UserError
from cfd.posthoc_ema import coefficients
from cfd.runs import steps
from cfd.runs.checkpoint import CheckpointError
from cfd.runs.files import AnyPath
from cfd.runs.reading import from_process_0, is_gone, read_verified
from cfd.runs.workdir import CHECKPOINTS, POSTHOC, abbreviate

TOLERANCE = 0.1
"""How far off the profile of an average may be, relative to its norm. Of the weights, it moves far less."""
NEGLIGIBLE = 1e-9
"""The share of a stored average that is not read."""

Template = Callable[..., Any]
"""(metadata of a step, prefixes of keys) -> the pytree of the ShapeDtypeStructs of these arrays."""


def reconstruct(
    workdir: AnyPath,
    step: int | None,
    sigma_rel: float,
    kept: Sequence[float],
    template: Template,
    sharding: Sharding,
) -> tuple[Any, int, dict[str, Any]]:
    """(weights, step, metadata of that step) of the EMA of length `sigma_rel` at `step`.

    `kept` are the lengths that the run keeps. None for the step stands for the newest checkpoint. The sum is in float64
    on the host, and therefore the same on every machine. Every process must call it. Raises UserError if the averages
    that are stored cannot give this one, and CheckpointError if that is because they are damaged.
    """
    damaged: dict[AnyPath, str] = {}
    while True:
        places, shares = check(workdir, step, sigma_rel, kept, damaged)
        end = max(places)
        total, meta, failed = None, {}, None
        for t, place in sorted(places.items(), reverse=True):
            share = {i: c for i, s in enumerate(kept) if abs(c := shares[s, t]) > NEGLIGIBLE}
            if not share and t != end:
                continue
            prefixes = tuple(f"posthoc/{i}/" for i in share or (0,))
            result = read_verified(place, partial(template, prefixes=prefixes))
            if isinstance(result, str):
                failed = place, result
                break
            trees, found = result
            meta = meta or found
            for i, c in share.items():
                part = jax.tree.map(lambda x, c=c: c * _whole(x).astype(np.float64), trees["posthoc"][str(i)])
                total = part if total is None else jax.tree.map(np.add, total, part)
        if failed is None:
            return jax.tree.map(partial(_placed, sharding), total), end, meta
        place, reason = failed
        if not is_gone(place):
            logging.warning("step %s in %s is damaged and skipped: %s", place.name, place.parent, reason)
        damaged[place] = reason


def check(
    workdir: AnyPath, step: int | None, sigma_rel: float, kept: Sequence[float], damaged: Mapping[AnyPath, str] = {}
) -> tuple[dict[int, AnyPath], dict[tuple[float, int], float]]:
    """({step: folder} of the averages up to `step`, the share of each (σ_rel, step)) that give an EMA by `reconstruct`.

    Those in the folders `damaged` do not count. Raises as `reconstruct` does, without reading an array.
    """
    check_kept(sigma_rel, kept, str(workdir))
    places = {t: place for t, place in _places(workdir, step).items() if place not in damaged}
    if not places or (step is not None and step not in places):
        _raise_missing(workdir, step, damaged)
    stored = stored_averages(places, kept)
    return places, dict(zip(stored, check_error(stored, sigma_rel, max(places)), strict=True))


def stored_averages(times: Iterable[int], kept: Sequence[float]) -> list[tuple[float, int]]:
    """The (σ_rel, step) of all averages that are stored at these steps."""
    return [(s, t) for t in sorted(times) for s in kept]


def check_kept(sigma_rel: float, kept: Sequence[float], whose: str) -> None:
    """Raises UserError unless a run keeps averages from which an EMA of this length can be reconstructed."""
    if not kept:
        raise UserError(
            f"an EMA of length {sigma_rel:g} is asked for, and {whose} keeps no averages to reconstruct it from "
            "(train.posthoc_ema is ()): set the length to 0.0 for the run's own EMA, or train a run in another "
            "--workdir with --config.train.posthoc_ema='(0.05, 0.1)'"
        )


def check_error(stored: Sequence[tuple[float, int]], sigma_rel: float, step: int, remedy: str = "") -> Sequence[float]:
    """The shares by `coefficients`. Raises UserError if their profile is further off than TOLERANCE.

    `remedy` is one more thing to do about it, such as to store averages more often while the run still trains.
    """
    shares, error = coefficients(stored, sigma_rel, step)
    if error > TOLERANCE:
        kept = sorted({s for s, _ in stored})
        raise UserError(
            f"an EMA of length {sigma_rel:g} at step {step} cannot be reconstructed from averages of the lengths "
            f"{abbreviate([f'{s:g}' for s in kept], separator=', ')} at {len(stored) // len(kept)} steps: its profile "
            f"would be {error:.0%} off, and {TOLERANCE:.0%} is the limit. Take a length nearer to these"
            + (f", or {remedy}" if remedy else "")
        )
    return shares.tolist()


def _whole(x: Array) -> np.ndarray:
    """The content of an array that every process has by itself, or of which each has a part."""
    return np.asarray(x) if x.is_fully_addressable else parallel.gather(x)


def _placed(sharding: Sharding, x: np.ndarray) -> Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index].astype(np.float32))


def _places(workdir: AnyPath, step: int | None) -> dict[int, AnyPath]:
    """{step: folder} of what is stored up to `step`, or to the newest checkpoint: of posthoc/, and that checkpoint."""
    stored = from_process_0(lambda: steps.steps_of(workdir / POSTHOC))
    checkpoints = from_process_0(lambda: steps.steps_of(workdir / CHECKPOINTS))
    end = step if step is not None else max(checkpoints or stored, default=-1)
    places = {t: workdir / POSTHOC / str(t) for t in stored if t <= end}
    return places if end in places or end not in checkpoints else places | {end: workdir / CHECKPOINTS / str(end)}


def _raise_missing(workdir: AnyPath, step: int | None, damaged: Mapping[AnyPath, str]) -> NoReturn:
    if damaged:
        reasons = "; ".join(f"step {place.name} in {place.parent.name}: {why}" for place, why in damaged.items())
        raise CheckpointError(f"the averages of {workdir} are damaged ({reasons}): restore the folder from a copy")
    there = sorted({*steps.steps_of(workdir / POSTHOC), *steps.steps_of(workdir / CHECKPOINTS)})
    wanted = "no averages are" if step is None else f"step {step} has no averages"
    raise UserError(
        f"{workdir}: {wanted} stored. Steps with averages are {there}: name one of these"
        if there
        else f"{workdir} has no checkpoint and no averages: train it first"
    )
