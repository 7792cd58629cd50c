"""Device functions shared by the kernels: activations and batch normalisation, forward and backward.

Activations are named by strings ("none", "relu", "relu6", "leaky_relu"), as ``tl.constexpr``. They keep torch's rules
for NaN (NaN stays NaN, in ReLU too) and for -0.0, which is why none is written with ``tl.maximum``.

    normalise   v = (u - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps)
    backward    du = weight rstd (g - mean(g) - uhat mean(g uhat)),   uhat = (u - mean) rstd,   g = dL/dv

The difference u - mean is taken before the scale: folding mean into the bias would cancel where mean >> deviation.
With fixed statistics (evaluation) the two means in the backward are 0.
"""

import triton
import triton.language as tl

ON_CPU = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def where_all(mask, flag):
    """``mask & flag``, a block and one boolean, which is compared as a block: Triton 3.9's interpreter splats booleans
    into a mask that its loads refuse."""
    return mask & (flag.to(tl.int32) + tl.zeros(mask.shape, tl.int32) != 0)


@triton.jit
def activate(v, ACT: tl.constexpr):
    if ACT == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACT == "relu6":
        v = tl.where(v < 0, 0.0, tl.where(v > 6, 6.0, v))
    elif ACT == "leaky_relu":
        v = tl.where(v > 0, v, v * 0.01)
    return v


@triton.jit
def clamp_keeping_nan(v, limit):
    """``v`` within [0, limit], -0.0 as either zero: ReLU6 with limit 6, ReLU with inf, 0 with 0. Two instructions."""
    v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate_grad(g, v, ACT: tl.constexpr):
    """The gradient before the activation, from ``g`` after it and the activation's input ``v``.

    At NaN as torch: ReLU passes ``g`` on, the leaky ReLU its slope's share; ReLU6 passes it on a GPU, and gives 0 on a
    CPU (in vectors: torch's scalar loop for the last few elements of a map passes it).
    """
    if ACT == "relu":
        g = tl.where(v <= 0, 0.0, g)
    elif ACT == "relu6":
        passes = (v > 0) & (v < 6)
        if not ON_CPU:
            passes |= v != v
        g = tl.where(passes, g, 0.0)
    elif ACT == "leaky_relu":
        g = tl.where(v > 0, g, g * 0.01)
    return g


@triton.jit
def load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs, mask, eps, AFFINE: tl.constexpr, ACC: tl.constexpr):
    """-> mean, rstd, weight, bias of the channels ``offs``, in ACC; weight and bias are 0 where masked."""
    mean = tl.load(mean_ptr + offs, mask=mask, other=0.0).to(ACC)
    var = tl.load(var_ptr + offs, mask=mask, other=1.0).to(ACC)
    rstd = tl.rsqrt(var + eps)  # one instruction of the special units; a root and a division are two, and 8 around them
    if AFFINE:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(ACC)
        bias = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(ACC)
    else:
        weight = tl.where(mask, rstd * 0.0 + 1.0, 0.0)
        bias = rstd * 0.0
    return mean, rstd, weight, bias


