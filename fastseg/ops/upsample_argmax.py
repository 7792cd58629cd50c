"""Class map from low-resolution logits."""

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, followed, is_torchs, use_kernel
from fastseg.ops.core.override import overridable
from fastseg.ops.core.register import register
from fastseg.ops.core.upsample import output_size, unsupported, upsampling
from fastseg.ops.cpu.argmax import CPU_FORMS, argmax, request_of
from fastseg.ops.upsample_confidence import upsample_confidence

if HAS_TRITON:
    from fastseg.kernels.upsample.argmax import prunes, upsample_argmax_fwd

UINT8_CLASSES = 256


@overridable
def upsample_argmax(
    logits: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    *,
    align_corners: bool = False,
    dtype: torch.dtype | None = None,
    confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Upsample logits bilinearly and take the class of each pixel: ``interpolate(logits, ...).argmax(1)``.

    On a GPU the upsampled logits are never stored. fp16 and bf16 logits are interpolated in fp32, so that rounding
    makes no ties between classes.

    Args:
        logits: (N, C, h, w), floating point, any layout.
        size: output height and width in pixels, or one number for both.
        scale_factor: output pixels per input pixel; give exactly one of ``size`` and ``scale_factor``.
        align_corners: as in ``torch.nn.functional.interpolate``.
        dtype: uint8 or int64; None means uint8 for up to 256 classes, else int64.
        confidence: return the probability of that class too; ``upsample_confidence`` has other measures.

    Returns:
        Class indices (N, H, W). The first NaN counts as the largest; among equal logits the first class wins. No
        gradient flows through them. With ``confidence`` a pair: these, and the largest of the softmax, (N, H, W)
        float32.

    Raises:
        TypeError: ``logits`` is not floating point, or ``dtype`` is neither uint8 nor int64.
        ValueError: ``logits`` is not 4-D, or has no class or no pixel; both or neither of ``size`` and ``scale_factor``
            are given, or one is not positive; ``dtype`` is uint8 for more than 256 classes.

    Reference: ``torch.nn.functional.interpolate`` (mode "bilinear") and ``torch.argmax``.
    """
    if logits.dim() != 4 or logits.shape[1] == 0:
        raise ValueError(f"upsample_argmax: logits are {tuple(logits.shape)}; give (N, C, h, w) with C > 0")
    if not logits.is_floating_point():
        raise TypeError(f"upsample_argmax: logits are {logits.dtype}; give floating-point logits")
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
    if is_torchs(logits):
        return CPU_FORMS(request_of(logits, H, W), logits.detach(), *args)
    form = lambda: "pruned" if prunes(logits, upsampling(logits, H, W, factors, align_corners)) else "all classes"
    if not use_kernel("upsample_argmax", logits, unsupported=unsupported(logits, H, W), form=form):
        logits = logits.detach()
        if not logits.is_cpu or followed(logits):  # a graph holds torch's own ops; its values cannot be read
            return argmax(logits, *args)
        return CPU_FORMS(request_of(logits, H, W), logits, *args)
    return _op(logits.detach(), H, W, *factors, align_corners, dtype == torch.int64)


def upsample_argmax_ref(
    logits: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    *,
    align_corners: bool = False,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """``upsample_argmax`` in torch's own lines."""
    H, W, factors = output_size("upsample_argmax", logits, size, scale_factor)
    return argmax(logits.detach(), H, W, factors, align_corners, dtype)


def _launch(logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool):
    up = upsampling(logits, H, W, (factor_h, factor_w), align_corners)
    # Without pruning, neighbouring pixels of one class are read together: with classes innermost they lie C elements
    # apart.
    x = logits if prunes(logits, up) else logits.contiguous()
    return upsample_argmax_fwd(x, up, torch.int64 if wide else torch.uint8)


def _plain(logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool):
    return argmax(logits, H, W, (factor_h, factor_w), align_corners, torch.int64 if wide else torch.uint8)


def _fake(logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool):
    return logits.new_empty((logits.shape[0], H, W), dtype=torch.int64 if wide else torch.uint8)


_op = register(
    "upsample_argmax(Tensor logits, SymInt H, SymInt W, float factor_h, float factor_w, bool align_corners, bool wide) "
    "-> Tensor",
    _launch,
    _plain,
    _fake,
    refuses=lambda logits, H, W, *_: unsupported(logits, H, W),
)
