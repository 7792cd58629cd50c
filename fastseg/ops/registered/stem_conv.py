"""The first convolution of a network as one registered op, with bias and activation, without gradients.

``conv2d_act`` chooses between its kernel and the library.
"""

import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.conv_request import ConvCall, ConvRequest
from fastseg.ops.core.dispatch import HAS_TRITON, autocast_dtype
from fastseg.ops.core.forms import Form, Verdict
from fastseg.ops.core.layout import channels_last
from fastseg.ops.core.norm import ACTIVATIONS
from fastseg.ops.core.register import register

if HAS_TRITON:
    from fastseg.kernels.dense_conv.stem import MOST_TAPS, plan, stem_conv_fwd
    from fastseg.kernels.runtime.conv_sizes import Geometry

NOT_A_STEM = "not a square convolution of an image of few channels"
MOST_CHANNELS = 4


class StemForm(Form):
    """Our kernel for a square, undilated convolution of an image of few channels.

    Its model assumes that a library adds bias and activation in passes of their own: its fused call refuses so few
    channels.
    """

    name = "stem"

    def refuses(self, r: ConvRequest) -> str:
        square = len(r.taps) == 4 and r.taps[2] == r.taps[3] > 1 and r.taps[1] <= MOST_CHANNELS
        even = not isinstance(r.padding, str) and r.padding[0] == r.padding[1] and r.stride[0] == r.stride[1]
        if not (square and even) or r.dilation != (1, 1) or r.groups != 1 or r.residual or r.image_bias:
            return NOT_A_STEM
        if r.no_kernel or not r.elements:
            return r.no_kernel or "an empty map"
        if r.mixed:
            return r.mixed
        if not r.map_last:
            return "not channels_last: the kernel would need copies"
        g = _geometry(r)
        if g.K * g.K * g.C > MOST_TAPS:
            return f"{g.K}x{g.K} taps of {g.C} channels: the kernel takes {MOST_TAPS} together"
        return "an empty map" if g.OH < 1 or g.OW < 1 else g.unsupported()

    def cost(self, r: ConvRequest) -> Verdict:
        return plan(_geometry(r), r.dtype, r.bias + (r.act is not None), tf32=r.tf32, chip=r.chip)

    def run(self, call: ConvCall) -> Tensor:
        x, weight, bias, act, stride, padding = call[:6]
        return stem_conv2d(x, weight, bias, act=act, stride=stride[0], padding=padding[0])


def _geometry(r: ConvRequest) -> "Geometry":
    (N, C, H, W), (COUT, _, K, _), stride, padding = r.shape, r.taps, r.stride[0], r.padding[0]
    return Geometry(N, C, H, W, COUT, _size(H, K, stride, padding), _size(W, K, stride, padding), K, stride, padding, 1)


def _size(size: int, K: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - K) // stride + 1


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
    OH, OW = (_size(size, weight.shape[-1], stride, padding) for size in x.shape[2:])
    return x.new_empty(x.shape[0], OH, OW, weight.shape[0]).permute(0, 3, 1, 2)


_fwd = register(
    "stem_conv2d(Tensor x, Tensor weight, Tensor? bias, str act, int stride, int padding) -> Tensor",
    _launch_fwd,
    _plain_fwd,
    _fake_fwd,
)
