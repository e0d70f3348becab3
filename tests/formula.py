"""Weights, images and features by a formula in NumPy alone, which gives both sides of a comparison the same bits."""

import zlib

import numpy as np


def uniform(name: str, *shape: int) -> np.ndarray:
    """Numbers in [0, 1), each from a hash of the name and of its index."""
    x = np.arange(np.prod(shape), dtype=np.uint32) * np.uint32(2654435761) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return ((x ^ (x >> np.uint32(16))) / 2.0**32).reshape(shape)


def tensor(key: str, *shape: int) -> np.ndarray:
    """One tensor of a PyTorch network: a He-uniform kernel, or a field of a batch norm that is not the identity."""
    u = uniform(key, *shape)
    if len(shape) > 1:
        return ((2.0 * u - 1.0) * np.sqrt(6.0 / np.prod(shape[1:]))).astype(np.float32)
    low, high = {"weight": (0.8, 1.2), "running_var": (0.6, 1.4)}.get(key.rpartition(".")[2], (-0.2, 0.2))
    return (low + (high - low) * u).astype(np.float32)


def images(count: int, size: int) -> np.ndarray:
    """uint8 [count, size, size, 3]: waves with noise, of a different direction and colour in each image."""
    i, y, x, c = np.ogrid[:count, :size, :size, :3]
    wave = np.sin((0.11 + 0.07 * i) * x + (0.05 + 0.09 * c) * y + i + 2.0 * c)
    return (127.5 + 90.0 * wave + 70.0 * (uniform("images", count, size, size, 3) - 0.5)).astype(np.uint8)


def features(name: str, count: int, dim: int, centre: float, spread: float) -> np.ndarray:
    """float32 [count, dim]: correlated and positive, with unequal variances, as pooled features are."""
    mix = uniform("mix", dim, dim) ** 4 * np.exp(-np.arange(dim) / dim)
    return ((centre + spread * uniform(name, count, dim)) @ mix).astype(np.float32)


def logits(count: int, classes: int) -> np.ndarray:
    """float32 [count, classes]: confident in some rows and not in others."""
    return ((uniform("logits", count, classes) - 0.5) * 20.0 * uniform("sure", count, 1)).astype(np.float32)
