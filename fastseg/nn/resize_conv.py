"""Convolutions of resized maps that multiply the small maps: the fusions of decoders, as modules."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fastseg.nn.fuse.children import check_activations
from fastseg.nn.fuse.resize import run_linear_fuse, run_nearest_concat_conv, run_resize_concat_conv
from fastseg.nn.leaf import leaf
from fastseg.ops.core.norm import Activation
from fastseg.ops.core.sizes import whole


class _ConvNorm(nn.Module):
    """Children ``conv``, which keeps the size of its map, and ``norm``, and the name of an activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool | None,
        norm: bool,
        act: Activation | None,
        eps: float,
        momentum: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        name = type(self).__name__
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        kernel_size = whole(kernel_size)
        if kernel_size not in (1, 3):
            raise ValueError(f"{name}: kernel_size is {kernel_size}; it must be 1 or 3")
        check_activations(name, act=act)
        bias = not norm if bias is None else bias
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias, **where)
        self.norm = nn.BatchNorm2d(out_channels, eps, momentum, **where) if norm else None
        self.act = act

    def extra_repr(self) -> str:
        return f"act={self.act!r}"


class ResizeConcatConv2d(_ConvNorm):
    """Compute ``act(norm(conv(cat([interpolate(m, size) for m in maps], 1))))``, a 1x1 or 3x3 convolution.

    Maps that are smaller than the result are multiplied at their own size
    (``fastseg.ops.resize_concat_conv2d``); neither the resized maps nor their concatenation is written where that pays.
    In evaluation the norm is folded. Children ``conv`` and ``norm`` are ordinary modules of torch; one that was
    replaced, or has hooks, is called on the concatenation.

    Args:
        in_channels: C_i of each map.
        out_channels: channels of the output.
        kernel_size: 1 or 3, in taps.
        mode: "bilinear" or "nearest".
        align_corners: as in ``torch.nn.functional.interpolate``, for "bilinear".
        bias: True to give the convolution a bias; None means only without a norm.
        norm: True for a batch norm after the convolution.
        act: None, "relu", "relu6" or "leaky_relu".
        eps: of the norm.
        momentum: of the norm; None averages cumulatively.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        (N, out_channels, H, W); ``forward`` has the sizes.

    Raises:
        ValueError: kernel size, mode or activation is unknown, or there is no map.

    Reference: the fusion of UPerNet, Xiao et al., arXiv:1807.10221.

    Example:
        >>> fuse = ResizeConcatConv2d([8, 16], 32, 3)
        >>> fuse([torch.randn(1, 8, 16, 16), torch.randn(1, 16, 4, 4)]).shape
        torch.Size([1, 32, 16, 16])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        kernel_size: int = 1,
        *,
        mode: Literal["bilinear", "nearest"] = "bilinear",
        align_corners: bool = False,
        bias: bool | None = None,
        norm: bool = True,
        act: Activation | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not in_channels:
            raise ValueError("ResizeConcatConv2d: there is no map")
        if mode not in ("bilinear", "nearest"):
            raise ValueError(f'ResizeConcatConv2d: mode is {mode!r}; use "bilinear" or "nearest"')
        super().__init__(sum(in_channels), out_channels, kernel_size, bias, norm, act, eps, momentum, device, dtype)
        self.mode, self.align_corners = mode, align_corners

    @leaf
    def forward(self, maps: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Maps (N, C_i, h_i, w_i) -> (N, out_channels, H, W); ``size`` (H, W) in pixels, None that of the first map."""
        height, width = maps[0].shape[2:] if size is None else size
        corners = self.align_corners and self.mode == "bilinear"
        return run_resize_concat_conv(
            list(maps), (height, width), self.conv, self.norm, self.act, mode=self.mode, align_corners=corners
        )

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, align_corners={self.align_corners}, {super().extra_repr()}"


