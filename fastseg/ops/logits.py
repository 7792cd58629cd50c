"""The map of logits in what a model returns, and its classes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastseg.ops.upsample_argmax import upsample_argmax


def logits_of(output: Any) -> Tensor | None:
    """The map of logits (N, classes, h, w) in a model's output, or None.

    The output itself, ``output.logits`` (Hugging Face), ``output["out"]`` (torchvision) or ``output["logits"]``, or the
    first of several outputs.
    """
    if isinstance(output, Tensor):
        return output if output.dim() == 4 and output.is_floating_point() else None
    if isinstance(getattr(output, "logits", None), Tensor):
        return logits_of(output.logits)
    if isinstance(output, Mapping):
        return next((logits_of(output[name]) for name in ("out", "logits") if name in output), None)
    if isinstance(output, tuple | list) and output:
        return logits_of(output[0])
    return None


def classes_of(
    output: Any, size: tuple[int, int], name: str, *, confidence: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The class map (N, H, W) of the logits in a model's output, interpolated bilinearly to ``size`` (H, W).

    One channel of logits is class 1 where it is above 0. ``confidence`` as in ``fastseg.ops.upsample_argmax``.

    Args:
        name: of the model, for the error.

    Raises:
        TypeError: the output holds no logits.
    """
    logits = logits_of(output)
    if logits is None:
        raise TypeError(f"class_map: {name} returns no logits (N, classes, H, W); wrap it")
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    return upsample_argmax(logits, size, confidence=confidence)
