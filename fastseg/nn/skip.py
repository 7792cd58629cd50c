"""Skip connections: a coarse map upsampled and put beside finer ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg import ops
from fastseg.nn.conv import watched
from fastseg.nn.fold import can_fold, folded, run_conv_norm_act, unfold
from fastseg.nn.norm import run_norm_act
from fastseg.nn.upsampling import UpsamplingBilinear2d
from fastseg.ops._batch_norm import Activation


def upsample_concat(
    x: Tensor, skips: Sequence[Tensor], up: nn.Module, *, crop: bool = False, up_first: bool = False
) -> Tensor:
    """``cat([*skips, up(x)], 1)``; doubled by interpolation, without a copy (``fastseg.ops.upsample_concat``).

    A transposed convolution writes its map, which is copied beside the skips as they are: no library's convolution
    writes into a part of a map.

    Args:
        x: (N, C, H, W), the coarse map.
        skips: (N, *, SH, SW) each, finer maps of one size.
        up: doubles H and W.
        crop: cut the skips to the window in their middle that has the size of ``up(x)``, as the U-Net without padding;
            else ``up(x)`` gets zeros around it up to the size of the skips, whose odd sides were halved downwards.
        up_first: ``cat([up(x), *skips], 1)``.

    Returns:
        (N, sum of channels, OH, OW).
    """
    doubled = not watched(up, UpsamplingBilinear2d) and up.size is None and up.scale_factor == 2
    y = None if doubled else up(x)
    height, width = (2 * n for n in x.shape[-2:]) if y is None else y.shape[-2:]
    rows, columns = skips[0].shape[-2] - height, skips[0].shape[-1] - width
    if crop:
        skips = [s[:, :, rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width] for s in skips]
    if doubled and (crop or not (rows or columns)):
        return ops.upsample_concat(x, skips, align_corners=True, up_first=up_first)
    y = up(x) if y is None else y
    if not crop and (rows or columns):
        y = F.pad(y, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return torch.cat([y, *skips] if up_first else [*skips, y], 1)


def run_upsample_concat_conv(
    deep: Tensor,
    low: Tensor,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | None,
    act: Activation | None,
    *,
    align_corners: bool = False,
    up_first: bool = True,
) -> Tensor:
    """``act(norm(conv(cat([interpolate(deep, low.shape[2:]), low], 1))))`` over torch modules, wherever they live.

    A plain 3x3 convolution goes through ``fastseg.ops.upsample_concat_conv2d``, which need not write the upsampled map;
    its norm is folded into it where it can be. Others are called.
    """
    if watched(conv, nn.Conv2d) or not _plain_3x3(conv):
        x = ops.upsample_concat(deep, [low], align_corners=align_corners, up_first=up_first)
        return run_conv_norm_act(x, conv, norm, act)
    options = {"align_corners": align_corners, "up_first": up_first}
    if norm is None:
        return ops.upsample_concat_conv2d(deep, low, conv.weight, conv.bias, act=act, **options)
    if can_fold(deep, conv, norm) and can_fold(low, conv, norm):
        return ops.upsample_concat_conv2d(deep, low, *folded(deep, conv, norm), act=act, **options)
    if norm.training:
        unfold(conv)
    y = ops.upsample_concat_conv2d(deep, low, conv.weight, conv.bias, **options)
    return run_norm_act(y, norm, act)


def _plain_3x3(conv: nn.Conv2d) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == 1 and conv.padding_mode == "zeros"
