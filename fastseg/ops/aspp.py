"""Atrous spatial pyramid pooling with folded weights: branches, image pool and projection."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.atrous_conv2d import atrous_conv2d, atrous_maps
from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.core.norm import ACTIVATIONS, Activation, activate
from fastseg.ops.core.override import overridable


@overridable
def aspp(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    biases: Sequence[Tensor] | None = None,
    *,
    project_weight: Tensor | None = None,
    project_bias: Tensor | None = None,
    pool_weight: Tensor | None = None,
    pool_bias: Tensor | None = None,
    pool_first: bool = False,
    act: Activation | None = "relu",
    fusion: str = "concat",
) -> Tensor:
    """Compute atrous spatial pyramid pooling (ASPP); batch norms are folded into the weights, or absent.

    ``fusion="concat"`` is the ASPP of DeepLabV3::

        b_i = act(conv2d(x, weights[i], biases[i], padding="same", dilation=dilations[i]))
        p   = act(conv2d(mean(x), pool_weight, pool_bias)), the same over all pixels of an image
        y   = act(conv2d(cat([b_0, b_1, ..., p]), project_weight, project_bias))

    One kernel computes all branches. It skips the taps that lie in the padding and writes the results side by side.
    ``p`` is never stored as a map: it enters the projection as one bias per image. ``fusion="sum"``, of DeepLabV2, is
    the sum of ``conv2d(x, weights[i], biases[i])``; each convolution adds the previous sum in its epilogue. It takes no
    activation and no argument whose name begins with ``project`` or ``pool``.

    Args:
        x: (N, C, H, W).
        weights: (M, C, 1, 1) or (M, C, 3, 3) each.
        dilations: of each branch, in pixels; ignored for a 1x1.
        biases: (M,) each, or None.
        project_weight: (OUT, K, 1, 1); K is M times the number of branches, the image pool counted as one.
        project_bias: (OUT,).
        pool_weight: (M, C, 1, 1), or None for no image pool.
        pool_bias: (M,).
        pool_first: True if the pool's channels come first in ``project_weight``, False if last.
        act: activation of branches, pool and projection: None, "relu", "relu6" or "leaky_relu".
        fusion: "concat" or "sum".

    Returns:
        (N, OUT, H, W); with "sum" (N, M, H, W).

    Raises:
        ValueError: shapes do not match, or the activation or fusion is unknown. Also the errors of ``atrous_conv2d``.

    Reference: Chen et al., DeepLab, arXiv:1606.00915 ("sum"); DeepLabV3, arXiv:1706.05587 ("concat").
    """
    pool = (pool_weight, pool_bias)
    _check(x, weights, dilations, biases, project_weight, project_bias, pool, act, fusion)
    if fusion == "sum":
        y = None
        for i, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
            y = atrous_conv2d(x, weight, None if biases is None else biases[i], dilation=dilation, residual=y)
        return y
    maps = atrous_maps(x, weights, biases, dilations, act)
    if pool_weight is None and len(maps) == 1:
        return _convolve(maps[0], project_weight, project_bias, act)
    channels = sum(m.shape[1] for m in maps)
    map_weight, pooled_weight = split_projection(project_weight, channels, pool_first)
    if pool_weight is not None:
        share = pool_share(pooled(x, *pool, act), pooled_weight, project_bias)
    else:
        share = None if project_bias is None else project_bias.expand(x.shape[0], -1)
    return project(maps, map_weight.split([m.shape[1] for m in maps], 1), share, act)


def aspp_ref(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    biases: Sequence[Tensor] | None = None,
    *,
    project_weight: Tensor | None = None,
    project_bias: Tensor | None = None,
    pool_weight: Tensor | None = None,
    pool_bias: Tensor | None = None,
    pool_first: bool = False,
    act: Activation | None = "relu",
    fusion: str = "concat",
) -> Tensor:
    """``aspp`` in torch's own lines."""
    maps = []
    for i, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        maps.append(F.conv2d(x, weight, None if biases is None else biases[i], padding="same", dilation=dilation))
    if fusion == "sum":
        return torch.stack(maps).sum(0)
    if pool_weight is not None:
        p = F.conv2d(x.mean((2, 3), keepdim=True), pool_weight, pool_bias).expand(-1, -1, *x.shape[2:])
        maps.insert(0 if pool_first else len(maps), p)
    return activate(F.conv2d(activate(torch.cat(maps, 1), act), project_weight, project_bias), act)


