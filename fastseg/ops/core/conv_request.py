"""What decides how a convolution with bias, residual and activation is computed, and what it is computed from."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops.core import dispatch
from fastseg.ops.core.dispatch import HAS_TRITON, autocast_dtype, what_follows
from fastseg.ops.core.norm import activate, add_residual
from fastseg.ops.core.torch_private import forward_ad_level, is_tracing, transforms_active

if HAS_TRITON:
    from fastseg.kernels.runtime.ceilings import Chip, chip_of
    from fastseg.kernels.runtime.tensors import tf32


class ConvCall(NamedTuple):
    """``act(conv2d(x, weight, bias, stride, padding, dilation, groups) + image_bias[:, :, None, None] + residual)``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    act: str | None
    stride: Sequence[int]
    padding: Sequence[int] | str
    dilation: Sequence[int]
    groups: int
    residual: Tensor | None = None
    image_bias: Tensor | None = None
    packed: Callable[[Tensor], Tensor] | None = None  # the convolution with packed weights, on a CPU


class ConvRequest(NamedTuple):
    """Everything that the decision depends on. Sizes and the like are 0 or empty where ``plain`` is False."""

    device: str  # "cuda", "cpu" ...
    cudnn: bool  # on CUDA, True if torch has the fused call and cuDNN to run it
    deterministic: bool  # on CUDA, True if only deterministic algorithms may run
    plain: bool  # 4-D tensors of torch's own type, without gradient or tangent
    dtypes: tuple[torch.dtype, ...]  # of input, weight, and the other tensors
    act: str | None
    padding: Sequence[int] | str
    channels: tuple[int, int]  # in, out
    groups: int
    channels_last: bool  # input, weight and residual
    elements: int  # of the largest map
    no_kernel: str = "CPU tensor"  # why no Triton kernel runs on the input, or ""
    shape: tuple[int, ...] = ()  # of the input
    taps: tuple[int, ...] = ()  # of the weight
    stride: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    bias: bool = False
    residual: bool = False
    image_bias: bool = False
    map_last: bool = False  # the input alone is channels_last
    dtype: torch.dtype = torch.float32  # that the convolution computes in
    mixed: str = ""  # why torch's functions must take these dtypes and devices (they may raise), or ""
    tf32: bool = False
    chip: "Chip | None" = None
    far: bool = False  # a depthwise convolution on a CPU whose taps lie far apart
    packed: bool = False  # a convolution on a CPU whose weights are packed


def request_of(call: ConvCall, *, far: bool = False) -> ConvRequest:
    """The request of a call in eager mode: no compiler follows it."""
    x, weight, bias, act, stride, padding, dilation, groups, residual, image_bias, packed = call
    plain, wanted, dtypes = x.dim() == 4, False, []
    for t in (x, weight, residual, bias, image_bias):
        if t is not None:
            plain = plain and type(t) in _PLAIN
            wanted = wanted or t.requires_grad
            dtypes.append(t.dtype)
    plain = plain and not (wanted and torch.is_grad_enabled())
    if transforms_active() or is_tracing() or forward_ad_level() >= 0:
        plain = plain and not what_follows(x, weight, residual, bias, image_bias)
    device, stride, dilation = x.device, tuple(stride), tuple(dilation)
    padding, on_cuda = padding if isinstance(padding, str) else tuple(padding), device.type == "cuda"
    known = (
        device.type,
        on_cuda and _FUSED_CALL and torch.backends.cudnn.enabled and torch.backends.cudnn.is_available(),
        on_cuda and (torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()),
        plain, tuple(dtypes), act, padding,
    )  # fmt: skip
    if not plain:
        return ConvRequest(*known, (0, 0), groups, False, 0, stride=stride, dilation=dilation)
    last = torch.channels_last
    shape, taps, map_last = x.shape, weight.shape, x.is_contiguous(memory_format=last)
    weight_last = weight.is_contiguous(memory_format=last)
    every_last = map_last and weight_last and (residual is None or residual.is_contiguous(memory_format=last))
    elements = shape[0] * shape[2] * shape[3] * max(shape[1], taps[0])
    why = dispatch._no_kernel(x)
    mixed, dtype, narrow, chip = "", x.dtype, False, None
    if not why:
        dtype = autocast_dtype(x)
        mixed = _mixed(call, dtype)
        narrow = dtype == torch.float32 and tf32(dtype, device)
        chip = chip_of(device)
    return ConvRequest(
        *known, (shape[1], taps[0]), groups, every_last, elements, why, tuple(shape), tuple(taps), stride, dilation,
        bias is not None, residual is not None, image_bias is not None, map_last, dtype, mixed, narrow, chip, far,
        packed is not None,
    )  # fmt: skip


_PLAIN = (Tensor, torch.nn.Parameter)
_FUSED_CALL = torch.version.hip is None and hasattr(torch, "cudnn_convolution_relu")


def _mixed(call: ConvCall, dtype: torch.dtype) -> str:
    x, weight, bias, residual, image_bias = call.x, call.weight, call.bias, call.residual, call.image_bias
    device = x.device
    for t in (weight, bias, residual, image_bias):
        if t is not None and t.device != device:
            return "tensors on different devices"
    if residual is not None and residual.dtype != dtype:
        return "dtypes that differ"
    if torch.is_autocast_enabled(device.type):  # torch then casts the parameters; a kernel casts as it loads
        return ""
    return "dtypes that differ" if weight.dtype != dtype or (bias is not None and bias.dtype != dtype) else ""


def finish(y: Tensor, act: str | None, residual: Tensor | None, image_bias: Tensor | None) -> Tensor:
    """Apply ``act(y + image_bias + residual)`` to the output ``y`` of a convolution, in place; differentiable."""
    if image_bias is not None:
        y = add_residual(y, image_bias.to(y.dtype)[:, :, None, None])
    return activate(add_residual(y, residual), act, inplace=True)
