"""Separable convolution on a CPU without gradients: fixed norms folded, packed weights, activations in place."""

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.kept import keeper, made_once
from fastseg.ops.core.norm import BatchNormArgs, torch_norm
from fastseg.ops.core.torch_private import transforms_active
from fastseg.ops.registered.fold_norm import fold_norm, pays_on_cpu
from fastseg.ops.registered.separable_conv import compose


def run_folded(
    x: Tensor, dw: Tensor, pw: Tensor, dw_bias: Tensor | None, pw_bias: Tensor | None, residual: Tensor | None,
    stride: int, padding: int, dilation: int, pre_act: str | None, mid_norm: BatchNormArgs | None, mid_act: str | None,
    post_norm: BatchNormArgs | None, post_act: str | None,
) -> Tensor:  # fmt: skip
    """``separable_conv2d`` in fp32 or fp64, where no gradient is recorded."""
    pixels = x.shape[0] * (x.shape[2] // stride) * (x.shape[3] // stride)
    dw, dw_bias, mid_norm = _folded(dw, dw_bias, mid_norm, pixels)
    pw, pw_bias, post_norm = _folded(pw, pw_bias, post_norm, pixels)
    y, _ = compose(
        x, dw, pw, dw_bias, pw_bias, residual, stride, padding, dilation,
        pre_act or "none", mid_act or "none", post_act or "none",
        lambda u: torch_norm(u, mid_norm), lambda z: torch_norm(z, post_norm), inplace=not followed(x),
    )  # fmt: skip
    return y


def _folded(weight: Tensor, bias: Tensor | None, norm: BatchNormArgs | None, pixels: int):
    """Weight, bias and norm of the pair: folded, where the norm is fixed and it pays."""
    if norm is None or norm.training:
        return weight, bias, norm
    if not pays_on_cpu(weight, weight.shape[0] * pixels) and keeper((weight, bias, *norm[:4])) is None:
        return weight, bias, norm
    transformed = transforms_active()  # vmap cannot be asked for channels_last
    last = not transformed and weight.is_contiguous(memory_format=torch.channels_last)
    fold = lambda: fold_norm(weight, bias, *norm[:4], norm.eps, weight.dtype, last)
    made = made_once((weight, bias, *norm[:4]), ("folded", norm.eps, last), fold)
    return *made, None
