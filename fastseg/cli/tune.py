"""Search launch configurations on the GPU at hand and write the table that launches then use."""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastseg.cli.common import pixels, positive_float, positive_int, say
from fastseg.io.files import make_folder
from fastseg.io.progress import progress
from fastseg.models import create, names
from fastseg.ops.core.dispatch import HAS_TRITON

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="tune the kernels whose names begin so (default: all)")
    parser.add_argument("--model", default="deeplabv3plus", choices=names(), help="tune what this model launches")
    parser.add_argument("--classes", type=positive_int, default=21)
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 16], metavar="N", help="images per batch")
    parser.add_argument(
        "--size", type=positive_int, nargs=2, default=[512, 512], metavar=("H", "W"), help="image size in pixels"
    )
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="autocast dtype; fp32 is without autocast")
    parser.add_argument("--train", action="store_true", help="tune a training step as well")
    parser.add_argument(
        "--budget", type=positive_float, default=600, metavar="SECONDS", help="begin nothing after this time"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: ~/.cache/fastseg/tuned")


def run(options: argparse.Namespace) -> int:
    """Tune; return 0 if a table was written, 1 if nothing was tuned.

    Raises:
        ValueError: there is no GPU, or no such kernel.
        OSError: the table cannot be written.
    """
    pixels("--size", options.size)
    if not HAS_TRITON or not torch.cuda.is_available():
        raise ValueError("needs Triton and a CUDA device; kernels are not tuned on a CPU")
    from fastseg.kernels.runtime import config

    unknown = [op for op in options.ops if not any(kernel.startswith(op) for kernel in config.kernels())]
    if unknown:
        raise ValueError(f"no kernel begins with {unknown[0]!r}; there are {', '.join(config.kernels())}")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = config.gpu_name(device.index)
    return tune_steps(
        _steps(options, device), (options.output or config.USER) / f"{gpu}.json", options.ops, options.budget
    )


def tune_steps(
    steps: Sequence[Callable[[], object]], path: Path, ops: Sequence[str], seconds: float, **search: object
) -> int:
    """Tune the kernels that the steps launch.

    Args:
        steps: forwards or training steps of models.
        path: ``<folder>/<gpu>.json``; the folder is made.
        ops: prefixes of kernel names; empty means all.
        seconds: start no search after this time.
        search: options of ``kernels.tools.tune.search``.

    Returns:
        The command's exit status.
    """
    from fastseg.kernels.tools import tune
    from fastseg.kernels.tools import watch as observe

    make_folder(path.parent, (path.name,))
    calls = [call for step in steps for call in observe.op_calls(step)]
    rows = observe.rows_of(calls, lambda kernel: not ops or kernel.startswith(tuple(ops)))
    bar = progress(rows, "tune", unit="row")
    note = functools.partial(_note, bar.write, path)
    deadline, left = time.monotonic() + seconds, []
    for row in bar:
        left += tune.tune([row], note, seconds=deadline - time.monotonic(), **search)
    if left:
        print(f"no time was left for {len(left)} of {len(rows)} rows; a larger --budget, or OP, tunes them")
    if len(left) == len(rows):
        print("fastseg tune: nothing was tuned", file=sys.stderr)
        return 1
    say(f"wrote {path}")
    return 0


def _steps(options: argparse.Namespace, device: torch.device) -> list[Callable[[], object]]:
    """The forwards, and with ``--train`` the training steps, whose launches are tuned."""
    torch.manual_seed(0)
    model = create(options.model, options.classes).to(device, memory_format=torch.channels_last)

    def step(batch: int, train: bool) -> Tensor:
        x = torch.randn(batch, 3, *options.size, device=device).to(memory_format=torch.channels_last)
        dtype = DTYPES[options.dtype]
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(train):
            out = model.train(train)(x)
        if train:
            out.float().square().mean().backward()
        return out

    trains = (False, True) if options.train else (False,)
    return [functools.partial(step, batch, train) for train in trains for batch in options.batch]


def _note(show: Callable[[str], None], path: Path, row, trials) -> None:
    """Write and print what the search of one row found."""
    from fastseg.kernels.tools import tune

    chosen = tune.best(trials)
    if chosen is None:
        show(f"{row}: none of {len(trials)} candidates ran: {trials[0].note}")
        return
    tune.write_table(path, tune.entry(row, chosen), gpu=path.stem)
    first = trials[0].us
    gain = f"{first / chosen.us:.2f} x the heuristic" if first is not None else "the heuristic does not run"
    show(f"{row}: {chosen.us:.1f} us, {gain}, {len(trials)} tried")
