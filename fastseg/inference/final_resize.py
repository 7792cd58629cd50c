"""Classes from the small logits of any model: its last resize is not computed.

Many models end in a bilinear resize to the size of the image. While such a model runs here, the result of each bilinear
``interpolate`` is a stand-in that is computed once somebody uses it. What the model returns unused is its final resize,
and the small logits in front of it are all that the class map, or a loss, needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastseg import ops
from fastseg.inference.classes import class_map, is_ours
from fastseg.inference.mask_queries import queries_of, semantic_maps
from fastseg.ops.core.torch_private import tree_map_only
from fastseg.ops.logits import logits_of


class Logits(NamedTuple):
    """``F.interpolate(small, size, mode="bilinear", align_corners=align_corners)`` are a model's logits."""

    small: Tensor
    size: tuple[int, int]
    align_corners: bool


class _Resized(Tensor):
    """Stands for an interpolated map; any use but a question for its kind and size computes it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _QUESTIONS and type(args[0]) is _Resized:
            return func(args[0].kind, *args[1:], **kwargs)
        args, kwargs = tree_map_only(_Resized, _computed, (args, kwargs))
        return func(*args, **kwargs)


_QUESTIONS = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.is_cuda.__get__,
    Tensor.requires_grad.__get__, Tensor.layout.__get__, Tensor.size, Tensor.dim, Tensor.numel,
    Tensor.is_floating_point,
}  # fmt: skip


def _computed(stand_in: _Resized) -> Tensor:
    parts = vars(stand_in)
    if parts["full"] is None:
        parts["full"] = F.interpolate(*parts["args"], **parts["kwargs"])
    return parts["full"]


class _Waiting(TorchFunctionMode):
    """Inside the block, a bilinear ``interpolate`` of a 4-D map gives a stand-in."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.interpolate or not _bilinear(*args, **kwargs):
            return func(*args, **kwargs)
        small = args[0] if args else kwargs["input"]
        out = F.interpolate(torch.empty(small.shape, device="meta"), *args[1:], **_but_input(kwargs)).shape
        stand_in = small.detach().as_subclass(_Resized)
        # as large as the result, of one element of memory
        vars(stand_in).update(args=args, kwargs=kwargs, full=None, kind=small.flatten()[:1].expand(out))
        return stand_in


def _but_input(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name != "input"}


def _bilinear(
    input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
) -> bool:
    plain = type(input) is Tensor and input.dim() == 4 and input.is_floating_point() and input.numel() > 0
    return plain and mode == "bilinear" and not antialias and (size is not None or _by_size(input, scale_factor))


def _by_size(input: Tensor, scale_factor) -> bool:
    """True if positions that follow the factor are those that follow the sizes: the factor gives whole sizes."""
    factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * 2
    return len(factors) == 2 and all(float(n * f).is_integer() for n, f in zip(input.shape[2:], factors, strict=True))


def final_logits(model: nn.Module, *args: Any, **kwargs: Any) -> Logits:
    """Run a model, and return its logits before the final resize; differentiable.

    For losses on small logits: ``small, size, corners = final_logits(model, x)``, then
    ``fastseg.ops.upsample_cross_entropy(small, target, align_corners=corners)`` where ``size`` is that of the target.

    Args:
        model: any; its output as in ``fastseg.inference.classes.class_map``.
        args, kwargs: what it is called with.

    Returns:
        ``Logits``; of a model that does not end in a bilinear resize, its logits with their own size.

    Raises:
        TypeError: the output holds no logits (N, classes, h, w).
    """
    with _Waiting():
        output = model(*args, **kwargs)
    found = logits_of(output)
    if found is None:
        raise TypeError(f"final_logits: {type(model).__name__} returns no logits (N, classes, H, W); wrap it")
    if type(found) is not _Resized:
        return Logits(found, tuple(found.shape[2:]), False)
    parts = vars(found)
    if parts["full"] is not None:  # used, and perhaps written to
        return Logits(parts["full"], tuple(parts["full"].shape[2:]), False)
    small = parts["args"][0] if parts["args"] else parts["kwargs"]["input"]
    return Logits(
        small, tuple(found.shape[2:]), bool(_align_corners(*parts["args"][1:], **_but_input(parts["kwargs"])))
    )


