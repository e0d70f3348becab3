"""The network of openai/guided-diffusion (ADM) whose state dict has given shapes, as a network of this package."""

import math
from collections.abc import Mapping
from itertools import count, islice
from typing import Any, NamedTuple

from cfd.convert.torch_file import ADM_CLASSIFIER, ADM_UNET, identify
from cfd.errors import UserError
from cfd.networks.classifier import Classifier
from cfd.networks.unet import UNet

Shapes = Mapping[str, tuple[int, ...]]
"""{name of a tensor: its shape}, for every tensor of a state dict."""


class Published(NamedTuple):
    """The properties of a published model that its tensors do not show.

    They are the flags in the README of openai/guided-diffusion.
    """

    image_size: int
    head_channels: int
    num_heads: int
    attention_order: str
    schedule: str
    dropout: float


PUBLISHED: dict[tuple[str, int, tuple[float, ...], int, tuple[int, ...]], Published] = {
    # kind, base channels, multipliers, residual blocks per level, levels with attention
    ("diffusion", 192, (1, 2, 3, 4), 3, (1, 2, 3)): Published(64, 64, 0, "new", "cosine", 0.1),
    ("diffusion", 256, (1, 1, 2, 3, 4), 2, (2, 3, 4)): Published(128, 0, 4, "legacy", "linear", 0.0),
    ("diffusion", 256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)): Published(256, 64, 0, "legacy", "linear", 0.0),
    ("diffusion", 256, (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6)): Published(512, 64, 0, "legacy", "linear", 0.0),
    ("classifier", 128, (1, 2, 3, 4), 4, (1, 2, 3)): Published(64, 64, 0, "legacy", "cosine", 0.0),
    ("classifier", 128, (1, 1, 2, 3, 4), 2, (2, 3, 4)): Published(128, 64, 0, "legacy", "linear", 0.0),
    ("classifier", 128, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)): Published(256, 64, 0, "legacy", "linear", 0.0),
    ("classifier", 128, (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6)): Published(512, 64, 0, "legacy", "linear", 0.0),
}


class Hidden(NamedTuple):
    """The properties that tensors do not show, as the user gives them in flags. None: the flag is absent."""

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
        network = UNet if self.kind == "diffusion" else Classifier
        return network(image_size=self.image_size, **self.fields)


def adm_network(shapes: Shapes, hidden: Hidden = Hidden()) -> Network:
    """The network whose state dict has these shapes. It guesses nothing.

    Tensors do not show the attention heads, the order of attention, the schedule and the image size. They come from
    `hidden`, or from the published model that has these shapes. Raises ValueError, with the flags to give, if neither
    gives one of them, and for anything but a U-Net or classifier of ADM.
    """
    found = identify(list(shapes))
    if found not in (ADM_UNET, ADM_CLASSIFIER):
        raise UserError(f"this is no network of ADM but {found}")
    try:
        return _infer(found, shapes, hidden)
    except (KeyError, IndexError) as e:
        raise UserError(f"this is {found} with a tensor missing or of another rank: {e}") from None


