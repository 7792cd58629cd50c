"""Say what this machine has, and which path each op takes on it, and why."""

import argparse
import importlib.metadata
import platform
import re
import warnings
from collections.abc import Callable, Iterator

import torch

import fastseg
from fastseg import ops
from fastseg.cli.common import say
from fastseg.io.files import first_line, printable
from fastseg.losses import Dice
from fastseg.measure.comparison import op_cases
from fastseg.ops.core.dispatch import HAS_TRITON, INTERPRETED
from fastseg.ops.core.explain import Report

DISTRIBUTION = "fastseg-kernels"
# First and last version that the project supports; None: any newer one should do.
VERSIONS = {
    "python": ((3, 11), None),
    "torch": ((2, 11), (2, 15)),
    "triton": ((3, 6), (3, 9)),
    "numpy": ((1, 26), None),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    problems: list[str] = []
    print(f"fastseg {fastseg.__version__} on {platform.platform()}\n\nVersions")
    for name in VERSIONS:
        line, inside = version_line(name)
        say(f"  {name:<8}{printable(line)}")
        if not inside:
            problems.append(f"{name} {line}")
    interpreter = interpreter_line()
    if interpreter:
        print(f"  note: {interpreter}")
        problems += [interpreter] * INTERPRETED
    others = clashing_distributions()
    if others:
        problems.append(f"{', '.join(others)} also installs the package `fastseg`: pip uninstall {' '.join(others)}")
    print("\nDevices")
    for line in device_lines():
        say(f"  {printable(line)}")
    print("\nTuned tables")
    for line in table_lines():
        say(f"  {printable(line)}")
    for device, dtype in probes():
        print(f"\nPaths on {device}, {str(dtype).removeprefix('torch.')}")
        report, failures = explain_ops(device, dtype)
        print("\n".join(f"  {line}" for line in dict.fromkeys(str(report).splitlines())))
        problems += failures
    print()
    for problem in problems:
        say(f"PROBLEM: {printable(problem)}")
    print(f"{len(problems)} problem{'s' * (len(problems) != 1)} found")
    return 1 if problems else 0


def version_line(name: str) -> tuple[str, bool]:
    """``2.13.0 (supported: 2.11 to 2.15)``, and whether it is inside the range; an absent package counts as inside."""
    low, high = VERSIONS[name]
    span = "needs {}.{} or later".format(*low) if high is None else "supported: {}.{} to {}.{}".format(*low, *high)
    try:
        version = platform.python_version() if name == "python" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed ({span})", True
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    inside = low <= found and (high is None or found <= high)
    return f"{version}{'' if inside else ' OUTSIDE THE RANGE'} ({span})", inside


def interpreter_line() -> str:
    """What Triton's interpreter cannot do with the installed numpy, or ""; kernels on a GPU do not use numpy."""
    try:
        triton, numpy = (
            tuple(int(number) for number in re.findall(r"\d+", importlib.metadata.version(name))[:2])
            for name in ("triton", "numpy")
        )
    except importlib.metadata.PackageNotFoundError:
        return ""
    if triton >= (3, 7) or numpy < (2, 5):
        return ""
    return "the interpreter of Triton 3.6 fails with numpy 2.5 and later: pip install 'numpy<2.5', or a newer Triton"


def clashing_distributions() -> list[str]:
    """Distributions besides ours that install a package called ``fastseg``."""
    owners = importlib.metadata.packages_distributions().get("fastseg", [])
    return sorted({name for name in owners if name.lower().replace("_", "-") != DISTRIBUTION})


def device_lines() -> Iterator[str]:
    """The CPU, each GPU with memory and capability, and whether kernels are interpreted."""
    yield f"CPU, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "no GPU that torch can use" + (" (this torch is built without CUDA)" if not torch.version.cuda else "")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{index}: {gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"
    yield f"Triton's interpreter is {'on: kernels run on the CPU, slowly' if INTERPRETED else 'off'}"


def table_lines() -> Iterator[str]:
    """For each GPU the first table found; without a GPU, the tables that exist."""
    if not HAS_TRITON:
        yield "none: Triton is not installed"
        return
    from fastseg.kernels.runtime import config

    folders = {"the user's": config.USER, "shipped": config.SHIPPED}
    if not torch.cuda.is_available():
        shipped = sorted(path.stem for path in config.SHIPPED.glob("*.json"))
        yield f"none applies without a GPU; shipped: {', '.join(shipped) or 'none'}"
        return
    for index in range(torch.cuda.device_count()):
        names = config.table_names(index)
        found = [
            f"{owner} {name}.json"
            for owner, folder in folders.items()
            for name in names
            if (folder / f"{name}.json").is_file()
        ]
        yield f"cuda:{index}: {', then '.join([*found, 'heuristics'])}"


def probes() -> Iterator[tuple[torch.device, torch.dtype]]:
    """The inputs for the ops: fp32 on the CPU, and the usual dtypes of training and inference on the first GPU."""
    yield torch.device("cpu"), torch.float32
    if torch.cuda.is_available():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield torch.device("cuda", 0), dtype


def other_calls(device: torch.device, dtype: torch.dtype) -> list[tuple[str, Callable]]:
    """The ops that ``op_cases`` does not hold, each on a small map."""
    where = {"device": device, "dtype": dtype}
    last = lambda *shape: torch.randn(*shape, **where).contiguous(memory_format=torch.channels_last)
    x, low, wide = last(1, 8, 8, 8), last(1, 8, 4, 4), last(1, 8, 16, 16)
    one, three, both = last(8, 8, 1, 1), last(8, 8, 3, 3), last(8, 16, 3, 3)
    norm = ops.BatchNormArgs(torch.zeros(8, device=device), torch.ones(8, device=device))
    plain = {"kernel_size": 2, "return_indices": True}
    line, volume = torch.randn(1, 8, 8, **where), torch.randn(1, 8, 4, 4, 4, **where)
    pooled = lambda: ops.max_pool2d(x, **plain, index_format="compact")
    labels = torch.zeros(1, 16, 16, dtype=torch.int64, device=device)
    return [
        ("atrous_conv2d", lambda: ops.atrous_conv2d(x, three, dilation=2)),
        ("aspp", lambda: ops.aspp(x, [one, three], [1, 2], fusion="sum")),
        ("batch_norm_act", lambda: ops.batch_norm_act(x, norm, "relu")),
        ("batch_norm_act_max_pool2d", lambda: ops.batch_norm_act_max_pool2d(x, norm)),
        ("max_pool1d, max_unpool1d", lambda: ops.max_unpool1d(*ops.max_pool1d(line, **plain), 2)),
        ("max_pool2d, max_unpool2d", lambda: ops.max_unpool2d(*pooled(), 2)),
        ("max_pool3d, max_unpool3d", lambda: ops.max_unpool3d(*ops.max_pool3d(volume, **plain), 2)),
        ("max_unpool_conv2d", lambda: ops.max_unpool_conv2d(*pooled(), three)),
        ("upsample_bilinear", lambda: ops.upsample_bilinear(low, scale_factor=2)),
        ("upsample_trilinear", lambda: ops.upsample_trilinear(volume, scale_factor=2)),
        ("upsample_argmax of volumes", lambda: ops.upsample_argmax(volume, 8)),
        ("bilinear_conv_transpose2d", lambda: ops.bilinear_conv_transpose2d(low, 2)),
        ("upsample_concat", lambda: ops.upsample_concat(low, [x])),
        ("upsample_concat_conv2d", lambda: ops.upsample_concat_conv2d(low, wide, both)),
        ("resize_concat_conv2d", lambda: ops.resize_concat_conv2d([x, low], both, size=(8, 8))),
        ("upsample_nearest_conv2d", lambda: ops.upsample_nearest_conv2d(low, None, three)),
        ("upsample_sum", lambda: ops.upsample_sum(x, [low])),
        ("upsample_confidence", lambda: ops.upsample_confidence(low, 16)),
        ("masks_to_classes", lambda: ops.masks_to_classes(low.flatten(2), low, 16)),
        ("masks_to_queries", lambda: ops.masks_to_queries(low[:, :, 0, 0], low, 16)),
        ("paste_masks", lambda: ops.paste_masks(low[0, :, None], low[0, :, 0], (8, 8))),
        ("upsample_loss", lambda: ops.upsample_loss(low, labels, [(1.0, Dice())])),
    ]


def explain_ops(device: torch.device, dtype: torch.dtype) -> tuple[Report, list[str]]:
    """Call each op once; return what was decided, and what failed."""
    failures = []
    divisor = 1 if device.type == "cuda" else 32  # the cost model looks at sizes; the interpreter needs few pixels
    with fastseg.explain() as report, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = [(case.name, case.fastseg) for case in op_cases(device, dtype, divisor)]
        for name, call in [*calls, *other_calls(device, dtype)]:
            try:
                call()
            except Exception as error:  # whatever a driver or compiler raises, the report continues
                failures.append(f"{name} on {device}, {dtype}: {type(error).__name__}: {first_line(error)}")
    return report, failures
