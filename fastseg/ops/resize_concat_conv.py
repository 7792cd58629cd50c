"""Convolution of several maps that are resized to one size and concatenated: the fusion of a decoder's levels.

A resize has weights that sum to one at every output pixel, and acts on each channel alone, so it commutes with a 1x1
convolution, bias included. A 3x3 convolution of a bilinear resize is nine 1x1 taps of the small map, interpolated and
shifted (``fastseg.ops.registered.upsample_taps``). Either way the small maps are multiplied at their own size, and
neither the resized maps nor their concatenation is written.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.core.dispatch import autocast_dtype, followed, kernels_run, needs_grad
from fastseg.ops.core.explain import Refusal, in_reference
from fastseg.ops.core.forms import Form, Forms, Torchs
from fastseg.ops.core.kept import keeper, made_once
from fastseg.ops.core.layout import channels_last, like
from fastseg.ops.core.norm import ACTIVATIONS, Activation, activate
from fastseg.ops.core.override import overridable
from fastseg.ops.core.sizes import is_open, same_number
from fastseg.ops.core.upsample import is_finite
from fastseg.ops.cpu.packed import conv2d
from fastseg.ops.cpu.upsampled_pixels import add_few_pixels, few_pixels
from fastseg.ops.registered.upsample_taps import add_upsampled, fused_taps, low_resolution_taps, upsample_taps
from fastseg.ops.upsample_bilinear import upsample_bilinear
from fastseg.ops.upsample_concat_conv import FORMS as UPSAMPLED
from fastseg.ops.upsample_concat_conv import request_of
from fastseg.ops.upsample_sum import upsample_sum

NAME = "resize_concat_conv2d"
Mode = Literal["bilinear", "nearest"]
Name = Literal["small", "resized"]
_NARROW = 32  # times as many channels out as in: a map that costs less to resize before than after


@overridable
def resize_concat_conv2d(
    maps: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: tuple[int, int],
    mode: Mode = "bilinear",
    align_corners: bool = False,
    act: Activation | None = None,
    form: Name | None = None,
) -> Tensor:
    """``act(conv2d(cat([interpolate(m, size) for m in maps], 1), weight, bias, padding="same"))``, 1x1 or 3x3.

    Smaller maps are convolved at their own size, by a 1x1 filter directly, by a 3x3 filter as nine 1x1 taps. The result
    is the same sum in another order, borders included, and differs by rounding. For 3x3 filters a cost model decides
    for each map (``fastseg.explain()`` shows it): on a CPU in fp32 and fp64 with and without gradients, on a GPU
    without.

    Args:
        maps: (N, C_i, h_i, w_i) each.
        weight: (COUT, sum of C_i, K, K), K being 1 or 3.
        bias: (COUT,).
        size: (H, W) in pixels.
        mode: "bilinear" or "nearest", as in ``torch.nn.functional.interpolate``.
        align_corners: the same, for "bilinear".
        act: None, "relu", "relu6" or "leaky_relu".
        form: "small" multiplies every map at its own size, "resized" resizes first; None chooses.

    Returns:
        (N, COUT, H, W), in the memory format of the first map of more than one pixel, in autocast's dtype under
        autocast.

    Raises:
        ValueError: there is no map, one is not 4-D or has no pixel, batches differ, weight or bias does not fit, the
            mode, the form or the activation is unknown, or form="small" for a 3x3 filter and nearest neighbours.
        TypeError: a map is not floating point.

    Reference: the fusion of UPerNet, Xiao et al., arXiv:1807.10221, and of SegFormer, arXiv:2105.15203.
    """
    maps, size = list(maps), tuple(size)
    _check(maps, weight, bias, size, mode, act, form)
    dtype = autocast_dtype(maps[0])
    for m in maps[1:]:
        dtype = torch.promote_types(dtype, autocast_dtype(m))
    maps, weight = [m.to(dtype) for m in maps], weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    resize = _Resize(size, mode, align_corners)
    small, why = _small(maps, weight, bias, resize, form)
    pointwise = weight.shape[2:] == (1, 1) and form != "resized"
    chosen = FORMS.decide(Request(tuple(small), pointwise, why), maps[0])
    y: Tensor = chosen.run(maps, weight, bias, act, resize, small)
    return y


def resize_concat_conv2d_ref(
    maps: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: tuple[int, int],
    mode: Mode = "bilinear",
    align_corners: bool = False,
    act: Activation | None = None,
) -> Tensor:
    """``resize_concat_conv2d`` in plain PyTorch."""
    corners = {"align_corners": align_corners} if mode == "bilinear" else {}
    x = torch.cat([F.interpolate(m, size, mode=mode, **corners) for m in maps], 1)
    return ACTIVATIONS[act or "none"](F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2))


class _Resize:
    """To ``size``; maps that have it already are not touched, which is what the resize would return."""

    def __init__(self, size: tuple[int, int], mode: str, align_corners: bool):
        self.size, self.mode, self.align_corners = size, mode, align_corners

    def keeps(self, x: Tensor) -> bool:
        return all(same_number(n, m) for n, m in zip(x.shape[2:], self.size, strict=True))

    def shrinks(self, x: Tensor) -> bool:
        """True if the map is larger than the result; unknown of symbolic sizes, which are taken to be smaller."""
        sizes = (*x.shape[2:], *self.size)
        if any(map(is_open, sizes)):
            return False
        return x.shape[2] * x.shape[3] > self.size[0] * self.size[1]

    def __call__(self, x: Tensor) -> Tensor:
        if self.keeps(x):
            return x
        if self.mode == "nearest":
            return F.interpolate(x, self.size, mode="nearest")
        return upsample_bilinear(x, self.size, align_corners=self.align_corners).to(x.dtype)


class Request(NamedTuple):
    """What decides between the forms."""

    small: tuple[bool, ...]  # which maps are multiplied at their own size
    pointwise: bool  # a 1x1: all are, but narrow ones
    why: str


class SmallForm(Form):
    """Small maps are multiplied at their own size."""

    name, path = "small", "torch"

    def refuses(self, r: Request) -> str:
        return "" if any(r.small) or r.pointwise else r.why

    def why(self, r: Request, refused: Sequence[Refusal]) -> str:
        return r.why

    def run(self, maps, weight, bias, act, resize: _Resize, small: list[bool]) -> Tensor:
        if weight.shape[2:] == (1, 1):
            terms = _with_narrow_maps_joined(maps, weight, resize, [not own for own in small])
            return _in_format_of(_whose_format_shows(maps), _pointwise(*terms, bias, act, resize))
        return like(maps[0], _taps(maps, weight, bias, act, resize, small))


def _resized(maps, weight, bias, act, resize: _Resize, small: list[bool]) -> Tensor:
    x = torch.cat([resize(m) for m in maps], 1) if len(maps) > 1 else resize(maps[0])
    return conv2d_act(x, weight, bias, act, (1, 1), (weight.shape[-1] // 2,) * 2, (1, 1), 1)


def _whose_format_shows(maps: list[Tensor]) -> Tensor:
    """The first map; one of a single pixel is dense in every format, whatever its strides say, and another is asked."""
    if followed(*maps):
        return maps[0]
    return next((m for m in maps if m.shape[2] * m.shape[3] > 1), maps[0])


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``; one image whose pixels are dense is channels_last by any batch stride."""
    if followed(x) or x.shape[0] != 1 or x.is_contiguous():
        return like(x, y)
    return channels_last(y) if x.is_contiguous(memory_format=torch.channels_last) else like(x, y)


