"""What Hugging Face's image processors make of a mask classifier's outputs, without masks or scores at full size.

Each family resizes elsewhere, and equal maps need the same steps:

    Mask2Former   masks to 384 x 384, sigmoid, sums over queries, these to the image
    EoMT          masks to the processor's size, then as above; panoptic: masks to the image too, then sigmoid
    MaskFormer    sigmoid, sums, these to the image
    OneFormer     the same, with antialiasing where the image is smaller than the masks
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg import ops

FAMILIES = ("mask2former", "maskformer", "oneformer", "eomt")
_MASK2FORMER_SIZE = (384, 384)
_EOMT_SIZE = {"shortest_edge": 640, "longest_edge": 640}
_EOMT_THRESHOLD = 0.8
_ROWS = 128  # of a map of queries that are looked up together

Sizes = Sequence[tuple[int, int]] | Tensor | None


def queries_of(outputs: Any) -> tuple[Tensor, Tensor] | None:
    """Class scores (N, Q, K + 1) and mask logits (N, Q, h, w) of a mask classifier's outputs, or None."""
    found = [getattr(outputs, name, None) for name in ("class_queries_logits", "masks_queries_logits")]
    scores, masks = found
    return (scores, masks) if isinstance(scores, Tensor) and isinstance(masks, Tensor) else None


def semantic_maps(
    outputs: Any, target_sizes: Sizes, family: str | None, size: Mapping[str, int | None] | None
) -> list[Tensor]:
    """The maps of ``post_process_semantic_segmentation`` for outputs with queries."""
    name = "post_process_semantic_segmentation"
    scores, masks = _given(name, outputs)
    family = _family(name, outputs, family)
    sizes = _sizes(name, target_sizes, None if _patches(outputs) else len(scores))
    at = _at(family, masks, size)
    if sizes is None:
        if family == "eomt":
            raise ValueError(f"{name}: target_sizes is None; EoMT needs the size of each image")
        return list(ops.masks_to_classes(scores, masks, at, dtype=torch.int64))
    if family == "eomt" and _patches(outputs):
        return _merged(scores, masks, _patches(outputs), sizes, at, size or _EOMT_SIZE)
    maps = []
    for one, m, target in zip(scores.split(1), masks.split(1), sizes, strict=True):
        if family == "oneformer" and _smaller(target, at):
            sums = F.interpolate(_sums(one, m), target, mode="bilinear", antialias=True)
            maps.append(sums[0].argmax(0))
        else:
            maps.append(ops.masks_to_classes(one, m, target, scores_size=at, dtype=torch.int64)[0])
    return maps