def split_projection(weight: Tensor, channels: int, pool_first: bool) -> tuple[Tensor, Tensor]:
    """Split the projection weight (OUT, K, 1, 1) into the ``channels`` of the branches and those of the pool."""
    rest = weight.shape[1] - channels
    if pool_first:
        return weight[:, rest:], weight[:, :rest]
    return weight[:, :channels], weight[:, channels:]


def pooled(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation | None) -> Tensor:
    """The image pool: (N, C, H, W) -> (N, M, 1, 1)."""
    return _convolve(x.mean((2, 3), keepdim=True), weight, bias, act)


def pool_share(p: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Contribution of the pooled (N, M, 1, 1) vector to the projection, plus the projection's bias: (N, OUT)."""
    return F.linear(p.flatten(1), weight.flatten(1), bias)


def project(
    maps: Sequence[Tensor], weights: Sequence[Tensor], image_bias: Tensor | None, act: Activation | None
) -> Tensor:
    """``act(sum of conv2d(map, weight) + image_bias)``, with one bias per image and channel: (N, OUT, H, W).

    Each convolution adds the previous sum in its epilogue. A chain over B maps moves 3B - 1 maps in B launches; a copy
    of all maps side by side and one projection move 3B + 1 in two.
    """
    args, y = ((1, 1), (0, 0), (1, 1), 1), None
    for part, weight in zip(maps[:-1], weights[:-1], strict=True):
        y = conv2d_act(part, weight, None, None, *args, residual=y)
    return conv2d_act(maps[-1], weights[-1], None, act, *args, residual=y, image_bias=image_bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation | None) -> Tensor:
    return conv2d_act(x, weight, bias, act, (1, 1), (0, 0), (1, 1), 1)


def _check(x, weights, dilations, biases, project_weight, project_bias, pool, act, fusion: str) -> None:
    """Check the arguments that ``atrous_branches`` does not check."""
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f'aspp: act is {act!r}; use None, "relu", "relu6" or "leaky_relu"')
    if fusion not in ("concat", "sum"):
        raise ValueError(f'aspp: fusion is {fusion!r}; use "concat" or "sum"')
    if not weights or len(weights) != len(dilations) or (biases is not None and len(biases) != len(weights)):
        counts = f"{len(weights)} weights, {len(dilations)} dilations, {len(biases or weights)} biases"
        raise ValueError(f"aspp: {counts}; give one or more branches, and one of each per branch")
    if x.dim() != 4:
        raise ValueError(f"aspp: expected 4D input (got {x.dim()}D input); x must be (N, C, H, W)")
    if fusion == "sum":
        if any(t is not None for t in (project_weight, project_bias, *pool)):
            raise ValueError('aspp: fusion "sum" has neither projection nor image pool')
        return
    if project_weight is None:
        raise ValueError('aspp: fusion "concat" needs project_weight')
    channels = sum(w.shape[0] for w in weights) + (0 if pool[0] is None else pool[0].shape[0])
    if project_weight.shape[1:] != (channels, 1, 1):
        raise ValueError(f"aspp: project_weight is {tuple(project_weight.shape)}; it must be (OUT, {channels}, 1, 1)")
    if pool[0] is not None and pool[0].shape[1:] != (x.shape[1], 1, 1):
        raise ValueError(f"aspp: pool_weight is {tuple(pool[0].shape)}; it must be (M, {x.shape[1]}, 1, 1)")
