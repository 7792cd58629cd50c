"""Sums over the voxels of trilinearly upsampled logits, in slabs of output slices: what losses of volumes are made of.

A slab's planes are blended along z, and the op on maps sums over its slices. The backward walks over the slabs anew:
its memory is that of a slab and of the gradient at the small logits. Deterministic.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.autograd import derived, differentiable
from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.labels import equal
from fastseg.ops.core.volume import Resize, Slices, blended, interpolate, slices_of

SLAB = 2**22  # upsampled logits that a slab stands for

Sums = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # maps (S, C, h, w), target, factors -> sums (S, ...)


def sums_of_volume(
    sums: Sums, logits: Tensor, target: Tensor, factor: Tensor | None, align_corners: bool, *, whole: bool = False
) -> Tensor:
    """Sums (N, ...) over the voxels of each volume; differentiable in the logits.

    Args:
        sums: the same over the pixels of each map, of low-resolution maps.
        logits: (N, C, d, h, w).
        target: (N, D, H, W), or with classes (N, C, D, H, W).
        factor: (N, D, H, W), or None.
        align_corners: of the interpolation.
        whole: upsample the volume with torch's op, for a graph or a transform.
    """
    size = target.shape[-3:]
    to = Resize((size[0], size[1], size[2]), (0.0, 0.0, 0.0), align_corners)
    if whole:
        return at_full_size(sums, logits, target, factor, to)
    return _Slabs.apply(logits, sums, target, factor, to, False)


def at_full_size(sums: Sums, logits: Tensor, target: Tensor, factor: Tensor | None, to: Resize) -> Tensor:
    """The sums of logits upsampled by torch's op: its slices are maps of their final size."""
    return _each_at_full_size(sums, logits, target, factor, to).sum(1)


def _each_at_full_size(function: Sums, logits: Tensor, target: Tensor, factor: Tensor | None, to: Resize) -> Tensor:
    """What the function gives for each slice, (N, D, ...)."""
    wide = interpolate(logits.to(torch.promote_types(logits.dtype, torch.float32)), to)
    maps = wide.transpose(1, 2).flatten(0, 1)
    found = function(maps, _maps(target), None if factor is None else factor.flatten(0, 1))
    return found.unflatten(0, (target.shape[0], to.size[0]))


def _maps(target: Tensor) -> Tensor:
    """The slices of a target as maps, one after the other."""
    return target.transpose(1, 2).flatten(0, 1) if target.dim() == 5 else target.flatten(0, 1)


