"""Sums over the pixels of bilinearly upsampled logits, which losses of regions are computed from."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import (
    followed,
    is_torchs,
    kernels_run,
    needs_grad,
    one_device,
    why_torchs,
)
from fastseg.ops.core.explain import Refusal
from fastseg.ops.core.forms import Form, Forms, Reference, Torchs
from fastseg.ops.core.labels import LABEL_DTYPES
from fastseg.ops.core.loss_columns import KINDS, SIGMOID, SOFTMAX, Column, Sums
from fastseg.ops.core.loss_full import at_full_size
from fastseg.ops.core.sizes import whole
from fastseg.ops.core.upsample import is_moderate
from fastseg.ops.cpu.loss_alone import Alone, loss_alone
from fastseg.ops.cpu.loss_sums import check_labels, sums_on_cpu
from fastseg.ops.registered.upsample_loss_sums import NAME, UpsampleLossSums, call_of, fwd_op, not_taken
from fastseg.ops.volume_loss import sums_of_volume


def upsample_loss_sums(
    logits: Tensor,
    target: Tensor,
    columns: Sequence[Column],
    activation: str = SOFTMAX,
    *,
    ignore_index: int | None = -100,
    pixel_weight: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Upsample logits bilinearly to the size of the target, and sum functions of them over the pixels of each image.

    ``fastseg/ops/core/loss_columns.py`` lists the functions. Neither the full-size logits nor their gradient are
    stored; the second walk over the pixels, for the gradient, reads nothing of the first but its sums.

    Args:
        logits: (N, C, h, w), floating point, any layout; or (N, C, d, h, w), interpolated trilinearly, and then targets
            and factors have a depth too.
        target: class indices (N, H, W) or (N, 1, H, W), uint8, int8, int16, int32 or int64; or labels for each class
            (N, C, H, W), integers 0 and 1, booleans, or floating point (probabilities).
        columns: what is summed.
        activation: "softmax" or "sigmoid".
        ignore_index: label of pixels that do not count; for labels of each class, of the class's pixel alone.
        pixel_weight: (N, H, W), a factor for each pixel.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        Sums (N, C, columns), float64. Gradients flow to the logits, and to ``pixel_weight`` where it asks for one.

    Raises:
        TypeError: ``logits`` is not floating point, or ``target`` has no dtype of labels.
        ValueError: shapes do not match, activation or column is unknown, or tensors are on different devices.
        IndexError: a label is neither a class nor ``ignore_index``; on a GPU the sums are NaN, and a device-side
            assertion reports it.

    Reference: ``torch.nn.functional.interpolate``, ``softmax``, ``sigmoid``, and sums.
    """
    sums = Sums(tuple(columns), activation, None if ignore_index is None else whole(ignore_index), align_corners)
    if logits.dim() == 5:
        return _of_volume(logits, target, sums, pixel_weight)
    target = checked(logits, target, sums, pixel_weight)
    form = FORMS.decide(_request(logits, target, sums, pixel_weight), logits)
    total: Tensor = form.run(logits, target, sums, pixel_weight)
    return total


def upsample_loss_sums_ref(logits: Tensor, target: Tensor, sums: Sums, pixel_weight: Tensor | None = None) -> Tensor:
    """``upsample_loss_sums`` in torch's own lines."""
    with torch.autocast(logits.device.type, enabled=False):
        return at_full_size(logits, target, pixel_weight, sums)


def upsample_loss_alone(logits: Tensor, target: Tensor, columns: Sequence[Column], loss: Alone) -> Tensor | None:
    """A binary cross entropy or a focal loss, and its gradient in the same walk, on a CPU that nothing follows.

    Args:
        logits: (N, C, h, w).
        target: as ``upsample_loss_sums`` takes it.
        columns: the sums that it is a function of.
        loss: what it is.

    Returns:
        A scalar, in the dtype of the logits, at least float32; None where the sums must be asked.

    Raises:
        TypeError: as ``upsample_loss_sums``.
        ValueError: as ``upsample_loss_sums``.
        IndexError: a label is neither a class nor ``ignore_index``.
    """
    if logits.dim() != 4 or not (is_torchs(logits) and target.is_cpu and logits.is_floating_point()):
        return None
    kind = SOFTMAX if loss.softmax else SIGMOID
    target = checked(logits, target, Sums(tuple(columns), kind, loss.ignore_index, loss.align_corners), None)
    classes, soft = logits.shape[1], target.is_floating_point()
    if soft or target.dim() != (3 if loss.softmax else 4) or (loss.softmax and classes == 1):
        return None
    for factor in (loss.pos, loss.neg):
        if factor is not None and (factor.requires_grad or not factor.is_cpu or factor.shape != (classes,)):
            return None
    if not check_labels(target, classes if loss.softmax else 2, loss.ignore_index):
        loss = loss._replace(ignore_index=None)
    return loss_alone(logits, target, loss) if is_moderate(logits) else None


