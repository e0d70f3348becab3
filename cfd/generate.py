"""Drawing the images that a config asks for: the sampler over all devices, `--mode=sample`, and training's previews."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from cfd import checkpoint, figures, npz, parallel, preemption, watchdog, workdir, xla
from cfd.classifier import ClassifierFn, load_classifier
from cfd.config import Config, describe
from cfd.guidance import Interval, classifier_guidance
from cfd.sampling import EpsFn, SecondOrder, StepRule, ancestral, ddim, dpm_solver, guided_sample, schedule
from cfd.unet import UNet


class Request(NamedTuple):
    """Images to draw: image i is number `index[i]` of seed `seed[i]`, of class `label[i]`, with weight `w[i]`."""

    seed: np.ndarray
    index: np.ndarray
    label: np.ndarray
    w: np.ndarray


Draw = Callable[..., Iterator[UInt8[np.ndarray, "n h w c"]]]
"""(parameters, request, v=..., interval=..., classifier=...) -> the images in order, in batches, on every process."""


def step_rule(sampler: str, v: Any) -> StepRule | SecondOrder:
    """The step rule that a config names."""
    rules = {"ancestral": lambda: ancestral(v), "ddim": ddim, "dpm_solver": dpm_solver}
    if sampler not in rules:
        raise ValueError(f"sample.sampler is {sampler!r}; choose one of {sorted(rules)}")
    return rules[sampler]()


def to_uint8(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """[−1, 1] -> 0..255: clip, then (x + 1) · 127.5 rounded to nearest. The one rounding rule of this project."""
    return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def make_draw(config: Config, sample: Config, mesh: Mesh) -> Draw:
    """One compiled program that serves every seed, class, weight, v and interval, the last two `sample`'s unless given.

    `config` gives the network, `sample` the sampler and its T. Batches have `sample.batch_size` rows, the last one
    padded, so that an image does not depend on the request's size. A batch whose weights are all 0 costs one network
    evaluation a step. With a noisy classifier, w is the weight of classifier guidance. Raises ValueError if the devices
    do not divide the batch, and for images that are not finite.
    """
    parallel.check_batch("sample.batch_size", sample.batch_size, mesh)
    eps = eps_of_params(config)
    shape = (config.data.image_size, config.data.image_size, config.data.channels)

    def program(
        networks: Any, seed: Array, index: Array, label: Array, w: Array, v: Array, lo: Array, hi: Array
    ) -> tuple[Array, Array]:
        params, classifier = networks
        eps_fn, weight = eps(params), Interval(w, lo, hi)
        if classifier is not None:
            eps_fn, weight = classifier_guidance(eps_fn, classifier, weight), 0.0
        keys = jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(seed, index)
        x = guided_sample(
            keys,
            eps_fn,
            label,
            shape,
            w=weight,
            num_steps=sample.num_steps,
            sampler=step_rule(sample.sampler, v),
            clip=sample.clip,
            doubled=sample.doubled,
            **config.process,
        )
        return to_uint8(x), jnp.isfinite(x).all(axis=(1, 2, 3))

    compiled = xla.jit(program, out_shardings=NamedSharding(mesh, parallel.BATCH))

    def draw(
        params: Any,
        request: Request,
        v: float = sample.v,
        interval: tuple[float, ...] = tuple(sample.interval),
        classifier: ClassifierFn | None = None,
    ) -> Iterator[np.ndarray]:
        size = sample.batch_size
        for first in range(0, len(request.index), size):
            watchdog.alive(slow=first == 0)
            rows = Request(*(np.resize(column[first : first + size], size) for column in request))
            ends = (interval or (-np.inf, np.inf)) if rows.w.any() else (np.inf, -np.inf)
            columns = (parallel.shard_rows(mesh, column) for column in rows)
            images, finite = map(
                parallel.gather, compiled((params, classifier), *columns, *map(np.float32, (v, *ends)))
            )
            if not finite.all():
                i = int(finite.argmin())
                raise ValueError(
                    f"{np.count_nonzero(~finite)} of {size} images hold NaN or infinity, such as number "
                    f"{rows.index[i]} of seed {rows.seed[i]} at w = {rows.w[i]:g}: look at the run's loss, or lower w"
                )
            yield images[: len(request.index) - first]
        watchdog.alive(slow=True)

    return draw


def evaluations(config: Config, num_steps: int, w: float, interval: tuple[float, ...]) -> int:
    """Network evaluations an image: one a step, and where w is not 0 a second one a step inside of the interval.

    Under classifier guidance the second is a gradient of the classifier, counted as one evaluation.
    """
    logsnr = schedule(num_steps, **config.process)
    lo, hi = interval or (-np.inf, np.inf)
    return num_steps + int(((logsnr >= lo) & (logsnr <= hi)).sum()) * (w != 0)


def evaluation_flops(config: Config, params: Any) -> float:
    """Floating-point operations of one network evaluation of one image; NaN where `xla.flops` cannot count them."""
    z = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, config.data.channels), jnp.float32)
    one = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    eps = eps_of_params(config)
    return xla.flops(lambda params, *inputs: eps(params)(*inputs), params, z, *one)


def eps_of_params(config: Config) -> Callable[[Any], EpsFn]:
    """params -> eps_fn, for the network of `config.model`."""
    net: Any = UNet(**config.model)
    return lambda params: lambda z, logsnr, labels: net.apply({"params": params}, z, logsnr, labels)


def grid_request(classes: tuple[int, ...], seeds: tuple[int, ...], weights: tuple[float, ...]) -> Request:
    """A row a class and seed, a column a weight. A class keeps its image number whatever the other classes are."""
    rows = [(s, c, c, w) for c in classes for s in seeds for w in weights]
    seed, index, label, w = map(list, zip(*rows, strict=True))
    return Request(
        np.array(seed, np.uint32), np.array(index, np.int32), np.array(label, np.int32), np.array(w, np.float32)
    )


def preview(
    config: Config, mesh: Mesh, folder: str, class_names: tuple[str, ...]
) -> Callable[[int, Any], np.ndarray | None]:
    """(step, EMA parameters) -> the grid of `config.sample`'s classes, seeds and weights, also in samples/.

    None if the run was asked to stop between two batches. Where `sample.guidance` is by a
    classifier, which is trained apart, the one column is w = 0.
    """
    weights = config.sample.w if config.sample.guidance == "classifier-free" else (0.0,)
    check_weights(config, weights)
    classes = chosen_classes(config)
    request = grid_request(classes, config.sample.seeds, weights)
    # No more rows than there are images: a program that runs cannot be asked to stop.
    rows = min(config.sample.batch_size, -(-len(request.index) // mesh.size) * mesh.size)
    draw = make_draw(config, ConfigDict(config.sample.to_dict() | {"batch_size": rows}), mesh)

    def at(step: int, params: Any) -> np.ndarray | None:
        batches = []
        for batch in draw(params, request):
            batches.append(batch)
            if sum(map(len, batches)) < len(request.index) and preemption.requested():
                return None
        images = np.concatenate(batches)
        path = os.path.join(folder, "samples", f"step_{step:07d}.png")
        picture = _grid(config, images, classes, weights, class_names)
        if jax.process_index() == 0:
            with workdir.despite_a_full_disk(path):
                figures.save(path, picture)
        return picture

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
    check_weights(config, config.sample.w)
    draw = make_draw(config, config.sample, mesh)
    start = time.perf_counter()
    batches: list[np.ndarray] = []
    classifier = parallel.replicate(mesh, load_guide(config, folder))
    for batch in draw(parallel.replicate(mesh, run.params), request, classifier=classifier):
        batches.append(batch)
        if preemption.requested():
            done = sum(map(len, batches))
            raise preemption.Stopped(
                f"Stopped in sampling, after {done} of {len(request.index)} images, which are all drawn again"
            )
    images = np.concatenate(batches)
    seconds = time.perf_counter() - start

    settings = json.dumps(config.sample.to_dict(), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    stem = os.path.join(folder, "samples", f"sample_step_{run.step:07d}_{digest}")
    if jax.process_index() == 0:
        figures.save(stem + ".png", _grid(config, images, classes, config.sample.w, run.class_names))
        with npz.sample_writer(stem + ".npz", len(images), images.shape[1:]) as write:
            write(images, request.label)
    count = evaluations(config, config.sample.num_steps, max(map(abs, config.sample.w)), tuple(config.sample.interval))
    print(
        f"{len(images)} images, {count} network evaluations or {count * evaluation_flops(config, run.params):.3g} FLOP "
        f"an image: {len(images) / seconds:.3g} images/s, compilation included.",
        flush=True,
    )
    return stem + ".png"


def load_run(config: Config, folder: str) -> checkpoint.Loaded:
    """The newest checkpoint of `folder`. Raises ValueError if there is none, or if it is another config's run."""
    content = workdir.read_config(folder)
    workdir.check_config(folder, describe("diffusion", config, content["class_names"]))
    return checkpoint.load(folder)


