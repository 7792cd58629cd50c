"""How sure each pixel of upsampled logits is, on a CPU: of blocks of rows, and of one or two classes."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastseg.ops.core.confidence import full_precision
from fastseg.ops.core.upsample import Factors, along_x, interpolate
from fastseg.ops.cpu.threads import each
from fastseg.ops.cpu.upsampled_rows import BLOCK, Strip, strips_of


def of_few(
    logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, measure: str
) -> tuple[Tensor, Tensor]:
    """The same of one or two finite classes: nothing, or their difference d, one plane. The other has exp -|d|."""
    N, C = logits.shape[:2]
    if C == 1:
        classes = torch.zeros(N, H, W, dtype=torch.uint8, device="cpu")
        kind = torch.promote_types(logits.dtype, torch.float32)
        return classes, torch.full((N, H, W), 0.0 if measure == "entropy" else 1.0, dtype=kind, device="cpu")
    classes, d = _difference(logits, H, W, factors, align_corners)
    if measure == "probability":
        return classes, d.sigmoid_()
    if measure == "margin":
        return classes, d.mul_(0.5).tanh_()
    e = d.neg().exp_()
    return classes, torch.addcmul(e.log1p(), d, e.div_(1 + e))


def topk_of_few(logits: Tensor, k: int, H: int, W: int, factors: Factors, align_corners: bool) -> tuple[Tensor, Tensor]:
    """The ``k`` most probable of one or two finite classes (N, k, H, W), and their probabilities."""
    if k == 1:
        classes, p = of_few(logits, H, W, factors, align_corners, "probability")
        return classes[:, None].long(), p[:, None].float()
    classes, d = _difference(logits, H, W, factors, align_corners)
    return torch.stack([classes, 1 - classes], 1).long(), torch.stack([d, -d], 1).sigmoid_().float()


def _difference(logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool) -> tuple[Tensor, Tensor]:
    """The class of two, and by how much its logit is larger, (N, H, W)."""
    wide = full_precision(logits)
    d = interpolate(wide[:, 1:] - wide[:, :1], H, W, factors, align_corners)[:, 0]
    return (d > 0).view(torch.uint8), d.abs_()


def by_rows(
    found: Callable[[Tensor], tuple[Tensor, ...]], logits: Tensor, H: int, W: int, factors: Factors,
    align_corners: bool, dtypes: tuple[torch.dtype, ...], channels: tuple[int, ...], *, squeeze: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What ``found`` gives for blocks (rows, C, W), pixels innermost, laid out as (N, channels, H, W)."""
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    N, C = logits.shape[:2]
    results = [
        torch.empty((N, H, W) if squeeze else (N, k, H, W), dtype=dtype, device="cpu")
        for dtype, k in zip(dtypes, channels, strict=True)
    ]

    def strip(part: Strip) -> None:
        x = logits[part.image, :, part.first : part.last].to(kind)
        wide = along_x(x, W, align_corners, factors[1])
        step = max(1, BLOCK // (C * W))
        for start in range(0, part.stop - part.start, step):
            rows = slice(start, min(start + step, part.stop - part.start))
            v = torch.mm(part.matrix[rows], wide).view(-1, C, W)
            there = slice(part.start + rows.start, part.start + rows.stop)
            for result, block in zip(results, found(v), strict=True):
                if squeeze:
                    result[part.image, there] = block
                else:
                    result[part.image, :, there] = block.transpose(0, 1)

    each(strip, strips_of(logits.shape, H, W, align_corners, kind, factors[0]))
    return tuple(results)
