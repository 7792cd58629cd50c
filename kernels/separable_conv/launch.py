"""Separable convolution: depthwise K x K, batch norm, activation, then pointwise 1x1, batch norm, activation, residual.

    u = depthwise(pre(x)) + dw_bias              (N, C, OH, OW)
    a = mid_act(mid_norm(u))
    z = pointwise(a) + pw_bias                   (N, COUT, OH, OW)
    y = post_act(post_norm(z)) + residual        or, without post_act, out_act(post_norm(z) + residual)

Layout: NHWC, channels innermost, so that every tap is a row of 16-byte loads for any shift. Depthwise taps are
multiply-adds in fp32 (one tensor-core tile per channel would be 1/16 used); only the pointwise half is a dot.

Evaluation, in elements (A = x, U = u, Y = y or z): fused A + Y, split A + 2U + Y; unfused torch, with each norm and
activation a pass of its own, A + 6U + 5Y. In the fused form the depthwise tile goes from registers into the dot as its
A operand, and batch norm parameters are read raw: no folding launches. The caller chooses by `cost.plan`;
both round u and z as torch does, so that they differ by the order of the dot's sum alone.

Training with batch statistics: the kernel that produces u (or z) reduces each tile to (mean, squared deviations) while
it holds it. Fused: A (statistics of u only) + A + Y, then 2Y to normalise z; split: A + 2U + Y + 2Y.

Backward saves x, z and the statistics. u is recomputed (A + U); a, dz and du are computed where they are loaded:

    sums of dz          2Y           sum(g), sum(g zhat): the bias and weight gradients of post_norm, and its mean terms
    g1 = (dz pw) act'   2Y + 2U      and the same two sums for mid_norm, from the tile in registers
    dpw = dz^T a        2Y + U       rows split over programs, partial results added in a fixed order
    dx = du (*) dw      2U + A       a gather: each input pixel collects its taps
    ddw                 2U + A

To this add a residual (Y), z if it is saved (Y), a second read of x by dx with a pre-activation (A), the weights, and
partial sums (at most one tile of them for each of 1024 programs). Without batch statistics dx and ddw read no u. On
maps of 4 M elements and more, torch first copies the taps into (K*K, C) order, 2 K^2 C elements.

A dilated tile takes pixels ``dilation`` apart, in both directions (`common.tiles.in_phase_order`). They share their
taps, as the pixels of a contiguous tile do without dilation. Tiles of 8x16 on a 64x64 map at rate 12 read 1.3 input
pixels for each of their own. Contiguous tiles read 5.6: all nine, except those in the padding.

Blocks of channels of one tile have neighbouring program numbers (`tiles.tile_and_block`), so that what they share is
read from DRAM once: `tests/kernels/test_order_of_work.py` replays every kernel through a model of the L2.

No atomics anywhere: two runs give the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.kernels.batch_norm.bwd import batch_norm_act_bwd_reduce
from fastseg.kernels.batch_norm.fwd import batch_norm_act_fwd
from fastseg.kernels.common.norm_args import Norm
from fastseg.kernels.runtime.conv_sizes import Geometry

# Registers what the launchers ask `select` for.
from fastseg.kernels.separable_conv import configs as separable_conv_configs  # noqa: F401
from fastseg.kernels.separable_conv.bwd import (
    separable_conv_bwd_dw_input,
    separable_conv_bwd_dw_weight,
    separable_conv_bwd_pw_input,
    separable_conv_bwd_pw_weight,
)
from fastseg.kernels.separable_conv.fwd import (
    Acts,
    Weights,
    separable_conv_fwd_dw,
    separable_conv_fwd_fused,
    separable_conv_fwd_pw,
)


class Forward(NamedTuple):
    y: Tensor
    z: Tensor | None  # the pointwise convolution's output, where the backward needs it
    mid_stats: Tensor | None  # (3, C): mean, biased variance, unbiased variance
    post_stats: Tensor | None  # (3, COUT)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    dw: bool
    pw: bool
    dw_bias: bool
    pw_bias: bool
    mid: bool
    post: bool


class Gradients(NamedTuple):
    """None where not wanted; a norm's are (2, channels): bias, weight."""

    x: Tensor | None = None
    dw: Tensor | None = None
    pw: Tensor | None = None
    dw_bias: Tensor | None = None
    pw_bias: Tensor | None = None
    mid: Tensor | None = None
    post: Tensor | None = None


