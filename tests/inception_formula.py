"""InceptionV3's PyTorch weights by the formula of `formula.py`, for the tests of the network and of its import."""

import formula
import numpy as np

from cfd.evaluation import inception


def inception_state() -> dict[str, np.ndarray]:
    """A state dict with the names and shapes of pytorch-fid's and torch-fidelity's weights."""
    tensors = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for path, shape in inception.param_shapes().items():
        if path[-1] == "kernel" and path[0] != "fc":
            name = ".".join(path[:-2])
            height, width, channels, features = shape
            tensors[f"{name}.conv.weight"] = (features, channels, height, width)
            tensors |= {f"{name}.bn.{k}": (features,) for k in ("weight", "bias", "running_mean", "running_var")}
    return {key: formula.tensor(key, *shape) for key, shape in tensors.items()}
