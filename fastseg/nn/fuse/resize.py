"""Run a convolution on resized, concatenated maps without making them; the convolution, norm and activation exist."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg import ops
from fastseg.nn.fuse.children import Act
from fastseg.nn.fuse.conv_norm_act import can_fold, folded, run_conv_norm_act
from fastseg.nn.fuse.norm import run_norm_act
from fastseg.nn.fuse.watch import split_act, watched
from fastseg.ops.core.dispatch import followed, kernels_run
from fastseg.ops.core.kept import keeper, made_once
from fastseg.ops.core.layout import channels_last, memory_format_of
from fastseg.ops.nearest_conv import sums_pay
from fastseg.ops.pointwise import compose_pointwise
from fastseg.ops.upsample_concat_conv import FORMS as UPSAMPLED
from fastseg.ops.upsample_concat_conv import request_of


def not_same_size(conv: nn.Module, sizes: tuple[int, ...] = (1, 3)) -> str:
    """Why ``conv`` is not a plain square convolution that keeps the size of its map, or ""."""
    if why := watched(conv, nn.Conv2d):
        return why
    size = conv.kernel_size[0]
    same = conv.padding in ((size // 2, size // 2), "same")
    plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    if conv.kernel_size not in [(n, n) for n in sizes] or not same or not plain:
        return f"a convolution is not {' or '.join(f'{n}x{n}' for n in sizes)} with stride 1 that keeps the size"
    return ""


def run_resize_concat_conv(
    maps: Sequence[Tensor],
    size: tuple[int, int],
    conv: nn.Module,
    norm: nn.Module | None,
    act: Act,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """``act(norm(conv(cat([interpolate(m, size, mode=mode) for m in maps], 1))))`` with existing torch modules.

    A plain 1x1 or 3x3 convolution runs in ``fastseg.ops.resize_concat_conv2d``; its norm is folded if possible.
    """
    if not_same_size(conv):
        corners = {"align_corners": align_corners} if mode == "bilinear" else {}
        x = torch.cat([F.interpolate(m, size, mode=mode, **corners) for m in maps], 1)
        return run_conv_norm_act(x, conv, norm, act)
    maps = _as_filters(maps, conv)
    run = lambda weight, bias, name: ops.resize_concat_conv2d(
        maps, weight, bias, size=size, mode=mode, align_corners=align_corners, act=name
    )
    return _folded_or_after(maps, size, conv, norm, act, run)


def run_nearest_concat_conv(
    x: Tensor,
    skip: Tensor | None,
    size: tuple[int, int],
    conv: nn.Module,
    norm: nn.Module | None,
    act: Act,
    *,
    up_first: bool = True,
) -> Tensor:
    """``act(norm(conv(cat([interpolate(x, size), skip], 1))))``, nearest neighbours, with existing torch modules."""
    if not_same_size(conv, (3,)):
        y = F.interpolate(x, size, mode="nearest")
        y = y if skip is None else torch.cat([y, skip] if up_first else [skip, y], 1)
        return run_conv_norm_act(y, conv, norm, act)
    run = lambda weight, bias, name: ops.upsample_nearest_conv2d(
        x, skip, weight, bias, size=size, act=name, up_first=up_first
    )
    return _folded_or_after([x] if skip is None else [x, skip], size, conv, norm, act, run)


def taps_pay(x: Tensor, size: tuple[int, int], conv: nn.Conv2d) -> bool:
    """True if a 3x3 convolution of ``x``, resized bilinearly to ``size``, is computed from taps of ``x``."""
    tensors = [t for t in (x, conv.weight, conv.bias) if t is not None]
    return UPSAMPLED.choose(request_of(x, 0, conv.out_channels, size, tensors)).form.path != "reference"


def nearest_pays(x: Tensor, conv: nn.Conv2d) -> bool:
    """False where ``run_nearest_concat_conv`` has the products of the plain form, and a CPU folds at each call."""
    kept = not x.is_cpu or kernels_run(x) or keeper((conv.weight,)) is not None
    return kept or sums_pay(x, conv.weight)


def run_linear_fuse(
    maps: Sequence[Tensor],
    linears: Sequence[nn.Linear],
    size: tuple[int, int],
    conv: nn.Module,
    norm: nn.Module | None,
    act: Act,
    *,
    align_corners: bool = False,
) -> Tensor:
    """``act(norm(conv(cat([interpolate(linear(m), size) for each map], 1))))``, linear layers over channels.

    The 1x1 convolution follows each linear layer with nothing but a resize between, so both are one matrix. It is made
    at each call where that costs less than two products of the map, and once inside ``fastseg.frozen``. Modules that
    are watched are called, one after the other.
    """
    if any(watched(linear, nn.Linear) for linear in linears) or not_same_size(conv, (1,)):
        maps = [linear(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for m, linear in zip(maps, linears, strict=True)]
        return run_resize_concat_conv(maps, size, conv, norm, act, align_corners=align_corners)
    widths = [linear.out_features for linear in linears]
    maps = _as_filters(maps, conv)

    def run(weight: Tensor, bias: Tensor | None, name: str | None) -> Tensor:
        inputs, weights = [], []
        for m, linear, outer in zip(maps, linears, weight.split(widths, 1), strict=True):
            sources = (weight, linear.weight, linear.bias)
            if keeper(sources) is not None or _composing_pays(m, linear, outer):
                make = lambda outer=outer, linear=linear: compose_pointwise(outer, linear.weight, linear.bias)
                both, more = made_once(sources, ("composed", len(weights)), make)
                inputs.append(m)
                weights.append(both)
                bias = more if bias is None else bias if more is None else bias + more
            else:
                inputs.append(F.conv2d(m, linear.weight[:, :, None, None], linear.bias))
                weights.append(outer)
        return ops.resize_concat_conv2d(
            inputs, torch.cat(weights, 1), bias, size=size, align_corners=align_corners, act=name
        )

    return _folded_or_after(maps, size, conv, norm, act, run)


def _as_filters(maps: Sequence[Tensor], conv: nn.Conv2d) -> list[Tensor]:
    """The maps in channels_last if the convolution's weight is, as torch's convolutions lay out their results."""
    return [channels_last(m) for m in maps] if memory_format_of(conv.weight) == torch.channels_last else list(maps)


def _composing_pays(m: Tensor, linear: nn.Linear, outer: Tensor) -> bool:
    """True if the product of the matrices and one product of the map cost less than two products of the map."""
    if followed(m, outer):  # a graph or a trace holds for more sizes than those that it is made with
        return True
    pixels = m.shape[0] * m.shape[2] * m.shape[3]
    COUT, M, C = outer.shape[0], linear.out_features, linear.in_features
    return COUT * M * C + pixels * C * COUT <= pixels * (C * M + M * COUT)


def _folded_or_after(
    maps: Sequence[Tensor], size: tuple[int, int], conv: nn.Conv2d, norm, act: Act, run: Callable[..., Tensor]
) -> Tensor:
    """``run(weight, bias, activation)`` with the norm folded into both, else with norm and activation after it."""
    name, module = split_act(act)
    if module is not None:
        return module(_folded_or_after(maps, size, conv, norm, None, run))
    if norm is None:
        return run(conv.weight, conv.bias, name)
    wanted = torch.is_grad_enabled() and any(m.requires_grad for m in maps)
    if not wanted and _folding_pays(maps[0], size, conv) and can_fold(maps[0], conv, norm, always=True):
        return run(*folded(maps[0], conv, norm), name)
    return run_norm_act(run(conv.weight, conv.bias, None), norm, name)


def _folding_pays(x: Tensor, size: tuple[int, int], conv: nn.Conv2d) -> bool:
    """False where a CPU, at each call, would write more numbers of the filter than the norm writes of the map."""
    if not x.is_cpu or followed(x, conv.weight) or keeper((conv.weight,)) is not None:
        return True
    return kernels_run(x) or conv.weight[0].numel() <= x.shape[0] * size[0] * size[1]
