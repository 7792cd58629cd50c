"""Shapes and torch's two steps for the fused heads; and every tensor that a block of code allocates."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastseg.kernels.runtime.launch import intercept, run
from fastseg.ops.core.dispatch import HAS_TRITON

# Logits (N, C, h, w) and full size (H, W).
SIZES = [
    ((2, 5, 7, 4), (28, 16)),  # a whole factor
    ((1, 3, 5, 6), (17, 22)),  # none
    ((1, 4, 9, 8), (5, 3)),  # smaller
    ((2, 19, 1, 1), (6, 5)),  # one pixel
    ((1, 1, 3, 3), (1, 1)),  # one class, to one pixel
    ((0, 3, 4, 4), (8, 8)),  # empty batch
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
AC = pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])


def interpolate(logits: Tensor, align_corners: bool, size=None, scale_factor=None) -> Tensor:
    return F.interpolate(logits, size, scale_factor, mode="bilinear", align_corners=align_corners)


class Allocations(TorchDispatchMode):
    """The storages of all tensors that torch makes, and the kernels' outputs among them, while it is on."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}  # storage's address -> elements of the largest tensor in it
        self.kept: list[Tensor] = []  # so that no address occurs twice

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if op.namespace == "fastseg":  # straight to its implementation, with the mode on: what that allocates counts
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            key = torch._C.DispatchKey.CUDA if tensors[0].is_cuda else torch._C.DispatchKey.CPU
            with self:
                result = op.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        else:
            result = op(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                self.kept.append(t)
                self.sizes[t.untyped_storage()._cdata] = max(t.numel(), t.untyped_storage().nbytes() // t.itemsize)
        return result

    @property
    def largest(self) -> int:
        """Elements."""
        return max(self.sizes.values(), default=0)

    @property
    def nbytes(self) -> int:
        """Of all storages together: a bound of the peak, whatever is freed between."""
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self.kept}.values())


@contextmanager
def allocations() -> Iterator[Allocations]:
    """Record what is allocated inside the block, ops of the library seen through to their own allocations.

    Example:
        >>> with allocations() as seen:
        ...     op(x)
        >>> seen.largest
    """
    with Allocations() as seen:
        if not HAS_TRITON:
            yield seen
            return

        def launch(*arguments) -> None:
            with _disable_current_modes():  # the interpreter copies every argument
                run(*arguments)

        with intercept(launch):
            yield seen