def _narrow(maps: Sequence[Tensor], weight: Tensor, resize: _Resize) -> list[bool]:
    """Which maps of a 1x1 on a CPU cost less to resize before than after.

    8 channels that become 512 at 32x32 take, resized first and in one product with a map of full size, 0.3 of the time
    on one thread and on two of an AVX2 processor; 32 take 2.3 and 0.7.
    """
    narrow = [not resize.keeps(m) and weight.shape[0] >= _NARROW * m.shape[1] for m in maps]
    if not any(narrow) or not maps[0].is_cpu or followed(*maps, weight) or needs_grad(*maps, weight):
        return [False] * len(maps)
    return narrow


def _with_narrow_maps_joined(
    maps: list[Tensor], weight: Tensor, resize: _Resize, narrow: list[bool]
) -> tuple[list[Tensor], Tensor]:
    """The maps and filters of a 1x1, in which one map holds, at full size, what would be resized much wider."""
    if not any(narrow):
        return maps, weight
    widths = [m.shape[1] for m in maps]
    taken = tuple(one or resize.keeps(m) for one, m in zip(narrow, maps, strict=True))
    order = sorted(range(len(maps)), key=lambda i: not taken[i])
    joined = torch.cat([resize(maps[i]) for i in order if taken[i]], 1)

    def ordered() -> Tensor:
        parts = weight.split(widths, 1)
        return torch.cat([parts[i] for i in order], 1)

    new = ordered() if keeper((weight,)) is None else made_once((weight,), (NAME, "joined", taken), ordered)
    return [joined, *(maps[i] for i in order if not taken[i])], new


