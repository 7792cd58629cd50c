"""Maps with channels innermost, through the whole graph: the input is put into this order once, weights too."""

from typing import Any

import torch
from torch import Tensor, fx

from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.nearest_conv import upsample_nearest_conv2d
from fastseg.ops.resize_concat_conv import resize_concat_conv2d
from fastseg.optimizing.graph import Work, aten, shape
from fastseg.optimizing.resize import MODES

NAME = "channels_last"
COPIES = (aten.contiguous.default, aten.clone.default)
READERS = {conv2d_act, resize_concat_conv2d, upsample_nearest_conv2d, *MODES}


def run(work: Work) -> list[str]:
    """Every image-like input (N, C, H, W), copies of maps that would bring them back, and the weights of 2-D
    convolutions."""
    matched = _copies(work)
    for node in [node for node in work.graph.nodes if node.op == "placeholder" and node.users]:
        if len(shape(node)) != 4 or not node.meta["val"].is_floating_point():
            continue
        with work.graph.inserting_after(node):
            kwargs: dict[str, Any] = {"memory_format": torch.channels_last}
            new = work.graph.call_function(aten.contiguous.default, (node,), kwargs)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        matched.append(node.name)
    done: dict[fx.Node, fx.Node] = {}
    for conv in work.calls(conv2d_act):
        weight: fx.Node = conv.args[1]  # type: ignore[assignment]
        value = work.tensor(weight)
        if value is not None and not value.is_contiguous(memory_format=torch.channels_last):
            if weight not in done:
                done[weight] = work.made(_last, [value])[0]
            conv.args = (conv.args[0], done[weight], *conv.args[2:])
    return [*matched, *(node.name for node in done)]


def _copies(work: Work) -> list[str]:
    """Maps that a model copies to contiguous memory, as after a permutation of tokens, are put in this order too."""
    matched = []
    for node in work.calls(*COPIES):
        given = node.kwargs.get("memory_format", torch.contiguous_format)
        if len(shape(node)) != 4 or given != torch.contiguous_format or not node.meta["val"].is_floating_point():
            continue
        if node.target is aten.clone.default and "memory_format" not in node.kwargs:
            continue  # it keeps the order that it finds
        if not _is_map(node):
            continue
        node.target, node.kwargs = aten.contiguous.default, {"memory_format": torch.channels_last}
        matched.append(node.name)
    for view in work.calls(aten.view.default) if matched else ():
        view.target = aten.reshape.default  # what was contiguous may be none now
    return matched


def _is_map(node: fx.Node) -> bool:
    """True of a map that becomes channels first, or that a convolution or resize reads; not of the heads' tokens."""
    source: Any = node.args[0]
    turned = source.target is aten.permute.default and [n % 4 for n in source.args[1]] == [0, 3, 1, 2]
    return turned or any(user.target in READERS for user in node.users)


def _last(weight: Tensor) -> tuple[Tensor]:
    return (weight.contiguous(memory_format=torch.channels_last),)
