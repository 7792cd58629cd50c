"""Inverted residual block with folded norms as one registered op, without gradients."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, autocast_dtype, known, why_torchs
from fastseg.ops.core.forms import Form, Forms, Reference, Verdict
from fastseg.ops.core.layout import channels_last, like, new_map
from fastseg.ops.core.norm import ACTIVATIONS
from fastseg.ops.core.register import register

if HAS_TRITON:
    from fastseg.kernels.inverted_residual.cost import plan
    from fastseg.kernels.inverted_residual.fwd import Weights, inverted_residual_fwd
    from fastseg.kernels.runtime.ceilings import Chip, chip_of
    from fastseg.kernels.runtime.conv_sizes import Geometry
    from fastseg.kernels.runtime.tensors import tf32


class Request(NamedTuple):
    """What decides between the forms."""

    no_kernel: str  # why no kernel can run on such tensors, or what follows the call; or ""
    shape: tuple[int, ...]  # of x; () in a graph
    hidden: int
    out_channels: int
    stride: int
    dilation: int
    dtype: torch.dtype
    channels_last: bool
    tf32: bool
    chip: "Chip | None"


class WholeForm(Form):
    """One kernel for the whole block; ``run`` gets it and the parts, ready to be called."""

    name = "whole"

    def refuses(self, r: Request) -> str:
        if r.no_kernel:
            return r.no_kernel
        if len(r.shape) != 4 or 0 in r.shape:
            return "an empty map, or not 4-D"
        if r.dtype not in (torch.float16, torch.bfloat16):
            return "expansion and pair: the whole block is for 16 bits, where its accumulators fit"
        if not r.channels_last:
            return "expansion and pair: not channels_last"
        return _geometry(r).unsupported()

    def cost(self, r: Request) -> Verdict:
        return plan(_geometry(r), r.hidden, r.dtype, tf32=r.tf32, chip=r.chip)

    def run(self, whole: Callable[[], Tensor], parts: Callable[[], Tensor]) -> Tensor:
        return whole()


def _geometry(r: Request) -> "Geometry":
    N, C, H, W = r.shape
    OH, OW = -(-H // r.stride), -(-W // r.stride)
    return Geometry(N, C, H, W, r.out_channels, OH, OW, 3, r.stride, r.dilation, r.dilation)


FORMS = Forms("inverted_residual", [WholeForm(), Reference(lambda whole, parts: parts(), "parts")])


def whole_or_parts(
    x: Tensor, hidden: int, out_channels: int, stride: int, dilation: int, whole: Callable, parts: Callable
) -> Tensor:
    """``whole()`` if one kernel is faster than an expansion and a pair of convolutions, else ``parts()``.

    Args:
        x: (N, C, H, W); it needs no gradient.
        hidden: channels of the expanded map.
        out_channels: channels of the block's output.
        stride: of the depthwise convolution, in pixels.
        dilation: of the depthwise convolution, in pixels; its padding is the same.
        whole: runs ``inverted_residual``.
        parts: gives the same result.
    """
    why, shape, dtype = why_torchs("inverted_residual", x), known(*x.shape), autocast_dtype(x)
    narrow, chip = (False, None) if why or not shape else (tf32(dtype, x.device), chip_of(x.device))
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    request = Request(why, shape, hidden, out_channels, stride, dilation, dtype, last, narrow, chip)
    y: Tensor = FORMS.decide(request, x).run(whole, parts)
    return y


def inverted_residual(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    *,
    act: Literal["relu", "relu6"] = "relu6",
    stride: int = 1,
    dilation: int = 1,
    residual: bool = False,
) -> Tensor:
    """Compute an inverted residual block, with norms folded into its weights, in one launch:

        e = act(conv2d(x, expand, expand_bias))
        u = act(conv2d(e, depthwise, depthwise_bias, stride, padding=dilation, dilation=dilation, groups=HIDDEN))
        y = conv2d(u, project, project_bias) + (x if residual)

    Args:
        x: (N, C, H, W), C at most 128.
        expand: (HIDDEN, C, 1, 1).
        expand_bias: (HIDDEN,).
        depthwise: (HIDDEN, 1, 3, 3).
        depthwise_bias: (HIDDEN,).
        project: (COUT, HIDDEN, 1, 1).
        project_bias: (COUT,).
        act: "relu" or "relu6".
        stride: of the depthwise convolution, in pixels.
        dilation: of the depthwise convolution, in pixels; its padding is the same.
        residual: True to add ``x``.

    Returns:
        (N, COUT, ceil(H / stride), ceil(W / stride)), in the memory format of ``x``; without gradients.

    Raises:
        ValueError: shapes do not match, or the activation is neither.

    Reference: Sandler et al., MobileNetV2, arXiv:1801.04381.
    """
    C, hidden, cout = x.shape[1], expand.shape[0], project.shape[0]
    wanted = {"expand": (expand, (hidden, C, 1, 1)), "expand_bias": (expand_bias, (hidden,)),
              "depthwise": (depthwise, (hidden, 1, 3, 3)), "depthwise_bias": (depthwise_bias, (hidden,)),
              "project": (project, (cout, hidden, 1, 1)), "project_bias": (project_bias, (cout,))}  # fmt: skip
    for name, (t, shape) in wanted.items():
        if t.shape != shape:
            raise ValueError(f"inverted_residual: x is {tuple(x.shape)}, {name} {tuple(t.shape)}; it must be {shape}")
    if act not in ("relu", "relu6"):
        raise ValueError(f'inverted_residual: act is {act!r}; use "relu" or "relu6"')
    if residual and (stride != 1 or cout != C):
        raise ValueError(f"inverted_residual: a residual needs stride 1, got {stride}, and {C} channels, got {cout}")
    x = x.to(autocast_dtype(x))
    return _fwd(
        x, expand, expand_bias, depthwise, depthwise_bias, project, project_bias, act, stride, dilation, residual
    )


def inverted_residual_ref(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    *,
    act: Literal["relu", "relu6"] = "relu6",
    stride: int = 1,
    dilation: int = 1,
    residual: bool = False,
) -> Tensor:
    """``inverted_residual`` in torch's own lines."""
    e = ACTIVATIONS[act](F.conv2d(x, expand, expand_bias))
    u = F.conv2d(e, depthwise, depthwise_bias, stride, dilation, dilation, groups=depthwise.shape[0])
    y = F.conv2d(ACTIVATIONS[act](u), project, project_bias)
    return y + x if residual else y