def _parts(weight: Tensor, widths: list[int]) -> Sequence[Tensor]:
    """The filters of each map; of a frozen weight in memory of their own, so that they can be packed."""
    if keeper((weight,)) is None:
        return weight.split(widths, 1)
    return made_once((weight,), (NAME, *widths), lambda: [part.clone() for part in weight.split(widths, 1)])


def _pointwise(maps, weight, bias, act, resize: _Resize) -> Tensor:
    if maps[0].is_cpu and not kernels_run(maps[0]) and not followed(*maps, weight):
        # torch's CPU interpolates NCHW maps up to 14 times slower: copies of the maps, which are small, cost less
        maps = [channels_last(m) for m in maps]
    widths = [m.shape[1] for m in maps]
    parts = _parts(weight, widths)
    base, below = None, []
    for i, m in enumerate(maps):
        if not resize.keeps(m) and not resize.shrinks(m):
            below.append(i)
        else:
            y = conv2d(resize(m), parts[i], bias if base is None else None)
            base = y if base is None else base + y
    if base is None:
        first = below.pop(0)
        base = resize(conv2d(maps[first], parts[first]))
        base = base if bias is None else base + bias[:, None, None]
    if resize.mode == "nearest":
        for i in below:
            base = base + resize(conv2d(maps[i], parts[i]))
        return activate(base, act)
    few = few_pixels(base, [maps[i] for i in below])
    small = [conv2d(maps[i], parts[i]) for i, alone in zip(below, few, strict=True) if not alone]
    if any(few):
        taken = [i for i, alone in zip(below, few, strict=True) if alone]
        base = add_few_pixels(base, [maps[i] for i in taken], _columns(weight, widths, taken), resize.align_corners)
    if not small:
        return activate(base, act, inplace=any(few))
    return upsample_sum(base, small, act=act, align_corners=resize.align_corners).to(base.dtype)


def _columns(weight: Tensor, widths: list[int], taken: list[int]) -> Tensor:
    """The filters of some maps as a matrix (COUT, C); a view where the maps are neighbours."""
    matrix, first, last = weight.flatten(1), taken[0], taken[-1]
    if taken == list(range(first, last + 1)):
        return matrix[:, sum(widths[:first]) : sum(widths[: last + 1])]
    parts = matrix.split(widths, 1)
    return torch.cat([parts[i] for i in taken], 1)


# --- 3x3: nine taps of each small map


