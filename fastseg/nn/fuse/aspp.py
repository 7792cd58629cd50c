"""Run the branches and the projection of an ASPP in few launches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg import ops
from fastseg.nn.conv import SeparableConv2d
from fastseg.nn.fuse.children import batch_norm_args
from fastseg.nn.fuse.conv_norm_act import (
    Source,
    fold_all,
    foldable,
    run_conv_norm_act,
    source_if_foldable,
    source_of,
)
from fastseg.nn.fuse.sequential import PLAIN_FORWARDS, next_group, opened, run_layers
from fastseg.nn.fuse.watch import split_act, watched
from fastseg.ops import BatchNormArgs, batch_norm_act
from fastseg.ops.aspp import pool_share, project, split_projection
from fastseg.ops.atrous_conv2d import atrous_branches, atrous_map, atrous_maps
from fastseg.ops.core.dispatch import kernels_run, record_reference
from fastseg.ops.core.recompute import kept_as_recipe
from fastseg.ops.core.torch_private import foreach_copy_

CONCAT, SUM = "concat", "sum"


def run_aspp(
    x: Tensor,
    branches: Sequence[nn.Module],
    pool: Callable[[Tensor], Tensor] | None,
    projection: nn.Module,
    *,
    pool_first: bool = False,
) -> Tensor:
    """Compute ``projection(cat([*branches(x), pool(x)], 1))`` with existing modules of any name.

    Args:
        x: (N, C, H, W).
        branches: each a ``nn.Sequential`` of convolution, norm and ReLU, or any module that returns (N, *, H, W). If
            all are the former, without hooks and the like, they run as one op; else one after the other.
        pool: returns a vector per image, (N, *, 1, 1), which is spread over the map; or None.
        projection: a ``nn.Sequential`` that begins with a 1x1 convolution takes the maps one by one and the vector as a
            bias per image; any other module gets their concatenation.
        pool_first: True if the pool's channels come first in the projection's weight, False if last.

    Returns:
        (N, OUT, H, W).
    """
    parts = _run_branches(x, branches)
    vector = None if pool is None else pool(x)
    if vector is not None and vector.shape[2:] != (1, 1):  # a pooling to another size: its map is interpolated
        resized = F.interpolate(vector, parts[0].shape[2:], mode="bilinear", align_corners=False)
        parts, vector = [resized, *parts] if pool_first else [*parts, resized], None
    layers = opened(projection)
    conv, norm, act, stop = next_group(layers or ())
    if conv is None or not _pointwise(conv):
        return _project_called(parts, vector, projection, pool_first)
    if norm is not None and (len(parts) > 1 or vector is not None):
        source = source_if_foldable(parts[0], conv, norm, always=True)
        if source is not None:
            name, module = split_act(act)
            y = _project_folded(x, parts, vector, source, name, pool_first)
            return run_layers(y, [*([] if module is None else [module]), *layers[stop:]])
    if watched(conv, nn.Conv2d):
        return _project_called(parts, vector, projection, pool_first)
    if len(parts) > 1 and kernels_run(x):
        return run_layers(_project_each(x, parts, vector, conv, pool_first), layers[1:])
    if vector is None:
        return _project_called(parts, None, projection, pool_first)
    return run_layers(_project_shared(parts, vector, conv, pool_first), layers[1:])


def _project_called(parts: Sequence[Tensor], vector, projection: nn.Module, pool_first: bool) -> Tensor:
    """The projection as a module, of all maps side by side."""
    maps = parts if vector is None else [*parts, vector.expand(-1, -1, *parts[0].shape[2:])]
    maps = [*maps[-1:], *maps[:-1]] if pool_first and vector is not None else maps
    return projection(maps[0] if len(maps) == 1 else torch.cat(maps, 1))


def _project_shared(parts: Sequence[Tensor], vector: Tensor, conv: nn.Conv2d, pool_first: bool) -> Tensor:
    """The convolution of the maps side by side; the pooled branch, constant over an image, is a bias for each image."""
    maps = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    weight, pooled_weight = split_projection(conv.weight, maps.shape[1], pool_first)
    share = pool_share(vector, pooled_weight, conv.bias)
    with kept_as_recipe(maps):
        return project([maps], [weight], share, None)


def _pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def _project_each(x: Tensor, parts: Sequence[Tensor], vector, conv: nn.Conv2d, pool_first: bool) -> Tensor:
    """The projection, with gradients: each matrix product adds the previous sum, and no map is copied."""
    channels = [part.shape[1] for part in parts]
    weight, pooled_weight = split_projection(conv.weight, sum(channels), pool_first)
    if vector is not None:
        share = pool_share(vector, pooled_weight, conv.bias)
    else:
        zero = parts[0].new_zeros(conv.out_channels)
        share = (zero if conv.bias is None else conv.bias.to(zero.dtype)).expand(x.shape[0], -1)
    y = share[:, None]
    for part, own in zip(parts, weight.flatten(1).split(channels, 1), strict=True):
        y = torch.baddbmm(y, part.flatten(2).transpose(1, 2), own.t().expand(x.shape[0], -1, -1))
    return y.transpose(1, 2).unflatten(2, parts[0].shape[2:])


def _project_folded(x: Tensor, parts: Sequence[Tensor], vector, source: Source, act, pool_first: bool) -> Tensor:
    """The projection with folded norm: each map meets its own slice of the weight, and nothing is concatenated."""
    inputs, widths = source.weight.shape[1], []
    for part in parts:
        widths.append(part.shape[1])
    rest = inputs - sum(widths)  # the pool's channels
    place = rest if pool_first else 0
    slices = [(0, rest) if pool_first else (inputs - rest, inputs)]
    for width in widths:
        slices.append((place, place + width))
        place += width
    (pooled_weight, bias), *folds = fold_all(parts[0], [source] * len(slices), slices)
    weights, _ = zip(*folds, strict=True)
    share = bias.expand(x.shape[0], -1) if vector is None else pool_share(vector, pooled_weight, bias)
    return project(parts, weights, share, act)


def run_aspp_sum(x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
    """Sum ``conv(x)`` over existing dilated convolutions whose padding keeps H and W."""
    why = next(filter(None, map(_not_plain, convs)), "")
    if why:
        record_reference("aspp", x, why)
        return sum(conv(x) for conv in convs)
    biases = [conv.bias for conv in convs]
    return ops.aspp(
        x, [conv.weight for conv in convs], [conv.dilation[0] for conv in convs],
        None if None in biases else biases, fusion=SUM,
    )  # fmt: skip


def _run_branches(x: Tensor, branches: Sequence[nn.Module]) -> list[Tensor]:
    """The concatenated maps of the branches, (N, sum of channels, H, W), or one map each if they are not one op."""
    parts, why = [], ""
    for branch in branches:
        parts.append(_dense(branch))
        if not why and isinstance(parts[-1], str):
            why = parts[-1]
    why = why or _different(parts)
    if why:
        record_reference("aspp", x, why)
        return [
            branch(x) if isinstance(part, str) else run_conv_norm_act(x, part.conv, part.norm, "relu")
            for part, branch in zip(parts, branches, strict=True)
        ]
    own = kernels_run(x)  # else plain PyTorch would put the unfolded maps side by side for their norm
    if not foldable(x, parts, always=not own):
        return _joint_norm(x, parts, own)
    weights, biases = zip(*fold_all(x, parts), strict=True)
    return atrous_maps(x, weights, biases, _dilations(parts), "relu")


def _dilations(parts: Sequence[Source]) -> list[int]:
    dilations = []
    for part in parts:
        dilations.append(part.conv.dilation[0])
    return dilations


def _joint_norm(x: Tensor, parts: Sequence[Source], own: bool) -> list[Tensor]:
    """All branches as one map, and one norm over its channels; where a library writes several, each by itself."""
    _, norms, weights, biases, *_ = zip(*parts, strict=True)
    args = (x, weights, None if biases[0] is None else biases, _dilations(parts))
    z = atrous_map(*args) if own else atrous_branches(*args, None)
    if z is None:
        return [run_conv_norm_act(x, part.conv, part.norm, "relu") for part in parts]
    return [_norm_relu(z, norms, parts)]


def _norm_relu(z: Tensor, norms: Sequence[nn.BatchNorm2d], parts: Sequence[Source]) -> Tensor:
    """ReLU and several norms with equal options as one op over the channels of ``z``; statistics are per channel."""
    *_, means, variances, weights, biases, _ = zip(*parts, strict=True)
    first, joint = norms[0], [None] * 4
    training, momentum, kept = first.training or means[0] is None, 0.0, means[0] is not None
    if first.training:
        for norm in norms:
            args = batch_norm_args(norm)  # counts the batch
        training, momentum, kept = args.training, args.momentum, args.running_mean is not None
    if weights[0] is not None:
        joint[2:] = torch.cat(weights), torch.cat(biases)
    if kept:
        joint[:2] = torch.cat(means).detach(), torch.cat(variances).detach()
    y = batch_norm_act(z, BatchNormArgs(*joint, training, momentum, first.eps), "relu")
    if training and kept:
        widths = [norm.num_features for norm in norms]
        for merged, own in zip(joint, (means, variances), strict=False):
            foreach_copy_(list(own), merged.split(widths))
    return y


def _dense(branch: nn.Module) -> Source | str:
    """What folding reads of a branch of convolution, norm and ReLU, or why the branch must be called."""
    if isinstance(branch, SeparableConv2d):
        return "a separable branch"
    layers = tuple(branch._modules.values()) if type(branch).forward in PLAIN_FORWARDS else ()
    if len(layers) != 3 or type(layers[2]) is not nn.ReLU:
        return watched(branch, type(branch)) or f"a branch is {type(branch).__name__}, not convolution, norm and ReLU"
    conv, norm, relu = layers
    why = watched(branch, type(branch), norm, nn.BatchNorm2d, relu, nn.ReLU, conv, nn.Conv2d)
    return why or source_of(conv, norm)


def _not_plain(conv: nn.Module) -> str:
    """Why ``atrous_branches`` cannot replace the convolution, or ""."""
    return watched(conv, nn.Conv2d) or _uneven(conv)


def _uneven(*convs: nn.Conv2d) -> str:
    for conv in convs:
        (size, across), rate = conv.kernel_size, conv.dilation
        same = conv.padding == (rate[0] * (size // 2),) * 2 and conv.padding_mode == "zeros"
        even = size == across and size in (1, 3) and rate[0] == rate[1] and conv.stride == (1, 1)
        if not even or conv.groups != 1 or not same:
            return "a branch's convolution is not 1x1 or 3x3 with stride 1, one group and padding that keeps the size"
    return ""


def _different(parts: Sequence[Source]) -> str:
    """Why the branches cannot share one op and one norm, or ""."""
    first, convs = None, []
    for part in parts:
        convs.append(part.conv)
        norm = part.norm
        # A momentum of None is a cumulative average, which counts for itself.
        kind = (
            part.bias is None, norm.training, norm.eps, norm.momentum, norm.track_running_stats, norm.affine,
            part.mean is None,
        )  # fmt: skip
        first = kind if first is None else first
        if norm.momentum is None or kind != first:
            return "the branches differ in biases, or in options of their norms"
    return _uneven(*convs)
