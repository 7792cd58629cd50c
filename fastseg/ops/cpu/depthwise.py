"""Depthwise convolutions with far taps: tap by tap, each over the pixels that it reads inside the map.

oneDNN has no kernel of its own for them from a dilation of 5 on. 256 channels on 32x32 at dilation 12 take it, on one
thread, 5.3 ms in channels_last, 6.9 ms with a bias, and 1.8 ms in NCHW; nine sums of products take 0.5 and 0.8 ms.
With 64 channels they take, of oneDNN's time, 0.5 in channels_last and 1.2 in NCHW, and on two threads 1.1 and 1.5, as
oneDNN shares the channels of NCHW out (``benchmarks.studies.cpu_threads --ops separable``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg.ops.core.conv_request import ConvCall, finish
from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.explain import Refusal
from fastseg.ops.core.forms import Form
from fastseg.ops.core.layout import memory_format_of
from fastseg.ops.cpu.threads import each

_NEAR = 4  # dilation up to which oneDNN's kernel is the faster one
_SHARED, _WHOLE = 2**18, 2**15  # values from which threads share a map; of a call that torch leaves to one thread
_LEAST = 2**15  # values of a map from which nine calls pay in channels_last, on one thread


def pays(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int] | str,
    dilation: Sequence[int], groups: int,
) -> bool:  # fmt: skip
    """Whether ``by_taps`` gives this convolution, and sooner: fp32 or fp64, no gradient, stride 1, "same" padding."""
    if groups == 1 or min(dilation) <= _NEAR or isinstance(padding, str) or not x.is_cpu or x.dim() != 4:
        return False
    (channels, each_group, K, wide), reach = weight.shape, [d * (weight.shape[-1] // 2) for d in dilation]
    if not groups == channels == x.shape[1] or each_group != 1 or wide != K or K % 2 == 0:
        return False
    if list(padding) != reach or tuple(stride) != (1, 1) or x.numel() < _LEAST:
        return False
    alone, last = torch.get_num_threads() == 1, memory_format_of(x) == torch.channels_last
    if not (alone or last) or (x.numel() < _SHARED and not (alone and last)):
        return False
    tensors = [t for t in (x, weight, bias) if t is not None]
    if x.dtype not in (torch.float32, torch.float64) or any(t.dtype != x.dtype for t in tensors):
        return False
    if followed(*tensors) or torch.is_autocast_enabled("cpu"):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


class TapsForm(Form):
    """A depthwise convolution tap by tap."""

    name, path = "taps", "torch"

    def refuses(self, r) -> str:
        return "" if r.far else "not a depthwise convolution with far taps"

    def why(self, r, refused: Sequence[Refusal]) -> str:
        return "CPU tensor: far taps, one after another"

    def run(self, call: ConvCall) -> Tensor:
        y = by_taps(call.x, call.weight, call.bias, call.dilation)
        return finish(y, call.act, call.residual, call.image_bias)


def by_taps(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int]) -> Tensor:
    """``conv2d(x, weight, bias, padding=dilation * (K // 2), dilation=dilation, groups=C)``, rows on threads."""
    (_, C, H, W), K, (down, across) = x.shape, weight.shape[-1], dilation
    taps = weight.detach().permute(2, 3, 1, 0).contiguous()[..., None, None]  # (K, K, 1, C, 1, 1)
    x, start = x.detach(), None if bias is None else bias.detach().view(1, C, 1, 1)
    y = torch.empty_like(x, memory_format=memory_format_of(x))
    offsets = [(i, j, (i - K // 2) * down, (j - K // 2) * across) for i in range(K) for j in range(K)]

    def strip(rows: tuple[int, int]) -> None:
        top, bottom = rows
        middle = taps[K // 2, K // 2]
        out, source = y[:, :, top:bottom], x[:, :, top:bottom]
        torch.mul(source, middle, out=out) if start is None else torch.addcmul(start, source, middle, out=out)
        for i, j, dy, dx in offsets:
            first, last = max(top, -dy), min(bottom, H - dy)  # output rows whose tap lies in the map
            left, right = max(0, -dx), min(W, W - dx)
            if (dy or dx) and first < last and left < right:
                read = x[:, :, first + dy : last + dy, left + dx : right + dx]
                y[:, :, first:last, left:right].addcmul_(read, taps[i, j])

    few = x.numel() < _SHARED
    height = max(1, _WHOLE * H // x.numel()) if few else -(-H // torch.get_num_threads())
    strips = [(top, min(H, top + height)) for top in range(0, H, height)]
    if few:  # torch cuts up no call as small: nothing is waited for
        with torch.no_grad():
            for rows in strips:
                strip(rows)
    else:
        each(strip, strips)
    return y
