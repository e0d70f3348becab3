"""DINOv2's PyTorch weights by the formula of `formula.py`, and its forward pass written out in NumPy, in float64."""

import math

import formula
import numpy as np
from jaxtyping import Float, UInt8

from cfd.evaluation import dinov2

SMALL = dinov2.DINOv2(width=128, depth=2, grid=5)
"""The network of `dinov2_state()`. Tests put it in the place of `dinov2.VIT_L`."""
Tensors = dict[str, np.ndarray]


def dinov2_state(width: int = 128, depth: int = 2, grid: int = 5) -> Tensors:
    """A state dict with the names and shapes of facebookresearch/dinov2's weights. No tensor is neutral."""
    layer = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "ls1.gamma": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
        "ls2.gamma": (width,),
    }
    tensors = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid**2, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        **{f"blocks.{block}.{name}": shape for block in range(depth) for name, shape in layer.items()},
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    return {key: formula.tensor(key, *shape) for key, shape in tensors.items()}


def features(state: Tensors, images: UInt8[np.ndarray, "b 224 224 3"]) -> Float[np.ndarray, "b d"]:
    """The class token of images of 224x224, one after the other, patch by patch and head by head.

    The positions must be those of 16 by 16 patches.
    """
    return np.stack([of_image(state, image) for image in images])


def of_image(state: Tensors, image: UInt8[np.ndarray, "224 224 3"]) -> Float[np.ndarray, " d"]:
    w = {key: x.astype(np.float64) for key, x in state.items()}
    x = (image / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    corners = [(row, column) for row in range(0, 224, 14) for column in range(0, 224, 14)]
    kernel = w["patch_embed.proj.weight"].transpose(0, 2, 3, 1).reshape(-1, 14 * 14 * 3)
    patches = [kernel @ x[r : r + 14, c : c + 14].ravel() + w["patch_embed.proj.bias"] for r, c in corners]
    tokens = np.stack([w["cls_token"][0, 0], *patches]) + w["pos_embed"][0]
    width = tokens.shape[1]
    for block in range(sum(key.endswith("ls1.gamma") for key in w)):
        p = {key.removeprefix(f"blocks.{block}."): v for key, v in w.items() if key.startswith(f"blocks.{block}.")}
        qkv = normalized(tokens, p["norm1.weight"], p["norm1.bias"]) @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]
        q, k, v = np.split(qkv, 3, axis=1)
        heads = []
        for first in range(0, width, 64):
            own = slice(first, first + 64)
            weights = np.exp(q[:, own] @ k[:, own].T / 8.0)
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, own])
        attended = np.concatenate(heads, axis=1) @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        tokens = tokens + p["ls1.gamma"] * attended
        hidden = normalized(tokens, p["norm2.weight"], p["norm2.bias"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1.0 + np.vectorize(math.erf)(hidden / math.sqrt(2.0)))
        tokens = tokens + p["ls2.gamma"] * (hidden @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"])
    return normalized(tokens, w["norm.weight"], w["norm.bias"])[0]


def normalized(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Layer normalization."""
    return (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6) * weight + bias
