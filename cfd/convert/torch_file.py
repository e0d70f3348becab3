"""Reads PyTorch's files without running the code that a pickle can carry, and says what other files are.

This is the only module that needs PyTorch, and only when `read_torch` is called.
"""

import os
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from cfd.errors import UserError

SAVE_PLAIN = "Give a file that holds a plain dict of tensors (torch.save(model.state_dict(), FILE) writes one)"
GIVE_FLOATS = "give the checkpoint before it was converted to this type"
INSTALL = 'pip install "torch>=2.10"'
ADM_UNET = "a U-Net of ADM"
ADM_CLASSIFIER = "a noisy classifier of ADM"
INCEPTION = "InceptionV3: convert it with `python -m cfd.convert inception`"
DINOV2 = "DINOv2: convert it with `python -m cfd.convert dinov2`"
GIVE_DINOV2 = "give dinov2_vitl14_pretrain.pth of facebookresearch/dinov2"

# Files of other projects are the likeliest mistake, and a user knows the project better than the names of its tensors.
OTHERS = {
    "model.diffusion_model.": "a latent-diffusion checkpoint, whose U-Net works on an autoencoder's latents",
    "first_stage_model.": "a latent-diffusion checkpoint, whose U-Net works on an autoencoder's latents",
    "transformer_blocks.": "a latent-diffusion U-Net with cross-attention",
    "down_blocks.": "a diffusers U-Net",
    "adaLN_modulation.": "a diffusion transformer (DiT)",
    "param_groups": "the state of an optimizer",
    "branch3x3dbl_1.conv.weight": INCEPTION,
    "layer1.0.conv1.weight": "a ResNet",
    "map_layer0.": "a network of EDM",
    "rope_embed.": f"DINOv3, and FD-DINOv2 is of its predecessor: {GIVE_DINOV2}",
    "register_tokens": f"a DINOv2 with registers, and FD-DINOv2 is of the one without: {GIVE_DINOV2}",
    "blocks.0.mlp.w12.": f"DINOv2's ViT-g with its SwiGLU, and FD-DINOv2 is of ViT-L/14: {GIVE_DINOV2}",
    "blocks.0.0.ls1.gamma": f"a checkpoint of DINOv2's training, whose blocks are in chunks: {GIVE_DINOV2}",
    "embeddings.patch_embeddings.": f"a vision transformer of Hugging Face's transformers: {GIVE_DINOV2}",
    "blocks.0.ls1.gamma": DINOV2,
    "blocks.0.attn.qkv.weight": f"a vision transformer without layer scales, which is no DINOv2: {GIVE_DINOV2}",
}
"""{part of a tensor's name: the network that has such a tensor}."""


def read_torch(path: str | Path, key: str | None = None) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The state dict of a PyTorch file, or the one below `key` in a file that holds several. No code in it is ever run.

    Floating-point tensors become float32. A zip file is mapped into memory rather than read. A wrapper's prefix that
    all names have, such as "module.", is removed, and a line says so. Raises ValueError for anything but a dict of
    tensors, with a message that says what the file is, and if PyTorch is missing or before 2.10.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise UserError(f"reading PyTorch files needs PyTorch: {INSTALL}") from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise UserError(
            f"PyTorch {torch.__version__} runs code that a file can carry (CVE-2025-32434, CVE-2026-24747): {INSTALL}"
        )
    path = Path(path)
    is_zip = _check_container(path)
    try:
        # PyTorch warns about pickles of other versions, which the errors below report.
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: its pickle asks to run code on loading, or is damaged. {SAVE_PLAIN}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f"{path} is damaged or no PyTorch file: {str(e).splitlines()[0][:200]}") from None
    state = _choose(path, state, key, torch.Tensor)
    of_cpu = all(x.layout == torch.strided and x.device.type == "cpu" for x in state.values())
    if not of_cpu or sum(x.nbytes for x in state.values()) > path.stat().st_size:
        raise UserError(
            f"{path} is refused: its tensors are sparse, without values (on the device meta), or repeat their bytes to "
            f"more than the file holds. {SAVE_PLAIN}"
        )
    if unread := [name for name, x in state.items() if x.is_quantized or x.is_complex()]:
        dtype = state[unread[0]].dtype
        raise UserError(f"{path}: tensor {str(unread[0])!r} is {dtype}, and weights are real numbers: {GIVE_FLOATS}")
    state = _without_prefix({str(name): x.detach() for name, x in state.items()})
    return {name: x.float().numpy() if x.is_floating_point() else x.numpy() for name, x in state.items()}


