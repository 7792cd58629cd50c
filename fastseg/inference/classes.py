"""Class maps of any model: its own ``predict`` for ours, else the argmax of its logits."""

from itertools import chain

import torch
from torch import Tensor, nn

from fastseg.ops.logits import classes_of


def class_map(model: nn.Module, x: Tensor, *, confidence: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Class indices of ``model`` at each pixel of x (N, C, H, W).

    fastseg's models have ``predict``. Of any other the logits' argmax is taken, whatever its own ``predict`` may be:
    the output itself, ``output.logits`` (Hugging Face), ``output["out"]`` (torchvision) or ``output["logits"]``, or
    the first of several outputs. Logits of another size than ``x`` are interpolated to it bilinearly, as
    ``torch.nn.functional.interpolate(logits, x.shape[2:], mode="bilinear")``. One channel of logits, as binary nets
    give it, is class 1 where it is above 0, a probability of more than 0.5, and else class 0.

    Returns:
        (N, H, W), uint8 for up to 256 classes, else int64. With ``confidence`` a pair: it, and the probability of each
        pixel's class, (N, H, W) float32.

    Raises:
        TypeError: the output holds no logits (N, classes, h, w).
    """
    if is_ours(model):
        return model.predict(x, confidence=True) if confidence else model.predict(x)
    return classes_of(model(x), tuple(x.shape[-2:]), type(model).__name__, confidence=confidence)


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer is; the CPU if there is none."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def is_ours(model: nn.Module) -> bool:
    """True if the model's ``predict`` is fastseg's."""
    predict = getattr(type(model), "predict", None)
    return "predict" not in vars(model) and getattr(predict, "__module__", "").split(".")[0] == "fastseg"
