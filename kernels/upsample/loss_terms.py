"""Device functions of losses made of sums: one pixel's share of a sum, and its slope.

``fastseg/ops/core/loss_columns.py`` has the formulas. A column is (code, gamma, threshold); the columns of a loss are
one compile-time tuple, so that a kernel holds the arithmetic of its own sums and no more.
"""

import triton
import triton.language as tl

from fastseg.kernels.common.bilinear import nan_blind_maximum

CODES = {
    kind: code
    for code, kind in enumerate((
        "count", "target", "target_square", "inter", "least", "prob", "square", "nll", "all", "focal", "bce", "pos",
        "neg", "pos_flip", "neg_flip", "factor_pos", "factor_neg", "focal_pos", "focal_neg",
    ))
}  # fmt: skip
COLUMNS = 6  # of one launch, each with an accumulator of its own
_COUNT, _TARGET, _TARGET_SQUARE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_INTER, _LEAST, _PROB, _SQUARE = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
_NLL, _ALL, _FOCAL, _BCE = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)
_POS, _NEG, _POS_FLIP, _NEG_FLIP = tl.constexpr(11), tl.constexpr(12), tl.constexpr(13), tl.constexpr(14)
_FACTOR_POS, _FACTOR_NEG = tl.constexpr(15), tl.constexpr(16)
_FOCAL_POS, _FOCAL_NEG = tl.constexpr(17), tl.constexpr(18)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(v):
    """log(1 + exp v), also where it is small."""
    e = tl.exp2(-tl.abs(v) * _LOG2E)
    rest = tl.log2(1 + e) * _LN2
    if v.dtype != tl.float64:  # 1 + e keeps too little of a small e
        rest = tl.where(e < 0.03125, e * (1 - e * (0.5 - e * (1.0 / 3 - e * 0.25))), rest)
    return tl.where(v > 0, v, 0.0) + rest


@triton.jit
def power(q, GAMMA: tl.constexpr):
    """q^GAMMA of q in [0, 1]."""
    if GAMMA == 0:
        r = q * 0 + 1
    elif GAMMA == 1:
        r = q
    elif GAMMA == 2:
        r = q * q
    else:
        r = tl.exp2(GAMMA * tl.log2(q))
    return r


@triton.jit
def factor(q, GAMMA: tl.constexpr, THRESHOLD: tl.constexpr):
    r = power(q if THRESHOLD == 0 else q / THRESHOLD, GAMMA)
    if THRESHOLD != 0:
        r = tl.where(1 - q < THRESHOLD, 1.0, r)
    return r


@triton.jit
def factor_slope(q, GAMMA: tl.constexpr, THRESHOLD: tl.constexpr):
    """q times the slope of ``factor``."""
    r = GAMMA * factor(q, GAMMA, THRESHOLD)
    if THRESHOLD != 0:
        r = tl.where(1 - q < THRESHOLD, 0.0, r)
    return r


@triton.jit
def share(CODE: tl.constexpr, GAMMA: tl.constexpr, THRESHOLD: tl.constexpr, p, aux, y):
    """What a pixel adds to a sum. p: probability; aux: its logarithm (softmax), or the logit (sigmoid); y: label."""
    if CODE == _COUNT:
        f = p * 0 + 1
    elif CODE == _TARGET:
        f = y
    elif CODE == _TARGET_SQUARE:
        f = y * y
    elif CODE == _INTER:
        f = p * y
    elif CODE == _LEAST:
        f = tl.where(p < y, p, y)
    elif CODE == _PROB:
        f = p
    elif CODE == _SQUARE:
        f = p * p
    elif CODE == _NLL:
        f = tl.where(y == 0, 0.0, -y * aux)
    elif CODE == _ALL:
        f = -aux
    elif CODE == _FOCAL:
        f = tl.where(y == 0, 0.0, -y * power(1 - p, GAMMA) * aux)
    elif CODE == _BCE:
        f = y * softplus(-aux) + (1 - y) * softplus(aux)
    elif CODE == _POS:
        f = y * softplus(-aux)
    elif CODE == _NEG:
        f = (1 - y) * softplus(aux)
    elif CODE == _POS_FLIP:
        f = y * softplus(aux)
    elif CODE == _NEG_FLIP:
        f = (1 - y) * softplus(-aux)
    else:
        q = 1 / (1 + tl.exp2(aux * _LOG2E))
        if CODE == _FACTOR_POS:
            f = y * factor(q, GAMMA, THRESHOLD)
        elif CODE == _FACTOR_NEG:
            f = (1 - y) * factor(p, GAMMA, THRESHOLD)
        elif CODE == _FOCAL_POS:
            f = y * factor(q, GAMMA, THRESHOLD) * softplus(-aux)
        else:
            f = (1 - y) * factor(p, GAMMA, THRESHOLD) * softplus(aux)
    return f


