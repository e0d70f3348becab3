"""One compiled sampler over all devices, for every mode that draws images, and what its images cost."""

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, UInt8

from cfd import reuse
from cfd.attributes import joint_scores
from cfd.devices import parallel, seeds, watchdog, xla
from cfd.errors import UserError
from cfd.guidance import NULL_LABEL, Interval, classifier_guidance, clipped, shift_mean
from cfd.modes.rules import PLAIN, Guidance
from cfd.networks.classifier import ClassifierFn
from cfd.process import Schedule, cosine
from cfd.rules import other_labels
from cfd.sampling import EpsFn, Langevin, SecondOrder, StepRule, grid, guided_sample, schedule
from cfd.steps import LearnedVariance


class Network(NamedTuple):
    """A diffusion network without its parameters: parameters -> eps_fn, and the shape (H, W, C) of its images.

    `num_classes` is the number of its classes, 0 for none. A `student` takes the guidance weight as an input.
    """

    eps_of_params: Callable[[Any], EpsFn]
    image_shape: tuple[int, int, int]
    num_classes: int = 0
    student: bool = False


class Guide(NamedTuple):
    """A network that guidance leads away from, and its parameters."""

    network: Network
    params: Any


class Sampling(NamedTuple):
    """How images are sampled: the config's `sample` and `process` groups, with the step rule as a function of v.

    `guidance` is the meaning of sample.rule. `schedule` is None for the cosine between the two ends, and `respaced` a
    grid of λ in its place. `by_mean` and `clip_first` are how a noisy classifier guides: "classifier-mean" of
    sample.guidance, and sample.clip_first. Unless `predictor_guided`, w guides the corrector alone.
    """

    step_rule: Callable[[Any], StepRule | LearnedVariance | SecondOrder]
    num_steps: int
    v: float
    interval: tuple[float, ...]
    clip: bool
    doubled: bool
    batch_size: int
    logsnr_min: float
    logsnr_max: float
    guidance: Guidance = PLAIN
    schedule: Schedule | None = None
    respaced: tuple[float, ...] = ()
    by_mean: bool = False
    clip_first: bool = False
    clean_end: bool = True
    corrector: Langevin | None = None
    predictor_guided: bool = True

    @property
    def levels(self) -> int | Array:
        """T or, of another schedule than the cosine, its grid of λ: what `guided_sample` takes as `num_steps`."""
        if self.respaced:
            return jnp.asarray(self.respaced, jnp.float32)
        if self.schedule is None and self.clean_end:
            return self.num_steps
        density = self.schedule or cosine(self.logsnr_min, self.logsnr_max)
        return grid(self.num_steps, density, clean_end=self.clean_end)


class SampleSpec(NamedTuple):
    """The images to sample, in columns: image i is number `index[i]` of `seed[i]`, of class `label[i]`, at `w[i]`."""

    seed: np.ndarray
    index: np.ndarray
    label: np.ndarray
    w: np.ndarray


Sampler = Callable[..., Iterator[UInt8[np.ndarray, "n h w c"]]]
"""(parameters, spec, v=..., interval=..., classifier=..., guide=...) -> the images in order, batch by batch, on every
process."""
OTHER_LABELS = np.uint32(2**32 - 1)
"""The number for `fold_in` that draws the class an image is guided away from. The noise has the numbers of steps."""


