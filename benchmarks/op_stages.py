"""The stages of ``gpu.py`` for the ops beside the separable convolution: times, and tuning.

A benchmark module takes part by ``problems(tiny, device)``, which yields what is measured, the most valuable first. A
problem has ``name``, ``mode``, ``bytes_moved``, ``floor_s``, ``graph`` (whether a CUDA graph of it may be timed),
``functions(names)``: provider -> what is timed, and ``disagreement(functions)``.
"""

from collections.abc import Callable, Iterator

import bench_bilinear_conv_transpose
import bench_pooling
import bench_upsample_bilinear
import bench_upsample_heads
import harness
import torch
from record import Log

MODULES = (bench_pooling, bench_upsample_heads, bench_upsample_bilinear, bench_bilinear_conv_transpose)
COMPILED = ("compile", "grouped-compile")  # minutes of compilation: after everything else


def op_of(module) -> str:
    """``bench_pooling`` -> ``pooling``."""
    return module.__name__.removeprefix("bench_")


def problems(tiny: bool, device: torch.device) -> Iterator[tuple[str, object]]:
    """(op, problem), one of each op in turn: where the time ends, every op has had its share."""
    queues = [(op_of(module), module.problems(tiny, device)) for module in MODULES]
    while queues:
        for entry in list(queues):
            problem = next(entry[1], None)
            if problem is None:
                queues.remove(entry)
            else:
                yield entry[0], problem


def measure(log: Log, device: torch.device, tiny: bool, timed: Callable[..., harness.Timing]) -> None:
    """Every problem: the providers that need no compilation, then, on CUDA, those that do."""
    rounds = [False, True] if device.type == "cuda" else [False]
    for compiled in rounds:
        for op, problem in problems(tiny, device):
            names = tuple(n for n in _providers(op) if (n in COMPILED) == compiled)
            if log.time_left() < (20 if compiled else 3) and not tiny:
                log.left_out.append(f"{op} {problem.name} {problem.mode} {'/'.join(names)}")
                continue
            _rows(log, op, problem, names, device, timed)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _providers(op: str) -> tuple[str, ...]:
    return next(module.PROVIDERS for module in MODULES if op_of(module) == op)


def _baseline(op: str) -> str:
    return "grouped" if op == "bilinear_conv_transpose" else "eager"


def _rows(log: Log, op: str, problem, names: tuple[str, ...], device: torch.device, timed: Callable) -> None:
    functions = problem.functions(tuple(dict.fromkeys((_baseline(op), *names))))
    wrong = problem.disagreement(functions)
    for name in names:
        row = {"op": op, "shape": problem.name, "N": problem.shape.N, "mode": problem.mode, "provider": name}
        if wrong:
            log.row(**row, wrong=wrong)
            continue
        timing = timed(functions[name], device, **({"graph": problem.graph} if device.type == "cuda" else {}))
        summary = harness.summary(timing, bytes_moved=problem.bytes_moved, floor_s=problem.floor_s)
        sources = harness.config_sources(functions[name], device) if name == "fastseg" else []
        log.row(
            **row, dtype=str(problem.dtype), **summary, peak_mib=harness.peak_mib(functions[name], device),
            configurations=sources,
        )  # fmt: skip


def workloads(tiny: bool, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """(label, fastseg's function) of every problem, for tuning."""
    for op, problem in problems(tiny, device):
        yield f"{op} {problem.name} {problem.mode}", problem.functions(("fastseg",))["fastseg"]
