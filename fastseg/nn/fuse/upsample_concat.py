"""Skip connections: upsample a coarse map and concatenate it with finer ones."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg import ops
from fastseg.nn.conv import SeparableConv2d
from fastseg.nn.fuse.children import Act
from fastseg.nn.fuse.conv_norm_act import can_fold, convolve, folded, run_conv_norm_act
from fastseg.nn.fuse.norm import run_norm_act
from fastseg.nn.fuse.sequential import next_group, opened, run_layers
from fastseg.nn.fuse.watch import split_act, watched
from fastseg.nn.upsampling import UpsamplingBilinear2d
from fastseg.ops.core.bilinear_taps import resized_by_index
from fastseg.ops.core.dispatch import followed, kernels_run
from fastseg.ops.core.recompute import recipe_of, remember
from fastseg.ops.core.sizes import by_index, same_number


def upsample_concat(
    x: Tensor, skips: Sequence[Tensor], up: nn.Module, *, crop: bool = False, up_first: bool = False
) -> Tensor:
    """``cat([*skips, up(x)], 1)``; without a copy if ``up`` interpolates (``fastseg.ops.upsample_concat``).

    A transposed convolution writes its own map, which is copied beside the skips: no library's convolution writes into
    a part of a map.

    Args:
        x: (N, C, H, W), the coarse map.
        skips: (N, *, SH, SW) each, finer maps of one size.
        up: doubles H and W.
        crop: True crops the skips to their central window of the size of ``up(x)``, as the U-Net without padding; False
            pads ``up(x)`` with zeros to the size of the skips, whose odd sides were halved downwards.
        up_first: True for ``cat([up(x), *skips], 1)``.

    Returns:
        (N, sum of channels, OH, OW).
    """
    doubled = not watched(up, UpsamplingBilinear2d) and up.size is None and up.scale_factor == 2
    doubled = doubled and up.mode == "bilinear" and up.align_corners
    y = None if doubled else convolve(up, x)
    height, width = (2 * n for n in x.shape[-2:]) if y is None else y.shape[-2:]
    rows, columns = skips[0].shape[-2] - height, skips[0].shape[-1] - width
    if crop:
        skips = [s[:, :, rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width] for s in skips]
    fits = crop or (same_number(rows, 0) and same_number(columns, 0))
    if doubled and fits:
        join = partial(_upsampled_beside, up_first=up_first)
        return _remembered(join(x, *skips), (x, *skips), join)
    y = up(x) if y is None else y
    if not fits:
        y = _framed(y, rows, columns)
    parts = (y, *skips) if up_first else (*skips, y)
    return _remembered(_beside(*parts), parts, _beside)


def _framed(y: Tensor, rows: int, columns: int) -> Tensor:
    """Pad by so many rows and columns of zeros, half of them before; no guard on symbolic numbers."""
    if by_index(rows, columns):
        return resized_by_index(y, (y.shape[2] + rows, y.shape[3] + columns), (rows // 2, columns // 2))
    return F.pad(y, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def run_upsample_concat(
    deep: Tensor, low: Tensor, block: nn.Module, *, align_corners: bool = False, up_first: bool = True
) -> Tensor:
    """Compute ``block(cat([interpolate(deep, low.shape[2:]), low], 1))`` with an existing block.

    For a ``Sequential`` that begins with a convolution, the upsampled map is not stored if that is faster.
    """
    options = {"align_corners": align_corners, "up_first": up_first}
    layers = opened(block) or [block]
    conv, norm, act, stop = next_group(layers)
    if conv is not None:
        y = run_upsample_concat_conv(deep, low, conv, norm, act, **options)
        return run_layers(y, layers[stop:])
    first = layers[0].depthwise if type(layers[0]) is SeparableConv2d else layers[0]
    return block(upsampled_beside(deep, low, first, **options))


def upsampled_beside(x: Tensor, skip: Tensor, conv: nn.Module, *, align_corners: bool, up_first: bool = True) -> Tensor:
    """``cat([interpolate(x, skip.shape[2:], mode="bilinear"), skip], 1)`` without a copy of the upsampled map.

    ``conv`` takes the result; if it is watched, torch's functions compute it.
    """
    if watched(conv, nn.Conv2d):
        y = F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=align_corners)
        return torch.cat([y, skip] if up_first else [skip, y], 1)
    join = partial(_upsampled_beside, up_first=up_first, align_corners=align_corners)
    return _remembered(join(x, skip), (x, skip), join)


def run_upsample_concat_conv(
    deep: Tensor,
    low: Tensor,
    conv: nn.Module,
    norm: nn.Module | None,
    act: Act,
    *,
    align_corners: bool = False,
    up_first: bool = True,
) -> Tensor:
    """``act(norm(conv(cat([interpolate(deep, low.shape[2:]), low], 1))))`` with existing torch modules.

    A plain 3x3 convolution runs in ``fastseg.ops.upsample_concat_conv2d``, which need not store the upsampled map; its
    norm is folded if possible. Other modules are called.
    """
    name, module = split_act(act)
    if module is not None:
        options = {"align_corners": align_corners, "up_first": up_first}
        return module(run_upsample_concat_conv(deep, low, conv, norm, None, **options))
    plain = not watched(conv, nn.Conv2d) and _plain_3x3(conv)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (deep, low, conv.weight))
    fold = plain and norm is not None and not wanted and can_fold(low, conv, norm)
    if not plain or (wanted and kernels_run(deep)):  # its gradients have no kernel; the concatenated map has a recipe
        x = upsampled_beside(deep, low, conv, align_corners=align_corners, up_first=up_first)
        return run_conv_norm_act(x, conv, norm, name)
    options = {"align_corners": align_corners, "up_first": up_first}
    if norm is None:
        return ops.upsample_concat_conv2d(deep, low, conv.weight, conv.bias, act=name, **options)
    if fold:
        return ops.upsample_concat_conv2d(deep, low, *folded(deep, conv, norm), act=name, **options)
    y = ops.upsample_concat_conv2d(deep, low, conv.weight, conv.bias, **options)
    return run_norm_act(y, norm, name)


def _plain_3x3(conv: nn.Conv2d) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == 1 and conv.padding_mode == "zeros"


def _beside(*maps: Tensor) -> Tensor:
    return torch.cat(maps, 1)


def _upsampled_beside(x: Tensor, *skips: Tensor, up_first: bool, align_corners: bool = True) -> Tensor:
    return ops.upsample_concat(x, skips, align_corners=align_corners, up_first=up_first)


def _remembered(y: Tensor, parts: tuple[Tensor, ...], join: Callable[..., Tensor]) -> Tensor:
    """``y = join(*parts)``; the convolution after it saves the sources of the parts, and its backward joins them again.

    Not done if the parts themselves would be saved, which are as large as ``y``.
    """
    if followed(y) or not (y.requires_grad and kernels_run(y)):
        return y
    return remember(y, parts, join) if any(map(recipe_of, parts)) else y
