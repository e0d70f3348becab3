"""A network of one layer, which mixes all pixels, the class and the noise level: it samples in milliseconds."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from cfd.loading import Loaded
from cfd.modes.sampler import Network
from cfd.modes.settings import Run
from cfd.runs.digest import weights_hash

TRACED: list[int] = []
"""One batch size for each time that the network was traced."""


def params() -> Any:
    """The network's parameters, for images of 8x8x1 and ten classes; the last row of "class" is that of ∅."""
    rng = np.random.default_rng(0)
    mix, classes = rng.normal(0, 0.15, (64, 64)), rng.normal(0, 0.5, (11, 64))
    return {"mix": mix.astype(np.float32), "class": classes.astype(np.float32)}


def eps_of_params(params: Any) -> Any:
    def eps_fn(z: Any, logsnr: Any, labels: Any) -> Any:
        TRACED.append(len(z))
        h = z.reshape(len(z), -1) @ params["mix"] + params["class"][labels] + 0.01 * logsnr[:, None]
        return jnp.tanh(h).reshape(z.shape)

    return eps_fn


NETWORK = Network(eps_of_params, (8, 8, 1))
DIGITS = tuple("0123456789")


def opening(params: Any, classifier: Any = None, earlier: dict[int, Any] | None = None) -> Callable[[Any, str], Run]:
    """A stand-in for `settings.open_run` that finds step 7 of a run of this network, with the classes of the digits.

    `earlier` are the parameters of other steps. An EMA of another length than the run's own has smaller ones.
    """
    steps = {7: params} | (earlier or {})

    def model_at(step: int, ema: float = 0.0) -> Loaded:
        step = 7 if step == -1 else step
        there = {name: np.float32(1 - ema) * x for name, x in steps[step].items()} if ema else steps[step]
        eps_fn = Partial(lambda params, *inputs: eps_of_params(params)(*inputs), there)
        config = {"train": {"p_uncond": 0.1}}
        return Loaded(eps_fn, there, (8, 8, 1), 10, DIGITS, config, step, {}, {}, weights_hash(there))

    return lambda config, folder: Run(config, DIGITS, model_at, classifier)


def brighter(params: Any, z: Any, logsnr: Any) -> Any:
    """A noisy classifier that finds a higher class in a brighter image."""
    return params["strength"] * jnp.arange(10.0)[None] * jnp.mean(z, axis=(1, 2, 3))[:, None]


def assert_same_images(a: np.ndarray, b: np.ndarray) -> None:
    """Asserts that images are equal, except that one value in a thousand may differ by one grey level."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max(initial=0) <= 1 and (difference > 0).mean() <= 1e-3
