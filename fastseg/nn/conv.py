"""Separable convolution as a module, and the function that runs it over existing Conv2d and BatchNorm2d children."""

import torch
from torch import Tensor, nn

from fastseg.nn.leaf import leaf
from fastseg.nn.watch import apply_act, split_act, watched
from fastseg.ops import BatchNormArgs, separable_conv2d
from fastseg.ops._batch_norm import ACTIVATIONS, Activation
from fastseg.ops._dispatch import record_reference
from fastseg.ops._recompute import kept_as_recipe
from fastseg.ops._sizes import whole

Act = Activation | nn.Module | None  # by its name, or the module that a model has for it


class SeparableConv2d(nn.Module):
    """Depthwise K x K, then pointwise 1x1, each with optional batch norm and activation, as one op.

    The order is ``pre_act, depthwise, mid_norm, mid_act, pointwise, post_norm, post_act``; leaving parts out gives the
    orders found in the field (the article's Xception blocks: ``pre_act="relu", mid_norm=True, post_act=None``;
    MobileNetV2: ``mid_norm=True, mid_act="relu6", post_act=None``; a separable ASPP branch: ``mid_norm=True,
    mid_act="relu"``). An order that begins with a norm is ``nn.BatchNorm2d`` in front, and ``pre_act``.

    Children ``depthwise``, ``mid_norm``, ``pointwise``, ``post_norm`` are ordinary ``nn.Conv2d`` and ``nn.BatchNorm2d``
    (absent norms are None): weights load, convert and quantise as torch's own.

    Args:
        in_channels: C of the (N, C, H, W) input.
        out_channels: channels of the output.
        kernel_size: K, in taps.
        stride: in pixels.
        padding: zeros on each side, in pixels; None means ``dilation * (kernel_size - 1) // 2``, which keeps H and W at
            stride 1 where ``dilation * (kernel_size - 1)`` is even.
        dilation: distance of neighbouring taps, in pixels.
        bias: whether both convolutions have a bias.
        pre_act: activation of the input: None, "relu", "relu6" or "leaky_relu".
        mid_norm: whether a batch norm stands between the halves.
        mid_act: activation between the halves.
        post_norm: whether a batch norm ends the module.
        post_act: activation of the output.
        eps: of both norms.
        momentum: of both norms; None averages cumulatively.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        (N, out_channels, OH, OW), in the memory format of the input.

    Raises:
        ValueError: an unknown activation.

    Reference: Chollet, Xception, arXiv:1610.02357.

    Example:
        >>> block = SeparableConv2d(64, 128, mid_norm=True, mid_act="relu")
        >>> block(torch.randn(2, 64, 32, 32)).shape
        torch.Size([2, 128, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        bias: bool = False,
        pre_act: Activation | None = None,
        mid_norm: bool = False,
        mid_act: Activation | None = None,
        post_norm: bool = True,
        post_act: Activation | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_activations("SeparableConv2d", pre_act=pre_act, mid_act=mid_act, post_act=post_act)
        kernel_size = whole(kernel_size)
        if not isinstance(kernel_size, int):
            raise TypeError(f"SeparableConv2d: kernel_size is {kernel_size!r}; it must be an int: the kernel is square")
        where = {"device": device, "dtype": dtype}
        norm = lambda channels: nn.BatchNorm2d(channels, eps, momentum, **where)
        padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride, padding, dilation, groups=in_channels, bias=bias, **where
        )
        self.mid_norm = norm(in_channels) if mid_norm else None
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias, **where)
        self.post_norm = norm(out_channels) if post_norm else None
        self.pre_act, self.mid_act, self.post_act = pre_act, mid_act, post_act

    @leaf
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W); residual: shaped as the output, added last."""
        return run_separable(
            x, self.depthwise, self.mid_norm, self.mid_act, self.pointwise, self.post_norm, self.post_act,
            pre_act=self.pre_act, residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"pre_act={self.pre_act!r}, mid_act={self.mid_act!r}, post_act={self.post_act!r}"


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
    """Run torch modules, wherever they live and whatever they are called, as one separable convolution.

    Activations are names or modules. Modules that the op cannot stand for (SyncBatchNorm, a quantised or parametrised
    child, one with hooks, string padding, another activation) are called one after the other instead, with the same
    result; ``fastseg.explain()`` says why.
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
    with kept_as_recipe(x):
        return separable_conv2d(
            x, depthwise.weight, pointwise.weight, depthwise.bias, pointwise.bias,
            stride=depthwise.stride[0], padding=depthwise.padding[0], dilation=depthwise.dilation[0],
            pre_act=pre_act, mid_norm=batch_norm_args(mid_norm), mid_act=mid_act,
            post_norm=batch_norm_args(post_norm), post_act=post_act, residual=residual, out_act=out_act,
        )  # fmt: skip


def batch_norm_args(norm: nn.BatchNorm2d | None) -> BatchNormArgs | None:
    """What ``nn.BatchNorm2d.forward`` hands to ``batch_norm``; counts the batch, as it does."""
    if norm is None:
        return None
    momentum = norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    mean, var = norm.running_mean, norm.running_var
    training = norm.training or mean is None
    if norm.training and not norm.track_running_stats:
        mean = var = None
    return BatchNormArgs(mean, var, norm.weight, norm.bias, training, 0.0 if momentum is None else momentum, norm.eps)


def check_activations(name: str, **acts: str | None) -> None:
    for label, act in acts.items():
        if act is not None and act not in ACTIVATIONS:
            raise ValueError(f'{name}: {label} is {act!r}; use None, "relu", "relu6" or "leaky_relu"')


def not_fusible(depthwise: nn.Module, mid_norm: nn.Module | None, pointwise: nn.Module, post_norm) -> str:
    """Why these modules must be called as they are, or ""."""
    pairs = ((depthwise, nn.Conv2d), (mid_norm, nn.BatchNorm2d), (pointwise, nn.Conv2d), (post_norm, nn.BatchNorm2d))
    if why := next(filter(None, (watched(module, plain) for module, plain in pairs)), ""):
        return why
    d, p = depthwise, pointwise
    square = all(isinstance(v, tuple) and v[0] == v[1] for v in (d.kernel_size, d.stride, d.padding, d.dilation))
    if not square or d.padding_mode != "zeros" or not d.groups == d.in_channels == d.out_channels:
        return "the depthwise convolution has uneven sizes, a padding mode, or more than one filter a channel"
    if p.kernel_size != (1, 1) or p.stride != (1, 1) or p.padding != (0, 0) or p.groups != 1:
        return "the pointwise convolution is not a plain 1x1"
    return ""
