"""Instance masks of boxes in the image: what a mask head's outputs become."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.forms import Form, Forms, Reference
from fastseg.ops.core.override import overridable
from fastseg.ops.cpu.threads import each

NAME = "paste_masks"


@overridable
def paste_masks(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], *, padding: int = 1, threshold: float | None = None
) -> Tensor:
    """Resize each mask to its box and paste it into an image of zeros, as torchvision's ``paste_masks_in_image``.

    On a CPU the result is written once, box by box on all threads, with equal values; torchvision writes each image,
    and stacks them in a second pass. Elsewhere the masks are resized by products with two matrices that hold the
    positions of the boxes: nothing waits for the device.

    Args:
        masks: (N, 1, m, m), floating point: probabilities of N instances.
        boxes: (N, 4), x0, y0, x1, y1 in pixels of the image.
        size: height and width of the image, in pixels.
        padding: zeros around each mask, in its own pixels; its box grows with it.
        threshold: give whether a value is at least this, in a quarter of the memory; None gives the values.

    Returns:
        (N, 1, H, W) of the masks' dtype; bool with ``threshold``. No gradient flows.

    Raises:
        TypeError: ``masks`` or ``boxes`` is not floating point.
        ValueError: shapes do not match, the image has no pixel, or ``padding`` is negative.

    Reference: He et al., Mask R-CNN, arXiv:1703.06870; ``torchvision.models.detection.roi_heads``.
    """
    if masks.dim() != 4 or masks.shape[1] != 1 or masks.shape[2] != masks.shape[3] or boxes.shape != (len(masks), 4):
        raise ValueError(
            f"{NAME}: masks are {tuple(masks.shape)}, boxes {tuple(boxes.shape)}; give (N, 1, m, m) and (N, 4)"
        )
    for what, t in (("masks", masks), ("boxes", boxes)):
        if not t.is_floating_point():
            raise TypeError(f"{NAME}: {what} are {t.dtype}; give floating point")
    H, W = size
    if H < 1 or W < 1 or masks.shape[2] == 0 or padding < 0:
        raise ValueError(f"{NAME}: size is {size}, masks are {tuple(masks.shape)}, padding is {padding}; "
                         "give pixels, and a padding of at least 0")  # fmt: skip
    masks, boxes = masks.detach(), boxes.detach()
    whole = _grown(boxes, masks.shape[2], padding)
    padded = F.pad(masks, (padding,) * 4)
    args = (padded, whole, H, W, threshold)
    if followed(masks, boxes):
        return _by_taps(*args)
    return FORMS(Request(masks.is_cpu, len(masks)), *args, recorded=masks)


def paste_masks_ref(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], *, padding: int = 1, threshold: float | None = None
) -> Tensor:
    """``paste_masks`` in torch's own lines, one image a mask."""
    H, W = size
    whole = _grown(boxes, masks.shape[2], padding)
    padded = F.pad(masks, (padding,) * 4)
    images = [torch.zeros(H, W, dtype=masks.dtype, device=masks.device) for _ in padded]
    for image, mask, box in zip(images, padded, whole.tolist(), strict=True):
        _paste(image, mask, box, None)
    full = torch.stack(images)[:, None] if images else masks.new_empty((0, 1, H, W))
    return full if threshold is None else full >= threshold


def _grown(boxes: Tensor, side: int, padding: int) -> Tensor:
    """Boxes of padded masks, in whole pixels, both ends included."""
    scale = (side + 2 * padding) / side
    x0, y0, x1, y1 = boxes.unbind(1)
    half_w, half_h = (x1 - x0) * 0.5 * scale, (y1 - y0) * 0.5 * scale
    x, y = (x1 + x0) * 0.5, (y1 + y0) * 0.5
    return torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], 1).to(torch.int64)


def _paste(image: Tensor, mask: Tensor, box: list[int], threshold: float | None) -> None:
    """Write one mask (1, m, m) into its image (H, W)."""
    (H, W), (x0, y0, x1, y1) = image.shape, box
    left, right, top, bottom = max(x0, 0), min(x1 + 1, W), max(y0, 0), min(y1 + 1, H)
    if left < right and top < bottom:
        full = F.interpolate(mask[None], (y1 - y0 + 1, x1 - x0 + 1), mode="bilinear", align_corners=False)[0, 0]
        part = full[top - y0 : bottom - y0, left - x0 : right - x0]
        image[top:bottom, left:right] = part if threshold is None else part >= threshold


# --- forms


class Request(NamedTuple):
    """What decides between the forms."""

    cpu: bool
    N: int


class _Boxes(Form):
    """On a CPU, each box on a thread of its own."""

    name, path = "boxes", "torch"

    def refuses(self, r: Request) -> str:
        if not r.cpu:
            return "not on a CPU"
        return "" if r.N else "no box"

    def run(self, padded: Tensor, whole: Tensor, H: int, W: int, threshold: float | None) -> Tensor:
        shape = (len(padded), 1, H, W)
        if threshold is None:
            out = torch.zeros(shape, dtype=padded.dtype, device="cpu")
        else:
            out = torch.full(shape, threshold <= 0, device="cpu")  # of the zeros around
        boxes = whole.tolist()
        each(lambda n: _paste(out[n, 0], padded[n], boxes[n], threshold), range(len(boxes)))
        return out


def _by_taps(padded: Tensor, whole: Tensor, H: int, W: int, threshold: float | None) -> Tensor:
    """Two columns of the mask for each column of the image, then two rows for each row; 0 outside of the box.

    The last step writes two images a mask and adds one to the other in place. A product of matrices writes one, and
    brings NaN from any pixel of a mask to all pixels of its image.
    """
    kind = torch.promote_types(padded.dtype, torch.float32)
    x0, y0, x1, y1 = whole.unbind(1)
    columns, inside_x = _interpolated(padded[:, 0].to(kind).transpose(1, 2), x0, x1, W)
    full, inside_y = _interpolated(columns.transpose(1, 2), y0, y1, H)
    full = full.masked_fill_(~(inside_y[:, :, None] & inside_x[:, None]), 0)[:, None]
    return full.to(padded.dtype) if threshold is None else full >= threshold


def _interpolated(rows: Tensor, start: Tensor, end: Tensor, full: int) -> tuple[Tensor, Tensor]:
    """(N, low, m) -> (N, full, m), in the pixels of the image, and which of these (N, full) lie within the box."""
    low = rows.shape[1]
    o = torch.arange(full, device=start.device)[None]
    scale = low / (end - start + 1).clamp(min=1).to(rows.dtype)
    source = ((o - start[:, None] + 0.5) * scale[:, None] - 0.5).clamp(min=0)
    first = source.long().clamp(max=low - 1)
    weight = (source - first).clamp(max=1)[..., None]
    taken = lambda index: rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
    values = taken(first).mul_(1 - weight).add_(taken((first + 1).clamp(max=low - 1)).mul_(weight))
    return values, (o >= start[:, None]) & (o <= end[:, None])


FORMS = Forms(NAME, [_Boxes(), Reference(_by_taps)])
