"""Confusion matrix, and the segmentation scores computed from it."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastseg.ops.core.pairs import add_pairs, no_pairs
from fastseg.ops.masks_to_classes import masks_to_classes
from fastseg.ops.upsample_confusion import upsample_confusion

ArrayLike = Tensor | np.ndarray | Sequence | int
Absent = Literal["nan", "zero", "one"]
ABSENT: dict[str, float] = {"nan": float("nan"), "zero": 0.0, "one": 1.0}


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a confusion matrix, as fractions; ``str()`` and ``table(names)`` give a table.

    Attributes:
        pixel_accuracy: correct pixels / pixels.
        mean_pixel_accuracy: mPA, the mean over classes of correct pixels / pixels of the class; equals ``mean_recall``.
        mean_iou: mIoU, the mean of ``iou``.
        frequency_weighted_iou: FWIoU, the mean of ``iou`` weighted by the pixels of each class in the target.
        mean_precision: the mean of ``precision``.
        mean_recall: the mean of ``recall``.
        iou: (C,) float64, TP / (TP + FP + FN).
        precision: (C,) float64, TP / (TP + FP).
        recall: (C,) float64, TP / (TP + FN).
        pixels: (C,) int64, pixels of each class in the target.
    """

    pixel_accuracy: float
    mean_pixel_accuracy: float
    mean_iou: float
    frequency_weighted_iou: float
    mean_precision: float
    mean_recall: float
    iou: Tensor
    precision: Tensor
    recall: Tensor
    pixels: Tensor

    def __str__(self) -> str:
        return self.table([str(index) for index in range(len(self.iou))])

    def table(self, names: Sequence[str]) -> str:
        """As ``str()``, with class names in place of indices."""
        width = max(8, *map(len, names))
        lines = [f"{'class':>{width}}{'IoU':>10}{'precision':>12}{'recall':>10}{'pixels':>14}"]
        columns = (self.iou.tolist(), self.precision.tolist(), self.recall.tolist(), self.pixels.tolist())
        means = ("mean", self.mean_iou, self.mean_precision, self.mean_recall, int(self.pixels.sum()))
        for name, iou, precision, recall, pixels in [*zip(names, *columns, strict=True), means]:
            lines.append(f"{name:>{width}}{iou:>10.4f}{precision:>12.4f}{recall:>10.4f}{pixels:>14}")
        lines.append(
            f"pixel accuracy {self.pixel_accuracy:.4f}, mPA {self.mean_pixel_accuracy:.4f}, "
            f"mIoU {self.mean_iou:.4f}, FWIoU {self.frequency_weighted_iou:.4f}"
        )
        return "\n".join(lines)


