"""Convolution with bias, residual and activation, without gradients: one launch of cuDNN or of our own kernel."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.dispatch import KERNEL_DTYPES, followed, is_torchs
from fastseg.ops.core.explain import IN_REFERENCE, in_reference, record
from fastseg.ops.core.norm import Activation
from fastseg.ops.cpu.packed import conv2d
from fastseg.ops.registered.pointwise_conv import choose, finish, pointwise_conv2d
from fastseg.ops.registered.stem_conv import choose_stem, stem_conv2d

INDEXABLE = 2**31  # elements; F.conv2d splits larger maps, the fused call does not
LANES = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}  # channels in 16 bytes

_refused: set[tuple] = set()  # configurations for which cuDNN had no engine


class Request(NamedTuple):
    """Everything that the decision depends on."""

    device: str  # "cuda", "cpu" ...
    cudnn: bool  # True if torch has the fused call and cuDNN to run it
    deterministic: bool  # True if only deterministic algorithms may run
    plain: bool  # 4-D tensors of torch's own type, without gradient or tangent
    dtypes: tuple[torch.dtype, ...]  # of input, weight, and the other tensors
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
    """``act(conv2d(x, weight, bias, stride, padding, dilation, groups) + image_bias[:, :, None, None] + residual)``.

    Meant for calls that need no gradient. With a gradient, or while compiling, torch's functions run one by one.

    cuDNN adds bias, residual and a ReLU in the epilogue of the convolution (``torch.cudnn_convolution_relu``,
    ``torch.cudnn_convolution_add_relu``); torch reads and writes the map once more for each. cuDNN's ReLU may turn NaN
    into 0. A ReLU6 costs one more pass, a minimum. Two kinds of convolution have kernels of their own: a 1x1 at stride
    1, for every epilogue that cuDNN's call lacks, and the first convolution of a network, whose few channels the call
    refuses. A cost model chooses between them and the library (``explain`` shows it).

    Args:
        x: (N, C, H, W).
        residual: (N, COUT, OH, OW), added before the activation.
        image_bias: (N, COUT), a bias for each image.
    """
    args = (stride, padding, dilation, groups)
    if torch.compiler.is_compiling():
        return finish(F.conv2d(x, weight, bias, *args), act, residual, image_bias)
    if is_torchs(x):
        if residual is None and image_bias is None:
            return conv2d(x, weight, bias, *args, act=act)
        return finish(conv2d(x, weight, bias, *args), act, residual, image_bias)
    request = request_of(x, weight, bias, act, *args, residual, image_bias)
    why = IN_REFERENCE if in_reference() else "CPU tensor" if on_cpu(x) else ""
    why = why or unsupported(request)
    key = (x.dtype, x.shape, weight.shape, *args, residual is None)
    why = why or ("cuDNN has no engine for it" if key in _refused else "")
    said = ""
    if request.plain and _is_plain_1x1(weight, *args):
        own = choose(x, weight, bias, act, residual, image_bias, fused_call=not why)
        said = own.why()
        if own.own:
            record("conv2d_act", x, "triton", said)
            return pointwise_conv2d(x, weight, bias, act=act, residual=residual, image_bias=image_bias)
    if why and residual is None and image_bias is None and request.plain and _is_stem(weight, *args):
        stem = choose_stem(x, weight, bias, act, stride[0], padding[0])
        said = stem.why()
        if stem.own:
            record("conv2d_act", x, "triton", said)
            return stem_conv2d(x, weight, bias, act=act, stride=stride[0], padding=padding[0])
    if not why and image_bias is None and (residual is None or act == "relu"):
        try:
            if residual is None:
                y = torch.cudnn_convolution_relu(x, weight, bias, *args)
            else:
                y = torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *args)
        except RuntimeError as error:
            if "CUDNN_STATUS" not in str(error) and "engine" not in str(error):
                raise
            _refused.add(key)
            why = "cuDNN has no engine for it"
        else:
            called = f"convolution, {'bias' if residual is None else 'bias, residual'} and ReLU in one call"
            called += "" if act == "relu" else ", a minimum after it"
            record("conv2d_act", x, "cudnn", f"{called}; {said}" if said else called)
            return y if act == "relu" else y.clamp_(max=6)
    why = why or "a bias for each image, or a residual before a ReLU6, is added after cuDNN's call"
    record("conv2d_act", x, "reference", said or why)
    # On a CPU with one thread (64 channels 256^2, 256 64^2, 512 32^2), channels_last takes 0.85, 0.93 and 0.95 of
    # NCHW's time; oneDNN's own call on packed weights, a private one whose ReLU drops NaN, takes 0.85, 0.91 and 0.88.
    if residual is None and image_bias is None:
        return conv2d(x, weight, bias, *args, act=act)
    return finish(conv2d(x, weight, bias, *args), act, residual, image_bias)


def _is_plain_1x1(weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    return weight.shape[2:] == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0) and groups == 1


def _is_stem(weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """True for a square, undilated convolution on few channels, which the stem kernel may take."""
    numbers = not isinstance(padding, str) and padding[0] == padding[1] and stride[0] == stride[1]
    square = weight.shape[2] == weight.shape[3] > 1
    return numbers and square and weight.shape[1] <= 4 and tuple(dilation) == (1, 1) and groups == 1


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def unsupported(r: Request) -> str:
    """Why cuDNN's fused call cannot or should not take the request, or ""."""
    if r.device != "cuda":
        return f"{r.device} tensor"
    if not r.cudnn:
        return "no cuDNN, or a torch without cudnn_convolution_relu"
    if r.deterministic:
        return "the fused call may choose algorithms that are not deterministic"
    if not r.plain:
        return "a gradient, a tangent, a tensor subclass, or not 4-D"
    if r.act not in ("relu", "relu6"):
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
        return "16 bits, but not channels_last: tensor cores would need copies"
    if r.elements >= INDEXABLE:
        return "a map of 2^31 elements or more"
    return ""


def request_of(x, weight, bias, act, stride, padding, dilation, groups, residual=None, image_bias=None) -> Request:
    maps = [t for t in (x, weight, residual) if t is not None]
    tensors = [*maps, *(t for t in (bias, image_bias) if t is not None)]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plain = x.dim() == 4 and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    plain = plain and not (wanted or followed(*tensors))
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
