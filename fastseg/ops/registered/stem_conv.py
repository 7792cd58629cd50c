"""The first convolution of a network as one registered op, with bias and activation, without gradients.

``conv2d_act`` chooses between its kernel and the library.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, autocast_dtype, kernels_run
from fastseg.ops.core.layout import channels_last
from fastseg.ops.core.norm import ACTIVATIONS
from fastseg.ops.core.register import register
from fastseg.ops.registered.pointwise_conv import Choice, plain_dtypes

if HAS_TRITON:
    from fastseg.kernels.dense_conv.stem import MOST_CHANNELS, MOST_TAPS, plan, stem_conv_fwd
    from fastseg.kernels.runtime.ceilings import chip_of
    from fastseg.kernels.runtime.conv_sizes import Geometry
    from fastseg.kernels.runtime.tensors import tf32


def choose_stem(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, stride: int, padding: int) -> Choice:
    """Return whether the kernel or a library takes a square, undilated convolution of an image, and why.

    The model assumes that the library adds bias and activation in passes of their own: its fused call refuses so few
    channels.
    """
    if not kernels_run(x) or x.numel() == 0 or not x.is_contiguous(memory_format=torch.channels_last):
        return Choice(False, str)
    (N, C, H, W), COUT, K = x.shape, weight.shape[0], weight.shape[-1]
    OH, OW = ((size + 2 * padding - K) // stride + 1 for size in (H, W))
    g = Geometry(N, C, H, W, COUT, OH, OW, K, stride, padding, 1)
    large = C > MOST_CHANNELS or K * K * C > MOST_TAPS or g.unsupported()
    if large or OH < 1 or OW < 1 or plain_dtypes(x, weight, bias):
        return Choice(False, str)
    passes = (bias is not None) + (act is not None)
    dtype = autocast_dtype(x)
    chosen = plan(g, dtype, passes, tf32=tf32(dtype, x.device), chip=chip_of(x.device))
    return Choice(chosen.own, lambda: str(chosen))


def stem_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, act: str | None, stride: int, padding: int
) -> Tensor:
    """``act(conv2d(x, weight, bias, stride, padding))`` for at most 4 channels and at most 64 taps, K K C.

    The result is always channels_last; with one channel, x is in both layouts.
    """
    return _fwd(x.to(autocast_dtype(x)), weight, bias, act or "none", stride, padding)


def _launch_fwd(x, weight, bias, act, stride, padding) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    return stem_conv_fwd(channels_last(x), channels_last(weight), bias, act, stride, padding)


def _plain_fwd(x, weight, bias, act, stride, padding) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return channels_last(ACTIVATIONS[act](F.conv2d(x, weight.to(x.dtype), bias, stride, padding)))


def _fake_fwd(x, weight, bias, act, stride, padding) -> Tensor:
    OH, OW = ((size + 2 * padding - weight.shape[-1]) // stride + 1 for size in x.shape[2:])
    return x.new_empty(x.shape[0], OH, OW, weight.shape[0]).permute(0, 3, 1, 2)


_fwd = register(
    "stem_conv2d(Tensor x, Tensor weight, Tensor? bias, str act, int stride, int padding) -> Tensor",
    _launch_fwd,
    _plain_fwd,
    _fake_fwd,
)
