"""1x1 convolution with bias, bias per image, residual and activation as one registered op, without gradients.

``conv2d_act`` chooses between its kernel and the library.
"""

import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.conv_request import ConvCall, ConvRequest
from fastseg.ops.core.dispatch import HAS_TRITON, autocast_dtype
from fastseg.ops.core.forms import Form, Verdict
from fastseg.ops.core.layout import channels_last, like, new_map
from fastseg.ops.core.norm import ACTIVATIONS, Activation
from fastseg.ops.core.register import register

if HAS_TRITON:
    from fastseg.kernels.dense_conv.pointwise import plan, pointwise_conv_fwd
    from fastseg.kernels.runtime.conv_sizes import Geometry

NOT_1X1 = "not a plain 1x1 convolution at stride 1"


class PointwiseForm(Form):
    """Our kernel for a 1x1 convolution at stride 1, with every epilogue in the same launch.

    ``library`` is the call of a library that adds bias and ReLU by itself, where it takes the request.
    """

    name = "pointwise"

    def __init__(self, library: Form):
        self.library = library

    def refuses(self, r: ConvRequest) -> str:
        if not r.plain or r.taps[2:] != (1, 1) or r.stride != (1, 1) or r.padding != (0, 0) or r.groups != 1:
            return NOT_1X1
        if r.no_kernel or not r.elements:
            return r.no_kernel or "an empty map"
        if r.mixed:
            return r.mixed
        if not r.map_last:
            return "not channels_last: the kernel would need copies"
        (N, C, H, W), COUT = r.shape, r.channels[1]
        return Geometry(N, C, H, W, COUT, H, W, 1, 1, 0, 1).unsupported()

    def cost(self, r: ConvRequest) -> Verdict:
        after: list[int] = []  # passes over y when the library runs
        if self.library.refuses(r):
            for present, passes in ((r.bias, 2), (r.image_bias, 2), (r.residual, 3), (r.act is not None, 2)):
                after += [passes] * present
        elif r.act != "relu":
            after = [2]  # a minimum makes a ReLU6 of a ReLU
        N, C, H, W = r.shape
        options = {"residual": r.residual, "tf32": r.tf32, "chip": r.chip}
        return plan(N * H * W, C, r.channels[1], r.dtype, tuple(after), **options)

    def run(self, call: ConvCall) -> Tensor:
        x, weight, bias, act = call[:4]
        return pointwise_conv2d(x, weight, bias, act=act, residual=call.residual, image_bias=call.image_bias)


def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: Activation | None = None,
    residual: Tensor | None = None,
    image_bias: Tensor | None = None,
) -> Tensor:
    """``act(conv2d(x, weight, bias) + image_bias[:, :, None, None] + residual)`` for a 1x1 weight, in one launch.

    Args:
        x: (N, C, H, W).
        weight: (COUT, C, 1, 1).
        bias: (COUT,).
        act: None, "relu", "relu6" or "leaky_relu".
        residual: (N, COUT, H, W).
        image_bias: (N, COUT).

    Returns:
        (N, COUT, H, W), in the memory format of ``x``; without gradients.

    Raises:
        ValueError: shapes do not match.
    """
    N, C, H, W = x.shape
    COUT = weight.shape[0]
    wanted = {"weight": (weight, (COUT, C, 1, 1)), "bias": (bias, (COUT,)), "residual": (residual, (N, COUT, H, W)),
              "image_bias": (image_bias, (N, COUT))}  # fmt: skip
    for name, (t, shape) in wanted.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"pointwise_conv2d: x is {tuple(x.shape)}, {name} {tuple(t.shape)}; it must be {shape}")
    x = x.to(autocast_dtype(x))
    return _fwd(x, weight, bias, act or "none", residual, image_bias)


def _launch_fwd(x, weight, bias, act, residual, image_bias) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    image_bias = None if image_bias is None else image_bias.contiguous()
    residual = None if residual is None else channels_last(residual)
    return like(x, pointwise_conv_fwd(channels_last(x), weight.contiguous(), bias, act, residual, image_bias))


def _plain_fwd(x, weight, bias, act, residual, image_bias) -> Tensor:
    cast = lambda t: None if t is None else t.to(x.dtype)
    y = F.conv2d(x, cast(weight), cast(bias))
    y = y if image_bias is None else y + cast(image_bias)[:, :, None, None]
    y = y if residual is None else y + residual
    return like(x, ACTIVATIONS[act](y).to(x.dtype))


def _fake_fwd(x, weight, bias, act, residual, image_bias) -> Tensor:
    return new_map(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


_fwd = register(
    "pointwise_conv2d(Tensor x, Tensor weight, Tensor? bias, str act, Tensor? residual, Tensor? image_bias) -> Tensor",
    _launch_fwd,
    _plain_fwd,
    _fake_fwd,
)
