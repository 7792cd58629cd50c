"""The class map of upsampled logits on a CPU: the forms that spare the map at full size, or part of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops.core.forms import Form, Forms, Torchs, Verdict, forced_blocks
from fastseg.ops.core.layout import channels_last
from fastseg.ops.core.upsample import Factors, along_x, interpolate, is_finite, neighbours
from fastseg.ops.cpu.threads import each

_FEW = 3  # classes; below it, each is compared with the best of those before it; 3 took 1.1 to 1.8 of two steps' time
_BLOCK = 2**17  # values in a block of rows: 512 KiB of fp32
_STRIP, _LEAST_ROWS = 2**17, 32  # values in a strip, and its least number of rows

# Upsampled logits from which a CPU works in strips. Fewer stay in its caches, and torch's two steps with ``max`` take
# 0.75 to 0.95 of eager's time, on any number of threads; strips, 1.0 to 1.6 of it (150 classes, 128^2). From the first
# limit on strips take 0.6 of eager's time on one thread, from the second on any number, as torch's steps write to fresh
# pages (``benchmarks.studies.cpu_threads --ops argmax --layouts channels_last``).
_LARGE, _HUGE = 2**22, 2**23
_MANY = 64  # classes from which the second limit holds for one thread too


class Request(NamedTuple):
    """What decides between the forms."""

    N: int
    C: int
    large: bool
    finite: bool  # looked at where it decides
    plain: bool = True  # a map on a CPU that nothing follows
    no_kernel: str = "CPU tensor"  # as of ``OneKernel``
    sizes: tuple = ()  # of the map, its strides, the output, the factors, and whether corners are aligned


def request_of(logits: Tensor, H: int, W: int) -> Request:
    """Of logits on a CPU that nothing follows: their values are read where they decide."""
    N, C = logits.shape[:2]
    least = _LARGE if C < _MANY and torch.get_num_threads() == 1 else _HUGE
    large = least <= N * C * H * W
    return Request(N, C, large, (large or C == 2 or bool(forced_blocks())) and is_finite(logits))


class CpuForm(Form):
    """``run`` (logits, H, W, factors, align_corners, dtype) for the requests that it ``takes``."""

    path = "torch"

    def __init__(self, name: str, run: Callable[..., Tensor], takes: Callable[[Request], str]):
        self.name, self.run, self.refuses = name, run, takes

    def cost(self, r: Request) -> Verdict | None:
        strips = self.name in ("rows", "images")
        return Verdict(r.large, None, "few upsampled logits: they stay in the caches") if strips else None


def _values(r: Request) -> str:
    return "no image" if r.N == 0 else "" if r.plain else "not an ordinary CPU map"


def one_class(logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype) -> Tensor:
    return torch.zeros(logits.shape[0], H, W, dtype=dtype, device="cpu")


def argmax(logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype) -> Tensor:
    """The class map in torch's two steps."""
    # With the classes innermost the maximum runs along memory, and torch's max with indices, which follows the rules of
    # argmax, takes 0.7 of argmax's time: together 0.24 of the time of argmax in NCHW (CPU, 21 classes, 128 -> 512).
    logits = channels_last(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    return interpolate(logits, H, W, factors, align_corners).max(1).indices.to(dtype)


def argmax_of_two(logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype) -> Tensor:
    """Two finite classes: the argmax is the sign of their interpolated difference, one plane and one comparison."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    second = interpolate(wide[:, 1:] - wide[:, :1], H, W, factors, align_corners)[:, 0] > 0
    return second.view(torch.uint8).to(dtype)


def argmax_by_rows(logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype) -> Tensor:
    """As ``argmax``, with strips of rows on threads, in blocks that stay in the cache."""
    rows_of = lambda n, low, stop: logits[n, :, low:stop]
    kind = torch.promote_types(logits.dtype, torch.float32)
    return rows_argmax(rows_of, logits.shape[:3], H, W, factors, align_corners, dtype, kind)


def rows_argmax(
    rows_of: Callable[[int, int, int], Tensor],
    shape: tuple[int, ...],
    H: int,
    W: int,
    factors: Factors,
    align_corners: bool,
    dtype: torch.dtype,
    kind: torch.dtype,
) -> Tensor:
    """The class map of logits that are given a few rows at a time.

    Each class is a line of memory, so the maximum over classes and the search for the first class that has it are
    vector operations. Differences, products and sums are rounded one by one and alike for all classes, so equal logits
    stay equal.

    Args:
        rows_of: (image, first row, end) -> logits (C, rows, w).
        shape: (N, C, h) of the logits.
        kind: the dtype to compute in.
    """
    N, C, h = shape
    first, second, weight = neighbours(h, H, align_corners, kind, factors[0])
    firsts, seconds, weight = first.tolist(), second.tolist(), weight[:, None, None]
    most, length = max(1, _BLOCK // (W * C)), max(_LEAST_ROWS, _STRIP // (W * C))
    ranks = torch.arange(C, 0, -1, dtype=kind, device="cpu")[:, None]
    classes = torch.empty(N, H, W, dtype=dtype, device="cpu")

    def strip(part: tuple[int, int]) -> None:
        n, begin = part
        end = min(H, begin + length)
        low = firsts[begin]
        x = rows_of(n, low, seconds[end - 1] + 1).to(kind)
        wide = along_x(x, W, align_corners, factors[1]).view(-1, C, W)
        step = torch.zeros_like(wide)  # to the row below; the last row has none, or itself
        torch.sub(wide[1:], wide[:-1], out=step[:-1])
        upper = first[begin:end] - low
        for start in range(0, end - begin, most):
            rows = slice(start, min(start + most, end - begin))
            v = step.index_select(0, upper[rows]).mul_(weight[begin:end][rows])
            v += wide.index_select(0, upper[rows])
            rank = v.eq_(v.amax(1, keepdim=True)).mul_(ranks).amax(1)
            classes[n, begin:end][rows] = rank.neg_().add_(C)

    each(strip, [(n, start) for n in range(N) for start in range(0, H, length)])
    return classes


def running_argmax(logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best, *others = (interpolate(plane, H, W, factors, align_corners)[:, 0] for plane in logits.split(1, 1))
    classes = torch.zeros(best.shape, dtype=dtype, device="cpu")
    for c, v in enumerate(others, 1):
        wins = ~(v <= best) & (best == best)  # larger, or the first NaN
        classes.masked_fill_(wins, c)
        best = torch.where(wins, v, best)
    return classes


def image_by_image(logits: Tensor, *args) -> Tensor:
    """One map at full size at a time."""
    if logits.shape[0] == 1:
        return argmax(logits, *args)
    return torch.cat([argmax(image, *args) for image in logits.split(1)])


CPU_FORMS: list[Form] = [
    CpuForm("one_class", one_class, lambda r: _values(r) or ("" if r.C == 1 else "more classes than one")),
    CpuForm("two_classes", argmax_of_two, lambda r: _values(r) or ("" if r.C == 2 and r.finite else "others")),
    CpuForm("rows", argmax_by_rows, lambda r: _values(r) or ("" if r.finite else "NaN or infinity")),
    CpuForm("few", running_argmax, lambda r: _values(r) or ("" if r.C < _FEW else f"{_FEW} classes or more")),
    CpuForm("images", image_by_image, _values),
    Torchs(argmax),
]
SLICES = Forms("upsample_argmax", CPU_FORMS, backward=True)  # of a volume; ``force`` knows the op's own list
