"""Latency studies: models x sizes x batches x dtypes, each along several paths, timed side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from fastseg.exporting.file_model import FileModel
from fastseg.io.files import first_line
from fastseg.measure.comparison import eager_form
from fastseg.measure.counting import launches, peak_mib, work
from fastseg.measure.paths import CL, FILE, PATHS, Built, Unavailable
from fastseg.measure.timing import interleaved
from fastseg.models import create

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """What is run: one model on inputs of one shape, in one dtype."""

    model: str
    height: int
    width: int
    batch: int
    dtype: str  # a key of DTYPES; below fp32 eager paths run under autocast, as torch's users do

    def __str__(self) -> str:
        return f"{self.model} {self.batch}x{self.height}x{self.width} {self.dtype}"


def measure(
    case: Case,
    paths: Sequence[str],
    device: torch.device,
    *,
    classes: int = 21,
    options: Mapping[str, object] | None = None,
    load: Callable[[], nn.Module] | None = None,
    repetitions: int = 20,
    warmup: int = 3,
) -> list[dict]:
    """Build all paths, then time them interleaved, so that a slow phase of the machine slows all of them alike.

    Args:
        case: what to run; weights are random, running statistics are those of a trained net.
        paths: keys of ``PATHS``.
        device: where to run.
        classes: of the model.
        options: of ``fastseg.models.create``.
        load: makes the model where it is none of ours; an exported file runs along the path "file" alone.
        repetitions: timed calls per path.
        warmup: calls per path before them.

    Returns:
        One row for each path: the case, ``path``, milliseconds ``median_ms``, ``p95_ms``, ``p99_ms``, ``spread`` (the
        range of the middle half over the median), ``images_per_s``, ``peak_mib`` above weights and input, ``launches``
        (kernels on CUDA, else ops that write a tensor; None where that cannot be seen), ``gflop`` and ``mbytes`` of the
        eager forward; or ``unavailable`` and why: what fails is a row too, and ends nothing. A path named twice is one.
    """
    paths = list(dict.fromkeys(paths))
    built: dict[str, Built] = {}
    rows: dict[str, dict] = {}

    def failed(path: str, error: Exception) -> None:
        built.pop(path, None)
        why = first_line(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {first_line(error)}"
        rows[path] = asdict(case) | {"path": path, "unavailable": why}

    torch.manual_seed(0)
    try:
        model = create(case.model, classes, **(options or {})) if load is None else load()
        model = model.eval().to(device)
        x = torch.randn(case.batch, 3, case.height, case.width, device=device)
        if isinstance(model, FileModel):
            paths, plain = [FILE], model.run
        else:
            plain = eager_form(model)
        needed = work(lambda: plain(x))
    except Exception as error:  # too large for the memory, a size that the model does not take
        for path in paths:
            failed(path, error)
        return [rows[path] for path in paths]
    for path in paths:
        try:
            built[path] = PATHS[path](model, x, DTYPES[case.dtype])
            built[path].call()  # what fails must fail here, not among the timed calls
        except Exception as error:
            failed(path, error)
    samples = None
    while samples is None:  # again without a path that fails among its timed calls
        try:
            calls = {path: _named(path, b.call) for path, b in built.items()}
            samples = interleaved(calls, repetitions=repetitions, warmup=warmup)
        except _Failed as error:
            failed(error.args[0], error.__cause__)
    for path, seconds in samples.items():
        try:
            counted = _counted(built[path], device)
        except Exception as error:  # the profiler, a dispatch mode
            failed(path, error)
            continue
        rows[path] = asdict(case) | {"path": path} | statistics_of(seconds, case.batch) | counted | needed
    return [rows[path] for path in paths]


class _Failed(Exception):
    """The path that failed."""


def _named(path: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        try:
            return call()
        except Exception as error:
            raise _Failed(path) from error

    return run


def _counted(built: Built, device: torch.device) -> dict[str, float | None]:
    if device.type != "cuda" and not built.counts:
        return {"peak_mib": None, "launches": None}
    return {"peak_mib": peak_mib(built.call, device), "launches": launches(built.call, device)}


def statistics_of(seconds: Sequence[float], batch: int) -> dict[str, float]:
    """Statistics of one path's samples."""
    ms = np.asarray(seconds) * 1e3
    low, median, high = np.percentile(ms, [25, 50, 75])
    return {
        "median_ms": float(median), "p95_ms": float(np.percentile(ms, 95)), "p99_ms": float(np.percentile(ms, 99)),
        "spread": float((high - low) / median), "samples": len(ms), "images_per_s": float(batch / median * 1e3),
    }  # fmt: skip


def roofs(device: torch.device, dtype: str) -> dict[str, float]:
    """What the device reaches in ``dtype``, measured: GFLOP/s of a 3x3 convolution, GB/s of a copy."""
    side = 128 if device.type == "cuda" else 64
    x = torch.randn(1, 256, side, side, device=device, dtype=DTYPES[dtype]).contiguous(memory_format=CL)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=DTYPES[dtype]).contiguous(memory_format=CL)
    source = torch.zeros(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    functions = {
        "convolution": lambda: nn.functional.conv2d(x, weight, padding=1),
        "copy": lambda: target.copy_(source),
    }
    with torch.no_grad():
        best = {name: min(seconds) for name, seconds in interleaved(functions, repetitions=5).items()}
    flop = 2 * 9 * 256 * 256 * side * side
    return {"gflops": flop / best["convolution"] * 1e-9, "gbytes": 2 * source.nbytes / best["copy"] * 1e-9}
