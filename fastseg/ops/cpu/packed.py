"""The convolution of all CPU paths: torch's, or one with packed weights inside ``packed_weights``.

A caller that runs a model many times (``fastseg.inference.Runner``) holds one ``PackedWeights`` and enters it around
each call. Outside there is no state.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.ops.core.conv_request import ConvCall, finish
from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.explain import Refusal
from fastseg.ops.core.forms import Form, Forms, Reference
from fastseg.ops.core.kept import Kept, keeping
from fastseg.ops.core.layout import memory_format_of
from fastseg.ops.core.norm import Activation, activate
from fastseg.ops.cpu import depthwise, matrix
from fastseg.ops.cpu.matrix import Matrix
from fastseg.ops.cpu.onednn import DTYPES as PACKED_DTYPES
from fastseg.ops.cpu.onednn import Packed, PackedTransposed, pack, pack_transposed, why_not
from fastseg.ops.cpu.winograd import Filters, plan, transform, transformed_bytes, winograd_conv2d
from fastseg.ops.cpu.winograd_dilated import Dilated, plan_dilated, transform_dilated

MOST_BYTES = 512 * 2**20
MOST_SHAPES = 16  # maps that one weight is packed for
Run = Packed | Matrix | Filters | Dilated  # a convolution with its weight made ready
LEAST_IN_NCHW = 96  # channels; with fewer, the copy to channels_last costs more than it saves: 1.1 to 1.4 of the time


class PackedWeights:
    """Packed weights for the fastest convolutions, made of the tensors of one ``Kept``; others are not packed.

    Args:
        kept: holds weights and biases, which must not be written to in ways that torch does not count.
        winograd: True if 3x3 convolutions may use Winograd's form, with its rounding.
        most_bytes: limit on the transformed filters, in bytes; further filters are packed untransformed.
    """

    def __init__(self, kept: Kept, *, winograd: bool = True, most_bytes: int = MOST_BYTES):
        self.kept, self.winograd, self.most_bytes, self.transformed = kept, winograd, most_bytes, 0
        self._runs: dict[tuple, dict[tuple, Run]] = {}
        self._transposed: dict[tuple, dict[tuple, PackedTransposed | None]] = {}

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple) -> Run | None:
        """The convolution for maps like ``x``, or None for torch's."""
        if not self.kept.knows((weight, bias)):
            return None
        runs = self._runs.setdefault((id(weight), id(bias)), {})  # ids of the tensors that are held
        key = (tuple(x.shape), x.dtype, *geometry)
        if key not in runs:
            if len(runs) == MOST_SHAPES:
                return None
            runs[key] = self._convolution(tuple(x.shape), x.dtype, weight, bias, geometry)
        return runs[key]

    def transposed(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple) -> PackedTransposed | None:
        """The transposed convolution for maps like ``x`` (N, C, H, W), or None for torch's."""
        if x.dim() != 4 or not self.kept.knows((weight, bias)):
            return None
        runs = self._transposed.setdefault((id(weight), id(bias)), {})
        key = (tuple(x.shape), x.dtype, *geometry)
        if key not in runs:
            runs[key] = pack_transposed(weight, bias, *geometry, x) if len(runs) < MOST_SHAPES else None
        return runs[key]

    def _convolution(self, shape: tuple, dtype: torch.dtype, weight, bias, geometry: tuple) -> Run:
        if self.winograd and dtype == torch.float32 and weight.shape[2:] == (3, 3) and geometry == _SAME_3X3:
            tiles, size = (
                plan(shape[1], weight.shape[0], *shape[2:], torch.get_num_threads()),
                transformed_bytes(weight),
            )
            if tiles is not None and self.transformed + size <= self.most_bytes:
                self.transformed += size
                return transform(weight, bias, tiles, *shape[2:])
        if self.winograd and dtype == torch.float32 and weight.shape[2:] == (3, 3) and _is_dilated(geometry):
            rate, size = geometry[2][0], transformed_bytes(weight)
            tiles = plan_dilated(shape[1], weight.shape[0], *shape[2:], rate, torch.get_num_threads())
            if tiles is not None and self.transformed + size <= self.most_bytes:
                self.transformed += size
                return transform_dilated(weight, bias, tiles, *shape[2:], rate)
        if matrix.pays(shape, weight, geometry):
            return Matrix(weight, bias)
        return pack(weight.detach(), None if bias is None else bias.detach(), *geometry, shape)


_SAME_3X3 = ((1, 1), (1, 1), (1, 1), 1)


