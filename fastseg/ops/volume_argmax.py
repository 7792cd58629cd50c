"""The class volume of trilinearly upsampled logits: ``upsample_argmax`` of (N, C, d, h, w), in slabs of slices."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import followed, is_torchs, use_kernel
from fastseg.ops.core.forms import Cost, Form, Forms, Reference
from fastseg.ops.core.upsample import is_finite
from fastseg.ops.core.volume import Resize, Slices, argmax, blended, distinct, slices_of
from fastseg.ops.cpu.argmax import CPU_FORMS
from fastseg.ops.cpu.argmax import Request as MapRequest
from fastseg.ops.cpu.threads import each

SLAB = {"cpu": 2**20, "cuda": 2**26}  # values of a slab of blended planes, or of its upsampled logits
_SMALL = 2**18  # upsampled logits; fewer stay in the caches, where torch's two steps are as fast


class Request(NamedTuple):
    """What decides between the forms of a volume."""

    N: int
    C: int
    values: int  # upsampled logits


class SlabForm(Form):
    """Blend two planes for each output slice, then the op on maps: memory of a few slices, not of the volume."""

    name, path = "slabs", "torch"

    def refuses(self, request: Request) -> str:
        return "no volume" if request.N == 0 else ""

    def cost(self, request: Request) -> Cost | None:
        return Cost(request.values >= _SMALL, None, "few upsampled logits: they stay in the caches")

    def run(self, logits: Tensor, to: Resize, out: Tensor) -> Tensor:
        if logits.is_cpu:
            return volume_on_cpu(logits, to, out)
        from fastseg.ops.upsample_argmax import upsample_argmax  # the op on maps, which calls this file for volumes

        def classes_of(slab: Tensor) -> Tensor:
            H, W, factors, align_corners = to.plane
            target = {"size": (H, W)} if factors[0] == 0 else {"scale_factor": factors}
            dtype = torch.uint8 if slab.shape[1] <= 256 else torch.int64
            return upsample_argmax(slab, **target, align_corners=align_corners, dtype=dtype)

        return by_slabs(logits, slices_of(logits.shape[2], to, torch.float32), to, out, classes_of, finite=False)


def _reference(logits: Tensor, to: Resize, out: Tensor) -> Tensor:
    return out.copy_(argmax(logits, to, out.dtype))


VOLUME_FORMS = Forms("upsample_argmax3d", [SlabForm(), Reference(_reference)])


def volume_argmax(logits: Tensor, to: Resize, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The class volume (N, D, H, W), in ``out`` if it is given."""
    logits = logits.detach()
    if not is_torchs(logits):
        use_kernel("upsample_argmax", logits, unsupported="a volume: its slices are the op's own calls")
        if followed(logits):  # a graph holds torch's own ops
            classes = argmax(logits, to, dtype)
            return classes if out is None else out.copy_(classes)
    if out is None:
        out = torch.empty(logits.shape[0], *to.size, dtype=dtype, device=logits.device)
    N, C = logits.shape[:2]
    D, H, W = to.size
    request = Request(N, C, N * C * D * H * W)
    return VOLUME_FORMS(request, logits, to, out, recorded=logits)


def volume_on_cpu(logits: Tensor, to: Resize, out: Tensor, slices: Slices | None = None) -> Tensor:
    """``by_slabs`` with the form of the map's op that suits a slice; ``slices`` replace the trilinear ones."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    finite = all(is_finite(plane) for volume in logits for plane in volume.unbind(1))  # 16 bits are widened to sum
    form = CPU_FORMS.choose(MapRequest(1, logits.shape[1], True, finite)).form
    whole = finite and logits.shape[3:] == to.size[1:]  # an interpolation to the same size is a copy

    def classes_of(slab: Tensor) -> Tensor:
        return _first_of_the_largest(slab) if whole else form.run(slab, *to.plane, out.dtype)

    slices = slices or slices_of(logits.shape[2], to, kind)
    return by_slabs(logits, slices, to, out, classes_of, finite)


def _first_of_the_largest(slab: Tensor) -> Tensor:
    return slab.max(1).indices


def by_slabs(
    logits: Tensor, slices: Slices, to: Resize, out: Tensor, classes_of: Callable[[Tensor], Tensor], finite: bool
) -> Tensor:
    """Fill ``out`` (N, D, H, W) slab by slab: ``classes_of`` maps (S, C, h, w) to class maps (S, H, W)."""
    N, C, _, h, w = logits.shape
    D, H, W = to.size
    kind = torch.promote_types(logits.dtype, torch.float32)
    length = max(1, SLAB.get(logits.device.type, SLAB["cuda"]) // (C * max(h * w, H * W)))

    def fill(part: tuple[int, int]) -> None:
        n, begin = part
        end = min(D, begin + length)
        different, which = distinct(slices, begin, end)
        maps = classes_of(blended(logits[n], different, kind, finite))
        for z, i in enumerate(which, begin):
            out[n, z].copy_(maps[i])

    parts = [(n, z) for n in range(N) for z in range(0, D, length)]
    if logits.is_cpu:
        each(fill, parts)
    else:
        for part in parts:
            fill(part)
    return out