def with_stats(norm: Norm | None, stats: Tensor | None) -> Norm | None:
    """The norm with this batch's mean and variance, where it uses them."""
    return norm._replace(mean=stats[0], var=stats[1]) if norm is not None and norm.batch_stats else norm


def separable_conv_fwd(
    x: Tensor, w: Weights, g: Geometry, acts: Acts, mid: Norm | None, post: Norm | None, residual: Tensor | None,
    *, fused: bool, save_z: bool,
) -> Forward:  # fmt: skip
    """x (N, C, H, W), residual (N, COUT, OH, OW) in NHWC memory -> y, z like residual; statistics where a norm asks.

    ``fused``: which form; ``cost.plan`` knows the faster one.
    """
    mid_batch = mid is not None and mid.batch_stats
    post_batch = post is not None and post.batch_stats
    mid_stats = None
    if mid_batch:
        u, mid_stats = separable_conv_fwd_dw(x, w, g, acts.pre, None, "none", stats=True, store=not fused)
        mid = with_stats(mid, mid_stats)
    elif not fused:
        u, _ = separable_conv_fwd_dw(x, w, g, acts.pre, mid, acts.mid, stats=False, store=True)
        mid, acts = None, acts._replace(mid="none")  # done
    half, source = (separable_conv_fwd_fused, x) if fused else (separable_conv_fwd_pw, u)
    y, z, post_stats = half(source, w, g, acts, mid, post, residual, stats=post_batch, save_z=save_z)
    if post_batch:
        side, act = acts.ending(residual)
        y = batch_norm_act_fwd(
            z, with_stats(post, post_stats), act, residual, "before" if side == "before" else "after"
        )
    return Forward(y, z, mid_stats, post_stats)


def separable_conv_bwd(
    dy: Tensor, x: Tensor, z: Tensor | None, w: Weights, g: Geometry, acts: Acts, mid: Norm | None, post: Norm | None,
    needs: Needs,
) -> Gradients:  # fmt: skip
    """dy, z (N, COUT, OH, OW), x (N, C, H, W) in NHWC memory -> gradients shaped as their tensors, sums in fp32."""
    z = dy if z is None else z  # read by no kernel then: the pointwise half ends without norm and activation
    post_sums = dy
    if post is not None or needs.pw_bias:
        post_sums, *_ = batch_norm_act_bwd_reduce(dy, z, post, acts.post)
    first_half = needs.x or needs.dw or needs.dw_bias or needs.mid
    grads = Gradients(
        post=post_sums if needs.post else None,
        pw_bias=_bias_gradient(post_sums, post) if needs.pw_bias else None,
    )
    if not (first_half or needs.pw):
        return grads
    u, _ = separable_conv_fwd_dw(x, w, g, acts.pre, None, "none", stats=False, store=True)
    if needs.pw:
        grads = grads._replace(pw=separable_conv_bwd_pw_weight(dy, z, u, g, acts, mid, post, post_sums))
    if first_half:
        sums = mid is not None or needs.dw_bias
        g1, mid_sums = separable_conv_bwd_pw_input(dy, z, u, w, g, acts, mid, post, post_sums, sums=sums)
        grads = grads._replace(
            x=separable_conv_bwd_dw_input(g1, u, x, w, g, acts.pre, mid, mid_sums) if needs.x else None,
            dw=separable_conv_bwd_dw_weight(g1, u, x, g, acts.pre, mid, mid_sums) if needs.dw else None,
            dw_bias=_bias_gradient(mid_sums, mid) if needs.dw_bias else None,
            mid=mid_sums if needs.mid else None,
        )
    return grads


def _bias_gradient(sums: Tensor, norm: Norm | None) -> Tensor:
    """The gradient of a convolution's bias from the sums at the norm behind it: batch statistics cancel it."""
    if norm is None:
        return sums[0]
    if norm.batch_stats:
        return torch.zeros_like(sums[0])
    scale = torch.rsqrt(norm.var.to(sums.dtype) + norm.eps)
    return sums[0] * (scale if norm.weight is None else scale * norm.weight)
