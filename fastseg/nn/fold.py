"""Batch norm folded into the convolution before it, in evaluation; modules and ``state_dict`` stay as they are."""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastseg.nn.conv import rewritten, watched
from fastseg.nn.norm import run_norm_act, watched_norm
from fastseg.ops._batch_norm import Activation, activate, add_residual
from fastseg.ops._conv_act import conv2d_act
from fastseg.ops._cpu_conv import conv2d, packing
from fastseg.ops._dispatch import autocast_dtype, followed
from fastseg.ops._recompute import kept_as_recipe


class _Folded(NamedTuple):
    """Folded tensors, and what they were made from: the tensors themselves, and how often each had been written to."""

    weight: Tensor
    bias: Tensor
    sources: tuple[Tensor | None, ...]
    versions: tuple[int, ...]


_kept: WeakKeyDictionary[nn.Conv2d, dict[tuple, _Folded]] = WeakKeyDictionary()  # beside the modules: not pickled


def can_fold(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether the norm has fixed statistics, nobody wants a gradient, and nobody watches either module."""
    if norm.training or norm.running_mean is None or watched(conv, nn.Conv2d) or watched_norm(norm):
        return False
    tensors = (x, conv.weight, conv.bias, norm.weight, norm.bias)
    # A compiler folds by itself; in a trace or a transform the weights are variables.
    return not (followed(*tensors) or _differentiated(*tensors))


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def folded(
    x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, inputs: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``norm(conv(x))`` as one convolution, in the dtype that ``x`` is convolved in.

    ``inputs``, from the first to before the last, are the input channels whose weights are wanted; None: all.

        weight' = weight s,   bias' = (bias - mean) s + shift,   s = norm.weight / sqrt(var + eps)

    Computed once and kept as long as the convolution lives, until a parameter or statistic is replaced or written to,
    or the norm is trained; not kept at all where FSDP gathers either. Writes through ``p.data`` are not counted by
    torch: assign, or write to ``p`` in place.
    """
    dtype = autocast_dtype(x)
    last = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    sources = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var,
               norm.num_batches_tracked)  # fmt: skip
    kept = _kept.setdefault(conv, {})
    try:
        versions = tuple(-1 if t is None else t._version for t in sources)
    except RuntimeError:  # made in inference mode: writes are not counted
        versions = None
    key = (dtype, last, inputs)
    old = kept.get(key)
    if (
        old is not None
        and old.versions == versions
        and all(a is b for a, b in zip(old.sources, sources, strict=True))
        and old.weight.device == conv.weight.device
    ):
        return old.weight, old.bias
    with torch.no_grad():
        wide = torch.promote_types(conv.weight.dtype, torch.float32)
        scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight.to(wide)
        shift = -norm.running_mean.to(wide) if conv.bias is None else conv.bias.to(wide) - norm.running_mean.to(wide)
        shift = shift * scale if norm.bias is None else shift * scale + norm.bias.to(wide)
        weight = conv.weight if inputs is None else conv.weight[:, slice(*inputs)]
        weight = (weight.to(wide) * scale[:, None, None, None]).to(dtype).contiguous(memory_format=last)
        new = _Folded(weight, shift.to(dtype), sources, versions)
    if versions is not None and not (rewritten(conv) or rewritten(norm)):
        kept[key] = new
    return new.weight, new.bias


def unfold(conv: nn.Conv2d) -> None:
    """Forget what was kept: before training writes to the statistics in ways that are not counted."""
    _kept.pop(conv, None)


def run_conv(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """``norm(conv(x))`` as one convolution with folded weights; only where ``can_fold``."""
    weight, bias = folded(x, conv, norm)
    if conv.padding_mode != "zeros":
        return conv._conv_forward(x, weight, bias)
    return conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(x)``, which keeps the recipe of ``x`` if there is one; within ``packed_weights``, packed."""
    if packing() and not watched(conv, nn.Conv2d) and conv.padding_mode == "zeros":
        return conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    with kept_as_recipe(x):
        return conv(x)


def _as_it_is(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a convolution without norm is to be called."""
    tensors = (x, conv.weight, conv.bias)
    return followed(*tensors) or bool(watched(conv, nn.Conv2d)) or _differentiated(*tensors)


def run_conv_norm_act(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | None,
    act: Activation | None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(norm(conv(x)) + residual)``; the norm is folded into the convolution where it can be, else the convolution
    is followed by norm, residual and activation as one op."""
    if norm is not None and not can_fold(x, conv, norm):
        if norm.training:
            unfold(conv)
        return run_norm_act(convolve(conv, x), norm, act, residual)
    plain = conv.padding_mode == "zeros"
    as_it_is = norm is None and _as_it_is(x, conv)
    if plain and not as_it_is:
        weight, bias = (conv.weight, conv.bias) if norm is None else folded(x, conv, norm)
        options = (act, conv.stride, conv.padding, conv.dilation, conv.groups)
        return conv2d_act(x, weight, bias, *options, residual=residual)
    y = convolve(conv, x) if norm is None else run_conv(x, conv, norm)
    return activate(add_residual(y, residual), act, inplace=True)