class ConfusionMatrix:
    """Exact int64 counts of (target class, predicted class), gathered batch by batch.

    Args:
        num_classes: classes, background included.
        ignore_index: target value whose pixels are not counted, whatever was predicted there. If it is one of the
            classes, that class has no scores: pixels of other classes predicted as it are wrong, and the means leave it
            out, as torchmetrics does.

    Raises:
        TypeError: a number is not an integer.
        ValueError: ``num_classes`` is less than one.

    Example:
        >>> confusion = ConfusionMatrix(num_classes=2, ignore_index=255)
        >>> confusion.update(pred=torch.tensor([[0, 1, 1]]), target=torch.tensor([[0, 0, 255]]))
        >>> confusion.compute().pixel_accuracy
        0.5
    """

    def __init__(self, num_classes: int, *, ignore_index: int | None = None):
        num_classes = _integer("num_classes", num_classes)
        ignore_index = None if ignore_index is None else _integer("ignore_index", ignore_index)
        if num_classes < 1:
            raise ValueError(f"ConfusionMatrix: num_classes is {num_classes}; at least one class is needed")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Reset all counts to 0."""
        # The C x C counts, then one each for ignored pixels, targets out of range and predictions out of range.
        self._counts = torch.zeros(self.num_classes**2 + 3, dtype=torch.int64, device="cpu")

    def update(
        self,
        pred: ArrayLike | None = None,
        target: ArrayLike | None = None,
        *,
        logits: Tensor | None = None,
        class_scores: Tensor | None = None,
        mask_logits: Tensor | None = None,
        scores_size: int | tuple[int, int] | None = None,
        align_corners: bool = False,
    ) -> None:
        """Count the pixels of a batch.

        Args:
            pred: predicted class indices, of any shape and integer dtype: a tensor, or an array, a list, a number.
            target: true class indices or ``ignore_index``, same shape and device; in place of ``pred`` with logits of
                any kind (N, H, W).
            logits: in place of ``pred``, (N, C, h, w) of any resolution; ``upsample_confusion`` counts their classes.
            class_scores: in place of ``pred``, with ``mask_logits``: of a mask classifier, (N, Q, C + 1), the last
                class "no object". ``masks_to_classes`` gives the classes of one image at a time.
            mask_logits: (N, Q, h, w) of any resolution.
            scores_size: where the sums over queries are taken, as in ``masks_to_classes``.
            align_corners: of the logits' interpolation.

        Raises:
            TypeError: they are not integers, rows differ in length, or not one prediction is given.
            ValueError: shapes or devices differ, or an index is out of range. On the CPU no pixel of the batch is then
                counted; on other devices, to avoid a synchronisation, ``compute`` and ``matrix`` raise instead.
        """
        queries = class_scores is not None or mask_logits is not None
        given = [pred is not None, logits is not None, queries]
        if sum(given) > 1 or (class_scores is None) != (mask_logits is None):
            names = ("pred", "logits", "class_scores", "mask_logits")
            here = [n for n, t in zip(names, (pred, logits, class_scores, mask_logits), strict=True) if t is not None]
            raise TypeError(
                f"ConfusionMatrix.update: {' and '.join(here)} given; give pred, or logits, or class_scores with "
                "mask_logits"
            )
        if logits is not None:
            self._add(logits, _indices("target", target), align_corners)
            return
        if class_scores is not None and mask_logits is not None:
            self._add_queries(class_scores, mask_logits, _indices("target", target), scores_size, align_corners)
            return
        pred, target = _indices("pred", pred), _indices("target", target)
        if pred.shape != target.shape:
            raise ValueError(
                f"ConfusionMatrix.update: pred is {tuple(pred.shape)}, target is {tuple(target.shape)}; "
                "both are class indices per pixel (logits need argmax(1) first)"
            )
        if pred.device != target.device:
            raise ValueError(f"ConfusionMatrix.update: pred is on {pred.device}, target on {target.device}")
        pred, target = pred.flatten().long(), target.flatten().long()
        bins = self._bins(pred, target)
        if bins.device.type == "cpu":
            counts = torch.bincount(bins, minlength=len(self._counts))
            if counts[-2:].any():
                raise ValueError(self._out_of_range(pred, target))
            self._counts = self._counts.cpu() + counts
        else:  # bincount would wait for the device
            self._counts = self._counts.to(bins.device)
            self._counts.scatter_add_(0, bins, torch.ones_like(bins))

    def _add(self, logits: Tensor, target: Tensor, align_corners: bool) -> None:
        self._same_device("logits", logits, target)
        C = self.num_classes
        try:
            counts = upsample_confusion(
                logits, target, C, ignore_index=self.ignore_index, align_corners=align_corners
            ).flatten()
        except IndexError as error:
            raise self._no_class(error) from None
        ignored = 0 if self.ignore_index is None else (target == self.ignore_index).sum()
        outside = target.numel() - ignored - counts.sum()  # of a GPU: the CPU has raised
        self._sum(counts, ignored, outside)

    def _add_queries(
        self, class_scores: Tensor, mask_logits: Tensor, target: Tensor, scores_size: Any, align_corners: bool
    ) -> None:
        self._same_device("mask logits", mask_logits, target)
        C, size = self.num_classes, tuple(target.shape[1:])
        if target.dim() != 3 or class_scores.dim() != 3 or len(target) != len(class_scores):
            raise ValueError(
                f"ConfusionMatrix.update: class scores are {tuple(class_scores.shape)}, target is "
                f"{tuple(target.shape)}; give (N, Q, C + 1) and (N, H, W)"
            )
        if class_scores.shape[2] > C + 1:
            raise ValueError(f"ConfusionMatrix.update: class scores of {class_scores.shape[2] - 1} classes; {self}")
        counts = no_pairs(C, mask_logits.device)
        options = {"scores_size": scores_size, "align_corners": align_corners}
        try:
            for i, labels in enumerate(target):
                classes = masks_to_classes(class_scores[i : i + 1], mask_logits[i : i + 1], size, **options)
                counts = add_pairs(counts, classes, labels, C, self.ignore_index)
        except IndexError as error:
            raise self._no_class(error) from None
        self._sum(counts[:-2], *counts[-2:])

    def _same_device(self, name: str, predicted: Tensor, target: Tensor) -> None:
        if predicted.device != target.device:
            raise ValueError(f"ConfusionMatrix.update: {name} are on {predicted.device}, target on {target.device}")

    def _no_class(self, error: IndexError) -> ValueError:
        return ValueError(
            f"ConfusionMatrix.update: {str(error).rstrip('.')}; classes are 0 to {self.num_classes - 1}, ignore_index "
            f"is {self.ignore_index}"
        )

    def _sum(self, counts: Tensor, ignored: Tensor | int, outside: Tensor) -> None:
        more = [torch.as_tensor(n, device=counts.device).view(1) for n in (ignored, outside, 0)]
        self._counts = self._counts.to(counts.device) + torch.cat([counts, *more])

    def _bins(self, pred: Tensor, target: Tensor) -> Tensor:
        """The entry of ``_counts`` that each pixel belongs to."""
        C = self.num_classes
        bins = target * C + pred
        bins = torch.where((pred < 0) | (pred >= C), C**2 + 2, bins)
        bins = torch.where((target < 0) | (target >= C), C**2 + 1, bins)
        return bins if self.ignore_index is None else torch.where(target == self.ignore_index, C**2, bins)

    def _out_of_range(self, pred: Tensor, target: Tensor) -> str:
        kept = torch.ones_like(target, dtype=torch.bool) if self.ignore_index is None else target != self.ignore_index
        found = [
            f"{name} {int(t[kept].min())} to {int(t[kept].max())}" for name, t in (("target", target), ("pred", pred))
        ]
        return (
            f"ConfusionMatrix.update: values are {' and '.join(found)}; "
            f"classes are 0 to {self.num_classes - 1}, ignore_index is {self.ignore_index}"
        )

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add the counts of ``other``.

        Raises:
            ValueError: it has other classes, or ignores another value.
        """
        if (other.num_classes, other.ignore_index) != (self.num_classes, self.ignore_index):
            raise ValueError(f"ConfusionMatrix.merge: {other} does not count what {self} counts")
        self._counts = self._counts.to(other._counts.device) + other._counts

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Sum the counts over the processes of ``torch.distributed``, in place, on every one of them.

        Call it once, after the last update and in every process: a second call would count everything again. Without an
        initialised process group it does nothing.
        """
        if dist.is_available() and dist.is_initialized():
            if dist.get_backend(group) == "nccl":
                self._counts = self._counts.cuda()  # a process without a single batch still holds them on the CPU
            dist.all_reduce(self._counts, group=group)

    @property
    def matrix(self) -> Tensor:
        """Counts (C, C), int64, on the CPU: entry [t, p] counts pixels of class t predicted as p.

        Raises:
            ValueError: an index out of range was counted on another device than the CPU.
        """
        counts = self._counts.cpu()
        bad_targets, bad_preds = counts[-2:].tolist()
        if bad_targets or bad_preds:
            raise ValueError(
                f"ConfusionMatrix: {bad_targets} target and {bad_preds} pred values were out of range; "
                f"classes are 0 to {self.num_classes - 1}, ignore_index is {self.ignore_index}"
            )
        return counts[:-3].view(self.num_classes, self.num_classes)

    def compute(self, absent: Absent = "nan") -> Scores:
        """Scores of everything counted so far.

        Args:
            absent: value of 0/0, as for the IoU of a class found in neither target nor prediction: "nan", which the
                means leave out (as in mmsegmentation), "zero" (as in the DeepLabV3+ article's code), or "one" (as
                segmentation_models_pytorch offers). The last two enter the means.

        Raises:
            ValueError: ``absent`` is none of the three, or an index out of range was counted.
        """
        if absent not in ABSENT:
            raise ValueError(f"ConfusionMatrix.compute: absent is {absent!r}; use one of {', '.join(ABSENT)}")
        matrix = self.matrix.double()  # exact up to 2^53 pixels
        undefined = ABSENT[absent]
        correct, in_target, in_pred = matrix.diag(), matrix.sum(1), matrix.sum(0)
        iou = _ratio(correct, in_target + in_pred - correct, undefined)
        precision = _ratio(correct, in_pred, undefined)
        recall = _ratio(correct, in_target, undefined)
        if self.ignore_index is not None and 0 <= self.ignore_index < self.num_classes:
            for column in (iou, precision, recall):
                column[self.ignore_index] = float("nan")  # for all values of ``absent``: it is not a class
        present = in_target > 0
        return Scores(
            pixel_accuracy=_ratio(correct.sum(), matrix.sum(), undefined).item(),
            mean_pixel_accuracy=recall.nanmean().item(),
            mean_iou=iou.nanmean().item(),
            frequency_weighted_iou=_ratio((in_target * iou)[present].sum(), matrix.sum(), undefined).item(),
            mean_precision=precision.nanmean().item(),
            mean_recall=recall.nanmean().item(),
            iou=iou,
            precision=precision,
            recall=recall,
            pixels=self.matrix.sum(1),
        )

    def __repr__(self) -> str:
        return f"ConfusionMatrix(num_classes={self.num_classes}, ignore_index={self.ignore_index})"


def _integer(name: str, value: object) -> int:
    try:
        return operator.index(value)  # numpy's and torch's integers too
    except TypeError:
        raise TypeError(f"ConfusionMatrix: {name} is {value!r}; give an integer") from None


def _indices(name: str, values: ArrayLike) -> Tensor:
    """Class indices as a tensor."""
    if not isinstance(values, Tensor):
        try:
            array = np.asarray(values)
        except ValueError as error:  # rows of different lengths
            raise TypeError(f"ConfusionMatrix.update: {name} is no array: {error}") from None
        if array.dtype.kind not in "iub" and array.size:
            raise TypeError(f"ConfusionMatrix.update: {name} is {array.dtype}; give integer class indices")
        if array.dtype == np.uint64:
            array = np.minimum(array, np.uint64(2**63 - 1))  # out of range all the same
        values = torch.from_numpy(np.array(array, np.int64))
    if values.is_floating_point() or values.is_complex():
        raise TypeError(f"ConfusionMatrix.update: {name} is {values.dtype}; give integer class indices")
    return values


def _ratio(numerator: Tensor, denominator: Tensor, undefined: float) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, undefined)


def median_frequency_weights(targets: Iterable[Tensor], num_classes: int, *, ignore_index: int | None = None) -> Tensor:
    """Class weights for the loss, ``median(f) / f_c``, by one pass over the training labels.

    f_c = pixels of class c / pixels of the images in which c occurs, ignored pixels of those images included.

    Args:
        targets: class indices of one image each, (H, W), of any integer dtype; a DataLoader's batches one by one.
        num_classes: classes, background included.
        ignore_index: a value that is not a class.

    Returns:
        (num_classes,) float32; 0 for a class that never occurs, since no pixel uses its weight.

    Raises:
        TypeError: a target is not of integers.
        ValueError: a value is neither a class nor ``ignore_index``, or there is no target.

    Reference: Eigen and Fergus, arXiv:1411.4734; used by SegNet, arXiv:1511.00561.
    """
    pixels, around = torch.zeros(2, num_classes, dtype=torch.int64, device="cpu")
    images = 0
    for images, target in enumerate(targets, 1):
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"median_frequency_weights: target {images} is {target.dtype}; give integer class indices")
        values = target.flatten().long()
        kept = values if ignore_index is None else values[values != ignore_index]
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < num_classes:
            raise ValueError(
                f"median_frequency_weights: target {images} has values {int(kept.min())} to {int(kept.max())}; classes "
                f"are 0 to {num_classes - 1}, ignore_index is {ignore_index}"
            )
        counts = torch.bincount(kept, minlength=num_classes).cpu()
        pixels += counts
        around += (counts > 0) * values.numel()
    if images == 0:
        raise ValueError("median_frequency_weights: no targets were given")
    present = pixels > 0
    frequency = pixels[present].double() / around[present]
    weights = torch.zeros(num_classes, device="cpu")
    weights[present] = (frequency.quantile(0.5) / frequency).float()
    return weights
