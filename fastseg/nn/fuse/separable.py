"""Run depthwise and pointwise convolutions, norms and activations as one separable convolution."""

import torch
from torch import Tensor, nn

from fastseg.nn.fuse.children import Act, batch_norm_args, check_activations, conv_tensors, not_fusible
from fastseg.nn.fuse.watch import apply_act, split_act
from fastseg.ops import separable_conv2d
from fastseg.ops.core.dispatch import record_reference
from fastseg.ops.core.norm import ACTIVATIONS, Activation
from fastseg.ops.core.recompute import kept_as_recipe


def run_separable(
    x: Tensor,
    depthwise: nn.Conv2d,
    mid_norm: nn.BatchNorm2d | None,
    mid_act: Act,
    pointwise: nn.Conv2d,
    post_norm: nn.BatchNorm2d | None,
    post_act: Act,
    *,
    pre_act: Act = None,
    residual: Tensor | None = None,
    out_act: Activation | None = None,
) -> Tensor:
    """Run torch modules, of any place and name, as one separable convolution.

    Activations are names or modules. Modules that the op cannot replace (SyncBatchNorm, a quantised or parametrised
    child, one with hooks, string padding, another activation) are called one after the other, with the same result;
    ``fastseg.explain()`` says why.
    """
    acts = (pre_act, mid_act, post_act)
    other = None
    if isinstance(pre_act, nn.Module) or isinstance(mid_act, nn.Module) or isinstance(post_act, nn.Module):
        (pre_act, mid_act, post_act), modules = zip(*map(split_act, acts), strict=True)
        other = next(filter(None, modules), None)
    why = not_fusible(depthwise, mid_norm, pointwise, post_norm)
    why = why or ("" if other is None else f"an activation is {type(other).__name__}, or watched")
    if why:
        check_activations("run_separable", pre_act=pre_act, mid_act=mid_act, post_act=post_act, out_act=out_act)
        record_reference("separable_conv2d", x, why)
        before, between, after = acts
        norm = lambda module, v: v if module is None else module(v)
        u = apply_act(between, norm(mid_norm, depthwise(apply_act(before, x))))
        y = apply_act(after, norm(post_norm, pointwise(u)))
        return ACTIVATIONS[out_act or "none"](y if residual is None else y + residual)
    (dw, dw_bias), (pw, pw_bias) = conv_tensors(depthwise), conv_tensors(pointwise)
    options = {
        "stride": depthwise.stride[0], "padding": depthwise.padding[0], "dilation": depthwise.dilation[0],
        "pre_act": pre_act, "mid_norm": batch_norm_args(mid_norm), "mid_act": mid_act,
        "post_norm": batch_norm_args(post_norm), "post_act": post_act, "residual": residual, "out_act": out_act,
    }  # fmt: skip
    if not torch.is_grad_enabled():
        return separable_conv2d(x, dw, pw, dw_bias, pw_bias, **options)
    with kept_as_recipe(x):
        return separable_conv2d(x, dw, pw, dw_bias, pw_bias, **options)
