"""Zeros around a map become the padding of the convolution that reads it."""

from typing import Any

from torch import fx

from fastseg.optimizing.graph import Work, argument, aten, only_user, pair, shape

NAME = "zeros into padding"
PADS = (aten.pad.default, aten.constant_pad_nd.default)


def run(work: Work) -> list[str]:
    """pad with zeros, as many on either side -> 2-D convolution, nobody else reading the padded map."""
    matched = []
    for conv in work.calls(aten.conv2d.default):
        padded: Any = argument(conv, "input")
        sides = _sides(padded)
        if sides is None or only_user(padded) is not conv or len(shape(padded)) != 4:
            continue
        down, across = pair(argument(conv, "padding"))
        args = [argument(conv, name) for name in ("weight", "bias", "stride")]
        rest = [argument(conv, name) for name in ("dilation", "groups")]
        matched.append(f"{padded.name}, {conv.name}")
        padding = [down + sides[0], across + sides[1]]
        work.replace(conv, aten.conv2d.default, (padded.args[0], *args, padding, *rest))
    return matched


def _sides(node: Any) -> tuple[int, int] | None:
    """Rows above and below, and columns left and right, that ``node`` adds as zeros; None if it is another call."""
    if not isinstance(node, fx.Node) or node.target not in PADS or argument(node, "value") not in (None, 0):
        return None
    if node.target is aten.pad.default and argument(node, "mode") != "constant":
        return None
    sides: Any = list(argument(node, "pad"))
    if any(type(n) is not int or n < 0 for n in sides) or len(sides) not in (2, 4):
        return None
    left, right, top, bottom = (*sides, 0, 0)[:4]
    return (top, left) if left == right and top == bottom else None
