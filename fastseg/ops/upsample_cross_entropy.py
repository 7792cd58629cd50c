"""Cross entropy of bilinearly upsampled logits."""

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import (
    autocasts,
    followed,
    is_torchs,
    known,
    needs_grad,
    no_kernel,
    one_device,
    what_follows,
)
from fastseg.ops.core.forms import Form, Forms
from fastseg.ops.core.labels import LABEL_DTYPES
from fastseg.ops.core.override import overridable
from fastseg.ops.core.sizes import whole
from fastseg.ops.core.upsample import cross_entropy, too_large
from fastseg.ops.cpu.cross_entropy import CPU_FORMS, Request, request_of
from fastseg.ops.cpu.cross_entropy_rows import Criterion
from fastseg.ops.registered.upsample_cross_entropy import Call, UpsampleCrossEntropy, fwd_op
from fastseg.ops.volume_loss import volume_cross_entropy

NAME = "upsample_cross_entropy"


@overridable
def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    align_corners: bool = False,
) -> Tensor:
    """Upsample logits bilinearly to the size of the target and compute the cross entropy.

    Equals ``cross_entropy(interpolate(logits, target.shape[-2:], mode="bilinear", ...), target, ...)``, but stores
    neither the full-size logits nor their gradient: the forward saves one number per pixel. All dtypes are computed in
    fp32. Gradients are deterministic. Second derivatives run as torch's two steps.

    Volumes are interpolated trilinearly, in slabs of slices; with a weight that requires a gradient, as torch's two
    steps.

    Args:
        logits: (N, C, h, w) or (N, C, d, h, w), floating point, any layout.
        target: class indices (N, H, W) or (N, D, H, W), uint8, int8, int16, int32 or int64.
        weight: (C,), a factor per class, of either sign.
        ignore_index: target value of pixels that do not count.
        reduction: "mean" (over the weights of the pixels that count), "sum" or "none".
        label_smoothing: in [0, 1].
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        A scalar, or for "none" the shape of the target, in the dtype of ``logits``; in fp32 under autocast. A mean over
        no pixels is NaN, with gradient 0. A mean over weights that sum to 0 is NaN too; its gradient is NaN at pixels
        that count.

    Raises:
        TypeError: ``logits`` is not floating point, or ``target`` has none of the five dtypes.
        ValueError: shapes do not match, the reduction is unknown, ``label_smoothing`` is outside [0, 1], or tensors are
            on different devices.
        IndexError: a target is neither a class nor ``ignore_index``. On a GPU, where waiting for the answer would cost
            more than the loss, the loss of such a target is NaN; it is never used as an address, and a device-side
            assertion reports it at the next synchronisation, as in torch's own cross entropy.

    Reference: ``torch.nn.functional.interpolate`` and ``torch.nn.functional.cross_entropy``.
    """
    ignore_index = ignore_index if type(ignore_index) is int else whole(ignore_index)
    label_smoothing = float(label_smoothing)
    _check(logits, target, weight, reduction, label_smoothing)
    if logits.dim() == 5:
        one_device(NAME, logits, (target, weight))
        criterion = Criterion(ignore_index, reduction, label_smoothing, align_corners)
        return volume_cross_entropy(upsample_cross_entropy, logits, target, weight, criterion)
    criterion = Criterion(ignore_index, reduction, label_smoothing, align_corners)
    if is_torchs(logits) and target.is_cpu and (weight is None or weight.is_cpu):
        form = FORMS.decide(request_of(logits, target, weight, criterion), logits)
    else:
        one_device(NAME, logits, (target, weight))
        form = FORMS.decide(_request(logits, target, weight, criterion), logits)
    return form.run(logits, target, weight, criterion)


def _request(logits: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion) -> Request:
    why = no_kernel(logits)
    if logits.is_cpu and why and not followed(logits, target, weight):
        return request_of(logits, target, weight, criterion)._replace(no_kernel=why)
    why = why or what_follows(logits, target, weight)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        why = why or "the class weights require a gradient"
    sizes = () if why else known(tuple(logits.shape), logits.stride(), *target.shape[1:])
    return Request(why or "not an ordinary CPU map", "", False, why, sizes)


def upsample_cross_entropy_ref(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    align_corners: bool = False,
) -> Tensor:
    """``upsample_cross_entropy`` in torch's own lines."""
    return cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing, align_corners)


class KernelForm(Form):
    """Our kernels, through the registered ops; a graph asks for sizes when it runs."""

    name = "kernel"

    def refuses(self, r: Request) -> str:
        return r.no_kernel or (too_large(*r.sizes) if r.sizes else "")

    def run(self, logits: Tensor, target: Tensor, weight: Tensor | None, criterion: Criterion) -> Tensor:
        call = Call(logits, target, weight, *criterion, autocasts(logits),
                    torch.is_grad_enabled() and logits.requires_grad)  # fmt: skip
        return (UpsampleCrossEntropy.apply(*call) if needs_grad(logits) else fwd_op(*call))[0]


FORMS = Forms(NAME, [KernelForm(), *CPU_FORMS])


def _check(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float) -> None:
    name, shape, pixels = NAME, logits.shape, target.shape
    if len(shape) not in (4, 5) or len(pixels) != len(shape) - 1 or shape[0] != pixels[0] or shape[1] == 0:
        raise ValueError(
            f"{name}: logits are {tuple(shape)} and target is {tuple(pixels)}; give (N, C, h, w) and (N, H, W), or "
            "(N, C, d, h, w) and (N, D, H, W)"
        )
    if 0 in shape[2:] or 0 in pixels[1:]:
        raise ValueError(f"{name}: logits are {tuple(shape)} and target is {tuple(pixels)}; there is no pixel in them")
    if not logits.is_floating_point():
        raise TypeError(f"{name}: logits are {logits.dtype}; give floating-point logits")
    if target.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name}: target is {target.dtype}; give class indices, uint8 or int8 to int64")
    if weight is not None and (weight.shape != (shape[1],) or not weight.is_floating_point()):
        raise ValueError(
            f"{name}: weight is {tuple(weight.shape)}, {weight.dtype}; give a floating-point factor for each of "
            f"{shape[1]} classes"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{name}: reduction is {reduction!r}; use "mean", "sum" or "none"')
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}; it must lie in [0, 1]")