# --- forms


class Request(NamedTuple):
    """What decides between the forms."""

    no_kernel: str  # why no kernel takes the call, or ""
    no_walk: str  # why the forms of a CPU do not


def _request(logits: Tensor, target: Tensor, sums: Sums, pixel_weight: Tensor | None) -> Request:
    trained = "pixel_weight requires a gradient" if pixel_weight is not None and pixel_weight.requires_grad else ""
    if is_torchs(logits) and target.is_cpu and (pixel_weight is None or pixel_weight.is_cpu):
        return Request("CPU tensor", trained)
    why = why_torchs(NAME, logits, target, pixel_weight)
    why = not_taken(logits, target, sums) or (trained if torch.is_grad_enabled() else "") or why
    on_cpu = logits.is_cpu and not followed(logits, pixel_weight)
    return Request(why, trained if on_cpu else "not on a CPU, or something follows the call")


class KernelForm(Form):
    """Our kernels, through the registered ops."""

    name = "kernel"

    def refuses(self, r: Request) -> str:
        return r.no_kernel

    def run(self, logits: Tensor, target: Tensor, sums: Sums, pixel_weight: Tensor | None) -> Tensor:
        if logits.is_cpu and not followed(logits):
            check_labels(target, 2 if target.dim() == 4 else logits.shape[1], sums.ignore_index)
        call = call_of(logits, target, pixel_weight, sums)
        found: tuple[Tensor, Tensor] = UpsampleLossSums.apply(*call) if needs_grad(logits) else fwd_op(*call)
        return found[0]


class WalkForm(Form):
    """On a CPU: strips of rows, or all pixels at once, with a gradient of their own."""

    name, path = "walk", "torch"

    def refuses(self, r: Request) -> str:
        return r.no_walk

    def why(self, r: Request, refused: Sequence[Refusal]) -> str:
        return r.no_kernel

    def run(self, logits: Tensor, target: Tensor, sums: Sums, pixel_weight: Tensor | None) -> Tensor:
        return sums_on_cpu(logits, target, pixel_weight, sums)


def _lines(logits: Tensor, target: Tensor, sums: Sums, pixel_weight: Tensor | None) -> Tensor:
    if logits.is_cpu and not followed(logits, pixel_weight):
        check_labels(target, 2 if target.dim() == 4 else logits.shape[1], sums.ignore_index)
    return upsample_loss_sums_ref(logits, target, sums, pixel_weight)


FORMS = Forms(NAME, [KernelForm(), WalkForm(), Torchs(_lines)])


def _of_volume(logits: Tensor, target: Tensor, sums: Sums, pixel_weight: Tensor | None) -> Tensor:
    """The sums over the voxels of volumes, in slabs of output slices."""
    if 0 in logits.shape[2:] or target.dim() not in (4, 5) or 0 in target.shape[-3:]:
        raise ValueError(
            f"upsample_loss: logits are {tuple(logits.shape)} and target is {tuple(target.shape)}; give "
            "(N, C, d, h, w), and (N, D, H, W) or (N, C, D, H, W), with voxels in them"
        )
    size = (target.shape[0], *target.shape[-3:])
    if pixel_weight is not None and pixel_weight.shape != size:
        raise ValueError(f"upsample_loss: pixel_weight is {tuple(pixel_weight.shape)}; give {size}, one each voxel")
    first = checked(
        logits[:, :, 0], target.select(-3, 0), sums, None if pixel_weight is None else pixel_weight.select(-3, 0)
    )
    if first.dim() == 3 and target.dim() == 5:
        target = target[:, 0]
    elif first.dim() == 4 and target.dim() == 4:
        target = target[:, None]

    total: Tensor = OF_VOLUMES.decide(_request_of_volume(logits, target, pixel_weight), logits).run(
        logits, target, sums, pixel_weight
    )
    return total


# --- forms of volumes


class VolumeRequest(NamedTuple):
    """What decides between the forms of volumes."""

    torchs: str  # why torch's own lines must run, or ""
    walk: str = ""  # why a CPU cannot walk over blocks, or ""


