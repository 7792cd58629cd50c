"""Confusion matrix of low-resolution logits against labels of full size."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.dispatch import followed, what_follows
from fastseg.ops.core.labels import LABEL_DTYPES
from fastseg.ops.core.override import overridable
from fastseg.ops.core.pairs import add_pairs, no_pairs
from fastseg.ops.upsample_argmax import upsample_argmax


@overridable
def upsample_confusion(
    logits: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    ignore_index: int | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Upsample logits, take the class of each pixel, and count (target, class) pairs.

    Maps are interpolated bilinearly, volumes trilinearly. The full-size logits are never stored, and the classes of one
    image at a time only.

    Args:
        logits: (N, C, h, w) or (N, C, d, h, w), floating point, C at most ``num_classes``.
        target: class indices (N, H, W) or (N, D, H, W), of an integer dtype.
        num_classes: classes, background included.
        ignore_index: target value whose pixels are not counted.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        (num_classes, num_classes), int64, on the device of the logits: entry [t, p] counts pixels of class t predicted
        as p.

    Raises:
        TypeError: ``target`` is not of integers.
        ValueError: shapes do not match, or there are more classes than ``num_classes``.
        IndexError: a target is neither a class nor ``ignore_index``. On a GPU and in graphs it is not counted instead.
    """
    name = "upsample_confusion"
    if logits.dim() not in (4, 5) or target.dim() != logits.dim() - 1 or logits.shape[0] != target.shape[0]:
        raise ValueError(
            f"{name}: logits are {tuple(logits.shape)} and target is {tuple(target.shape)}; "
            "give (N, C, h, w) and (N, H, W), or (N, C, d, h, w) and (N, D, H, W)"
        )
    if target.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name}: target is {target.dtype}; give class indices, uint8 or int8 to int64")
    if not 1 <= logits.shape[1] <= num_classes:
        raise ValueError(f"{name}: {logits.shape[1]} classes of logits, num_classes is {num_classes}")
    C = num_classes
    counts, follow = no_pairs(C, logits.device), followed(logits)
    one = logits.shape[1] == 1 and logits.is_floating_point() and logits.numel() > 0 and target.numel() > 0
    if one and logits.is_cpu and target.is_cpu and not follow:  # no pixel has a choice
        classes = torch.zeros(1, dtype=torch.int64, device="cpu").expand(target.numel())
        return add_pairs(counts, classes, target, C, ignore_index)[: C * C].view(C, C)
    whole = [(logits, target)] if what_follows(logits) else None  # a trace holds for batches of any size
    for image, labels in whole or zip(logits.split(1), target.split(1), strict=True):
        classes = upsample_argmax(image, tuple(target.shape[1:]), align_corners=align_corners)
        counts = add_pairs(counts, classes, labels, C, ignore_index, followed=follow)
    return counts[: C * C].view(C, C)


def upsample_confusion_ref(
    logits: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    ignore_index: int | None = None,
    align_corners: bool = False,
) -> Tensor:
    """``upsample_confusion`` in torch's own lines."""
    mode = "trilinear" if logits.dim() == 5 else "bilinear"
    classes = F.interpolate(logits, target.shape[1:], mode=mode, align_corners=align_corners).argmax(1)
    counted = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    pairs = target[counted].long() * num_classes + classes[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
