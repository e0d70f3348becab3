"""DINOv2's weights from the files of facebookresearch/dinov2."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped

from cfd.convert.torch_file import DINOV2, GIVE_DINOV2, identify, read_torch, real_numbers
from cfd.errors import UserError
from cfd.evaluation import dinov2
from cfd.runs import files


def convert_dinov2(path: str | Path, out: str | Path, *, key: str | None = None) -> None:
    """Writes DINOv2's weights as the `.npz` that `eval.dinov2_path` names. Each stage is printed in a line.

    `key` is as for `read_torch`. Raises ValueError for any other file, and if `out` exists.
    """
    if files.exists(out):
        raise UserError(f"{out} exists: give the name of a file to make")
    print(f"Reading {path}.", flush=True)
    state = read_torch(path, key)
    if (found := identify(list(state))) != DINOV2:
        raise UserError(f"{path} does not hold a DINOv2 that can be converted, but {found}")
    print(f"Converting {len(state)} tensors.", flush=True)
    params = dinov2_params_from_torch(state)
    print(f"Saving {out}.", flush=True)
    dinov2.save_params(out, params)
    print(f"Wrote {out}.", flush=True)


def dinov2_params_from_torch(state: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Any]:
    """The params of `dinov2.VIT_L`, float32 NumPy arrays, from a state dict of facebookresearch/dinov2.

    The mask token, which only training uses, is not kept. Raises ValueError, with the tensor's name, if a tensor is
    missing, is left over, has another shape, or is not finite.
    """
    width, grid = dinov2.VIT_L.width, dinov2.VIT_L.grid
    unused = set(state) - {"mask_token"}

    def take(key: str, *shape: int) -> Float[np.ndarray, "..."]:
        if key not in state:
            raise UserError(f"no tensor {key!r}: {GIVE_DINOV2}")
        unused.discard(key)
        array = state[key]
        if array.shape != shape:
            raise UserError(f"tensor {key!r} has shape {array.shape}, expected {shape}: {GIVE_DINOV2}")
        return np.asarray(real_numbers(key, array), np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": take(f"{name}.weight", width), "bias": take(f"{name}.bias", width)}

    def dense(name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {"kernel": take(f"{name}.weight", outputs, inputs).T, "bias": take(f"{name}.bias", outputs)}

    def block(name: str) -> dict[str, Any]:
        return {
            "norm1": norm(f"{name}.norm1"),
            "qkv": dense(f"{name}.attn.qkv", width, 3 * width),
            "proj": dense(f"{name}.attn.proj", width, width),
            "ls1": take(f"{name}.ls1.gamma", width),
            "norm2": norm(f"{name}.norm2"),
            "fc1": dense(f"{name}.mlp.fc1", width, 4 * width),
            "fc2": dense(f"{name}.mlp.fc2", 4 * width, width),
            "ls2": take(f"{name}.ls2.gamma", width),
        }

    blocks = [block(f"blocks.{number}") for number in range(dinov2.VIT_L.depth)]
    params = {
        "cls_token": take("cls_token", 1, 1, width)[0],
        "pos_embed": take("pos_embed", 1, 1 + grid**2, width)[0],
        "patch_embed": {
            "kernel": take("patch_embed.proj.weight", width, 3, dinov2.PATCH, dinov2.PATCH).transpose(2, 3, 1, 0),
            "bias": take("patch_embed.proj.bias", width),
        },
        "blocks": jax.tree.map(lambda *rows: np.stack(rows), *blocks),
        "norm": norm("norm"),
    }
    if unused:
        raise UserError(f"{len(unused)} tensors are not ViT-L/14's: {sorted(unused)[:3]}; {GIVE_DINOV2}")
    return params
