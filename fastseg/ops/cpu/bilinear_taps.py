"""Forms of the bilinear ``conv_transpose2d`` on a CPU, where no gradient is wanted."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.bilinear_taps import grouped_taps, line, natural_size, sized_conv_transpose2d, window
from fastseg.ops.core.constants import constant
from fastseg.ops.core.dispatch import autocasts
from fastseg.ops.core.forms import Form, Verdict
from fastseg.ops.core.layout import memory_format_of, new_map


class Request(NamedTuple):
    """What decides between the forms."""

    no_kernel: str  # why no kernel can run on such tensors, or what follows the call; or ""
    large: str  # why the kernels cannot take these sizes, or ""
    plain: bool  # an ordinary CPU map, and no gradient is wanted
    shape: tuple[int, ...]  # of x
    values: int  # of the output
    stride: int
    K: int
    last: bool  # channels_last
    threads: int
    finite: bool = False  # looked at where it decides


@constant(16)
def kept_taps(K: int, C: int, dtype: torch.dtype, across: bool) -> Tensor:
    """Taps (C, 1, K, K), or (C, 1, 1, K) with ``across``, on the CPU."""
    return grouped_taps(K, C, torch.empty(0, dtype=dtype), across=across)


@constant(16)
def kept_matrix(n: int, out: int, stride: int, K: int, padding: int, dtype: torch.dtype) -> Tensor:
    """(out, n): what each of ``n`` inputs along an axis gives to each output, on the CPU."""
    taps = line(K, torch.empty(0, dtype=dtype))
    tap = torch.arange(out)[:, None] + padding - stride * torch.arange(n)
    return taps[tap.clamp(0, K - 1)].where((tap >= 0) & (tap < K), 0)


class CpuForm(Form):
    """Upsampling of an ordinary CPU map; bias and skip are added in place."""

    path = "torch"

    def refuses(self, r: Request) -> str:
        return "" if r.plain else "not an ordinary CPU map without gradients"

    def upsample(self, x: Tensor, stride: int, K: int, padding: int, size: tuple[int, int] | None = None) -> Tensor:
        """``x`` in fp32 or fp64 -> (N, C, *size), in the memory format of ``x``."""
        raise NotImplementedError

    def run(
        self, x: Tensor, stride: int, K: int, padding: int, bias: Tensor | None = None, skip: Tensor | None = None,
        skip_offset: int = 0, output_size: tuple[int, int] | None = None,
    ) -> Tensor:  # fmt: skip
        # In 16 bits, large kernels are slow on a CPU: 64 taps take 7 times as long as in fp32.
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False) if autocasts(x) else nullcontext():
            y = self.upsample(x.to(wide), stride, K, padding, output_size)
            if bias is not None:
                y.add_(bias.to(wide)[:, None, None])
            if skip is not None:
                y.add_(window(skip, skip_offset, y.shape[2:]).to(wide))
        return y.to(dtype)


class Matrices(CpuForm):
    """Two matrix products, first down, then across.

    Of a grouped convolution's time, on one thread (``benchmarks.studies.cpu_threads --ops deconvolution``), it takes
    0.05 to 0.6 for maps of up to 16 pixels a side and strides from 8 on: most of the large kernel's products are
    then spared, and a row of the matrices is short. Zeros would turn infinity into NaN: values are looked at first.
    """

    name = "matrices"

    def refuses(self, r: Request) -> str:
        if why := super().refuses(r):
            return why
        return "" if r.finite and 0 not in r.shape else "NaN, infinity, or no pixel"

    def cost(self, r: Request) -> Verdict:
        return Verdict(by_matrices(r), None, "for small maps of a large stride")

    def upsample(self, x: Tensor, stride: int, K: int, padding: int, size: tuple[int, int] | None = None) -> Tensor:
        (N, C, H, W), (OH, OW) = x.shape, size or natural_size(x, stride, K, padding)
        down = kept_matrix(H, OH, stride, K, padding, x.dtype)
        across = kept_matrix(W, OW, stride, K, padding, x.dtype)
        if memory_format_of(x) != torch.channels_last:
            return down @ (x @ across.t())
        if N * C * OH * OW <= COPIED:
            return (down @ (x @ across.t())).contiguous(memory_format=torch.channels_last)
        rows = down @ x.permute(0, 2, 3, 1).reshape(N, H, W * C)
        return (across @ rows.view(N, OH, W, C)).permute(0, 3, 1, 2)


# Outputs up to which a result in NCHW and a copy are faster than products with the channels innermost.
COPIED = 2**16


def by_matrices(r: Request) -> bool:
    """Whether two matrix products are the fastest form, if the map is finite."""
    short = max(r.shape[2:]) <= 16 and r.stride >= 8
    return short and (not r.last or r.values <= COPIED or r.stride >= 16)


class Interpolated(CpuForm):
    """An interpolation of the map with zeros around it: where 2 ``stride`` taps make it exact.

    Of a grouped convolution's time, on one thread (``benchmarks.studies.cpu_threads --ops deconvolution``), it takes
    0.1 to 0.9 for one class in either layout, and for two in NCHW; in channels_last, where its planes are transposed,
    0.3 to 0.7 below the limit; for three, 0.7 on small maps of a large stride.
    """

    name = "interpolated"

    def refuses(self, r: Request) -> str:
        if why := super().refuses(r):
            return why
        exact = 2 * r.stride == r.K and r.stride & (r.stride - 1) == 0 and r.stride > 1
        return "" if exact and r.shape[0] else "its taps would be rounded, or there is no image"

    def cost(self, r: Request) -> Verdict:
        C = r.shape[1]
        two = C == 2 and (not r.last or (r.stride >= 8 and r.values <= r.stride * 2**14))
        few = C == 1 or two or (C == 3 and r.stride >= 32 and r.values <= 2**16)
        return Verdict(few, None, f"{C} channels: planes are interpolated one by one")

    def upsample(self, x: Tensor, stride: int, K: int, padding: int, size: tuple[int, int] | None = None) -> Tensor:
        return interpolated(x, stride, padding, size).contiguous(memory_format=memory_format_of(x))


class TwoPasses(CpuForm):
    """First across, then down.

    Of a grouped convolution's time, on one thread, it takes 0.4 to 0.9 for large maps in NCHW. It is a call for each
    phase of the stride, so it loses on several threads, which wait for each other after each call.
    """

    name = "two_passes"

    def refuses(self, r: Request) -> str:
        return super().refuses(r) or ("" if r.stride <= r.K <= 2 * r.stride else "more than two taps an axis, or gaps")

    def cost(self, r: Request) -> Verdict:
        large = not r.last and r.stride >= 8 and r.values * r.stride >= 2**24
        return Verdict(large and r.threads == 1, None, "for large NCHW maps, on one thread")

    def upsample(self, x: Tensor, stride: int, K: int, padding: int, size: tuple[int, int] | None = None) -> Tensor:
        return two_passes(x, K, stride, padding, size)


class Grouped(CpuForm):
    """A convolution of one group a channel with kept taps: 0.1 to 0.3 of a dense weight's time."""

    name = "grouped"

    def upsample(self, x: Tensor, stride: int, K: int, padding: int, size: tuple[int, int] | None = None) -> Tensor:
        C = x.shape[1]
        taps = kept_taps(K, C, x.dtype, False)
        if size is not None:
            y = sized_conv_transpose2d(x, taps, stride, padding, C, size)
        else:
            y = F.conv_transpose2d(x, taps, None, stride, padding, 0, C)
        return y.contiguous(memory_format=memory_format_of(x))