def _infer(found: str, shapes: Shapes, hidden: Hidden) -> Network:
    kind = "diffusion" if found == ADM_UNET else "classifier"
    if kind == "classifier" and "out.2.positional_embedding" not in shapes:
        raise UserError('this is a classifier of ADM without attention pooling; only pool="attention" is supported')
    if shapes["input_blocks.0.0.weight"][1] not in (1, 3):
        channels = shapes["input_blocks.0.0.weight"][1]
        raise UserError(f"its first convolution takes {channels} channels: ADM's upsamplers are not supported")

    base, last = shapes["time_embed.0.weight"][1], _last(shapes, "input_blocks.")
    if empty := _empty(shapes, "input_blocks."):
        raise UserError(
            f"its input blocks {empty} have no tensors: they halve the resolution without weights (conv_resample=False "
            "with resblock_updown=False), which is not supported"
        )
    levels = _levels(shapes, hidden)
    blocks, rest = divmod(last + 1, levels)  # per level: the residual blocks, and the block that halves the resolution
    if rest:
        raise UserError(f"this is {found} whose levels have unequal numbers of residual blocks: not supported")
    starts = range(1, last + 1, blocks)
    widths = [shapes[f"input_blocks.{k}.0.in_layers.2.weight"][0] for k in starts]
    if any(width % 32 for width in widths):
        raise UserError(f"its levels have {widths} channels, not all multiples of 32, ADM's number of norm groups")
    mult = tuple(width / base if width % base else width // base for width in widths)
    attention = tuple(level for level, k in enumerate(starts) if f"input_blocks.{k}.1.qkv.weight" in shapes)
    updown = not any(name.endswith(".op.weight") for name in shapes)
    scale_shift = shapes["middle_block.0.emb_layers.1.weight"][0] == 2 * widths[-1]
    published = PUBLISHED.get((kind, base, mult, blocks - 1, attention)) if updown and scale_shift else None
    size = None
    if kind == "classifier":
        places = shapes["out.2.positional_embedding"][1]
        if places < 2:
            raise UserError(f"its attention pooling has {places} places, and one of an image has 2 or more")
        size = math.isqrt(places - 1) << (len(mult) - 1)
    settled = _settle(found, hidden._replace(image_size=size or hidden.image_size), published)

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
        channels, outputs = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
        if outputs not in (channels, 2 * channels):
            raise UserError(
                f"its last convolution has {outputs} outputs for images of {channels} channels, and ADM's has as many, "
                "or twice as many with a learned variance: give a checkpoint of openai/guided-diffusion"
            )
        fields["out_channels"] = outputs
    return Network(kind, fields, settled.image_size, settled.attention_order, settled.schedule)


def _settle(found: str, hidden: Hidden, published: Published | None) -> Published:
    """The properties that the flags give; the published model gives the others."""
    heads = dict(head_channels=hidden.head_channels or 0, num_heads=hidden.num_heads or 0)
    if all(heads.values()):
        raise UserError(
            "--head-channels and --num-heads are both given: give --head-channels alone, because ADM ignores the "
            "number of heads if both are given"
        )
    given = dict(hidden._asdict(), **(heads if any(heads.values()) else {}))
    if published:
        return published._replace(**{k: v for k, v in given.items() if v is not None and k in Published._fields})
    missing = [
        f"--{name.replace('_', '-')}" for name in ("image_size", "attention_order", "schedule") if given[name] is None
    ] + ([] if any(heads.values()) else ["--head-channels or --num-heads"])
    if missing:
        raise UserError(
            f"this is {found}, of none of the published sizes, and its tensors do not show all of its properties: "
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
    if ups:  # an output block with a second residual block, which doubles the resolution, is the last of its level
        return ups - _last(shapes, "output_blocks.")
    return _classifier_levels(shapes, hidden)


def _classifier_levels(shapes: Shapes, hidden: Hidden) -> int:
    """The number of resolutions of a classifier whose residual blocks halve the resolution.

    Such blocks look like the other residual blocks, except that they have neither attention nor a skip convolution.
    """
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
        raise UserError(f"its {last} input blocks fit {fitting} residual blocks per level: give --num-res-blocks")
    return (last + 1) // (fitting[0] + 1)


def _numbers(shapes: Shapes, part: str) -> set[int]:
    """The block numbers in the names that begin with `part`."""
    numbers = {name.split(".")[1] for name in shapes if name.startswith(part)}
    return {int(number) for number in numbers if number.isdecimal() and number.isascii() and len(number) < 10}


def _last(shapes: Shapes, part: str) -> int:
    """The highest block number in the names that begin with `part`."""
    return max(_numbers(shapes, part))


def _empty(shapes: Shapes, part: str) -> list[int]:
    """The first block numbers, at most 8, that the names lack."""
    numbers = _numbers(shapes, part)
    return list(islice((k for k in count() if k not in numbers), min(max(numbers) + 1 - len(numbers), 8)))
