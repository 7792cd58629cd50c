"""Write a model as a file that runs without fastseg: FILE.onnx, or FILE.pt2, a package of AOTInductor."""

import argparse
from pathlib import Path

import torch

from fastseg.cli.common import add_device, pixels, positive_int, say
from fastseg.cli.weights import add_weights, read_weights
from fastseg.exporting import OUTPUTS, Preprocessing, export
from fastseg.exporting.export import checked_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="what to write: .onnx or .pt2")
    add_weights(parser)
    add("--classes", type=positive_int, metavar="N", help="classes (default: what the weights say)")
    add("--output", choices=OUTPUTS, default="classes", help="what the file gives (default: %(default)s)")
    add("--batch", type=positive_int, default=1, metavar="N", help="of the example (default: %(default)s)")
    add("--size", type=positive_int, nargs=2, default=[512, 512], metavar=("H", "W"),
        help="of the example in pixels, and of the file where the model fixes it (default: 512 512)")  # fmt: skip
    add(
        "--resize", type=positive_int, nargs=2, metavar=("H", "W"), help="record that pictures are brought to this size"
    )
    add("--mean", type=float, nargs="+", metavar="X", help="of the channels, recorded (default: ImageNet's)")
    add("--std", type=float, nargs="+", metavar="X", help="of the channels, recorded (default: ImageNet's)")
    add("--apply", action="store_true", help="put resize, mean and std into the file: it takes (N, H, W, C) uint8")
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="compare with torch (default: yes)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Export; return 0. What does not fit raises ``ValueError``, ``TypeError`` is said as one."""
    checked_path(args.file)
    size = pixels("--size", args.size)
    plain = Preprocessing()
    preprocessing = Preprocessing(
        pixels("--resize", args.resize), tuple(args.mean or plain.mean), tuple(args.std or plain.std), args.apply
    )
    model, names = read_weights(args, args.classes, random=True)
    example = torch.randn((args.batch, len(preprocessing.mean), *(size or (512, 512))), device=args.device)
    try:
        exported = export(
            model.to(args.device), args.file, example=example, output=args.output, preprocessing=preprocessing,
            classes=names, check=args.check,
        )  # fmt: skip
    except TypeError as error:
        raise ValueError(str(error)) from error
    say(str(exported))
    return 0
