"""Train a small model on texture mosaics of real photographs, score it, and time it against eager PyTorch."""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image

from fastseg.cli.common import add_device, add_loss, describe, positive_int, say, seed
from fastseg.demo import training
from fastseg.demo.latency import latency
from fastseg.demo.mosaic import CLASSES, halves, load_photographs
from fastseg.demo.training import Mosaics
from fastseg.io.checkpoint import save_checkpoint
from fastseg.io.files import make_folder
from fastseg.io.images import class_map, figure, write_png
from fastseg.models import create, names

FILES = ("mosaics.png", "mosaic.png", "weights.pt")
TEST_MOSAICS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", choices=names(), default="deeplabv3plus", help="default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="of mosaics, weights and training (default: %(default)s)")
    parser.add_argument(
        "--steps", type=positive_int, default=training.STEPS, help="training steps (default: %(default)s)"
    )
    add_loss(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), metavar="DIR", help="default: %(default)s")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Train, score, draw and time; 0, or ``ValueError`` where the training diverged."""
    start = time.perf_counter()
    make_folder(args.output, FILES)
    train_textures, test_textures = halves(load_photographs())
    print(f"{args.model}, loss {args.loss}, on {describe(args.device)}")
    print(f"CC0 photographs from scikit-image: {', '.join(CLASSES)}")

    torch.manual_seed(args.seed)
    options = training.OPTIONS.get(args.model, {})
    model = create(args.model, len(CLASSES), **options).to(args.device, memory_format=torch.channels_last)
    test = Mosaics(test_textures, TEST_MOSAICS, training.SIDE, (args.seed, 1), "test")
    sizes = (args.steps, args.seed, training.BATCH, training.SIDE)
    training.train(args.model, model, train_textures, test, *sizes, loss=args.loss)

    pictures, labels = test.arrays()
    predicted = training.predictions(model, pictures)
    print(f"\n{TEST_MOSAICS} mosaics of the photographs' right halves, of which training saw the left halves:")
    print(training.score_table(training.score(predicted, labels)))

    rows = [
        (Image.fromarray(picture), class_map(truth, len(CLASSES)), class_map(guess, len(CLASSES)))
        for picture, truth, guess in zip(pictures[:4], labels[:4], predicted[:4], strict=True)
    ]
    write_png(args.output / "mosaics.png", figure(rows, ("photograph", "truth", "prediction"), CLASSES))
    write_png(args.output / "mosaic.png", rows[0][0])
    save_checkpoint(args.output / "weights.pt", model, args.model, options, CLASSES)
    say(f"\nlook at {args.output / 'mosaics.png'}; to segment a picture with these weights:")
    say(f"  fastseg predict {args.output / 'mosaic.png'} --weights {args.output / 'weights.pt'} -o {args.output}\n")
    print(latency(args.model, model, args.device, describe))
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    return 0
