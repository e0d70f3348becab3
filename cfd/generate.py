"""Drawing the images that a config asks for: the sampler over all devices, `--mode=sample`, and training's previews."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, UInt8

from cfd import checkpoint, figures, npz, parallel, workdir, xla
from cfd.config import Config, describe
from cfd.guidance import Interval
from cfd.sampling import EpsFn, StepRule, ancestral, ddim, guided_sample
from cfd.unet import UNet


class Request(NamedTuple):
    """Images to draw: image i is number `index[i]` of seed `seed[i]`, of class `label[i]`, with weight `w[i]`."""

    seed: np.ndarray
    index: np.ndarray
    label: np.ndarray
    w: np.ndarray


Draw = Callable[[Any, Request], Iterator[UInt8[np.ndarray, "n h w c"]]]
"""(parameters, request) -> the images in order, in batches, on every process."""


def step_rule(sampler: str, v: float) -> StepRule:
    """The step rule that a config names."""
    rules = {"ancestral": lambda: ancestral(v), "ddim": ddim}
    if sampler not in rules:
        raise ValueError(f"sample.sampler is {sampler!r}; choose one of {sorted(rules)}")
    return rules[sampler]()


def to_uint8(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """[−1, 1] -> 0..255: clip, then (x + 1) · 127.5 rounded to nearest. The one rounding rule of this project."""
    return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def make_draw(config: Config, sample: Config, mesh: Mesh) -> Draw:
    """One compiled program that serves every seed, class and weight; `config` gives the network, `sample` the sampler.

    Batches have `sample.batch_size` rows, the last one padded, so that an image does not depend on the request's size.
    Raises ValueError if the devices do not divide the batch.
    """
    parallel.check_batch("sample.batch_size", sample.batch_size, mesh)
    eps = eps_of_params(config)
    shape = (config.data.image_size, config.data.image_size, config.data.channels)

    def program(params: Any, seed: Array, index: Array, label: Array, w: Array) -> Array:
        keys = jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(seed, index)
        x = guided_sample(
            keys,
            eps(params),
            label,
            shape,
            w=Interval(w, *sample.interval) if sample.interval else w,
            num_steps=sample.num_steps,
            sampler=step_rule(sample.sampler, sample.v),
            clip=sample.clip,
            doubled=sample.doubled,
            **config.process,
        )
        return to_uint8(x)

    compiled = xla.jit(program, out_shardings=NamedSharding(mesh, parallel.BATCH))

    def draw(params: Any, request: Request) -> Iterator[np.ndarray]:
        size = sample.batch_size
        for first in range(0, len(request.index), size):
            rows = Request(*(np.resize(column[first : first + size], size) for column in request))
            images = compiled(params, *(parallel.shard_rows(mesh, column) for column in rows))
            yield parallel.gather(images)[: len(request.index) - first]

    return draw


def eps_of_params(config: Config) -> Callable[[Any], EpsFn]:
    """params -> eps_fn, for the network of `config.model`."""
    net = UNet(**config.model)
    return lambda params: lambda z, logsnr, labels: net.apply({"params": params}, z, logsnr, labels)


def grid_request(classes: tuple[int, ...], seeds: tuple[int, ...], weights: tuple[float, ...]) -> Request:
    """A row a class and seed, a column a weight. A class keeps its image number whatever the other classes are."""
    rows = [(s, c, c, w) for c in classes for s in seeds for w in weights]
    seed, index, label, w = map(list, zip(*rows, strict=True))
    return Request(
        np.array(seed, np.uint32), np.array(index, np.int32), np.array(label, np.int32), np.array(w, np.float32)
    )


def preview(config: Config, mesh: Mesh, folder: str, class_names: tuple[str, ...]) -> Callable[[int, Any], np.ndarray]:
    """(step, EMA parameters) -> the grid of `config.sample`'s classes, seeds and weights, also in samples/."""
    draw = make_draw(config, config.sample, mesh)
    classes = chosen_classes(config)
    request = grid_request(classes, config.sample.seeds, config.sample.w)

    def at(step: int, params: Any) -> np.ndarray:
        images = np.concatenate(list(draw(params, request)))
        path = os.path.join(folder, "samples", f"step_{step:07d}.png")
        return figures.save_grid(path, *_grid(config, images, classes, class_names))

    return at


def sample(config: Config, folder: str) -> str:
    """`--mode=sample`: draw `config.sample`'s classes, seeds and weights from the newest checkpoint of `folder`.

    Writes a PNG grid, a row a class and seed and a column a weight, and the same images as an `.npz` in the layout of
    OpenAI's evaluator. Returns the path of the grid; its name carries the step and a digest of the settings.
    """
    run = load_run(config, folder)
    mesh = parallel.make_mesh(**config.mesh)
    classes = chosen_classes(config)
    request = grid_request(classes, config.sample.seeds, config.sample.w)
    draw = make_draw(config, config.sample, mesh)
    images = np.concatenate(list(draw(parallel.replicate(mesh, run.params), request)))

    settings = json.dumps(config.sample.to_dict(), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    stem = os.path.join(folder, "samples", f"sample_step_{run.step:07d}_{digest}")
    if jax.process_index() == 0:
        figures.save_grid(stem + ".png", *_grid(config, images, classes, run.class_names))
        with npz.sample_writer(stem + ".npz", len(images), images.shape[1:]) as write:
            write(images, request.label)
    return stem + ".png"


def load_run(config: Config, folder: str) -> checkpoint.Loaded:
    """The newest checkpoint of `folder`. Raises ValueError if there is none, or if it is another config's run."""
    content = workdir.read_config(folder)
    workdir.check_config(folder, describe("diffusion", config, content["class_names"]))
    return checkpoint.load(folder)


def chosen_classes(config: Config) -> tuple[int, ...]:
    """`sample.classes`, or the first ten of the data set where it is empty."""
    return config.sample.classes or tuple(range(min(10, config.data.num_classes)))


def _grid(config: Config, images: np.ndarray, classes: tuple[int, ...], class_names: tuple[str, ...]) -> tuple:
    weights = config.sample.w
    rows = [class_names[c] for c in classes for _ in config.sample.seeds]
    return images.reshape(len(rows), len(weights), *images.shape[1:]), rows, [f"w = {w:g}" for w in weights]
