"""A linear map from images to four outputs, which tests train in place of a network, and the loop that trains it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from meshes import mesh_of
from tiny import tiny_config

from cfd.modes import settings
from cfd.modes.fit import fit
from cfd.runs import workdir


def init(key: Any) -> Any:
    return {"w": 0.1 * jax.random.normal(key, (64, 4)), "b": jnp.zeros(4)}


def forward(params: Any, x: Any) -> Any:
    return x.reshape(len(x), -1) @ params["w"] + params["b"][None]


def squares(key: Any, params: Any, x: Any, labels: Any) -> Any:
    """A loss without randomness: the mean squared error of a linear map that predicts the label."""
    return jnp.mean((forward(params, x) - labels[:, None]) ** 2)


def noisy(key: Any, params: Any, x: Any, labels: Any) -> Any:
    """A loss with randomness: the mean squared error of a linear map that predicts noise."""
    return jnp.mean((forward(params, x) - jax.random.normal(key, (len(x), 4))) ** 2)


def run(
    folder: Path,
    loss_fn: Any = noisy,
    *,
    mesh: Mesh | None = None,
    init: Callable[[Any], Any] = init,
    draw: Callable[[int, Any], np.ndarray | None] | None = None,
    **changes: Any,
) -> None:
    """`fit` with the tiny config, by default on the linear map and one device."""
    config = tiny_config(**changes)
    dataset = settings.open_split(config, config.data.split)
    fit(
        settings.training_of(config, config.train),
        str(folder),
        mesh or mesh_of(1),
        dataset,
        workdir.describe("diffusion", config.to_dict(), dataset.class_names),
        init,
        loss_fn,
        settings.optimizer_of(config.train),
        draw,
    )


def bad_loss(kind: str, is_bad: Callable[[Any], Any]) -> Callable:
    """`noisy`, non-finite if is_bad(key): in its value, only in its gradient, or because of its input."""

    def loss_fn(key: Any, params: Any, x: Any, labels: Any) -> Any:
        bad = is_bad(key)
        if kind == "data":
            x = jnp.where(bad, jnp.nan, x)
        loss = noisy(key, params, x, labels)
        if kind == "loss":
            loss = loss + jnp.where(bad, jnp.inf, 0.0)
        if kind == "gradient":  # the square root has the value 0 and an infinite slope there
            loss = loss + jnp.sqrt(jnp.where(bad, 0.0, 1.0) * (1.0 + jnp.sum(params["b"] ** 2)))
        return loss

    return loss_fn


def bad_at(key: Any, steps: list[int]) -> Callable[[Any], Any]:
    """The function that says whether a key is that of one of `steps`, counted from 1."""
    keys = jnp.stack([jax.random.key_data(jax.random.fold_in(key, s - 1)) for s in steps])
    return lambda key: jnp.any(jnp.all(keys == jax.random.key_data(key)[None], axis=-1))


def assert_same_bits(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)
