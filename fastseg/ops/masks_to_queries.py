"""The query that owns each pixel of a mask classifier: what panoptic segmentation is made of."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseg.ops.core.dispatch import followed
from fastseg.ops.core.forms import Forms, Reference
from fastseg.ops.core.override import overridable
from fastseg.ops.core.upsample import interpolate, is_finite, output_size
from fastseg.ops.cpu.masks_to_queries import queries_by_rows
from fastseg.ops.masks_to_classes import Rows

NAME = "masks_to_queries"
Size = int | tuple[int, int] | None

_LARGE = 2**18  # values of all queries at the output's size, from which a CPU works in blocks of rows
_UINT8_QUERIES = 256


@overridable
def masks_to_queries(
    query_scores: Tensor,
    mask_logits: Tensor,
    size: Size,
    *,
    scores_size: Size = None,
    align_corners: bool = False,
    threshold: float = 0.5,
    weighted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Owner of each pixel, ``argmax_q s[q] sigmoid(up(m_q))``, and the area of every query's own mask.

    ``up`` is a bilinear resize. On a CPU the masks are walked in blocks of rows, and none is stored at full size;
    elsewhere torch's own lines take one image at a time. All dtypes are computed in fp32.

    Args:
        query_scores: s, (N, Q), floating point: the probability of each query's class.
        mask_logits: m, (N, Q, h, w), floating point.
        size: output height and width in pixels, or one number for both.
        scores_size: where the sigmoid is taken: the masks are resized to it, and their sigmoid from it to ``size``.
            None: at the output's size, with one resize.
        align_corners: of every resize, as in ``torch.nn.functional.interpolate``.
        threshold: from which a pixel counts as inside of a mask.
        weighted: compare ``s[q] sigmoid(up(m_q))`` with the threshold; else ``sigmoid(up(m_q))``.

    Returns:
        queries: (N, H, W), uint8 for up to 256 queries, else int64; among equals the first wins.
        inside: (N, H, W), bool, whether the pixel is inside of its owner's mask.
        areas: (N, Q), int64, pixels inside of each query's mask, whoever owns them.
        No gradient flows through them.

    Raises:
        TypeError: an input is not floating point.
        ValueError: shapes do not match, there is no query or pixel, or the inputs are on different devices.

    Reference: Cheng et al., Per-Pixel Classification is Not All You Need, arXiv:2107.06278, section 3.4.
    """
    matching = query_scores.dim() == 2 and mask_logits.dim() == 4 and query_scores.shape == mask_logits.shape[:2]
    if not matching or query_scores.shape[1] == 0:
        raise ValueError(
            f"{NAME}: query scores are {tuple(query_scores.shape)}, mask logits {tuple(mask_logits.shape)}; "
            "give (N, Q) and (N, Q, h, w) with Q > 0"
        )
    for what, t in (("query scores", query_scores), ("mask logits", mask_logits)):
        if not t.is_floating_point():
            raise TypeError(f"{NAME}: {what} are {t.dtype}; give floating point")
    if query_scores.device != mask_logits.device:
        raise ValueError(f"{NAME}: tensors on {query_scores.device} and {mask_logits.device}; move them to one device")
    H, W, _ = output_size(NAME, mask_logits, size, None)
    at = None if scores_size is None else output_size(NAME, mask_logits, scores_size, None)[:2]
    at = None if at == (H, W) else at
    scores, masks = query_scores.detach(), mask_logits.detach()
    scores = scores.to(torch.promote_types(torch.promote_types(scores.dtype, masks.dtype), torch.float32))
    dtype = torch.uint8 if scores.shape[1] <= _UINT8_QUERIES else torch.int64
    args = (at, H, W, align_corners, threshold, weighted, dtype)
    if followed(masks, scores):
        return _lines(scores, masks, *args)
    return FORMS(_request(scores, masks, H, W), scores, masks, *args, recorded=masks)


def masks_to_queries_ref(
    query_scores: Tensor,
    mask_logits: Tensor,
    size: Size,
    *,
    scores_size: Size = None,
    align_corners: bool = False,
    threshold: float = 0.5,
    weighted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``masks_to_queries`` in torch's own lines."""
    H, W, _ = output_size(NAME, mask_logits, size, None)
    at = None if scores_size is None else output_size(NAME, mask_logits, scores_size, None)[:2]
    return _lines(query_scores, mask_logits, at, H, W, align_corners, threshold, weighted, torch.int64)


def _lines(
    scores: Tensor, masks: Tensor, at: tuple[int, int] | None, H: int, W: int, align_corners: bool, threshold: float,
    weighted: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shares = interpolate(masks.to(scores.dtype), *(at or (H, W)), (0.0, 0.0), align_corners).sigmoid()
    shares = shares if at is None else interpolate(shares, H, W, (0.0, 0.0), align_corners)
    weights = shares * scores[:, :, None, None]
    owner = weights.argmax(1, keepdim=True)
    within = (weights if weighted else shares) >= threshold
    return owner[:, 0].to(dtype), within.gather(1, owner)[:, 0], within.sum((2, 3))


# --- forms


class Request(NamedTuple):
    """What decides between the forms."""

    cpu: bool
    large: bool
    finite: bool  # looked at where it decides


def _request(scores: Tensor, masks: Tensor, H: int, W: int) -> Request:
    large = masks.is_cpu and scores.numel() * H * W >= _LARGE
    return Request(masks.is_cpu, large, large and is_finite(masks) and is_finite(scores))


class _QueryRows(Rows):
    def run(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return queries_by_rows(*args)


def _steps(scores: Tensor, masks: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Torch's lines, one image at a time."""
    if scores.shape[0] < 2:
        return _lines(scores, masks, *args)
    images = zip(scores.split(1), masks.split(1), strict=True)
    parts = zip(*(_lines(s, m, *args) for s, m in images), strict=True)
    return tuple(torch.cat(part) for part in parts)


FORMS = Forms(NAME, [_QueryRows(), Reference(_steps)])
