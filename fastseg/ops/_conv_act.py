"""A convolution and its activation where nobody wants a gradient: on CUDA one cuDNN call, elsewhere torch's two."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops._batch_norm import Activation, activate, add_residual
from fastseg.ops._dispatch import IN_REFERENCE, KERNEL_DTYPES, has_tangent, in_reference, record

INDEXABLE = 2**31  # elements; F.conv2d cuts larger maps into parts, the fused call does not
LANES = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}  # channels in 16 bytes

_refused: set[tuple] = set()  # what cuDNN had no engine for


class Request(NamedTuple):
    """What the decision depends on."""

    device: str  # "cuda", "cpu" ...
    cudnn: bool  # whether torch has the fused call, and cuDNN to make it
    deterministic: bool  # whether only deterministic algorithms may run
    plain: bool  # 4-D tensors of torch's own type, without a gradient or tangent
    dtypes: tuple[torch.dtype, ...]  # of input, weight, and bias and residual if there are any
    act: str | None
    padding: Sequence[int] | str
    channels: tuple[int, int]  # in, out
    groups: int
    channels_last: bool  # input, weight and residual
    elements: int  # of the largest map


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
    """``act(conv2d(x, weight, bias, stride, padding, dilation, groups) + residual)``, wanted without a gradient.

    With cuDNN bias, residual and a ReLU are added in the convolution's epilogue (``torch.cudnn_convolution_relu``,
    ``torch.cudnn_convolution_add_relu``), where torch's convolution reads and writes the map once more for each.
    cuDNN's ReLU may give 0 for NaN.
    """
    args = (stride, padding, dilation, groups)
    if image_bias is not None:
        return activate(F.conv2d(x, weight, bias, *args) + image_bias[:, :, None, None], act, inplace=True)
    why = IN_REFERENCE if in_reference() else "CPU tensor" if on_cpu(x) else ""
    why = why or unsupported(_request(x, weight, bias, residual, act, *args))
    key = (x.dtype, x.shape, weight.shape, *args, residual is None)
    if not why and key not in _refused:
        try:
            if residual is None:
                y = torch.cudnn_convolution_relu(x, weight, bias, *args)
            else:
                y = torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *args)
        except RuntimeError as error:
            if "CUDNN_STATUS" not in str(error) and "engine" not in str(error):
                raise
            _refused.add(key)
        else:
            parts = "bias" if residual is None else "bias, residual"
            record("conv2d_act", x, "cudnn", f"convolution, {parts} and ReLU in one call")
            return y
    record("conv2d_act", x, "reference", why or "cuDNN has no engine for it")
    # On a CPU, 64 channels 256^2, 256 64^2, 512 32^2, one thread: channels_last takes 0.85, 0.93 and 0.95 of NCHW's
    # time; oneDNN's own call on packed weights, a private one whose ReLU drops NaN, 0.85, 0.91 and 0.88.
    return activate(add_residual(F.conv2d(x, weight, bias, *args), residual), act, inplace=True)


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def unsupported(r: Request) -> str:
    """Why cuDNN's fused call cannot or should not take the request, or ""."""
    if r.device != "cuda":
        return f"{r.device} tensor"
    if not r.cudnn:
        return "no cuDNN, or a torch without cudnn_convolution_relu"
    if r.deterministic:
        return "the fused call may take algorithms that are not deterministic"
    if not r.plain:
        return "a gradient, a tangent, a tensor subclass, or not 4-D"
    if r.act != "relu":
        return f"the fused call has a ReLU, not {r.act or 'no activation'}"
    if len(set(r.dtypes)) > 1 or r.dtypes[0] not in KERNEL_DTYPES:
        return f"dtypes {', '.join(str(dtype).removeprefix('torch.') for dtype in r.dtypes)}"
    if isinstance(r.padding, str):
        return f'padding "{r.padding}"'
    if r.groups != 1:
        return f"{r.groups} groups"
    if any(channels % LANES[r.dtypes[0]] for channels in r.channels):
        return f"{r.channels[0]} -> {r.channels[1]} channels are not multiples of {LANES[r.dtypes[0]]}"
    if r.dtypes[0] != torch.float32 and not r.channels_last:
        return "16 bits, and not channels_last: tensor cores would need copies"
    if r.elements >= INDEXABLE:
        return "a map of 2^31 elements or more"
    return ""


def _request(x: Tensor, weight: Tensor, bias, residual, act, stride, padding, dilation, groups: int) -> Request:
    maps = [t for t in (x, weight, residual) if t is not None]
    tensors = maps if bias is None else [*maps, bias]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    followed = any(map(has_tangent, maps)) or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
    plain = x.dim() == 4 and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    plain = plain and not (wanted or followed)
    return Request(
        device=x.device.type,
        cudnn=torch.version.hip is None
        and hasattr(torch, "cudnn_convolution_relu")
        and torch.backends.cudnn.enabled
        and torch.backends.cudnn.is_available(),
        deterministic=torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
        plain=plain,
        dtypes=tuple(t.dtype for t in tensors),
        act=act,
        padding=padding,
        channels=(x.shape[1], weight.shape[0]) if plain else (0, 0),
        groups=groups,
        channels_last=plain and all(t.is_contiguous(memory_format=torch.channels_last) for t in maps),
        elements=max(x.numel(), x.numel() // max(1, x.shape[1]) * weight.shape[0]) if plain else 0,
    )
