"""Sums of maps, some of them resized bilinearly: one call."""

from typing import Any

from torch import fx

from fastseg.ops.upsample_sum import upsample_sum
from fastseg.optimizing.graph import Work, argument, aten, only_user, same_shape, shape
from fastseg.optimizing.passes.conv_act import with_activation
from fastseg.optimizing.resize import Resize, resize_of

NAME = "upsample + sum"


def run(work: Work) -> list[str]:
    """base + upsample_bilinear2d(map) + ..., of one ``align_corners``; nobody else reads a resize or a partial sum."""
    matched = []
    for node in reversed(list(work.calls(aten.add.Tensor))):
        if not node.users:
            continue
        ups, base = _collect(work, node)
        if not ups or base is None or any(up.align_corners != ups[0].align_corners for up in ups):
            continue
        last, act = with_activation(node)
        matched.append(f"{node.name}, {len(ups)} maps")
        args = (base, [up.source for up in ups])
        work.replace(last, upsample_sum, args, {"act": act, "align_corners": ups[0].align_corners})
    return matched


def _collect(work: Work, node: fx.Node) -> tuple[list[Resize], fx.Node | None]:
    """The resizes of a chain of sums, and what is left when they are taken away."""
    first: Any = node.args[0]
    second: Any = node.args[1]
    both = isinstance(first, fx.Node) and isinstance(second, fx.Node)
    if not both or argument(node, "alpha") != 1 or not (same_shape(first, node) and same_shape(second, node)):
        return [], None
    for up, other in ((second, first), (first, second)):
        resize = resize_of(work, up) if len(up.users) == 1 else None
        if resize is None or resize.mode != "bilinear" or len(shape(up)) != 4:
            continue
        if other.target is aten.add.Tensor and only_user(other) is node:
            more, base = _collect(work, other)
            if more and base is not None:
                return [*more, resize], base
        return [resize], other
    return [], None
