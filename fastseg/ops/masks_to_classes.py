"""Class map of a mask classifier: of class scores and mask logits of queries."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastseg.kernels.runtime.ceilings import OWN_GEMM, OWN_LANES, Chip, chip_of
from fastseg.kernels.runtime.verdict import verdict
from fastseg.ops.core.dispatch import HAS_TRITON, followed, is_torchs, known, no_kernel, what_follows
from fastseg.ops.core.forms import Form, Forms, Reference, Verdict
from fastseg.ops.core.override import overridable
from fastseg.ops.core.register import register
from fastseg.ops.core.upsample import Factors, interpolate, is_finite, output_size, unsupported, upsampling
from fastseg.ops.cpu.masks_to_classes import classes_by_rows, classes_of_few, classes_of_scores_by_rows
from fastseg.ops.upsample_argmax import UINT8_CLASSES, upsample_argmax

if HAS_TRITON:
    from fastseg.kernels.runtime.tensors import tf32
    from fastseg.kernels.upsample.masks_to_classes import MOST_SUMS, masks_to_classes_fwd

NAME = "masks_to_classes"
Size = int | tuple[int, int] | None

# Values of the larger map, of queries or of classes, from which a CPU works in blocks of rows: fewer stay in caches. On
# two threads blocks take 0.8 of torch's steps from 64^2 pixels of 100 queries on; below, the steps with queries and
# classes innermost take 0.5 to 0.75 of them (19 and 150 classes, 32^2 pixels). Where the sums have a size of their own,
# torch's steps and ``upsample_argmax`` are as fast up to the second limit.
_LARGE, _LARGE_SCORED = 2**18, 2**20
SHARE_OPS = 24  # of a GPU's lanes for one sigmoid of an interpolated logit, four gathers included


@overridable
def masks_to_classes(
    class_scores: Tensor,
    mask_logits: Tensor,
    size: Size = None,
    scale_factor: float | tuple[float, float] | None = None,
    *,
    scores_size: Size = None,
    align_corners: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Class of each pixel of a mask classifier, ``argmax_k sum_q p[q, k] sigmoid(up(m_q))``, in little memory.

    ``p = class_scores.softmax(-1)[..., :-1]``, ``up`` a bilinear resize of the mask logits m. Neither the masks of the
    queries nor the sums of the classes are stored at full size. All dtypes are computed in fp32; on a GPU, products of
    fp16 and bf16 masks are of fp16 numbers.

    Args:
        class_scores: (N, Q, K + 1), floating point, logits; the last class is "no object".
        mask_logits: (N, Q, h, w), floating point, any layout.
        size: output height and width in pixels, or one number for both.
        scale_factor: output pixels per pixel of the masks; give exactly one of ``size`` and ``scale_factor``.
        scores_size: where the sums over queries are taken: the masks are resized to it, and the sums from it to the
            output's size. None: at the output's size, with one resize. Mask2Former's processor in transformers has
            (384, 384), MaskFormer's and OneFormer's the size of the masks.
        align_corners: of every resize, as in ``torch.nn.functional.interpolate``.
        dtype: uint8 or int64; None means uint8 for up to 256 classes, else int64.

    Returns:
        Class indices (N, H, W), 0 to K - 1. Among equal sums the first class wins. No gradient flows through them.

    Raises:
        TypeError: an input is not floating point, or ``dtype`` is neither uint8 nor int64.
        ValueError: shapes do not match, or there is no query, class or pixel; both or neither of ``size`` and
            ``scale_factor`` are given, or one is not positive; ``dtype`` is uint8 for more than 256 classes; the inputs
            are on different devices.

    Reference: Cheng et al., Per-Pixel Classification is Not All You Need, arXiv:2107.06278, section 3.4.
    """
    check_queries(NAME, class_scores, mask_logits)
    classes = class_scores.shape[2] - 1
    if dtype is None:
        dtype = torch.uint8 if classes <= UINT8_CLASSES else torch.int64
    if dtype not in (torch.uint8, torch.int64):
        raise TypeError(f"{NAME}: dtype is {dtype}; use torch.uint8 or torch.int64")
    if dtype == torch.uint8 and classes > UINT8_CLASSES:
        raise ValueError(f"{NAME}: {classes} classes do not fit uint8; use dtype=torch.int64")
    H, W, factors = output_size(NAME, mask_logits, size, scale_factor)
    at = None if scores_size is None else output_size(NAME, mask_logits, scores_size, None)[:2]
    at = None if at == (H, W) else at
    masks, p = mask_logits.detach(), probabilities(class_scores.detach(), mask_logits)
    args = (p, masks, at, H, W, factors, align_corners, dtype)
    classes_map: Tensor = FORMS.decide(_request(*args[:5]), masks).run(*args)
    return classes_map


