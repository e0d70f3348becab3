"""The other side of the benchmark: openai/guided-diffusion in PyTorch, as its authors published it."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from jaxtyping import Float32, Int32

from cfd.benchmark.side import IMAGE_SIZE, NETWORKS, PEER_ROW, WEIGHTS, Built, Setting, common_input

NAMES = {
    "num_classes": "num_classes",
    "out_channels": "out_channels",
    "base_channels": "model_channels",
    "channel_mult": "channel_mult",
    "num_res_blocks": "num_res_blocks",
    "head_channels": "num_head_channels",
    "resblock_updown": "resblock_updown",
    "scale_shift_norm": "use_scale_shift_norm",
    "dropout": "dropout",
}
"""{field of our UNet: the argument of the peer's UNetModel}."""


def peer_side(setting: Setting) -> Built:
    """The rows of the peer that `setting` needs. Writes the peer's tensors to the file WEIGHTS, for the other side."""
    print("Building the peer.", flush=True)
    wanted = {PEER_ROW[row] for row in setting.rows if row in PEER_ROW}
    net = network(setting.peer, NETWORKS[setting.network], IMAGE_SIZE[setting.network], setting.remat)
    arrays: dict[str, Any] = {name: x.numpy() for name, x in net.state_dict().items()}
    np.savez(os.path.join(setting.folder, WEIGHTS), **arrays)
    available, output = rows(net, *common_input(setting), setting.dtype, "train" in wanted)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts = {"torch": torch.__version__, "device": device}
    return Built({name: available[name] for name in wanted}, wait, output, facts, dict)


def network(checkout: str, fields: dict[str, Any], image_size: int, remat: bool) -> Any:
    """The peer's UNetModel with the fields of our UNet and random weights, none of which is zero."""
    sys.path.insert(0, checkout)
    from guided_diffusion.unet import UNetModel  # pyright: ignore[reportMissingImports]

    net = UNetModel(
        image_size=image_size,
        in_channels=3,
        attention_resolutions=tuple(image_size // r for r in fields["attention_resolutions"]),
        use_new_attention_order=True,
        use_checkpoint=remat,
        **{theirs: fields[ours] for ours, theirs in NAMES.items()},
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p + 0.1 * torch.randn_like(p) if p.ndim == 1 else 0.5 * torch.randn_like(p) / p[0].numel() ** 0.5)
    return net


def wait(_: Any) -> None:
    """Waits until the device has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rows(
    net: Any,
    z: Float32[np.ndarray, "b h w c"],
    t: Float32[np.ndarray, "b"],
    labels: Int32[np.ndarray, "b"],
    dtype: str,
    keep_ema: bool,
) -> tuple[dict[str, Callable[[], Any]], Float32[np.ndarray, "b h w k"]]:
    """The functions to time, and the output on the common input. They run on CUDA if PyTorch has it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = net.to(device)
    mixed = torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    x = torch.from_numpy(z).to(device).permute(0, 3, 1, 2).contiguous()
    time, classes = torch.from_numpy(t).to(device), torch.from_numpy(labels).long().to(device)
    ema = [p.detach().clone() for p in net.parameters()] if keep_ema else []
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0)

    def forward() -> Any:
        with torch.no_grad(), mixed:
            return net(x, time, classes)

    def gradient() -> None:
        optimizer.zero_grad()
        eps, signal = torch.randn_like(x), torch.rand(len(x), 1, 1, 1, device=device)
        with mixed:
            out = net(signal.sqrt() * x + (1 - signal).sqrt() * eps, time, classes)[:, :3]
        (out - eps).square().mean().backward()

    def train() -> None:
        gradient()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for e, p in zip(ema, net.parameters(), strict=True):
                e.lerp_(p, 1e-4)

    def guided() -> Any:
        with torch.no_grad(), mixed:
            both = net(torch.cat([x, x]), torch.cat([time, time]), torch.cat([classes, classes.roll(1)]))[:, :3]
            eps = 2.0 * both[: len(x)] - both[len(x) :]
            denoised = (x - 0.6 * eps).clamp(-1, 1)
            return 0.5 * x + 0.5 * denoised + 0.1 * torch.randn_like(x)

    output = forward().float().permute(0, 2, 3, 1).cpu().numpy()
    return {"forward": forward, "gradient": gradient, "train": train, "guided": guided}, output
