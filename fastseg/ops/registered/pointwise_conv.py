"""1x1 convolution with bias, bias per image, residual and activation as one registered op, without gradients.

``conv2d_act`` chooses between its kernel and the library.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, autocast_dtype, autocasts, kernels_run
from fastseg.ops.core.layout import channels_last, like, new_map
from fastseg.ops.core.norm import ACTIVATIONS, Activation, activate, add_residual
from fastseg.ops.core.register import register

if HAS_TRITON:
    from fastseg.kernels.dense_conv.pointwise import plan, pointwise_conv_fwd
    from fastseg.kernels.runtime.ceilings import chip_of
    from fastseg.kernels.runtime.conv_sizes import Geometry
    from fastseg.kernels.runtime.tensors import tf32


def finish(y: Tensor, act: str | None, residual: Tensor | None, image_bias: Tensor | None) -> Tensor:
    """Apply ``act(y + image_bias + residual)`` to the output ``y`` of a convolution, in place; differentiable."""
    if image_bias is not None:
        y = add_residual(y, image_bias.to(y.dtype)[:, :, None, None])
    return activate(add_residual(y, residual), act, inplace=True)


class Choice(NamedTuple):
    own: bool
    why: Callable[[], str]


def plain_dtypes(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, image_bias: Tensor | None = None
) -> str:
    """Why torch's functions must take these dtypes and devices (they may raise), or ""."""
    if any(t.device != x.device for t in (weight, bias, residual, image_bias) if t is not None):
        return "tensors on different devices"
    cast = autocasts(x)  # torch then casts the parameters; a kernel casts as it loads
    same = (residual,) if cast else (weight, bias, residual)
    return "dtypes that differ" if any(t is not None and t.dtype != autocast_dtype(x) for t in same) else ""


def choose(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, residual: Tensor | None,
    image_bias: Tensor | None, *, fused_call: bool,
) -> Choice:  # fmt: skip
    """Return whether the kernel or a library takes a 1x1 convolution at stride 1, and why.

    Args:
        x: (N, C, H, W); the others as in ``pointwise_conv2d``. No gradient is needed.
        fused_call: True if the library adds bias and ReLU in its own call.
    """
    if not kernels_run(x) or x.numel() == 0:
        return Choice(False, str)
    if why := plain_dtypes(x, weight, bias, residual, image_bias):
        return Choice(False, lambda: why)
    if not x.is_contiguous(memory_format=torch.channels_last):
        return Choice(False, lambda: "not channels_last: the kernel would need copies")
    N, C, H, W = x.shape
    COUT = weight.shape[0]
    if why := Geometry(N, C, H, W, COUT, H, W, 1, 1, 0, 1).unsupported():
        return Choice(False, lambda: why)
    after: list[int] = []  # passes over y when the library runs
    if not fused_call or image_bias is not None or (residual is not None and act != "relu"):
        for present, passes in ((bias, 2), (image_bias, 2), (residual, 3), (act, 2)):
            after += [passes] * (present is not None)
    elif act != "relu":
        after = [2]  # a minimum makes a ReLU6 of a ReLU
    dtype = autocast_dtype(x)
    options = {"residual": residual is not None, "tf32": tf32(dtype, x.device), "chip": chip_of(x.device)}
    chosen = plan(N * H * W, C, COUT, dtype, tuple(after), **options)
    return Choice(chosen.own, lambda: str(chosen))


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
    bias, image_bias = (None if t is None else t.contiguous() for t in (bias, image_bias))
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
