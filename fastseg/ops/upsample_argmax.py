"""Class map from low-resolution logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, followed, is_torchs, known, no_kernel, what_follows
from fastseg.ops.core.explain import Refusal
from fastseg.ops.core.forms import Form, Forms
from fastseg.ops.core.override import overridable
from fastseg.ops.core.register import one_launch, register
from fastseg.ops.core.upsample import (
    Factors,
    interpolate,
    output_size,
    too_large,
    unsupported,
    upsampling,
    upsampling_of,
)
from fastseg.ops.core.volume import argmax as volume_in_torch
from fastseg.ops.core.volume import resize_of
from fastseg.ops.cpu.argmax import CPU_FORMS, Request, argmax, request_of
from fastseg.ops.upsample_confidence import upsample_confidence
from fastseg.ops.volume_argmax import volume_argmax

if HAS_TRITON:
    from fastseg.kernels.upsample.argmax import prunes, upsample_argmax_fwd

UINT8_CLASSES = 256


@overridable
def upsample_argmax(
    logits: Tensor,
    size: int | tuple[int, ...] | None = None,
    scale_factor: float | tuple[float, ...] | None = None,
    *,
    align_corners: bool = False,
    dtype: torch.dtype | None = None,
    confidence: bool = False,
    out: Any = None,
) -> Any:
    """Upsample logits and take the class of each pixel: ``interpolate(logits, ...).argmax(1)``.

    Maps are interpolated bilinearly, volumes trilinearly. On a GPU the upsampled logits are never stored; a CPU takes
    a few output slices of a volume at a time. fp16 and bf16 logits are interpolated in fp32, so that rounding makes no
    ties between classes.

    Args:
        logits: (N, C, h, w) or (N, C, d, h, w), floating point, any layout.
        size: output height and width in pixels (of a volume: depth, height and width), or one number for all.
        scale_factor: output pixels per input pixel; give exactly one of ``size`` and ``scale_factor``.
        align_corners: as in ``torch.nn.functional.interpolate``.
        dtype: uint8, int64, or of a volume uint16; None means that of ``out``, else uint8 for up to 256 classes, and
            for more of them int64, or of a volume uint16.
        confidence: return the probability of that class too; ``upsample_confidence`` has other measures.
        out: where the classes go: a tensor on the logits' device, or a numpy array, memory-mapped or not, of the
            result's shape and dtype. It is returned.

    Returns:
        Class indices (N, H, W) or (N, D, H, W). The first NaN counts as the largest; among equal logits the first
        class wins. No gradient flows through them. With ``confidence`` a pair: these, and the largest of the softmax,
        float32.

    Raises:
        TypeError: ``logits`` is not floating point, ``dtype`` is none of the above, or ``out`` has another one or is
            neither a tensor nor an array.
        ValueError: ``logits`` is neither 4-D nor 5-D, or has no class or no pixel; both or neither of ``size`` and
            ``scale_factor`` are given, or one is not positive; ``dtype`` cannot hold the classes; ``out`` has another
            shape or device, or is read-only; ``confidence`` is asked together with ``out``.

    Reference: ``torch.nn.functional.interpolate`` (mode "bilinear" or "trilinear") and ``torch.argmax``.
    """
    if logits.dim() not in (4, 5) or logits.shape[1] == 0:
        shape = "(N, C, h, w) or (N, C, d, h, w)"
        raise ValueError(f"upsample_argmax: logits are {tuple(logits.shape)}; give {shape} with C > 0")
    if not logits.is_floating_point():
        raise TypeError(f"upsample_argmax: logits are {logits.dtype}; give floating-point logits")
    if confidence and out is not None:
        raise ValueError("upsample_argmax: confidence is without out; see upsample_confidence")
    if logits.dim() == 5 and confidence:
        return upsample_confidence(logits, size, scale_factor, align_corners=align_corners, dtype=dtype)
    if logits.dim() == 5 or out is not None:
        return _into(out, logits, size, scale_factor, align_corners, dtype)
    classes = logits.shape[1]
    if dtype is None:
        dtype = torch.uint8 if classes <= UINT8_CLASSES else torch.int64
    if dtype not in (torch.uint8, torch.int64):
        raise TypeError(f"upsample_argmax: dtype is {dtype}; use torch.uint8 or torch.int64")
    if dtype == torch.uint8 and classes > UINT8_CLASSES:
        raise ValueError(f"upsample_argmax: {classes} classes do not fit uint8; use dtype=torch.int64")
    if confidence:
        return upsample_confidence(logits, size, scale_factor, align_corners=align_corners, dtype=dtype)
    H, W, factors = output_size("upsample_argmax", logits, size, scale_factor)
    args = (H, W, factors, align_corners, dtype)
    torchs = is_torchs(logits)
    form = FORMS.decide(request_of(logits, H, W) if torchs else _request(logits, H, W, factors, align_corners), logits)
    return form.run(logits.detach() if logits.requires_grad else logits, *args)


def _request(logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool) -> Request:
    why = no_kernel(logits)
    if why == "CPU tensor" and not followed(logits):  # in a graph there are no values to read
        return request_of(logits, H, W)
    why = why or what_follows(logits)
    sizes = () if why else known(tuple(logits.shape), logits.stride(), H, W, factors, align_corners)
    return Request(1, logits.shape[1], False, False, False, why, sizes)


def _into(
    out: Any, logits: Tensor, size: Any, scale_factor: Any, align_corners: bool, dtype: torch.dtype | None
) -> Any:
    """A volume, or a map that has a place."""
    name, classes, volume = "upsample_argmax", logits.shape[1], logits.dim() == 5
    place: Any = _tensor_of(name, out) if out is not None else None
    allowed = (torch.uint8, torch.uint16, torch.int64) if volume else (torch.uint8, torch.int64)
    wide = torch.uint16 if volume else torch.int64
    if dtype is None:
        dtype = place.dtype if place is not None else torch.uint8 if classes <= UINT8_CLASSES else wide
    if dtype not in allowed:
        raise TypeError(f"{name}: dtype is {dtype}; use one of {', '.join(map(str, allowed))}")
    if classes - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"{name}: {classes} classes do not fit {dtype}; use dtype={wide}")
    shape: tuple[int, ...]
    if volume:
        to = resize_of(name, logits, size, scale_factor, align_corners)
        shape = (logits.shape[0], *to.size)
    else:
        H, W, _ = output_size(name, logits, size, scale_factor)
        shape = (logits.shape[0], H, W)
    if place is not None and (place.shape != shape or place.device != logits.device):
        raise ValueError(f"{name}: out is {tuple(place.shape)} on {place.device}; give {shape} on {logits.device}")
    if place is not None and place.dtype != dtype:
        raise TypeError(f"{name}: out is {place.dtype}, dtype is {dtype}; give out of that dtype")
    if volume:
        filled = volume_argmax(logits, to, dtype, place)
        return filled if out is None else out
    place.copy_(upsample_argmax(logits, size, scale_factor, align_corners=align_corners, dtype=dtype))
    return out


def _tensor_of(name: str, out: Any) -> Tensor:
    """The memory of ``out`` as a tensor; a write to a file that is mapped for reading would end the process."""
    if isinstance(out, Tensor):
        return out
    if not hasattr(out, "__array_interface__"):
        raise TypeError(f"{name}: out is {type(out).__name__}; give a tensor or a numpy array")
    if not out.flags.writeable:
        raise ValueError(f'{name}: out is read-only; map a file with mode "r+" or "w+"')
    return torch.from_numpy(out)


def upsample_argmax_ref(
    logits: Tensor,
    size: int | tuple[int, ...] | None = None,
    scale_factor: float | tuple[float, ...] | None = None,
    *,
    align_corners: bool = False,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """``upsample_argmax`` in torch's own lines."""
    if logits.dim() == 5:
        return volume_in_torch(
            logits.detach(), resize_of("upsample_argmax", logits, size, scale_factor, align_corners), dtype
        )
    H, W, factors = output_size("upsample_argmax", logits, size, scale_factor)
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return interpolate(wide, H, W, factors, align_corners).argmax(1).to(dtype)


