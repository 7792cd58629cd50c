"""Resized maps, concatenated and convolved: the small maps are multiplied at their own size (rewrites R1 and R2)."""

from typing import Any

from torch import fx

from fastseg.ops.resize_concat_conv import resize_concat_conv2d
from fastseg.optimizing.graph import Work, argument, aten, only_user, pair, same_shape, shape
from fastseg.optimizing.passes.conv_act import with_activation
from fastseg.optimizing.resize import Resize, resize_of

NAME = "resize + concat + convolution"


def run(work: Work) -> list[str]:
    """Resizes of one mode -> cat -> 1x1 or 3x3 convolution of the same size, or one resize -> such a convolution.

    Nobody else reads the resized maps. A map of a 1x1 that has fewer channels than the result is resized first: to
    resize the products would take longer.
    """
    matched = []
    for conv in work.calls(aten.conv2d.default):
        if not keeps_size(conv):
            continue
        found = _maps(work, conv)
        if found is None:
            continue
        maps, ups = found
        mode, corners = ups[0].mode, ups[0].align_corners
        taps = shape(argument(conv, "weight"))[-1]
        if any((up.mode, up.align_corners) != (mode, corners) for up in ups) or (taps == 3 and mode == "nearest"):
            continue
        last, act = with_activation(conv)
        options = {"size": ups[0].size, "mode": mode, "align_corners": corners, "act": act}
        matched.append(f"{conv.name}, {len(ups)} of {len(maps)} maps")
        work.replace(last, resize_concat_conv2d, (maps, argument(conv, "weight"), argument(conv, "bias")), options)
    return matched


def keeps_size(conv: fx.Node) -> bool:
    """True for a 1x1 or a 3x3 convolution of 4-D maps, at stride 1, whose zero padding keeps the size."""
    taps = shape(argument(conv, "weight"))
    if len(taps) != 4 or taps[2:] not in ((1, 1), (3, 3)) or len(shape(conv)) != 4:
        return False
    sizes = [pair(argument(conv, name)) for name in ("stride", "dilation", "padding")]
    return sizes == [(1, 1), (1, 1), (taps[2] // 2,) * 2] and argument(conv, "groups") == 1


def _maps(work: Work, conv: fx.Node) -> tuple[list[fx.Node], list[Resize]] | None:
    """The maps in front of resize and cat, and the resizes; None if there is none that pays."""
    joined: Any = argument(conv, "input")
    parts = [joined]
    if joined.target is aten.cat.default and argument(joined, "dim") in (1, -3) and only_user(joined) is conv:
        parts = list(joined.args[0])
    cout, _, taps, _ = shape(argument(conv, "weight"))
    maps, ups = [], []
    for part in parts:
        up = resize_of(work, part) if len(part.users) == 1 else None
        if up is not None and same_shape(part, up.source):  # it changes nothing, as nearest and bilinear resizes are
            maps.append(up.source)
        elif up is not None and _pays(up, part, cout, taps):
            maps.append(up.source)
            ups.append(up)
        else:
            maps.append(part)
    return (maps, ups) if ups else None


def _pays(up: Resize, part: fx.Node, cout: int, taps: int) -> bool:
    channels = shape(part)[1]
    h, w, H, W = map(hint, (*shape(up.source)[2:], *shape(part)[2:]))  # of free sizes those of the example
    if h * w >= H * W:
        return False
    # a value of a bilinear map costs about 8 products
    return taps == 3 or channels * cout * (H * W - h * w) + 8 * channels * H * W > 8 * cout * H * W


def hint(n: Any) -> int:
    """The size that the example has."""
    return n if isinstance(n, int) else int(n.node.hint)
