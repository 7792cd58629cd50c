"""Costs of everything but the separable convolution: ASPP, pooling, upsampling, argmax, cross entropy,
batch norm, whole MBConv.

lo / hi: elements before / after an upsampling (of the smaller / larger map of a pooling); pixels = hi / C.
"""

from math import ceil

from benchmarks.roofline.floors import ITEM, Cost, Strategy
from benchmarks.roofline.useful_macs import aspp_fraction
from benchmarks.workloads import AsppShape

WIDTH = 256  # channels of every ASPP branch and of its projection


def aspp_kernels(shape: AsppShape, strategy: Strategy) -> list[Cost]:
    """Dense ASPP: 1x1, three atrous 3x3 and image pooling to 256 channels each, concatenated and projected to 256.

    Eager and compile run every tap; fused skips taps of padding, reads the input once, needs no concatenation, and adds
    the pooled branch to the projection as one bias row per image.
    """
    pixels = shape.N * shape.H * shape.W
    A, Y = pixels * shape.C, pixels * WIDTH
    branch = 2.0 * Y * shape.C  # FLOP of one tap
    if strategy == "fused":
        weights = 28 * shape.C * WIDTH + 4 * WIDTH**2
        useful = float(aspp_fraction(shape.H, shape.W, shape.rates)) * 28 * branch
        return [Cost(bytes=ITEM * (A + Y + weights), tensor=useful + 4 * 2.0 * Y * WIDTH)]
    act = [Cost(bytes=4 * Y)] * (2 if strategy == "eager" else 1)
    kernels = []
    for taps in (1, 9, 9, 9):
        kernels += [Cost(bytes=ITEM * (A + Y + taps * shape.C * WIDTH), tensor=taps * branch), *act]
    kernels += [Cost(bytes=ITEM * A), Cost(bytes=ITEM * Y)]  # mean over the map; spreading the pooled vector over it
    kernels += [Cost(bytes=4 * 5 * Y)]  # concatenation
    return [*kernels, Cost(bytes=ITEM * (6 * Y + 5 * WIDTH**2), tensor=5 * 2.0 * Y * WIDTH), *act]


def atrous_kernels(shape: AsppShape, strategy: Strategy, *, backward: bool = False) -> list[Cost]:
    """The 1x1 and three atrous 3x3 of an ASPP with folded norms: bias and ReLU, in one map of 4 x 256 channels.

    Eager runs every tap, adds the bias in the convolution, and takes a pass each for concatenation and ReLU; fused
    skips taps of padding and reads the input once. A backward computes the gradients at the input and at the weights.
    """
    pixels = shape.N * shape.H * shape.W
    A, Y, taps = pixels * shape.C, pixels * WIDTH, 28 * shape.C * WIDTH
    branch = 2.0 * Y * shape.C  # FLOP of one tap
    if strategy == "fused":
        tensor = float(aspp_fraction(shape.H, shape.W, shape.rates)) * 28 * branch
        once = Cost(bytes=ITEM * (A + 4 * Y + taps), tensor=tensor)
        return [once, once, Cost(bytes=3 * ITEM * 4 * Y)] if backward else [once]  # the ReLU's pass reads dy and y
    convs = [Cost(bytes=ITEM * (A + Y + n * shape.C * WIDTH), tensor=n * branch) for n in (1, 9, 9, 9)]
    if backward:
        return [*convs, *convs, Cost(bytes=3 * ITEM * 4 * Y), *[Cost(bytes=3 * ITEM * A)] * 3]  # and the sums of dx
    passes = 2 if strategy == "eager" else 1
    return [*convs, *[Cost(bytes=2 * ITEM * 4 * Y)] * passes]


def pool_bytes(lo: int, hi: int) -> dict[str, float]:
    """Bytes of a 2x2 max pooling with indices: eager int64, ours with int8 or 2-bit codes.

    The unpooling is timed from NCHW and from channels_last. Eager makes values and int64 indices contiguous, clears the
    output, scatters and converts back. Neighbouring windows write neighbouring pixels, so a scattered write costs its
    share of a sector, 8 bytes a window, not a sector of its own.
    """
    ours = ITEM * (hi + lo) + lo / 4
    return {
        "pool eager": ITEM * hi + 10 * lo,
        "pool 2-bit": ours,
        "pool int8": ITEM * (hi + lo) + lo,
        "unpool eager NCHW": ITEM * hi + 18 * lo,
        "unpool eager CL": 6 * hi + 38 * lo,
        "unpool ours": ours,
        "unpool in prologue": ITEM * lo + lo / 4,
        "unpool bwd eager CL": 4 * hi + 40 * lo,
        "unpool bwd ours": ours,
    }


def norm_act_kernels(elements: int, mode: str, residual: bool, strategy: Strategy) -> list[Cost]:
    """Batch norm (+ residual) + ReLU over Y ``elements``; ``mode``: "train", "train-backward" or "eval".

    eager      statistics Y, normalise 2, add 3, ReLU 2; backward ReLU 3, sums 2, input 3
    compile    statistics Y, the rest 2 (3); backward sums 2, input 3, with a residual 4 and 3
    fused      the same
    With a residual the backward's first pass reads dy, x and y and writes the residual's gradient, which the second
    reads in place of dy.
    """
    add = int(residual)
    passes = {"train": (1, 2 + add), "train-backward": (2 + 2 * add, 3), "eval": (2 + add,)}
    if strategy == "eager":
        forward = (2, *(3,) * add, 2)
        passes = {"train": (1, *forward), "train-backward": (3, 2, 3), "eval": forward}
    return [Cost(bytes=ITEM * n * elements) for n in passes[mode]]


