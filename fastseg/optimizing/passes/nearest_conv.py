"""A map doubled by nearest neighbours, concatenated with a skip, and a 3x3 convolution (rewrite R3)."""

from typing import Any

from torch import fx

from fastseg.ops.nearest_conv import upsample_nearest_conv2d
from fastseg.optimizing.graph import Work, argument, aten, only_user, shape
from fastseg.optimizing.passes.conv_act import with_activation
from fastseg.optimizing.passes.resize_concat import keeps_size
from fastseg.optimizing.resize import resize_of

NAME = "nearest x2 + convolution"


def run(work: Work) -> list[str]:
    """upsample_nearest2d [-> cat with other maps] -> 3x3 convolution; the resized map comes first or last.

    The op itself interpolates first where sizes do not double.
    """
    matched = []
    for conv in work.calls(aten.conv2d.default):
        if not keeps_size(conv) or shape(argument(conv, "weight"))[2:] != (3, 3):
            continue
        joined: Any = argument(conv, "input")
        parts = [joined]
        if joined.target is aten.cat.default and argument(joined, "dim") in (1, -3) and only_user(joined) is conv:
            parts = list(joined.args[0])
        place = next((i for i in (0, len(parts) - 1) if _doubles(work, parts[i])), None)
        if place is None or len(parts) > 2:
            continue
        up: Any = resize_of(work, parts[place])
        skip = parts[1 - place] if len(parts) == 2 else None
        last, act = with_activation(conv)
        args = (up.source, skip, argument(conv, "weight"), argument(conv, "bias"))
        matched.append(f"{conv.name}{'' if skip is None else ', with a skip'}")
        options = {"size": up.size, "act": act, "up_first": place == 0}
        work.replace(last, upsample_nearest_conv2d, args, options)
    return matched


def _doubles(work: Work, part: fx.Node) -> bool:
    up = resize_of(work, part) if len(part.users) == 1 else None
    return up is not None and up.mode == "nearest"
