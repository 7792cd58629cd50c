"""A graph of one shape whose convolutions are bound to packed weights: a call asks no questions.

A convolution of a few pixels takes 40 us in oneDNN, and 40 us more in the questions which form to run. A ``Runner``
asks them once for each shape: the graph is run, and each call of ``conv2d_act`` is replaced by what it came to.
Transposed convolutions are packed as well; bilinear resizes go by phases where that pays. Activations that multiply by
their input (SiLU, GELU, hardswish) become part of oneDNN's call, where they keep NaN; it drops NaN from a ReLU, which
therefore follows in place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.core.conv_request import finish
from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.forms import watched_or_changed
from fastseg.ops.cpu import depthwise, matrix, phases
from fastseg.ops.cpu.matrix import Matrix
from fastseg.ops.cpu.onednn import Packed, PackedTransposed, pack
from fastseg.ops.cpu.packed import PackedWeights, packed_run
from fastseg.ops.cpu.phases import Phases
from fastseg.ops.cpu.winograd import Filters, winograd_conv2d
from fastseg.ops.cpu.winograd_dilated import Dilated
from fastseg.optimizing.graph import Constants, Work, argument, aten, only_user, pair

FUSED: dict[Any, str] = {
    aten.silu_.default: "swish", aten.silu.default: "swish", aten.hardswish_.default: "hardswish",
    aten.hardswish.default: "hardswish", aten.gelu_.default: "gelu", aten.gelu.default: "gelu",
}  # fmt: skip


class Convolution:
    """``conv2d_act`` with packed weights: ``(x, residual) -> y``."""

    def __init__(self, run: Packed | PackedTransposed | Matrix | Dilated, act: str | None):
        self.run, self.act, self.__name__ = run, act, "packed_convolution"

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        return finish(self.run(x), self.act, residual, None)


class Winograd:
    """``conv2d_act`` with transformed filters: ``(x, residual) -> y``."""

    def __init__(self, filters: Filters, act: str | None):
        self.filters, self.act, self.__name__ = filters, act, "winograd_convolution"

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.act == "relu" and residual is None:
            return winograd_conv2d(x, self.filters, True)
        return finish(winograd_conv2d(x, self.filters, False), self.act, residual, None)


def may_bind(*inputs: Tensor) -> bool:
    """True if nobody watches or changes which form an op takes: then a bound graph gives what the graph gives."""
    return not (watched_or_changed() or followed(*inputs) or torch.is_grad_enabled())


def bound(module: fx.GraphModule, inputs: Sequence[Tensor], packs: PackedWeights) -> fx.GraphModule:
    """The graph for inputs of these shapes, inside ``packed_weights(packs)``; it shares the tensors."""
    work = Work(module, Constants()).clone()
    _Binding(work, packs).run(*inputs)
    _fuse(work)
    work.clean()
    return work.module


class _Binding(fx.Interpreter):
    """One run, which replaces each convolution behind it by what it came to."""

    def __init__(self, work: Work, packs: PackedWeights):
        super().__init__(work.module)
        self.work, self.packs = work, packs
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = super().run_node(n)
        made = self._made(n, args, kwargs, result)
        if made is not None:
            n.target, residual = made, n.kwargs.get("residual")
            n.args, n.kwargs = (n.args[0], *([] if residual is None else [residual])), {}
        return result

    def _made(self, n: fx.Node, args: tuple, kwargs: dict, result: Any) -> Callable | None:
        if n.op != "call_function":
            return None
        if n.target is aten.conv_transpose2d.input:
            return self._transposed(n, *args[:3])
        if n.target is aten.upsample_bilinear2d.vec:
            return self._resize(n, args[0], result)
        if n.target is not conv2d_act or kwargs.get("image_bias") is not None:
            return None
        x, weight, bias, act, *geometry = args
        if depthwise.pays(x, weight, bias, *geometry):
            return None  # tap by tap
        run = packed_run(x, weight, bias, *geometry)
        if run is None:
            return None
        followed_by = act is None and isinstance(run, Matrix) and _is_activated(n)
        if followed_by and not matrix.pays(x.shape, weight, tuple(geometry), activated=True):
            stride, padding, dilation, groups = geometry
            run = pack(weight, bias, stride, padding, dilation, groups, x.shape)
        return Winograd(run, act) if isinstance(run, Filters) else Convolution(run, act)

    def _resize(self, n: fx.Node, x: Tensor, result: Tensor) -> Callable | None:
        size, factors = result.shape[2:], argument(n, "scale_factors")
        exact = factors is None or all(out == low * f for out, low, f in zip(size, x.shape[2:], factors, strict=True))
        return Phases(size) if exact and phases.pays(x, size, argument(n, "align_corners")) else None

    def _transposed(self, n: fx.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Callable | None:
        names = ("stride", "padding", "output_padding", "dilation")
        geometry = (*(pair(argument(n, name)) for name in names), argument(n, "groups"))
        run = self.packs.transposed(x, weight, bias, geometry)
        return None if run is None else Convolution(run, None)


def _is_activated(conv: fx.Node) -> bool:
    """True if what alone reads a convolution is an activation that oneDNN's call computes."""
    user = only_user(conv) if conv.kwargs.get("residual") is None else None
    return user is not None and user.target in FUSED


def _fuse(work: Work) -> None:
    """Activations that keep NaN in oneDNN's call, and ReLUs behind transposed convolutions."""
    for conv in list(work.graph.nodes):
        run = conv.target
        user = only_user(conv) if isinstance(run, Convolution) and run.act is None and len(conv.args) == 1 else None
        if user is None:
            continue
        name, packed = FUSED.get(user.target), run.run
        if name is not None and isinstance(packed, Packed):
            algorithm = argument(user, "approximate") if name == "gelu" else ""
            conv.target = Convolution(packed.activated(name, algorithm), None)
        elif user.target in (aten.relu.default, aten.relu_.default):
            conv.target = Convolution(packed, "relu")
        else:
            continue
        user.replace_all_uses_with(conv)
        work.graph.erase_node(user)
