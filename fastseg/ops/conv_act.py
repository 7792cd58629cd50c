"""Convolution with bias, residual and activation, without gradients: the list of its forms."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.conv_request import ConvCall, ConvRequest, request_of
from fastseg.ops.core.dispatch import is_torchs
from fastseg.ops.core.explain import Refusal
from fastseg.ops.core.forms import Form, Forms, Reference
from fastseg.ops.core.norm import ACTIVATIONS, Activation
from fastseg.ops.cpu import depthwise
from fastseg.ops.cpu.packed import CPU_FORMS, conv2d, convolve, packed_run
from fastseg.ops.registered.cudnn_conv import CUDNN
from fastseg.ops.registered.pointwise_conv import NOT_1X1, PointwiseForm
from fastseg.ops.registered.stem_conv import NOT_A_STEM, StemForm


def conv2d_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: Activation | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    *,
    residual: Tensor | None = None,
    image_bias: Tensor | None = None,
) -> Tensor:
    """``act(conv2d(x, weight, bias, stride, padding, dilation, groups) + image_bias[:, :, None, None] + residual)``.

    Meant for calls that need no gradient. With a gradient, or while compiling, torch's functions run one by one: a
    compiler fuses what follows a convolution by itself.

    ``FORMS`` lists the ways to compute it, in the order in which they are asked: our kernel for a 1x1 at stride 1, for
    every epilogue that a library lacks; cuDNN's call, which adds bias, residual and a ReLU to its convolution; our
    kernel for the first convolution of a network, whose few channels that call refuses; two forms for a CPU; torch's
    functions. Cost models choose between our kernels and the libraries (``fastseg.explain()`` shows them).

    Args:
        x: (N, C, H, W).
        residual: (N, COUT, OH, OW), added before the activation.
        image_bias: (N, COUT), a bias for each image.
    """
    if torch.compiler.is_compiling():
        return conv2d_act_ref(x, weight, bias, act, stride, padding, dilation, groups, residual, image_bias)
    if residual is None and image_bias is None and is_torchs(x):
        return conv2d(x, weight, bias, stride, padding, dilation, groups, act)
    packed, far = None, False
    if x.is_cpu:
        far = groups > 1 and depthwise.pays(x, weight, bias, stride, padding, dilation, groups)
        packed = packed_run(x, weight, bias, stride, padding, dilation, groups)
    call = ConvCall(x, weight, bias, act, stride, padding, dilation, groups, residual, image_bias, packed)
    return FORMS(request_of(call, far=far), call, recorded=x)


def conv2d_act_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: Activation | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None = None,
    image_bias: Tensor | None = None,
) -> Tensor:
    """``conv2d_act`` in torch's own lines."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    y = y if image_bias is None else y + image_bias.to(y.dtype)[:, :, None, None]
    y = y if residual is None else y + residual
    return ACTIVATIONS[act or "none"](y)


class Torchs(Reference):
    """Torch's functions one by one, in place where that changes nothing."""

    def why(self, r: ConvRequest, refused: Sequence[Refusal]) -> str:
        meant = [each for each in refused if each.why not in (NOT_1X1, NOT_A_STEM)]
        modelled = (each for each in meant if each.microseconds is not None)
        return next(modelled, meant[0]).why


# On a CPU with one thread (64 channels 256^2, 256 64^2, 512 32^2), channels_last takes 0.85, 0.93 and 0.95 of NCHW's
# time; oneDNN's own call on packed weights, a private one whose ReLU drops NaN, takes 0.85, 0.91 and 0.88.
LIST: list[Form] = [PointwiseForm(CUDNN), CUDNN, StemForm(), *CPU_FORMS, Torchs(convolve)]
FORMS = Forms("conv2d_act", LIST)
