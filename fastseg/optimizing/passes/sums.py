"""A sum of stacked maps is a sum of the maps: no stack is written, and the layout stays."""

from typing import Any

from torch import fx

from fastseg.optimizing.graph import Work, argument, aten, dtype, only_user, same_shape

NAME = "sum of a stack"


def run(work: Work) -> list[str]:
    """stack -> sum over the stacked axis, of floating-point maps of one dtype, nobody else reading the stack."""
    matched = []
    for total in work.calls(aten.sum.dim_IntList):
        stack: Any = total.args[0]
        if stack.target is not aten.stack.default or only_user(stack) is not total:
            continue
        maps: Any = list(stack.args[0])
        rank, axes = len(stack.meta["val"].shape), argument(total, "dim")
        if argument(total, "keepdim") or argument(total, "dtype") is not None or len(axes or ()) != 1:
            continue
        alike = all(dtype(m) == dtype(total) and same_shape(m, maps[0]) for m in maps)
        if axes[0] % rank != argument(stack, "dim") % rank or not alike or len(maps) < 2:
            continue
        matched.append(f"{total.name}, {len(maps)} maps")
        for other in maps[1:-1]:
            maps[0] = _sum(work, total, maps[0], other)
        work.replace(total, aten.add.Tensor, (maps[0], maps[-1]))
    return matched


def _sum(work: Work, before: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    return work.insert(before, aten.add.Tensor, (a, b), a.meta["val"])
