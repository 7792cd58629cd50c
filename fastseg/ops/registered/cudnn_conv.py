"""cuDNN's fused call: convolution, bias, residual and ReLU at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg.ops.core.conv_request import ConvCall, ConvRequest
from fastseg.ops.core.dispatch import KERNEL_DTYPES
from fastseg.ops.core.explain import Refusal
from fastseg.ops.core.forms import Form, Refused

INDEXABLE = 2**31  # elements; F.conv2d splits larger maps, the fused call does not
LANES = {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8}  # channels in 16 bytes


class CudnnForm(Form):
    """``torch.cudnn_convolution_relu`` and ``torch.cudnn_convolution_add_relu``; a ReLU6 costs a minimum after them.

    torch reads and writes the map once more for each of bias, residual and ReLU. cuDNN's ReLU may turn NaN into 0.
    """

    name, path = "cudnn", "cudnn"

    def __init__(self) -> None:
        self.no_engine: set[ConvRequest] = set()  # what cuDNN refused when it was called

    def refuses(self, r: ConvRequest) -> str:
        if why := unsupported(r):
            return why
        if r.image_bias or (r.residual and r.act != "relu"):
            return "a bias for each image, or a residual before a ReLU6, is added after cuDNN's call"
        return "cuDNN has no engine for it" if r in self.no_engine else ""

    def why(self, r: ConvRequest, refused: Sequence[Refusal]) -> str:
        called = f"convolution, {'bias, residual' if r.residual else 'bias'} and ReLU in one call"
        called += "" if r.act == "relu" else ", a minimum after it"
        return "; ".join([called, *(each.why for each in refused if each.microseconds is not None)])

    def run(self, call: ConvCall) -> Tensor:
        x, weight, bias, act, *args = call[:8]
        try:
            if call.residual is None:
                y = torch.cudnn_convolution_relu(x, weight, bias, *args)
            else:
                y = torch.cudnn_convolution_add_relu(x, weight, call.residual, 1.0, bias, *args)
        except RuntimeError as error:
            if "CUDNN_STATUS" not in str(error) and "engine" not in str(error):
                raise
            raise Refused(str(error)) from error
        return y if act == "relu" else y.clamp_(max=6)

    def remember(self, r: ConvRequest, why: str) -> None:
        self.no_engine.add(r)


def unsupported(r: ConvRequest) -> str:
    """Why the fused call cannot or should not take the convolution and its activation, or ""."""
    if r.device != "cuda":
        return "CPU tensor" if r.device == "cpu" else f"{r.device} tensor"
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


CUDNN = CudnnForm()
