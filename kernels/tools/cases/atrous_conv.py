"""Ahead-of-time cases of the atrous convolution: an ASPP's branches, and one convolution by itself."""

from collections.abc import Callable, Mapping

import torch

from fastseg.kernels.atrous_conv.bwd import atrous_conv_bwd_weight
from fastseg.kernels.atrous_conv.fwd import atrous_conv_bwd_input, atrous_conv_fwd
from fastseg.kernels.atrous_conv.regions import Branch, executed, forward_regions
from fastseg.kernels.runtime.sizes import cdiv


def _atrous(
    dtype: torch.dtype, *, N: int, C: int, H: int, W: int, COUT: int, K: tuple[int, ...] = (1, 3, 3, 3),
    rates: tuple[int, ...] = (1, 6, 12, 18), residual: bool = False, backward: bool = False, tf32: bool = True,
) -> None:  # fmt: skip
    meta = lambda *shape: torch.empty(*shape, dtype=dtype, device="meta")
    nhwc = lambda n, c, h, w: meta(n, h, w, c).permute(0, 3, 1, 2)
    x, y = nhwc(N, C, H, W), nhwc(N, COUT * len(K), H, W)
    weights = [nhwc(COUT, C, k, k) for k in K]
    saved, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, tf32
    try:
        if backward:
            atrous_conv_bwd_input(y, weights, list(rates))
            atrous_conv_bwd_weight(y, x, list(K), list(rates))
        else:
            atrous_conv_fwd(x, weights, [meta(COUT) for _ in K], y if residual else None, list(rates), "relu")
    finally:
        torch.backends.cudnn.allow_tf32 = saved


# The batch of the large cases puts x past 2^31 elements.
_LARGE = {"N": 1025, "C": 2048, "H": 32, "W": 32, "COUT": 256}  # ResNet or Xception at 512^2, output stride 16
_ONE = {"K": (3,), "rates": (12,)}

CASES: dict[str, Callable[[torch.dtype], None]] = {
    "ASPP 2048->256": lambda dtype: _atrous(dtype, **_LARGE),
    "ASPP 2048->256, backward": lambda dtype: _atrous(dtype, **_LARGE, backward=True),
    "atrous 512->512, one image, residual, no tf32": lambda dtype: _atrous(
        dtype, N=1, C=512, H=33, W=33, COUT=512, residual=True, tf32=False, **_ONE
    ),
    "atrous, odd channels 33->21": lambda dtype: _atrous(dtype, N=2, C=33, H=33, W=47, COUT=21, **_ONE),
}

MATRIX_KERNELS = {"_atrous_conv_fwd_kernel", "_atrous_conv_bwd_weight_kernel"}
SCALAR_LOADS = {
    "_atrous_conv_tables_kernel": "it loads nothing: rectangles and items follow from numbers",
    "atrous, odd channels 33->21": "33 channels: no pixel but the first begins at a multiple of 16 bytes",
}
TF32_CASES = {case for case in CASES if "no tf32" not in case}


def trips(case: str, config: Mapping[str, object]) -> dict[str, float]:
    """Of loops whose ends the tables hold, over branches and over taps and channels: their means. For predictions."""
    one = "one image" in case or "odd" in case
    H, W = (33, 47) if "odd" in case else (33, 33) if one else (32, 32)
    branches = (Branch(3, 12),) if one else (Branch(1, 1), Branch(3, 6), Branch(3, 12), Branch(3, 18))
    pairs = executed(forward_regions(H, W, branches), 1, int(config.get("BLOCK_M", 64)))
    blocks = cdiv(int(config.get("C", 1)), int(config.get("BLOCK_K", 1)))
    return {"j": len(branches) if config.get("MIRRORED") else 1, "_": pairs / (H * W * len(branches)) * blocks}
