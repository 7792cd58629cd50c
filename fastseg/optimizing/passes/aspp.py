"""Atrous spatial pyramid pooling: all branches in one call, which skips the products with padding."""

from typing import Any

from torch import fx

from fastseg.ops.aspp import aspp
from fastseg.optimizing.graph import Work, argument, aten, only_user, pair, shape
from fastseg.optimizing.passes.conv_act import activation, with_activation
from fastseg.optimizing.passes.resize_concat import keeps_size
from fastseg.optimizing.resize import resize_of

NAME = "atrous pyramid"
DEVICES = ("cuda",)  # a CPU multiplies with padding either way


def run(work: Work) -> list[str]:
    """Activated convolutions of one map, 1x1 and dilated 3x3, and perhaps its image pool at one end -> cat -> activated
    1x1; one activation and one width of all branches."""
    matched = []
    for joined in work.calls(aten.cat.default):
        conv = only_user(joined)
        if conv is None or conv.target is not aten.conv2d.default or argument(joined, "dim") not in (1, -3):
            continue
        if not keeps_size(conv) or shape(argument(conv, "weight"))[2:] != (1, 1):
            continue
        last, act = with_activation(conv)
        parts: Any = list(joined.args[0])  # type: ignore[arg-type]
        pools = [_pool(work, part, act) for part in parts]
        branches = [_branch(part, act) for part, pool in zip(parts, pools, strict=True) if pool is None]
        places = [i for i, pool in enumerate(pools) if pool is not None]
        if len(branches) < 2 or len(places) > 1 or any(place not in (0, len(parts) - 1) for place in places):
            continue
        sources = {each[0] if each else None for each in (*branches, *(pools[i] for i in places))}
        if len(sources) != 1 or None in sources:
            continue
        pool = pools[places[0]] if places else None
        convs = [each[1] for each in branches if each is not None]
        taps = {shape(argument(each, "weight"))[0] for each in convs}
        biased = {argument(each, "bias") is not None for each in convs}
        if len(taps) != 1 or len(biased) != 1:
            continue
        options = {
            "project_weight": argument(conv, "weight"), "project_bias": argument(conv, "bias"), "act": act,
            "pool_weight": argument(pool[1], "weight") if pool else None,
            "pool_bias": argument(pool[1], "bias") if pool else None, "pool_first": places == [0],
        }  # fmt: skip
        dilations = [pair(argument(each, "dilation"))[0] for each in convs]
        biases = [argument(each, "bias") for each in convs] if biased == {True} else None
        args = (sources.pop(), [argument(each, "weight") for each in convs], dilations, biases)
        matched.append(f"{', '.join(each.name for each in convs)}, {conv.name}")
        work.replace(last, aspp, args, options)
    return matched


def _activated(part: Any, act: str | None) -> fx.Node | None:
    """The convolution that ``part`` is the activation of; nobody else reads either."""
    if not isinstance(part, fx.Node) or len(part.users) != 1:
        return None
    conv: Any = part
    if act is not None:
        if activation(part) != act:
            return None
        conv = part.args[0]
        if only_user(conv) is not part:
            return None
    return conv if conv.target is aten.conv2d.default else None


def _branch(part: Any, act: str | None) -> tuple[fx.Node, fx.Node] | None:
    """The map that an activated convolution of the same size reads, and the convolution."""
    conv = _activated(part, act)
    if conv is None or argument(conv, "groups") != 1 or pair(argument(conv, "stride")) != (1, 1):
        return None
    taps = shape(argument(conv, "weight"))[2:]
    (down, across), padding = pair(argument(conv, "dilation")), pair(argument(conv, "padding"))
    fits = taps in ((1, 1), (3, 3)) and down == across and padding == (down * (taps[0] // 2),) * 2
    return (conv.args[0], conv) if fits else None  # type: ignore[return-value]


def _pool(work: Work, part: Any, act: str | None) -> tuple[fx.Node, fx.Node] | None:
    """The map whose mean over all pixels is convolved, activated and resized, and the convolution."""
    up = resize_of(work, part)
    if up is None or tuple(shape(up.source)[2:]) != (1, 1) or len(part.users) != 1:
        return None
    conv = _activated(up.source, act)
    if conv is None or not keeps_size(conv) or shape(argument(conv, "weight"))[2:] != (1, 1):
        return None
    mean: Any = conv.args[0]
    whole = mean.target is aten.adaptive_avg_pool2d.default and list(argument(mean, "output_size")) == [1, 1]
    if mean.target is aten.mean.dim:
        whole = {n % 4 for n in argument(mean, "dim")} == {2, 3} and bool(argument(mean, "keepdim"))
    return (mean.args[0], conv) if whole else None
