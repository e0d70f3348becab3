"""Weights of ADM's networks by a formula from a tensor's name and shape, and what its own code printed with them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from formula import uniform

from cfd.convert.adm_network import Hidden, Network, adm_network
from cfd.convert.adm_weights import adm_params


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32: variance 1 / fan-in for matrices and kernels, about 1 for a norm's gain, small for a bias. None is 0."""
    x = 2.0 * uniform(name, *shape) - 1.0
    if "embedding" in name or "label_emb" in name:
        return x.astype(np.float32)
    if len(shape) > 1:
        return (x * np.sqrt(3.0 / np.prod(shape[1:]))).astype(np.float32)
    return (1.0 + 0.2 * x if name.endswith("weight") else 0.1 * x).astype(np.float32)


def noisy_images(batch: int, size: int) -> np.ndarray:
    """Float32 [batch, size, size, 3] of about unit variance."""
    return (3.4 * (uniform("z", batch, size, size, 3) - 0.5)).astype(np.float32)


class Printed(NamedTuple):
    """The recorded outputs of the original network with these weights, on `noisy_images` at `t`, for `labels`."""

    network: Network
    params: dict[str, Any]
    state: dict[str, np.ndarray]
    z: np.ndarray
    stored: dict[str, np.ndarray]


def printed(name: str) -> Printed:
    """tests/data/adm_{name}.npz, and our network with the same weights, its architecture inferred from their shapes."""
    with np.load(Path(__file__).parent / "data" / f"adm_{name}.npz") as file:
        stored = dict(file)
    state = {key: weight(key, tuple(shape)) for key, shape in json.loads(str(stored["shapes"])).items()}
    network = adm_network({key: x.shape for key, x in state.items()}, hidden(stored))
    return Printed(
        network, adm_params(network, state), state, noisy_images(len(stored["t"]), int(stored["size"])), stored
    )


def hidden(stored: dict[str, np.ndarray]) -> Hidden:
    """The flags that the tensors do not show."""
    num_heads, head_channels = json.loads(str(stored["heads"]))
    return Hidden(
        image_size=int(stored["size"]),
        head_channels=None if head_channels < 0 else head_channels,
        num_heads=None if head_channels > 0 else num_heads,
        attention_order=str(stored["order"]),
        schedule=str(stored["schedule"]),
    )


def relative(ours: Any, theirs: np.ndarray) -> float:
    """The largest difference, in units of the largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
