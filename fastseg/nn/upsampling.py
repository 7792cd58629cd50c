"""Bilinear upsampling, as interpolation and as transposed convolution, and the argmax fused with it."""

import weakref
from typing import Literal

import torch
from torch import Tensor, nn

from fastseg.nn.fuse.watch import rewritten
from fastseg.nn.leaf import leaf
from fastseg.ops.bilinear_conv_transpose import bilinear_conv_transpose2d, bilinear_geometry, bilinear_kernel
from fastseg.ops.core.bilinear_taps import conv_transpose2d_plus
from fastseg.ops.core.dispatch import record_reference
from fastseg.ops.core.explain import UNFUSED_DEPTH, in_unfused
from fastseg.ops.core.kept import made_once
from fastseg.ops.core.torch_private import constant_while_compiling
from fastseg.ops.upsample_argmax import upsample_argmax
from fastseg.ops.upsample_bilinear import upsample_bilinear
from fastseg.ops.upsample_trilinear import upsample_trilinear


class Upsample(nn.Upsample):
    """As ``torch.nn.Upsample``; difference: modes "bilinear" and "trilinear" run ``fastseg.ops.upsample_bilinear`` and
    ``upsample_trilinear``.

    Example:
        >>> Upsample(scale_factor=2, mode="bilinear")(torch.randn(1, 8, 4, 4)).shape
        torch.Size([1, 8, 8, 8])
    """

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        if self.mode not in ("bilinear", "trilinear"):
            return super().forward(input)
        options = (bool(self.align_corners), self.recompute_scale_factor)
        if self.mode == "trilinear":
            return upsample_trilinear(input, self.size, self.scale_factor, *options)
        return upsample_bilinear(input, self.size, self.scale_factor, *options)


class UpsamplingBilinear2d(nn.UpsamplingBilinear2d):
    """As ``torch.nn.UpsamplingBilinear2d`` (``align_corners=True``); difference: as ``Upsample``.

    Example:
        >>> UpsamplingBilinear2d(size=(7, 9))(torch.randn(1, 8, 4, 4)).shape
        torch.Size([1, 8, 7, 9])
    """

    forward = Upsample.forward


class UpsamplingNearest2d(nn.UpsamplingNearest2d):
    """As ``torch.nn.UpsamplingNearest2d``; no difference: torch's kernel copies, and its backward gathers.

    Example:
        >>> UpsamplingNearest2d(scale_factor=2)(torch.tensor([[[[1.0, 2.0]]]]))[0, 0, 0]
        tensor([1., 1., 2., 2.])
    """

    forward = leaf(nn.UpsamplingNearest2d.forward)


