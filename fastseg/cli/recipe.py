"""What ``fastseg train`` takes from a recipe and from a data set's layout, and its deep supervision."""

import argparse
import math
import sys

from torch import nn

from fastseg.cli.common import positive_int
from fastseg.models import DeepSupervision, UNetPlusPlus
from fastseg.training.dataset import FolderDataset
from fastseg.training.layouts import LAYOUTS, open_dataset
from fastseg.training.recipe import UNTRIED, read_recipe, recipes


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add ``--recipe`` and its arguments; the settings of a recipe become the defaults of all other arguments."""
    add = parser.add_argument
    add("--recipe", choices=recipes(), help="an article's settings, in place of the defaults of what is not given")
    add_layout(parser)
    add("--train-split", default="train", metavar="NAME", help="pictures to learn from (default: %(default)s)")
    add("--iterations", type=positive_int, metavar="N", help="as many epochs as have N steps, in place of --epochs")
    add("--deep-supervision", choices=("constant", "fading"),
        help="losses of auxiliary heads, UNet++'s own or those of --supervise: as they are, or fading out")  # fmt: skip
    add("--supervise", action="append", metavar="NAME", type=_place,
        help="a head at this submodule, or at the depth of this number; again for more")  # fmt: skip
    parse = parser.parse_known_args

    def with_recipe(args=None, namespace=None):
        before = argparse.ArgumentParser(add_help=False, exit_on_error=False)
        before.add_argument("--recipe")
        try:
            found = before.parse_known_args(args)[0].recipe
        except argparse.ArgumentError:
            found = None  # without a value: the parser itself will report it
        if found in recipes():
            settings = read_recipe(found)[1]
            settings["option"] = list(settings.pop("options").items())
            if "iterations" in settings and _gives_epochs(args):
                del settings["iterations"]
            parser.set_defaults(**settings)
            for action in parser._actions:
                action.required = action.required and action.dest not in settings
        return parse(args, namespace)

    parser.parse_known_args = with_recipe


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Add ``--layout``."""
    parser.add_argument("--layout", choices=LAYOUTS, default="folders", help="of --data (default: %(default)s)")


def _gives_epochs(args: list[str] | None) -> bool:
    return any(part == "--epochs" or part.startswith("--epochs=") for part in (sys.argv if args is None else args))


def _place(text: str) -> str | int:
    return int(text) if text.lstrip("-").isdecimal() else text


def open_splits(args: argparse.Namespace) -> list[FolderDataset]:
    """Open the pictures to train on and those to score; ``args.epochs`` follows from ``--iterations``."""
    splits = [open_dataset(args.layout, args.data, split, args.dataset) for split in (args.train_split, "val")]
    if args.iterations is not None:
        args.epochs = math.ceil(args.iterations / max(1, len(splits[0]) // args.batch))
    return splits


def introduce(args: argparse.Namespace) -> str | None:
    """Print a line about the recipe."""
    if args.recipe is None:
        return None
    about, _ = read_recipe(args.recipe)
    return f"{args.recipe}: after {about['source']}; differs: {about['differs']}; {UNTRIED}"


def model_options(args: argparse.Namespace) -> list[tuple[str, object]]:
    """The values of ``--option``, which override a recipe's; with ``--deep-supervision`` UNet++ gets its heads."""
    pairs = list(args.option) if args.recipe is None else list(dict(args.option).items())
    heads = args.deep_supervision and args.model == "unetplusplus" and not args.supervise
    return [*pairs, ("deep_supervision", True)] if heads and "deep_supervision" not in dict(pairs) else pairs


def supervised(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model with the heads that are asked for; ``args.deep_supervision`` becomes "constant" if only they are.

    Raises:
        ValueError: weights of heads are given, and there are no heads.
    """
    if args.supervise:
        args.deep_supervision = args.deep_supervision or "constant"
        return DeepSupervision(model, args.supervise)
    if args.deep_supervision and not (isinstance(model, UNetPlusPlus) and model.deep_supervision):
        hint = "leave deep_supervision=false out" if isinstance(model, UNetPlusPlus) else "give --supervise"
        asked = f"--deep-supervision {args.deep_supervision}"
        raise ValueError(f"{asked}: {args.model} has no auxiliary heads; {hint}")
    return model
