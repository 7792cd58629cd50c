"""Atrous spatial pyramid pooling as a module, and the function that runs it over existing children."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastseg.nn.conv import SeparableConv2d
from fastseg.nn.fuse.aspp import CONCAT, SUM, run_aspp, run_aspp_sum
from fastseg.nn.fuse.sequential import Sequential
from fastseg.nn.leaf import leaf


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (ASPP): parallel 1x1, dilated 3x3 and image-mean branches, merged by a 1x1.

    With ``fusion="concat"`` (DeepLabV3 and V3+) every branch and the projection end with batch norm and ReLU. With
    ``fusion="sum"`` (DeepLabV2) the module is the sum of dilated convolutions.

    In evaluation without gradients, norms are folded. One launch computes all branches and skips products with padding;
    another computes the projection, which takes the pooled vector as a bias per image. In training the backward saves
    ``x`` once for all branches, and one norm runs over the channels of all branches, with batch statistics per channel.

    Children are ordinary torch modules with torchvision's names: ``convs.0`` (1x1), ``convs.1`` and following (one per
    rate), the last of ``convs`` (image pool, if any), ``project``. With ``separable``, each rate's branch is a
    ``SeparableConv2d`` with a norm and a ReLU after each of its two convolutions. With "sum", ``convs.i`` is the
    ``nn.Conv2d`` itself.

    Args:
        in_channels: C of the (N, C, H, W) input.
        out_channels: channels of every branch, and of the output.
        rates: dilation of each 3x3 branch, in pixels.
        separable: True for depthwise separable 3x3 branches; "concat" only.
        bias: True to give convolutions a bias.
        image_pool: True to add a branch for the image mean; "concat" only.
        fusion: "concat" or "sum".
        dropout: probability of dropout after the projection, or after the sum.
        pool_first: True if the pooled channels come first in the projection's weight (TensorFlow's order), False if
            last.
        eps: of the norms.
        momentum: of the norms; None averages cumulatively.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        (N, out_channels, H, W).

    Raises:
        ValueError: there are no rates, a rate is below 1, the fusion is unknown, or a sum is to be separable.

    Training with an image pool needs a batch of two or more: its norm sees one pixel per image.

    Reference: Chen et al., DeepLabV3, arXiv:1706.05587; "sum": DeepLab, arXiv:1606.00915.

    Example:
        >>> ASPP(320)(torch.randn(2, 320, 32, 32)).shape
        torch.Size([2, 256, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rates: Sequence[int] = (6, 12, 18),
        *,
        separable: bool = False,
        bias: bool = False,
        image_pool: bool = True,
        fusion: str = CONCAT,
        dropout: float = 0.0,
        pool_first: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if fusion not in (CONCAT, SUM):
            raise ValueError(f'ASPP: fusion is {fusion!r}; use "concat" or "sum"')
        if not rates or min(rates) < 1:
            raise ValueError(f"ASPP: rates are {tuple(rates)}; give one or more, each at least 1")
        if separable and fusion == SUM:
            raise ValueError("ASPP: the summed form has dense convolutions; separable goes with fusion='concat'")
        where = {"device": device, "dtype": dtype}

        def conv(inputs: int, kernel_size: int = 1, rate: int = 1) -> nn.Conv2d:
            padding = rate * (kernel_size // 2)
            return nn.Conv2d(inputs, out_channels, kernel_size, padding=padding, dilation=rate, bias=bias, **where)

        def norm_relu() -> list[nn.Module]:
            return [nn.BatchNorm2d(out_channels, eps, momentum, **where), nn.ReLU()]

        def branch(rate: int) -> nn.Module:
            if not separable:
                return Sequential(conv(in_channels, 3, rate), *norm_relu())
            return SeparableConv2d(
                in_channels, out_channels, dilation=rate, bias=bias, mid_norm=True, mid_act="relu", eps=eps,
                momentum=momentum, **where,
            )  # fmt: skip

        self.fusion, self.pool_first = fusion, pool_first
        self.image_pool = image_pool and fusion == CONCAT
        if fusion == SUM:
            self.convs = nn.ModuleList(conv(in_channels, 3, rate) for rate in rates)
            self.project = nn.Sequential(nn.Dropout(dropout))
            return
        self.convs = nn.ModuleList([Sequential(conv(in_channels), *norm_relu()), *map(branch, rates)])
        if self.image_pool:
            self.convs.append(Sequential(nn.AdaptiveAvgPool2d(1), conv(in_channels), *norm_relu()))
        self.project = Sequential(conv(out_channels * len(self.convs)), *norm_relu(), nn.Dropout(dropout))

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        if self.fusion == SUM:
            return self.project(run_aspp_sum(x, list(self.convs)))
        branches = list(self.convs._modules.values())  # what ``list`` of a ModuleList gives, in two calls less
        pool = branches.pop() if self.image_pool else None
        return run_aspp(x, branches, pool, self.project, pool_first=self.pool_first)

    def extra_repr(self) -> str:
        return f"fusion={self.fusion!r}" + (", pool_first=True" if self.pool_first else "")
