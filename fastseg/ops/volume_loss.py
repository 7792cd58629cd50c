"""Sums over the voxels of trilinearly upsampled logits, in slabs of output slices: what losses of volumes are made of.

A slab's planes are blended along z, and the op on maps sums over its slices. The backward walks over the slabs anew:
its memory is that of a slab and of the gradient at the small logits. Deterministic.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops.core.autograd import derived, differentiable
from fastseg.ops.core.dispatch import followed, kernels_run
from fastseg.ops.core.forms import Form, Forms, Reference, Verdict, forced_blocks
from fastseg.ops.core.labels import equal
from fastseg.ops.core.volume import Resize, Slices, blended, cross_entropy, interpolate, slices_of
from fastseg.ops.cpu.cross_entropy import request_of
from fastseg.ops.cpu.cross_entropy_rows import Criterion, can_walk, walk

SLAB = 2**22  # upsampled logits that a slab stands for
# Upsampled logits, and voxels of two classes and of one, below which torch's two steps are faster on a CPU
# (``benchmarks.studies.volumes_cpu``).
_FEW, _FEW_OF_TWO = 3 * 2**14, 2**14

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
            found = (function(*slab_of(logits, target, factor, n, part)[:3]) for part in _parts(logits, to))
            rows.append(torch.cat(list(found)) if each else torch.stack([sums.sum(0) for sums in found]).sum(0))
        return torch.stack(rows)

    @staticmethod
    def gradients(ctx, saved, slopes: Tensor):
        logits, target, factor = saved
        grad = torch.zeros(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        for n in range(logits.shape[0]):
            for part in _parts(logits, ctx.to):
                maps, labels, factors, repeated = slab_of(logits, target, factor, n, part)
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


def slab_of(
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
    of_maps: Callable[..., Tensor], logits: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion
) -> Tensor:
    """Cross entropy of volumes. ``of_maps`` is that of maps, and takes what ``upsample_cross_entropy`` takes."""
    request = _request(logits, target, weight, criterion)
    args = (of_maps, logits, target, weight, criterion)
    loss: Tensor = CROSS_ENTROPY.decide(request, logits).run(*args)
    return loss


# --- forms of the cross entropy


class Request(NamedTuple):
    """What decides between the forms."""

    torchs: str  # why torch's own lines must run, or ""
    blocks: str  # why a CPU cannot walk over blocks, or ""
    few: bool = False  # so few voxels that torch's steps on a CPU are faster
    kernels: bool = False  # they run on maps


def _request(logits: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion) -> Request:
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return Request("the class weights require a gradient", "")
    if followed(logits, weight):
        return Request("a follower of torch's own ops", "")
    if logits.shape[0] == 0:
        return Request("no volume", "")
    kernels, forced = kernels_run(logits), bool(forced_blocks())
    if not logits.is_cpu or (kernels and not forced):
        return Request("", "not on a CPU, or kernels run", False, kernels)
    few = not kernels and _few(logits.shape[1], target.numel())
    if few and not forced:
        return Request("", "few voxels", few)
    maps = request_of(logits, target, weight, criterion)
    why = maps.torchs or ("" if can_walk(logits, target) else "NaN or infinity")
    return Request("", why, few, kernels)


def _few(classes: int, voxels: int) -> bool:
    return voxels < _FEW_OF_TWO if classes <= 2 else classes * voxels < _FEW


class FewForm(Form):
    """On a CPU, torch's two steps for few voxels, which an ordinary call costs less than blocks."""

    name, path = "few", "torch"

    def refuses(self, request: Request) -> str:
        return request.torchs or ("" if request.few else "many voxels, or not on a CPU")

    def run(
        self, of_maps: Callable[..., Tensor], logits: Tensor, target: Tensor, weight: Tensor | None, c: Criterion
    ) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        autocast = torch.is_autocast_enabled("cpu")  # to enter its context takes 7 us
        with torch.autocast("cpu", enabled=False) if autocast else nullcontext():
            return cross_entropy(wide, target, weight, *c).to(_dtype_of_loss(logits))


class BlocksForm(Form):
    """On a CPU, blocks of rows of slices, and the gradient with the loss."""

    name, path = "blocks", "torch"

    def refuses(self, request: Request) -> str:
        return request.torchs or request.blocks

    def cost(self, request: Request) -> Verdict:
        return Verdict(not request.kernels, None, "kernels run")

    def run(
        self, of_maps: Callable[..., Tensor], logits: Tensor, target: Tensor, weight: Tensor | None, c: Criterion
    ) -> Tensor:
        return walk(logits, target, weight, c, _dtype_of_loss(logits))


class SlabsForm(Form):
    """The op on maps, slab by slab, and again for the gradient."""

    name, path = "slabs", "torch"

    def refuses(self, request: Request) -> str:
        return request.torchs

    def run(
        self, of_maps: Callable[..., Tensor], logits: Tensor, target: Tensor, weight: Tensor | None, c: Criterion
    ) -> Tensor:
        kind = _dtype_of_loss(logits)

        def losses(maps: Tensor, labels: Tensor, _: Tensor | None) -> Tensor:
            return of_maps(
                maps, labels, weight, c.ignore_index, "none", c.label_smoothing, align_corners=c.align_corners
            )

        def sums(maps: Tensor, labels: Tensor, _: Tensor | None) -> Tensor:
            return losses(maps, labels, None).flatten(1).sum(1, dtype=torch.float64)

        if c.reduction == "none":
            size = target.shape[1:]
            to = Resize((size[0], size[1], size[2]), (0.0, 0.0, 0.0), c.align_corners)
            return _Slabs.apply(logits, losses, target, None, to, True).to(kind)
        total = sums_of_volume(sums, logits, target, None, c.align_corners).sum()
        if c.reduction == "mean":
            counts = torch.stack([_counts(labels, logits.shape[1], c.ignore_index) for labels in target]).sum(0)
            share = counts.sum() if weight is None else (counts * weight.detach().double()).sum()
            total = torch.where(counts.sum() == 0, torch.nan, total / share.where(counts.sum() != 0, 1.0))
        return total.to(kind)


def _lines(
    of_maps: Callable[..., Tensor], logits: Tensor, target: Tensor, weight: Tensor | None, c: Criterion
) -> Tensor:
    return cross_entropy(logits, target, weight, *c)


CROSS_ENTROPY = Forms("upsample_cross_entropy3d", [FewForm(), BlocksForm(), SlabsForm(), Reference(_lines)])


def _dtype_of_loss(logits: Tensor) -> torch.dtype:
    autocast = torch.is_autocast_enabled(logits.device.type)
    return torch.promote_types(logits.dtype, torch.float32) if autocast else logits.dtype


def _counts(labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Voxels (C,) of each class, float64."""
    kept = labels[~equal(labels, ignore_index)]
    return torch.bincount(kept.int(), minlength=classes).double()
