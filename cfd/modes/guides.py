"""The networks that guidance leads away from, as sample.guide and eval.guides name them.

"@STEP" is the run itself at another step, "RUN" the newest step of another run, and "RUN@STEP" another step of it.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.sharding import Mesh

from cfd.config import Config
from cfd.devices import parallel
from cfd.errors import UserError
from cfd.loading import Loaded, load
from cfd.modes import rules, settings
from cfd.modes.sampler import Guide, Network
from cfd.runs import access, files, workdir
from cfd.runs.steps import hint, steps_of


def split(guide: str) -> tuple[str, int | None]:
    """The (folder, step) that a guide names. The folder is "" for the run itself; the step is None for the newest.

    Raises ValueError for a URL of no bucket, and for a bucket that cannot be read.
    """
    run, _, step = guide.rpartition("@")
    run, number = (run, int(step)) if step.isdecimal() else (guide, None)
    return access.run_path("the run of a guide", run) if run else "", number


def check(config: Config, guides: Iterable[str], class_names: Sequence[str] | None = None) -> None:
    """Raises ValueError if a rule of a config means nothing, or if one of these guides is no run that fits it.

    `class_names` are the classes of the config's run, or None if they are not known yet.
    """
    rules.check(config)
    for guide in filter(None, guides):
        check_fits(config, guide, class_names)


def check_fits(config: Config, guide: str, class_names: Sequence[str] | None) -> None:
    """Raises ValueError unless a guide is the run itself, or a run that can take its images, classes and λ."""
    place, step = split(guide)
    if not place:
        return
    named, remedy = f"the guide {guide!r}", "name another run, or leave the guide out"
    content = workdir.read_config(place) if workdir.has_config(place) else {"kind": "missing"}
    if content["kind"] != "diffusion":
        raise UserError(
            f"{named} of sample.guide or eval.guides names {place}, which is no run of a diffusion model: train it "
            f"there first, or {remedy}"
        )
    theirs, names = settings.config_of_run(place), content["class_names"]
    if settings.image_shape(theirs) != settings.image_shape(config):
        raise UserError(
            f"{named} has images of shape {settings.image_shape(theirs)}, and the run of shape "
            f"{settings.image_shape(config)}, [H, W, C]: {remedy}"
        )
    if class_names is not None:
        check_names(named, names, class_names, settings.is_imported(content), remedy)
    if names and theirs.train.p_uncond == 1:
        raise UserError(
            f"{named} was trained without labels (train.p_uncond = 1), and a guide is given the label of each image: "
            f"{remedy}"
        )
    settings.check_range(named, theirs.process.to_dict(), config.process.to_dict(), remedy)
    checkpoints, snapshots = (steps_of(files.place(place, name)) for name in (workdir.CHECKPOINTS, workdir.SNAPSHOTS))
    if not checkpoints if step is None else step not in (*checkpoints, *snapshots):
        what, there = "checkpoint" if step is None else f"step {step}", sorted({*checkpoints, *snapshots})
        raise UserError(
            f"{named} names a {what} that is not there: {f'take one of {there}, as {place}@STEP' if there else remedy}"
            + hint(files.place(place, workdir.CHECKPOINTS))
        )


def check_names(named: str, theirs: Sequence[str], ours: Sequence[str], imported: bool, remedy: str) -> None:
    """Raises ValueError unless a guide has the classes of the run. Those of an imported network have no names."""
    if len(theirs) != len(ours):
        raise UserError(f"{named} has {len(theirs)} classes, and the run {len(ours)}: {remedy}")
    for number, (there, here) in enumerate(zip(theirs, ours, strict=True)):
        if there != here and not imported:
            raise UserError(f"class {number} is {there!r} in {named} and {here!r} in the run: {remedy}")


def load_guide(config: Config, run: settings.Run, guide: str, step: int | None = None) -> Loaded:
    """The model that a guide names, or another `step` of its run. Raises ValueError as `check_fits` and `load` do."""
    check_fits(config, guide, run.class_names)
    place, named = split(guide)
    step = named if step is None else step
    return load(place, step) if place else run.model_at(-1 if step is None else step)


def open_guides(
    config: Config, run: settings.Run, mesh: Mesh, guides: Iterable[str]
) -> tuple[dict[str, dict[str, Any]], Callable[[Network, str], Guide | None]]:
    """Reads guides. Returns what manifests record of each, and the function that puts one on all devices.

    That function takes the run's own network, which the guides among its steps share, and a guide; "" gives None. The
    guide of the last call stays in memory. Raises ValueError as `load_guide` does.
    """
    made: dict[str, dict[str, Any]] = {}
    networks: dict[str, Network] = {}
    for guide in filter(None, guides):
        model, (place, _) = load_guide(config, run, guide), split(guide)
        made[guide] = {"sha256": model.weights_hash, "step": model.step, "run": os.path.basename(place.rstrip("/"))}
        if place and place not in networks:
            networks[place] = settings.network_of_run(model)

    @functools.lru_cache(maxsize=1)
    def params_of(guide: str) -> Any:
        return parallel.replicate(mesh, load_guide(config, run, guide, made[guide]["step"]).params)

    def guide_at(network: Network, guide: str) -> Guide | None:
        return Guide(networks.get(split(guide)[0], network), params_of(guide)) if guide else None

    return made, guide_at