def _request_of_volume(logits: Tensor, target: Tensor, pixel_weight: Tensor | None) -> VolumeRequest:
    if pixel_weight is not None and pixel_weight.requires_grad and torch.is_grad_enabled():
        return VolumeRequest("pixel_weight requires a gradient")
    if followed(logits, pixel_weight):
        return VolumeRequest("a follower of torch's own ops")
    if logits.shape[0] == 0:
        return VolumeRequest("no volume")
    one_device(NAME, logits, (target, pixel_weight))
    if not logits.is_cpu or kernels_run(logits):
        return VolumeRequest("", "not on a CPU, or kernels run")
    return VolumeRequest("", "" if is_moderate(logits) else "NaN, infinity, or large numbers")


class VolumeWalkForm(Form):
    """On a CPU: blocks of rows of slices, with a gradient of their own."""

    name, path = "walk", "torch"

    def refuses(self, r: VolumeRequest) -> str:
        return r.torchs or r.walk

    def run(self, logits: Tensor, target: Tensor, sums: Sums, pixel_weight: Tensor | None) -> Tensor:
        return sums_on_cpu(logits, target, pixel_weight, sums)


class SlabsForm(Form):
    """The op on maps, slab by slab, and again for the gradient."""

    name, path = "slabs", "torch"

    def refuses(self, r: VolumeRequest) -> str:
        return r.torchs

    def run(self, logits: Tensor, target: Tensor, sums: Sums, pixel_weight: Tensor | None) -> Tensor:
        return _by_maps(logits, target, sums, pixel_weight, whole=False)


def _by_maps(logits: Tensor, target: Tensor, sums: Sums, pixel_weight: Tensor | None, *, whole: bool) -> Tensor:
    def of_maps(maps: Tensor, labels: Tensor, factor: Tensor | None) -> Tensor:
        return upsample_loss_sums(
            maps, labels, sums.columns, sums.activation, ignore_index=sums.ignore_index, pixel_weight=factor,
            align_corners=sums.align_corners,
        )  # fmt: skip

    with torch.autocast(logits.device.type, enabled=False):
        return sums_of_volume(of_maps, logits, target, pixel_weight, sums.align_corners, whole=whole)


def _lines_of_volume(logits: Tensor, target: Tensor, sums: Sums, pixel_weight: Tensor | None) -> Tensor:
    return _by_maps(logits, target, sums, pixel_weight, whole=True)


OF_VOLUMES = Forms("upsample_loss_sums3d", [VolumeWalkForm(), SlabsForm(), Reference(_lines_of_volume)])


# --- arguments


def checked(logits: Tensor, target: Tensor, sums: Sums, pixel_weight: Tensor | None) -> Tensor:
    """Check the arguments; return class indices as (N, H, W), labels of each class as (N, C, H, W)."""
    name = "upsample_loss"
    if sums.activation not in KINDS:
        raise ValueError(f'{name}: activation is {sums.activation!r}; use "softmax" or "sigmoid"')
    for column in sums.columns:
        if column.kind not in KINDS[sums.activation]:
            raise ValueError(f"{name}: {column.kind!r} is no sum of {sums.activation}; it has {KINDS[sums.activation]}")
    given = f"logits are {tuple(logits.shape)} and target is {tuple(target.shape)}"
    if logits.dim() != 4 or target.dim() not in (3, 4) or logits.shape[0] != target.shape[0] or logits.shape[1] == 0:
        raise ValueError(f"{name}: {given}; give (N, C, h, w), and (N, H, W) or (N, C, H, W)")
    if 0 in (*logits.shape[2:], *target.shape[-2:]):
        raise ValueError(f"{name}: {given}; there is no pixel in them")
    if not logits.is_floating_point():
        raise TypeError(f"{name}: logits are {logits.dtype}; give floating-point logits")
    C = logits.shape[1]
    if target.dim() == 4 and target.shape[1] not in (1, C):
        raise ValueError(f"{name}: {given}; give class indices (N, H, W), or labels for each of {C} classes")
    one = C == 1 and sums.activation == SIGMOID
    if target.dim() == 4 and target.shape[1] == 1 and not one and not (C == 1 and target.is_floating_point()):
        target = target[:, 0]
    elif target.dim() == 3 and one:
        target = target[:, None]
    if target.dim() == 3 and target.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name}: target is {target.dtype}; give class indices, uint8 or int8 to int64")
    if target.is_complex():
        raise TypeError(f"{name}: target is {target.dtype}; give labels 0 and 1, or probabilities")
    size = (target.shape[0], *target.shape[-2:])
    if pixel_weight is not None and (pixel_weight.shape != size or not pixel_weight.is_floating_point()):
        raise ValueError(
            f"{name}: pixel_weight is {tuple(pixel_weight.shape)}, {pixel_weight.dtype}; give a floating-point factor "
            f"for each pixel, {size}"
        )
    return target