@triton.jit
def slope(CODE: tl.constexpr, GAMMA: tl.constexpr, THRESHOLD: tl.constexpr, p, aux, y, SIGMOID: tl.constexpr):
    """The slope of ``share`` along log p (softmax) or the logit (sigmoid)."""
    if CODE <= _TARGET_SQUARE:
        f = p * 0
    elif CODE <= _SQUARE:
        if CODE == _INTER:
            f = p * y
        elif CODE == _LEAST:
            f = tl.where(p < y, p, tl.where(p == y, p * 0.5, p * 0))
        elif CODE == _PROB:
            f = p
        else:
            f = 2 * p * p
        if SIGMOID:
            f *= 1 / (1 + tl.exp2(aux * _LOG2E))
    elif CODE == _NLL:
        f = -y
    elif CODE == _ALL:
        f = p * 0 - 1
    elif CODE == _FOCAL:
        q = 1 - p
        f = tl.where(y == 0, 0.0, y * (GAMMA * power(q, GAMMA - 1) * p * aux - power(q, GAMMA)))
    elif CODE == _BCE:
        f = p - y
    else:
        q = 1 / (1 + tl.exp2(aux * _LOG2E))
        if CODE == _POS:
            f = -y * q
        elif CODE == _NEG:
            f = (1 - y) * p
        elif CODE == _POS_FLIP:
            f = y * p
        elif CODE == _NEG_FLIP:
            f = (y - 1) * q
        elif CODE == _FACTOR_POS:
            f = -y * p * factor_slope(q, GAMMA, THRESHOLD)
        elif CODE == _FACTOR_NEG:
            f = (1 - y) * q * factor_slope(p, GAMMA, THRESHOLD)
        elif CODE == _FOCAL_POS:
            s = factor_slope(q, GAMMA, THRESHOLD)
            f = -y * (s * p * softplus(-aux) + factor(q, GAMMA, THRESHOLD) * q)
        else:
            s = factor_slope(p, GAMMA, THRESHOLD)
            f = (1 - y) * (s * q * softplus(aux) + factor(p, GAMMA, THRESHOLD) * p)
    return f


@triton.jit
def load_slopes(slopes_ptr, n, classes, C: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """The derivatives of the loss by the sums of a block of classes: -> six of (BLOCK_C,), 0 past K."""
    ptr = slopes_ptr + n * (C * K) + classes * K
    known = classes < C
    a = tl.load(ptr, mask=known, other=0.0).to(ACC)
    b = tl.load(ptr + 1, mask=known & (K > 1), other=0.0).to(ACC)
    c = tl.load(ptr + 2, mask=known & (K > 2), other=0.0).to(ACC)
    d = tl.load(ptr + 3, mask=known & (K > 3), other=0.0).to(ACC)
    e = tl.load(ptr + 4, mask=known & (K > 4), other=0.0).to(ACC)
    f = tl.load(ptr + 5, mask=known & (K > 5), other=0.0).to(ACC)
    return a, b, c, d, e, f


@triton.jit
def total_slope(a, b, c, d, e, f, p, aux, y, SPEC: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr):
    """h: the slope of the loss along log p or the logit. a to f: ``load_slopes``."""
    h = a[:, None, None] * slope(SPEC[0][0], SPEC[0][1], SPEC[0][2], p, aux, y, SIGMOID)
    if K > 1:
        h += b[:, None, None] * slope(SPEC[1][0], SPEC[1][1], SPEC[1][2], p, aux, y, SIGMOID)
    if K > 2:
        h += c[:, None, None] * slope(SPEC[2][0], SPEC[2][1], SPEC[2][2], p, aux, y, SIGMOID)
    if K > 3:
        h += d[:, None, None] * slope(SPEC[3][0], SPEC[3][1], SPEC[3][2], p, aux, y, SIGMOID)
    if K > 4:
        h += e[:, None, None] * slope(SPEC[4][0], SPEC[4][1], SPEC[4][2], p, aux, y, SIGMOID)
    if K > 5:
        h += f[:, None, None] * slope(SPEC[5][0], SPEC[5][1], SPEC[5][2], p, aux, y, SIGMOID)
    return h


@triton.jit
def load_labels(
    target_ptr, weight_ptr, offs, classes, mask, pixels, ignore_index,
    C: tl.constexpr, EACH: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Labels of an image's pixels ``offs`` (rows, columns) for a block of classes, and the factors of the pixels.

    EACH: there is a label for each class; else there are class indices. -> y (BLOCK_C, rows, columns); m, the same or
    (1, rows, columns): 0 where a pixel does not count, NaN where its label is none.
    """
    if EACH:
        here = mask[None] & (classes < C)[:, None, None]
        raw = tl.load(target_ptr + classes[:, None, None] * pixels + offs[None], mask=here, other=0)
        if raw.dtype.is_int():
            raw = raw.to(tl.int64)
            counts = here & (raw != ignore_index)
            bad = counts & (raw != 0) & (raw != 1)
        else:
            counts = here & (raw.to(ACC) != ignore_index)
            bad = counts & (raw != raw)
        y = tl.where(counts, raw.to(ACC), 0.0)
    else:
        raw = tl.load(target_ptr + offs, mask=mask, other=0).to(tl.int64)
        counts = (mask & (raw != ignore_index))[None]
        bad = counts & ((raw < 0) | (raw >= C))[None]
        raw = nan_blind_maximum(tl.minimum(raw, C), -1).to(tl.int32)  # compared as int64 first: 2^32 + 3 is not 3
        y = tl.where((classes[:, None, None] == raw[None]) & counts, 1.0, 0.0).to(ACC)
    m = tl.where(bad, float("nan"), tl.where(counts, 1.0, 0.0)).to(ACC)
    if WEIGHTED:
        m *= tl.load(weight_ptr + offs, mask=mask, other=0.0).to(ACC)[None]
    return y, m


@triton.jit
def activated(v, lse, SIGMOID: tl.constexpr):
    """v: logits in units of log 2; lse: (1, rows, columns), their log-sum. -> p; log p (softmax), or the logit."""
    if SIGMOID:
        p = 1 / (1 + tl.exp2(-v))
        aux = v * _LN2
    else:
        p = tl.exp2(v - lse)
        aux = (v - lse) * _LN2
    return p, aux
