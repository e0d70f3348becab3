"""Weights and inputs made by a formula from a tensor's name and shape, so that two programs can make the same ones."""

import zlib

import numpy as np


def hashed(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float64 values in [−1, 1): an integer hash of the element's index, seeded by the CRC-32 of the name."""
    h = np.arange(int(np.prod(shape)), dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    h ^= h >> np.uint32(16)
    return (h / 2.0**31 - 1.0).reshape(shape)


def formula_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32: unit variance over the fan-in for matrices and kernels, about 1 for a norm's gain, small for a bias."""
    x = hashed(name, shape)
    if "embedding" in name or "label_emb" in name:
        return np.float32(x)
    if len(shape) > 1:
        return np.float32(x * np.sqrt(3.0 / np.prod(shape[1:])))
    return np.float32(1.0 + 0.2 * x if name.endswith("weight") else 0.1 * x)


def formula_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A whole state dict."""
    return {name: formula_weight(name, tuple(shape)) for name, shape in shapes.items()}
