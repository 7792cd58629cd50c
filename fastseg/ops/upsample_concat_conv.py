"""3x3 convolution of an upsampled map concatenated with another: the start of DeepLabV3+'s decoder."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.core.dispatch import (
    HAS_TRITON,
    autocast_dtype,
    followed,
    kernels_run,
    known,
    needs_grad,
    no_kernel,
)
from fastseg.ops.core.explain import Refusal
from fastseg.ops.core.forms import Form, Forms, Reference, Verdict
from fastseg.ops.core.kept import made_once
from fastseg.ops.core.layout import channels_last, like, new_map
from fastseg.ops.core.norm import ACTIVATIONS, Activation, activate
from fastseg.ops.core.override import overridable
from fastseg.ops.core.register import register
from fastseg.ops.core.upsample import is_finite
from fastseg.ops.cpu.packed import conv2d
from fastseg.ops.registered.upsample_taps import add_upsampled, fused_taps, low_resolution_taps, upsample_taps
from fastseg.ops.upsample_concat import upsample_concat, upsample_concat_ref

if HAS_TRITON:
    from fastseg.kernels.runtime.ceilings import Chip, chip_of
    from fastseg.kernels.upsample.conv import plan, unsupported

NAME = "upsample_concat_conv2d"


@overridable
def upsample_concat_conv2d(
    deep: Tensor,
    low: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: Activation | None = None,
    align_corners: bool = False,
    up_first: bool = True,
) -> Tensor:
    """``act(conv2d(cat([interpolate(deep, low.shape[2:], mode="bilinear", ...), low], 1), weight, bias, padding=1))``.

    The convolution of the upsampled channels is linear in the small map: it equals nine 1x1 convolutions of ``deep``,
    interpolated and shifted. This is the same sum in another order, borders included, so results differ by rounding
    only. From 32^2 to 128^2 pixels and 256 -> 256 channels, 19.3 GFLOP become at most 2.6. A cost model chooses between
    this form and the plain one (``fastseg.explain()`` shows it): on a GPU without gradients, on a CPU in fp32 and fp64
    with and without gradients.

    Args:
        deep: (N, C, h, w), the small map; not copied if channels_last.
        low: (N, CL, H, W), the map that ``deep`` is upsampled to.
        weight: (COUT, C + CL, 3, 3).
        bias: (COUT,).
        act: None, "relu", "relu6" or "leaky_relu".
        align_corners: as in ``torch.nn.functional.interpolate``.
        up_first: False for ``cat([low, interpolate(deep, ...)], 1)``.

    Returns:
        (N, COUT, H, W), in the memory format of ``deep``; in autocast's dtype under autocast.

    Raises:
        ValueError: a map is not 4-D or has no pixel, batches differ, weight or bias does not fit, or the activation is
            unknown.
        TypeError: a map is not floating point.

    Reference: the decoder of DeepLabV3+, Chen et al., arXiv:1802.02611.
    """
    _check(deep, low, weight, bias, act)
    dtype = torch.promote_types(autocast_dtype(deep), autocast_dtype(low))
    deep, low, weight = (t.to(dtype) for t in (deep, low, weight))
    bias = None if bias is None else bias.to(dtype)
    args = (deep, low, weight, bias, act, align_corners, up_first)
    if not known(*deep.shape):  # in a graph the registered op asks when it runs
        ours = kernels_run(deep) and not _wanted(deep, low, weight, bias)
        return (decided_op if ours else _plain)(*args)
    return _decided(*args, recorded=deep)


def upsample_concat_conv2d_ref(
    deep: Tensor,
    low: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: Activation | None = None,
    align_corners: bool = False,
    up_first: bool = True,
) -> Tensor:
    """``upsample_concat_conv2d`` in plain PyTorch."""
    x = upsample_concat_ref(deep, [low], align_corners=align_corners, up_first=up_first)
    return like(deep, activate(F.conv2d(x, weight, bias, padding=1), act, inplace=True))


def _check(deep: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> None:
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f'{NAME}: act is {act!r}; use None, "relu", "relu6" or "leaky_relu"')
    for label, t in (("deep", deep), ("low", low)):
        if t.dim() != 4 or 0 in t.shape[1:]:
            raise ValueError(f"{NAME}: {label} is {tuple(t.shape)}; it must be (N, C, H, W), none of C, H, W being 0")
        if not t.is_floating_point():
            raise TypeError(f"{NAME}: {label} is {t.dtype}; it must be a floating-point tensor")
    if deep.shape[0] != low.shape[0]:
        raise ValueError(
            f"{NAME}: deep is {tuple(deep.shape)}, low {tuple(low.shape)}; both must have the same batch size"
        )
    channels = deep.shape[1] + low.shape[1]
    if weight.dim() != 4 or weight.shape[1:] != (channels, 3, 3):
        raise ValueError(f"{NAME}: weight is {tuple(weight.shape)}; it must be (COUT, {channels}, 3, 3)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{NAME}: bias is {tuple(bias.shape)}; it must be ({weight.shape[0]},)")


# --- the plain form, and the two that do not store the upsampled map


def _plain(deep, low, weight, bias, act, align_corners: bool, up_first: bool) -> Tensor:
    x = upsample_concat(deep, [low], align_corners=align_corners, up_first=up_first)
    if followed(x, weight, bias) or needs_grad(x, weight, bias):
        y = activate(F.conv2d(x, weight, bias, padding=1), act, inplace=True)
    else:
        y = conv2d_act(x, weight, bias, act, (1, 1), (1, 1), (1, 1), 1)
    return like(deep, y)


def _halves(weight: Tensor, channels: int, up_first: bool) -> tuple[Tensor, Tensor]:
    """Split the filters: those of the upsampled channels, those of the others."""
    rest = weight.shape[1] - channels
    if up_first:
        return weight[:, :channels], channels_last(weight[:, channels:])
    return weight[:, rest:], channels_last(weight[:, :rest])


def _with_kernel(deep, low, weight, bias, act, align_corners: bool, up_first: bool) -> Tensor:
    up, rest = _halves(weight, deep.shape[1], up_first)
    base = F.conv2d(channels_last(low), rest, padding=1)
    y = fused_taps(low_resolution_taps(deep, up), base, bias, act, low.shape[2:], align_corners)
    return like(deep, y)


def at_low_resolution(deep, low, weight, bias, act, align_corners: bool, up_first: bool) -> Tensor:
    halves = lambda: _halves(weight, deep.shape[1], up_first)
    up, rest = made_once((weight,), ("halves", deep.shape[1], up_first), halves)
    taps = low_resolution_taps(deep, up)
    base = channels_last(conv2d(channels_last(low), rest, bias, padding=(1, 1)))
    if needs_grad(taps, base):
        y = upsample_taps(taps, base, low.shape[2:], align_corners)
    else:
        y = add_upsampled(base, taps, align_corners)  # into the convolution's own result
    return like(deep, activate(y, act, inplace=True))


# --- the choice between them


class Request(NamedTuple):
    """What decides between the forms."""

    sizes: tuple[int, ...]  # N, C, CL, COUT, h, w, H, W
    dtype: torch.dtype
    no_kernel: str  # why no Triton kernel runs on such tensors, or ""
    wanted: bool  # a gradient is
    followed: bool  # by a transform, a trace or forward-mode AD
    plain_cpu: bool  # CPU tensors of torch's own type
    finite: bool  # looked at where it decides
    chip: "Chip | None"
    threads: int = 1  # of a CPU


def _wanted(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _request(deep: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None) -> Request:
    tensors = [t for t in (deep, low, weight, bias) if t is not None]
    for t in tensors:
        if t.device != deep.device:
            raise ValueError(f"{NAME}: tensors on {deep.device} and {t.device}; move them to one device")
    return request_of(deep, low.shape[1], weight.shape[0], (low.shape[2], low.shape[3]), tensors)


def request_of(deep: Tensor, CL: int, COUT: int, size: tuple[int, int], tensors: Sequence[Tensor]) -> Request:
    """For the upsampling of ``deep`` to ``size``, beside CL other channels; ``tensors`` are all of the call."""
    N, C, h, w = deep.shape
    why = no_kernel(deep)
    plain = deep.is_cpu and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    chip = None if why else chip_of(deep.device)
    sizes = (N, C, CL, COUT, h, w, *size)
    threads = torch.get_num_threads() if plain else 1
    return Request(sizes, deep.dtype, why, _wanted(*tensors), followed(*tensors), plain, True, chip, threads)


class TapsForm(Form):
    """Our kernel upsamples nine taps, computed at low resolution, into the convolution of ``low``."""

    name = "taps"

    def refuses(self, r: Request) -> str:
        if r.no_kernel or r.followed:
            return r.no_kernel or "a transform, a trace or forward-mode AD: upsampling, then convolution"
        if r.wanted:
            return "gradients are needed: upsampling, then convolution"
        if r.sizes[0] == 0 or r.sizes[3] == 0:
            return "nothing to compute"
        return unsupported(*r.sizes)

    def cost(self, r: Request) -> Verdict:
        return plan(*r.sizes, r.dtype, r.chip)

    def run(self, *args) -> Tensor:
        return _with_kernel(*args)


class LowResolutionForm(Form):
    """The same sums on a CPU, strip by strip; with gradients too."""

    name, path = "low_resolution", "torch"

    def refuses(self, r: Request) -> str:
        if not r.no_kernel and not r.followed:
            return "kernels run"
        if r.followed:
            return "a graph, a transform or forward-mode AD: upsampling, then convolution"
        if not r.plain_cpu:
            return "no kernel for it, and not a plain CPU tensor"
        if r.dtype not in (torch.float32, torch.float64):
            return f"CPU tensor of {str(r.dtype).removeprefix('torch.')}: upsampling, then convolution"
        if r.sizes[0] == 0 or r.sizes[3] == 0:
            return "nothing to compute"
        return "" if r.finite else "NaN or infinity, which a strip's GEMM would spread: upsampling, then convolution"

    def cost(self, r: Request) -> Verdict:
        return plan_cpu(*r.sizes, threads=r.threads)

    def run(self, *args) -> Tensor:
        return at_low_resolution(*args)


class Upsampled(Reference):
    """The map is upsampled, then convolved."""

    def why(self, r: Request, refused: Sequence[Refusal]) -> str:
        return refused[1 if r.no_kernel or r.followed else 0].why


def _decided(deep, low, weight, bias, act, align_corners: bool, up_first: bool, recorded: Tensor | None = None):
    request = _request(deep, low, weight, bias)
    # Only values say whether strips may be multiplied; they are read where strips would be chosen, never for a kernel.
    if request.no_kernel and FORMS.choose(request).form.name == "low_resolution" and not is_finite(deep):
        request = request._replace(finite=False)
    return FORMS(request, deep, low, weight, bias, act, align_corners, up_first, recorded=recorded)


# Cost of an element of a strip, updated by a short GEMM, of an element written by interpolation or ``cat``, and of one
# of the filter, brought into the order of the taps at each call, in floating-point operations of a long GEMM. Threads
# share long GEMMs and copies alone. Fitted to times of 11 shapes on a busy machine, one thread, channels_last.
# Low resolution took 0.27 of the plain form's time for 256 + 48 -> 256 channels, 32^2 to 128^2; 0.68 for 64 + 16 -> 64;
# 1.2 for 32 + 16 -> 64. From 32^2 to 64^2 it took 1.05 for 128 + 16 -> 64 and 1.4 for 64 + 16 -> 64. With the backward
# it gained more: 0.20, 0.27 and (32 + 16 -> 32) 0.52. On two threads, nothing beside: 1.2 for 256 -> 128 and 1.5 for
# 128 -> 128, 8^2 to 16^2; 1.26 and 0.75, 16^2 to 32^2; 0.39 for 256 -> 256, 16^2 to 64^2; 0.70 for 128 -> 128, 32^2 to
# 128^2. On one, of the first two: 0.78, 0.91.
STRIP_ELEMENT, COPY_ELEMENT, FILTER_ELEMENT = 260, 70, 150


def plan_cpu(N: int, C: int, CL: int, COUT: int, h: int, w: int, H: int, W: int, *, threads: int = 1) -> Verdict:
    """The faster form on a CPU; both include the convolution of ``low``."""
    taps = 18 * N * h * w * C * COUT / threads + STRIP_ELEMENT * 3 * N * (H + h) * W * COUT
    taps += FILTER_ELEMENT * 9 * C * COUT
    plain = (18 * N * H * W * C * COUT + COPY_ELEMENT * N * H * W * (2 * C + CL)) / threads
    form = "nine taps at low resolution" if taps < plain else "upsampling, then convolution"
    says = f"{form}: model says {taps * 1e-9:.3g} against {plain * 1e-9:.3g} GFLOP's worth of time"
    return Verdict(taps < plain, None, says)


FORMS = Forms(NAME, [TapsForm(), LowResolutionForm(), Upsampled(_plain)])


# --- the registered op, for graphs


def _lines(deep, low, weight, bias, act, align_corners: bool, up_first: bool) -> Tensor:
    x = upsample_concat_ref(deep, [low], align_corners=align_corners, up_first=up_first)
    return like(deep, ACTIVATIONS[act or "none"](F.conv2d(x, weight, bias, padding=1)))  # out of place: exported


decided_op = register(
    f"{NAME}(Tensor deep, Tensor low, Tensor weight, Tensor? bias, str? act, bool align_corners, bool up_first) "
    "-> Tensor", _decided, _lines,
    lambda deep, low, weight, *_: new_map(deep, (deep.shape[0], weight.shape[0], *low.shape[2:])),
)  # fmt: skip