def post_process_panoptic_segmentation(
    outputs: Any,
    threshold: float | None = None,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: set[int] | None = None,
    target_sizes: Sizes = None,
    *,
    stuff_classes: Sequence[int] | None = None,
    size: Mapping[str, int | None] | None = None,
    family: str | None = None,
) -> list[dict[str, Any]]:
    """As the method of Hugging Face's image processors for mask classifiers, with the same segments.

    Only masks of the queries that are kept are looked at, and on a CPU none is stored at full size.

    Args:
        outputs: of Mask2Former, MaskFormer, OneFormer or EoMT: has ``class_queries_logits`` (N, Q, K + 1) and
            ``masks_queries_logits`` (N, Q, h, w).
        threshold: the least probability of a query's class; None: 0.5, and 0.8 for EoMT, as the processors have it.
        mask_threshold: from which a pixel is inside of a mask.
        overlap_mask_area_threshold: the share of its mask that a query must own to be a segment.
        label_ids_to_fuse: classes whose segments become one; for all but EoMT.
        target_sizes: (height, width) of each image, in pixels; None keeps the size of the masks; EoMT needs them.
        stuff_classes: as ``label_ids_to_fuse``, for EoMT.
        size: of EoMT's processor, {"shortest_edge": s, "longest_edge": l}; None: 640 and 640.
        family: "mask2former", "maskformer", "oneformer" or "eomt"; None: by the type of ``outputs``.

    Returns:
        For each image ``segmentation``, (height, width), ids of segments, and ``segments_info``: a list of ``id``,
        ``label_id``, ``score`` and, but for EoMT, ``was_fused``.

    Raises:
        TypeError: there are no queries, or the family cannot be told from the type.
        ValueError: there are not as many sizes as images; the family is unknown.
    """
    name = "post_process_panoptic_segmentation"
    scores, masks = _given(name, outputs)
    family = _family(name, outputs, family)
    eomt = family == "eomt"
    sizes = _sizes(name, target_sizes, len(scores))
    if eomt and sizes is None:
        raise ValueError(f"{name}: target_sizes is None; EoMT needs the size of each image")
    threshold = (_EOMT_THRESHOLD if eomt else 0.5) if threshold is None else threshold
    fused = set(stuff_classes or ()) if eomt else set(label_ids_to_fuse or ())
    at = _at(family, masks, size)
    best, labels = scores.softmax(-1).max(-1)
    results = []
    for i in range(len(scores)):
        target = at if sizes is None else sizes[i]
        kept = labels[i].ne(scores.shape[2] - 1) & (best[i] > threshold)
        if not kept.any():
            nothing = torch.full(target, -1.0, device="cpu")
            results.append({"segmentation": nothing, "segments_info": []})
            continue
        s, m = best[i][kept][None], masks[i][kept][None]
        if eomt:
            high, wide = _scaled(target, size or _EOMT_SIZE)
            m = F.interpolate(m, at, mode="bilinear")[:, :, :high, :wide]
            found = ops.masks_to_queries(s, m, target, threshold=mask_threshold, weighted=False)
        elif family == "oneformer" and _smaller(target, at):
            found = _antialiased(s, m, target, mask_threshold)
        else:
            found = ops.masks_to_queries(s, m, target, scores_size=at, threshold=mask_threshold)
        queries, inside, areas = (t[0] for t in found)
        label_list = labels[i][kept].tolist()
        score_list = [round(v, 6) for v in s[0].tolist()]
        ids, segments = _segments(
            queries, inside, areas, label_list, score_list, overlap_mask_area_threshold, fused, eomt
        )
        table = torch.tensor(ids, dtype=torch.int64 if eomt else torch.int32, device=queries.device)
        segmentation = torch.empty(queries.shape, dtype=table.dtype, device=table.device)
        for rows, q in zip(segmentation.split(_ROWS), queries.split(_ROWS), strict=True):
            rows.copy_(table[q.int()])
        segmentation = segmentation.masked_fill_(~inside, -1) if eomt else segmentation
        results.append({"segmentation": segmentation, "segments_info": segments})
    return results


def _segments(
    queries: Tensor, inside: Tensor, areas: Tensor, labels: list[int], scores: list[float], least: float,
    fused: set[int], eomt: bool,
) -> tuple[list[int], list[dict[str, Any]]]:  # fmt: skip
    """The id of each query's segment, that of pixels in none where it has none, and what is said of each segment."""
    Q = len(labels)
    rows = list(zip(queries.split(_ROWS), inside.split(_ROWS), strict=True))  # counting widens to int64
    owned = sum((torch.bincount(q.flatten(), minlength=Q) for q, _ in rows), torch.zeros_like(areas))
    final = sum((torch.bincount(q[i], minlength=Q) for q, i in rows), torch.zeros_like(areas)) if eomt else owned
    shares = (owned / areas).tolist()  # in fp32, as the processors divide
    columns = zip(owned.tolist(), areas.tolist(), final.tolist(), shares, strict=True)
    exists = [o > 0 and area > 0 and f > 0 and share > least for o, area, f, share in columns]
    ids, segments, first_of = [-1 if eomt else 0] * Q, [], dict[int, int]()
    current = 0
    for q, label in enumerate(labels):
        if not exists[q]:
            continue
        known = first_of.get(label)
        if eomt:
            if known is not None:
                ids[q] = known
                continue
            ids[q] = current
            segments.append({"id": current, "label_id": label, "score": scores[q]})
            if label in fused:
                first_of[label] = current
            current += 1
        else:
            current = current + 1 if known is None else known  # as the processors count, who go on from a known one
            ids[q] = current
            fuse = label in fused
            segments.append({"id": current, "label_id": label, "was_fused": fuse, "score": scores[q]})
            if fuse:
                first_of[label] = current
    return ids, segments


