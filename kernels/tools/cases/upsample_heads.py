"""Ahead-of-time cases of the fused heads: upsampling with argmax, with cross entropy, with sums for other losses."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastseg.kernels.upsample.argmax import upsample_argmax_fwd
from fastseg.kernels.upsample.confidence import MEASURES, upsample_confidence_fwd
from fastseg.kernels.upsample.cross_entropy import upsample_cross_entropy_bwd, upsample_cross_entropy_fwd
from fastseg.kernels.upsample.cross_entropy_bwd import OfSums
from fastseg.kernels.upsample.cross_entropy_fwd import upsample_log_sum
from fastseg.kernels.upsample.loss_sums import upsample_loss_inner, upsample_loss_sums
from fastseg.kernels.upsample.loss_terms import CODES
from fastseg.kernels.upsample.masks_to_classes import masks_to_classes_fwd
from fastseg.kernels.upsample.masks_to_queries import masks_to_queries_fwd
from fastseg.kernels.upsample.sizes import Axis, Loss, Upsampling
from fastseg.kernels.upsample.volume_argmax import upsample_argmax3d_fwd


def _logits(dtype: torch.dtype, N: int, C: int, low: int, layout: torch.memory_format) -> Tensor:
    return torch.empty(N, C, low, low, dtype=dtype, device="meta", memory_format=layout)


def _upsampling(low: int, full: int, align_corners: bool) -> Upsampling:
    axis = Axis(low, full, (low - 1) / (full - 1) if align_corners else low / full)
    return Upsampling(axis, axis, align_corners)


def _argmax(
    dtype: torch.dtype, C: int, *, N: int = 16, low: int = 128, full: int = 512, align_corners: bool = False,
    nchw: bool = False,
) -> None:  # fmt: skip
    layout = torch.contiguous_format if nchw else torch.channels_last
    upsample_argmax_fwd(_logits(dtype, N, C, low, layout), _upsampling(low, full, align_corners),
                        torch.uint8 if C <= 256 else torch.int64)  # fmt: skip


def _argmax3d(dtype: torch.dtype, C: int, *, low: int = 64, align_corners: bool = False) -> None:
    axis = Axis(low, 2 * low, (low - 1) / (2 * low - 1) if align_corners else 0.5)
    x = torch.empty(1, C, low, low, low, dtype=dtype, device="meta")
    upsample_argmax3d_fwd(x, (axis, axis, axis), align_corners, torch.uint8 if C <= 256 else torch.uint16)


def _cross_entropy(
    dtype: torch.dtype, C: int, *, N: int = 16, low: int = 128, full: int = 512, align_corners: bool = False,
    nhwc: bool = False, options: bool = False, labels: torch.dtype = torch.int64,
) -> None:  # fmt: skip
    """Forward and backward; ``options``: class weights, label smoothing, no reduction."""
    meta = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")
    up, loss = _upsampling(low, full, align_corners), Loss(255, 0.1 if options else 0.0)
    target, lse = meta(N, full, full, dtype=labels), meta(N, full, full)
    weight = meta(C) if options else None
    x = _logits(dtype, N, C, low, torch.contiguous_format)
    losses = meta(N, full, full, dtype=dtype) if options else None
    upsample_cross_entropy_fwd(x, target, weight, up, loss, losses=losses, save_lse=True)
    x = _logits(dtype, N, C, low, torch.channels_last if nhwc else torch.contiguous_format)
    dy = meta(N, full, full, dtype=dtype) if options else meta()
    upsample_cross_entropy_bwd(dy, x, target, weight, lse, up, loss)


def _sums(
    dtype: torch.dtype, C: int, *kinds: str, N: int = 16, low: int = 128, full: int = 512, each: bool = False,
    gamma: float = 2.0, weighted: bool = False, soft: bool = False,
) -> None:  # fmt: skip
    """Forward and backward; ``each``: sigmoid, and a label for each class; ``soft``: softmax and probabilities."""
    meta = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")
    up, spec = _upsampling(low, full, False), tuple((CODES[kind], gamma, 0.0) for kind in kinds)
    target = meta(N, C, full, full, dtype=torch.uint8) if each else meta(N, full, full, dtype=torch.int64)
    x, slopes = _logits(dtype, N, C, low, torch.contiguous_format), meta(N, C, len(kinds))
    if soft:
        target = meta(N, C, full, full)
        upsample_log_sum(x, up)
    lse, weight = (None if each else meta(N, full, full)), (meta(N, full, full) if weighted else None)
    upsample_loss_sums(x, target, weight, lse, up, spec, 255)
    inner = slopes if lse is None else upsample_loss_inner(x, target, weight, lse, slopes, up, spec, 255)
    upsample_cross_entropy_bwd(inner, x, target, weight, slopes if lse is None else lse, up, Loss(255, 0.0),
                               OfSums(spec, slopes, each))  # fmt: skip


def _confidence(dtype: torch.dtype, C: int, N: int = 16, full: int = 512) -> None:
    for measure in MEASURES:
        x = _logits(dtype, N, C, 128, torch.contiguous_format)
        upsample_confidence_fwd(x, _upsampling(128, full, False), torch.uint8, measure)


def _masks(
    dtype: torch.dtype, Q: int, K: int, *, N: int = 1, low: int = 128, full: int = 512, tf32: bool = True
) -> None:
    masks = torch.empty(N, Q, low, low, dtype=dtype, device="meta")
    p = torch.empty(N, Q, K, dtype=torch.float16 if dtype.itemsize == 2 else dtype, device="meta")
    up = _upsampling(low, full, False)
    saved, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, tf32
    try:
        masks_to_classes_fwd(masks, p, up, torch.uint8 if K <= 256 else torch.int64)
    finally:
        torch.backends.cudnn.allow_tf32 = saved


def _owners(dtype: torch.dtype, Q: int, *, N: int = 1, low: int = 128, squash: bool = True) -> None:
    masks = torch.empty(N, Q, low, low, dtype=dtype, device="meta")
    scores = torch.empty(N, Q, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="meta")
    masks_to_queries_fwd(masks, scores, _upsampling(low, 512, False), torch.uint8, 0.5, squash=squash, weighted=squash)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "argmax 21, 128 -> 512": lambda dtype: _argmax(dtype, 21),
    "argmax 19, 128 -> 512, corners": lambda dtype: _argmax(dtype, 19, align_corners=True, nchw=True),
    "argmax 150, 128 -> 512": lambda dtype: _argmax(dtype, 150, align_corners=True),
    "argmax 150, 16 -> 512": lambda dtype: _argmax(dtype, 150, low=16),
    "argmax 19, 256 -> 512, unpruned": lambda dtype: _argmax(dtype, 19, low=256, nchw=True),
    # 8200 images of 512^2 pixels are past 2^31 outputs
    "argmax 21, large": lambda dtype: _argmax(dtype, 21, N=8200),
    "argmax 1000, large": lambda dtype: _argmax(dtype, 1000, N=8200, low=64),
    "argmax 16, 64^3 -> 128^3": lambda dtype: _argmax3d(dtype, 16),
    "argmax 300, 512^3 -> 1024^3, corners": lambda dtype: _argmax3d(dtype, 300, low=512, align_corners=True),
    "cross entropy 21, 128 -> 512": lambda dtype: _cross_entropy(dtype, 21),
    "cross entropy 19, 128 -> 512, corners": lambda dtype: _cross_entropy(
        dtype, 19, align_corners=True, nhwc=True, labels=torch.uint8
    ),
    "cross entropy 150, 128 -> 512": lambda dtype: _cross_entropy(dtype, 150, nhwc=True, labels=torch.uint8),
    "cross entropy 150, 16 -> 512": lambda dtype: _cross_entropy(dtype, 150, low=16),
    "cross entropy 21, options": lambda dtype: _cross_entropy(dtype, 21, options=True),
    "cross entropy 21, large": lambda dtype: _cross_entropy(dtype, 21, N=8200),
    "cross entropy and Dice 21, 128 -> 512": lambda dtype: _sums(dtype, 21, *_CE_DICE),
    "cross entropy and Dice 150, large": lambda dtype: _sums(dtype, 150, *_CE_DICE, N=8200),
    "binary cross entropy and Dice 1, 128 -> 512": lambda dtype: _sums(
        dtype, 1, "bce", "count", "inter", "prob", "target", each=True, weighted=True
    ),
    "cross entropy of probabilities and Dice 21, 128 -> 512": lambda dtype: _sums(dtype, 21, *_CE_DICE, soft=True),
    "confidence 21, 128 -> 512": lambda dtype: _confidence(dtype, 21),
    "confidence 21, large": lambda dtype: _confidence(dtype, 21, N=8200),
    "masks of 100 queries, 150 classes": lambda dtype: _masks(dtype, 100, 150),
    "masks of 100 queries, 150 classes, no tf32": lambda dtype: _masks(dtype, 100, 150, tf32=False),
    "masks of 200 queries, 847 classes, large": lambda dtype: _masks(dtype, 200, 847, N=8200),
    "owners among 100 queries": lambda dtype: _owners(dtype, 100),
    "owners among 100 queries, sigmoids": lambda dtype: _owners(dtype, 100, low=384, squash=False),
    "owners among 200 queries, large": lambda dtype: _owners(dtype, 200, N=8200),
    "focal 19, 128 -> 512": lambda dtype: _sums(dtype, 19, "focal_pos", "focal_neg", "count", each=True, gamma=1.5),
}

_CE_DICE = ("nll", "target", "count", "inter", "prob")
_GATHER = "the corners of an output are gathered: neighbouring outputs share or skip low-resolution pixels"
MATRIX_KERNELS = {"_masks_to_classes_fwd_kernel"}
TF32_CASES = {case for case in CASES if case.startswith("masks") and "no tf32" not in case}
SCALAR_LOADS: dict[str, str] = {
    "_upsample_argmax_fwd_kernel": _GATHER,
    "_upsample_argmax3d_fwd_kernel": _GATHER,
    "_upsample_cross_entropy_fwd_kernel": _GATHER,
    "_upsample_cross_entropy_bwd_kernel": _GATHER,
    "_upsample_confidence_kernel": _GATHER,
    "_upsample_loss_sums_kernel": _GATHER,
    "_upsample_loss_inner_kernel": _GATHER,
    "_masks_to_classes_fwd_kernel": _GATHER,
    "_masks_to_queries_fwd_kernel": _GATHER,
}
