"""`--mode=sample`: a grid of samples from one step of a run."""

import hashlib
import json
import os
import time

import jax
import numpy as np

from cfd.config import Config
from cfd.devices import parallel, preemption
from cfd.fields import DEFAULTS
from cfd.modes import figures, guides, settings
from cfd.modes.cells import STEPS
from cfd.modes.grid import grid_of, picture_of, spec_of
from cfd.modes.sampler import compile_sampler, evaluation_flops, evaluations, second_flops
from cfd.runs import npz


def sample(config: Config, folder: str, out: str) -> str:
    """Sample `config.sample`'s classes, seeds and weights, and write them as a PNG grid and an `.npz`.

    Reads the run in `folder`, and writes to samples/ in the folder `out`. The `.npz` has the layout of OpenAI's
    evaluator. Returns the path of the grid, whose name contains the step and a digest of the settings. Raises
    `preemption.Stopped` if the run is asked to stop between two batches.
    """
    run = settings.open_run(config, folder)
    config, mesh = run.config, parallel.make_mesh(**run.config.mesh)
    sampling, named = settings.sampling_of(config), config.sample.guide
    settings.check_weights(config, config.sample.w, sampling.guidance, named)
    intervals = (config.sample.interval, sampling.guidance.interval)
    settings.check_sampling(config, (config.sample.num_steps,), intervals)
    _, guide_at = guides.open_guides(config, run, mesh, (named,))
    grid = grid_of(config, run.class_names, config.sample.w)
    spec = spec_of(grid)
    model = run.model_at(config.sample.step, config.sample.ema)
    network = settings.network_of_run(model)
    guide = guide_at(network, named)
    # Without a value in younger fields, the name is that of versions that had none of them.
    named_by = {name: value for name, value in config.sample.to_dict().items() if name != "step" and value != ""}
    younger = {name: DEFAULTS[f"sample.{name}"] for name in ("ema", "clean_end", *STEPS)}
    named_by = {name: value for name, value in named_by.items() if value != younger.get(name)}
    digest = hashlib.sha256(json.dumps(named_by, sort_keys=True).encode()).hexdigest()[:8]
    stem = os.path.join(out, "samples", f"sample_step_{model.step:07d}_{digest}")

    sampler = compile_sampler(network, sampling, mesh, guide and guide.network)
    start = time.perf_counter()
    batches: list[np.ndarray] = []
    params, classifier = parallel.replicate(mesh, model.params), parallel.replicate(mesh, run.classifier)
    for batch in sampler(params, spec, classifier=classifier, guide=guide and guide.params):
        batches.append(batch)
        if preemption.requested():
            where = f"Stopped while sampling, after {sum(map(len, batches))} of {len(spec.index)} images"
            raise preemption.Stopped(where, "the same command samples all of them")
    images = np.concatenate(batches)
    seconds = time.perf_counter() - start

    if jax.process_index() == 0:
        figures.save(stem + ".png", picture_of(grid, images))
        with npz.sample_writer(stem + ".npz", len(images), images.shape[1:]) as write:
            write(images, spec.label)
        count = evaluations(sampling, max(map(abs, grid.weights)), sampling.interval, network.student)
        flops, guided = evaluation_flops(network, model.params), count - sampling.num_steps
        second = second_flops(network, model.params, flops, guide) if guided else 0.0
        flops = sampling.num_steps * flops + guided * second
        print(
            f"{len(images)} images, {count} network evaluations or {flops:.3g} FLOP per image: "
            f"{len(images) / seconds:.3g} images/s, compilation included.",
            flush=True,
        )
    return stem + ".png"
