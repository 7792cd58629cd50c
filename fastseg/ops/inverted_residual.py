"""Inverted residual block with folded norms as one registered op, without gradients."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, autocast_dtype, use_kernel
from fastseg.ops.core.layout import channels_last, like, new_map
from fastseg.ops.core.norm import ACTIVATIONS
from fastseg.ops.core.register import register

if HAS_TRITON:
    from fastseg.kernels.inverted_residual.cost import plan
    from fastseg.kernels.inverted_residual.fwd import Weights, inverted_residual_fwd
    from fastseg.kernels.runtime.ceilings import chip_of
    from fastseg.kernels.runtime.conv_sizes import Geometry
    from fastseg.kernels.runtime.tensors import tf32


def takes_whole(x: Tensor, hidden: int, out_channels: int, stride: int, dilation: int) -> bool:
    """True if one kernel is faster than an expansion and a pair of convolutions; recorded for ``explain``.

    Args:
        x: (N, C, H, W); it needs no gradient.
        hidden: channels of the expanded map.
        out_channels: channels of the block's output.
        stride: of the depthwise convolution, in pixels.
        dilation: of the depthwise convolution, in pixels; its padding is the same.
    """
    why, form = _why_parts(x, hidden, out_channels, stride, dilation)
    return use_kernel("inverted_residual", x, unsupported=why, form=lambda: form)


def _why_parts(x: Tensor, hidden: int, out_channels: int, stride: int, dilation: int) -> tuple[str, str]:
    """Return why the block runs as expansion and pair ("" if it runs whole) and what the cost model says."""
    if not HAS_TRITON or x.dim() != 4 or x.numel() == 0:
        return "an empty map, or not 4-D", ""
    dtype = autocast_dtype(x)
    if dtype not in (torch.float16, torch.bfloat16):
        return "expansion and pair: the whole block is for 16 bits, where its accumulators fit", ""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "expansion and pair: not channels_last", ""
    N, C, H, W = x.shape
    g = Geometry(N, C, H, W, out_channels, -(-H // stride), -(-W // stride), 3, stride, dilation, dilation)
    if why := g.unsupported():
        return why, ""
    chosen = plan(g, hidden, dtype, tf32=tf32(dtype, x.device), chip=chip_of(x.device))
    return "" if chosen.whole else str(chosen), str(chosen)


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