class _Slabs(torch.autograd.Function):
    """The sums of each volume, or with ``each`` what the function gives for every voxel."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, function: Sums, target: Tensor, factor: Tensor | None, to: Resize, each: bool
    ) -> Tensor:
        ctx.function, ctx.to, ctx.each = function, to, each
        ctx.save_for_backward(logits, target, factor)
        rows = []
        for n in range(logits.shape[0]):
            found = (function(*_slab(logits, target, factor, n, part)[:3]) for part in _parts(logits, to))
            rows.append(torch.cat(list(found)) if each else torch.stack([sums.sum(0) for sums in found]).sum(0))
        return torch.stack(rows)

    @staticmethod
    def gradients(ctx, saved, slopes: Tensor):
        logits, target, factor = saved
        grad = torch.zeros(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        for n in range(logits.shape[0]):
            for part in _parts(logits, ctx.to):
                maps, labels, factors, repeated = _slab(logits, target, factor, n, part)
                with torch.enable_grad():
                    maps.requires_grad_()
                    found = ctx.function(maps, labels, factors)
                slope = slopes[n, part[1] : part[2]] if ctx.each else slopes[n].expand_as(found)
                (d_maps,) = torch.autograd.grad(found, maps, slope)
                _add(grad[n], d_maps, repeated)
        return grad.to(logits.dtype), None, None, None, None, None

    @staticmethod
    def again(ctx, saved, slopes: Tensor):
        logits, target, factor = saved
        full = _each_at_full_size if ctx.each else at_full_size
        forward = lambda x: full(ctx.function, x, target, factor, ctx.to)
        return *derived(forward, (logits,), ctx.needs_input_grad[:1], slopes), None, None, None, None, None

    backward = staticmethod(differentiable(gradients, again))


def _parts(logits: Tensor, to: Resize) -> list[tuple[Slices, int, int]]:
    """The slabs: all slices, and the first and the end of each slab."""
    D, H, W = to.size
    kind = torch.promote_types(logits.dtype, torch.float32)
    slices = slices_of(logits.shape[2], to, kind)
    length = max(1, SLAB // (logits.shape[1] * max(H * W, logits.shape[3] * logits.shape[4])))
    return [(slices, begin, min(D, begin + length)) for begin in range(0, D, length)]


def _slab(
    logits: Tensor, target: Tensor, factor: Tensor | None, n: int, part: tuple[Slices, int, int]
) -> tuple[Tensor, Tensor, Tensor | None, Slices]:
    """Blended maps, labels and factors of a slab of volume ``n``, and how the maps were blended."""
    slices, begin, end = part
    own = Slices(slices.first[begin:end], slices.second[begin:end], slices.weight[begin:end])
    kind = torch.promote_types(logits.dtype, torch.float32)
    maps = blended(logits[n].detach(), own, kind, False)
    labels = target[n, ..., begin:end, :, :]
    labels = labels.transpose(0, 1) if target.dim() == 5 else labels
    return maps, labels, None if factor is None else factor[n, begin:end], own


def _add(grad: Tensor, d_maps: Tensor, slices: Slices) -> None:
    """Add the gradient at blended maps to that at the planes (C, d, h, w), in the order of the slices."""
    for d_map, first, second, t in zip(d_maps, *slices, strict=True):
        grad[:, first].add_(d_map, alpha=1 - t)
        grad[:, second].add_(d_map, alpha=t)


def volume_cross_entropy(
    of_maps: Callable[..., Tensor], logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
    reduction: str, label_smoothing: float, align_corners: bool,
) -> Tensor:  # fmt: skip
    """Cross entropy of volumes. ``of_maps`` is that of maps, and takes what ``upsample_cross_entropy`` takes."""
    kind = logits.dtype
    if torch.is_autocast_enabled(logits.device.type):
        kind = torch.promote_types(kind, torch.float32)
    trained = weight is not None and weight.requires_grad and torch.is_grad_enabled()
    if trained or followed(logits, weight) or logits.shape[0] == 0:
        size = target.shape[1:]
        wide = interpolate(logits, Resize((size[0], size[1], size[2]), (0.0, 0.0, 0.0), align_corners))
        options: dict = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return F.cross_entropy(wide, target.long(), None if weight is None else weight.to(wide.dtype), **options)

    def losses(maps: Tensor, labels: Tensor, _: Tensor | None) -> Tensor:
        return of_maps(maps, labels, weight, ignore_index, "none", label_smoothing, align_corners=align_corners)

    def sums(maps: Tensor, labels: Tensor, _: Tensor | None) -> Tensor:
        return losses(maps, labels, None).flatten(1).sum(1, dtype=torch.float64)

    if reduction == "none":
        size = target.shape[1:]
        to = Resize((size[0], size[1], size[2]), (0.0, 0.0, 0.0), align_corners)
        return _Slabs.apply(logits, losses, target, None, to, True).to(kind)
    total = sums_of_volume(sums, logits, target, None, align_corners).sum()
    if reduction == "mean":
        counts = torch.stack([_counts(labels, logits.shape[1], ignore_index) for labels in target]).sum(0)
        share = counts.sum() if weight is None else (counts * weight.detach().double()).sum()
        total = torch.where(counts.sum() == 0, torch.nan, total / share.where(counts.sum() != 0, 1.0))
    return total.to(kind)


def _counts(labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Voxels (C,) of each class, float64."""
    kept = labels[~equal(labels, ignore_index)]
    return torch.bincount(kept.int(), minlength=classes).double()
