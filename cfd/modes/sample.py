"""`--mode=sample`: a grid of samples from the newest checkpoint of a run."""

import hashlib
import json
import os
import time

import jax
import numpy as np

from cfd.config import Config
from cfd.devices import parallel, preemption
from cfd.modes import figures, settings
from cfd.modes.grid import grid_of, picture_of, spec_of
from cfd.modes.sampler import compile_sampler, evaluation_flops, evaluations
from cfd.runs import npz


def sample(config: Config, folder: str) -> str:
    """Sample `config.sample`'s classes, seeds and weights, and write them as a PNG grid and an `.npz`.

    The `.npz` has the layout of OpenAI's evaluator. Returns the path of the grid, whose name contains the step and a
    digest of the settings. Raises `preemption.Stopped` if the run is asked to stop between two batches.
    """
    config, run, classifier = settings.open_run(config, folder)
    settings.check_weights(config, config.sample.w)
    mesh = parallel.make_mesh(**config.mesh)
    network, sampling = settings.network_of(config), settings.sampling_of(config)
    grid = grid_of(config, run.class_names, config.sample.w)
    spec = spec_of(grid)
    digest = hashlib.sha256(json.dumps(config.sample.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    stem = os.path.join(folder, "samples", f"sample_step_{run.step:07d}_{digest}")

    sampler = compile_sampler(network, sampling, mesh)
    start = time.perf_counter()
    batches: list[np.ndarray] = []
    params, classifier = parallel.replicate(mesh, run.params), parallel.replicate(mesh, classifier)
    for batch in sampler(params, spec, classifier=classifier):
        batches.append(batch)
        if preemption.requested():
            done = sum(map(len, batches))
            raise preemption.Stopped(
                f"Stopped while sampling, after {done} of {len(spec.index)} images; the next start samples all of them"
            )
    images = np.concatenate(batches)
    seconds = time.perf_counter() - start

    if jax.process_index() == 0:
        figures.save(stem + ".png", picture_of(grid, images))
        with npz.sample_writer(stem + ".npz", len(images), images.shape[1:]) as write:
            write(images, spec.label)
    count = evaluations(sampling, max(map(abs, grid.weights)), sampling.interval)
    print(
        f"{len(images)} images, {count} network evaluations or {count * evaluation_flops(network, run.params):.3g} "
        f"FLOP per image: {len(images) / seconds:.3g} images/s, compilation included.",
        flush=True,
    )
    return stem + ".png"
