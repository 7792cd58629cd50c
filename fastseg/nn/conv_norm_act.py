"""Convolution, batch norm and activation as one module."""

import torch
from torch import Tensor, nn

from fastseg.nn.fuse.children import check_activations
from fastseg.nn.fuse.conv_norm_act import run_conv_norm_act
from fastseg.nn.leaf import leaf
from fastseg.ops.core.norm import Activation
from fastseg.ops.core.sizes import whole


class ConvNormAct2d(nn.Module):
    """Compute ``act(norm(conv(x)))``.

    In evaluation without gradients, the batch norm is folded into the convolution's weights: at each call where that
    pays, once inside ``fastseg.frozen`` and in a ``Runner``. Parameters, buffers and ``state_dict`` do not change. On
    CUDA, cuDNN's fused call then adds bias and ReLU if it takes the convolution; ``fastseg.explain()`` says why not.

    Children ``conv`` and ``norm`` are an ordinary ``nn.Conv2d`` and ``nn.BatchNorm2d`` (None with ``norm=False``). A
    child that was replaced, or has hooks, is called instead of fused.

    Args:
        in_channels: C of the (N, C, H, W) input.
        out_channels: channels of the output.
        kernel_size: in taps; one number, or height and width.
        stride: in pixels.
        padding: zeros on each side, in pixels; None means ``dilation * (kernel_size - 1) // 2``, which keeps H and W at
            stride 1 where ``dilation * (kernel_size - 1)`` is even.
        dilation: distance of neighbouring taps, in pixels.
        groups: groups of the convolution.
        bias: True to give the convolution a bias; None means only without a norm.
        norm: True for a batch norm after the convolution.
        act: None, "relu", "relu6" or "leaky_relu".
        eps: of the norm.
        momentum: of the norm; None averages cumulatively.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        (N, out_channels, OH, OW), with OH and OW as ``nn.Conv2d``.

    Raises:
        ValueError: the activation is unknown, or ``nn.Conv2d`` raises it.

    Reference: Ioffe and Szegedy, Batch Normalization, arXiv:1502.03167.

    Example:
        >>> ConvNormAct2d(64, 128, stride=2)(torch.randn(2, 64, 32, 32)).shape
        torch.Size([2, 128, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool | None = None,
        norm: bool = True,
        act: Activation | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_activations("ConvNormAct2d", act=act)
        where = {"device": device, "dtype": dtype}
        kernel_size = whole(kernel_size)
        taps = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        pads = tuple(dilation * (k - 1) // 2 for k in taps) if padding is None else padding
        self.conv = nn.Conv2d(
            in_channels, out_channels, taps, stride, pads, dilation, groups, not norm if bias is None else bias, **where
        )
        self.norm = nn.BatchNorm2d(out_channels, eps, momentum, **where) if norm else None
        self.act = act

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, OH, OW)."""
        return run_conv_norm_act(x, self.conv, self.norm, self.act)

    def extra_repr(self) -> str:
        return f"act={self.act!r}"
