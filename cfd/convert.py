"""Weights of other programs, read safely and written as ours.

    python -m cfd.convert adm FILE OUT         a U-Net or noisy classifier of openai/guided-diffusion -> a run folder
    python -m cfd.convert inception FILE OUT   pytorch-fid's or torch-fidelity's InceptionV3 -> an .npz of parameters

Both need PyTorch, which nothing else here does: `pip install "cfd[convert]"`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from cfd import checkpoint, config, inception, workdir
from cfd.adm import logsnr_table
from cfd.adm_import import Hidden, Network, adm_network, adm_params
from cfd.torch_file import holds, read_torch


class Imported(NamedTuple):
    """The state of an imported run: weights to sample with, which were an EMA, and no optimizer."""

    step: Array
    ema: Any


def convert_adm(
    path: str | Path,
    out: str | Path,
    *,
    kind: str | None = None,
    hidden: Hidden = Hidden(),
    keep_variance: bool = False,
) -> Network:
    """A checkpoint of openai/guided-diffusion as a run folder that `checkpoint.load` or `load_classifier` opens.

    The second half of the outputs of a network with a learned variance is dropped unless `keep_variance`; kept, it is
    in the parameters and `load(...).eps_fn` still gives the first half alone. What is done is printed, a line each.
    Raises ValueError on any other file, and if `out` exists.
    """
    if Path(out).exists():
        raise ValueError(f"{out} exists: give the name of a folder to make")
    state = read_torch(path)
    try:
        network = adm_network({name: x.shape for name, x in state.items()}, hidden)
        if kind not in (None, network.kind):
            raise ValueError(f"this is a {network.kind} network of ADM; --kind asks for a {kind} network")
        params = adm_params(network, state)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    count = sum(x.size for x in jax.tree.leaves(params))
    size, heads = network.image_size, network.fields["num_heads"] or f"channels / {network.fields['head_channels']}"
    print(f"{path}: ADM {network.kind} network for {size}x{size}, {count:,} parameters. Not shown by its tensors and")
    print(f"taken from the flags or the published model: {heads} heads in {network.attention_order} order,")
    print(f"{network.schedule} schedule.")

    channels = int(state["input_blocks.0.0.weight"].shape[1])
    if network.fields.get("out_channels") == 2 * channels:
        if keep_variance:
            print(f"Kept the learned variance: outputs {channels} to {2 * channels - 1}; eps_fn returns the others.")
        else:
            network.fields["out_channels"] = channels
            params["conv_out"] = jax.tree.map(lambda x: x[..., :channels], params["conv_out"])
            print(f"Dropped the learned variance: outputs {channels} to {2 * channels - 1} (--keep-variance keeps it).")
    if network.kind == "diffusion" and network.fields["num_classes"]:
        print("It was always trained with a class: there is no null label, so sample it with w = 0 or a classifier.")
    _write_run(out, network, params, channels)
    opened_by = "cfd.checkpoint.load" if network.kind == "diffusion" else "cfd.classifier.load_classifier"
    print(f"Wrote {out}; open it with {opened_by}({str(out)!r}).")
    return network


def _write_run(out: str | Path, network: Network, params: dict[str, Any], channels: int) -> None:
    num_classes = network.fields["num_classes"]
    table = logsnr_table(network.schedule)
    content = config.describe(
        network.kind,
        ConfigDict(
            {
                "data": dict(
                    source="adm", name="", image_size=network.image_size, channels=channels, num_classes=num_classes
                ),
                "model" if network.kind == "diffusion" else "classifier": network.fields,
                "process": dict(logsnr_min=float(table[-1]), logsnr_max=float(table[0])),
                "train": dict(p_uncond=0.0),
            }
        ),
        [str(label) for label in range(num_classes)],
    )
    with workdir.lock(out):
        workdir.write_config(out, content)
        manager = checkpoint.open_manager(out, keep=1)
        state = Imported(jnp.zeros((), jnp.int32), params)
        checkpoint.save(manager, 0, state, data_state={}, config_json=content)
        checkpoint.close(manager)


def convert_inception(path: str | Path, out: str | Path) -> None:
    """InceptionV3's weights as the `.npz` that `eval.inception_path` names.

    Raises ValueError on any other file, and if `out` exists.
    """
    if Path(out).exists():
        raise ValueError(f"{out} exists: give the name of a file to make")
    state = read_torch(path)
    if not holds(list(state)).startswith("InceptionV3"):
        raise ValueError(f"{path} does not hold InceptionV3 but {holds(list(state))}")
    inception.save_params(out, inception.inception_params_from_torch(state))
    print(f"Wrote {out}.")


def main(argv: Sequence[str]) -> None:
    """The command line. What is wrong with a file is said in one line."""
    parser = argparse.ArgumentParser(prog="python -m cfd.convert", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    adm = commands.add_parser("adm", help="a U-Net or noisy classifier of openai/guided-diffusion")
    adm.add_argument("--kind", choices=("diffusion", "classifier"), help="refuse a file that holds the other")
    adm.add_argument("--keep-variance", action="store_true", help="keep the outputs of the learned variance")
    shown = adm.add_argument_group("what tensors do not show; needed for models other than the published ones")
    shown.add_argument("--image-size", type=int)
    shown.add_argument("--head-channels", type=int)
    shown.add_argument("--num-heads", type=int)
    shown.add_argument("--attention-order", choices=("new", "legacy"), help="use_new_attention_order or not")
    shown.add_argument("--schedule", choices=("cosine", "linear"), help="noise_schedule")
    shown.add_argument("--num-res-blocks", type=int)
    inception_parser = commands.add_parser("inception", help="pytorch-fid's or torch-fidelity's InceptionV3")
    for command in (adm, inception_parser):
        command.add_argument("FILE")
        command.add_argument("OUT")
    args = parser.parse_args(argv)
    try:
        if args.command == "inception":
            convert_inception(args.FILE, args.OUT)
        else:
            hidden = Hidden(*(getattr(args, name) for name in Hidden._fields))
            convert_adm(args.FILE, args.OUT, kind=args.kind, hidden=hidden, keep_variance=args.keep_variance)
    except (ValueError, OSError, ModuleNotFoundError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
