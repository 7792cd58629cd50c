"""Taps of the bilinear kernel, and transposed convolutions with them in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.constants import constant
from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.layout import memory_format_of, new_map


def form(C: int, values: int, stride: int, K: int, last: bool) -> str:
    """The fastest form of a map of so many output values, in channels_last or not.

    Of a grouped convolution's time, on one thread (``benchmarks.studies.cpu_threads --ops deconvolution``),
    interpolating takes 0.1 to 0.9 for one class in either layout, and for two in NCHW; in channels_last, where its
    planes are transposed, 0.3 to 0.7 below the limit; for three, 0.7 on small maps of a large stride. Two passes take
    0.4 to 0.9 for large maps in NCHW. They are a call for each phase of the stride, so they lose on several threads,
    which wait for each other after each call.
    """
    exact = 2 * stride == K and stride & (stride - 1) == 0 and stride > 1  # an interpolation, without rounding
    two = C == 2 and (not last or (stride >= 8 and values <= stride * 2**14))
    if exact and (C == 1 or two or (C == 3 and stride >= 32 and values <= 2**16)):
        return "interpolated"
    large = not last and stride >= 8 and values * stride >= 2**24
    return "two_passes" if large and stride <= K <= 2 * stride and torch.get_num_threads() == 1 else "grouped"


def line(K: int, like: Tensor) -> Tensor:
    """The kernel along one axis, (K,), in the dtype and on the device of ``like``."""
    distance = (torch.arange(K, device=like.device, dtype=like.dtype) - (K - 1) / 2).abs()
    return 1 - distance / ((K + 1) // 2)


def is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """True if ``x`` is an ordinary CPU tensor: not traced, not transformed, no stand-in; the others have no tangent."""
    return x.is_cpu and type(x) in (Tensor, torch.nn.Parameter) and not followed(*others)


def grouped_taps(K: int, x: Tensor, dtype: torch.dtype, *, across: bool = False) -> Tensor:
    """Taps (C, 1, K, K) for the channels of ``x``, or (C, 1, 1, K) with ``across``; cached for plain tensors."""
    if is_plain(x):
        return kept_taps(K, x.shape[1], dtype, across)
    return _expanded(K, x.shape[1], x.new_empty(0, dtype=dtype), across)


@constant(16)
def kept_taps(K: int, C: int, dtype: torch.dtype, across: bool) -> Tensor:
    return _expanded(K, C, torch.empty(0, dtype=dtype), across)


def _expanded(K: int, C: int, like: Tensor, across: bool) -> Tensor:
    taps = line(K, like)
    taps = taps[None] if across else taps[:, None] * taps
    return taps.expand(C, 1, *taps.shape).contiguous()


def bilinear(x: Tensor, K: int, stride: int, padding: int, size: tuple[int, int] | None) -> Tensor:
    """The bilinear ``conv_transpose2d`` of a plain CPU map in fp32 or fp64, in its memory format. No gradient."""
    (N, C), layout = x.shape[:2], memory_format_of(x)
    OH, OW = natural_size(x, stride, K, padding) if size is None else size
    name = form(C, N * C * OH * OW, stride, K, layout == torch.channels_last)
    if name == "interpolated" and N > 0:
        y = interpolated(x, stride, padding, size)
    elif name == "two_passes":
        return two_passes(x, K, stride, padding, size)
    else:  # one group per channel: 0.1 to 0.3 of a dense weight's time
        y = sized_conv_transpose2d(x, kept_taps(K, C, x.dtype, False), stride, padding, C, size)
    return y.contiguous(memory_format=layout)


def interpolated(x: Tensor, stride: int, padding: int, size: tuple[int, int] | None) -> Tensor:
    """The bilinear ``conv_transpose2d`` with 2 ``stride`` taps, ``stride`` even: of the map with zeros around it."""
    H, W = ((n + 2) * stride for n in x.shape[2:])
    OH, OW = (H - stride - 2 * padding, W - stride - 2 * padding) if size is None else size
    y = F.interpolate(F.pad(x, (1, 1, 1, 1)).contiguous(), (H, W), mode="bilinear")
    y = y[..., (start := stride // 2 + padding) : start + OH, start : start + OW]
    return y if y.shape[2:] == (OH, OW) else F.pad(y, (0, OW - y.shape[3], 0, OH - y.shape[2]))


def two_passes(x: Tensor, K: int, stride: int, padding: int, size: tuple[int, int] | None) -> Tensor:
    """The bilinear ``conv_transpose2d`` of a CPU map, first across, then down; K at most 2 ``stride``. No gradient.

    The pass across runs on the few rows of the small map. In the pass down each output row is a weighted sum of two
    rows, computed and written once, with one call for all rows of a phase. This takes 0.6 to 0.85 of a grouped
    convolution's time (channels_last, 21 channels).
    """
    N, C, H = x.shape[:3]
    OH, OW = size or natural_size(x, stride, K, padding)
    reach = max((H - 1) * stride + K - padding, 0)  # rows from here on are 0
    weight = grouped_taps(K, x, x.dtype, across=True)
    rows = F.conv_transpose2d(x, weight, stride=(1, stride), groups=C)[..., padding : padding + OW]
    rows = F.pad(rows, (0, OW - rows.shape[-1], 1, 1))
    y = new_map(x, (N, C, OH, OW))
    y[:, :, reach:] = 0
    taps = [*line(K, x.new_empty(0)).tolist(), *[0.0] * (2 * stride - K)]
    scaled = torch.empty_like(rows)
    for first in range(min(stride, OH, reach)):
        at, phase = divmod(first + padding, stride)
        out = y[:, :, first:reach:stride]
        upper, lower = (rows[:, :, i : i + out.shape[2]] for i in (at, at + 1))
        if taps[phase + stride] == 0:  # an odd kernel's last phase reads nothing from above, which might be infinite
            torch.mul(lower, taps[phase], out=out)
        else:
            torch.mul(lower, taps[phase], out=scaled[:, :, : out.shape[2]])
            torch.add(scaled[:, :, : out.shape[2]], upper, alpha=taps[phase + stride], out=out)
    return y


def natural_size(x: Tensor, stride: int, K: int, padding: int) -> tuple[int, int]:
    """The output's height and width in torch."""
    H, W = x.shape[-2:]
    return (H - 1) * stride + K - 2 * padding, (W - 1) * stride + K - 2 * padding


def sized_conv_transpose2d(
    x: Tensor, weight: Tensor, stride: int, padding: int, groups: int, size: tuple[int, int] | None
) -> Tensor:
    """``conv_transpose2d`` with any output size: past torch's size, what the kernel gives there, and then zeros."""
    if size is None:
        return F.conv_transpose2d(x, weight, None, stride, padding, groups=groups)
    natural = natural_size(x, stride, weight.shape[-1], padding)
    if size[0] <= natural[0] and size[1] <= natural[1]:
        return _cut(F.conv_transpose2d(x, weight, None, stride, padding, groups=groups), size)
    y = F.conv_transpose2d(x, weight, None, stride, groups=groups)[..., padding:, padding:]
    y = y[..., : size[0], : size[1]]
    return F.pad(y, (0, size[1] - y.shape[-1], 0, size[0] - y.shape[-2]))


def _cut(y: Tensor, size: tuple[int, int]) -> Tensor:
    """The first rows and columns; a copy for symbolic sizes, because asking if a view is dense would add a guard."""
    if not any(isinstance(n, torch.SymInt) for n in size):
        return y[..., : size[0], : size[1]]
    for axis, n in zip((-2, -1), size, strict=True):
        y = y.index_select(axis, torch.arange(n, device=y.device))
    return y
