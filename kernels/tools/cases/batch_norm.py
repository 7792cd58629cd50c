"""Ahead-of-time cases of batch norm + residual + activation, and their backward, in both layouts."""

from collections.abc import Callable

import torch

from fastseg.kernels.batch_norm.bwd import batch_norm_act_bwd_input, batch_norm_act_bwd_reduce
from fastseg.kernels.batch_norm.fwd import batch_norm_act_fwd
from fastseg.kernels.batch_norm.stats import batch_norm_stats
from fastseg.kernels.common.norm_args import Norm


def _norm(
    dtype: torch.dtype, N: int, C: int, H: int, W: int, *, last: bool, residual: bool = False, act: str = "relu"
) -> None:
    """A training step, and the backward with fixed statistics."""
    layout = torch.channels_last if last else torch.contiguous_format
    z = torch.empty(N, C, H, W, dtype=dtype, device="meta", memory_format=layout)
    norm = Norm(*(torch.empty(C, device="meta") for _ in range(4)), 1e-5, True)
    batch_norm_stats(z)
    y = batch_norm_act_fwd(z, norm, act, z if residual else None)
    sums, g, _ = batch_norm_act_bwd_reduce(z, z, norm, act, y if residual else None)
    batch_norm_act_bwd_input(z if g is None else g, z, norm, "none" if residual else act, sums, 1 / (N * H * W))
    batch_norm_act_bwd_reduce(z, z, norm, act, y if residual else None, with_dz=True)


_UNET = {"N": 144, "C": 64, "H": 512, "W": 512}  # its first level at 512^2, past 2^31 elements
_RESNET = {"N": 2112, "C": 1024, "H": 32, "W": 32, "residual": True}  # a bottleneck's end in layer 3: short planes

CASES: dict[str, Callable[[torch.dtype], None]] = {
    "U-Net level 1": lambda dtype: _norm(dtype, **_UNET, last=True),
    "U-Net level 1, NCHW": lambda dtype: _norm(dtype, **_UNET, last=False),
    "U-Net level 5, NCHW": lambda dtype: _norm(dtype, 16, 1024, 32, 32, last=False),
    "ResNet block": lambda dtype: _norm(dtype, **_RESNET, last=True),
    "ResNet block, NCHW": lambda dtype: _norm(dtype, **_RESNET, last=False),
}
