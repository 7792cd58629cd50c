"""Bilinear upsampling and what is fused with it."""

import torch
from torch import Tensor, nn

from fastseg.ops.upsample_argmax import upsample_argmax


class UpsampleArgmax(nn.Module):
    """Class map from low-resolution logits: ``interpolate(logits, mode="bilinear", ...).argmax(1)``.

    Args:
        size: output height and width in pixels, or one number for both.
        scale_factor: multiplier of height and width; instead of ``size``.
        align_corners: as ``torch.nn.functional.interpolate``.

    Example:
        >>> UpsampleArgmax(scale_factor=4)(torch.randn(1, 21, 32, 32)).shape
        torch.Size([1, 128, 128])
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        scale_factor: float | tuple[float, float] | None = None,
        align_corners: bool = False,
    ):
        super().__init__()
        self.size = size
        self.scale_factor = scale_factor
        self.align_corners = align_corners

    def forward(
        self, logits: Tensor, size: int | tuple[int, int] | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Logits (N, C, h, w) -> class indices (N, H, W).

        Args:
            logits: low-resolution logits.
            size: output size of this call, in place of the module's own size or factor.
            dtype: uint8 or int64; None gives uint8 up to 256 classes, else int64.
        """
        factor = self.scale_factor if size is None else None
        size = self.size if size is None else size
        return upsample_argmax(logits, size, factor, align_corners=self.align_corners, dtype=dtype)

    def extra_repr(self) -> str:
        target = f"scale_factor={self.scale_factor}" if self.scale_factor is not None else f"size={self.size}"
        return f"{target}, align_corners={self.align_corners}"
