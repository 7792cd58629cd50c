"""The query that owns each pixel of a mask classifier: what panoptic segmentation is made of."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseg.kernels.runtime.ceilings import Chip, chip_of
from fastseg.kernels.runtime.verdict import Verdict, verdict
from fastseg.ops.core.dispatch import HAS_TRITON, followed, known, no_kernel, what_follows
from fastseg.ops.core.forms import Form, Forms, Reference
from fastseg.ops.core.override import overridable
from fastseg.ops.core.register import register
from fastseg.ops.core.upsample import interpolate, is_finite, output_size, unsupported, upsampling
from fastseg.ops.cpu.masks_to_queries import queries_by_rows
from fastseg.ops.masks_to_classes import SHARE_OPS, Rows

if HAS_TRITON:
    from fastseg.kernels.upsample.masks_to_queries import masks_to_queries_fwd

NAME = "masks_to_queries"
Size = int | tuple[int, int] | None

_LARGE = 2**18  # values of all queries at the output's size, from which a CPU works in blocks of rows
_UINT8_QUERIES = 256
_BYTES_BETWEEN = 30  # that torch's steps write and read for each value of a query at full size


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

    ``up`` is a bilinear resize. No mask is stored at full size: a CPU walks in blocks of rows, a GPU has one kernel.
    All dtypes are computed in fp32.

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
    args = (scores, masks, at, H, W, align_corners, threshold, weighted, dtype)
    found: tuple[Tensor, Tensor, Tensor] = FORMS.decide(_request(*args[:5]), masks).run(*args)
    return found


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
    shares = _shares(scores, masks, at or (H, W), align_corners)
    shares = shares if at is None else interpolate(shares, H, W, (0.0, 0.0), align_corners)
    weights = shares * scores[:, :, None, None]
    owner = weights.argmax(1, keepdim=True)
    within = (weights if weighted else shares) >= threshold
    return owner[:, 0].to(dtype), within.gather(1, owner)[:, 0], within.sum((2, 3))


def _shares(scores: Tensor, masks: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return interpolate(masks.to(scores.dtype), *size, (0.0, 0.0), align_corners).sigmoid()


# --- forms


class Request(NamedTuple):
    """What decides between the forms."""

    N: int
    Q: int
    pixels: int  # of an image of the output
    kernel: str  # why no kernel runs, or ""
    chip: Chip | None  # None in a graph, whose sizes are unknown: its op asks when it runs
    cpu: bool  # and nothing follows
    large: bool  # of a CPU
    finite: bool  # looked at where it decides


def _request(scores: Tensor, masks: Tensor, at: tuple[int, int] | None, H: int, W: int) -> Request:
    follows, sizes = what_follows(masks, scores), known(*scores.shape, H * W)
    why = no_kernel(masks) or follows
    if not sizes or follows:
        return Request(0, 0, 0, why, None, False, False, False)
    why, cpu = why or unsupported(masks, H, W), masks.is_cpu and not followed(masks, scores)
    large = cpu and math.prod(sizes) >= _LARGE
    finite = large and bool(why) and is_finite(masks) and is_finite(scores)
    N, Q, pixels = sizes
    return Request(N, Q, pixels, why, chip_of(masks.device), cpu, large, finite)


class _Kernel(Form):
    name = "kernel"

    def __init__(self, run: Callable[..., Any]):
        self.run = run  # type: ignore[method-assign]

    def refuses(self, r: Request) -> str:
        return r.kernel

    def cost(self, r: Request) -> Verdict | None:
        """Beside torch's steps: up, sigmoid, product, argmax, comparison and sum, which pass fp32 values on."""
        if r.chip is None:
            return None
        values = r.N * r.pixels * r.Q
        own = SHARE_OPS * values / r.chip.lanes + 2 * r.chip.launch
        steps = _BYTES_BETWEEN * values / r.chip.bandwidth + 7 * r.chip.launch
        taken = "one launch" if own < steps else "steps"
        return verdict(own < steps, "own kernel", own, "torch's steps", steps, taken, r.chip.described)


def _registered(
    scores: Tensor, masks: Tensor, at: tuple[int, int] | None, H: int, W: int, align_corners: bool, threshold: float,
    weighted: bool, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    sizes = (0, 0, H, W) if at is None else (*at, H, W)
    found: tuple[Tensor, ...] = _op(scores, masks, *sizes, align_corners, threshold, weighted, dtype == torch.int64)
    return found


class _QueryRows(Rows):
    def run(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return queries_by_rows(*args)


def _steps(scores: Tensor, masks: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Torch's lines, one image at a time where nothing follows."""
    if followed(scores, masks) or scores.shape[0] < 2:
        return _lines(scores, masks, *args)
    images = zip(scores.split(1), masks.split(1), strict=True)
    parts = zip(*(_lines(s, m, *args) for s, m in images), strict=True)
    return tuple(torch.cat(part) for part in parts)


FORMS = Forms(NAME, [_Kernel(_registered), _QueryRows(), Reference(_steps)])


# --- the registered op


def _arguments(
    scores: Tensor, masks: Tensor, at_h: int, at_w: int, H: int, W: int, align_corners: bool, threshold: float,
    weighted: bool, wide: bool,
) -> tuple[Any, ...]:  # fmt: skip
    at = None if isinstance(at_h, int) and at_h == 0 else (at_h, at_w)
    return scores, masks, at, H, W, align_corners, threshold, weighted, torch.int64 if wide else torch.uint8


def _launch(*args: Any) -> tuple[Tensor, ...]:
    scores, masks, at, H, W, align_corners, threshold, weighted, dtype = _arguments(*args)
    x = masks if at is None else _shares(scores, masks, at, align_corners)
    up = upsampling(x, H, W, (0.0, 0.0), align_corners)
    return masks_to_queries_fwd(x, scores.contiguous(), up, dtype, threshold, squash=at is None, weighted=weighted)


def _plain(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _lines(*_arguments(*args))


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    scores, masks, _, H, W, *_, dtype = _arguments(*args)
    shape = (masks.shape[0], H, W)
    return (masks.new_empty(shape, dtype=dtype), masks.new_empty(shape, dtype=torch.bool),
            masks.new_empty(scores.shape, dtype=torch.int64))  # fmt: skip


_op = register(
    f"{NAME}(Tensor scores, Tensor masks, SymInt at_h, SymInt at_w, SymInt H, SymInt W, bool align_corners, "
    "float threshold, bool weighted, bool wide) -> (Tensor, Tensor, Tensor)",
    _launch, _plain, _fake, forms=Forms(NAME, [_Kernel(_launch), Reference(_plain)], backward=True),
    request=lambda *args: _request(*_arguments(*args)[:5]), asked=True,
)  # fmt: skip