def _given(name: str, outputs: Any) -> tuple[Tensor, Tensor]:
    found = queries_of(outputs)
    if found is None:
        raise TypeError(f"{name}: {type(outputs).__name__} has no class_queries_logits and masks_queries_logits")
    return found[0].detach(), found[1].detach()


def _family(name: str, outputs: Any, family: str | None) -> str:
    if family is None:
        of_type = type(outputs).__name__.lower()
        family = next((known for known in FAMILIES if of_type.startswith(known)), None)
        if family is None:
            raise TypeError(f"{name}: {type(outputs).__name__} names no family; give family, one of {FAMILIES}")
    if family not in FAMILIES:
        raise ValueError(f"{name}: family is {family!r}; use one of {', '.join(FAMILIES)}")
    return family


def _sizes(name: str, target_sizes: Sizes, images: int | None) -> list[tuple[int, int]] | None:
    if target_sizes is None:
        return None
    given = target_sizes.tolist() if isinstance(target_sizes, Tensor) else target_sizes
    sizes = [(int(h), int(w)) for h, w in given]
    if images is not None and len(sizes) != images:
        raise ValueError(f"{name}: {images} images and {len(sizes)} target_sizes")
    return sizes


def _at(family: str, masks: Tensor, size: Mapping[str, int | None] | None) -> tuple[int, int]:
    """Where the family takes the sigmoid."""
    if family == "mask2former":
        return _MASK2FORMER_SIZE
    if family == "eomt":
        edges = size or _EOMT_SIZE
        short = edges["shortest_edge"]
        assert short is not None
        return short, edges["longest_edge"] or short
    return tuple(masks.shape[2:])  # type: ignore[return-value]


def _smaller(target: tuple[int, int], low: tuple[int, int]) -> bool:
    """Whether antialiasing changes the resize: along one axis at least the output is smaller."""
    return target[0] < low[0] or target[1] < low[1]


def _sums(scores: Tensor, masks: Tensor) -> Tensor:
    return torch.einsum("nqk,nqhw->nkhw", scores.softmax(-1)[..., :-1], masks.sigmoid())


def _antialiased(s: Tensor, m: Tensor, target: tuple[int, int], threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """``masks_to_queries`` of sigmoids that are resized with antialiasing: an output smaller than the masks."""
    weights = F.interpolate(m.sigmoid(), target, mode="bilinear", antialias=True) * s[:, :, None, None]
    owner = weights.argmax(1, keepdim=True)
    within = weights >= threshold
    return owner[:, 0], within.gather(1, owner)[:, 0], within.sum((2, 3))


# --- EoMT: patches of an image, and images padded to a square


def _patches(outputs: Any) -> Any:
    return getattr(outputs, "patch_offsets", None)


def _scaled(image: tuple[int, int], size: Mapping[str, int | None]) -> tuple[int, int]:
    """Height and width of an image whose shorter edge is resized to ``size``'s, the longer one to at most its."""
    height, width = image
    short, long = size["shortest_edge"], size["longest_edge"]
    assert short is not None
    exact: float = short
    if long is not None and max(image) / min(image) * short > long:
        exact = long * min(image) / max(image)
        short = round(exact)
    if min(image) == short:
        return image
    if width < height:
        return int(exact * height / width), short
    return short, int(exact * width / height)


def _merged(
    scores: Tensor, masks: Tensor, patches: Sequence[Sequence[int]], sizes: list[tuple[int, int]],
    at: tuple[int, int], size: Mapping[str, int | None],
) -> list[Tensor]:  # fmt: skip
    """Maps of images that were cut into patches along their longer edge: sums are averaged where patches overlap."""
    maps = []
    for i, image in enumerate(sizes):
        total = scores.new_zeros((scores.shape[2] - 1, *_scaled(image, size)))
        count = scores.new_zeros((1, *total.shape[1:]))
        for n, (owner, start, stop) in enumerate(patches):
            if owner == i:
                part = F.interpolate(masks[n : n + 1], at, mode="bilinear")
                axis = 1 if image[0] > image[1] else 2
                total.narrow(axis, start, stop - start).add_(_sums(scores[n : n + 1], part)[0])
                count.narrow(axis, start, stop - start).add_(1)
        maps.append(ops.upsample_argmax((total / count.clamp_(min=1))[None], image, dtype=torch.int64)[0])
    return maps
