"""The command line: ``fastseg COMMAND``, also ``python -m fastseg COMMAND``."""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from fastseg import __version__
from fastseg.cli import checkpoint, demo, doctor, evaluate, export, latency, predict, train, tune, warmup
from fastseg.cli.common import say
from fastseg.io.files import first_line

# Each has add_arguments(parser) and run(args) -> exit status; the first line of its docstring is its help text.
COMMANDS = {
    "checkpoint": checkpoint,
    "demo": demo,
    "doctor": doctor,
    "evaluate": evaluate,
    "export": export,
    "latency": latency,
    "predict": predict,
    "train": train,
    "tune": tune,
    "warmup": warmup,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line; argparse would print the usage first."""
        say(f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)", sys.stderr)
        self.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None means the process's own.

    Returns:
        The exit status: 0, or 1 after one line on stderr that says what is wrong. For ``train``, 143 after SIGTERM and
        130 after Ctrl-C. Wrong usage exits with 2.
    """
    parser = _Parser(prog="fastseg", description="Semantic segmentation with fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"fastseg {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        module.add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(argv)
    try:
        status = COMMANDS[args.command].run(args)
        if status in train.STOPPED and argv is None:  # the process ends: a launcher's second signal comes too late
            for number in train.STOPPED.values():
                signal.signal(number, signal.SIG_IGN)
        return status
    except (ValueError, OSError, ImportError) as error:  # bad input; anything else is our fault and keeps its traceback
        say(f"fastseg {args.command}: {' '.join(str(error).split())}", sys.stderr)
    except (MemoryError, torch.OutOfMemoryError) as error:
        say(f"fastseg {args.command}: {first_line(error)}; out of memory", sys.stderr)
    except torch.AcceleratorError as error:
        say(f"fastseg {args.command}: {first_line(error)}; the device takes no more work, start again", sys.stderr)
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # how torch says on a CPU that memory is out
            raise
        say(f"fastseg {args.command}: {first_line(error)}", sys.stderr)
    except KeyboardInterrupt:
        say(f"fastseg {args.command}: interrupted", sys.stderr)
    return 1
