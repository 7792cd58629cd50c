"""The command line: ``fastseg COMMAND``, also ``python -m fastseg COMMAND``."""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastseg import __version__
from fastseg.cli import demo, doctor, evaluate, latency, predict, train, tune

# Each has add_arguments(parser) and run(args) -> exit status; the first line of its docstring is its help.
COMMANDS = {
    "demo": demo,
    "doctor": doctor,
    "evaluate": evaluate,
    "latency": latency,
    "predict": predict,
    "train": train,
    "tune": tune,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage first."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None takes the process's own.

    Returns:
        The exit status: 0, or 1 after one line on stderr that says what is wrong; 143 of ``train`` after SIGTERM. Wrong
        usage exits with 2.
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
        if status == train.PREEMPTED and argv is None:  # the process ends: a launcher's second one comes too late
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return status
    except (ValueError, OSError, ImportError) as error:  # bad input; anything else is our fault and keeps its traceback
        print(f"fastseg {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"fastseg {args.command}: interrupted", file=sys.stderr)
    return 1
