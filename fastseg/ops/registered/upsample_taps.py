"""3x3 convolution of a bilinearly upsampled map, from nine products of the small map with the filters.

Convolution and interpolation are both linear, so they change places. Nine 1x1 convolutions at low resolution give
taps[ky, n, i, j, kx] = x[n, :, i, j] W[:, :, ky, kx]. With the interpolation's weights along each axis,

    y[n, o, p] = sum over ky, kx of  sum over i, j of  Ay[o + ky - 1, i] Ax[p + kx - 1, j] taps[ky, n, i, j, kx]

where a row of Ay or Ax outside the large map is zero, the padding of the convolution. Taps are (3, N, h, w, 3, COUT):
filter row, image, pixel, filter column, channel. Pixels and filter columns are then one dimension of a matrix, and
channels are neighbours in memory for the kernel.

On a CPU both sums are GEMMs with the interpolation's weights, first along x, then along y, in strips of output columns
and rows. A strip reads a few neighbouring pixels; a GEMM along a whole axis would multiply zeros.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops.core.autograd import run
from fastseg.ops.core.constants import constant
from fastseg.ops.core.dispatch import HAS_TRITON, followed
from fastseg.ops.core.kept import made_once
from fastseg.ops.core.layout import channels_last
from fastseg.ops.core.norm import activate
from fastseg.ops.core.register import one_launch, qualified, register
from fastseg.ops.core.upsample import neighbours
from fastseg.ops.cpu.packed import conv2d, packing

if HAS_TRITON:
    from fastseg.kernels.upsample.conv import unsupported, upsample_conv_fwd


def low_resolution_taps(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, C, h, w), weight (COUT, C, 3, 3) -> taps (3, N, h, w, 3, COUT), by three GEMMs."""
    (N, C, h, w), COUT = x.shape, weight.shape[0]
    if packing():
        each = made_once(
            (weight,), ("taps",), lambda: weight.permute(2, 3, 0, 1).reshape(3, 3 * COUT, C, 1, 1).unbind()
        )
        return torch.stack([conv2d(x, w_row).permute(0, 2, 3, 1) for w_row in each]).view(3, N, h, w, 3, COUT)
    rows = channels_last(x).permute(0, 2, 3, 1).reshape(N * h * w, C)
    filters = weight.permute(2, 1, 3, 0).reshape(3, C, 3 * COUT)
    return torch.bmm(rows.expand(3, -1, -1), filters).view(3, N, h, w, 3, COUT)


# Output columns and rows of a strip. 256 -> 256 channels, 32^2 -> 128^2, one thread: (32, 16) 94 ms, (32, 32) 100, (64,
# 16) 97, (128, 16) 96, without strips 117; eager takes 332. Wider maps need the strips along x.
STRIP = (32, 16)


class Strip(NamedTuple):
    """Outputs [start, stop) of an axis read inputs [first, last) with weights (3, stop - start, last - first)."""

    start: int
    stop: int
    first: int
    last: int
    weights: Tensor


@constant(256)
def strips(low: int, full: int, align_corners: bool, dtype: torch.dtype, length: int) -> tuple[Strip, ...]:
    """Weights of one axis for the three taps of a filter, cut into strips of ``length`` outputs."""
    first, second, weight = neighbours(low, full, align_corners, torch.float64)
    padded = torch.zeros(full + 2, low, dtype=torch.float64)  # zeros on either side: the padding
    padded[1:-1].scatter_add_(1, first[:, None], (1 - weight)[:, None])
    padded[1:-1].scatter_add_(1, second[:, None], weight[:, None])
    out = []
    for start in range(0, full, length):
        stop = min(full, start + length)
        # outputs start - 1 to stop, as far as they exist; positions ascend
        a, b = int(first[max(start - 1, 0)]), int(second[min(stop, full - 1)]) + 1
        weights = torch.stack([padded[start + k : stop + k, a:b] for k in range(3)]).to(dtype)
        out.append(Strip(start, stop, a, b, weights))
    return tuple(out)


def strips_of(size: Sequence[int], out: Sequence[int], align_corners: bool, like: Tensor) -> list[list[Strip]]:
    """Return the strips of columns and the strips of rows."""
    axes = [strips(size[axis], out[axis], align_corners, like.dtype, STRIP[1 - axis]) for axis in (1, 0)]
    return [[s._replace(weights=s.weights.to(like.device)) for s in axis] for axis in axes]


def _rows_of(y: Tensor) -> Tensor:
    """View ``y`` (N, C, H, W), dense in channels_last, as (N, H, W C)."""
    return y.permute(0, 2, 3, 1).view(y.shape[0], y.shape[2], y.shape[3] * y.shape[1])


