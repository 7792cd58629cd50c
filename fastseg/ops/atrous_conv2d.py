"""Dilated convolution that skips the products with zero padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg.ops.conv_act import conv2d_act
from fastseg.ops.core.dispatch import (
    autocast_dtype,
    autocasts,
    followed,
    is_torchs,
    known,
    needs_grad,
    why_torchs,
)
from fastseg.ops.core.explain import in_reference
from fastseg.ops.core.layout import like
from fastseg.ops.core.norm import ACTIVATIONS, Activation
from fastseg.ops.core.override import overridable
from fastseg.ops.core.sizes import whole as whole_number
from fastseg.ops.cpu.packed import conv2d
from fastseg.ops.registered.atrous_conv import (
    FORMS,
    NAME,
    AtrousBranches,
    atrous_branches_ref,
    fwd_op,
    request_of,
)


@overridable
def atrous_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    *,
    act: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(conv2d(x, weight, bias, padding=dilation * (K // 2), dilation=dilation) + residual)``: stride 1, one group.

    On a GPU the map is cut into rectangles in which each tap lies either wholly inside the map or wholly outside. Taps
    outside are skipped: 61 % of the products of a 3x3 at rate 18 on a 32x32 map. Both gradients skip them too. Bias,
    residual and activation cost no extra launch, so a sum of convolutions is a chain of calls. A cost model
    (``explain`` shows its numbers) leaves to the library what the library computes faster; that is always the case for
    an undilated 3x3.

    Results equal torch's for finite weights. A non-finite weight whose tap reads padding at every pixel does not reach
    the result; torch multiplies it by 0 and gets NaN.

    Args:
        x: (N, C, H, W), contiguous or channels_last; contiguous input costs one copy each way.
        weight: (COUT, C, K, K), K odd; the Triton kernel takes K = 1 and 3.
        bias: (COUT,).
        dilation: distance between neighbouring taps, in pixels, on both axes.
        act: activation of the output; None, "relu", "relu6" or "leaky_relu" (slope 0.01).
        residual: (N, COUT, H, W), added before the activation.

    Returns:
        (N, COUT, H, W), in the memory format of ``x``. Under autocast in autocast's dtype, as torch's convolutions.

    Raises:
        ValueError: shapes do not match, the activation is unknown, or tensors are on different devices.
        TypeError: ``x``, weight and residual differ in dtype outside autocast, or are not floating point; the bias may
            have another floating-point dtype.

    Reference: Chen et al., DeepLab, arXiv:1606.00915.
    """
    if residual is None and is_torchs(x) and _is_plain(x, weight, bias, dilation, act):
        pad = dilation * (weight.shape[-1] // 2)
        return conv2d(x, weight, bias, (1, 1), (pad, pad), (dilation, dilation), 1, act)
    biases = None if bias is None else [bias]
    return atrous_branches(x, [weight], biases, [dilation], act, residual, name="atrous_conv2d", as_x=True)


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, act: str | None) -> bool:
    """Whether everything is on a CPU, of one dtype, and as it must be: nothing is left to check or to cast."""
    if type(dilation) is not int or dilation < 1 or not (act is None or act in ACTIVATIONS):
        return False
    shape, taps, dtype = x.shape, weight.shape, x.dtype
    if len(shape) != 4 or len(taps) != 4 or taps[1] != shape[1] or taps[2] != taps[3] or taps[3] % 2 == 0:
        return False
    if not x.is_floating_point() or weight.dtype != dtype or not weight.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    return bias is None or (bias.dtype == dtype and bias.is_cpu and bias.shape == taps[:1])


