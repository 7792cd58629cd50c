"""Ahead-of-time cases of the separable convolution, and of the batch norm kernels it launches."""

from collections.abc import Callable

import torch

from fastseg.kernels.common.norm_args import Norm
from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.separable_conv.cost import plan
from fastseg.kernels.separable_conv.fwd import Acts, Weights, tap_weights
from fastseg.kernels.separable_conv.launch import Needs, separable_conv_bwd, separable_conv_fwd


def separable(
    dtype: torch.dtype, *, N: int, C: int, H: int, W: int, COUT: int, stride: int = 1, dilation: int = 1,
    batch_stats: bool = False, backward: bool = False, residual: bool = False, tf32: bool = True, K: int = 3,
    form: str | None = None, folded: bool = False,
) -> None:  # fmt: skip
    """A pair with both norms and ReLUs; ``form`` is "fused" or "split", None the cost model's. ``folded``: the middle
    norm is in the taps, whose channels are innermost, as inside ``fastseg.frozen``."""
    OH, OW = (H - 1) // stride + 1, (W - 1) // stride + 1
    g = Geometry(N, C, H, W, COUT, OH, OW, K, stride, dilation * (K // 2), dilation)
    meta = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")
    nhwc = lambda n, c, h, w: meta(n, h, w, c).permute(0, 3, 1, 2)
    norm = lambda c: Norm(*(meta(c, dtype=torch.float32) for _ in range(4)), 1e-5, batch_stats)
    weights = Weights(tap_weights(meta(C, 1, K, K), g), meta(COUT, C, 1, 1), None, None)
    if folded:
        weights = weights._replace(dw=meta(K * K, C).t(), dw_bias=meta(C))
    acts = Acts("none", "relu", "relu")
    x, y = nhwc(N, C, H, W), nhwc(N, COUT, OH, OW)
    saved, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, tf32
    try:
        if backward:
            needs = Needs(x=True, dw=True, pw=True, dw_bias=False, pw_bias=False, mid=True, post=True)
            separable_conv_bwd(y, x, y, weights, g, acts, norm(C), norm(COUT), needs)
        else:
            fused = form == "fused" if form else plan(g, dtype, mid_batch_stats=batch_stats).pays
            skip = y if residual else None
            mid = None if folded else norm(C)
            separable_conv_fwd(x, weights, g, acts, mid, norm(COUT), skip, fused=fused, save_z=False)
    finally:
        torch.backends.cudnn.allow_tf32 = saved


# Batches of the large cases put the largest map past 2^31 elements.
_DECODER = {"N": 448, "C": 304, "H": 128, "W": 128, "COUT": 256}  # DeepLabV3+'s decoder at 512^2
_MIDDLE = {"N": 2896, "C": 728, "H": 32, "W": 32, "COUT": 728}  # Xception's middle flow at 512^2, output stride 16

CASES: dict[str, Callable[[torch.dtype], None]] = {
    "decoder 304->256": lambda dtype: separable(dtype, **_DECODER),
    "decoder 304->256, batch statistics": lambda dtype: separable(dtype, **_DECODER, batch_stats=True),
    "decoder 304->256, backward": lambda dtype: separable(dtype, **_DECODER, batch_stats=True, backward=True),
    "middle flow 728->728": lambda dtype: separable(dtype, **_MIDDLE),
    "middle flow 728->728, batch statistics": lambda dtype: separable(dtype, **_MIDDLE, batch_stats=True),
    "entry flow 128->128, folded": lambda dtype: separable(dtype, N=16, C=128, H=256, W=256, COUT=128, folded=True),
    "5x5 304->256": lambda dtype: separable(dtype, N=16, C=304, H=128, W=128, COUT=256, K=5),
    # 16 bits whatever is asked for: in fp32 it spills on gfx942 with Triton 3.6, and with no other
    "7x7 144->96": lambda dtype: separable(torch.bfloat16, N=16, C=144, H=64, W=64, COUT=96, K=7),
    "MobileNetV2 960->160, no tf32": lambda dtype: separable(dtype, N=1, C=960, H=32, W=32, COUT=160, tf32=False),
    "MobileNetV2 144->24, residual": lambda dtype: separable(dtype, N=1, C=144, H=128, W=128, COUT=24, residual=True),
    "MobileNetV2 960->160, dilated, folded": lambda dtype: separable(
        dtype, N=1, C=960, H=33, W=33, COUT=160, dilation=2, folded=True
    ),
    "ASPP 2048->256, rate 6": lambda dtype: separable(dtype, N=16, C=2048, H=32, W=32, COUT=256, dilation=6),
    "odd channels 33->21, stride 2": lambda dtype: separable(dtype, N=2, C=33, H=65, W=47, COUT=21, stride=2),
}

MATRIX_KERNELS = {
    "_separable_conv_fwd_fused_kernel",
    "_separable_conv_fwd_pw_kernel",
    "_separable_conv_bwd_pw_input_kernel",
    "_separable_conv_bwd_pw_weight_kernel",
}
SCALAR_LOADS = {
    "odd channels 33->21, stride 2": "33 channels: no pixel but the first begins at a multiple of 16 bytes",
}
TF32_CASES = {case for case in CASES if "no tf32" not in case}
SMALL_TILE_CASES = {  # small maps: few tiles of 64 pixels
    case for case in CASES if case.startswith(("MobileNetV2 960->160", "odd channels"))
}
