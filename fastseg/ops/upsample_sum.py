"""Sum of maps, some of them bilinearly upsampled: what is left of a fused decoder once its 1x1 convolutions moved."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.batch_norm_act import batch_norm_act
from fastseg.ops.core.dispatch import followed, known, needs_grad, runs_kernel
from fastseg.ops.core.norm import ACTIVATIONS, Activation, BatchNormArgs, activate, check_norm, torch_norm
from fastseg.ops.core.override import overridable
from fastseg.ops.registered.upsample_sum import FORMS, NAME, sizes_of, upsample_sum_op


@overridable
def upsample_sum(
    base: Tensor,
    maps: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    norm: BatchNormArgs | None = None,
    act: Activation | None = None,
    align_corners: bool = False,
) -> Tensor:
    """``act(norm(base + sum of interpolate(m, base.shape[2:], mode="bilinear", ...) over the maps + bias))``.

    One kernel reads each map once and writes the result, without gradients also for bias, a norm with fixed statistics,
    and activation; with gradients these follow as ops of their own. The backward of each upsampling is deterministic.
    The sum is linear, so without norm and activation second and forward-mode derivatives work.

    Args:
        base: (N, C, H, W).
        maps: (N, C, h_i, w_i) each, of any sizes.
        bias: (C,).
        norm: arguments of a batch norm; with ``training`` its running statistics are updated in place.
        act: None, "relu", "relu6" or "leaky_relu".
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        (N, C, H, W), in the memory format of ``base`` and the dtype that ``base`` and the maps promote to.

    Raises:
        ValueError: a map is not 4-D or has no pixel, batches, channels or the norm do not fit, or the activation is
            unknown.
        TypeError: a map is not floating point.

    Reference: the all-MLP head of SegFormer, Xie et al., arXiv:2105.15203.
    """
    maps = list(maps)
    _check(base, maps, bias, norm, act)
    dtype = base.dtype
    for m in maps:
        dtype = torch.promote_types(dtype, m.dtype)
    base, maps = base.to(dtype), [m.to(dtype) for m in maps]
    if not runs_kernel(FORMS, base, known(*sizes_of(base, maps)), *maps, bias):
        return upsample_sum_ref(base, maps, bias, norm=norm, act=act, align_corners=align_corners)
    affine = () if norm is None else (norm.weight, norm.bias)
    if needs_grad(base, *maps, bias, *affine) or followed(base, *maps) or (norm is not None and norm.training):
        y = upsample_sum_op(base, maps, None, None, "none", align_corners)
        y = y if bias is None else y + bias.to(dtype)[:, None, None]
        return ACTIVATIONS[act or "none"](y) if norm is None else batch_norm_act(y, norm, act)
    scale = None
    if norm is not None:
        mean, var, weight, shift, *_, eps = norm
        scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
        bias = (-mean if bias is None else bias - mean) * scale
        bias = bias if shift is None else bias + shift
    return upsample_sum_op(base, maps, scale, bias, act or "none", align_corners)


def upsample_sum_ref(
    base: Tensor,
    maps: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    norm: BatchNormArgs | None = None,
    act: Activation | None = None,
    align_corners: bool = False,
) -> Tensor:
    """``upsample_sum`` in plain PyTorch."""
    y, own = base, False
    for m in maps:
        y, own = _add(y, F.interpolate(m, base.shape[2:], mode="bilinear", align_corners=align_corners), own), True
    if bias is not None:
        y, own = _add(y, bias.to(y.dtype)[:, None, None], own), True
    y = torch_norm(y, norm)
    return activate(y, act, inplace=own or norm is not None)


def _add(y: Tensor, more: Tensor, own: bool) -> Tensor:
    """``y + more``, into ``y`` if it is the op's own."""
    if own and y.dtype == more.dtype and not followed(y, more):
        return y.add_(more)
    return y + more


def _check(base: Tensor, maps: list[Tensor], bias: Tensor | None, norm, act: str | None) -> None:
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
    check_norm(f"{NAME}: norm", norm, base.shape[1], base, tuple(base.shape))