@triton.jit
def norm_act(
    u, weight_ptr, bias_ptr, mean_ptr, var_ptr, offs, mask, eps,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``act(norm(u))`` for u (rows, channels), in ACC."""
    mean, scale, bias = load_scale(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs, mask, eps, NORM, AFFINE, ACC)
    return scaled_act(u, mean, scale, bias, NORM, ACT)


@triton.jit
def load_scale(
    weight_ptr, bias_ptr, mean_ptr, var_ptr, offs, mask, eps,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """-> mean, scale and bias of ``scaled_act``, to be asked for before the map that waits for other loads."""
    if NORM:
        mean, rstd, weight, bias = load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs, mask, eps, AFFINE, ACC)
        scale = rstd * weight
    else:
        mean, scale, bias = 0.0, 1.0, 0.0
    return mean, scale, bias


@triton.jit
def scaled_act(u, mean, scale, bias, NORM: tl.constexpr, ACT: tl.constexpr):
    """``act(norm(u))`` from vectors that are in registers; u (rows, channels)."""
    if NORM:
        u = (u - mean[None, :]) * scale[None, :] + bias[None, :]
    return activate(u, ACT)


@triton.jit
def norm_act_grad(
    g, u, weight_ptr, bias_ptr, mean_ptr, var_ptr, sums_ptr, offs, mask, eps, inv_count, C,
    NORM: tl.constexpr, AFFINE: tl.constexpr, BATCH_STATS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient at u of ``act(norm(u))``, from ``g`` after the activation; both (rows, channels), in ACC.

    ``sums_ptr`` holds (2, C): the sums over rows of the gradient after the norm, and of it times uhat.
    """
    if NORM:
        mean, rstd, weight, bias = load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs, mask, eps, AFFINE, ACC)
        mean_g, mean_gu = load_mean_grads(sums_ptr, offs, mask, inv_count, C, BATCH_STATS, ACC)
        g = norm_grad(g, u, mean, rstd, weight, bias, mean_g, mean_gu, ACT)
    else:
        g = activate_grad(g, u, ACT)
    return g


@triton.jit
def load_mean_grads(sums_ptr, offs, mask, inv_count, C, BATCH_STATS: tl.constexpr, ACC: tl.constexpr):
    """The means over rows of g and of g uhat from their sums (2, C); 0 with fixed statistics."""
    if BATCH_STATS:
        mean_g = tl.load(sums_ptr + offs, mask=mask, other=0.0).to(ACC) * inv_count
        mean_gu = tl.load(sums_ptr + C + offs, mask=mask, other=0.0).to(ACC) * inv_count
    else:
        mean_g = offs.to(ACC) * 0.0
        mean_gu = mean_g
    return mean_g, mean_gu


@triton.jit
def norm_grad(g, u, mean, rstd, weight, bias, mean_g, mean_gu, ACT: tl.constexpr):
    """The gradient at u of ``act(norm(u))`` from vectors that are in registers; g, u (rows, channels)."""
    uhat = (u - mean[None, :]) * rstd[None, :]
    g = activate_grad(g, uhat * weight[None, :] + bias[None, :], ACT)
    return (g - mean_g[None, :] - uhat * mean_gu[None, :]) * (weight * rstd)[None, :]


@triton.jit
def store_tile_stats(v, mask_m, tile, stats_ptr, offs, mask, C, ACC: tl.constexpr):
    """Store mean and squared deviations of the valid rows of v (rows, channels) as row ``tile`` of (tiles, 2, C).

    Two passes over registers, with the first pass's rounding put right by the second: exact where
    sum(v^2) - sum(v)^2 would cancel. -> the number of valid rows.
    """
    count = tl.sum(mask_m.to(ACC), axis=0)
    mean = tl.sum(tl.where(mask_m[:, None], v, 0.0), axis=0) / count
    d = tl.where(mask_m[:, None], v - mean[None, :], 0.0)
    shift = tl.sum(d, axis=0) / count
    m2 = tl.sum(d * d, axis=0) - shift * shift * count
    row = tile.to(tl.int64) * 2 * C
    tl.store(stats_ptr + row + offs, mean + shift, mask=mask)
    tl.store(stats_ptr + row + C + offs, m2, mask=mask)
    return count


@triton.jit
def store_tile_sums(g, gu, mask_m, tile, sums_ptr, offs, mask, C):
    """Store the sums over valid rows of g and of gu (rows, channels) as row ``tile`` of (tiles, 2, C)."""
    row = tile.to(tl.int64) * 2 * C
    tl.store(sums_ptr + row + offs, tl.sum(tl.where(mask_m[:, None], g, 0.0), axis=0), mask=mask)
    tl.store(sums_ptr + row + C + offs, tl.sum(tl.where(mask_m[:, None], gu, 0.0), axis=0), mask=mask)
