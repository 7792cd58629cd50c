"""1x1 convolution and everything after it in one launch: y = act(conv1x1(x) + bias + image_bias + residual), NHWC.

The kernel is the pointwise half of the separable convolution. ``image_bias`` is a row for each image: a branch that is
constant over pixels, such as ASPP's pooled one, is a bias of the projection, and is never spread over a map.

Traffic in elements, A = x, Y = y: A + Y + weights (+ Y with a residual). A library's convolution moves the same, and
then 2Y for each of bias, image bias and activation that its own call cannot end with (3Y for a residual), each in a
launch of its own. ``plan`` says which is faster: the library where its one call does it all, or where arithmetic
dominates, or a map has too few tiles for the chip, whose sums a library may split.
"""

import functools

import torch
from torch import Tensor

from fastseg.kernels.runtime.ceilings import H200, OWN_GEMM, OWN_LANES, Chip, spread
from fastseg.kernels.runtime.conv_sizes import Geometry
from fastseg.kernels.runtime.sizes import cdiv
from fastseg.kernels.runtime.verdict import Verdict, verdict

# Registers what the launcher asks `select` for.
from fastseg.kernels.separable_conv import configs as separable_conv_configs  # noqa: F401
from fastseg.kernels.separable_conv.cost import pw_tile
from fastseg.kernels.separable_conv.fwd import Acts, Weights, separable_conv_fwd_pw


def pointwise_conv_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, residual: Tensor | None, image_bias: Tensor | None
) -> Tensor:
    """x (N, C, H, W), residual (N, COUT, H, W) in NHWC memory, image_bias (N, COUT) -> y (N, COUT, H, W), NHWC."""
    N, C, H, W = x.shape
    g = Geometry(N, C, H, W, weight.shape[0], H, W, 1, 1, 0, 1)
    weights = Weights(weight, weight, None, bias)  # no depthwise half is launched
    y, *_ = separable_conv_fwd_pw(
        x, weights, g, Acts("none", "none", "none", out=act), None, None, residual,
        stats=False, save_z=False, image_bias=image_bias,
    )  # fmt: skip
    return y


@functools.lru_cache(maxsize=4096)
def plan(
    pixels: int,
    C: int,
    COUT: int,
    dtype: torch.dtype,
    after: tuple[int, ...],
    *,
    residual: bool,
    tf32: bool,
    chip: Chip = H200,
) -> Verdict:
    """Own kernel or library, by this file's header.

    after: how often each launch behind the library's convolution reads or writes y's size.
    """
    e, A, Y = dtype.itemsize, pixels * C, pixels * COUT
    moved = e * (A + Y + C * COUT) / chip.bandwidth
    lanes = dtype == torch.float32 and not tf32
    products = 2 * A * COUT / chip.dot(dtype, tf32=tf32)
    added = e * Y * residual / chip.bandwidth
    block_m, block_n = pw_tile(pixels, COUT, dtype)
    few = spread(cdiv(pixels, block_m) * cdiv(COUT, block_n), chip)
    own = max(moved + added, products / (OWN_LANES if lanes else OWN_GEMM) * few) + chip.launch
    library = max(moved + (0 if after else added), products)
    library += e * Y * sum(after) / chip.bandwidth + chip.launch * (1 + len(after))
    launches = f"in {1 + len(after)} launch{'es' if after else ''} on {chip.described}"
    taken = "one launch" if own < library else "library"
    return verdict(own < library, "own kernel", own, "library", library, taken, launches)
