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
def tile_pixels(tile, H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Pixels of tile number ``tile`` over a batch of (H, W) maps: -> image (int64), rows, columns, which are inside."""
    tiles_w = tl.cdiv(W, BLOCK_W)
    tiles_image = tl.cdiv(H, BLOCK_H) * tiles_w
    n = (tile // tiles_image).to(tl.int64)
    in_image = tile % tiles_image
    offs_m = tl.arange(0, BLOCK_H * BLOCK_W)
    y = in_image // tiles_w * BLOCK_H + offs_m // BLOCK_W
    x = in_image % tiles_w * BLOCK_W + offs_m % BLOCK_W
    return n, y, x, (y < H) & (x < W)


@triton.jit
def in_phase_order(i, size, phases):
    """Position ``i`` of an axis ordered by position modulo ``phases``, then by position; for 0 <= i < size.

    What is ``phases`` apart on the map are neighbours in the order: space-to-batch, as an address. The first
    ``size % phases`` phases have one position more than the others.
    """
    short = size // phases
    longer = size - short * phases
    head = longer * (short + 1)
    j = i - head
    of = tl.where(short > 0, short, 1)
    at = tl.where(i < head, i // (short + 1) + i % (short + 1) * phases, longer + j // of + j % of * phases)
    return clamp_index(at, size - 1)


@triton.jit
def dilated_tile_pixels(tile, H, W, dilation, PHASED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """As ``tile_pixels``; with PHASED a tile's rows and columns are ``dilation`` apart, so that it holds its own taps.

    A contiguous tile of a convolution whose dilation is as large as the tile reads every input pixel once for each of
    its taps, from L2; one in phase order finds most of them where another of its pixels has just read them.
    """
    n, y, x, inside = tile_pixels(tile, H, W, BLOCK_H, BLOCK_W)
    if PHASED:
        y, x = in_phase_order(y, H, dilation), in_phase_order(x, W, dilation)
    return n, y, x, inside


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
    rstd = 1.0 / tl.sqrt(var + eps)
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
    if NORM:
        mean, rstd, weight, bias = load_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs, mask, eps, AFFINE, ACC)
        u = (u - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :]
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


@triton.jit
def clamp_index(i, last):
    """``i`` within [0, last], by minima alone (at the lower end, of the complement): bounds that the offset check can
    follow, and no maximum, which is banned for what it does to NaN."""
    return -1 - tl.minimum(-1 - tl.minimum(i, last), -1)


@triton.jit
def source_position(o, scale, scale_rest, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """Where output pixel ``o`` lies in the input, in pixels: torch's rule in torch's order of operations, not clamped.

    ``scale`` is input pixels per output pixel, rounded to fp32; ``scale_rest`` what fp64 adds to it.
    """
    p = o.to(ACC)
    if not ALIGN_CORNERS:
        p += 0.5
    p = p * scale + p * scale_rest if ACC == tl.float64 else p * scale  # noqa: SIM300
    if not ALIGN_CORNERS:
        p -= 0.5
    return p


@triton.jit
def to_second(scale, scale_rest):
    """Pixels from an output's first input pixel to its second: 0 on an axis that keeps its size, as torch has it."""
    return tl.where((scale == 1.0) & (scale_rest == 0.0), 0, 1)


@triton.jit
def source_taps(o, size, scale, scale_rest, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """The two input pixels between which output pixel ``o`` lies, of ``size``, and their weights: -> i0, i1, w0, w1.

    Past the ends both are the end's pixel; both count then, as in torch: 0 * inf is NaN. On an axis that keeps its size
    both are the output's own pixel: a NaN reaches no other.
    """
    p = source_position(o, scale, scale_rest, ALIGN_CORNERS, ACC)
    p = tl.where(p < 0, 0.0, p)
    i0 = clamp_index(p.to(tl.int32), size - 1)
    i1 = tl.minimum(i0 + to_second(scale, scale_rest), size - 1)
    w1 = p - i0.to(ACC)
    w1 = tl.where(w1 > 1.0, 1.0, w1)
    return i0, i1, 1.0 - w1, w1


@triton.jit
def nan_blind_maximum(a, b):
    """The larger of two values; a NaN loses. For integers, and where NaN is looked for elsewhere."""
    return tl.maximum(a, b)


@triton.jit
def source_coordinate(dst, low, scale, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """Where bilinear interpolation reads for output ``dst`` (int32) of an axis of ``low`` elements, as torch does.

    ``scale``: input elements per output element. -> first neighbour, second (the first again at the end), both int32;
    weight of the second, in ACC.
    """
    first, second, _, weight = source_taps(dst, low, tl.full((), scale, ACC), 0.0, ALIGN_CORNERS, ACC)
    return first, second, weight


@triton.jit
def mix(p, a, q, b):
    """``p a + q b`` with the same rounding everywhere, which the compiler's own choice of what to fuse would not be."""
    p, a = tl.broadcast(p, a)
    return tl.fma(p, a, q * b)


@triton.jit
def first_output(cell, low, full, scale, inverse, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """The first of ``full`` outputs whose first neighbour is ``cell`` or later; ``full`` where there is none.

    A cell's outputs are those from its own ``first_output`` up to that of ``cell + 1``. ``inverse`` is 1 / scale.
    The inverse of ``source_coordinate`` is rounded differently, so its neighbours are tried.
    """
    guess = cell.to(ACC) * inverse if ALIGN_CORNERS else (cell.to(ACC) + 0.5) * inverse - 0.5
    dst = nan_blind_maximum(tl.minimum(tl.floor(tl.minimum(guess, full + 1.0)).to(tl.int32), full), 1) - 1
    for _ in tl.static_range(3):
        dst += (source_coordinate(dst, low, scale, ALIGN_CORNERS, ACC)[0] < cell).to(tl.int32)
    dst = tl.where(cell <= 0, 0, tl.minimum(dst, full))
    return tl.where(cell >= low, full, dst)


@triton.jit
def upsample_tile(
    tile, h, H, W, scale, inverse, splits,
    ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Output of program ``tile``: every ``splits``-th block of BLOCK_H rows of one cell row, and one block of columns.

    -> image (int64), cell row, first row, end of the cell row's rows, first column.
    """
    blocks_w = tl.cdiv(W, BLOCK_W)
    column = tile % blocks_w * BLOCK_W
    tile = tile // blocks_w
    split = tile % splits
    tile = tile // splits
    cell = tile % h
    row = first_output(cell, h, H, scale, inverse, ALIGN_CORNERS, ACC)
    end = first_output(cell + 1, h, H, scale, inverse, ALIGN_CORNERS, ACC)
    return (tile // h).to(tl.int64), cell, row + split * BLOCK_H, end, column