def _check_container(path: Path) -> bool:
    """Whether the file is a zip, PyTorch's present format; False: a pickle, its older format.

    Raises ValueError if the first bytes show that the file is neither.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is not a file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file that you may read") from None
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-LFS pointer of {size} bytes, not the weights: fetch them with `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{path} is a web page, not weights: download the file itself")
    if head[8:10] == b'{"':
        raise UserError(f"{path} is a safetensors file: give the PyTorch checkpoint of the original release")
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is a truncated PyTorch zip, of which {size} bytes are here: download it again")
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
                changed = archive.testzip() if stored else None  # `torch.load` does not compare checksums
        except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): download it again") from None
        if not any(entry.filename.endswith("data.pkl") for entry in entries):
            raise UserError(f"{path} is a zip archive without PyTorch's data.pkl; its first file is {entries[:1]}")
        if not stored:
            raise UserError(
                f"{path} is refused: its entries are compressed, and torch.save never compresses them. {SAVE_PLAIN}"
            )
        if changed:
            raise UserError(f"{path} is damaged, because the checksum of {changed} differs: download it again")
        return True
    if not head.startswith(b"\x80"):
        raise UserError(f"{path} is no PyTorch file: it begins with {head[:16]!r}")
    return False


def real_numbers(name: str, x: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The tensor `name`. Raises ValueError unless it holds floating-point numbers, all finite."""
    if x.dtype.kind != "f":
        raise UserError(f"tensor {name!r} is {x.dtype}, and weights are floating-point numbers: {GIVE_FLOATS}")
    if not np.isfinite(x).all():
        raise UserError(f"tensor {name!r} holds NaN or infinity: download the file again")
    return x


def _choose(path: Path, state: Any, key: str | None, tensor: type) -> dict[Any, Any]:
    """The dict of tensors below `key`, or `state` itself. Raises ValueError, with the keys there are, if it is none."""

    def is_flat(value: Any) -> bool:
        return isinstance(value, dict) and len(value) > 0 and all(isinstance(x, tensor) for x in value.values())

    chosen: Any = state
    for part in key.split("/") if key else ():
        chosen = {str(name): x for name, x in chosen.items()}.get(part) if isinstance(chosen, dict) else None
    if is_flat(chosen):
        return chosen
    dicts = _dicts(state)
    # An optimizer has a small dict of tensors for each parameter.
    largest = sorted((name for name in dicts if is_flat(dicts[name])), key=lambda name: -len(dicts[name]))[:4]
    choice = ", ".join(f"--key={name} ({len(dicts[name])} tensors)" for name in largest if name)
    if isinstance(chosen, dict) and any(isinstance(x, tensor) for x in chosen.values()):
        others = [str(name) for name, x in chosen.items() if not isinstance(x, tensor)]
        at, instead = f" at --key={key}" if key else "", f", or give {choice}" if choice else ""
        raise UserError(
            f"{path} has a dict{at} with entries that are no tensors, {', '.join(others[:3])}: save it again as "
            f"torch.save({{name: x for name, x in state.items() if isinstance(x, torch.Tensor)}}, FILE){instead}"
        )
    if key:
        raise UserError(f"{path} has no dict of tensors at --key={key}: {f'give {choice}' if choice else 'omit it'}")
    names = [str(name) for inner in dicts.values() for name in inner]
    held = identify(names) if names else f"one {type(state).__name__} without tensors by their names"
    remedy = f"give one of its dicts, {choice}" if choice else SAVE_PLAIN[0].lower() + SAVE_PLAIN[1:]
    raise UserError(f"{path} is not one flat dict of tensors. It holds {held}: {remedy}")


def _dicts(state: Any) -> dict[str, dict[Any, Any]]:
    """The dicts in nested dicts, the outer ones first, by their keys with slashes. Each dict is there once."""
    dicts: dict[str, dict[Any, Any]] = {}
    seen: set[int] = set()
    waiting = [("", state)]
    for name, value in waiting:  # the loop appends to the list
        if isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            dicts[name] = value
            waiting += [(f"{name}/{key}".removeprefix("/"), inner) for key, inner in value.items()]
    return dicts


def _without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """The same tensors without the prefix that all names share, if the rest are names of a network known here."""
    prefix = os.path.commonprefix(list(state)).rpartition(".")[0] + "."  # noqa: RUF071 (these are no paths)
    short = {name.removeprefix(prefix): x for name, x in state.items()}
    of_others = identify(list(state)) in {*OTHERS.values()} - {INCEPTION, DINOV2}
    if prefix == "." or of_others or identify(list(short)) not in (ADM_UNET, ADM_CLASSIFIER, INCEPTION, DINOV2):
        return state
    print(f"The names of all tensors begin with {prefix!r}, which is removed.", flush=True)
    return short


def identify(names: Sequence[str]) -> str:
    """The network whose tensors have these names, in words.

    ADM_UNET, ADM_CLASSIFIER, INCEPTION and DINOV2 can be converted.
    """
    for part, network in OTHERS.items():
        if any(part in name for name in names):
            return network
    if {"time_embed.0.weight", "input_blocks.0.0.weight"} <= set(names):
        return ADM_UNET if any(n.startswith("output_blocks.") for n in names) else ADM_CLASSIFIER
    return f"{len(names)} names unknown here, the first are {list(names)[:2]}"
