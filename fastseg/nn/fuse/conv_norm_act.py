"""Fold a batch norm into the convolution before it, in evaluation; modules and ``state_dict`` do not change."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseg.nn.fuse.children import TENSOR_NAMES, Act, conv_tensors, norm_tensors
from fastseg.nn.fuse.norm import run_norm_act
from fastseg.nn.fuse.watch import apply_act, rewritten, split_act, watched
from fastseg.nn.norm import BatchNormAct2d
from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.core.dispatch import autocast_dtype, followed, kernels_run
from fastseg.ops.core.kept import eager_keeper, keepers, made_once
from fastseg.ops.core.norm import activate, add_residual
from fastseg.ops.core.recompute import kept_as_recipe
from fastseg.ops.cpu.packed import conv2d, packing
from fastseg.ops.registered.fold_norm import fold_norms


class Source(NamedTuple):
    """A convolution, the norm after it, and the tensors that folding reads."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    eps: float


def source_of(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Source:
    """The tensors as the modules hold them now."""
    weights, affine, buffers = conv._parameters, norm._parameters, norm._buffers
    try:  # as ``conv_tensors`` and ``norm_tensors``, in two calls less
        found = (weights["weight"], weights["bias"], buffers["running_mean"], buffers["running_var"], affine["weight"],
                 affine["bias"])  # fmt: skip
    except KeyError:  # a wrapper holds one elsewhere
        found = None
    if found is None or TENSOR_NAMES & vars(conv).keys() or TENSOR_NAMES & vars(norm).keys():
        found = (*conv_tensors(conv), *norm_tensors(norm))
    return Source(conv, norm, *found, norm.eps)


def foldable(x: Tensor, sources: Sequence[Source], *, always: bool = False) -> bool:
    """True if all norms have fixed statistics, nobody wants a gradient, and folding pays; nobody watches a module.

    ``always``: whatever it costs, for what saves more than a pass over the map.
    """
    tensors: list[Tensor | None] = [x]
    for source in sources:
        if source.norm.training or source.mean is None:
            return False
        tensors += source[2:4]
        tensors += source[6:8]
    # A compiler folds by itself; in a trace or a transform the weights are variables.
    if followed(*tensors) or (torch.is_grad_enabled() and _differentiated(*tensors)):
        return False
    if always:
        return True
    for source in sources:
        # Folding costs less than a pass over the map: it is done once, or the map is larger than the weight.
        down, across = source.conv.stride
        pixels = x.shape[0] * (x.shape[-2] // down) * (x.shape[-1] // across)
        if source.weight.shape[1:].numel() > pixels and eager_keeper(source[2:8]) is None:
            return False
    return True


def source_if_foldable(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, always: bool = False) -> Source | None:
    """What folding reads, if the norm can be folded into the convolution, and nobody watches either."""
    bare = type(norm) is BatchNormAct2d and norm.act is None
    if norm.training or watched(conv, nn.Conv2d, norm, BatchNormAct2d if bare else nn.BatchNorm2d):
        return None
    source = source_of(conv, norm)
    return source if foldable(x, (source,), always=always) else None


def can_fold(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, always: bool = False) -> bool:
    """True if ``source_if_foldable`` finds one."""
    return source_if_foldable(x, conv, norm, always=always) is not None


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def folded(
    x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, inputs: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``norm(conv(x))`` as one convolution, in the dtype in which ``x`` is convolved.

    ``inputs``, (first, end), selects the input channels whose weights are returned; None selects all.

        weight' = weight s,   bias' = (bias - mean) s + shift,   s = norm.weight / sqrt(var + eps)

    The result is computed at each call, because writes to a weight may go uncounted. It is kept inside
    ``fastseg.frozen`` and in a ``Runner``.
    """
    return fold_all(x, (source_of(conv, norm),), (inputs,))[0]


def fold_all(
    x: Tensor, sources: Sequence[Source], inputs: Sequence[tuple[int, int] | None] = ()
) -> list[tuple[Tensor, Tensor]]:
    """``folded`` of each, in eager code; ``inputs`` are of each, or () for all channels."""
    dtype, last = autocast_dtype(x), x.is_contiguous(memory_format=torch.channels_last)
    channels = inputs or [None] * len(sources)
    if keepers.get():
        return [_fold_once(*each, dtype, last) for each in zip(sources, channels, strict=True)]
    folds: list = []
    for source, part in zip(sources, channels, strict=True):
        folds.append(source[2:] if part is None else (source.weight[:, slice(*part)], *source[3:]))
    return fold_norms(folds, dtype, last, kernels_run(sources[0].weight))


def _fold_once(source: Source, inputs: tuple[int, int] | None, dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor]:
    def fold() -> tuple[Tensor, Tensor]:
        weight = source.weight if inputs is None else source.weight[:, slice(*inputs)]
        return fold_norms([(weight, *source[3:])], dtype, last, kernels_run(weight))[0]

    if rewritten(source.conv, source.norm):
        return fold()
    return made_once(source[2:8], ("folded", source.eps, dtype, last, inputs), fold)


def run_conv(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """``norm(conv(x))`` as one convolution with folded weights; requires ``can_fold``."""
    weight, bias = folded(x, conv, norm)
    if conv.padding_mode != "zeros":
        return conv._conv_forward(x, weight, bias)
    return conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(x)``; saves the recipe of ``x`` if there is one, and uses packed weights inside ``packed_weights``."""
    called = bool(watched(conv, nn.Conv2d))
    if not called and conv.padding_mode == "zeros" and packing():
        return conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if not torch.is_grad_enabled():
        return conv(x) if called else conv._conv_forward(x, *conv_tensors(conv))
    with kept_as_recipe(x):
        return conv(x)


def run_conv_norm_act(
    x: Tensor, conv: nn.Module, norm: nn.Module | None, act: Act, residual: Tensor | None = None
) -> Tensor:
    """Compute ``act(norm(conv(x)) + residual)``.
    The norm is folded into the convolution if possible; else norm, residual and activation run as one op after it.
    Modules that are watched or of another class are called.
    """
    if isinstance(act, nn.Module):
        act, module = split_act(act)
        if module is not None:
            return module(run_conv_norm_act(x, conv, norm, None, residual))
    source = None if norm is None else source_if_foldable(x, conv, norm)
    if norm is not None and source is None:
        return run_norm_act(convolve(conv, x), norm, act, residual)
    if norm is None and watched(conv, nn.Conv2d):
        y = convolve(conv, x)
        return apply_act(act, y if residual is None else y + residual)
    options = (act, conv.stride, conv.padding, conv.dilation, conv.groups)
    if source is not None:
        if conv.padding_mode == "zeros":
            return conv2d_act(x, *fold_all(x, (source,))[0], *options, residual=residual)
        y = run_conv(x, conv, norm)
    else:
        own = (x, conv.weight, conv.bias)
        if conv.padding_mode == "zeros" and not (followed(*own) or _differentiated(*own)):
            return conv2d_act(*own, *options, residual=residual)
        y = convolve(conv, x)
    return activate(add_residual(y, residual), act, inplace=True)
