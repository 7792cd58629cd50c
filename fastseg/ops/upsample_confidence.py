"""Class map of low-resolution logits, and how sure each pixel is; of volumes too."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.confidence import full_precision, full_size, measured
from fastseg.ops.core.dispatch import HAS_TRITON, followed, known, no_kernel, what_follows
from fastseg.ops.core.forms import Form, Forms, Torchs, Verdict, forced_blocks
from fastseg.ops.core.override import overridable
from fastseg.ops.core.register import one_launch, register
from fastseg.ops.core.upsample import Factors, is_finite, is_moderate, output_size, too_large, unsupported, upsampling
from fastseg.ops.core.volume import interpolate as interpolate_volume
from fastseg.ops.core.volume import resize_of
from fastseg.ops.cpu.confidence import by_rows, of_few, topk_of_few
from fastseg.ops.volume_heads import of_volume

if HAS_TRITON:
    from fastseg.kernels.upsample.confidence import upsample_confidence_fwd

MEASURES = ("probability", "margin", "entropy")
_LARGE = 2**19  # upsampled logits; from here on a CPU works in strips, smaller maps stay in its caches
_UINT8_CLASSES = 256

Size = int | tuple[int, ...] | None
Factor = float | tuple[float, ...] | None


@overridable
def upsample_confidence(
    logits: Tensor,
    size: Size = None,
    scale_factor: Factor = None,
    *,
    measure: str = "probability",
    align_corners: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Upsample logits; the class of each pixel, and how sure it is, of ``p = interpolate(...).softmax(1)``.

    Maps are interpolated bilinearly, volumes trilinearly. The upsampled logits are never stored; of a volume, those of
    a few slices are. All dtypes are computed in fp32.

    Args:
        logits: (N, C, h, w) or (N, C, d, h, w), floating point, any layout.
        size: output height and width in pixels (of a volume: depth, height and width), or one number for all.
        scale_factor: output pixels per input pixel; give exactly one of ``size`` and ``scale_factor``.
        measure: "probability" (the largest p), "margin" (the largest less the second) or "entropy" (of p, in nats).
        align_corners: as in ``torch.nn.functional.interpolate``.
        dtype: of the classes, uint8, int64, or of a volume uint16; None means uint8 for up to 256 classes, and for more
            of them int64, or of a volume uint16.

    Returns:
        Classes (N, H, W) or (N, D, H, W), those of ``upsample_argmax``, and values of the same shape, float32. No
        gradient flows.

    Raises:
        TypeError: ``logits`` is not floating point, or ``dtype`` is none of the above.
        ValueError: ``logits`` is neither 4-D nor 5-D, or has no class or no pixel; both or neither of ``size`` and
            ``scale_factor`` are given; the measure is unknown; ``dtype`` is uint8 for more than 256 classes.

    Reference: ``torch.nn.functional.interpolate``, ``torch.softmax``.
    """
    name = "upsample_confidence"
    if measure not in MEASURES:
        raise ValueError(f"{name}: measure is {measure!r}; use one of {', '.join(MEASURES)}")
    _check(name, logits)
    dtype = _dtype(name, logits, dtype)
    logits = logits.detach()
    if logits.dim() == 5:
        to = resize_of(name, logits, size, scale_factor, align_corners)
        found = lambda v: measured(v, measure)
        H, W, factors, _ = to.plane
        known: dict = {"size": (H, W)} if factors[0] == 0 else {"scale_factor": factors}
        wide = torch.int64 if dtype == torch.uint16 else dtype
        of_maps = lambda maps: upsample_confidence(
            maps, **known, measure=measure, align_corners=align_corners, dtype=wide
        )
        return of_volume(name, of_maps, found, logits, to, (dtype, torch.float32), ((), ()))
    H, W, factors = output_size(name, logits, size, scale_factor)
    form = FORMS.decide(_request(logits, H, W), logits)
    classes, values = form.run(logits, H, W, factors, align_corners, measure, dtype == torch.int64)
    return classes.to(dtype), values.float()


