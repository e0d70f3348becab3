"""From the tensors of openai/guided-diffusion's networks to ours: the architecture, and the parameters.

NumPy in, JAX out; `cfd.convert` reads the files and writes the run folder.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array
from jaxtyping import Float, Shaped

from cfd.classifier import Classifier
from cfd.torch_file import holds
from cfd.unet import UNet

Shapes = Mapping[str, tuple[int, ...]]


class Published(NamedTuple):
    """What the tensors of a published model do not show: the flags in the README of openai/guided-diffusion."""

    image_size: int
    head_channels: int
    num_heads: int
    attention_order: str
    schedule: str
    dropout: float


PUBLISHED: dict[tuple[str, int, tuple[int, ...], int, tuple[int, ...]], Published] = {
    # kind, base channels, multipliers, residual blocks, levels with attention
    ("diffusion", 192, (1, 2, 3, 4), 3, (1, 2, 3)): Published(64, 64, 0, "new", "cosine", 0.1),
    ("diffusion", 256, (1, 1, 2, 3, 4), 2, (2, 3, 4)): Published(128, 0, 4, "legacy", "linear", 0.0),
    ("diffusion", 256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)): Published(256, 64, 0, "legacy", "linear", 0.0),
    ("classifier", 128, (1, 2, 3, 4), 4, (1, 2, 3)): Published(64, 64, 0, "legacy", "cosine", 0.0),
    ("classifier", 128, (1, 1, 2, 3, 4), 2, (2, 3, 4)): Published(128, 64, 0, "legacy", "linear", 0.0),
    ("classifier", 128, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)): Published(256, 64, 0, "legacy", "linear", 0.0),
}


class Hidden(NamedTuple):
    """The same, as given by flags; None where the flag is absent."""

    image_size: int | None = None
    head_channels: int | None = None
    num_heads: int | None = None
    attention_order: str | None = None
    schedule: str | None = None
    num_res_blocks: int | None = None


class Network(NamedTuple):
    """A network of this package that takes the weights of an ADM file."""

    kind: str  # "diffusion" or "classifier"
    fields: dict[str, Any]
    image_size: int
    attention_order: str
    schedule: str

    def module(self) -> UNet | Classifier:
        return UNet(**self.fields) if self.kind == "diffusion" else Classifier(**self.fields)


def adm_network(shapes: Shapes, hidden: Hidden = Hidden()) -> Network:
    """The network whose state dict has these shapes, with nothing guessed.

    Raises ValueError for anything but a U-Net or classifier of ADM, and, naming the flags to give, where a property
    that tensors do not show (heads, order of attention, schedule, image size) is not that of a published model.
    """
    held = holds(list(shapes))
    if not held.endswith("of ADM"):
        raise ValueError(f"this is no network of ADM but {held}")
    try:
        return _infer(held, shapes, hidden)
    except (KeyError, IndexError) as e:
        raise ValueError(f"this is {held} with a tensor missing or of another rank: {e}") from None


def _infer(held: str, shapes: Shapes, hidden: Hidden) -> Network:
    kind = "diffusion" if held.startswith("a U-Net") else "classifier"
    if kind == "classifier" and "out.2.positional_embedding" not in shapes:
        raise ValueError('this is a classifier of ADM without attention pooling; only pool="attention" is supported')
    if shapes["input_blocks.0.0.weight"][1] not in (1, 3):
        channels = shapes["input_blocks.0.0.weight"][1]
        raise ValueError(f"its first convolution takes {channels} channels: ADM's upsamplers are not supported")

    base, last, levels = shapes["time_embed.0.weight"][1], _last(shapes, "input_blocks."), _levels(shapes, hidden)
    blocks, rest = divmod(last + 1, levels)  # the blocks of a level: residual blocks, and the one that halves
    if rest:
        raise ValueError(f"this is {held} whose levels have unequal numbers of residual blocks: not supported")
    starts = range(1, last + 1, blocks)
    widths = [shapes[f"input_blocks.{k}.0.in_layers.2.weight"][0] for k in starts]
    if any(width % base for width in widths):
        raise ValueError(f"its levels have {widths} channels, no whole multiples of the base of {base}: not supported")
    mult = tuple(width // base for width in widths)
    attention = tuple(level for level, k in enumerate(starts) if f"input_blocks.{k}.1.qkv.weight" in shapes)
    updown = not any(name.endswith(".op.weight") for name in shapes)
    scale_shift = shapes["middle_block.0.emb_layers.1.weight"][0] == 2 * widths[-1]
    published = PUBLISHED.get((kind, base, mult, blocks - 1, attention)) if updown and scale_shift else None
    size = None
    if kind == "classifier":
        size = math.isqrt(shapes["out.2.positional_embedding"][1] - 1) << (len(mult) - 1)
    settled = _settle(held, hidden._replace(image_size=size or hidden.image_size), published)

    fields = dict(
        num_classes=shapes["out.2.c_proj.weight"][0] if size else shapes.get("label_emb.weight", (0,))[0],
        base_channels=base,
        channel_mult=mult,
        num_res_blocks=blocks - 1,
        attention_resolutions=tuple(settled.image_size >> level for level in attention),
        head_channels=settled.head_channels,
        num_heads=settled.num_heads,
        resblock_updown=updown,
        scale_shift_norm=scale_shift,
        dropout=settled.dropout,
        time=f"adm_{settled.schedule}",
        dtype="float32",
        remat=False,
    )
    if kind == "diffusion":
        fields["out_channels"] = shapes["out.2.weight"][0]
    return Network(kind, fields, settled.image_size, settled.attention_order, settled.schedule)


def _settle(held: str, hidden: Hidden, published: Published | None) -> Published:
    """The flags where they are given, a published model's properties elsewhere."""
    heads = dict(head_channels=hidden.head_channels or 0, num_heads=hidden.num_heads or 0)
    if all(heads.values()):
        raise ValueError(
            "--head-channels and --num-heads are both given: give --head-channels alone, which ADM follows"
        )
    given = dict(hidden._asdict(), **(heads if any(heads.values()) else {}))
    if published:
        return published._replace(**{k: v for k, v in given.items() if v is not None and k in Published._fields})
    missing = [
        f"--{name.replace('_', '-')}" for name in ("image_size", "attention_order", "schedule") if given[name] is None
    ] + ([] if any(heads.values()) else ["--head-channels or --num-heads"])
    if missing:
        raise ValueError(
            f"this is {held}, of none of the published sizes, and its tensors do not show all of it: "
            f"give {', '.join(missing)}"
        )
    return Published(
        given["image_size"], **heads, **{k: given[k] for k in ("attention_order", "schedule")}, dropout=0.0
    )


