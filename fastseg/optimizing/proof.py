"""A pass counts if the graph still gives the same results on the example."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseg.io.files import first_line
from fastseg.measure.counting import Live, products_and_bytes
from fastseg.ops.core.torch_private import tree_leaves
from fastseg.optimizing.graph import Work
from fastseg.optimizing.report import Counts

# The largest difference that counts as rounding, as a share of the result's largest value.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
CLASSES = 2e-3  # share of a map of integers, such as classes, that may differ: near ties


def counted(work: Work, inputs: Sequence[Tensor]) -> tuple[list[Any], Counts]:
    """The results of one call, and what it takes."""
    results: list[Any] = []
    with torch.no_grad(), Live() as live:
        products, moved = products_and_bytes(lambda: results.append(work.module(*inputs)))
    return tree_leaves(results), Counts(products, moved, live.ops)


def difference(got: Sequence[Any], want: Sequence[Any]) -> str:
    """How two lists of results differ beyond rounding, or ""."""
    if len(got) != len(want):
        return f"{len(got)} results in place of {len(want)}"
    for a, b in zip(got, want, strict=True):
        if not isinstance(b, Tensor):
            if a != b:
                return f"{a} in place of {b}"
            continue
        if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            kind = f"{tuple(a.shape)} {a.dtype}" if isinstance(a, Tensor) else type(a).__name__
            return f"{kind} in place of {tuple(b.shape)} {b.dtype}"
        if b.numel() == 0:
            continue
        if not b.is_floating_point():
            share = (a != b).double().mean().item()
            if share > CLASSES:
                return f"{share:.1%} of the values differ"
            continue
        top = b.double().abs().nan_to_num(0, 0, 0).max().item()
        error = (a.double() - b.double()).abs()
        error = error[~(a.isnan() & b.isnan())]  # an example may hold NaN
        worst = error.max().item() if error.numel() else 0.0
        if not worst <= TOLERANCES[b.dtype] * max(top, 1e-30):
            return f"differs by {worst:.1e} of {top:.1e}"
    return ""


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:200]