def _is_dilated(geometry: tuple) -> bool:
    stride, padding, dilation, groups = geometry
    return stride == (1, 1) and padding == dilation and dilation[0] == dilation[1] > 1 and groups == 1


_active: ContextVar[PackedWeights | None] = ContextVar("fastseg_packed_weights", default=None)


@contextmanager
def packed_weights(packed: PackedWeights) -> Iterator[None]:
    """Inside the block, CPU convolutions of this thread take their weights from ``packed``."""
    token = _active.set(packed)
    try:
        with keeping(packed.kept):
            yield
    finally:
        _active.reset(token)


def _packs() -> PackedWeights | None:
    """What this thread is inside of; a captured graph packs nothing."""
    if torch.compiler.is_dynamo_compiling() or _active.get() is None:
        return None
    return None if followed() else _active.get()


def packing() -> bool:
    """True if this thread is inside ``packed_weights``."""
    if torch.compiler.is_dynamo_compiling() or _active.get() is None:
        return False
    return _packs() is not None


class PackedForm(Form):
    """A convolution with weights packed once, inside ``packed_weights``; some 3x3 in Winograd's form."""

    name, path = "packed", "torch"

    def refuses(self, r) -> str:
        return "" if r.packed else "no packed weights"

    def why(self, r, refused: Sequence[Refusal]) -> str:
        return "CPU tensor: weights packed once"

    def run(self, call: ConvCall) -> Tensor:
        x, act, run = call.x, call.act, call.packed
        if not isinstance(run, Filters):
            return finish(run(x), act, call.residual, call.image_bias)
        relu = act == "relu" and call.residual is None and call.image_bias is None
        y = winograd_conv2d(x, run, relu)
        return y if relu else finish(y, act, call.residual, call.image_bias)


def convolve(call: ConvCall) -> Tensor:
    """The call in torch's own ops, bias in the convolution, the rest in place."""
    x, weight, bias, act, *args = call[:8]
    return finish(F.conv2d(x, weight, bias, *args), act, call.residual, call.image_bias)


class CpuRequest(NamedTuple):
    """What decides between the forms of a CPU."""

    far: bool
    packed: bool


CPU_FORMS = (depthwise.TapsForm(), PackedForm())
_FORMS = Forms("conv2d", [*CPU_FORMS, Reference(convolve)])


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] | str = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    act: Activation | None = None,
) -> Tensor:
    """``act(F.conv2d(x, weight, bias, stride, padding, dilation, groups))``, the activation in place.

    The convolution inside other ops; where it is an op by itself, ``conv2d_act`` has these forms among others.
    """
    far = groups > 1 and depthwise.pays(x, weight, bias, stride, padding, dilation, groups)
    packed = packed_run(x, weight, bias, stride, padding, dilation, groups)
    if not far and packed is None:  # on a GPU, in a graph: there is nothing to choose from
        return activate(F.conv2d(x, weight, bias, stride, padding, dilation, groups), act, inplace=True)
    call = ConvCall(x, weight, bias, act, stride, padding, dilation, groups, packed=packed)
    return _FORMS(CpuRequest(far, packed is not None), call)


def conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """``F.conv_transpose2d(x, weight, bias, stride, padding)``, weights packed where this thread packs."""
    packs = _packs()
    run = None
    if packs is not None and _packable(x, weight, bias, padding):
        run = packs.transposed(x, weight, bias, (tuple(stride), tuple(padding), (0, 0), (1, 1), 1))
    return F.conv_transpose2d(x, weight, bias, stride, padding) if run is None else run(x)


def packed_run(x, weight, bias, stride, padding, dilation, groups: int) -> Run | None:
    """The convolution with packed weights, where this thread packs and has packed these."""
    packs = _packs()
    if packs is None or not _packable(x, weight, bias, padding):
        return None
    return packs.convolution(x, weight, bias, (tuple(stride), tuple(padding), tuple(dilation), groups))


def _packable(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int] | str) -> bool:
    tensors = [t for t in (x, weight, bias) if t is not None]
    if x.device.type != "cpu" or x.dtype not in PACKED_DTYPES or isinstance(padding, str) or x.numel() == 0:
        return False
    if any(t.dtype != x.dtype or type(t) not in (Tensor, torch.nn.Parameter) for t in tensors) or x.dim() != 4:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    few = weight.shape[-1] > 1 and min(weight.shape[:2]) < LEAST_IN_NCHW
    if few and not x.is_contiguous(memory_format=torch.channels_last) and memory_format_of(x) != torch.channels_last:
        return False
    return not (torch.is_autocast_enabled("cpu") or why_not(x.dtype))