def _launch_fwd(x, expand, expand_bias, dw, dw_bias, project, project_bias, act, stride, dilation, residual) -> Tensor:
    cast = lambda t: t.to(x.dtype).contiguous()
    weights = Weights(cast(expand), expand_bias.contiguous(), cast(dw), dw_bias.contiguous(), cast(project),
                      project_bias.contiguous())  # fmt: skip
    return like(x, inverted_residual_fwd(channels_last(x), weights, act, stride, dilation, residual))


def _plain_fwd(x, expand, expand_bias, dw, dw_bias, project, project_bias, act, stride, dilation, residual) -> Tensor:
    cast = lambda t: t.to(x.dtype)
    act = ACTIVATIONS[act]
    e = act(F.conv2d(x, cast(expand), cast(expand_bias)))
    u = act(F.conv2d(e, cast(dw), cast(dw_bias), stride, dilation, dilation, groups=dw.shape[0]))
    y = F.conv2d(u, cast(project), cast(project_bias))
    return like(x, y + x if residual else y)


def _fake_fwd(x, expand, expand_bias, dw, dw_bias, project, project_bias, act, stride, dilation, residual) -> Tensor:
    OH, OW = ((size - 1) // stride + 1 for size in x.shape[2:])
    return new_map(x, (x.shape[0], project.shape[0], OH, OW))


_fwd = register(
    "inverted_residual(Tensor x, Tensor expand, Tensor expand_bias, Tensor dw, Tensor dw_bias, Tensor project, "
    "Tensor project_bias, str act, int stride, int dilation, bool residual) -> Tensor",
    _launch_fwd,
    _plain_fwd,
    _fake_fwd,
)
