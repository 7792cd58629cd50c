"""Fold a batch norm into the convolution before it, in evaluation; modules and ``state_dict`` do not change."""

import torch
from torch import Tensor, nn

from fastseg.nn.fuse.children import Act, conv_tensors, norm_tensors
from fastseg.nn.fuse.norm import run_norm_act, watched_norm
from fastseg.nn.fuse.watch import apply_act, rewritten, split_act, watched
from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.core.dispatch import autocast_dtype, followed
from fastseg.ops.core.kept import eager_keeper, made_once
from fastseg.ops.core.norm import activate, add_residual
from fastseg.ops.core.recompute import kept_as_recipe
from fastseg.ops.cpu.packed import conv2d, packing
from fastseg.ops.registered.fold_norm import fold_norm


def can_fold(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, always: bool = False) -> bool:
    """True if the norm has fixed statistics, nobody wants a gradient or watches either module, and folding pays.

    ``always``: whatever it costs, for what saves more than a pass over the map.
    """
    if norm.training or watched(conv, nn.Conv2d) or watched_norm(norm) or norm_tensors(norm)[0] is None:
        return False
    sources = _sources(conv, norm)
    tensors = (x, *sources[:4])
    # A compiler folds by itself; in a trace or a transform the weights are variables.
    if followed(*tensors) or (torch.is_grad_enabled() and _differentiated(*tensors)):
        return False
    if always:
        return True
    # Folding costs less than a pass over the map: it is done once, or the map is larger than the weight.
    down, across = conv.stride
    pixels = x.shape[0] * (x.shape[-2] // down) * (x.shape[-1] // across)
    return sources[0].shape[1:].numel() <= pixels or eager_keeper(sources) is not None


def _sources(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    mean, var, weight, bias = norm_tensors(norm)
    return *conv_tensors(conv), weight, bias, mean, var


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
    dtype = autocast_dtype(x)
    last = x.is_contiguous(memory_format=torch.channels_last)
    sources = weight, bias, gamma, beta, mean, var = _sources(conv, norm)

    def fold() -> tuple[Tensor, Tensor]:
        part = weight if inputs is None else weight[:, slice(*inputs)]
        return fold_norm(part, bias, mean, var, gamma, beta, norm.eps, dtype, last)

    if rewritten(conv) or rewritten(norm):
        return fold()
    return made_once(sources, ("folded", norm.eps, dtype, last, inputs), fold)


def run_conv(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """``norm(conv(x))`` as one convolution with folded weights; requires ``can_fold``."""
    weight, bias = folded(x, conv, norm)
    if conv.padding_mode != "zeros":
        return conv._conv_forward(x, weight, bias)
    return conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(x)``; saves the recipe of ``x`` if there is one, and uses packed weights inside ``packed_weights``."""
    if packing() and not watched(conv, nn.Conv2d) and conv.padding_mode == "zeros":
        return conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if not torch.is_grad_enabled():
        return conv(x)
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
    if norm is not None and not can_fold(x, conv, norm):
        return run_norm_act(convolve(conv, x), norm, act, residual)
    if norm is None and watched(conv, nn.Conv2d):
        y = convolve(conv, x)
        return apply_act(act, y if residual is None else y + residual)
    own = (x, conv.weight, conv.bias)
    as_it_is = norm is None and (followed(*own) or _differentiated(*own))
    if conv.padding_mode == "zeros" and not as_it_is:
        weight, bias = (conv.weight, conv.bias) if norm is None else folded(x, conv, norm)
        options = (act, conv.stride, conv.padding, conv.dilation, conv.groups)
        return conv2d_act(x, weight, bias, *options, residual=residual)
    y = convolve(conv, x) if norm is None else run_conv(x, conv, norm)
    return activate(add_residual(y, residual), act, inplace=True)
