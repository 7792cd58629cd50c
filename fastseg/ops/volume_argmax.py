"""The class volume of trilinearly upsampled logits: ``upsample_argmax`` of (N, C, d, h, w), in slabs of slices."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.kernels.runtime.sizes import source_scale
from fastseg.ops.core.dispatch import (
    HAS_TRITON,
    followed,
    is_torchs,
    kernels_run,
    no_kernel,
    record_reference,
    what_follows,
)
from fastseg.ops.core.forms import Form, Forms, Reference, Verdict
from fastseg.ops.core.register import one_launch, register
from fastseg.ops.core.upsample import is_finite
from fastseg.ops.core.volume import Resize, Slices, argmax, blended, distinct, slices_of
from fastseg.ops.cpu.argmax import SLICES
from fastseg.ops.cpu.argmax import Request as MapRequest
from fastseg.ops.cpu.threads import each

if HAS_TRITON:
    from fastseg.kernels.upsample.sizes import Axis
    from fastseg.kernels.upsample.volume_argmax import upsample_argmax3d_fwd

DTYPES = (torch.uint8, torch.uint16, torch.int64)
SLAB = 2**19  # values of a slab of blended planes, or of its upsampled logits
_SLAB_OF_A_GPU = 2**24
_SMALL = 2**18  # upsampled logits; fewer stay in the caches, where torch's two steps are as fast


class Request(NamedTuple):
    """What decides between the forms of a volume."""

    N: int
    C: int
    values: int  # upsampled logits
    cpu: bool
    no_kernel: str  # why there is none, or ""


class KernelForm(Form):
    """One kernel."""

    name = "kernel"

    def refuses(self, request: Request) -> str:
        return request.no_kernel

    def run(self, logits: Tensor, to: Resize, out: Tensor) -> Tensor:
        return out.copy_(_op(logits, *to.size, *to.factors, to.align_corners, DTYPES.index(out.dtype)))


class OneClassForm(Form):
    """One class is the class of every voxel."""

    name, path = "one_class", "torch"

    def refuses(self, request: Request) -> str:
        return "" if request.C == 1 else "more classes than one"

    def run(self, logits: Tensor, to: Resize, out: Tensor) -> Tensor:
        return out.zero_()


class SlabForm(Form):
    """Blend two planes for each output slice, then the op on maps: memory of a few slices, not of the volume."""

    name, path = "slabs", "torch"

    def refuses(self, request: Request) -> str:
        return "no volume" if request.N == 0 else "" if request.cpu else "a CPU's form"

    def cost(self, request: Request) -> Verdict | None:
        return Verdict(request.values >= _SMALL, None, "few upsampled logits: they stay in the caches")

    def run(self, logits: Tensor, to: Resize, out: Tensor) -> Tensor:
        return volume_on_cpu(logits, to, out)


def _reference(logits: Tensor, to: Resize, out: Tensor) -> Tensor:
    return out.copy_(argmax(logits, to, out.dtype))


VOLUME_FORMS = Forms("upsample_argmax3d", [KernelForm(), OneClassForm(), SlabForm(), Reference(_reference)])


def volume_argmax(logits: Tensor, to: Resize, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The class volume (N, D, H, W), in ``out`` if it is given."""
    logits, why = logits.detach(), "CPU tensor"
    if not is_torchs(logits):
        why = _unsupported(logits, to) or no_kernel(logits)
    if followed(logits):  # a graph holds the registered op, a transform torch's own ops
        if not what_follows(logits) and not why and kernels_run(logits):
            classes = _op(logits, *to.size, *to.factors, to.align_corners, DTYPES.index(dtype))
        else:
            record_reference("upsample_argmax3d", logits, why or "a follower of torch's own ops")
            classes = argmax(logits, to, dtype)
        return classes if out is None else out.copy_(classes)
    if out is None:
        out = torch.empty(logits.shape[0], *to.size, dtype=dtype, device=logits.device)
    N, C = logits.shape[:2]
    D, H, W = to.size
    request = Request(N, C, N * C * D * H * W, logits.is_cpu, why)
    return VOLUME_FORMS(request, logits, to, out, recorded=logits)


