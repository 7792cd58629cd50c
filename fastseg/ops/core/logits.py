"""The map of logits in what a model returns."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


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