def _levels(shapes: Shapes, hidden: Hidden) -> int:
    """The number of resolutions."""
    convolutions = sum(name.startswith("input_blocks.") and name.endswith(".op.weight") for name in shapes)
    if convolutions:
        return 1 + convolutions
    ups = sum(name.startswith("output_blocks.") and name.endswith("in_layers.0.weight") for name in shapes)
    if ups:  # an output block with a second residual block is the last of its level
        return ups - _last(shapes, "output_blocks.")
    return _classifier_levels(shapes, hidden)


def _classifier_levels(shapes: Shapes, hidden: Hidden) -> int:
    """A classifier's residual blocks that halve look like the others, but that they have no attention and no skip."""
    last = _last(shapes, "input_blocks.")
    width = [shapes[f"input_blocks.{k}.0.in_layers.2.weight"][0] for k in range(1, last + 1)]
    attention = [f"input_blocks.{k}.1.qkv.weight" in shapes for k in range(1, last + 1)]
    fitting = []
    for blocks in (b for b in range(2, last + 2) if (last + 1) % b == 0):
        halving = range(blocks - 1, last, blocks)
        levels = [slice(k, k + blocks - 1) for k in range(0, last, blocks)]
        uniform = all(len(set(zip(width[s], attention[s], strict=True))) == 1 for s in levels)
        if uniform and all(not attention[k] and width[k] == width[k - 1] for k in halving):
            fitting.append(blocks - 1)
    if hidden.num_res_blocks is not None:
        fitting = [n for n in fitting if n == hidden.num_res_blocks]
    if len(fitting) != 1:
        raise ValueError(f"its {last} input blocks fit {fitting} residual blocks a level: give --num-res-blocks")
    return (last + 1) // (fitting[0] + 1)


def _last(shapes: Shapes, part: str) -> int:
    """The highest number of a block."""
    numbers = [name.split(".")[1] for name in shapes if name.startswith(part)]
    return max(int(number) for number in numbers if number.isdecimal())


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
"""ADM's names for the layers of a block, and of the pooling."""

TENSORS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "position": "positional_embedding",
}


def adm_params(network: Network, state: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Any]:
    """Our parameters, float32, from ADM's state dict. Raises ValueError if one is missing, left over or misshapen."""
    module, size = network.module(), network.image_size
    z, one = jnp.zeros((1, size, size, state["input_blocks.0.0.weight"].shape[1])), jnp.zeros(1)
    arguments = (z, one, jnp.zeros(1, jnp.int32)) if network.kind == "diffusion" else (z, one)
    template: dict[str, Any] = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    blocks = _blocks(network)

    unused = set(state)
    params: dict[tuple[str, ...], Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(template):
        path = tuple(key.key for key in path)
        inner = "/".join(path[1:-1])
        layer = LAYERS.get(f"{path[0]}/{inner}", LAYERS.get(inner, inner))
        name = ".".join(part for part in (blocks[path[0]], layer, TENSORS[path[-1]]) if part)
        if name not in state:
            raise ValueError(f"no tensor {name!r}: the file is of another architecture than its other tensors say")
        unused.discard(name)
        legacy = network.attention_order == "legacy" and path[0] != "pool"
        x = _to_flax(name, state[name], path, leaf.shape)
        if legacy and path[-2] == "qkv":
            x = _heads_last(x, network.fields)
        params[path] = jnp.asarray(x)
    if unused:
        raise ValueError(f"{len(unused)} tensors have no place in the network, first {sorted(unused)[:3]}")
    return unflatten_dict(params)


def _to_flax(
    name: str, x: Shaped[np.ndarray, "..."], path: tuple[str, ...], shape: tuple[int, ...]
) -> Float[np.ndarray, "..."]:
    """[out, in, *space] as [*space, in, out]; a 1x1 convolution loses its space."""
    if path[-1] in ("kernel", "position"):
        x = x.transpose(*range(2, x.ndim), 1, 0)
    if x.shape[-len(shape) :] != shape or x.size != math.prod(shape):
        raise ValueError(f"tensor {name!r} has shape {x.shape} with its axes in our order; expected {shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"tensor {name!r} holds NaN or infinity: download the file again")
    return np.ascontiguousarray(x.reshape(shape), np.float32)


def _heads_last(x: Float[np.ndarray, "*rest c"], fields: dict[str, Any]) -> Float[np.ndarray, "*rest c"]:
    """The outputs of a qkv layer from legacy order, (heads, 3, channels), to ours: (3, heads, channels)."""
    heads = fields["num_heads"] or x.shape[-1] // (3 * fields["head_channels"])
    return np.moveaxis(x.reshape(*x.shape[:-1], heads, 3, -1), -3, -2).reshape(x.shape)


def _blocks(network: Network) -> dict[str, str]:
    """ADM's name of every block of ours."""
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
