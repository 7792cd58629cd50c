"""How a function is timed, checked and described: shared by the pytest benchmarks and ``gpu.py``."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastseg.inference.graphs import captured
from fastseg.kernels.runtime.launch import intercept, run
from fastseg.measure import counting
from fastseg.measure.counting import kept_bytes as kept_bytes
from fastseg.measure.machine import machine as machine
from fastseg.ops.core.dispatch import HAS_TRITON

PIECE = 2**25  # elements that are compared at a time
GRAPH_BELOW = 100e-6  # seconds; under this the host's time to launch shows in a time taken between events

# Relative L2 distance from an fp32 run that rounding in the dtype explains; see `disagreement`. For fp32 that run is
# the baseline's own: flips of signs and near ties, which move the gradient of a pooled map by 5e-4, are in the number.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Function = Callable[[], object]


class Timing(NamedTuple):
    """Seconds of each repetition, and how they were taken: "events", "graph" or "wall"."""

    seconds: list[float]
    timer: str


def do_bench(fn: Function, milliseconds: float) -> list[float]:
    """Seconds between two events around each call, the L2 cache emptied before it."""
    import triton.testing

    times = triton.testing.do_bench(fn, warmup=max(1, int(milliseconds / 4)), rep=milliseconds, return_mode="all")
    return [ms * 1e-3 for ms in times]


def device_times(fn: Function, *, graph: bool = True, milliseconds: float = 60) -> Timing:
    """Device times of ``fn`` on CUDA.

    A call shorter than ``GRAPH_BELOW`` is captured, and the graph's replays are timed in its place: what remains is the
    kernels and the gaps between them, with the cache as cold as for the long ones.

    Args:
        fn: what to time.
        graph: whether ``fn`` may be captured; a backward of a forward outside the graph may not.
        milliseconds: how long to repeat.
    """
    seconds = do_bench(fn, milliseconds)
    if not graph or statistics.median(seconds) >= GRAPH_BELOW:
        return Timing(seconds, "events")
    try:
        replay = captured(fn)
    except RuntimeError:  # it synchronises or copies from the host: timed as it is
        return Timing(seconds, "events")
    return Timing(do_bench(replay, milliseconds), "graph")


def summary(timing: Timing, *, bytes_moved: float | None = None, floor_s: float | None = None) -> dict:
    """Median and spread in microseconds; GB/s and the share of the roofline where bytes and floor are given."""
    median = statistics.median(timing.seconds)
    low, high = _quantiles(timing.seconds)
    out = {
        "median_us": median * 1e6,
        "p20_us": low * 1e6,
        "p80_us": high * 1e6,
        "samples": len(timing.seconds),
        "timer": timing.timer,
    }
    if bytes_moved is not None:
        out["gb_per_s"] = bytes_moved / median * 1e-9
    if floor_s is not None:
        out["roofline"] = floor_s / median
    return out


def _quantiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], fifths[3]


def peak_mib(fn: Function, device: torch.device) -> float | None:
    """Of the second call; None on a CPU."""
    if device.type != "cuda":
        return None
    fn()
    return counting.peak_mib(fn, device)


def launch_count(fn: Function) -> int:
    """fastseg's own kernel launches in one call."""
    if not HAS_TRITON:
        return 0

    count = 0

    def on_launch(*launch) -> None:
        nonlocal count
        count += 1
        run(*launch)

    with intercept(on_launch):
        fn()
    return count


def kernel_count(fn: Function, device: torch.device) -> int | None:
    """All kernels, copies and fills that one call runs on a CUDA device, fastseg's or not; None on a CPU."""
    if device.type != "cuda":
        return None
    fn()
    return counting.launches(fn, device)


def config_sources(fn: Function, device: torch.device) -> list[str]:
    """``kernel[row]: where its configuration came from``, for each question to ``select`` in one call."""
    if not HAS_TRITON:
        return []
    from fastseg.kernels.runtime import config

    asked: list[tuple[str, int, dict]] = []
    with config.observe_selects(lambda kernel, size, key: asked.append((kernel, size, key))):
        fn()
    return sorted(
        {
            f"{kernel}[{config.row_name(**key)}]: {config.select(kernel, size=size, device=device, **key).source}"
            for kernel, size, key in asked
        }
    )


def distance(got: object, want: object) -> float:
    """Largest relative L2 distance between corresponding tensors; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        error = float(_relative(a.detach(), b.detach()))
        worst = max(worst, error) if error == error else float("inf")
    return worst


def _relative(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |b| in fp64, a piece at a time: fp64 copies of whole maps would not fit beside them."""
    if a.dim() == 0:
        a, b = a[None], b[None]
    rows = max(1, PIECE // max(1, b[:1].numel()))
    norms = [
        torch.stack([(p.double() - q.double()).norm(), q.double().norm()])
        for p, q in zip(a.split(rows), b.split(rows), strict=True)
    ]
    off, size = torch.stack(norms).norm(dim=0)
    return off / size.clamp_min(1e-30)


def disagreement(results: Mapping[str, object], exact: object, dtype: torch.dtype, baseline: str = "eager") -> str:
    """Why the providers' results are not all the same function, or "".

    Each may be as far from ``exact`` (an fp32 run of the baseline) as rounding explains, or half as far again as the
    baseline is: gradients behind a ReLU move more than rounding, because signs near zero flip, and do so for everyone.
    """
    allowed = max(AGREEMENT[dtype], 1.5 * distance(results[baseline], exact))
    errors = {name: distance(result, exact) for name, result in results.items()}
    return "; ".join(
        f"{name} is {error:.2e} from fp32, allowed {allowed:.2e}"
        for name, error in errors.items()
        if not error <= allowed or error == float("inf")
    )


def floats(result: object) -> list[Tensor]:
    """The tensors of a result, copied: the next call of a captured function overwrites them."""
    return [leaf.detach().clone() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


@contextmanager
def isolated(log, device: torch.device, **names: object) -> Iterator[None]:
    """What raises inside becomes a row of ``names`` and the error's first line.

    Raises:
        RuntimeError: the device itself failed, and every later call on it would: the stage's process has to end.
    """
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        log.row(**names, error=f"{type(error).__name__}: {first}")
    settle(device)


def settle(device: torch.device) -> None:
    """Give freed memory back, and wait: a fault that stays raises here, whatever was called when it happened."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def here() -> torch.device:
    """The CUDA device where there is one, set up as a user would for speed; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", 0)


def dtype_for(device: torch.device) -> torch.dtype:
    """bf16 under autocast on a GPU; fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