def load_guide(config: Config, folder: str) -> ClassifierFn | None:
    """The noisy classifier of a run, where `sample.guidance` asks for it. Raises ValueError as `check_guide` does."""
    check_guide(config, folder)
    return None if config.sample.guidance == "classifier-free" else load_classifier(os.path.join(folder, "classifier"))


def check_guide(config: Config, folder: str) -> None:
    """Raises ValueError if `sample.guidance` asks for a noisy classifier that is not there or takes other images."""
    if config.sample.guidance == "classifier-free":
        return
    place = os.path.join(folder, "classifier")
    if not os.path.exists(os.path.join(place, workdir.CONFIG)):
        raise ValueError(
            f"config.sample.guidance is 'classifier', and {place} holds no noisy classifier: train it with "
            "--mode=train_classifier"
        )
    workdir.check_images(place, config.data)


def check_weights(config: Config, weights: Sequence[int | float]) -> None:
    """Raises ValueError where a weight needs a score, conditional or unconditional, that the run never trains."""
    free = config.sample.guidance == "classifier-free"
    if config.train.p_uncond == 0 and any(weights) and free:
        raise ValueError(
            f"w = {next(filter(None, weights)):g} needs the unconditional score, which train.p_uncond = 0 does not "
            "train: sample.w and eval.weights can only be (0.0,)"
        )
    if config.train.p_uncond == 1 and not (free and set(weights) == {-1}):
        raise ValueError(
            f"w in {tuple(weights)} needs the conditional score, which train.p_uncond = 1 does not train: sample.w and "
            "eval.weights can only be (-1.0,), with sample.guidance 'classifier-free'"
        )


def chosen_classes(config: Config) -> tuple[int, ...]:
    """`sample.classes`, or the first ten of the data set where it is empty."""
    return config.sample.classes or tuple(range(min(10, config.data.num_classes)))


def _grid(
    config: Config,
    images: np.ndarray,
    classes: tuple[int, ...],
    weights: tuple[float, ...],
    class_names: tuple[str, ...],
) -> np.ndarray:
    rows = [class_names[c] for c in classes for _ in config.sample.seeds]
    images = images.reshape(len(rows), len(weights), *images.shape[1:])
    return figures.grid(images, rows, [f"w = {w:g}" for w in weights])