def volume_on_cpu(logits: Tensor, to: Resize, out: Tensor, slices: Slices | None = None) -> Tensor:
    """``by_slabs`` with the form of the map's op that suits a slice; ``slices`` replace the trilinear ones."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    finite = all_finite(logits)
    form = SLICES.choose(MapRequest(1, logits.shape[1], True, finite)).form
    whole = finite and logits.shape[3:] == to.size[1:]  # an interpolation to the same size is a copy

    def classes_of(slab: Tensor) -> tuple[Tensor]:
        return (_first_of_the_largest(slab) if whole else form.run(slab, *to.plane, out.dtype),)

    slices = slices or slices_of(logits.shape[2], to, kind)
    by_slabs(logits, slices, to, (out,), classes_of, finite)
    return out


def all_finite(logits: Tensor) -> bool:
    """``is_finite`` of volumes, plane by plane: 16 bits are widened to be summed."""
    return all(is_finite(plane) for volume in logits for plane in volume.unbind(1))


def _first_of_the_largest(slab: Tensor) -> Tensor:
    return slab.max(1).indices


def by_slabs(
    logits: Tensor, slices: Slices, to: Resize, outs: tuple[Tensor, ...],
    found: Callable[[Tensor], tuple[Tensor, ...]], finite: bool, slab: int | None = None,
) -> None:  # fmt: skip
    """Fill ``outs`` (N, D, H, W) or (N, K, D, H, W) slab by slab.

    ``found`` maps (S, C, h, w) to maps (S, H, W) or (S, K, H, W), one for each of ``outs``. A slab has about ``slab``
    values, by default ``SLAB``. Slabs of a CPU run on threads.
    """
    N, C, _, h, w = logits.shape
    D, H, W = to.size
    kind = torch.promote_types(logits.dtype, torch.float32)
    length = max(1, (slab or SLAB) // (C * max(h * w, H * W)))

    def fill(part: tuple[int, int]) -> None:
        n, begin = part
        end = min(D, begin + length)
        different, which = distinct(slices, begin, end)
        results = found(blended(logits[n], different, kind, finite))
        for out, maps in zip(outs, results, strict=True):
            for z, i in enumerate(which, begin):
                out[n][..., z, :, :].copy_(maps[i])

    parts = [(n, z) for n in range(N) for z in range(0, D, length)]
    if logits.is_cpu and not kernels_run(logits):
        each(fill, parts)
    else:
        for part in parts:
            fill(part)


def over_slices(
    of_maps: Callable[[Tensor], tuple[Tensor, ...]], logits: Tensor, to: Resize, outs: tuple[Tensor, ...]
) -> None:
    """Fill ``outs`` with what ``of_maps`` finds in each slice of trilinearly upsampled logits."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    slices = slices_of(logits.shape[2], to, kind)
    by_slabs(logits, slices, to, outs, of_maps, all_finite(logits), None if logits.is_cpu else _SLAB_OF_A_GPU)


# --- the registered op


def _unsupported(x: Tensor, to: Resize) -> str:
    """Why the kernel cannot take these sizes, or "". Offsets inside one plane are 32 bits wide."""
    D, H, W = to.size
    if any(isinstance(n, torch.SymInt) for n in (*x.shape, D, H, W)):
        return ""
    last = sum((size - 1) * stride for size, stride in zip(x.shape[3:], x.stride()[3:], strict=True))
    return "a plane of 2^31 elements or more" if last >= 2**31 or H * W >= 2**31 else ""


def _resize(args: tuple) -> tuple[Resize, torch.dtype]:
    D, H, W, factor_d, factor_h, factor_w, align_corners, kind = args
    return Resize((D, H, W), (factor_d, factor_h, factor_w), align_corners), DTYPES[kind]


def _launch(logits: Tensor, *args) -> Tensor:
    to, dtype = _resize(args)
    a, b, c = (
        Axis(low, full, source_scale(low, full, to.align_corners, factor))
        for low, full, factor in zip(logits.shape[2:], to.size, to.factors, strict=True)
    )
    return upsample_argmax3d_fwd(logits, (a, b, c), to.align_corners, dtype)


def _plain(logits: Tensor, *args) -> Tensor:
    return argmax(logits, *_resize(args))


def _fake(logits: Tensor, *args) -> Tensor:
    to, dtype = _resize(args)
    return logits.new_empty((logits.shape[0], *to.size), dtype=dtype)


_op = register(
    "upsample_argmax3d(Tensor logits, SymInt D, SymInt H, SymInt W, float factor_d, float factor_h, float factor_w, "
    "bool align_corners, int kind) -> Tensor",
    _launch, _plain, _fake,
    **one_launch("upsample_argmax3d", _launch, _plain, lambda x, *args: _unsupported(x, _resize(args)[0])),
)  # fmt: skip