def argmax_of_logits(hi: int, pixels: int) -> Cost:
    """PyTorch's argmax over stored logits, to int64."""
    return Cost(bytes=ITEM * hi + 8 * pixels)


def argmax_kernels(lo: int, hi: int, pixels: int, strategy: Strategy, *, pruned: bool = True) -> list[Cost]:
    """Upsampling and argmax: eager in two kernels, compile in one that interpolates all classes, fused to uint8."""
    if strategy == "eager":
        return [Cost(bytes=ITEM * (lo + hi)), argmax_of_logits(hi, pixels)]
    if strategy == "compile":
        return [Cost(bytes=ITEM * lo + 8 * pixels, fma=7 * hi)]
    return [Cost(bytes=ITEM * lo + pixels, fma=24 * pixels + 10 * lo if pruned else 7 * hi)]


def upsampled_loss(lo: int, hi: int, pixels: int, strategy: Strategy) -> Cost:
    """Upsampling and cross entropy, forward and backward.

    eager, bytes per hi element: interpolate 2; cast 2 + 4; log_softmax 4 + 4; backward of nll 4, of log_softmax 8 + 4,
    of the cast 4 + 2, of interpolate 2: 40. Per pixel: int64 labels twice, 16, and the picked log-probability, 4.
    compile interpolates again rather than store the result, but stores its gradient.
    fused reads labels twice, writes and reads the log-sum-exp: 24 bytes a pixel; 14 lane operations, 2 exp an element.
    """
    if strategy == "eager":
        return Cost(bytes=40 * hi + 6 * lo + 20 * pixels)
    stored = 2 * ITEM * hi if strategy == "compile" else 0
    return Cost(bytes=stored + 6 * lo + 24 * pixels, fma=14 * hi, mufu=2 * hi)


def loss_of_logits(hi: int, pixels: int, strategy: Strategy) -> Cost:
    """Cross entropy of stored logits, forward and backward: as above without the upsampling's own 2 + 2 bytes.

    compile and fused read the logits in both passes and write their gradient.
    """
    if strategy == "eager":
        return Cost(bytes=36 * hi + 20 * pixels)
    return Cost(bytes=6 * hi + 24 * pixels, fma=6 * hi, mufu=2 * hi)


def loss_memory(lo: int, hi: int, pixels: int, strategy: Strategy) -> float:
    """Peak extra bytes of upsampling + cross entropy: eager 18 a hi element; fused gradient and log-sum-exp."""
    return 18.0 * hi if strategy == "eager" else 4.0 * lo + 4.0 * pixels


def bilinear_macs(factor: int) -> float:
    """MACs an output element of two separable passes: 2 along x, and 2 along y for every ``factor`` outputs."""
    return 2 + 2 / factor


def halo_factor(tile: int, stride: int, dilation: int) -> float:
    """Input pixels a tile x tile output tile of a 3x3 convolution reads, over the pixels it owns."""
    return ((tile - 1) * stride + 1 + 2 * dilation) ** 2 / (tile * stride) ** 2


def mbconv_kernels(
    C: int,
    COUT: int,
    height: int,
    width: int,
    batch: int,
    expand: int,
    stride: int,
    dilation: int,
    form: str,
    tile: int = 8,
) -> list[Cost]:
    """Inverted residual: 1x1 expand, depthwise 3x3, 1x1 project, each with BN. ``form``: "eager", "pair" or "block".

    "pair" fuses depthwise and project; "block" fuses all three and expands the halo of every output tile again.
    """
    H, W = ceil(height / stride), ceil(width / stride)
    hidden = expand * C
    A, wide, M, Y = (batch * n for n in (C * height * width, hidden * height * width, hidden * H * W, COUT * H * W))
    residual = ITEM * Y * (stride == 1 and C == COUT)
    expansion, projection = 2.0 * wide * C, 2.0 * M * COUT
    weights = hidden * (C * (expand > 1) + 9 + COUT)
    if form == "block":
        work = expansion * halo_factor(tile, stride, dilation) * (expand > 1) + projection
        return [Cost(bytes=ITEM * (A + Y + weights) + residual, fma=9 * M, tensor=work)]
    first = [Cost(bytes=ITEM * (A + wide + C * hidden), tensor=expansion)] if expand > 1 else []
    if form == "pair":
        pair = Cost(bytes=ITEM * (wide + Y + hidden * (9 + COUT)) + residual, fma=9 * M, tensor=projection)
        return [*first, pair]
    first += [Cost(bytes=4 * wide)] * 2 if expand > 1 else []
    return [
        *first,
        Cost(bytes=ITEM * (wide + M + 9 * hidden), fma=9 * M),
        Cost(bytes=8 * M),
        Cost(bytes=ITEM * (M + Y + hidden * COUT), tensor=projection),
        Cost(bytes=4 * Y + 3 * residual),
    ]
