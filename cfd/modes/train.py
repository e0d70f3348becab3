"""`--mode=train`: the diffusion model of a config, trained or resumed in a run's folder."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from cfd.config import Config, with_classes
from cfd.devices import parallel, preemption
from cfd.errors import UserError
from cfd.losses import eps_loss
from cfd.modes import figures, finetune, guides, rules, settings
from cfd.modes.fit import fit
from cfd.modes.grid import grid_of, picture_of, spec_of
from cfd.modes.sampler import compile_sampler
from cfd.modes.train_step import LossFn
from cfd.networks.unet import UNet
from cfd.runs import files, workdir
from cfd.runs.steps import steps_of


def train(config: Config, folder: str, *, init_from: str | None = None, allow_fresh_start: bool = False) -> None:
    """Train the diffusion model of `config` in the run folder `folder`, or resume it there.

    With `init_from`, "RUN" or "RUN:STEP", a new run begins with the EMA weights of another run. If all checkpoints of
    the run are damaged, raises CheckpointError, or with `allow_fresh_start` sets them aside and starts at step 0.
    Raises ValueError, FloatingPointError and `preemption.Stopped` as `fit` does.
    """
    config = settings.of_run(config, folder)
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
    )


def check_steps(config: Config, folder: str) -> None:
    """Raises ValueError if a step that `eval.steps` or `sample.step` names will not be there when training ends."""
    own = [guides.split(guide) for guide in (config.sample.guide, *config.eval.guides)]
    wanted = [step for step in config.eval.steps or (config.sample.step,) if step >= 0]
    wanted += [step for place, step in own if not place and step is not None]
    train = config.train
    saved, snapshots = (steps_of(files.place(folder, name)) for name in (workdir.CHECKPOINTS, workdir.SNAPSHOTS))

    def to_come(*every: int) -> set[int]:
        first = max(saved, default=0) + 1
        return {step for n in every if n for step in range(-(-first // n) * n, train.num_steps + 1, n)}

    will_be = {*saved, *to_come(train.checkpoint_every_steps, train.sample_every_steps, train.keep_every_steps)}
    will_be |= {train.num_steps} if train.num_steps > max(saved, default=0) else set()
    there = {step for step in will_be if train.keep_every_steps and step % train.keep_every_steps == 0}
    there |= {*sorted(will_be)[-train.keep_checkpoints :], *snapshots, *to_come(train.snapshot_every_steps)}
    if missing := [step for step in wanted if step not in there]:
        raise UserError(
            f"config.eval.steps, sample.step or a guide has {missing[0]}, which will not be there when training ends "
            f"at step {train.num_steps}; then there are "
            f"{workdir.abbreviate(list(map(str, sorted(there))), separator=', ')}. "
            f"For steps to come, set train.snapshot_every_steps to {missing[0]} or to a divisor of it"
        )


def diffusion(config: Config) -> tuple[Callable[[Array], Any], LossFn]:
    """(key -> initial parameters, loss) of the diffusion model: the joint training of Algorithm 1."""
    net = UNet(image_size=config.data.image_size, **config.model)
    shape = (1, *settings.image_shape(config))
    p_uncond, schedule = config.train.p_uncond, settings.training_schedule(config)

    def init(key: Array) -> Any:
        return net.init(key, jnp.zeros(shape), jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]

    def loss_fn(key: Array, params: Any, x: Array, labels: Array) -> Array:
        key_loss, key_dropout = jax.random.split(key)

        def eps_fn(z: Array, logsnr: Array, labels: Array) -> Any:
            return net.apply({"params": params}, z, logsnr, labels, train=True, rngs={"dropout": key_dropout})

        return eps_loss(key_loss, eps_fn, x, labels, p_uncond=p_uncond, schedule=schedule)

    return init, loss_fn


def preview(
    config: Config, mesh: Mesh, folder: str, class_names: tuple[str, ...]
) -> Callable[[int, Any], np.ndarray | None]:
    """(step, EMA parameters) -> the grid of samples of `config.sample`, which is also written to samples/.

    The function returns None if the run is asked to stop between two batches. If sample.guidance is "classifier", the
    grid has one column, w = 0, because the noisy classifier is trained separately.
    """
    weights = config.sample.w if config.sample.guidance == "classifier-free" else (0.0,)
    sampling = settings.sampling_of(config)
    if config.sample.guide:
        raise UserError(
            f"config.sample.guide is {config.sample.guide!r}, and sample grids are drawn during training, when a guide "
            "may not be there yet: set train.sample_every_steps to 0 and draw them with --mode=sample, or name the "
            "guide in eval.guides alone, with sample.guide ''"
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
