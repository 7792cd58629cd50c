"""How sure each pixel of upsampled logits is, in torch's own lines."""

import torch
from torch import Tensor

from fastseg.ops.core.upsample import Factors, interpolate


def full_precision(logits: Tensor) -> Tensor:
    """At least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def full_size(logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool) -> Tensor:
    """The logits that torch's own lines have."""
    return interpolate(full_precision(logits), H, W, factors, align_corners)


def measured(v: Tensor, measure: str) -> tuple[Tensor, Tensor]:
    """Logits (N, C, H, W) -> classes and values (N, H, W)."""
    if v.shape[1] == 1:  # certain, unless it is no number
        nothing = v[:, 0] - v[:, 0]
        return torch.zeros_like(nothing, dtype=torch.int64), nothing if measure == "entropy" else nothing + 1
    largest, classes = v.max(1, keepdim=True)
    v = v - largest
    e = v.exp()
    s = e.sum(1, keepdim=True)
    if measure == "entropy":
        values = s.log() - torch.where(e == 0, 0.0, v * e).sum(1, keepdim=True) / s
    elif measure == "margin":
        second = e.scatter(1, classes, 0.0).amax(1, keepdim=True)
        values = (1 - second) / s
    else:
        values = 1 / s
    return classes[:, 0], values[:, 0]