def _small(maps, weight, bias, resize: _Resize, form: Name | None) -> tuple[list[bool], str]:
    """Which maps are multiplied at their own size, and why."""
    nothing = [False] * len(maps)
    if in_reference() or form == "resized":
        return nothing, "asked for"
    if weight.shape[2:] == (1, 1):
        narrow = nothing if form == "small" else _narrow(maps, weight, resize)
        own = "1x1: each map is multiplied at its own size"
        return [not one for one in narrow], "1x1: narrow maps are resized, the others not" if any(narrow) else own
    if resize.mode != "bilinear":
        return nothing, "nearest neighbours: resized first"
    if form == "small":
        return [not resize.keeps(m) for m in maps], "asked for"
    tensors = [t for t in (*maps, weight, bias) if t is not None]
    if followed(*tensors):
        return nothing, "a graph, a transform or forward-mode AD: resized first"
    small, reasons = [], []
    for m in maps:
        take = not resize.keeps(m) and not resize.shrinks(m)
        if take:  # the same choice as for one upsampled map
            request = request_of(m, 0, weight.shape[0], resize.size, tensors)
            choice = UPSAMPLED.choose(request)
            take = choice.form.path != "reference"
            reasons.append(f"{tuple(m.shape[2:])}: {choice.form.why(request, choice.refused)}")
        small.append(take)
    strips = any(small) and not kernels_run(maps[0])
    if strips and not all(is_finite(m) for m, take in zip(maps, small, strict=True) if take):
        return nothing, "NaN or infinity, which a strip's GEMM would spread: resized first"
    return small, "; ".join(reasons) or "no map is smaller"


def _taps(maps, weight, bias, act, resize: _Resize, small: list[bool]) -> Tensor:
    parts = _parts(weight, [m.shape[1] for m in maps])
    whole = [(resize(m), w) for m, w, take in zip(maps, parts, small, strict=True) if not take]
    taps = [low_resolution_taps(m, w) for m, w, take in zip(maps, parts, small, strict=True) if take]
    kernels = kernels_run(maps[0]) and not needs_grad(*maps, weight, bias)
    if whole:
        x = whole[0][0] if len(whole) == 1 else torch.cat([m for m, _ in whole], 1)
        w = whole[0][1] if len(whole) == 1 else torch.cat([w for _, w in whole], 1)
        base = conv2d(channels_last(x), channels_last(w), None if kernels else bias, padding=(1, 1))
    else:
        base = maps[0].new_zeros(maps[0].shape[0], weight.shape[0], *resize.size)
        base = base if bias is None or kernels else base + bias[:, None, None]
    base, corners = channels_last(base), resize.align_corners
    if kernels:
        for t in taps[:-1]:
            base = fused_taps(t, base, None, None, resize.size, corners)
        return fused_taps(taps[-1], base, bias, act, resize.size, corners)
    for t in taps:
        recorded = followed(t, base) or needs_grad(t, base)
        base = upsample_taps(t, base, resize.size, corners) if recorded else add_upsampled(base, t, corners)
    return activate(base, act, inplace=True)


FORMS = Forms(NAME, [SmallForm(), Torchs(_resized, "resized")])


def _check(maps, weight, bias, size, mode, act, form) -> None:
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f'{NAME}: act is {act!r}; use None, "relu", "relu6" or "leaky_relu"')
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f'{NAME}: mode is {mode!r}; use "bilinear" or "nearest"')
    if form not in (None, "small", "resized"):
        raise ValueError(f'{NAME}: form is {form!r}; use None, "small" or "resized"')
    if not maps:
        raise ValueError(f"{NAME}: there is no map")
    if len(size) != 2:
        raise ValueError(f"{NAME}: size is {size}; give (height, width)")
    for i, t in enumerate(maps):
        if t.dim() != 4 or 0 in t.shape[1:]:
            raise ValueError(f"{NAME}: maps[{i}] is {tuple(t.shape)}; it must be (N, C, H, W), none of C, H, W being 0")
        if not t.is_floating_point():
            raise TypeError(f"{NAME}: maps[{i}] is {t.dtype}; it must be a floating-point tensor")
        if t.shape[0] != maps[0].shape[0]:
            raise ValueError(f"{NAME}: maps[{i}] is {tuple(t.shape)}; it must have the batch {maps[0].shape[0]}")
    channels = sum(m.shape[1] for m in maps)
    if weight.dim() != 4 or tuple(weight.shape[1:]) not in ((channels, 1, 1), (channels, 3, 3)):
        raise ValueError(
            f"{NAME}: weight is {tuple(weight.shape)}; it must be (COUT, {channels}, 1, 1) or (COUT, {channels}, 3, 3)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{NAME}: bias is {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    if form == "small" and mode == "nearest" and weight.shape[-1] == 3:
        raise ValueError(f'{NAME}: form is "small"; nearest neighbours and a 3x3 filter are resized first')