class BilinearConvTranspose2d(nn.ConvTranspose2d):
    """``ConvTranspose2d(channels, channels, ...)`` whose weight is initialised to the bilinear kernel.

    ``weight`` is the dense (channels, channels, K, K) tensor of ``ConvTranspose2d``: FCN checkpoints load, and an
    optimiser can train it. The values of the weight decide which form runs; the result is the same:

        the bilinear kernel, not trained   four taps per output pixel (``fastseg.ops.bilinear_conv_transpose2d``)
        zero between different channels    a grouped convolution
        anything else, or being trained    ``conv_transpose2d``: every element gets its gradient

    Each call reads the weight once to find out, and waits for a GPU; inside ``fastseg.frozen`` and in a ``Runner`` only
    the first call does. ``torch.compile`` reads it when it traces. ``torch.export`` and the capture of a CUDA graph use
    the last result.

    Args:
        channels: of input and output.
        stride: output pixels per input pixel.
        kernel_size: K, in taps; None means ``2 * stride - stride % 2``.
        padding: output pixels cropped on each side; None makes the output ``stride`` times the input.
        bias: True to add a trainable bias.
        trainable: True if ``weight`` requires a gradient.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        (N, channels, OH, OW); ``forward`` has the sizes.

    Raises:
        ValueError: a number is out of range, or no padding makes the output ``stride`` times the input.

    Reference: Long et al., arXiv:1411.4038, who keep the kernel fixed.

    Example:
        >>> BilinearConvTranspose2d(21, 8)(torch.randn(1, 21, 8, 8)).shape
        torch.Size([1, 21, 64, 64])
    """

    def __init__(
        self,
        channels: int,
        stride: int,
        kernel_size: int | None = None,
        padding: int | None = None,
        *,
        bias: bool = False,
        trainable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        kernel_size, padding = bilinear_geometry(stride, kernel_size, padding)
        super().__init__(channels, channels, kernel_size, stride, padding, bias=bias, device=device, dtype=dtype)
        self.weight.requires_grad_(trainable)
        self._seen = (weakref.ref(self.weight), _stamp(self.weight), "bilinear")

    def reset_parameters(self) -> None:
        """Reset the weight to the bilinear kernel, and the bias to 0."""
        with torch.no_grad():
            kernel = bilinear_kernel(self.in_channels, self.out_channels, self.kernel_size[0], dtype=self.weight.dtype)
            self.weight.copy_(kernel)
            if self.bias is not None:
                self.bias.zero_()

    @leaf
    def forward(
        self,
        input: Tensor,
        output_size: list[int] | None = None,
        *,
        skip: Tensor | None = None,
        skip_offset: int = 0,
    ) -> Tensor:
        """(N, C, H, W) -> (N, C, OH, OW), plus the window of ``skip`` that begins at row and column ``skip_offset``.

        Args:
            input: the coarse map.
            output_size: (OH, OW), in pixels, of any size; None means ``(n - 1) * stride + K - 2 * padding``.
            skip: (N, C, SH, SW); its window is added in the same kernel.
            skip_offset: first row and column of the window, in pixels: FCN's crop.
        """
        kind = self._kind()
        size = None if output_size is None else tuple(output_size[-2:])
        if kind == "bilinear" and input.dim() == 4:
            return bilinear_conv_transpose2d(
                input, self.stride[0], self.kernel_size[0], self.padding[0],
                bias=self.bias, skip=skip, skip_offset=skip_offset, output_size=size,
            )  # fmt: skip
        record_reference("bilinear_conv_transpose2d", input, f"the weight is {kind}, not the frozen bilinear kernel")
        return conv_transpose2d_plus(
            input, self.weight, self.bias, self.stride[0], self.padding[0],
            diagonal=kind != "dense", skip=skip, skip_offset=skip_offset, output_size=size,
        )  # fmt: skip

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not rewritten(self):
            self._look()

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_seen": None}  # a weak reference can neither be pickled nor copied

    def _kind(self) -> Literal["bilinear", "diagonal", "dense"]:
        if (self.weight.requires_grad and torch.is_grad_enabled()) or (UNFUSED_DEPTH[0] and in_unfused()):
            return "dense"
        return self._look_while_tracing() if torch.compiler.is_compiling() else self._look()

    @constant_while_compiling
    def _look_while_tracing(self) -> Literal["bilinear", "diagonal", "dense"]:
        return self._look()

    def _look(self) -> Literal["bilinear", "diagonal", "dense"]:
        weight, stamp = self.weight, _stamp(self.weight)
        if stamp is None and weight.is_inference():
            return made_once((weight,), ("kind",), lambda: kind_of(weight))
        if stamp is None:  # on the meta device, or a stand-in during export: what was seen of the weight itself
            known = self._seen is not None and self._seen[0]() is not None and self._seen[1] is not None
            return self._seen[2] if known and self._seen[1] == _stamp(self._seen[0]()) else "dense"
        if not isinstance(weight, nn.Parameter):
            return "dense"  # computed anew in each call: reading it would cost more than it saves
        if weight.requires_grad and rewritten(self):
            return "dense"  # trained, and no counter tells when
        seen = self._seen is not None and self._seen[0]() is weight and self._seen[1] == stamp
        if not (seen and weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            kind = made_once((weight,), ("kind",), lambda: kind_of(weight))
            self._seen = (weakref.ref(weight), stamp, kind)
        return self._seen[2]


def _stamp(weight: Tensor) -> tuple[int, int] | None:
    """The version and address of ``weight``, which change with its values; None if it has no version."""
    try:
        stamp = (weight._version, weight.data_ptr())
    except RuntimeError:
        return None
    return stamp if stamp[1] else None


def kind_of(weight: Tensor) -> Literal["bilinear", "diagonal", "dense"]:
    """What ``weight`` (C, C, K, K) is; one wait for the device."""
    with torch.no_grad():
        diagonal = weight.diagonal()  # (K, K, C)
        dense = weight.count_nonzero() != diagonal.count_nonzero()
        kernel = bilinear_kernel(1, 1, weight.shape[-1], device=weight.device, dtype=weight.dtype)[0, 0, :, :, None]
        # the same kernel written in another way: each of its two factors and their product may round differently
        bilinear = ((diagonal - kernel).abs() <= 4 * torch.finfo(weight.dtype).eps * kernel).all()
        dense, bilinear = torch.stack((dense, bilinear)).tolist()
    return "dense" if dense else "bilinear" if bilinear else "diagonal"


class UpsampleArgmax(nn.Module):
    """Class map of low-resolution logits: ``interpolate(logits, mode="bilinear", ...).argmax(1)``.

    Args:
        size: output height and width in pixels, or one number for both.
        scale_factor: output pixels per input pixel; instead of ``size``.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        Class indices (N, H, W), uint8 for up to 256 classes, else int64.

    Raises:
        ValueError, TypeError: those of ``fastseg.ops.upsample_argmax``, which ``forward`` calls.

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

    @leaf
    def forward(
        self,
        logits: Tensor,
        size: int | tuple[int, int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        confidence: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (N, C, h, w) -> class indices (N, H, W); with ``confidence`` their probabilities too.

        Args:
            logits: low-resolution logits.
            size: output size of this call, in pixels, instead of the module's own size or factor.
            dtype: uint8 or int64; None means uint8 for up to 256 classes, else int64.
            confidence: return a pair: the class indices, and their probabilities (N, H, W), float32.
        """
        factor = self.scale_factor if size is None else None
        size = self.size if size is None else size
        return upsample_argmax(
            logits, size, factor, align_corners=self.align_corners, dtype=dtype, confidence=confidence
        )

    def extra_repr(self) -> str:
        target = f"scale_factor={self.scale_factor}" if self.scale_factor is not None else f"size={self.size}"
        return f"{target}, align_corners={self.align_corners}"
