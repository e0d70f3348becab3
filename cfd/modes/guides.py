"""The networks that guidance leads away from, as sample.guide and eval.guides name them.

"@STEP" is the run itself at another step, "RUN" the newest step of another run, and "RUN@STEP" another step of it.
With "~EMA" at its end, each of these is its EMA of that length, such as "RUN@STEP~0.1"; see sample.ema. "~0.1" alone is
the run itself, at the step that sample.step names.

"guide" is the run's own small guide: the network of the config's group model_guide, a run of its own in RUN/guide. It
is trained after the run, from the same batches, because its seed and its data are those of the run.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfd.checks import GUIDE_LENGTH
from cfd.config import Config, complete
from cfd.devices import parallel
from cfd.errors import UserError
from cfd.loading import Loaded, load
from cfd.modes import rules, settings
from cfd.modes.sampler import Guide, Network
from cfd.runs import access, files, posthoc, workdir
from cfd.runs.steps import hint, steps_of

OWN = "guide"
"""The name of the small guide of a run, and of its folder in that of the run."""


def own_folder(folder: str) -> str:
    """The folder of the small guide of the run in `folder`."""
    return os.path.join(folder, OWN)


def has_own(config: Config) -> bool:
    """Whether a config asks for the small guide of its run."""
    return any(split(guide)[0] == OWN for guide in (config.sample.guide, *config.eval.guides))


def config_of_own(config: Config) -> Config:
    """The config of the run that is the small guide: the model is model_guide, and no sample grids are drawn.

    Raises ValueError, in which the fields of the network have their names in the group model_guide, as `complete` does.
    """
    if config.model_guide.weight_range:
        raise UserError(
            f"config.model_guide.weight_range is {config.model_guide.weight_range}, and a guide has no guidance weight "
            "as an input: set it to ()"
        )
    own: Config = ConfigDict(config.to_dict())
    own.model = own.model_guide
    own.train.num_steps = config.guide_train.num_steps or config.train.num_steps
    own.train.p_uncond, own.train.sample_every_steps = config.guide_train.p_uncond, 0
    own.sample.guide, own.eval.guides, own.sample.variance = "", (), "fixed"
    try:
        return complete(own)
    except UserError as error:
        raise UserError(re.sub(r"\bmodel\.", "model_guide.", str(error))) from None


def split(guide: str) -> tuple[str, int | None]:
    """The (folder, step) that a guide names. The folder is "" for the run itself; the step is None for the newest.

    Raises ValueError for a URL of no bucket, and for a bucket that cannot be read.
    """
    named = GUIDE_LENGTH.sub("", guide)
    run, _, step = named.rpartition("@")
    run, number = (run, int(step)) if step.isdecimal() else (named, None)
    return access.run_path("the run of a guide", run) if run else "", number


def length_of(guide: str) -> float:
    """The length of the EMA that a guide names, or 0.0 for the own EMA of its run."""
    found = GUIDE_LENGTH.search(guide)
    return float(found[1]) if found else 0.0


def check(config: Config, guides: Iterable[str], class_names: Sequence[str] | None = None) -> None:
    """Raises ValueError if a rule of a config means nothing, or if one of these guides is no run that fits it.

    `class_names` are the classes of the config's run, or None if they are not known yet.
    """
    rules.check(config)
    if has_own(config):
        config_of_own(config)
    for guide in filter(None, guides):
        check_fits(config, guide, class_names)


def check_fits(config: Config, guide: str, class_names: Sequence[str] | None) -> None:
    """Raises ValueError unless a guide is the run itself, or a run that can take its images, classes and λ."""
    place, step = split(guide)
    if place in ("", OWN):
        return
    named, remedy = f"the guide {guide!r}", "name another run, or leave the guide out"
    content = workdir.read_config(place) if workdir.has_config(place) else {"kind": "missing"}
    if content["kind"] != "diffusion":
        raise UserError(
            f"{named} of sample.guide or eval.guides names {place}, which is no run of a diffusion model: train it "
            f"there first, or {remedy}"
        )
    theirs, names = settings.config_of_run(place), content["class_names"]
    if theirs.model.weight_range:
        raise UserError(f"{named} is a student, whose score depends on the guidance weight: {remedy}")
    if settings.image_shape(theirs) != settings.image_shape(config):
        raise UserError(
            f"{named} has images of shape {settings.image_shape(theirs)}, and the run of shape "
            f"{settings.image_shape(config)}, [H, W, C]: {remedy}"
        )
    if class_names is not None:
        check_names(named, names, class_names, settings.is_imported(content), remedy)
    settings.check_range(named, theirs.process.to_dict(), config.process.to_dict(), remedy)
    if length := length_of(guide):
        posthoc.check(files.place(place), step, length, theirs.train.posthoc_ema)
        return
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
    (place, named), length = split(guide), length_of(guide)
    step = named if step is None else step
    if place == OWN:
        place = own_folder(run.folder)
        if not workdir.has_config(place):
            raise UserError(
                f"the guide {guide!r} is the small guide of the run, and {place} holds none: train it with "
                "--mode=train and --config.eval.guides=\"('', 'guide')\", and with its network as config.model_guide"
            )
    if place:
        return load(place, step, length or None)
    return run.model_at(config.sample.step if step is None else step, length)


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
        made[guide] |= {"ema": length} if (length := length_of(guide)) else {}
        if place and place not in networks:
            networks[place] = settings.network_of_run(model)

    @functools.lru_cache(maxsize=1)
    def params_of(guide: str) -> Any:
        return parallel.replicate(mesh, load_guide(config, run, guide, made[guide]["step"]).params)

    def guide_at(network: Network, guide: str) -> Guide | None:
        return Guide(networks.get(split(guide)[0], network), params_of(guide)) if guide else None

    return made, guide_at
