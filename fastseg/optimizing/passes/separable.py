"""A depthwise convolution and the 1x1 after it: one call, whose map between stays on the chip where that pays."""

from typing import Any

from torch import fx

from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.separable_conv import separable_conv2d
from fastseg.optimizing.graph import Work, only_user, shape

NAME = "depthwise + pointwise"
DEVICES = ("cuda",)  # on a CPU it is the two convolutions that it was


def run(work: Work) -> list[str]:
    """Fused convolutions, one filter a channel and then 1x1 at stride 1, nobody else reading the map between."""
    matched = []
    for outer in work.calls(conv2d_act):
        inner: Any = outer.args[0]
        if inner.target is not conv2d_act or only_user(inner) is not outer or not (_deep(inner) and _flat(outer)):
            continue
        x, deep, deep_bias, mid, stride, padding, dilation, _ = inner.args
        _, flat, flat_bias, act, *_ = outer.args
        options = {
            "stride": stride[0], "padding": padding[0], "dilation": dilation[0], "mid_act": mid, "out_act": act,
            "residual": outer.kwargs.get("residual"),
        }  # fmt: skip
        matched.append(f"{inner.name}, {outer.name}")
        work.replace(outer, separable_conv2d, (x, deep, flat, deep_bias, flat_bias), options)
    return matched


def _deep(conv: fx.Node) -> bool:
    """True for one square filter of up to 7x7 a channel, both axes alike."""
    args: Any = conv.args
    channels, each, height, width = shape(args[1])
    alike = all(not isinstance(pair, str) and pair[0] == pair[1] for pair in args[4:7])
    return bool(alike and args[7] == channels and each == 1 and height == width <= 7 and not conv.kwargs)


def _flat(conv: fx.Node) -> bool:
    _, _, _, _, stride, padding, _, groups = conv.args
    plain = stride == (1, 1) and padding == (0, 0) and groups == 1
    return bool(plain and shape(conv.args[1])[2:] == (1, 1))
