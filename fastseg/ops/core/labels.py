"""Compare labels with numbers that their dtype may not hold; torch wraps these (256 is 0 in uint8, -100 is 156)."""

import torch
from torch import Tensor

LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def equal(labels: Tensor, value: int) -> Tensor:
    """True where ``labels``, of any dtype, equal ``value``."""
    if labels.dtype in LABEL_DTYPES:
        limits = torch.iinfo(labels.dtype)
        if not limits.min <= value <= limits.max:
            return torch.zeros_like(labels, dtype=torch.bool)
    return labels == value


def outside(labels: Tensor, classes: int) -> Tensor:
    """True where ``labels`` are not a class: below 0, or ``classes`` and more."""
    if classes > torch.iinfo(labels.dtype).max:
        return labels < 0
    return (labels < 0) | (labels >= classes)


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise torch's error if a target is neither a class nor the ignored value. Reads the values."""
    bad = outside(target, classes) & ~equal(target, ignore_index)
    if bad.any():
        raise IndexError(f"Target {int(target[bad][0])} is out of bounds.")
