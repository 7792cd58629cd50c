"""A bilinear resize of logits, then argmax: the class map from the small logits."""

from typing import Any

import torch
from torch import fx

from fastseg.ops.upsample_argmax import upsample_argmax
from fastseg.optimizing.graph import Work, argument, aten, only_user, shape
from fastseg.optimizing.passes.resize_concat import hint
from fastseg.optimizing.resize import Resize, resize_of

NAME = "final upsample + argmax"


def run(work: Work) -> list[str]:
    """upsample_bilinear2d -> argmax over the channels, nobody else reading the full logits."""
    matched = []
    for node in work.calls(aten.argmax.default):
        up: Any = node.args[0]
        resize = resize_of(work, up)
        if resize is None or resize.mode != "bilinear" or only_user(up) is not node:
            continue
        if argument(node, "dim") not in (1, -3) or argument(node, "keepdim") or len(shape(up)) != 4:
            continue
        matched.append(f"{up.name}, {node.name}")
        work.replace(node, upsample_argmax, (resize.source, resize.size), {**_corners(resize), "dtype": torch.int64})
    return matched


def class_graph(work: Work, index: int | None) -> Work | None:
    """The graph of the class map, where result ``index`` is a bilinear resize to the size of the first input; or None.

    Where sizes are free, those of the example are compared: for others the map may have another size than the input.

    One channel of logits has no argmax, and is None too.
    """
    if index is None:
        return None
    new = work.clone()
    results: Any = new.output.args[0]
    up = results[index]
    resize = resize_of(new, up)
    image = next(node for node in new.graph.nodes if node.op == "placeholder")
    if resize is None or resize.mode != "bilinear" or shape(up)[1] == 1 or not _same_size(up, image):
        return None
    with new.graph.inserting_before(new.output):
        classes = new.graph.call_function(upsample_argmax, (resize.source, resize.size), _corners(resize))
    new.output.args = (classes,)
    new.clean()
    return new


def _corners(resize: Resize) -> dict[str, Any]:
    return {"align_corners": resize.align_corners}


def _same_size(up: fx.Node, image: fx.Node) -> bool:
    a, b = shape(up), shape(image)
    return len(a) == len(b) == 4 and [*map(hint, a[2:])] == [*map(hint, b[2:])]
