"""Score a model on a split, over all processes, without full-size logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastseg.inference.classes import is_ours
from fastseg.inference.final_resize import picture_logits
from fastseg.io.images import normalised
from fastseg.io.processes import Processes
from fastseg.io.progress import progress
from fastseg.metrics import ConfusionMatrix, Scores
from fastseg.models.base import SegmentationNet
from fastseg.training.batches import plain_errors
from fastseg.training.dataset import DatasetSpec


@dataclass(frozen=True)
class Evaluation:
    """Scores of a split, and (mean IoU, index) of its worst pictures, the worst first."""

    scores: Scores
    worst: list[tuple[float, int]]


class Listed:
    """Batches with a length, for the progress bar."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return plain_errors(self.loader)


def pixels(images: Tensor, device: torch.device) -> Tensor:
    """Convert (N, H, W, 3) uint8 to the models' input, (N, 3, H, W) float32, channels_last in memory."""
    return normalised(images.to(device, non_blocking=True).permute(0, 3, 1, 2).float())


def window(labels: Tensor, model: nn.Module) -> Tensor:
    """The labels of the pixels that have logits: the U-Net without padding leaves out a margin."""
    m = getattr(model, "margin", 0)
    return labels[..., m:-m, m:-m] if m else labels


def class_mapping(names: Sequence[str], spec: DatasetSpec) -> Tensor | None:
    """Map the model's classes to the data set's by name; None if the order is the same.

    Raises:
        ValueError: the two sets of names differ.
    """
    if tuple(names) == spec.classes:
        return None
    if sorted(names) != sorted(spec.classes):
        others = [name for name in names if name not in spec.classes]
        missing = [name for name in spec.classes if name not in names]
        raise ValueError(
            f"the weights are of {len(names)} classes, the data set has {len(spec.classes)}, and the names differ: "
            f"only the weights have {_few(others)}, only the data set has {_few(missing)}"
        )
    return torch.tensor([spec.classes.index(name) for name in names])


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "") or "none"


def answer(model: nn.Module, x: Tensor, mapping: Tensor | None = None) -> tuple[Tensor, bool]:
    """What ``ConfusionMatrix.update`` takes: logits (N, C, h, w) before their final resize to the size of the answer,
    or classes (N, H, W); and ``align_corners`` of the resize.

    Args:
        model: any, as for ``fastseg.predict``.
        x: (N, 3, H, W).
        mapping: as for ``evaluate``; logits get the data set's order.
    """
    if isinstance(model, SegmentationNet) and type(model).predict is SegmentationNet.predict:
        found, corners = model.logits(x), model.align_corners is not False
    elif is_ours(model):
        found, corners = model.predict(x), False
    else:
        found, _, corners = picture_logits(model, x)
    if mapping is None:
        return found, corners
    mapping = mapping.to(found.device)
    return (found[:, mapping.argsort()] if found.is_floating_point() else mapping[found.long()]), corners


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    spec: DatasetSpec,
    processes: Processes,
    *,
    amp: torch.dtype | None = None,
    worst: int = 0,
    mapping: Tensor | None = None,
    title: str = "evaluate",
    stop: Callable[[], object] = lambda: False,
) -> Evaluation:
    """Score a model on the batches of ``scoring_batches``; the model keeps its mode.

    Where the model's last step is a bilinear resize, classes are counted from the logits in front of it, by
    ``ConfusionMatrix.update(logits=...)``: neither logits of full size nor a class map of the batch is made.

    Args:
        model: any, as for ``fastseg.predict``, on the device of ``processes``.
        loader: this process's share.
        spec: of the labels.
        processes: their counts are summed; all of them get the result.
        amp: dtype of autocast; None means no autocast.
        mapping: (classes,) integer: entry i is the index in ``spec.classes`` of the model's class i; None means i.
        worst: number of pictures to name, those with the lowest mean IoU over the classes in them.
        title: of the progress bar.
        stop: called before each batch; if it returns True, the rest of this process's share is skipped.
    """
    counts = lambda: ConfusionMatrix(len(spec.classes), ignore_index=spec.ignore_index)
    total, each, training = counts(), [], model.training
    model.eval()
    for images, labels, indices in progress(Listed(loader), title, "batch", leave=False, shown=processes.first):
        if stop():
            break
        labels = window(labels, model).to(processes.device)
        with torch.autocast(processes.device.type, amp or torch.bfloat16, enabled=amp is not None):
            found, corners = answer(model, pixels(images, processes.device), mapping)
        kind = "logits" if found.is_floating_point() else "pred"
        for one, label, index in zip(found.split(1), labels.split(1), indices.tolist(), strict=True) if worst else ():
            alone = counts()
            alone.update(target=label, align_corners=corners, **{kind: one})
            each.append((alone.compute().mean_iou, index))
            total.merge(alone)
        if not worst:
            total.update(target=labels, align_corners=corners, **{kind: found})
    model.train(training)
    total.reduce()
    ranked = sorted(pair for pair in processes.gather(each) if not np.isnan(pair[0]))
    return Evaluation(total.compute(), ranked[:worst])


def report(evaluation: Evaluation, spec: DatasetSpec, names: list[str]) -> dict:
    """The scores as plain data for JSON; undefined scores are None."""
    scores, number = evaluation.scores, lambda value: None if np.isnan(value) else float(value)
    columns = (spec.classes, scores.iou.tolist(), scores.precision.tolist(), scores.recall.tolist())
    return {
        "pixel_accuracy": number(scores.pixel_accuracy),
        "mean_pixel_accuracy": number(scores.mean_pixel_accuracy),
        "mean_iou": number(scores.mean_iou),
        "frequency_weighted_iou": number(scores.frequency_weighted_iou),
        "classes": [
            {"name": name, "iou": number(iou), "precision": number(p), "recall": number(r), "pixels": count}
            for name, iou, p, r, count in zip(*columns, scores.pixels.tolist(), strict=True)
        ],
        "worst": [{"image": names[index], "mean_iou": value} for value, index in evaluation.worst],
    }
