"""Dilated 3x3 convolutions in Winograd's form: the sub-maps that the taps see, side by side in one map.

A convolution of dilation d reads each of d x d sub-maps, every d-th row and column, as a plain 3x3 convolution would.
The sub-maps are put side by side, a line of zeros between two, which is the padding; Winograd's form runs on the whole,
so that its matrix products have enough rows. For 32x32 at dilation 4 that is 35x35. NaN and infinity reach the outputs
of their tiles, as in Winograd's form, here of neighbouring sub-maps too.
"""

from torch import Tensor

from fastseg.ops.cpu.winograd import OUT, Filters, plan, transform, winograd_conv2d

# One thread, oneDNN's time and this form's in ms: 512 channels on 16x16 at dilation 2: 17 and 8.4; on 32x32 at 4: 45
# and 23; 256 channels on 32x32 at 2: 15 and 6.4; on 16x16 at 4: 2.4 and 2.6, since oneDNN leaves out taps in the
# padding; 128 channels on 64x64 at 4: 12.8 and 8.6.
LEAST_CHANNELS = 128
MOST_MORE = {2: 1.8, 3: 1.4, 4: 1.4}  # dilation -> outputs of all tiles over pixels of the map, up to which it pays


class Dilated:
    """A convolution with transformed filters, ``padding`` and ``dilation`` being ``rate``: x (N, C, H, W) -> y."""

    def __init__(self, filters: Filters, rate: int):
        self.filters, self.rate, self.geometry = filters, rate, ([rate] * 2, [1, 1], [rate] * 2, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, COUT, H, W), dense in channels_last."""
        (N, C, H, W), d = x.shape, self.rate
        pixels, places = x.permute(0, 2, 3, 1), _places(H, W, d)
        wide = x.new_zeros(N, *_size(H, W, d), C)
        for source, target in places:
            wide[target] = pixels[source]
        y = winograd_conv2d(wide.permute(0, 3, 1, 2), self.filters, False).permute(0, 2, 3, 1)
        result = y.new_empty(N, H, W, y.shape[3])
        for source, target in places:
            result[source] = y[target]
        return result.permute(0, 3, 1, 2)


def plan_dilated(C: int, COUT: int, H: int, W: int, rate: int, threads: int) -> tuple[int, int] | None:
    """Tiles of a block, as ``plan`` gives them, or None if the library's convolution is faster."""
    if rate not in MOST_MORE or min(C, COUT) < LEAST_CHANNELS or min(H, W) < 4 * rate:
        return None
    height, width = _size(H, W, rate)
    if -(-height // OUT) * -(-width // OUT) * OUT**2 > MOST_MORE[rate] * H * W:
        return None
    return plan(C, COUT, height, width, threads)


def transform_dilated(
    weight: Tensor, bias: Tensor | None, tiles: tuple[int, int], H: int, W: int, rate: int
) -> Dilated:  # fmt: skip
    """Transform weight (COUT, C, 3, 3) for maps of (H, W)."""
    return Dilated(transform(weight, bias, tiles, *_size(H, W, rate)), rate)


def _size(H: int, W: int, rate: int) -> tuple[int, int]:
    """Height and width of all sub-maps side by side."""
    return rate * (-(-H // rate) + 1) - 1, rate * (-(-W // rate) + 1) - 1


def _places(H: int, W: int, rate: int) -> list[tuple[tuple, tuple]]:
    """Of each sub-map: where it is in the map (N, H, W, C), and where among all sub-maps."""
    down, across = -(-H // rate) + 1, -(-W // rate) + 1
    cut = lambda i, size, step: slice(i * step, i * step + -(-(size - i) // rate))
    return [
        ((slice(None), slice(i, None, rate), slice(j, None, rate)), (slice(None), cut(i, H, down), cut(j, W, across)))
        for i in range(rate)
        for j in range(rate)
    ]
