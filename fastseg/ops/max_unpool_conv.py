"""Max unpooling followed by a convolution."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.dispatch import HAS_TRITON, followed, why_torchs
from fastseg.ops.core.forms import Form, Forms, Reference, Verdict
from fastseg.ops.core.layout import channels_last
from fastseg.ops.core.norm import ACTIVATIONS, Activation
from fastseg.ops.core.override import overridable
from fastseg.ops.core.register import register
from fastseg.ops.cpu.packed import conv2d
from fastseg.ops.max_unpool import max_unpool2d
from fastseg.ops.pool_indices import PoolIndices, bits_of
from fastseg.ops.registered.pooling import Geometry

if HAS_TRITON:
    from fastseg.kernels.pooling.max_unpool_conv import max_unpool_conv_fwd, plan
    from fastseg.kernels.runtime.ceilings import Chip, chip_of


@overridable
def max_unpool_conv2d(
    input: Tensor,
    indices: Tensor | PoolIndices,
    weight: Tensor,
    bias: Tensor | None = None,
    act: Activation | None = None,
    *,
    kernel_size: int | tuple[int, int] = 2,
    stride: int | tuple[int, int] | None = None,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Compute ``act(conv2d(max_unpool2d(input, indices), weight, bias))`` with "same" padding, as a decoder stage does.

    Without gradients, and with compact indices in channels_last, the unpooled map need not be stored: the kernel builds
    the convolution's operand from the windows. A cost model chooses this form where it pays, for 1x1 weights
    (``explain`` shows it). Otherwise the unpooling kernel writes the map and the library's convolution reads it.

    Args:
        input: values of the windows, (N, C, h, w).
        indices: int64 or ``PoolIndices`` of the pooling, as in ``max_unpool2d``; the kernel takes compact ones.
        weight: (COUT, C, K, K), K odd.
        bias: (COUT,).
        act: None, "relu", "relu6" or "leaky_relu".
        kernel_size: size of the pooling's windows, in pixels.
        stride: distance between windows, in pixels; None means ``kernel_size``.
        output_size: as in ``max_unpool2d``.

    Returns:
        (N, COUT, H, W).

    Raises:
        ValueError: the weight does not fit ``input``, or the activation is unknown. Also the errors of
            ``max_unpool2d``.

    Reference: the decoder of SegNet, arXiv:1511.00561.
    """
    name = "max_unpool_conv2d"
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f'{name}: act is {act!r}; use None, "relu", "relu6" or "leaky_relu"')
    if weight.dim() != 4 or input.dim() != 4 or weight.shape[1] != input.shape[1]:
        raise ValueError(
            f"{name}: input is {tuple(input.shape)}, weight {tuple(weight.shape)}; use (N, C, h, w), (COUT, C, K, K)"
        )
    if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"{name}: weight is {tuple(weight.shape)}; its kernel must be square and odd")
    why = why_torchs(name, input, weight, bias)
    why = _stored(input, indices, weight, bias, kernel_size, stride, output_size) or why
    form = FORMS.decide(_request(why, indices, input, weight), input)
    y: Tensor = form.run(input, indices, weight, bias, act, kernel_size, stride, output_size)
    return y


def max_unpool_conv2d_ref(
    input: Tensor,
    indices: Tensor | PoolIndices,
    weight: Tensor,
    bias: Tensor | None = None,
    act: Activation | None = None,
    *,
    kernel_size: int | tuple[int, int] = 2,
    stride: int | tuple[int, int] | None = None,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """``max_unpool_conv2d`` in torch's own lines."""
    if isinstance(indices, PoolIndices):
        indices, output_size = indices.to_torch(), indices.input_size if output_size is None else output_size
    x = F.max_unpool2d(input, indices, kernel_size, stride, 0, output_size)
    return ACTIVATIONS[act or "none"](F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2))


