"""Cross entropy of bilinearly upsampled logits."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.dispatch import followed, is_torchs, needs_grad, use_kernel
from fastseg.ops.core.labels import LABEL_DTYPES, equal, outside
from fastseg.ops.core.layout import memory_format_of
from fastseg.ops.core.override import overridable
from fastseg.ops.core.sizes import whole
from fastseg.ops.core.upsample import cross_entropy, unsupported
from fastseg.ops.cpu.cross_entropy_rows import Criterion, can_walk, form, walk
from fastseg.ops.registered.upsample_cross_entropy import Call, UpsampleCrossEntropy, fwd_op


@overridable
def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    align_corners: bool = False,
) -> Tensor:
    """Upsample logits bilinearly to the size of the target and compute the cross entropy.

    Equals ``cross_entropy(interpolate(logits, target.shape[-2:], mode="bilinear", ...), target, ...)``, but stores
    neither the full-size logits nor their gradient: the forward saves one number per pixel. All dtypes are computed in
    fp32. Gradients are deterministic. Second derivatives run as torch's two steps.

    Args:
        logits: (N, C, h, w), floating point, any layout.
        target: class indices (N, H, W), uint8, int8, int16, int32 or int64.
        weight: (C,), a factor per class, of either sign.
        ignore_index: target value of pixels that do not count.
        reduction: "mean" (over the weights of the pixels that count), "sum" or "none".
        label_smoothing: in [0, 1].
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        A scalar, or (N, H, W) for "none", in the dtype of ``logits``; in fp32 under autocast. A mean over no pixels is
        NaN, with gradient 0. A mean over weights that sum to 0 is NaN too; its gradient is NaN at pixels that count.

    Raises:
        TypeError: ``logits`` is not floating point, or ``target`` has none of the five dtypes.
        ValueError: shapes do not match, the reduction is unknown, ``label_smoothing`` is outside [0, 1], or tensors are
            on different devices.
        IndexError: a target is neither a class nor ``ignore_index``. On a GPU, where waiting for the answer would cost
            more than the loss, the loss of such a target is NaN; it is never used as an address, and a device-side
            assertion reports it at the next synchronisation, as in torch's own cross entropy.

    Reference: ``torch.nn.functional.interpolate`` and ``torch.nn.functional.cross_entropy``.
    """
    ignore_index, label_smoothing = whole(ignore_index), float(label_smoothing)
    _check(logits, target, weight, reduction, label_smoothing)
    if not _takes_kernel(logits, target, weight):
        return upsample_cross_entropy_ref(
            logits, target, weight, ignore_index, reduction, label_smoothing, align_corners=align_corners
        )
    save_lse = torch.is_grad_enabled() and logits.requires_grad
    call = Call(logits, target, weight, ignore_index, reduction, label_smoothing, align_corners,
                _autocast(logits), save_lse)  # fmt: skip
    return (UpsampleCrossEntropy.apply(*call) if needs_grad(logits) else fwd_op(*call))[0]


def _takes_kernel(logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    if is_torchs(logits) and target.is_cpu and (weight is None or weight.is_cpu):
        return False
    why = unsupported(logits, *target.shape[1:])
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        why = why or "the class weights require a gradient"
    return use_kernel("upsample_cross_entropy", logits, target, weight, unsupported=why)


def upsample_cross_entropy_ref(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    align_corners: bool = False,
) -> Tensor:
    """``upsample_cross_entropy`` in plain PyTorch; on a CPU it takes a few rows at a time where that is faster."""
    by_rows = logits.is_cpu and (weight is None or not weight.requires_grad)
    by_rows = by_rows and target.numel() > 0 and not followed(logits, weight)
    if by_rows and (weight is None or not _weightless(target, weight, ignore_index, reduction)):
        criterion = Criterion(ignore_index, reduction, label_smoothing, align_corners)
        out = torch.promote_types(logits.dtype, torch.float32) if torch.is_autocast_enabled("cpu") else logits.dtype
        name = form(logits.shape[1], target.numel())
        if name != "strips":
            loss = _in_two_steps(logits, target, weight, criterion, name == "rows")
            return loss if loss.dtype == out else loss.to(out)
        if can_walk(logits, target):
            return walk(logits, target, weight, criterion, out)
    return cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing, align_corners)


def _weightless(target: Tensor, weight: Tensor, ignore_index: int, reduction: str) -> bool:
    """True if the weights of a mean may sum to 0; its gradient is then NaN where a pixel counts, and 0 elsewhere."""
    if reduction != "mean" or bool((weight > 0).all()):
        return False
    target = target[~equal(target, ignore_index)].long()
    inside = target[~outside(target, len(weight))]
    return bool(weight[inside].sum() == 0)


def _in_two_steps(logits: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion, in_rows: bool) -> Tensor:
    """Torch's two steps for few classes or small maps, with the classes of a pixel in a row, or each a plane."""
    ignore_index, reduction, label_smoothing, align_corners = criterion
    kind = torch.promote_types(logits.dtype, torch.float32)
    autocast = torch.is_autocast_enabled("cpu")  # to enter its context takes 7 us
    with torch.autocast("cpu", enabled=False) if autocast else nullcontext():
        wide, pixels = logits if logits.dtype == kind else logits.to(kind), target.long()
        wide = wide.contiguous(memory_format=torch.channels_last if in_rows else torch.contiguous_format)
        if wide is not logits and wide.requires_grad:
            layout = memory_format_of(logits)
            wide.register_hook(lambda grad: grad.contiguous(memory_format=layout))
        full = F.interpolate(wide, target.shape[1:], None, "bilinear", align_corners)
        weight = None if weight is None else weight.to(kind)
        if full.shape[1] == 1:  # its logarithm of the softmax is 0, or NaN: 0.9 of the time
            return F.nll_loss(full - full, pixels, weight, None, ignore_index, reduction=reduction)
        if in_rows:
            full, pixels = full.permute(0, 2, 3, 1).flatten(0, 2), pixels.flatten()
        loss = F.cross_entropy(
            full, pixels, weight, None, ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        return loss.view(target.shape) if in_rows and reduction == "none" else loss


def _autocast(logits: Tensor) -> bool:
    kind = logits.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _check(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float) -> None:
    name, shape, pixels = "upsample_cross_entropy", logits.shape, target.shape
    if len(shape) != 4 or len(pixels) != 3 or shape[0] != pixels[0] or shape[1] == 0:
        raise ValueError(
            f"{name}: logits are {tuple(shape)} and target is {tuple(pixels)}; give (N, C, h, w) and (N, H, W)"
        )
    if 0 in shape[2:] or 0 in pixels[1:]:
        raise ValueError(f"{name}: logits are {tuple(shape)} and target is {tuple(pixels)}; there is no pixel in them")
    if not logits.is_floating_point():
        raise TypeError(f"{name}: logits are {logits.dtype}; give floating-point logits")
    if target.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name}: target is {target.dtype}; give class indices, uint8 or int8 to int64")
    if weight is not None and (weight.shape != (shape[1],) or not weight.is_floating_point()):
        raise ValueError(
            f"{name}: weight is {tuple(weight.shape)}, {weight.dtype}; give a floating-point factor for each of "
            f"{shape[1]} classes"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{name}: reduction is {reduction!r}; use "mean", "sum" or "none"')
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}; it must lie in [0, 1]")
