"""Converts the weights of other programs into the formats of this package.

    python -m cfd.convert adm FILE OUT         a U-Net or noisy classifier of openai/guided-diffusion -> a run folder
    python -m cfd.convert inception FILE OUT   InceptionV3 of pytorch-fid or torch-fidelity -> an .npz of parameters
    python -m cfd.convert dinov2 FILE OUT      ViT-L/14 of facebookresearch/dinov2 -> an .npz of parameters

All need PyTorch, which nothing else in this package needs: `pip install "torch>=2.10"`.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from cfd.convert.adm import convert_adm
from cfd.convert.adm_network import Hidden
from cfd.convert.dinov2 import convert_dinov2
from cfd.convert.inception import convert_inception
from cfd.devices import output
from cfd.errors import UserError
from cfd.runs.access import check_writable


def count(text: str) -> int:
    """The integer >= 1 that a flag gives."""
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"it is {text!r}; give an integer >= 1 and < 2^31")
    return int(text)


def main(argv: Sequence[str]) -> None:
    """Runs the command line. An error that a user can correct is printed in a line; every other error is raised."""
    parser = argparse.ArgumentParser(prog="python -m cfd.convert", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    adm = commands.add_parser("adm", help="a U-Net or noisy classifier of openai/guided-diffusion")
    adm.add_argument("--kind", choices=("diffusion", "classifier"), help="refuse a file that holds the other kind")
    adm.add_argument("--keep-variance", action="store_true", help="keep the outputs of the learned variance")
    hidden = adm.add_argument_group(
        "properties that tensors do not show; needed for models other than the published ones"
    )
    hidden.add_argument("--image-size", type=count, help="height and width in pixels")
    hidden.add_argument("--head-channels", type=count, help="num_head_channels")
    hidden.add_argument("--num-heads", type=count, help="num_heads, if num_head_channels is not given")
    hidden.add_argument("--attention-order", choices=("new", "legacy"), help="new: with use_new_attention_order")
    hidden.add_argument("--schedule", choices=("cosine", "linear"), help="noise_schedule")
    hidden.add_argument("--num-res-blocks", type=count, help="residual blocks per level of a classifier")
    inception = commands.add_parser("inception", help="InceptionV3 of pytorch-fid or torch-fidelity")
    dinov2 = commands.add_parser("dinov2", help="ViT-L/14 of facebookresearch/dinov2")
    for command in (adm, inception, dinov2):
        command.add_argument("--key", help="the dict of tensors in a file that holds several, such as ema or model/ema")
        command.add_argument("FILE")
        command.add_argument("OUT")
    args = parser.parse_args(argv)
    with output.lasting(lambda _: None):  # the file is written although nobody reads the lines
        try:
            if not os.path.exists(args.OUT):  # one that exists is refused by name
                check_writable(args.OUT, "give another OUT")
            if args.command == "inception":
                convert_inception(args.FILE, args.OUT, key=args.key)
            elif args.command == "dinov2":
                convert_dinov2(args.FILE, args.OUT, key=args.key)
            else:
                flags = Hidden(*(getattr(args, name) for name in Hidden._fields))
                convert_adm(
                    args.FILE, args.OUT, kind=args.kind, hidden=flags, keep_variance=args.keep_variance, key=args.key
                )
        except UserError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
