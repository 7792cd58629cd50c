"""Transposed convolution with a fixed bilinear kernel per channel: FCN's upsampling, four taps per output pixel."""

import functools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.autograd import run
from fastseg.ops.core.bilinear_taps import grouped_taps, line, natural_size, sized_conv_transpose2d, window
from fastseg.ops.core.dispatch import (
    HAS_TRITON,
    autocast_dtype,
    autocasts,
    followed,
    is_torchs,
    no_kernel,
    why_torchs,
)
from fastseg.ops.core.forms import Form, Forms, Torchs
from fastseg.ops.core.layout import memory_format_of, new_map, settle
from fastseg.ops.core.override import overridable
from fastseg.ops.core.register import of_sizes, one_kernel, one_launch, qualified, register
from fastseg.ops.core.sizes import whole
from fastseg.ops.core.torch_private import forward_ad_level, is_tracing, transforms_active
from fastseg.ops.core.upsample import is_finite
from fastseg.ops.cpu.bilinear_taps import CPU_FORMS, CpuForm, Request, by_matrices
from fastseg.ops.upsample_bilinear import unsupported

if HAS_TRITON:
    from fastseg.kernels.upsample.bilinear import Taps, bilinear_fwd
    from fastseg.kernels.upsample.bilinear_bwd import bilinear_bwd

NAME = "bilinear_conv_transpose2d"