def to_uint8(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Values in [−1, 1] as 0 to 255: clip, then round (x + 1) · 127.5 to nearest. The project's only rounding rule."""
    return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def compile_sampler(network: Network, sampling: Sampling, mesh: Mesh, guide: Network | None = None) -> Sampler:
    """One program that serves every seed, class, weight, v and interval. v and interval default to those of `sampling`.

    `guide` is the network that guidance leads away from; the sampler takes its parameters as `guide`. By default,
    guidance leads away from the unconditional score.

    Every batch has `sampling.batch_size` rows, or one per device if that is more, as a line then says. The last one is
    padded, so that an image does not depend on how many are asked for. A batch whose weights are all 0 costs one
    network evaluation per step, unless the rule needs both scores. With a noisy classifier, w is the weight of
    classifier guidance. Raises ValueError if the devices do not divide a larger batch, if the rule needs another class
    where there is none, and as `seeds.check` does; the sampler raises ValueError for images that are not finite.
    """
    seeds.check()
    parallel.check_batch("sample.batch_size", sampling.batch_size, mesh)
    size = max(sampling.batch_size, mesh.size)
    if size > sampling.batch_size and jax.process_index() == 0:
        few = sampling.batch_size
        print(
            f"sample.batch_size is {few}, fewer images than the {size} devices: they draw {size} at a time.", flush=True
        )

    guidance = sampling.guidance
    if guidance.other_labels and network.num_classes < 2:
        raise UserError(
            f"the rule {guidance.text!r} needs another class for each image, and the network has {network.num_classes} "
            "classes: leave other_labels() out of the rule"
        )

    def program(
        weights: Any, seed: Array, index: Array, label: Array, w: Array, v: Array, lo: Array, hi: Array
    ) -> tuple[Array, Array]:
        params, classifier, guide_params = weights
        eps_fn, weight = network.eps_of_params(params), Interval(w, lo, hi)
        step_rule: Any = sampling.step_rule(v)
        if classifier is not None:
            if sampling.by_mean:
                step_rule = shift_mean(step_rule, classifier, label, weight)
            else:
                unguided = clipped(eps_fn) if sampling.clip_first else eps_fn
                eps_fn = classifier_guidance(unguided, classifier, weight)
            weight = 0.0
        corrector = sampling.corrector
        if corrector is not None and not sampling.predictor_guided:
            corrector, weight = corrector._replace(w=weight), 0.0
        keys = jax.vmap(lambda s, i: jax.random.fold_in(seeds.key(s), i))(seed, index)
        null: Any = NULL_LABEL
        if guidance.other_labels:
            null = jax.vmap(lambda k, c: others(jax.random.fold_in(k, OTHER_LABELS), c))(keys, label)
        x = guided_sample(
            keys,
            eps_fn,
            label,
            network.image_shape,
            w=weight,
            null=null,
            guide=None if guide is None else guide.eps_of_params(guide_params),
            rule=guidance.rule,
            reuse=guidance.reuse,
            num_steps=sampling.levels,
            sampler=step_rule,
            corrector=corrector,
            clip=guidance.clip or (sampling.clip and not sampling.clip_first),
            doubled=sampling.doubled,
            logsnr_min=sampling.logsnr_min,
            logsnr_max=sampling.logsnr_max,
        )
        return to_uint8(x), jnp.isfinite(x).all(axis=(1, 2, 3))

    def others(key: Array, label: Array) -> Array:
        return other_labels(key, label[None], network.num_classes)[0]

    compiled = xla.jit(program, out_shardings=NamedSharding(mesh, parallel.BATCH))

    def sampler(
        params: Any,
        spec: SampleSpec,
        v: float = sampling.v,
        interval: tuple[float, ...] = sampling.interval,
        classifier: ClassifierFn | None = None,
        guide: Any = None,
    ) -> Iterator[np.ndarray]:
        for first in range(0, len(spec.index), size):
            watchdog.alive(slow=first == 0)
            rows = SampleSpec(*(np.resize(column[first : first + size], size) for column in spec))
            ends = (np.inf, -np.inf)
            if rows.w.any() or guidance.always:
                ends = interval or guidance.interval or (-np.inf, np.inf)
            columns = (parallel.shard_rows(mesh, column) for column in rows)
            images, finite = map(
                parallel.gather, compiled((params, classifier, guide), *columns, *map(np.float32, (v, *ends)))
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


def evaluations(sampling: Sampling, w: float, interval: tuple[float, ...], student: bool = False) -> int:
    """Network evaluations per image: one per step, and a second one per step inside the interval if w is not 0.

    The second is that of the guide if there is one. A rule that needs both scores has it at w = 0 too. One that reuses
    the difference of the scores has it at fewer steps; of `similar`, which depends on the images, this is the largest
    number. Under classifier guidance, it is a gradient of the classifier, which is counted as one evaluation. So is the
    second score of a network with a shared trunk, which costs less: `second_flops`. A `student` has no second one. Each
    step of a corrector costs as much as the sampler's own.
    """
    guidance = sampling.guidance
    logsnr = schedule(sampling.levels, sampling.logsnr_min, sampling.logsnr_max)
    lo, hi = interval or guidance.interval or (-np.inf, np.inf)
    guided = int(((logsnr >= lo) & (logsnr <= hi)).sum()) * ((w != 0 or guidance.always) and not student)
    at_all = sampling.num_steps + reuse.evaluations(guidance.reuse, guided)
    if sampling.corrector is None:
        return at_all
    own = at_all if sampling.predictor_guided else sampling.num_steps
    return own + operator.index(sampling.corrector.steps) * at_all


def evaluation_flops(network: Network, params: Any) -> float:
    """Floating-point operations per network evaluation of one image. NaN if `xla.flops` cannot count them."""
    z, logsnr, label = _one_image(network)
    inputs = (z, logsnr, label, *[logsnr] * network.student)
    return xla.flops(lambda params, *inputs: network.eps_of_params(params)(*inputs), params, *inputs)


def second_flops(network: Network, params: Any, first: float, guide: Guide | None = None) -> float:
    """Floating-point operations of the second score of a step, of which `first` are those of an evaluation.

    It is that of the guide, whose network may have another size, or that of ∅, which costs less for a network with a
    shared trunk.
    """
    if guide is not None:
        return first if guide.network == network else evaluation_flops(guide.network, guide.params)
    if joint_scores(network.eps_of_params(params)) is None:
        return first

    def both(params: Any, *inputs: Any) -> Any:
        scores = joint_scores(network.eps_of_params(params))
        assert scores is not None
        return scores(*inputs)

    z, logsnr, label = _one_image(network)
    return xla.flops(both, params, z, logsnr, label, label) - first


def _one_image(network: Network) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of z, λ and the label."""
    z = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    return z, jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