CPU_FORMS = [Matrices(), Interpolated(), TwoPasses(), Grouped()]


def interpolated(x: Tensor, stride: int, padding: int, size: tuple[int, int] | None) -> Tensor:
    """The bilinear ``conv_transpose2d`` with 2 ``stride`` taps, ``stride`` even: of the map with zeros around it."""
    H, W = ((n + 2) * stride for n in x.shape[2:])
    OH, OW = (H - stride - 2 * padding, W - stride - 2 * padding) if size is None else size
    y = F.interpolate(F.pad(x, (1, 1, 1, 1)).contiguous(), (H, W), mode="bilinear")
    y = y[..., (start := stride // 2 + padding) : start + OH, start : start + OW]
    return y if y.shape[2:] == (OH, OW) else F.pad(y, (0, OW - y.shape[3], 0, OH - y.shape[2]))


def two_passes(x: Tensor, K: int, stride: int, padding: int, size: tuple[int, int] | None) -> Tensor:
    """The bilinear ``conv_transpose2d`` of a CPU map, first across, then down; K at most 2 ``stride``. No gradient.

    The pass across runs on the few rows of the small map. In the pass down each output row is a weighted sum of two
    rows, computed and written once, with one call for all rows of a phase. This takes 0.6 to 0.85 of a grouped
    convolution's time (channels_last, 21 channels).
    """
    N, C, H = x.shape[:3]
    OH, OW = size or natural_size(x, stride, K, padding)
    reach = max((H - 1) * stride + K - padding, 0)  # rows from here on are 0
    weight = kept_taps(K, C, x.dtype, True)
    rows = F.conv_transpose2d(x, weight, stride=(1, stride), groups=C)[..., padding : padding + OW]
    rows = F.pad(rows, (0, OW - rows.shape[-1], 1, 1))
    y = new_map(x, (N, C, OH, OW))
    y[:, :, reach:] = 0
    taps = [*line(K, x.new_empty(0)).tolist(), *[0.0] * (2 * stride - K)]
    scaled = torch.empty_like(rows)
    for first in range(min(stride, OH, reach)):
        at, phase = divmod(first + padding, stride)
        out = y[:, :, first:reach:stride]
        upper, lower = (rows[:, :, i : i + out.shape[2]] for i in (at, at + 1))
        if taps[phase + stride] == 0:  # an odd kernel's last phase reads nothing from above, which might be infinite
            torch.mul(lower, taps[phase], out=out)
        else:
            torch.mul(lower, taps[phase], out=scaled[:, :, : out.shape[2]])
            torch.add(scaled[:, :, : out.shape[2]], upper, alpha=taps[phase + stride], out=out)
    return y
