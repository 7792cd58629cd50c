"""Depthwise separable convolution with norms, activations and residual as one op."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.dispatch import autocast_dtype, autocasts, is_torchs, known, needs_grad, why_torchs
from fastseg.ops.core.explain import Refusal
from fastseg.ops.core.forms import Form, Forms, Torchs
from fastseg.ops.core.kept import keeper
from fastseg.ops.core.norm import (
    ACTIVATIONS,
    Activation,
    BatchNormArgs,
    activate,
    check_norm,
    norm_options,
    norm_tensors,
    torch_norm,
    update_running,
)
from fastseg.ops.core.override import overridable
from fastseg.ops.core.sizes import whole
from fastseg.ops.cpu.separable import run_folded
from fastseg.ops.registered.fold_norm import fold_norm
from fastseg.ops.registered.separable_conv import (
    KernelForm,
    Request,
    SeparableConv2dFunction,
    request_of,
    run_eval,
    train_op,
)


@overridable
def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pre_act: Activation | None = None,
    mid_norm: BatchNormArgs | None = None,
    mid_act: Activation | None = None,
    post_norm: BatchNormArgs | None = None,
    post_act: Activation | None = None,
    residual: Tensor | None = None,
    out_act: Activation | None = None,
) -> Tensor:
    """Depthwise separable convolution with everything around it:

        u = conv2d(pre_act(x), depthwise_weight, depthwise_bias, stride, padding, dilation, groups=C)
        z = conv2d(mid_act(mid_norm(u)), pointwise_weight, pointwise_bias)
        y = out_act(post_act(post_norm(z)) + residual)

    On a GPU a cost model decides whether the depthwise map stays on the chip or is stored once (``explain`` shows it).
    The backward saves ``x`` and ``z`` and recomputes the rest.

    Args:
        x: (N, C, H, W), contiguous or channels_last; contiguous input costs one copy each way.
        depthwise_weight: (C, 1, K, K).
        pointwise_weight: (COUT, C, 1, 1).
        depthwise_bias: (C,).
        pointwise_bias: (COUT,).
        stride: of the depthwise convolution, in pixels.
        padding: zeros on each side, in pixels; None means ``dilation * (K - 1) // 2``, which keeps H and W at stride 1
            where ``dilation * (K - 1)`` is even.
        dilation: distance between neighbouring taps, in pixels.
        pre_act: activation applied to ``x``; None, "relu", "relu6" or "leaky_relu" (slope 0.01).
        mid_norm: batch norm after the depthwise convolution.
        mid_act: activation after ``mid_norm``.
        post_norm: batch norm of the output.
        post_act: activation of the output.
        residual: (N, COUT, OH, OW), added to the output.
        out_act: activation after the residual; it costs no launch without gradients and without ``post_act``.

    Returns:
        (N, COUT, OH, OW), OH = (H + 2 padding - dilation (K - 1) - 1) // stride + 1, in the memory format of ``x``.
        Under autocast the convolutions run in autocast's dtype, as torch's do.

    Raises:
        ValueError: shapes do not match, an activation is unknown, tensors are on different devices, or batch statistics
            would come from one value per channel.
        TypeError: ``x``, weights and residual differ in dtype outside autocast, or are not floating point; biases and
            norms may have another floating-point dtype.

    Reference: Chollet, Xception, arXiv:1610.02357; orders of norm and activation as in MobileNetV2 (arXiv:1801.04381)
    and DeepLabV3+ (arXiv:1802.02611).
    """
    if type(stride) is not int or type(dilation) is not int or type(padding) is not int:
        stride, dilation, padding = whole(stride), whole(dilation), whole(padding)
        padding = dilation * (depthwise_weight.shape[-1] - 1) // 2 if padding is None else padding
    x = x.to(autocast_dtype(x))
    residual = None if residual is None else residual.to(autocast_dtype(residual))
    tensors = (depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    out = _check(x, *tensors, stride, padding, dilation, pre_act, mid_norm, mid_act, post_norm, post_act, residual)
    if out_act is not None and out_act not in ACTIVATIONS:
        raise ValueError(f'separable_conv2d: out_act is {out_act!r}; use None, "relu", "relu6" or "leaky_relu"')
    mid, post = norm_tensors(mid_norm), norm_tensors(post_norm)
    given, sizes = (*tensors, *mid, *post, residual), (stride, padding, dilation)
    request = _request(x, given, out, sizes, mid_norm is not None and mid_norm.training)
    form, args = FORMS.decide(request, x), (mid_norm, mid_act, post_norm, post_act)
    if not isinstance(form, KernelForm):
        return form.run(x, *tensors, residual, *sizes, pre_act, *args, out_act)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *given))
    batch = (mid_norm is not None and mid_norm.training) or (post_norm is not None and post_norm.training)
    if not wants_grad and not batch:
        taps = _folded_taps(x, depthwise_weight, depthwise_bias, mid_norm, mid, form, request)
        if taps is not None:
            mid_norm = None
            given = (taps[0], pointwise_weight, taps[1], pointwise_bias, *norm_tensors(None), *post, residual)
    options = (
        *sizes, pre_act or "none", mid_act or "none", post_act or "none",
        *norm_options(mid_norm), *norm_options(post_norm),
    )  # fmt: skip
    if not wants_grad and not batch:
        if post_act is None or out_act is None:
            return run_eval(form, request.g, x, *given, *options, out_act or "none")
        return activate(run_eval(form, request.g, x, *given, *options, "none"), out_act, inplace=True)
    chosen = "" if torch.compiler.is_dynamo_compiling() else form.name  # a graph asks again, of the sizes that it meets
    if wants_grad and needs_grad(x, *given):
        y, mid_stats, post_stats = SeparableConv2dFunction.apply(x, *given, *options, "none", chosen)
    else:
        y, _, mid_stats, post_stats = train_op(x, *given, *options, "none", chosen)
    update_running(mid_norm, mid_stats)
    update_running(post_norm, post_stats)
    return activate(y, out_act)


# Values of the depthwise map from which the middle norm is folded into the taps at each call of the fused form: else
# each program computes every channel's scale again, in its K loop. By the static model of an H200 that takes 47 of
# 248 us for 16 x 304 channels of 128x128, 20 of 101 for 16 x 728 of 32x32, 3.0 of 17 for 1 x 304 of 128x128; a launch
# takes 2. The split form computes it once a channel: 8 of 241 us.
FOLDED_FROM = 2**23


def _folded_taps(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: BatchNormArgs | None, of_norm: tuple[Tensor | None, ...],
    form: Form, r: Request,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """Depthwise weight and bias with the norm behind them, for a call without gradients; None as they are.

    Inside ``frozen`` they are kept, and the weight lies as (K, K, C) in memory, as kernels read it best: one layout for
    maps of any size. Outside, they are made at each call where that pays. The norm, whose tensors are ``of_norm``, has
    fixed statistics.
    """
    sources = (weight, bias, *of_norm)
    kept = keeper(sources)
    pays = norm is not None and form.name == "fused" and r.g is not None
    if kept is None and not (pays and r.g.N * r.g.OH * r.g.OW * r.g.C >= FOLDED_FROM):
        return None

    def make() -> tuple[Tensor, Tensor | None]:
        taps, shift = weight.to(x.dtype), bias
        if norm is not None:
            taps, shift = fold_norm(weight, bias, *sources[2:], norm.eps, x.dtype, False)
        return taps.flatten(1).t().contiguous().t().view_as(weight), shift

    key = ("taps", x.dtype, None if norm is None else norm.eps)
    return make() if kept is None else kept.made(sources, key, make)


def separable_conv2d_ref(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pre_act: Activation | None = None,
    mid_norm: BatchNormArgs | None = None,
    mid_act: Activation | None = None,
    post_norm: BatchNormArgs | None = None,
    post_act: Activation | None = None,
    residual: Tensor | None = None,
    out_act: Activation | None = None,
) -> Tensor:
    """``separable_conv2d`` in torch's own lines."""
    padding = dilation * (depthwise_weight.shape[-1] - 1) // 2 if padding is None else padding
    tensors = (depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    sizes = (stride, padding, dilation)
    return _composed(x, *tensors, residual, *sizes, pre_act, mid_norm, mid_act, post_norm, post_act, out_act)


def _composed(
    x, dw, pw, dw_bias, pw_bias, residual, stride, padding, dilation, pre_act, mid_norm, mid_act, post_norm, post_act,
    out_act,
) -> Tensor:  # fmt: skip
    autocast = autocasts(x)  # then torch casts the weights, and keeps the casts
    cast = lambda t: t if t is None or autocast else t.to(x.dtype)
    u = F.conv2d(activate(x, pre_act), cast(dw), cast(dw_bias), stride, padding, dilation, dw.shape[0])
    z = F.conv2d(activate(torch_norm(u, mid_norm), mid_act), cast(pw), cast(pw_bias))
    y = activate(torch_norm(z, post_norm), post_act)
    return activate(y if residual is None else y + residual, out_act)


# --- forms


def _request(
    x: Tensor, given: tuple[Tensor | None, ...], out: tuple[int, ...], sizes: tuple[int, int, int], batch: bool
) -> Request:
    folds, K = not torch.is_grad_enabled() and x.dtype in (torch.float32, torch.float64), given[0].shape[-1]
    if is_torchs(x) and all(t is None or t.is_cpu for t in given):
        return Request("CPU tensor", None, x.dtype, batch, None, folds)
    why = why_torchs("separable_conv2d", x, *given)
    why = "empty output" if 0 in out else f"kernel size {K} > 7" if K > 7 else why  # torch differentiates these itself
    if why or not known(out):
        return Request(why, None, x.dtype, batch, None, folds)
    return request_of(x, (*x.shape, *out[1:]), K, sizes, batch, folds)


class FoldedForm(Form):
    """Torch's ops with fixed norms folded into the weights, on a CPU packed ones."""

    name, path = "folded", "torch"

    def refuses(self, r: Request) -> str:
        return "" if r.folds else "gradients are recorded, or 16 bits"

    def why(self, r: Request, refused: Sequence[Refusal]) -> str:
        return r.no_kernel

    def run(self, *args) -> Tensor:
        *args, out_act = args
        return activate(run_folded(*args), out_act, inplace=True)


FORMS = Forms("separable_conv2d", [KernelForm("fused"), KernelForm("split"), FoldedForm(), Torchs(_composed)])


def _check(
    x, dw, pw, dw_bias, pw_bias, stride, padding, dilation, pre_act, mid_norm, mid_act, post_norm, post_act, residual
) -> tuple[int, int, int, int]:
    """Raise on bad arguments; return the output's shape."""
    name = "separable_conv2d"
    for label, act in (("pre_act", pre_act), ("mid_act", mid_act), ("post_act", post_act)):
        if act is not None and act not in ACTIVATIONS:
            raise ValueError(f'{name}: {label} is {act!r}; use None, "relu", "relu6" or "leaky_relu"')
    if x.dim() != 4:
        raise ValueError(f"{name}: x is {tuple(x.shape)}; it must be (N, C, H, W)")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x is {x.dtype}; it must be a floating-point tensor")
    C, K = dw.shape[0], dw.shape[-1]
    if dw.shape != (x.shape[1], 1, K, K):
        raise ValueError(
            f"{name}: depthwise_weight is {tuple(dw.shape)}; x has {x.shape[1]} channels: use (C, 1, K, K)"
        )
    if pw.dim() != 4 or pw.shape[1:] != (C, 1, 1):
        raise ValueError(f"{name}: pointwise_weight is {tuple(pw.shape)}; it must be (COUT, {C}, 1, 1)")
    if stride < 1 or dilation < 1 or padding < 0:
        raise ValueError(f"{name}: stride {stride} and dilation {dilation} must be >= 1, padding {padding} >= 0")
    for label, t in (("depthwise_weight", dw), ("pointwise_weight", pw), ("residual", residual)):
        if t is not None and t.dtype != x.dtype and not autocasts(x):
            raise TypeError(
                f"{name}: x is {x.dtype} and {label} {t.dtype}; they should be the same: cast one, or use autocast"
            )
    (N, _, H, W), space = x.shape, 2 * padding - dilation * (K - 1) - 1
    OH, OW = (H + space) // stride + 1, (W + space) // stride + 1
    if OH < 1 or OW < 1:
        raise ValueError(
            f"{name}: x is {tuple(x.shape)}, smaller than the {K}x{K} taps at dilation {dilation}; pad more"
        )
    out = (N, pw.shape[0], OH, OW)
    for label, bias, channels in (("depthwise_bias", dw_bias, C), ("pointwise_bias", pw_bias, pw.shape[0])):
        if bias is not None and bias.shape != (channels,):
            raise ValueError(f"{name}: {label} is {tuple(bias.shape)}; it must be ({channels},)")
    for label, norm, channels in (("mid_norm", mid_norm, C), ("post_norm", post_norm, pw.shape[0])):
        check_norm(f"{name}: {label}", norm, channels, x, out)
    if residual is not None and residual.shape != out:
        raise ValueError(f"{name}: residual is {tuple(residual.shape)}, the output is {out}; they must be equal")
    return out