def masks_to_classes_ref(
    class_scores: Tensor,
    mask_logits: Tensor,
    size: Size = None,
    scale_factor: float | tuple[float, float] | None = None,
    *,
    scores_size: Size = None,
    align_corners: bool = False,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """``masks_to_classes`` in torch's own lines."""
    H, W, factors = output_size(NAME, mask_logits, size, scale_factor)
    at = None if scores_size is None else output_size(NAME, mask_logits, scores_size, None)[:2]
    p = probabilities(class_scores, mask_logits)
    return _lines(p, mask_logits, at, H, W, factors, align_corners, dtype)


def check_queries(name: str, class_scores: Tensor, mask_logits: Tensor) -> None:
    """Raise unless these are class scores and mask logits of the same queries."""
    given = f"{name}: class scores are {tuple(class_scores.shape)}, mask logits {tuple(mask_logits.shape)}; "
    matching = class_scores.dim() == 3 and mask_logits.dim() == 4 and class_scores.shape[:2] == mask_logits.shape[:2]
    if not matching or class_scores.shape[1] == 0 or class_scores.shape[2] < 2:
        raise ValueError(f"{given}give (N, Q, K + 1) and (N, Q, h, w) with Q and K > 0")
    for what, t in (("class scores", class_scores), ("mask logits", mask_logits)):
        if not t.is_floating_point():
            raise TypeError(f"{name}: {what} are {t.dtype}; give floating-point logits")
    if class_scores.device != mask_logits.device:
        raise ValueError(f"{name}: tensors on {class_scores.device} and {mask_logits.device}; move them to one device")


def probabilities(class_scores: Tensor, mask_logits: Tensor) -> Tensor:
    """(N, Q, K + 1) -> (N, Q, K), "no object" left out, in the dtype to compute in."""
    kind = torch.float32
    if not class_scores.dtype == mask_logits.dtype == kind:
        kind = torch.promote_types(torch.promote_types(class_scores.dtype, mask_logits.dtype), kind)
        class_scores = class_scores.to(kind)
    return class_scores.softmax(-1)[..., :-1]


def _sums(p: Tensor, masks: Tensor, H: int, W: int, factors: Factors, align_corners: bool) -> Tensor:
    """Sums over queries with masks resized to (H, W): (N, K, H, W)."""
    shares = interpolate(masks.to(p.dtype), H, W, factors, align_corners).sigmoid()
    return torch.einsum("nqk,nqhw->nkhw", p, shares)


def _lines(
    p: Tensor, masks: Tensor, at: tuple[int, int] | None, H: int, W: int, factors: Factors, align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if at is None:
        return _sums(p, masks, H, W, factors, align_corners).argmax(1).to(dtype)
    sums = _sums(p, masks, *at, (0.0, 0.0), align_corners)
    return interpolate(sums, H, W, (0.0, 0.0), align_corners).argmax(1).to(dtype)


# --- forms


class Request(NamedTuple):
    """What decides between the forms."""

    N: int
    Q: int
    K: int
    pixels: int  # of an image of the output
    scored: bool  # whether the sums have a size of their own
    dtype: torch.dtype
    kernel: str  # why no kernel runs, or ""
    tf32: bool
    chip: Chip | None  # None in a graph, whose sizes are unknown: its op asks when it runs
    cpu: bool  # and nothing follows
    large: bool  # of a CPU
    finite: bool  # looked at where it decides


def _request(p: Tensor, masks: Tensor, at: tuple[int, int] | None, H: int, W: int) -> Request:
    scored, dtype = at is not None, masks.dtype
    if is_torchs(masks) and is_torchs(p):  # small calls take a CPU less time than more questions
        why, cpu, sizes = "CPU tensor", True, (*p.shape, H * W)
    else:
        follows = what_follows(masks, p)
        why, sizes = no_kernel(masks) or follows, known(*p.shape, H * W)
        if not sizes or follows:
            return Request(0, 0, 0, 0, scored, dtype, why, False, None, False, False, False)
        why, cpu = why or unsupported(masks, H, W), masks.is_cpu and not followed(masks, p)
    N, Q, K, pixels = sizes
    large = cpu and (N * K * pixels >= _LARGE_SCORED if scored else N * max(Q, K) * pixels >= _LARGE)
    finite = large and bool(why) and is_finite(masks) and is_finite(p)
    halved = not why and tf32(dtype, masks.device)
    return Request(N, Q, K, pixels, scored, dtype, why, halved, chip_of(masks.device), cpu, large, finite)


class _Kernel(Form):
    name = "kernel"

    def __init__(self, run: Callable[..., Any]):
        self.run = run  # type: ignore[method-assign]

    def refuses(self, r: Request) -> str:
        return r.kernel or ("the sums have a size of their own" if r.scored else "")

    def cost(self, r: Request) -> Verdict | None:
        """Beside torch's steps: up, sigmoid, product, argmax, which write and read the values between them."""
        if r.chip is None:
            return None
        values = r.N * r.pixels
        products = 2 * values * r.Q * r.K / r.chip.dot(r.dtype, tf32=r.tf32)
        own = products / (OWN_LANES if r.dtype == torch.float32 and not r.tf32 else OWN_GEMM)
        own += SHARE_OPS * values * r.Q * -(-r.K // MOST_SUMS) / r.chip.lanes + r.chip.launch
        between = r.dtype.itemsize * values * (4 * r.Q + 2 * r.K) / r.chip.bandwidth
        steps = products + between + 4 * r.chip.launch
        taken = "one launch" if own < steps else "steps"
        return verdict(own < steps, "own kernel", own, "torch's steps", steps, taken, r.chip.described)


def _registered(
    p: Tensor, masks: Tensor, at: None, H: int, W: int, factors: Factors, align_corners: bool, dtype: torch.dtype
) -> Tensor:
    classes: Tensor = _op(p, masks, H, W, *factors, align_corners, dtype == torch.int64)
    return classes


class Rows(Form):
    """On a CPU, in blocks of rows on threads: for large and finite values; ``run`` is of the op."""

    name, path = "rows", "torch"

    def refuses(self, r: Any) -> str:
        if not r.cpu:
            return "not on a CPU"
        return "" if not r.large or r.finite else "NaN or infinity"

    def cost(self, r: Any) -> Verdict:
        return Verdict(r.large, None, "few values: they stay in the caches")


class _ClassRows(Rows):
    def run(
        self, p: Tensor, masks: Tensor, at: tuple[int, int] | None, H: int, W: int, factors: Factors,
        align_corners: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        if at is None:
            return classes_by_rows(p, masks, H, W, factors, align_corners, dtype)
        return classes_of_scores_by_rows(p, masks, at, H, W, align_corners, dtype)


class _Few(Form):
    """On a CPU, torch's steps with queries and classes innermost: for what stays in the caches."""

    name, path = "few", "torch"

    def refuses(self, r: Request) -> str:
        if not r.cpu or r.large:
            return "more values than stay in a CPU's caches" if r.cpu else "not on a CPU"
        return "the sums have a size of their own" if r.scored else ""

    def run(
        self, p: Tensor, masks: Tensor, at: tuple[int, int] | None, H: int, W: int, factors: Factors,
        align_corners: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        return classes_of_few(p, masks, H, W, factors, align_corners, dtype)


def _steps(
    p: Tensor, masks: Tensor, at: tuple[int, int] | None, H: int, W: int, factors: Factors, align_corners: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Torch's lines, an image at a time if nothing follows; sums of their own size go through ``upsample_argmax``."""
    if at is not None:
        sums = _sums(p, masks, *at, (0.0, 0.0), align_corners)
        return cast(Tensor, upsample_argmax(sums, (H, W), align_corners=align_corners, dtype=dtype))
    args = (at, H, W, factors, align_corners, dtype)
    if followed(p, masks) or p.shape[0] < 2:
        return _lines(p, masks, *args)
    return torch.cat([_lines(q, m, *args) for q, m in zip(p.split(1), masks.split(1), strict=True)])


FORMS = Forms(NAME, [_Kernel(_registered), _ClassRows(), _Few(), Reference(_steps)])


# --- the registered op


def _launch(
    p: Tensor, masks: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool
):
    p = p.to(torch.float16 if masks.dtype.itemsize == 2 else masks.dtype).contiguous()
    up = upsampling(masks, H, W, (factor_h, factor_w), align_corners)
    return masks_to_classes_fwd(masks, p, up, torch.int64 if wide else torch.uint8)


def _plain(p: Tensor, masks: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool):
    return _lines(p, masks, None, H, W, (factor_h, factor_w), align_corners, torch.int64 if wide else torch.uint8)


def _fake(p: Tensor, masks: Tensor, H: int, W: int, factor_h: float, factor_w: float, align_corners: bool, wide: bool):
    return masks.new_empty((masks.shape[0], H, W), dtype=torch.int64 if wide else torch.uint8)


_op = register(
    "masks_to_classes(Tensor p, Tensor masks, SymInt H, SymInt W, float factor_h, float factor_w, bool align_corners, "
    "bool wide) -> Tensor",
    _launch, _plain, _fake, forms=Forms(NAME, [_Kernel(_launch), Reference(_plain)], backward=True),
    request=lambda p, masks, H, W, *_: _request(p, masks, None, H, W), asked=True,
)  # fmt: skip
