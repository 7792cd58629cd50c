"""Sum of maps, some of them bilinearly upsampled: what is left of a fused decoder once its 1x1 convolutions moved."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.norm import ACTIVATIONS, Activation, activate
from fastseg.ops.upsample_bilinear import upsample_bilinear

NAME = "upsample_sum"


def upsample_sum(
    base: Tensor,
    maps: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    act: Activation | None = None,
    align_corners: bool = False,
) -> Tensor:
    """``act(base + sum of interpolate(m, base.shape[2:], mode="bilinear", ...) over the maps + bias)``.

    The interpolations are deterministic in the backward (``upsample_bilinear``). The sum is linear, so second and
    forward-mode derivatives work.

    Args:
        base: (N, C, H, W).
        maps: (N, C, h_i, w_i) each, of any sizes.
        bias: (C,).
        act: None, "relu", "relu6" or "leaky_relu".
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        (N, C, H, W), in the dtype that ``base``, the maps and the bias promote to.

    Raises:
        ValueError: a map is not 4-D or has no pixel, batches or channels differ, or the activation is unknown.
        TypeError: a map is not floating point.

    Reference: the all-MLP head of SegFormer, Xie et al., arXiv:2105.15203.
    """
    maps = list(maps)
    _check(base, maps, bias, act)
    y, own = base, False
    size = tuple(base.shape[2:])
    for m in maps:
        up = upsample_bilinear(m, size, align_corners=align_corners)
        y, own = _add(y, up, own), True
    if bias is not None:
        y, own = _add(y, bias[:, None, None], own), True
    return activate(y, act, inplace=own)


def upsample_sum_ref(
    base: Tensor,
    maps: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    act: Activation | None = None,
    align_corners: bool = False,
) -> Tensor:
    """``upsample_sum`` in plain PyTorch."""
    y = base
    for m in maps:
        y = y + F.interpolate(m, base.shape[2:], mode="bilinear", align_corners=align_corners)
    y = y if bias is None else y + bias[:, None, None]
    return ACTIVATIONS[act or "none"](y)


def _add(y: Tensor, more: Tensor, own: bool) -> Tensor:
    """``y + more``, into ``y`` if it is the op's own."""
    if own and y.dtype == torch.promote_types(y.dtype, more.dtype) and not followed(y, more):
        return y.add_(more)
    return y + more


def _check(base: Tensor, maps: list[Tensor], bias: Tensor | None, act: str | None) -> None:
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f'{NAME}: act is {act!r}; use None, "relu", "relu6" or "leaky_relu"')
    for label, t in (("base", base), *((f"maps[{i}]", m) for i, m in enumerate(maps))):
        if t.dim() != 4 or 0 in t.shape[1:]:
            raise ValueError(f"{NAME}: {label} is {tuple(t.shape)}; it must be (N, C, H, W), none of C, H, W being 0")
        if not t.is_floating_point():
            raise TypeError(f"{NAME}: {label} is {t.dtype}; it must be a floating-point tensor")
        if t.shape[:2] != base.shape[:2]:
            raise ValueError(
                f"{NAME}: {label} is {tuple(t.shape)}; it must have the batch and the channels of base, "
                f"{tuple(base.shape[:2])}"
            )
    if bias is not None and bias.shape != base.shape[1:2]:
        raise ValueError(f"{NAME}: bias is {tuple(bias.shape)}; it must be ({base.shape[1]},)")