class UpsampleNearestConv2d(_ConvNorm):
    """Compute ``act(norm(conv(cat([interpolate(x, size), skip], 1))))``, nearest neighbours and a 3x3 convolution.

    Where the size doubles, the filters of equal pixels are summed and the small map is multiplied: 4 products in place
    of 9 (``fastseg.ops.upsample_nearest_conv2d``). Children as in ``ResizeConcatConv2d``.

    Args:
        in_channels: C of the small map.
        skip_channels: CS of the map beside it, 0 without one.
        out_channels: channels of the output.
        up_first: False for ``cat([skip, interpolate(x, size)], 1)``.
        bias: True to give the convolution a bias; None means only without a norm.
        norm: True for a batch norm after the convolution.
        act: None, "relu", "relu6" or "leaky_relu".
        eps: of the norm.
        momentum: of the norm; None averages cumulatively.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        (N, out_channels, H, W); ``forward`` has the sizes.

    Raises:
        ValueError: the activation is unknown.

    Reference: Odena et al., Deconvolution and checkerboard artifacts, doi:10.23915/distill.00003.

    Example:
        >>> UpsampleNearestConv2d(16, 8, 4)(torch.randn(1, 16, 4, 4), torch.randn(1, 8, 8, 8)).shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        *,
        up_first: bool = True,
        bias: bool | None = None,
        norm: bool = True,
        act: Activation | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_channels + skip_channels, out_channels, 3, bias, norm, act, eps, momentum, device, dtype)
        self.up_first = up_first

    @leaf
    def forward(self, x: Tensor, skip: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """(N, C, h, w), skip (N, CS, H, W) -> (N, out_channels, H, W).

        Args:
            x: the small map.
            skip: the map beside it; None without one.
            size: (H, W) in pixels; None means the size of ``skip``, or twice that of ``x`` without one.
        """
        if size is None:
            size = (2 * x.shape[2], 2 * x.shape[3]) if skip is None else (skip.shape[2], skip.shape[3])
        return run_nearest_concat_conv(x, skip, size, self.conv, self.norm, self.act, up_first=self.up_first)

    def extra_repr(self) -> str:
        return f"up_first={self.up_first}, {super().extra_repr()}"


class LinearFuse2d(_ConvNorm):
    """Compute ``act(norm(conv(cat([interpolate(linear(m), size) for m in maps], 1))))``: SegFormer's fusion.

    Each ``linears[i]`` maps the channels of a map to ``width``, ``conv`` is 1x1. Nothing but a resize stands between
    the two, and a resize commutes with both, so they are one matrix, multiplied at the size of the small map. The
    matrix is made where that pays, and once inside ``fastseg.frozen`` and a ``Runner``. Modules that were replaced, or
    have hooks, are called.

    Args:
        in_channels: C_i of each map.
        width: channels that each map is taken to.
        out_channels: channels of the output.
        align_corners: as in ``torch.nn.functional.interpolate``.
        bias: True to give the convolution a bias; None means only without a norm.
        norm: True for a batch norm after the convolution.
        act: None, "relu", "relu6" or "leaky_relu".
        eps: of the norm.
        momentum: of the norm; None averages cumulatively.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        (N, out_channels, H, W); ``forward`` has the sizes.

    Raises:
        ValueError: the activation is unknown, or there is no map.

    Reference: Xie et al., SegFormer, arXiv:2105.15203.

    Example:
        >>> fuse = LinearFuse2d([8, 16], 32, 32)
        >>> fuse([torch.randn(1, 8, 16, 16), torch.randn(1, 16, 4, 4)]).shape
        torch.Size([1, 32, 16, 16])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        width: int,
        out_channels: int,
        *,
        align_corners: bool = False,
        bias: bool | None = None,
        norm: bool = True,
        act: Activation | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not in_channels:
            raise ValueError("LinearFuse2d: there is no map")
        super().__init__(width * len(in_channels), out_channels, 1, bias, norm, act, eps, momentum, device, dtype)
        self.linears = nn.ModuleList(nn.Linear(C, width, device=device, dtype=dtype) for C in in_channels)
        self.align_corners = align_corners

    @leaf
    def forward(self, maps: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Maps (N, C_i, h_i, w_i) -> (N, out_channels, H, W); ``size`` (H, W) in pixels, None that of the first map."""
        height, width = maps[0].shape[2:] if size is None else size
        linears, corners = cast(list[nn.Linear], list(self.linears)), self.align_corners
        return run_linear_fuse(
            list(maps), linears, (height, width), self.conv, self.norm, self.act, align_corners=corners
        )

    def extra_repr(self) -> str:
        return f"align_corners={self.align_corners}, {super().extra_repr()}"