def atrous_conv2d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int = 1,
    *,
    act: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``atrous_conv2d`` in plain PyTorch."""
    return atrous_branches_ref(x, [weight], None if bias is None else [bias], [dilation], act, residual)


def atrous_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    dilations: Sequence[int],
    act: Activation | None = None,
    residual: Tensor | None = None,
    *,
    name: str = NAME,
    as_x: bool = False,
) -> Tensor:
    """``act(cat([conv2d(x, w, b, padding=d * (K // 2), dilation=d) ...], 1) + residual)``, as one launch.

    The kernel skips products with padding if the cost model finds that this pays (``explain`` shows its numbers); it
    decides once for all branches. The backward saves ``x`` once.

    Args:
        x: (N, C, H, W).
        weights: one (COUT, C, K, K) for each branch, COUT the same for all, K odd; the kernel takes K = 1 and 3.
        biases: one (COUT,) for each branch, or None.
        dilations: of each branch, in pixels.
        act: None, "relu", "relu6" or "leaky_relu".
        residual: (N, B * COUT, H, W), added before the activation.
        name: name of the op in error messages and in ``explain``.
        as_x: return the result in the memory format of ``x``.

    Returns:
        (N, B * COUT, H, W), branch b in channels b * COUT and following; channels_last where the kernel ran, unless
        ``as_x``. Under autocast in autocast's dtype, as torch's convolutions.

    Raises:
        ValueError: shapes do not match, the activation is unknown, or tensors are on different devices.
        TypeError: ``x``, weights and residual differ in dtype outside autocast, or are not floating point.

    Reference: Chen et al., DeepLabV3, arXiv:1706.05587.
    """
    maps = _run(name, x, weights, biases, dilations, act, residual, as_x)
    return maps[0] if len(maps) == 1 else torch.cat(maps, 1)


def atrous_maps(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    dilations: Sequence[int],
    act: Activation | None = None,
) -> list[Tensor]:
    """The maps that ``atrous_branches`` concatenates: one from the kernel, or one per branch from the library."""
    return _run(NAME, x, weights, biases, dilations, act, None, False)


def atrous_map(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, dilations: Sequence[int]
) -> Tensor | None:
    """``atrous_branches`` where it writes all branches into one map; None where a GPU library would write several."""
    maps = _run(NAME, x, weights, biases, dilations, None, None, False, whole=True)
    return maps[0] if maps else None


def _run(name: str, x: Tensor, weights, biases, dilations, act, residual, as_x: bool, whole: bool = False):
    """``whole``: return [] where a GPU's library would write the maps one by one."""
    weights, biases = list(weights), list(biases or ())
    given, dilations = dilations, []
    for d in given:
        dilations.append(d if type(d) is int else whole_number(d))
    dtype = autocast_dtype(x)
    x, residual = x.to(dtype), None if residual is None else residual.to(autocast_dtype(residual))
    kernels = _check(name, x, weights, biases, dilations, act, residual)
    tensors = [*weights, *biases, residual]
    if is_torchs(x) and all(t is None or t.is_cpu for t in tensors):
        ours = False
    else:
        why, passes = why_torchs(name, x, *tensors), (act is not None) + (residual is not None)
        request = request_of(known(*x.shape), dtype, weights[0].shape[0], kernels, dilations, passes, why)
        ours = FORMS.decide(request, x, name) is not FORMS.forms[-1]
        if whole and not why and not ours:
            return []
    if not ours:  # torch differentiates its own convolutions
        if residual is None and _nothing_follows(x, *weights, *biases):
            return _one_by_one(x, weights, biases, dilations, act)
        return [atrous_branches_ref(x, weights, biases, dilations, act, residual)]
    if torch.is_grad_enabled() and needs_grad(x, *tensors):
        y = AtrousBranches.apply(act or "none", dilations, x, residual, *weights, *biases)
    else:
        y = fwd_op(x, weights, biases, residual, dilations, act or "none")
    return [like(x, y) if as_x else y]


def _nothing_follows(*tensors: Tensor) -> bool:
    """True if no gradient is needed, nothing traces or transforms the call, and ``fastseg.reference()`` is off."""
    if followed(*tensors) or in_reference():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _one_by_one(x, weights, biases, dilations, act) -> list[Tensor]:
    """One library convolution per branch, with bias and activation fused into the call where the library can."""
    cast = lambda t: t if t is None or autocasts(x) else t.to(x.dtype)
    return [
        conv2d_act(x, cast(w), cast(b), act, (1, 1), (d * (w.shape[-1] // 2),) * 2, (d, d), 1)
        for w, b, d in zip(weights, biases or [None] * len(weights), dilations, strict=True)
    ]


def _check(name, x, weights, biases, dilations, act, residual) -> list[int]:
    """Raise on bad arguments; return the kernel size of each branch."""
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f'{name}: act is {act!r}; use None, "relu", "relu6" or "leaky_relu"')
    if x.dim() != 4:
        raise ValueError(f"{name}: x is {tuple(x.shape)}; it must be (N, C, H, W)")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x is {x.dtype}; it must be a floating-point tensor")
    if not weights or len(weights) != len(dilations) or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"{name}: {len(weights)} weights, {len(biases)} biases, {len(dilations)} dilations; give one of each for "
            "every branch, or no biases"
        )
    kernels = []
    for w, d in zip(weights, dilations, strict=True):
        K = w.shape[-1]
        kernels.append(K)
        if w.dim() != 4 or w.shape[1:] != (x.shape[1], K, K) or K % 2 == 0 or w.shape[0] != weights[0].shape[0]:
            raise ValueError(
                f"{name}: a weight is {tuple(w.shape)}; x has {x.shape[1]} channels: use (COUT, {x.shape[1]}, K, K), K "
                "odd, the same COUT for all weights, no groups"
            )
        if not isinstance(d, (int, torch.SymInt)) or isinstance(d, bool) or d < 1:
            raise ValueError(f"{name}: dilation is {d!r}; it must be a whole number of pixels >= 1, for both axes")
    COUT = weights[0].shape[0]
    for b in biases:
        if b.shape != (COUT,):
            raise ValueError(f"{name}: a bias is {tuple(b.shape)}; it must be ({COUT},)")
    out = (x.shape[0], COUT * len(weights), *x.shape[2:])
    if residual is not None and residual.shape != out:
        raise ValueError(f"{name}: residual is {tuple(residual.shape)}, the output is {out}; they must be equal")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return kernels
    for t in (*weights, residual):
        if t is not None and t.dtype != x.dtype:
            label = "residual" if t is residual else "a weight"
            raise TypeError(
                f"{name}: x is {x.dtype} and {label} {t.dtype}; they should be the same: cast one, or use autocast"
            )
    return kernels
