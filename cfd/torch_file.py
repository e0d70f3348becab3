"""PyTorch's files, read without running the code that a pickle can carry, and said what they are.

The only module that needs PyTorch, and only when it is called.
"""

import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped


def read_torch(path: str | Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The state dict of a PyTorch file, mapped into memory where the file allows it. No code in it is ever run.

    Raises ValueError that says what the file is when it is anything but one flat dict of tensors, ValueError for a
    PyTorch before 2.10, and ModuleNotFoundError where it is missing.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ModuleNotFoundError('reading PyTorch files needs PyTorch: pip install "cfd[convert]"') from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise ValueError(
            f"PyTorch {torch.__version__} runs code that a file can carry (CVE-2025-32434, CVE-2026-24747): "
            'pip install "cfd[convert]" brings 2.10 or later'
        )
    path = Path(path)
    zipped = _check_container(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # on pickles of other versions, which the errors below name
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        held = f". It holds {holds(_pickled_names(path))}" if zipped else ""
        raise ValueError(
            f"{path} is refused: its pickle asks to run code on loading, or is damaged, and is no plain dict of tensors"
            f"{held}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f"{path} is damaged or no PyTorch file: {str(e).splitlines()[0][:200]}") from None
    if not isinstance(state, dict) or not state or not all(isinstance(x, torch.Tensor) for x in state.values()):
        names = _names(state)
        raise ValueError(f"{path} is not one flat dict of tensors. It holds {holds(names)}")
    strided = all(x.layout == torch.strided for x in state.values())
    if not strided or sum(x.nbytes for x in state.values()) > path.stat().st_size:
        raise ValueError(
            f"{path} is refused: its tensors are sparse, or repeat their bytes to more than the file holds"
        )
    state = {str(name): x.detach() for name, x in state.items()}
    return {name: x.float().numpy() if x.is_floating_point() else x.numpy() for name, x in state.items()}


def _check_container(path: Path) -> bool:
    """Whether the file is PyTorch's zip (else its older pickle); ValueError if its first bytes say it is neither."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a git-LFS pointer of {size} bytes, not the weights: fetch them with `git lfs pull`"
        )
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page, not weights: download the file itself")
    if head[8:10] == b'{"':
        raise ValueError(f"{path} is a safetensors file; give the PyTorch checkpoint of the original release")
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is truncated: a PyTorch zip of which {size} bytes are here; download it again")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if not any(entry.filename.endswith("data.pkl") for entry in entries):
            raise ValueError(f"{path} is a zip archive without PyTorch's data.pkl; its first file is {entries[:1]}")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError(f"{path} is refused: its entries are compressed, which PyTorch never does")
        return True
    if not head.startswith(b"\x80"):
        raise ValueError(f"{path} is no PyTorch file: it begins with {head[:16]!r}")
    return False


def _pickled_names(path: Path) -> list[str]:
    """The strings of a PyTorch zip's pickle, found without running it, up to where it is damaged."""
    names = []
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            for op, argument, _ in pickletools.genops(archive.read(name)):
                names += [str(argument)] if "UNICODE" in op.name else []
    except (ValueError, zipfile.BadZipFile):  # what was found until then still says what the file was
        pass
    return names


def _names(state: Any) -> list[str]:
    """The keys of nested dicts, the outer ones first; those of a dict that is there several times, once."""
    names: list[str] = []
    seen: set[int] = set()
    waiting = [state]
    for value in waiting:  # which grows
        if isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            names += map(str, value)
            waiting += value.values()
    return names


def holds(names: Sequence[str]) -> str:
    """What network has tensors of these names, in words."""
    known = {
        "model.diffusion_model.": "a latent-diffusion checkpoint, whose U-Net works on an autoencoder's latents",
        "first_stage_model.": "a latent-diffusion checkpoint, whose U-Net works on an autoencoder's latents",
        "transformer_blocks.": "a latent-diffusion U-Net with cross-attention",
        "down_blocks.": "a diffusers U-Net",
        "adaLN_modulation.": "a diffusion transformer (DiT)",
        "param_groups": "the state of an optimizer",
        "branch3x3dbl_1.conv.weight": "InceptionV3: convert it with `python -m cfd.convert inception`",
        "layer1.0.conv1.weight": "a ResNet",
        "map_layer0.": "a network of EDM",
    }
    for part, words in known.items():
        if any(part in name for name in names):
            return words
    if {"time_embed.0.weight", "input_blocks.0.0.weight"} <= set(names):
        return "a U-Net of ADM" if any(n.startswith("output_blocks.") for n in names) else "a noisy classifier of ADM"
    return f"{len(names)} names unknown here, first {list(names)[:2]}"
