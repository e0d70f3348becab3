"""InceptionV3's weights from the files of pytorch-fid and torch-fidelity."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Float, Shaped

from cfd.convert.torch_file import INCEPTION, identify, read_torch, real_numbers
from cfd.errors import UserError
from cfd.evaluation.inception import BATCH_NORM_EPS, param_shapes, save_params
from cfd.runs import files


def convert_inception(path: str | Path, out: str | Path, *, key: str | None = None) -> None:
    """Writes InceptionV3's weights as the `.npz` that `eval.inception_path` names. Each stage is printed in a line.

    `key` is as for `read_torch`. Raises ValueError for any other file, and if `out` exists.
    """
    if files.exists(out):
        raise UserError(f"{out} exists: give the name of a file to make")
    print(f"Reading {path}.", flush=True)
    state = read_torch(path, key)
    if (found := identify(list(state))) != INCEPTION:
        raise UserError(f"{path} does not hold InceptionV3 but {found}")
    print(f"Converting {len(state)} tensors.", flush=True)
    params = inception_params_from_torch(state)
    print(f"Saving {out}.", flush=True)
    save_params(out, params)
    print(f"Wrote {out}.", flush=True)


def inception_params_from_torch(state: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Any]:
    """The params of `InceptionV3`, float32 NumPy arrays, from the state dict of pytorch-fid or torch-fidelity.

    Batch norms are folded into the convolutions. The bias of the logits must be present but is not kept, because ADM's
    evaluator does not use it. Raises ValueError, with the tensor's name, if a tensor is missing, is left over, has
    another shape, or is not finite.
    """
    unused = {key for key in state if not key.endswith(".num_batches_tracked")}

    def take(key: str, *shape: int) -> Float[np.ndarray, "..."]:
        if key not in state:
            raise UserError(f"no tensor {key!r}: give pt_inception-2015-12-05-6726825d.pth or a file with its tensors")
        unused.discard(key)
        array = state[key]
        if array.shape != shape:
            raise UserError(f"tensor {key!r} has shape {array.shape}, expected {shape}")
        return np.asarray(real_numbers(key, array), np.float64)

    params = {}
    for path, shape in param_shapes().items():
        if path == ("fc", "kernel"):
            params[path] = take("fc.weight", *shape[::-1]).T
            take("fc.bias", shape[1])
        elif path[-1] == "kernel":
            height, width, channels, features = shape
            name = ".".join(path[:-2])
            scale, offset, mean, variance = (
                take(f"{name}.bn.{field}", features) for field in ("weight", "bias", "running_mean", "running_var")
            )
            gain = scale / np.sqrt(variance + BATCH_NORM_EPS)
            kernel = take(f"{name}.conv.weight", features, channels, height, width)
            params[path] = kernel.transpose(2, 3, 1, 0) * gain
            params[(*path[:-1], "bias")] = offset - mean * gain
    if unused:
        raise UserError(f"{len(unused)} tensors are not InceptionV3's: {sorted(unused)[:3]}")
    return unflatten_dict({path: np.ascontiguousarray(array, np.float32) for path, array in params.items()})
