"""`--mode=train`: the diffusion model of a config, trained or resumed in a run's folder."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from cfd.config import Config, with_classes
from cfd.devices import parallel, preemption
from cfd.errors import UserError
from cfd.fields import BEFORE, DEFAULTS, OF_UNETS
from cfd.losses import eps_loss, learned_loss, variance_loss
from cfd.modes import figures, finetune, guides, rules, settings, students
from cfd.modes.fit import fit, posthoc_every_steps
from cfd.modes.grid import grid_of, picture_of, spec_of
from cfd.modes.sampler import compile_sampler
from cfd.modes.train_step import LossFn
from cfd.networks.monotone import SCHEDULE, initial_schedule, monotone
from cfd.runs import files, posthoc, workdir
from cfd.runs.steps import steps_of
from cfd.steps import grid


def train(config: Config, folder: str, *, init_from: str | None = None, allow_fresh_start: bool = False) -> None:
    """Train the diffusion model of `config` in the run folder `folder`, or resume it there.

    With `init_from`, "RUN" or "RUN:STEP", a new run begins with the EMA weights of another run. If all checkpoints of
    the run are damaged, raises CheckpointError, or with `allow_fresh_start` sets them aside and starts at step 0.
    Raises ValueError, FloatingPointError and `preemption.Stopped` as `fit` does.
    """
    config = settings.of_run(config, folder)
    if students.is_student(config):
        raise UserError(
            f"{folder} is the run of a student (model.weight_range), which --mode=distill trains: give --mode=distill"
        )
    start = finetune.find(config, folder, init_from)
    mesh = parallel.make_mesh(**config.mesh)
    dataset = settings.open_split(config, config.data.split)
    config = with_classes(config, len(dataset.class_names))
    content = workdir.describe("diffusion", config.to_dict(), dataset.class_names)
    if start is not None:
        content["init_from"] = start.source._asdict()
    init, loss_fn = diffusion(config)
    draw = preview(config, mesh, folder, dataset.class_names) if config.train.sample_every_steps else None
    fit(
        settings.training_of(config, config.train),
        folder,
        mesh,
        dataset,
        content,
        init,
        loss_fn,
        settings.optimizer_of(config.train),
        draw,
        allow_fresh_start=allow_fresh_start,
        start_from=None if start is None else finetune.from_weights(start, config, dataset.class_names),
        project=settings.model_of(config).project,
    )


def check_run(config: Config, folder: str) -> None:
    """Raises ValueError if the folder holds a run of another config, which has begun.

    `fit` checks it too, once the data set is open. Before a sweep looks at the run, the run must be the config's.
    """
    config = settings.of_run(config, folder)
    if not workdir.has_begun(folder) or settings.is_imported(content := workdir.read_config(folder)):
        return  # config.json has a part of the config of an imported network
    names = content["class_names"]
    config = with_classes(config, len(names))
    workdir.check_config(folder, workdir.describe("diffusion", config.to_dict(), names), BEFORE)


def check_steps(config: Config, folder: str) -> None:
    """Raises ValueError if a step or an EMA of the run that the config asks for will not be there when training ends.

    These are named by `eval.steps`, `eval.emas`, or in their place `sample.step` and `sample.ema`, and by guides that
    are the run itself or its small guide.
    """
    emas, guided = config.eval.emas or (config.sample.ema,), (config.sample.guide, *config.eval.guides)
    wanted = [(step, ema) for step in config.eval.steps or (config.sample.step,) for ema in emas]
    of_small: list[tuple[int, float]] = []
    for guide in filter(None, guided):
        (place, step), length = guides.split(guide), guides.length_of(guide)
        if not place:
            wanted.append((config.sample.step if step is None else step, length))
        elif place == guides.OWN:
            of_small.append((-1 if step is None else step, length))
    check_wanted(config, folder, wanted)
    if of_small:
        check_wanted(guides.config_of_own(config), guides.own_folder(folder), of_small)


def check_wanted(config: Config, folder: str, wanted: list[tuple[int, float]]) -> None:
    """Raises ValueError unless the run in `folder` will have each (step, EMA length); -1 is the last step."""
    train, (checkpoints, snapshots, stored) = config.train, steps_at_end(config, folder)
    for step, ema in wanted:
        there, every = checkpoints | (stored if ema else snapshots), "posthoc" if ema else "snapshot"
        if ema:
            posthoc.check_kept(ema, train.posthoc_ema, "this run")
        if step not in (-1, *there):
            raise UserError(
                f"config.eval.steps, sample.step or a guide has {step}, which will not be there when training ends "
                f"at step {train.num_steps}; then there are "
                f"{workdir.abbreviate(list(map(str, sorted(there))), separator=', ')}. "
                f"For steps to come, set train.{every}_every_steps to {step} or to a divisor of it"
            )
        if ema:
            end = max(checkpoints) if step == -1 else step
            averages = posthoc.stored_averages({end, *(t for t in stored if t <= end)}, train.posthoc_ema)
            remedy = "store them more often, by a smaller train.posthoc_every_steps, in steps that are still to come"
            posthoc.check_error(averages, ema, end, remedy)


def steps_at_end(config: Config, folder: str) -> tuple[set[int], set[int], set[int]]:
    """The checkpoints, snapshots and averages for `cfd.runs.posthoc` that will be there when training ends."""
    train, names = config.train, (workdir.CHECKPOINTS, workdir.SNAPSHOTS, workdir.POSTHOC)
    saved, snapshots, stored = ({*steps_of(files.place(folder, name))} for name in names)
    last = max(saved, default=0)

    def to_come(*every: int) -> set[int]:
        return {step for n in every if n for step in range(-(-(last + 1) // n) * n, train.num_steps + 1, n)}

    will_be = {*saved, *to_come(train.checkpoint_every_steps, train.sample_every_steps, train.keep_every_steps)}
    will_be |= {train.num_steps} if train.num_steps > last else set()
    kept = {step for step in will_be if train.keep_every_steps and step % train.keep_every_steps == 0}
    kept |= {*sorted(will_be)[-train.keep_checkpoints :]}
    every = posthoc_every_steps(train) if train.posthoc_ema else 0
    return kept, snapshots | to_come(train.snapshot_every_steps), stored | to_come(every)


def diffusion(config: Config) -> tuple[Callable[[Array], Any], LossFn]:
    """(key -> initial parameters, loss) of the diffusion model: the joint training of Algorithm 1.

    The parameters of a learned schedule are beside those of the network, which does not read them.
    """
    model, fields = settings.model_of(config), config.model
    unread = [f"model.{name}" for name in OF_UNETS if fields[name] != DEFAULTS[f"model.{name}"]]
    if fields.network == "transformer" and unread:
        settings.print_once((f"The transformer does not read {', '.join(unread)}.",))
    p_uncond, schedule = config.train.p_uncond, settings.training_schedule(config)
    weight, low_discrepancy = settings.training_weight(config), config.train.low_discrepancy
    learned, ends = config.process.schedule == "learned", (config.process.logsnr_min, config.process.logsnr_max)
    levels = grid(config.train.variance_levels, schedule) if config.model.learn_variance else None

    def loss_fn(key: Array, params: Any, x: Array, labels: Array) -> Array:
        key_loss, key_dropout = jax.random.split(key)

        def eps_fn(z: Array, logsnr: Array, labels: Array) -> Any:
            return model.apply(params, z, logsnr, labels, train=True, rngs={"dropout": key_dropout})

        if levels is not None:
            return variance_loss(key_loss, eps_fn, x, labels, logsnr=levels, p_uncond=p_uncond)
        return (learned_loss if learned else eps_loss)(
            key_loss,
            eps_fn,
            x,
            labels,
            p_uncond=p_uncond,
            schedule=monotone(params[SCHEDULE], *ends) if learned else schedule,
            weight=weight,
            low_discrepancy=low_discrepancy,
        )

    def init(key: Array) -> Any:
        return model.init(key) | {SCHEDULE: initial_schedule()}

    return init if learned else model.init, loss_fn


def preview(
    config: Config, mesh: Mesh, folder: str, class_names: tuple[str, ...]
) -> Callable[[int, Any], np.ndarray | None]:
    """(step, EMA parameters) -> the grid of samples of `config.sample`, which is also written to samples/.

    The function returns None if the run is asked to stop between two batches. If a noisy classifier guides, the grid
    has one column, w = 0, because it is trained separately.
    """
    weights = config.sample.w if config.sample.guidance == "classifier-free" else (0.0,)
    sampling = settings.sampling_of(config)
    if config.sample.guide:
        raise UserError(
            f"config.sample.guide is {config.sample.guide!r}, and sample grids are drawn during training, when a guide "
            "may not be there yet: set train.sample_every_steps to 0 and draw them with --mode=sample, or name the "
            "guide in eval.guides alone, with sample.guide ''"
        )
    if config.sample.ema:
        raise UserError(
            f"config.sample.ema is {config.sample.ema:g}, and sample grids are drawn during training from the run's "
            "own EMA: set train.sample_every_steps to 0 and draw them with --mode=sample, or name the length in "
            "eval.emas alone, with sample.ema 0.0"
        )
    rules.check(config)
    settings.check_weights(config, weights, sampling.guidance)
    intervals = (config.sample.interval, sampling.guidance.interval)
    settings.check_sampling(config, (config.sample.num_steps,), intervals)
    grid = grid_of(config, class_names, weights)
    spec = spec_of(grid)
    # A batch has no more rows than the grid has images, because a running program cannot be stopped.
    rows = min(config.sample.batch_size, -(-len(spec.index) // mesh.size) * mesh.size)
    sampler = compile_sampler(settings.network_of(config), sampling._replace(batch_size=rows), mesh)

    def draw(step: int, params: Any) -> np.ndarray | None:
        batches = []
        for batch in sampler(params, spec):
            batches.append(batch)
            if sum(map(len, batches)) < len(spec.index) and preemption.requested():
                return None
        picture = picture_of(grid, np.concatenate(batches))
        path = os.path.join(folder, "samples", f"step_{step:07d}.png")
        if jax.process_index() == 0:
            with files.despite_a_full_disk(path):
                figures.save(path, picture)
        return picture

    return draw
