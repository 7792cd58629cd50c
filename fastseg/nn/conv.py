"""Depthwise separable convolution as a module."""

import torch
from torch import Tensor, nn

from fastseg.nn.fuse.children import check_activations
from fastseg.nn.fuse.separable import run_separable
from fastseg.nn.leaf import leaf
from fastseg.ops.core.norm import Activation
from fastseg.ops.core.sizes import whole


class SeparableConv2d(nn.Module):
    """Depthwise KxK convolution and pointwise 1x1, each with optional batch norm and activation, as one op.

    The order is ``pre_act, depthwise, mid_norm, mid_act, pointwise, post_norm, post_act``. Leaving parts out gives the
    usual orders: ``pre_act="relu", mid_norm=True, post_act=None`` for the Xception blocks of DeepLabV3+,
    ``mid_norm=True, mid_act="relu6", post_act=None`` for MobileNetV2, ``mid_norm=True, mid_act="relu"`` for a separable
    ASPP branch. For an order that begins with a norm, put an ``nn.BatchNorm2d`` in front and use ``pre_act``.

    Children ``depthwise``, ``mid_norm``, ``pointwise``, ``post_norm`` are ordinary ``nn.Conv2d`` and ``nn.BatchNorm2d``
    modules (None for absent norms): weights load, convert and quantise as torch's own.

    Args:
        in_channels: C of the (N, C, H, W) input.
        out_channels: channels of the output.
        kernel_size: K, in taps.
        stride: of the depthwise convolution, in pixels.
        padding: zeros on each side, in pixels; None means ``dilation * (kernel_size - 1) // 2``, which keeps H and W at
            stride 1 where ``dilation * (kernel_size - 1)`` is even.
        dilation: distance between neighbouring taps, in pixels.
        bias: True to give both convolutions a bias.
        pre_act: activation of the input: None, "relu", "relu6" or "leaky_relu".
        mid_norm: True for a batch norm after the depthwise convolution.
        mid_act: activation after ``mid_norm``.
        post_norm: True for a batch norm after the pointwise convolution.
        post_act: activation of the output.
        eps: of both norms.
        momentum: of both norms; None averages cumulatively.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        (N, out_channels, OH, OW), in the memory format of the input.

    Raises:
        ValueError: an activation is unknown, or ``kernel_size`` is not an int.

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
        """x: (N, C, H, W); residual: (N, out_channels, OH, OW), added to the output."""
        children = self._modules  # an absent norm is no child; attributes would cost a call each
        return run_separable(
            x, children["depthwise"], children.get("mid_norm"), self.mid_act, children["pointwise"],
            children.get("post_norm"), self.post_act, pre_act=self.pre_act, residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"pre_act={self.pre_act!r}, mid_act={self.mid_act!r}, post_act={self.post_act!r}"