def _one_after_the_other(input, indices, weight, bias, act, kernel_size, stride, output_size) -> Tensor:
    unpooled = max_unpool2d(input, indices, kernel_size, stride, 0, output_size)
    return conv2d(unpooled, weight, bias, padding=(weight.shape[-1] // 2,) * 2, act=act)


def _stored(input, indices, weight, bias, kernel_size, stride, output_size) -> str:
    """Why the unpooled map is stored whatever its size, or ""."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
        return "gradients are needed: unpooling, then convolution"
    if followed():
        return "a captured graph, a trace or transform: unpooling, then convolution"
    if not isinstance(indices, PoolIndices) or not indices.channels_last or input.numel() == 0:
        return "no compact indices in channels_last: unpooling, then convolution"
    pair = lambda v: tuple(v) if isinstance(v, Iterable) else (v, v)
    size = indices.input_size if output_size is None else tuple(output_size)[-2:]
    windows = (pair(kernel_size), pair(kernel_size if stride is None else stride), (0, 0), (1, 1))
    own = (indices.kernel_size, indices.stride, indices.padding, indices.dilation)
    if own != windows or tuple(size) != indices.input_size or input.shape != indices.shape:
        return "indices of another pooling: unpooling, then convolution"
    return ""


class Request(NamedTuple):
    """What decides between the forms: a reason against the kernel, or all the rest."""

    stored: str  # why the unpooled map is stored whatever its size, or no kernel runs; or ""
    geometry: Geometry | None = None
    shape: tuple[int, ...] = ()  # of the windows' values
    COUT: int = 0
    K: int = 0
    dtype: torch.dtype = torch.float32
    bits: int = 0  # of a code
    chip: "Chip | None" = None


def _request(stored: str, indices: Tensor | PoolIndices, input: Tensor, weight: Tensor) -> Request:
    if stored or not isinstance(indices, PoolIndices):
        return Request(stored)
    windows = (indices.kernel_size, indices.stride, indices.padding, indices.dilation)
    geometry = Geometry.of(indices.input_size, tuple(input.shape[2:]), *windows)
    COUT, K = weight.shape[0], weight.shape[-1]
    return Request("", geometry, tuple(input.shape), COUT, K, input.dtype, indices.bits, chip_of(input.device))


class FoldForm(Form):
    """Our kernel, which builds the convolution's operand from the windows."""

    name = "fold"

    def refuses(self, r: Request) -> str:
        if r.stored or r.geometry is None:
            return r.stored
        pool = r.geometry.pooling(r.shape[0], r.shape[1], True)
        return pool.unsupported() or ("" if pool.disjoint else "overlapping windows: unpooling, then convolution")

    def cost(self, r: Request) -> Verdict | None:
        if r.geometry is None:
            return None
        (H, W), (N, C, OH, OW) = r.geometry.size, r.shape
        return plan(N * H * W, N * OH * OW, C, r.COUT, r.K, r.dtype, r.bits, r.chip)

    def run(self, input, indices, weight, bias, act, *_) -> Tensor:
        indices.check()
        geometry = (indices.input_size, indices.kernel_size, indices.stride)
        return _fwd(input, indices.codes, weight, bias, act or "none", *geometry)


FORMS = Forms("max_unpool_conv2d", [FoldForm(), Reference(_one_after_the_other)])


def _launch_fwd(input, codes, weight, bias, act, size, kernel, stride):
    pool = Geometry.of(size, input.shape[2:], kernel, stride, (0, 0), (1, 1)).pooling(*input.shape[:2], True)
    bits = bits_of(kernel)
    bias = None if bias is None else bias.contiguous()
    weight = channels_last(weight).to(input.dtype)
    return max_unpool_conv_fwd(channels_last(input), codes.contiguous(), weight, bias, act, pool, bits)


def _plain_fwd(input, codes, weight, bias, act, size, kernel, stride):
    indices = PoolIndices(codes, input.shape, tuple(size), tuple(kernel), tuple(stride), (0, 0), (1, 1), True)
    unpooled = max_unpool2d(input, indices, kernel, stride, 0, size)
    cast = lambda t: None if t is None else t.to(input.dtype)
    return channels_last(ACTIVATIONS[act](F.conv2d(unpooled, cast(weight), cast(bias), padding=weight.shape[-1] // 2)))


def _fake_fwd(input, codes, weight, bias, act, size, kernel, stride):
    shape = (input.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


_fwd = register(
    "max_unpool_conv2d(Tensor input, Tensor codes, Tensor weight, Tensor? bias, str act, SymInt[] size, int[] kernel, "
    "int[] stride) -> Tensor",
    _launch_fwd,
    _plain_fwd,
    _fake_fwd,
)
