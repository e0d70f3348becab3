"""A checkpoint of openai/guided-diffusion (ADM) as a run folder."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cfd.convert.adm_network import Hidden, Network, adm_network
from cfd.convert.adm_weights import adm_params
from cfd.convert.torch_file import read_torch
from cfd.errors import UserError
from cfd.networks.times import logsnr_table
from cfd.runs import access, checkpoint, files, workdir


class Imported(NamedTuple):
    """The state of an imported run: the weights to sample with, which ADM's training averaged, and no optimizer."""

    step: Array
    ema: Any


def convert_adm(
    path: str | Path,
    out: str | Path,
    *,
    kind: str | None = None,
    hidden: Hidden = Hidden(),
    keep_variance: bool = False,
    key: str | None = None,
) -> Network:
    """Writes a checkpoint of openai/guided-diffusion as a run folder, which `load` or `load_classifier` opens.

    A network with a learned variance has twice as many outputs as channels. Their second half is dropped unless
    `keep_variance`. If it is kept, `load(..., variance=True).eps_fn` gives both halves, and without it the first alone.
    `key` is as for `read_torch`. Each stage is printed in a line. Returns the network. Raises ValueError for any other
    file, and if `out` exists.
    """
    if files.exists(out) or files.names(out):
        raise UserError(f"{out} exists: give the name of a folder to make")
    print(f"Reading {path}.", flush=True)
    state = read_torch(path, key)
    try:
        network = adm_network({name: x.shape for name, x in state.items()}, hidden)
        if kind not in (None, network.kind):
            raise UserError(f"this is a {network.kind} network of ADM; --kind asks for a {kind} network")
        print(f"Converting {len(state)} tensors, {sum(x.nbytes for x in state.values()) / 1e9:.2f} GB.", flush=True)
        params = adm_params(network, state)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    count = sum(x.size for x in jax.tree.leaves(params))
    size, heads = network.image_size, network.fields["num_heads"] or f"channels / {network.fields['head_channels']}"
    print(f"{path}: ADM {network.kind} network for {size}x{size} images, {count:,} parameters.")
    print(f"Its tensors do not show these properties, which come from the flags or the published model: {heads} heads,")
    print(f"{network.attention_order} attention order, {network.schedule} schedule.")

    channels = int(state["input_blocks.0.0.weight"].shape[1])
    if network.fields.get("out_channels") == 2 * channels:
        if keep_variance:
            print(f"Kept the learned variance: outputs {channels} to {2 * channels - 1}, for load(..., variance=True).")
        else:
            network.fields["out_channels"] = channels
            params["conv_out"] = jax.tree.map(lambda x: x[..., :channels], params["conv_out"])
            print(f"Dropped the learned variance: outputs {channels} to {2 * channels - 1} (--keep-variance keeps it).")
    if network.kind == "diffusion" and network.fields["num_classes"]:
        print("It was always trained with a class, and has no null label: sample it with w = 0 or with a classifier.")
    print(f"Saving {out}.", flush=True)
    _write_run(out, network, params, channels)
    if network.kind == "diffusion":
        folder = str(out) if "/" in str(out) else f"./{out}"
        print(f"Wrote {out}; open it with cfd.loading.load({str(out)!r}), or sample it with", flush=True)
        print(f'    python -m cfd.main --config={folder} --mode=sample --config.sample.w="(0.0,)"', flush=True)
    else:
        print(f"Wrote {out}; open it with cfd.loading.load_classifier({str(out)!r}). In the folder", flush=True)
        print("`classifier` of a run, it guides that run with --config.sample.guidance=classifier.", flush=True)
    return network


def _write_run(out: str | Path, network: Network, params: dict[str, Any], channels: int) -> None:
    num_classes = network.fields["num_classes"]
    table = logsnr_table(network.schedule)
    groups = {
        "data": dict(source="adm", name="", image_size=network.image_size, channels=channels, num_classes=num_classes),
        "model" if network.kind == "diffusion" else "classifier": network.fields,
        "process": dict(logsnr_min=float(table[-1]), logsnr_max=float(table[0])),
        "train": dict(p_uncond=0.0),
    }
    config = {name: dict(sorted(fields.items())) for name, fields in sorted(groups.items())}
    content = workdir.describe(network.kind, config, [str(label) for label in range(num_classes)])
    with access.lock(out):
        workdir.write_config(out, content, {})
        manager = checkpoint.open_manager(out, keep=1)
        state = Imported(jnp.zeros((), jnp.int32), params)
        checkpoint.save(manager, 0, state, data_state={}, config_json=content)
        checkpoint.close(manager)
