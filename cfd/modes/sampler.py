"""One compiled sampler over all devices, for every mode that draws images, and what its images cost."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, UInt8

from cfd.devices import parallel, seeds, watchdog, xla
from cfd.errors import UserError
from cfd.guidance import Interval, classifier_guidance
from cfd.networks.classifier import ClassifierFn
from cfd.sampling import EpsFn, SecondOrder, StepRule, guided_sample, schedule


class Network(NamedTuple):
    """A diffusion network without its parameters: parameters -> eps_fn, and the shape (H, W, C) of its images."""

    eps_of_params: Callable[[Any], EpsFn]
    image_shape: tuple[int, int, int]


class Sampling(NamedTuple):
    """How images are sampled: the config's `sample` and `process` groups, with the step rule as a function of v."""

    step_rule: Callable[[Any], StepRule | SecondOrder]
    num_steps: int
    v: float
    interval: tuple[float, ...]
    clip: bool
    doubled: bool
    batch_size: int
    logsnr_min: float
    logsnr_max: float


class SampleSpec(NamedTuple):
    """The images to sample, in columns: image i is number `index[i]` of `seed[i]`, of class `label[i]`, at `w[i]`."""

    seed: np.ndarray
    index: np.ndarray
    label: np.ndarray
    w: np.ndarray


Sampler = Callable[..., Iterator[UInt8[np.ndarray, "n h w c"]]]
"""(parameters, spec, v=..., interval=..., classifier=...) -> the images in order, batch by batch, on every process."""


def to_uint8(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Values in [−1, 1] as 0 to 255: clip, then round (x + 1) · 127.5 to nearest. The project's only rounding rule."""
    return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def compile_sampler(network: Network, sampling: Sampling, mesh: Mesh) -> Sampler:
    """One program that serves every seed, class, weight, v and interval. v and interval default to those of `sampling`.

    Every batch has `sampling.batch_size` rows, or one per device if that is more, as a line then says. The last one is
    padded, so that an image does not depend on how many are asked for. A batch whose weights are all 0 costs one
    network evaluation per step. With a noisy classifier, w is the weight of classifier guidance. Raises ValueError if
    the devices do not divide a larger batch, and as `seeds.check` does; the sampler raises ValueError for images that
    are not finite.
    """
    seeds.check()
    parallel.check_batch("sample.batch_size", sampling.batch_size, mesh)
    size = max(sampling.batch_size, mesh.size)
    if size > sampling.batch_size and jax.process_index() == 0:
        few = sampling.batch_size
        print(
            f"sample.batch_size is {few}, fewer images than the {size} devices: they draw {size} at a time.", flush=True
        )

    def program(
        weights: Any, seed: Array, index: Array, label: Array, w: Array, v: Array, lo: Array, hi: Array
    ) -> tuple[Array, Array]:
        params, classifier = weights
        eps_fn, weight = network.eps_of_params(params), Interval(w, lo, hi)
        if classifier is not None:
            eps_fn, weight = classifier_guidance(eps_fn, classifier, weight), 0.0
        keys = jax.vmap(lambda s, i: jax.random.fold_in(seeds.key(s), i))(seed, index)
        x = guided_sample(
            keys,
            eps_fn,
            label,
            network.image_shape,
            w=weight,
            num_steps=sampling.num_steps,
            sampler=sampling.step_rule(v),
            clip=sampling.clip,
            doubled=sampling.doubled,
            logsnr_min=sampling.logsnr_min,
            logsnr_max=sampling.logsnr_max,
        )
        return to_uint8(x), jnp.isfinite(x).all(axis=(1, 2, 3))

    compiled = xla.jit(program, out_shardings=NamedSharding(mesh, parallel.BATCH))

    def sampler(
        params: Any,
        spec: SampleSpec,
        v: float = sampling.v,
        interval: tuple[float, ...] = sampling.interval,
        classifier: ClassifierFn | None = None,
    ) -> Iterator[np.ndarray]:
        for first in range(0, len(spec.index), size):
            watchdog.alive(slow=first == 0)
            rows = SampleSpec(*(np.resize(column[first : first + size], size) for column in spec))
            ends = (interval or (-np.inf, np.inf)) if rows.w.any() else (np.inf, -np.inf)
            columns = (parallel.shard_rows(mesh, column) for column in rows)
            images, finite = map(
                parallel.gather, compiled((params, classifier), *columns, *map(np.float32, (v, *ends)))
            )
            if not finite.all():
                i = int(finite.argmin())
                raise UserError(
                    f"{np.count_nonzero(~finite)} of {size} images hold NaN or infinity, such as number "
                    f"{rows.index[i]} of seed {rows.seed[i]} at w = {rows.w[i]:g}: look at the run's loss, or lower w"
                )
            yield images[: len(spec.index) - first]
        watchdog.alive(slow=True)

    return sampler


def evaluations(sampling: Sampling, w: float, interval: tuple[float, ...]) -> int:
    """Network evaluations per image: one per step, and a second one per step inside the interval if w is not 0.

    Under classifier guidance, the second is a gradient of the classifier, which is counted as one evaluation.
    """
    logsnr = schedule(sampling.num_steps, sampling.logsnr_min, sampling.logsnr_max)
    lo, hi = interval or (-np.inf, np.inf)
    return sampling.num_steps + int(((logsnr >= lo) & (logsnr <= hi)).sum()) * (w != 0)


def evaluation_flops(network: Network, params: Any) -> float:
    """Floating-point operations per network evaluation of one image. NaN if `xla.flops` cannot count them."""
    z = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    one = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return xla.flops(lambda params, *inputs: network.eps_of_params(params)(*inputs), params, z, *one)