class Request(NamedTuple):
    """What decides between the forms."""

    no_kernel: str  # as of ``OneKernel``
    sizes: tuple  # of the map, its strides, and the output; () where ``no_kernel`` decides, or a graph asks later
    large: bool
    walks: bool  # a finite map on a CPU that nothing follows; looked at where it decides
    few: int = 0  # its classes, where they are one or two


def _request(logits: Tensor, H: int, W: int) -> Request:
    why = no_kernel(logits) or what_follows(logits)
    sizes = () if why else known(tuple(logits.shape), logits.stride(), H, W)
    plain = logits.is_cpu and not followed(logits)
    large = plain and logits.shape[0] * logits.shape[1] * H * W >= _LARGE
    few = logits.shape[1] if plain and logits.shape[1] <= 2 else 0
    looked_at = ((large or few > 0) and bool(why)) or (plain and bool(forced_blocks()))
    return Request(why, sizes, large, looked_at and (is_moderate if few else is_finite)(logits), few)


def upsample_confidence_ref(
    logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, measure: str, wide: bool = True
) -> tuple[Tensor, Tensor]:
    """``upsample_confidence`` of a map in torch's own lines; the classes are int64."""
    return measured(full_size(logits, H, W, factors, align_corners), measure)


@overridable
def upsample_topk(
    logits: Tensor, k: int, size: Size = None, scale_factor: Factor = None, *, align_corners: bool = False
) -> tuple[Tensor, Tensor]:
    """Upsample logits; the ``k`` most probable classes of each pixel, and their probabilities.

    Maps are interpolated bilinearly, volumes trilinearly. On a CPU in strips of rows; elsewhere by torch's own steps,
    one image or a few slices at a time.

    Args:
        logits: (N, C, h, w) or (N, C, d, h, w), floating point.
        k: how many, at most C.
        size: output height and width in pixels (of a volume: depth, height and width), or one number for all.
        scale_factor: output pixels per input pixel; give exactly one of ``size`` and ``scale_factor``.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        Classes (N, k, H, W) or (N, k, D, H, W), int64, the most probable first, and probabilities of the same shape,
        float32.

    Raises:
        TypeError: ``logits`` is not floating point.
        ValueError: as ``upsample_confidence``, or ``k`` is not within 1 and C.
    """
    _check("upsample_topk", logits)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"upsample_topk: k is {k}; give 1 to {logits.shape[1]}, the number of classes")
    logits = logits.detach()

    def of_maps(maps: Tensor, H: int, W: int, factors: Factors, align_corners: bool) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = TOPK.decide(_topk_request(maps, H, W), maps).run(
            maps, H, W, factors, align_corners, k
        )
        return found

    if logits.dim() == 5:
        to = resize_of("upsample_topk", logits, size, scale_factor, align_corners)
        of_slab = lambda maps: of_maps(maps, *to.plane)
        whole = lambda v: _topk(v, k)
        return of_volume("upsample_topk", of_slab, whole, logits, to, (torch.int64, torch.float32), ((k,), (k,)))
    H, W, factors = output_size("upsample_topk", logits, size, scale_factor)
    if logits.shape[0] == 0:
        return (logits.new_empty((0, k, H, W), dtype=torch.int64), logits.new_empty((0, k, H, W), dtype=torch.float32))
    classes, values = of_maps(logits, H, W, factors, align_corners)
    return classes, values


def upsample_topk_ref(
    logits: Tensor, k: int, size: Size = None, scale_factor: Factor = None, *, align_corners: bool = False
) -> tuple[Tensor, Tensor]:
    """``upsample_topk`` in torch's own lines."""
    values, classes = _interpolated(logits, size, scale_factor, align_corners).softmax(1).topk(k, 1)
    return classes, values.float()


