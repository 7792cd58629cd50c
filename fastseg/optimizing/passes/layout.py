"""Maps with channels innermost, through the whole graph: the input is put into this order once, weights too."""

from typing import Any

import torch
from torch import Tensor, fx

from fastseg.ops.conv_act import conv2d_act
from fastseg.optimizing.graph import Work, aten, shape

NAME = "channels_last"


def run(work: Work) -> list[str]:
    """Every image-like input (N, C, H, W), and the weights of 2-D convolutions."""
    matched = []
    for node in [node for node in work.graph.nodes if node.op == "placeholder" and node.users]:
        if len(shape(node)) != 4 or not node.meta["val"].is_floating_point():
            continue
        with work.graph.inserting_after(node):
            kwargs: dict[str, Any] = {"memory_format": torch.channels_last}
            new = work.graph.call_function(aten.contiguous.default, (node,), kwargs)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        matched.append(node.name)
    if not matched:
        return []
    done: dict[fx.Node, fx.Node] = {}
    for conv in work.calls(conv2d_act):
        weight: fx.Node = conv.args[1]  # type: ignore[assignment]
        value = work.tensor(weight)
        if value is not None and not value.is_contiguous(memory_format=torch.channels_last):
            if weight not in done:
                done[weight] = work.made(_last, [value])[0]
            conv.args = (conv.args[0], done[weight], *conv.args[2:])
    return [*matched, *(node.name for node in done)]


def _last(weight: Tensor) -> tuple[Tensor]:
    return (weight.contiguous(memory_format=torch.channels_last),)