def _align_corners(size=None, scale_factor=None, mode="nearest", align_corners=None, *rest, **options) -> bool | None:
    return align_corners


def picture_logits(model: nn.Module, x: Tensor) -> Logits:
    """As ``final_logits``, of the size of ``x`` in any case, and of at least two channels: one gets a 0 for class 0.

    Logits of another size than ``x`` are to be interpolated to it, as Hugging Face's SegFormer leaves to its users.
    """
    small, size, corners = final_logits(model, x)
    if size != tuple(x.shape[-2:]):
        if size != tuple(small.shape[2:]):  # resized, but not to the image: the two resizes are not one
            small = F.interpolate(small, size, mode="bilinear", align_corners=corners)
        size, corners = tuple(x.shape[-2:]), False
    if small.shape[1] == 1:
        small = torch.cat([torch.zeros_like(small), small], 1)
    return Logits(small, size, corners)


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Class of each pixel of ``x``: the argmax of the model's logits, whose full size is never made.

    A model that ends in a bilinear resize (torchvision's, Hugging Face's, eight of SMP's architectures, converted or
    not) gives classes from the logits in front of it, through ``fastseg.ops.upsample_argmax``. Logits of another size
    than ``x`` are interpolated to it, as Hugging Face's SegFormer leaves to its users. fastseg's own models have
    ``predict``. The model runs in the mode it is in, without gradients.

    Args:
        model: any; its output as in ``fastseg.inference.classes.class_map``. One channel of logits is class 1 where it
            is above 0.
        x: (N, C, H, W).

    Returns:
        (N, H, W), uint8 for up to 256 classes, else int64.

    Raises:
        TypeError: the output holds no logits (N, classes, h, w).
    """
    with torch.no_grad():
        if is_ours(model):
            return class_map(model, x)
        small, size, corners = picture_logits(model, x)
        return ops.upsample_argmax(small, size, align_corners=corners)


def post_process_semantic_segmentation(
    outputs: Any,
    target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
    *,
    size: Mapping[str, int | None] | None = None,
    family: str | None = None,
) -> list[Tensor]:
    """As the method of Hugging Face's image processors, with the same maps; full-size logits are never made.

    Args:
        outputs: has ``logits``, (N, classes, h, w), as a model for semantic segmentation returns; or
            ``class_queries_logits`` and ``masks_queries_logits``, as Mask2Former, MaskFormer, OneFormer and EoMT do.
        target_sizes: (height, width) of each image, in pixels; None keeps the size of the logits.
        size: of EoMT's processor, {"shortest_edge": s, "longest_edge": l}; None: 640 and 640.
        family: of outputs with queries, "mask2former", "maskformer", "oneformer" or "eomt"; None: by their type.

    Returns:
        A map (height, width) of int64 for each image.

    Raises:
        ValueError: there are not as many sizes as images; the family is unknown.
        TypeError: there are no logits (N, classes, h, w), or the family cannot be told from the type.
    """
    if queries_of(outputs) is not None:
        return semantic_maps(outputs, target_sizes, family, size)
    logits = logits_of(outputs)
    if logits is None:
        raise TypeError(
            f"post_process_semantic_segmentation: {type(outputs).__name__} has no logits (N, classes, h, w)"
        )
    if target_sizes is None:
        return list(logits.argmax(1))
    sizes = target_sizes.tolist() if isinstance(target_sizes, Tensor) else target_sizes
    if len(sizes) != len(logits):
        raise ValueError(f"post_process_semantic_segmentation: {len(logits)} images and {len(sizes)} target_sizes")
    each = zip(logits.split(1), sizes, strict=True)
    return [ops.upsample_argmax(one, tuple(size), dtype=torch.int64)[0] for one, size in each]
