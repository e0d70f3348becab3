"""The parameters of our networks from ADM's state dicts: names, axes and the order of attention heads."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array
from jaxtyping import Float, Shaped

from cfd.convert.adm_network import Network
from cfd.convert.torch_file import real_numbers
from cfd.errors import UserError

LAYERS = {
    "time_0": "time_embed.0",
    "time_1": "time_embed.2",
    "label": "label_emb",
    "norm_0/group": "in_layers.0",
    "conv_0": "in_layers.2",
    "emb": "emb_layers.1",
    "norm_1/group": "out_layers.0",
    "conv_1": "out_layers.3",
    "skip": "skip_connection",
    "norm/group": "norm",
    "qkv": "qkv",
    "out": "proj_out",
    "pool/qkv": "qkv_proj",
    "pool/out": "c_proj",
    "group": "",
    "": "",
}
"""{our name of a layer within its block: ADM's name}, for the blocks and the attention pooling."""

TENSORS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "position": "positional_embedding",
}
"""{our name of an array of a layer: ADM's name}."""


def adm_params(network: Network, state: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Any]:
    """The parameters of `network.module()`, float32, from ADM's state dict.

    Raises ValueError if a tensor is missing, is left over, has another shape, or is not finite.
    """
    module, size = network.module(), network.image_size
    z = jax.ShapeDtypeStruct((1, size, size, state["input_blocks.0.0.weight"].shape[1]), jnp.float32)
    one = jnp.zeros(1)
    arguments = (z, one, jnp.zeros(1, jnp.int32)) if network.kind == "diffusion" else (z, one)
    try:
        template: dict[str, Any] = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    except ValueError as e:
        raise UserError(f"the flags do not fit its tensors: {e}") from None
    blocks = _blocks(network)

    unused = set(state)
    params: dict[tuple[str, ...], Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(template):
        path = tuple(key.key for key in path)
        inner = "/".join(path[1:-1])
        layer = LAYERS.get(f"{path[0]}/{inner}", LAYERS.get(inner, inner))
        name = ".".join(part for part in (blocks[path[0]], layer, TENSORS[path[-1]]) if part)
        if name not in state:
            raise UserError(f"no tensor {name!r}, although the other tensors are those of a network that has it")
        unused.discard(name)
        legacy = network.attention_order == "legacy" and path[0] != "pool"
        x = _to_flax(name, state[name], path, leaf.shape)
        if legacy and path[-2] == "qkv":
            x = _heads_last(x, network.fields)
        params[path] = jnp.asarray(x)
    if unused:
        raise UserError(f"{len(unused)} tensors have no place in the network, the first are {sorted(unused)[:3]}")
    return unflatten_dict(params)


def _to_flax(
    name: str, x: Shaped[np.ndarray, "..."], path: tuple[str, ...], shape: tuple[int, ...]
) -> Float[np.ndarray, "..."]:
    """[out, in, *space] as [*space, in, out], without the two axes of space for a 1x1 convolution."""
    if path[-1] in ("kernel", "position"):
        x = x.transpose(*range(2, x.ndim), 1, 0)
    if x.shape[-len(shape) :] != shape or x.size != math.prod(shape):
        raise UserError(f"tensor {name!r} has shape {x.shape}, with its axes in the order of Flax; expected {shape}")
    return np.ascontiguousarray(real_numbers(name, x).reshape(shape), np.float32)


def _heads_last(x: Float[np.ndarray, "*rest c"], fields: dict[str, Any]) -> Float[np.ndarray, "*rest c"]:
    """The outputs of a qkv layer in our order, (3, heads, channels), from ADM's legacy order, (heads, 3, channels)."""
    heads = fields["num_heads"] or x.shape[-1] // (3 * fields["head_channels"])
    return np.moveaxis(x.reshape(*x.shape[:-1], heads, 3, -1), -3, -2).reshape(x.shape)


def _blocks(network: Network) -> dict[str, str]:
    """{our name of a block: ADM's name}."""
    fields = network.fields
    levels, per_level = len(fields["channel_mult"]), fields["num_res_blocks"]
    attends = [network.image_size >> level in fields["attention_resolutions"] for level in range(levels)]
    convolution = ("", "") if fields["resblock_updown"] else (".op", ".conv")
    names = {"embed": "", "conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2", "pool": "out.2"}
    names |= {"mid_0_res": "middle_block.0", "mid_attn": "middle_block.1", "mid_1_res": "middle_block.2"}
    for level in range(levels):
        first_in, first_out = 1 + level * (per_level + 1), (levels - 1 - level) * (per_level + 1)
        for i in range(per_level):
            names[f"down_{level}_{i}_res"] = f"input_blocks.{first_in + i}.0"
            names[f"down_{level}_{i}_attn"] = f"input_blocks.{first_in + i}.1"
        names[f"down_{level}_sample"] = f"input_blocks.{first_in + per_level}.0{convolution[0]}"
        for i in range(per_level + 1):
            names[f"up_{level}_{i}_res"] = f"output_blocks.{first_out + i}.0"
            names[f"up_{level}_{i}_attn"] = f"output_blocks.{first_out + i}.1"
        names[f"up_{level}_sample"] = f"output_blocks.{first_out + per_level}.{1 + attends[level]}{convolution[1]}"
    return names