def _launch(logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool):
    up = upsampling(logits, H, W, (factor_h, factor_w), align_corners)
    # Without pruning, neighbouring pixels of one class are read together: with classes innermost they lie C elements
    # apart.
    x = logits if prunes(logits.shape[1], up) else logits.contiguous()
    return upsample_argmax_fwd(x, up, torch.int64 if wide else torch.uint8)


def _plain(logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool):
    return argmax(logits, H, W, (factor_h, factor_w), align_corners, torch.int64 if wide else torch.uint8)


def _fake(logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool):
    return logits.new_empty((logits.shape[0], H, W), dtype=torch.int64 if wide else torch.uint8)


class KernelForm(Form):
    """Our kernel, through the registered op; a graph asks for sizes when it runs."""

    name = "kernel"

    def refuses(self, r: Request) -> str:
        return r.no_kernel or (too_large(*r.sizes) if r.sizes else "")

    def why(self, r: Request, refused: Sequence[Refusal]) -> str:
        if not r.sizes:
            return ""
        shape, _, *size_and_place = r.sizes
        return "pruned" if prunes(shape[1], upsampling_of(shape[2:], *size_and_place)) else "all classes"

    def run(self, logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype) -> Tensor:
        return _op(logits, H, W, *factors, align_corners, dtype == torch.int64)


FORMS = Forms("upsample_argmax", [KernelForm(), *CPU_FORMS])

_op = register(
    "upsample_argmax(Tensor logits, SymInt H, SymInt W, float factor_h, float factor_w, bool align_corners, bool wide) "
    "-> Tensor",
    _launch, _plain, _fake, asked=True,
    **one_launch("upsample_argmax", _launch, _plain, lambda logits, H, W, *_: unsupported(logits, H, W)),
)  # fmt: skip
