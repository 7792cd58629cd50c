"""Class map from low-resolution logits."""

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, followed, use_kernel
from fastseg.ops.core.layout import channels_last
from fastseg.ops.core.register import register
from fastseg.ops.core.upsample import (
    Factors,
    along_x,
    interpolate,
    is_finite,
    neighbours,
    output_size,
    unsupported,
    upsampling,
)
from fastseg.ops.cpu.threads import each
from fastseg.ops.upsample_confidence import upsample_confidence

if HAS_TRITON:
    from fastseg.kernels.upsample.argmax import prunes, upsample_argmax_fwd

UINT8_CLASSES = 256
_FEW = 4  # classes; below it, each class is compared with the best of those before it
_BLOCK = 2**17  # values in a block of rows on a CPU: 512 KiB of fp32
_STRIP, _LEAST_ROWS = 2**17, 32  # values in a strip, and its least number of rows
_LARGE = 2**19  # upsampled logits; from here on a CPU works in strips, smaller maps stay in its caches


def upsample_argmax(
    logits: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    *,
    align_corners: bool = False,
    dtype: torch.dtype | None = None,
    confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Upsample logits bilinearly and take the class of each pixel: ``interpolate(logits, ...).argmax(1)``.

    On a GPU the upsampled logits are never stored. fp16 and bf16 logits are interpolated in fp32, so that rounding
    makes no ties between classes.

    Args:
        logits: (N, C, h, w), floating point, any layout.
        size: output height and width in pixels, or one number for both.
        scale_factor: output pixels per input pixel; give exactly one of ``size`` and ``scale_factor``.
        align_corners: as in ``torch.nn.functional.interpolate``.
        dtype: uint8 or int64; None means uint8 for up to 256 classes, else int64.
        confidence: return the probability of that class too; ``upsample_confidence`` has other measures.

    Returns:
        Class indices (N, H, W). The first NaN counts as the largest; among equal logits the first class wins. No
        gradient flows through them. With ``confidence`` a pair: these, and the largest of the softmax, (N, H, W)
        float32.

    Raises:
        TypeError: ``logits`` is not floating point, or ``dtype`` is neither uint8 nor int64.
        ValueError: ``logits`` is not 4-D, or has no class or no pixel; both or neither of ``size`` and ``scale_factor``
            are given, or one is not positive; ``dtype`` is uint8 for more than 256 classes.

    Reference: ``torch.nn.functional.interpolate`` (mode "bilinear") and ``torch.argmax``.
    """
    if logits.dim() != 4 or logits.shape[1] == 0:
        raise ValueError(f"upsample_argmax: logits are {tuple(logits.shape)}; give (N, C, h, w) with C > 0")
    if not logits.is_floating_point():
        raise TypeError(f"upsample_argmax: logits are {logits.dtype}; give floating-point logits")
    classes = logits.shape[1]
    if dtype is None:
        dtype = torch.uint8 if classes <= UINT8_CLASSES else torch.int64
    if dtype not in (torch.uint8, torch.int64):
        raise TypeError(f"upsample_argmax: dtype is {dtype}; use torch.uint8 or torch.int64")
    if dtype == torch.uint8 and classes > UINT8_CLASSES:
        raise ValueError(f"upsample_argmax: {classes} classes do not fit uint8; use dtype=torch.int64")
    if confidence:
        return upsample_confidence(logits, size, scale_factor, align_corners=align_corners, dtype=dtype)
    H, W, factors = output_size("upsample_argmax", logits, size, scale_factor)
    form = lambda: "pruned" if prunes(logits, upsampling(logits, H, W, factors, align_corners)) else "all classes"
    if not use_kernel("upsample_argmax", logits, unsupported=unsupported(logits, H, W), form=form):
        return upsample_argmax_ref(logits, size, scale_factor, align_corners=align_corners, dtype=dtype)
    return _op(logits.detach(), H, W, *factors, align_corners, dtype == torch.int64)


def upsample_argmax_ref(
    logits: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    *,
    align_corners: bool = False,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """``upsample_argmax`` in plain PyTorch; on a CPU it works in strips of rows, or on few classes at once."""
    H, W, factors = output_size("upsample_argmax", logits, size, scale_factor)
    logits = logits.detach()
    args = (H, W, factors, align_corners, dtype)
    N, C = logits.shape[:2]
    if followed() or logits.device.type != "cpu" or N == 0:
        return _argmax(logits, *args)
    if C == 1:
        return torch.zeros(N, H, W, dtype=dtype, device="cpu")
    large = N * C * H * W >= _LARGE
    if (large or C == 2) and is_finite(logits):
        return _argmax_of_two(logits, *args) if C == 2 else _argmax_by_rows(logits, *args)
    if C < _FEW:
        return _running_argmax(logits, *args)
    if large:
        return torch.cat([_argmax(image, *args) for image in logits.split(1)])
    return _argmax(logits, *args)


def _argmax(logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype) -> Tensor:
    # With the classes innermost the maximum runs along memory, and torch's max with indices, which follows the rules of
    # argmax, takes 0.7 of argmax's time: together 0.24 of the time of argmax in NCHW (CPU, 21 classes, 128 -> 512).
    logits = channels_last(logits)
    return interpolate(logits, H, W, factors, align_corners).max(1).indices.to(dtype)


def _argmax_of_two(logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype) -> Tensor:
    """Two finite classes: the argmax is the sign of their interpolated difference, one plane and one comparison."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    second = interpolate(wide[:, 1:] - wide[:, :1], H, W, factors, align_corners)[:, 0] > 0
    return second.view(torch.uint8).to(dtype)


def _argmax_by_rows(
    logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype
) -> Tensor:
    """As ``_argmax``, with strips of rows on threads, in blocks that stay in the cache.

    Each class is a line of memory, so the maximum over classes and the search for the first class that has it are
    vector operations. Differences, products and sums are rounded one by one and alike for all classes, so equal logits
    stay equal.
    """
    N, C, h = logits.shape[:3]
    kind = torch.promote_types(logits.dtype, torch.float32)
    first, second, weight = neighbours(h, H, align_corners, kind, factors[0])
    firsts, seconds, weight = first.tolist(), second.tolist(), weight[:, None, None]
    most, length = max(1, _BLOCK // (W * C)), max(_LEAST_ROWS, _STRIP // (W * C))
    ranks = torch.arange(C, 0, -1, dtype=kind, device="cpu")[:, None]
    classes = torch.empty(N, H, W, dtype=dtype, device="cpu")

    def strip(part: tuple[int, int]) -> None:
        n, begin = part
        end = min(H, begin + length)
        low = firsts[begin]
        wide = along_x(logits[n, :, low : seconds[end - 1] + 1].to(kind), W, align_corners, factors[1]).view(-1, C, W)
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


def _running_argmax(
    logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype
) -> Tensor:
    best, *others = (interpolate(plane, H, W, factors, align_corners)[:, 0] for plane in logits.split(1, 1))
    classes = torch.zeros(best.shape, dtype=dtype, device="cpu")
    for c, v in enumerate(others, 1):
        wins = ~(v <= best) & (best == best)  # larger, or the first NaN
        classes.masked_fill_(wins, c)
        best = torch.where(wins, v, best)
    return classes


def _launch(logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool):
    if unsupported(logits, H, W):
        return _plain(logits, H, W, factor_h, factor_w, align_corners, wide)
    up = upsampling(logits, H, W, (factor_h, factor_w), align_corners)
    # Without pruning, neighbouring pixels of one class are read together: with classes innermost they lie C elements
    # apart.
    x = logits if prunes(logits, up) else logits.contiguous()
    return upsample_argmax_fwd(x, up, torch.int64 if wide else torch.uint8)


def _plain(logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool):
    return _argmax(logits, H, W, (factor_h, factor_w), align_corners, torch.int64 if wide else torch.uint8)


def _fake(logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool):
    return logits.new_empty((logits.shape[0], H, W), dtype=torch.int64 if wide else torch.uint8)


_op = register(
    "upsample_argmax(Tensor logits, SymInt H, SymInt W, float factor_h, float factor_w, bool align_corners, bool wide) "
    "-> Tensor",
    _launch,
    _plain,
    _fake,
)
