"""Choose the depth of a UNet++ for a data set: score and time its levels, and take the smallest that is good enough."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastseg.metrics import ConfusionMatrix
from fastseg.models.unetplusplus import UNetPlusPlus


@dataclass(frozen=True)
class Level:
    """A level's scores.

    Attributes:
        level: 1 to the model's ``levels``, or None for the whole net as it was given.
        mean_iou: mean IoU over all data, without classes that are in neither target nor prediction.
        parameters: number of parameters.
        seconds: time for all class maps, without reading the data.
    """

    level: int | None
    mean_iou: float
    parameters: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Pruned:
    """What ``auto_prune`` chose; ``str()`` gives a table.

    Attributes:
        model: the pruned net, in evaluation mode; the model itself if no level is within the tolerance.
        level: its level; None if it is the model itself.
        tolerance: as given.
        levels: a row for each level, the smallest first, then the whole net.
        pictures: number of pictures in the data.
    """

    model: UNetPlusPlus
    level: int | None
    tolerance: float
    levels: tuple[Level, ...]
    pictures: int

    def __str__(self) -> str:
        lines = [f"{'net':>8}{'mIoU':>10}{'to whole':>10}{'parameters':>13}{'ms a picture':>14}"]
        whole = self.levels[-1]
        for row in self.levels:
            name = "whole" if row.level is None else f"L{row.level}"
            lines.append(
                f"{name:>8}{row.mean_iou:>10.4f}{row.mean_iou - whole.mean_iou:>+10.4f}{row.parameters:>13,}"
                f"{1e3 * row.seconds / self.pictures:>14.2f}" + ("  <- chosen" if row.level == self.level else "")
            )
        return "\n".join(lines)


def auto_prune(
    model: UNetPlusPlus,
    data: Iterable[tuple[Tensor, Tensor]],
    tolerance: float = 0.01,
    *,
    ignore_index: int | None = None,
) -> Pruned:
    """Find the smallest level of a UNet++ whose mean IoU is within ``tolerance`` of the whole net's.

    This is the article's choice of the level "by the difficulty of the test set": a shallow net is enough for easy
    data. ``model.prune(level)`` computes the logits of that level's head, so nothing is trained again. Data that chose
    the level is no test any more: score the result on other data.

    Args:
        model: trained with ``deep_supervision=True``; its mode and weights stay as they are. As "whole" it is scored in
            its own ``mode``: with "accurate", the mean of its heads.
        data: batches of images (N, in_channels, H, W), as the model takes them, and class indices (N, H, W); read once.
            They are moved to the model's device.
        tolerance: the mean IoU that may be lost, as a fraction: 0.01 is one point.
        ignore_index: label value that is not counted.

    Raises:
        TypeError: the model is not a ``UNetPlusPlus``.
        ValueError: the model has one head, ``tolerance`` is negative or not finite, or no pixel of ``data`` has a
            class.

    Reference: Zhou et al., arXiv:1807.10165, figure 3.

    Example:
        >>> net = UNetPlusPlus(2, norm=True, widths=(4, 8, 8), deep_supervision=True)
        >>> pruned = auto_prune(net, [(torch.randn(1, 3, 16, 16), torch.zeros(1, 16, 16, dtype=torch.long))], 1.0)
        >>> pruned.level, len(pruned.levels)
        (1, 3)
    """
    if not isinstance(model, UNetPlusPlus):
        raise TypeError(f"auto_prune: model is a {type(model).__name__}; give a UNetPlusPlus")
    if not model.deep_supervision:
        raise ValueError("auto_prune: the model has one head; levels to choose from need deep_supervision=True")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"auto_prune: tolerance is {tolerance}; give a fraction of mean IoU, such as 0.01")
    training, device = model.training, next(model.parameters()).device
    classes = model.final1.out_channels
    nets: dict[int | None, UNetPlusPlus] = {level: model.prune(level).eval() for level in range(1, model.levels + 1)}
    nets[None] = model.eval()
    counts = {level: ConfusionMatrix(classes, ignore_index=ignore_index) for level in nets}
    seconds, pictures = dict.fromkeys(nets, 0.0), 0
    try:
        for image, target in data:
            image, target = image.to(device), target.to(device)
            pictures += len(image)
            for level, net in nets.items():
                began = time.perf_counter()
                predicted = _predicted(net, image)
                seconds[level] += time.perf_counter() - began
                counts[level].update(predicted, target)
    finally:
        model.train(training)
    if pictures == 0:
        raise ValueError("auto_prune: data is empty")
    rows = []
    for level, net in nets.items():
        size = sum(p.numel() for p in net.parameters())
        rows.append(Level(level, counts[level].compute().mean_iou, size, seconds[level]))
    whole = rows[-1].mean_iou
    if math.isnan(whole):
        raise ValueError(f"auto_prune: no pixel of the data has a class; ignore_index is {ignore_index}")
    enough = [row.level for row in rows[:-1] if row.mean_iou >= whole - tolerance]
    level = enough[0] if enough else None
    return Pruned(nets[level], level, tolerance, tuple(rows), pictures)


@torch.no_grad()
def _predicted(net: UNetPlusPlus, image: Tensor) -> Tensor:
    classes = net.predict(image)
    if classes.is_cuda:
        torch.cuda.synchronize(classes.device)
    return classes
