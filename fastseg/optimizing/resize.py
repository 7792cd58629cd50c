"""Resizes of maps in a graph, as ``interpolate(source, size, mode, align_corners)``."""

from typing import NamedTuple

from torch import fx

from fastseg.optimizing.graph import Size, Work, argument, aten, shape

MODES = {aten.upsample_bilinear2d.vec: "bilinear", aten.upsample_nearest2d.vec: "nearest"}


class Resize(NamedTuple):
    """One resize of a map (N, C, h, w)."""

    source: fx.Node
    size: tuple[Size, Size]
    mode: str
    align_corners: bool


def resize_of(work: Work, node: object) -> Resize | None:
    """What ``node`` resizes, and how; None if it is no resize, or if its positions do not follow from the sizes."""
    if not isinstance(node, fx.Node) or node.target not in MODES:
        return None
    source, size, factors = argument(node, "input"), argument(node, "output_size"), argument(node, "scale_factors")
    if len(shape(source)) != 4:
        return None
    mode = MODES[node.target]
    corners = mode == "bilinear" and bool(argument(node, "align_corners"))
    if size is not None:
        return Resize(source, (size[0], size[1]), mode, corners)
    sizes: list[Size] = []
    for axis, factor in zip((2, 3), factors, strict=True):
        small = shape(source)[axis]
        if isinstance(small, int):
            if not float(small * factor).is_integer():
                return None
            sizes.append(int(small * factor))
        elif float(factor).is_integer():
            known = work.insert(node, aten.sym_size.int, (source, axis), small)
            sizes.append(work.insert(node, _times, (known, int(factor)), small * int(factor)))
        else:
            return None
    return Resize(source, (sizes[0], sizes[1]), mode, corners)


def _times(size: int, factor: int) -> int:
    return size * factor