def _along_x(columns: Strip) -> Tensor:
    """Weights of a strip's GEMM, (outputs, inputs x 3), filter columns innermost as in the taps."""
    return columns.weights.permute(1, 2, 0).flatten(1)


def add_upsampled(y: Tensor, taps: Tensor, align_corners: bool) -> Tensor:
    """Add the interpolation of the taps to ``y`` (N, COUT, H, W), dense in channels_last, in place."""
    _, N, h, w, _, COUT = taps.shape
    across, down = strips_of((h, w), y.shape[2:], align_corners, y)
    pixels = _rows_of(y)
    for n in range(N):
        rows = taps[:, n].reshape(3 * h, w * 3, COUT)
        for columns in across:
            weights = _along_x(columns).expand(3 * h, -1, -1)
            wide = torch.bmm(weights, rows[:, 3 * columns.first : 3 * columns.last]).view(3, h, -1)
            for lines in down:
                strip = pixels[n, lines.start : lines.stop, COUT * columns.start : COUT * columns.stop]
                for ky in range(3):
                    strip.addmm_(lines.weights[ky], wide[ky, lines.first : lines.last])
    return y


def _transposed(dy: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Gradient at the taps (3, N, h, w, 3, COUT), from ``dy`` (N, COUT, H, W) in channels_last."""
    (N, COUT), (h, w) = dy.shape[:2], size
    across, down = strips_of(size, dy.shape[2:], align_corners, dy)
    pixels = _rows_of(dy)
    dtaps = dy.new_zeros(3, N, h, w, 3, COUT)
    for n in range(N):
        rows = dtaps[:, n].view(3, h, w * 3, COUT)
        for columns in across:
            wide = dy.new_zeros(3, h, (columns.stop - columns.start) * COUT)
            for lines in down:
                strip = pixels[n, lines.start : lines.stop, COUT * columns.start : COUT * columns.stop]
                for ky in range(3):
                    wide[ky, lines.first : lines.last].addmm_(lines.weights[ky].T, strip)
            weights = _along_x(columns).T.expand(3 * h, -1, -1)
            part = torch.bmm(weights, wide.view(3 * h, -1, COUT)).view(3, h, -1, COUT)
            rows[:, :, 3 * columns.first : 3 * columns.last] += part
    return dtaps


# --- the registered ops


def _launch(taps: Tensor, base: Tensor | None, bias: Tensor | None, act: str, size: list[int], align_corners: bool):
    base, bias = None if base is None else channels_last(base), None if bias is None else bias.contiguous()
    return upsample_conv_fwd(taps.contiguous(), base, bias, act, tuple(size), align_corners)


def plain(taps: Tensor, base: Tensor | None, bias: Tensor | None, act: str, size: list[int], align_corners: bool):
    if not _is_plain(taps, base, bias):
        return traced(taps, base, bias, act, size, align_corners)
    y = _fake(taps, base, bias, act, size, align_corners).to(torch.promote_types(taps.dtype, torch.float32))
    y = y.zero_() if base is None else y.copy_(base)
    if bias is not None:
        y += bias[:, None, None]
    return activate(add_upsampled(y, taps.to(y.dtype), align_corners), act, inplace=True).to(taps.dtype)


def _fake(taps: Tensor, base: Tensor | None, bias: Tensor | None, act: str, size: list[int], align_corners: bool):
    _, N, _, _, _, COUT = taps.shape
    return torch.empty((N, COUT, *size), dtype=taps.dtype, device=taps.device, memory_format=torch.channels_last)


def _is_plain(*tensors: Tensor | None) -> bool:
    """True if values can be read; in the decomposition of an exported program they cannot, and sizes may be unknown."""
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors) and not followed(*tensors)


def traced(taps: Tensor, base: Tensor | None, bias: Tensor | None, act: str, size: list[int], align_corners: bool):
    """The same without strips, of any size: nine upsampled maps, shifted."""
    _, N, h, w, _, COUT = taps.shape
    maps = taps.permute(1, 0, 4, 5, 2, 3).reshape(N, 9 * COUT, h, w)
    maps = torch.ops.aten.upsample_bilinear2d.default(maps, size, align_corners, None, None)
    y = torch.zeros((), dtype=taps.dtype, device=taps.device) if base is None else base
    for tap, part in enumerate(torch.constant_pad_nd(maps, (1, 1, 1, 1)).split(COUT, 1)):
        y = y + part.narrow(2, tap // 3, size[0]).narrow(3, tap % 3, size[1])
    y = y if bias is None else y + bias[:, None, None]
    return channels_last(activate(y, act))


def traced_bwd(dy: Tensor, size: list[int], align_corners: bool) -> Tensor:
    (N, COUT, H, W), (h, w) = dy.shape, size
    wide = torch.constant_pad_nd(dy, (1, 1, 1, 1))
    shifted = torch.cat([wide.narrow(2, 2 - tap // 3, H).narrow(3, 2 - tap % 3, W) for tap in range(9)], 1)
    bwd = torch.ops.aten.upsample_bilinear2d_backward.default
    dmaps = bwd(shifted, [H, W], [N, 9 * COUT, h, w], align_corners, None, None)
    return dmaps.view(N, 3, 3, COUT, h, w).permute(1, 0, 4, 5, 2, 3).contiguous()


def plain_bwd(dy: Tensor, size: list[int], align_corners: bool) -> Tensor:
    if not _is_plain(dy):
        return traced_bwd(dy, size, align_corners)
    wide = channels_last(dy).to(torch.promote_types(dy.dtype, torch.float32))
    return _transposed(wide, size, align_corners).to(dy.dtype)


def _fake_bwd(dy: Tensor, size: list[int], align_corners: bool) -> Tensor:
    N, COUT = dy.shape[:2]
    return dy.new_empty(3, N, *size, 3, COUT)


def _refuses(taps: Tensor, base, bias, act, size: list[int], align_corners) -> str:
    _, N, h, w, _, COUT = taps.shape
    return unsupported(N, 0, 0, COUT, h, w, *size)


_fwd = register(
    "upsample_taps(Tensor taps, Tensor? base, Tensor? bias, str act, SymInt[] size, bool align_corners) -> Tensor",
    _launch, plain, _fake, **one_launch("upsample_concat_conv2d", _launch, plain, _refuses),
)  # fmt: skip
_bwd = register(
    "upsample_taps_bwd(Tensor dy, SymInt[] size, bool align_corners) -> Tensor", plain_bwd, plain_bwd, _fake_bwd
)


def fused_taps(
    taps: Tensor, base: Tensor, bias: Tensor | None, act: str | None, size: Sequence[int], align_corners: bool
) -> Tensor:
    """``act(base + bias + interpolation of the taps)`` in one kernel, without gradients."""
    return _fwd(taps, base, bias, act or "none", tuple(size), align_corners)


def upsample_taps(taps: Tensor, base: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Add the interpolation of the taps to ``base`` (N, COUT, H, W); differentiable, linear in both."""
    return run(_UpsampleTaps, _fwd, taps, base, None, "none", tuple(size), align_corners)


def transposed(dy: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Gradient at taps of ``size`` pixels; differentiable."""
    return run(_UpsampleTapsBwd, _bwd, dy, size, align_corners)


class _UpsampleTaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        _UpsampleTaps.save(ctx, args, None)
        return _fwd(*args)

    @staticmethod
    def save(ctx, inputs, output) -> None:
        taps, _, bias, act, ctx.out, ctx.align_corners = inputs
        ctx.size, ctx.whole = tuple(taps.shape[2:4]), bias is None and act == "none"

    @staticmethod
    def backward(ctx, dy: Tensor):
        return transposed(dy, ctx.size, ctx.align_corners), dy, None, None, None, None


class _UpsampleTapsBwd(torch.autograd.Function):
    """The transposed map; its own backward is the forward map."""

    @staticmethod
    def forward(ctx, dy: Tensor, size: tuple[int, int], align_corners: bool):
        _UpsampleTapsBwd.save(ctx, (dy, size, align_corners), None)
        return _bwd(dy, size, align_corners)

    @staticmethod
    def save(ctx, inputs, output) -> None:
        dy, ctx.size, ctx.align_corners = inputs
        ctx.out = tuple(dy.shape[2:])

    @staticmethod
    def backward(ctx, ddtaps: Tensor):
        N, COUT = ddtaps.shape[1], ddtaps.shape[5]
        return upsample_taps(ddtaps, ddtaps.new_zeros(N, COUT, *ctx.out), ctx.out, ctx.align_corners), None, None


def _registered_backward(ctx, dy: Tensor):
    if not ctx.whole:
        raise RuntimeError("upsample_taps: with a bias or an activation it has no gradient; apply them to its result")
    return _UpsampleTaps.backward(ctx, dy)


torch.library.register_autograd(qualified("upsample_taps"), _registered_backward, setup_context=_UpsampleTaps.save)
torch.library.register_autograd(
    qualified("upsample_taps_bwd"), _UpsampleTapsBwd.backward, setup_context=_UpsampleTapsBwd.save
)