@overridable
def upsample_threshold(
    logits: Tensor,
    size: Size = None,
    scale_factor: Factor = None,
    *,
    threshold: float = 0.5,
    align_corners: bool = False,
    confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Upsample logits of one channel and threshold them: ``interpolate(logits, ...).sigmoid() > threshold``.

    Maps are interpolated bilinearly, volumes trilinearly.

    Args:
        logits: (N, 1, h, w) or (N, 1, d, h, w), floating point.
        size: output height and width in pixels (of a volume: depth, height and width), or one number for all.
        scale_factor: output pixels per input pixel; give exactly one of ``size`` and ``scale_factor``.
        threshold: a probability, in (0, 1).
        align_corners: as in ``torch.nn.functional.interpolate``.
        confidence: return the probabilities too.

    Returns:
        (N, H, W) or (N, D, H, W), uint8, 1 where the probability is larger; with ``confidence`` a pair: it, and the
        probabilities, float32.

    Raises:
        TypeError: ``logits`` is not floating point.
        ValueError: there is not one channel, or ``threshold`` is outside (0, 1).
    """
    _check("upsample_threshold", logits)
    if logits.shape[1] != 1 or not 0 < threshold < 1:
        raise ValueError(
            f"upsample_threshold: logits are {tuple(logits.shape)}, threshold is {threshold}; give one channel, and a "
            "probability"
        )
    if logits.dim() == 5:
        to = resize_of("upsample_threshold", logits, size, scale_factor, align_corners)
        v = interpolate_volume(full_precision(logits.detach()), to)[:, 0]
    else:
        H, W, factors = output_size("upsample_threshold", logits, size, scale_factor)
        v = full_size(logits.detach(), H, W, factors, align_corners)[:, 0]  # one plane: no larger than its result
    above = (v > math.log(threshold / (1 - threshold))).to(torch.uint8)
    return (above, v.sigmoid().float()) if confidence else above


def upsample_threshold_ref(
    logits: Tensor,
    size: Size = None,
    scale_factor: Factor = None,
    *,
    threshold: float = 0.5,
    align_corners: bool = False,
    confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``upsample_threshold`` in torch's own lines."""
    p = _interpolated(logits, size, scale_factor, align_corners)[:, 0].sigmoid()
    above = (p > threshold).to(torch.uint8)
    return (above, p.float()) if confidence else above


def _interpolated(logits: Tensor, size: Size, scale_factor: Factor, align_corners: bool) -> Tensor:
    mode = "trilinear" if logits.dim() == 5 else "bilinear"
    return F.interpolate(full_precision(logits.detach()), size, scale_factor, mode, align_corners)


def _check(name: str, logits: Tensor) -> None:
    if logits.dim() not in (4, 5) or logits.shape[1] == 0:
        raise ValueError(f"{name}: logits are {tuple(logits.shape)}; give (N, C, h, w) or (N, C, d, h, w) with C > 0")
    if not logits.is_floating_point():
        raise TypeError(f"{name}: logits are {logits.dtype}; give floating-point logits")


def _dtype(name: str, logits: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Of the classes."""
    classes, volume = logits.shape[1], logits.dim() == 5
    more = torch.uint16 if volume else torch.int64
    if dtype is None:
        dtype = torch.uint8 if classes <= _UINT8_CLASSES else more
    if dtype not in (torch.uint8, torch.int64, more):
        others = "torch.uint8, torch.uint16 or torch.int64" if volume else "torch.uint8 or torch.int64"
        raise TypeError(f"{name}: dtype is {dtype}; use {others}")
    if classes > {torch.uint8: _UINT8_CLASSES, torch.uint16: 2**16}.get(dtype, classes):
        raise ValueError(f"{name}: {classes} classes do not fit {str(dtype)[6:]}; use dtype=torch.int64")
    return dtype


def _topk(v: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logits (N, C, H, W) -> classes and probabilities (N, k, H, W)."""
    values, classes = v.topk(k, 1)
    largest = values[:, :1]
    return classes, (values - largest).exp_() / (v - largest).exp_().sum(1, keepdim=True)


def _topk_request(logits: Tensor, H: int, W: int) -> Request:
    plain = logits.is_cpu and not followed(logits)
    large = plain and logits.shape[0] * logits.shape[1] * H * W >= _LARGE
    few = logits.shape[1] if plain and logits.shape[1] <= 2 else 0
    looked_at = large or few > 0 or (plain and bool(forced_blocks()))
    return Request("there is no kernel", (), large, looked_at and (is_moderate if few else is_finite)(logits), few)


def _topk_by_image(
    logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, k: int
) -> tuple[Tensor, Tensor]:
    images = (logits,) if followed(logits) else logits.split(1)  # a trace holds for any number of images
    parts = [_topk(full_size(image, H, W, factors, align_corners), k) for image in images]
    classes, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return classes, values.float()


def _launch(
    logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, measure: str, wide: bool
):
    up = upsampling(logits, H, W, (factor_h, factor_w), align_corners)
    return upsample_confidence_fwd(logits.contiguous(), up, torch.int64 if wide else torch.uint8, measure)


def _plain(
    logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, measure: str, wide: bool
):
    classes, values = measured(full_size(logits, H, W, (factor_h, factor_w), align_corners), measure)
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return classes.to(torch.int64 if wide else torch.uint8).contiguous(), values.to(kind).contiguous()


def _fake(
    logits: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, measure: str, wide: bool
):
    shape, kind = (logits.shape[0], H, W), torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(shape, dtype=torch.int64 if wide else torch.uint8), logits.new_empty(shape, dtype=kind)


_op = register(
    "upsample_confidence(Tensor logits, SymInt H, SymInt W, float factor_h, float factor_w, bool align_corners, "
    "str measure, bool wide) -> (Tensor, Tensor)",
    _launch, _plain, _fake, asked=True,
    **one_launch("upsample_confidence", _launch, _plain, lambda logits, H, W, *_: unsupported(logits, H, W)),
)  # fmt: skip


class KernelForm(Form):
    """Our kernel, through the registered op; a graph asks for sizes when it runs."""

    name = "kernel"

    def refuses(self, r: Request) -> str:
        return r.no_kernel or (too_large(*r.sizes) if r.sizes else "")

    def run(self, logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, measure: str, wide: bool):
        return _op(logits, H, W, *factors, align_corners, measure, wide)


class FewForm(Form):
    """One or two classes on a CPU: no plane at all, or one, their difference."""

    name, path = "few", "torch"

    def refuses(self, r: Request) -> str:
        return "" if r.few and r.walks else "not one or two finite classes on a CPU"

    def run(self, logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, measure: str, wide: bool):
        return of_few(logits, H, W, factors, align_corners, measure)


class RowsForm(Form):
    """A CPU's strips of rows; nothing of full size is stored."""

    name, path = "rows", "torch"

    def refuses(self, r: Request) -> str:
        return "" if r.walks else "not a map of finite numbers on a CPU, or a small one"

    def cost(self, r: Request) -> Verdict:
        return Verdict(r.large, None, "few upsampled logits: they stay in the caches")

    def run(self, logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, measure: str, wide: bool):
        found, dtypes = lambda v: measured(v, measure), (torch.int64, torch.float32)
        return by_rows(found, logits, H, W, factors, align_corners, dtypes, (1, 1), squeeze=True)


FORMS = Forms("upsample_confidence", [KernelForm(), FewForm(), RowsForm(), Torchs(upsample_confidence_ref)])


class TopkFewForm(FewForm):
    """The same of the most probable classes."""

    def run(self, logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, k: int):  # type: ignore[override]
        return topk_of_few(logits, k, H, W, factors, align_corners)


class TopkRowsForm(RowsForm):
    """The same of the most probable classes."""

    def run(self, logits: Tensor, H: int, W: int, factors: Factors, align_corners: bool, k: int):  # type: ignore[override]
        found = lambda v: _topk(v, k)
        return by_rows(found, logits, H, W, factors, align_corners, (torch.int64, torch.float32), (k, k))


TOPK = Forms("upsample_topk", [TopkFewForm(), TopkRowsForm(), Torchs(_topk_by_image)])