def bilinear_kernel(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Make the weight with which ``conv_transpose2d`` interpolates each channel bilinearly.

    With f = (K + 1) // 2 and the centre c = (K - 1) / 2, tap (y, x) is (1 - |y - c| / f) (1 - |x - c| / f).

    Args:
        in_channels: channels of the input.
        out_channels: equal to ``in_channels``, or 1.
        kernel_size: K, odd or even.
        device: of the weight.
        dtype: of the weight.

    Returns:
        (in_channels, out_channels, K, K): the taps where input and output channel are equal, else 0.

    Raises:
        IndexError: the two numbers of channels differ and neither is 1.

    Reference: Long et al., arXiv:1411.4038 (``surgery.py``); Dive into Deep Learning, section 14.11.
    """
    weight = torch.zeros(in_channels, out_channels, kernel_size, kernel_size, device=device, dtype=dtype)
    taps = line(kernel_size, weight.to(torch.promote_types(weight.dtype, torch.float32))[:0])
    weight[range(in_channels), range(out_channels)] = (taps[:, None] * taps).to(weight.dtype)
    return weight


def bilinear_geometry(stride: int, kernel_size: int | None, padding: int | None) -> tuple[int, int]:
    """``kernel_size`` and ``padding`` with their defaults filled in.

    Raises:
        ValueError: a number is out of range, or no padding makes the output ``stride`` times the input.
    """
    stride, kernel_size, padding = whole(stride), whole(kernel_size), whole(padding)
    if stride < 1:
        raise ValueError(f"{NAME}: stride is {stride}; it must be >= 1")
    kernel_size = 2 * stride - stride % 2 if kernel_size is None else kernel_size
    if kernel_size < 1:
        raise ValueError(f"{NAME}: kernel_size is {kernel_size}; it must be >= 1")
    if padding is None:
        if kernel_size < stride or (kernel_size - stride) % 2:
            raise ValueError(
                f"{NAME}: with kernel_size {kernel_size} no padding makes the output {stride} times the input; give one"
            )
        padding = (kernel_size - stride) // 2
    if padding < 0:
        raise ValueError(f"{NAME}: padding is {padding}; it must be >= 0")
    return kernel_size, padding


@overridable
def bilinear_conv_transpose2d(
    x: Tensor,
    stride: int,
    kernel_size: int | None = None,
    padding: int | None = None,
    *,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_offset: int = 0,
    output_size: tuple[int, int] | None = None,
) -> Tensor:
    """Compute ``conv_transpose2d(x, bilinear_kernel(C, C, K), bias, stride, padding)``, plus a window of ``skip``.

    Equal everywhere, borders included: zeros lie around ``x``, where ``interpolate`` would repeat its last pixel. An
    output takes four taps of its own channel, not C K K / S S. FCN's crops need no copies: to crop a skip at n is
    ``skip_offset=n``; to crop the output at n to an image's size is ``padding=n, output_size=size``. The map is linear:
    second and forward-mode derivatives work; its backward gathers, and gives the same bits in every run. A NaN or an
    infinity reaches the outputs that its taps reach, of its own channel; the dense convolution, whose kernel has zeros
    between channels and may have some at its edge, multiplies these by NaN too and spreads it further.

    Args:
        x: (N, C, H, W), contiguous or channels_last; neither is copied.
        stride: S, output pixels per input pixel.
        kernel_size: K, in taps; None means ``2 S - S % 2``. K > 2 S runs the reference.
        padding: output pixels cropped above and to the left, and, without ``output_size``, below and to the right; None
            means (K - S) / 2, which makes the output S times the input.
        bias: (C,), added to each channel.
        skip: (N, C, SH, SW); its window of the output's size is added.
        skip_offset: first row and column of that window, in pixels.
        output_size: (OH, OW), in pixels, of any size. Past torch's size the output holds what the kernel gives there,
            and 0 beyond its reach. None means (n - 1) S + K - 2 padding on each axis.

    Returns:
        (N, C, OH, OW), in the memory format of ``x``; in autocast's dtype under autocast, as torch's convolutions.

    Raises:
        ValueError: shapes do not match, a number is out of range, or tensors are on different devices.
        TypeError: ``x`` is not floating point, or ``skip`` has another dtype outside autocast.

    Reference: Long et al., Fully convolutional networks for semantic segmentation, arXiv:1411.4038.
    """
    if bias is None and skip is None and output_size is None and is_torchs(x) and _is_bare(x):
        found = _at_once(x.shape, x.stride(), stride, kernel_size, padding, torch.get_num_threads())
        if found is not None:
            request, K, padding = found
            request = request._replace(finite=is_finite(x)) if by_matrices(request) else request
            form = FORMS.decide(request, x)
            upsample = form.upsample if isinstance(form, CpuForm) else form.run
            return upsample(x, stride, K, padding)
    stride, skip_offset = whole(stride), whole(skip_offset)
    K, padding = bilinear_geometry(stride, kernel_size, padding)
    if x.dim() == 4 and x.is_floating_point():
        x = x.to(autocast_dtype(x))
        skip = None if skip is None else skip.to(autocast_dtype(skip))
    size = _check(x, stride, K, padding, bias, skip, skip_offset, output_size)
    why = why_torchs(NAME, x, bias, skip)
    plain = x.is_cpu and type(x) in (Tensor, torch.nn.Parameter) and not _wanted(x, bias, skip)
    plain = plain and not followed(x, bias, skip)
    large = "" if why else _too_large(x, skip, size, stride, K)
    form = FORMS.decide(_request(why, large, plain, x, size, stride, K), x)
    if form is FORMS.forms[0]:
        return run(_BilinearConvTranspose2d, _fwd, x, skip, bias, size, stride, K, padding, skip_offset)
    return form.run(x, stride, K, padding, bias, skip, skip_offset, size if output_size is not None else None)


def _request(why: str, large: str, plain: bool, x: Tensor, size: tuple[int, int], stride: int, K: int) -> Request:
    if not plain:  # the kernel or torch: no other size matters
        return Request(why, large, False, (), 0, stride, K, False, 0)
    values = x.shape[0] * x.shape[1] * size[0] * size[1]
    last = memory_format_of(x) == torch.channels_last
    request = Request(why, large, True, tuple(x.shape), values, stride, K, last, torch.get_num_threads())
    looked_at = by_matrices(request) or "matrices" in FORMS.forced()
    return request._replace(finite=is_finite(x)) if looked_at else request


def _wanted(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_bare(x: Tensor) -> bool:
    """Whether nothing of ``x`` is to be cast or recorded: a small map takes a CPU as long as the questions."""
    if x.dtype not in (torch.float32, torch.float64) or (x.requires_grad and torch.is_grad_enabled()):
        return False
    watched = transforms_active() or is_tracing() or forward_ad_level() >= 0
    return not (watched or torch.is_autocast_enabled("cpu"))


@functools.lru_cache(maxsize=4096, typed=True)
def _at_once(
    shape: torch.Size, strides: tuple[int, ...], stride: int, kernel_size: int | None, padding: int | None, threads: int
) -> tuple[Request, int, int] | None:
    """The request of an ordinary CPU map, the size of the kernel and the padding; None if something is to be checked.

    It asks nothing of the tensor but its sizes, so it is remembered.
    """
    whole_numbers = type(stride) is int and all(n is None or type(n) is int for n in (kernel_size, padding))
    if not whole_numbers or len(shape) != 4 or 0 in shape:
        return None
    K, padding = bilinear_geometry(stride, kernel_size, padding)
    x = torch.empty_strided(shape, strides, device="meta")
    size = natural_size(x, stride, K, padding)
    if min(size) < 1:
        return None
    values, last = shape[0] * shape[1] * size[0] * size[1], memory_format_of(x) == torch.channels_last
    return Request("CPU tensor", "", True, tuple(shape), values, stride, K, last, threads), K, padding


def bilinear_conv_transpose2d_ref(
    x: Tensor,
    stride: int,
    kernel_size: int | None = None,
    padding: int | None = None,
    *,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    skip_offset: int = 0,
    output_size: tuple[int, int] | None = None,
) -> Tensor:
    """``bilinear_conv_transpose2d`` in plain PyTorch: a convolution of one group a channel, in fp32 or fp64."""
    K, padding = bilinear_geometry(stride, kernel_size, padding)
    dtype, wide, layout = x.dtype, torch.promote_types(x.dtype, torch.float32), memory_format_of(x)
    with torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext():
        C = int(x.shape[1]) if isinstance(x.shape[1], Tensor) else x.shape[1]  # groups are a number in a trace
        weight = grouped_taps(K, C, x.new_empty(0, dtype=wide))
        y = sized_conv_transpose2d(x.to(wide), weight, stride, padding, C, output_size)
        y = y if bias is None else y + bias.to(wide)[:, None, None]
        y = y if skip is None else y + window(skip, skip_offset, y.shape[2:]).to(wide)
    return y.to(dtype).contiguous(memory_format=layout)


def _check(x, stride, K, padding, bias, skip, skip_offset, output_size) -> tuple[int, int]:
    """Raise on bad arguments; return the output's height and width."""
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{NAME}: x is {tuple(x.shape)}; it must be (N, C, H, W), none of C, H, W being 0")
    if not x.is_floating_point():
        raise TypeError(f"{NAME}: x is {x.dtype}; it must be a floating-point tensor")
    size = natural_size(x, stride, K, padding) if output_size is None else tuple(map(whole, output_size))
    if len(size) != 2 or min(size) < 1:
        raise ValueError(
            f"{NAME}: the output would be {size}, from {tuple(x.shape)} with padding {padding}; use less padding"
        )
    if bias is not None and bias.shape != (x.shape[1],):
        raise ValueError(f"{NAME}: bias is {tuple(bias.shape)}; it must be ({x.shape[1]},)")
    if skip is not None:
        fits = skip.dim() == 4 and skip.shape[:2] == x.shape[:2] and skip_offset >= 0
        if not fits or any(skip_offset + n > have for n, have in zip(size, skip.shape[2:], strict=True)):
            raise ValueError(
                f"{NAME}: skip is {tuple(skip.shape)}; from {skip_offset} on it must hold {(*x.shape[:2], *size)}"
            )
        if skip.dtype != x.dtype and not autocasts(x):
            raise TypeError(f"{NAME}: x is {x.dtype} and skip {skip.dtype}; they should be the same: cast one")
    return size


def _too_large(x: Tensor, skip: Tensor | None, size: Sequence[int], stride: int, K: int) -> str:
    """Why the kernels cannot take these sizes, or ""."""
    if K > 2 * stride:  # noqa: SIM300
        return f"kernel size {K} > 2 * stride {stride}: more than four taps"
    maps = (x,) if skip is None else (x, skip)
    return next(filter(None, (unsupported(m.shape[1], tuple(m.shape[2:]), tuple(size)) for m in maps)), "")


# --- the registered ops


def _launch_fwd(x, skip, bias, size, stride, kernel_size, padding, skip_offset):
    x, channels_last = settle(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    skip = None if skip is None else skip.contiguous(memory_format=layout)
    bias = None if bias is None else bias.contiguous()
    taps = Taps("kernel", stride=stride, kernel=kernel_size, padding=padding)
    return bilinear_fwd(x, tuple(size), taps, channels_last, skip, skip_offset, bias)


def _plain_fwd(x, skip, bias, size, stride, kernel_size, padding, skip_offset):
    return bilinear_conv_transpose2d_ref(
        x, stride, kernel_size, padding, bias=bias, skip=skip, skip_offset=skip_offset, output_size=size
    )


def _launch_bwd(dy, size, stride, kernel_size, padding):
    dy, channels_last = settle(dy)
    return bilinear_bwd(dy, tuple(size), Taps("kernel", (0.0, 0.0), stride, kernel_size, padding), channels_last)


def _plain_bwd(dy, size, stride, kernel_size, padding):
    K, wide = kernel_size, torch.promote_types(dy.dtype, torch.float32)
    weight = grouped_taps(K, dy.shape[1], dy.new_empty(0, dtype=wide))
    below, right = ((n - 1) * stride + K - padding - out for n, out in zip(size, dy.shape[2:], strict=True))
    padded = F.pad(dy.to(wide), (padding, right, padding, below))
    dx = F.conv2d(padded.contiguous(memory_format=torch.channels_last), weight, stride=stride, groups=dy.shape[1])
    return dx.to(dy.dtype).contiguous(memory_format=memory_format_of(dy))


class KernelForm(Form):
    """Our kernel: four taps an output, bias and skip in the same launch."""

    name = "kernel"

    def refuses(self, r: Request) -> str:
        return r.no_kernel or r.large

    def run(self, x: Tensor, stride: int, K: int, padding: int, bias, skip, skip_offset: int, size) -> Tensor:
        return _launch_fwd(x, skip, bias, size, stride, K, padding, skip_offset)


def _convolved(
    x: Tensor, stride: int, K: int, padding: int, bias: Tensor | None = None, skip: Tensor | None = None,
    skip_offset: int = 0, size: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    return bilinear_conv_transpose2d_ref(
        x, stride, K, padding, bias=bias, skip=skip, skip_offset=skip_offset, output_size=size
    )


FORMS = Forms(NAME, [KernelForm(), *CPU_FORMS, Torchs(_convolved)])


def _refuses(x, skip, bias, size, stride, kernel_size, *_) -> str:
    return no_kernel(x) or _too_large(x, skip, size, stride, kernel_size)


_fwd = register(
    f"{NAME}(Tensor x, Tensor? skip, Tensor? bias, SymInt[] size, int stride, int kernel_size, int padding, "
    "SymInt skip_offset) -> Tensor",
    _launch_fwd,
    _plain_fwd,
    lambda x, skip, bias, size, *_: new_map(x, (*x.shape[:2], *size)),
    **one_launch(NAME, _launch_fwd, _plain_fwd, _refuses),
    asked=True,
)
_bwd = register(
    f"{NAME}_bwd(Tensor dy, SymInt[] size, int stride, int kernel_size, int padding) -> Tensor", _launch_bwd,
    _plain_bwd, lambda dy, size, *_: new_map(dy, (*dy.shape[:2], *size)),
    forms=one_kernel(NAME, _launch_bwd, _plain_bwd, unsupported, backward=True),
    request=of_sizes(lambda dy, size, *_: (dy.shape[1], tuple(size), tuple(dy.shape[2:]))),
)  # fmt: skip


class _BilinearConvTranspose2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        _BilinearConvTranspose2d.save(ctx, args, None)
        return _fwd(*args)

    @staticmethod
    def save(ctx, inputs, output) -> None:
        x, skip, bias, size, *ctx.taps, ctx.skip_offset = inputs
        ctx.size, ctx.out = tuple(x.shape[2:]), size
        ctx.skip_size = None if skip is None else tuple(skip.shape[2:])
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, dy: Tensor):
        dx = dskip = dbias = None
        need_x, need_skip, need_bias = ctx.needs_input_grad[:3]
        if need_x:
            args = (dy, ctx.size, *ctx.taps)
            dx = run(_BilinearConvTranspose2dBwd, _bwd, *args)
        if need_skip:
            offset = ctx.skip_offset
            below, right = (have - offset - n for have, n in zip(ctx.skip_size, dy.shape[2:], strict=True))
            dskip = F.pad(dy, (offset, right, offset, below)) if offset or below or right else dy
        if need_bias:
            wide = torch.promote_types(dy.dtype, torch.float32)
            dbias = dy.sum((0, 2, 3), dtype=wide).to(ctx.bias_dtype)
        return dx, dskip, dbias, *(None,) * 5


class _BilinearConvTranspose2dBwd(torch.autograd.Function):
    """The transposed map; its own backward is the forward map."""

    @staticmethod
    def forward(ctx, dy: Tensor, *args):
        _BilinearConvTranspose2dBwd.save(ctx, (dy, *args), None)
        return _bwd(dy, *args)

    @staticmethod
    def save(ctx, inputs, output) -> None:
        dy, *ctx.args = inputs
        ctx.out, ctx.taps = tuple(dy.shape[2:]), ctx.args[1:]

    @staticmethod
    def backward(ctx, ddx: Tensor):
        args = (ddx, None, None, ctx.out, *ctx.taps, 0)
        return run(_BilinearConvTranspose2d, _fwd, *args), *(None,) * 4


for _name, _function in ((NAME, _BilinearConvTranspose2d), (f"{NAME}_bwd", _BilinearConvTranspose2dBwd)):
    torch.library.register_autograd(qualified(_name), _function.backward, setup_context=_function.save)
