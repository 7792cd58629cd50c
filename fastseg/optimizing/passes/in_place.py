"""Calls that go through a map pixel by pixel write into it, where nobody reads it afterwards: no fresh memory."""

from typing import Any

from torch import fx

from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.nearest_conv import upsample_nearest_conv2d
from fastseg.ops.resize_concat_conv import resize_concat_conv2d
from fastseg.ops.upsample_sum import upsample_sum
from fastseg.optimizing.graph import Work, argument, aten, dtype, same_shape

NAME = "in place"
DEVICES = ("cpu",)  # a GPU's allocator has the memory at hand
MAPS: dict[Any, Any] = {
    aten.relu.default: aten.relu_.default, aten.silu.default: aten.silu_.default,
    aten.gelu.default: aten.gelu_.default, aten.hardswish.default: aten.hardswish_.default,
    aten.hardtanh.default: aten.hardtanh_.default, aten.relu6.default: aten.relu6_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default, aten.elu.default: aten.elu_.default,
    aten.sigmoid.default: aten.sigmoid_.default, aten.hardsigmoid.default: aten.hardsigmoid_.default,
    aten.add.Tensor: aten.add_.Tensor, aten.mul.Tensor: aten.mul_.Tensor,
}  # fmt: skip
FRESH = {  # calls whose result is memory of their own
    conv2d_act, resize_concat_conv2d, upsample_nearest_conv2d, upsample_sum, aten.conv2d.default,
    aten.conv_transpose2d.input, aten.linear.default, aten.batch_norm.default, aten.group_norm.default,
    aten.layer_norm.default, aten.cat.default, *MAPS, *MAPS.values(),
}  # fmt: skip


def run(work: Work) -> list[str]:
    """Activations, sums and products whose first operand is fresh memory of the result's shape; they read it last."""
    matched = []
    order = {node: i for i, node in enumerate(work.graph.nodes)}
    for node in work.calls(*MAPS):
        first: Any = node.args[0]
        if node.target is aten.add.Tensor and not _spent(first, node, order) and argument(node, "alpha") == 1:
            node.args = (node.args[1], first)
            first = node.args[0]
        if _spent(first, node, order):
            matched.append(node.name)
            node.target = MAPS[node.target]
    return matched


def _spent(value: Any, reader: fx.Node, order: dict[fx.Node, int]) -> bool:
    """True if ``value`` is memory of its own that nobody reads after ``reader``, and that can hold the result."""
    if not isinstance(value, fx.Node) or value.target not in FRESH or value in reader.args[1:]:
        return False
    others = [user for user in value.users if user is not reader]
    if any(order[user] > order[reader] or not _is_fresh(user) for user in others):
        return False
    return dtype(value) == dtype(reader) and same_shape(value, reader)


def _is_fresh(node: fx.Node) -> bool:
    """True if a call returns memory of its own, no view of what it reads."""
    if node.target in FRESH:
        return node.target not in MAPS.values()
    schema = getattr(node.target, "_schema", None)
    return schema is not None and all(each.alias_info is None for each in schema.returns)
