"""The confusion matrix against a loop over pixels, and its conventions."""

import math

import numpy as np
import pytest
import torch

from fastseg.metrics import ConfusionMatrix, median_frequency_weights


def loop_matrix(pred, target, num_classes, ignore_index):
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    for p, t in zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != ignore_index:
            matrix[t, p] += 1
    return matrix


def loop_scores(matrix, undefined, without=None):
    """Scores by their definitions, class by class; ``undefined`` is the value of 0/0, ``without`` a class with none."""
    classes = range(len(matrix))
    ratio = lambda a, b: a / b if b else undefined
    tp = [matrix[c][c] for c in classes]
    fn = [sum(matrix[c]) - tp[c] for c in classes]
    fp = [sum(row[c] for row in matrix) - tp[c] for c in classes]
    iou = [ratio(tp[c], tp[c] + fp[c] + fn[c]) for c in classes]
    precision = [ratio(tp[c], tp[c] + fp[c]) for c in classes]
    recall = [ratio(tp[c], tp[c] + fn[c]) for c in classes]
    iou, precision, recall = (
        [math.nan if c == without else value for c, value in zip(classes, column, strict=True)]
        for column in (iou, precision, recall)
    )
    total = matrix.sum()
    present = [c for c in classes if tp[c] + fn[c]]

    def mean(values):
        known = [v for v in values if not math.isnan(v)]
        return sum(known) / len(known) if known else math.nan

    return {
        "pixel_accuracy": ratio(sum(tp), total),
        "mean_pixel_accuracy": mean(recall),
        "mean_iou": mean(iou),
        "frequency_weighted_iou": ratio(sum((tp[c] + fn[c]) * iou[c] for c in present), total),
        "mean_precision": mean(precision),
        "mean_recall": mean(recall),
        "iou": iou,
        "precision": precision,
        "recall": recall,
        "pixels": [tp[c] + fn[c] for c in classes],
    }


def assert_scores(scores, want):
    for name, value in want.items():
        got = getattr(scores, name)
        got = got.tolist() if isinstance(got, torch.Tensor) else got
        assert got == pytest.approx(value, rel=1e-12, nan_ok=True), name


@pytest.mark.parametrize("absent", ["nan", "zero", "one"])
@pytest.mark.parametrize("ignore_index", [None, 255, 2])
def test_equals_loop(absent, ignore_index, device):
    """Six classes: 3 is never the truth, 4 never predicted, 5 neither, so each convention shows in each score."""
    confusion = ConfusionMatrix(6, ignore_index=ignore_index)
    want = np.zeros((6, 6), dtype=np.int64)
    for shape in [(2, 13, 7), (1, 5, 5)]:
        target = torch.tensor([0, 1, 2, 4])[torch.randint(4, shape)]
        if ignore_index == 255:
            target[:, :2] = 255
        pred = torch.randint(4, shape, dtype=torch.uint8)
        confusion.update(pred.to(device), target.to(device, torch.int16))
        want += loop_matrix(pred, target, 6, ignore_index)
    assert confusion.matrix.tolist() == want.tolist()
    undefined = {"nan": math.nan, "zero": 0.0, "one": 1.0}[absent]
    assert_scores(confusion.compute(absent), loop_scores(want, undefined, without=ignore_index))


def test_by_hand():
    confusion = ConfusionMatrix(3)
    confusion.update(pred=torch.tensor([0, 0, 1, 1]), target=torch.tensor([0, 1, 1, 1]))
    assert confusion.matrix.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    scores = confusion.compute()
    assert scores.iou[:2].tolist() == [1 / 2, 2 / 3]
    assert scores.iou[2].isnan()
    assert scores.mean_iou == pytest.approx(7 / 12)
    assert scores.frequency_weighted_iou == pytest.approx((1 * 1 / 2 + 3 * 2 / 3) / 4)
    assert scores.mean_pixel_accuracy == pytest.approx((1 + 2 / 3) / 2)
    assert scores.mean_precision == pytest.approx((1 / 2 + 1) / 2)
    assert confusion.compute("zero").mean_iou == pytest.approx(7 / 18)
    assert confusion.compute("one").mean_iou == pytest.approx(13 / 18)


@pytest.mark.parametrize("absent", ["nan", "zero", "one"])
def test_nothing_counted(absent):
    confusion = ConfusionMatrix(2, ignore_index=255)
    confusion.update(torch.zeros(0, 4, 4, dtype=torch.int64), torch.zeros(0, 4, 4, dtype=torch.int64))
    confusion.update(torch.zeros(1, 4, 4, dtype=torch.int64), torch.full((1, 4, 4), 255))
    assert_scores(confusion.compute(absent), loop_scores(np.zeros((2, 2), dtype=np.int64), float(
        {"nan": "nan", "zero": 0, "one": 1}[absent]
    )))  # fmt: skip


def test_counts_are_exact_integers():
    """2^53 + 1 is not a double, and 2^24 + 1 not a float."""
    confusion = ConfusionMatrix(1)
    confusion._counts[0] = 2**53
    confusion.update(torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8))
    assert confusion.matrix.item() == 2**53 + 1


def test_reset():
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0, 1]), torch.tensor([1, 1]))
    confusion.reset()
    assert confusion.matrix.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("pred", "target", "values"),
    [
        ([0, 0, 2], [0, 3, 255], "target 0 to 3"),
        ([0, 1, 2], [0, -1, 2], "target -1 to 2"),
        ([0, 3, 2], [0, 1, 2], "pred 0 to 3"),
        ([0, -4, 2], [0, 1, 2], "pred -4 to 2"),
    ],
)
def test_index_out_of_range(pred, target, values, device):
    """Raised at once on the CPU with nothing counted, at the next look elsewhere."""
    confusion = ConfusionMatrix(3, ignore_index=255)
    pred, target = torch.tensor(pred, device=device), torch.tensor(target, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"{values}.*classes are 0 to 2, ignore_index is 255"):
            confusion.update(pred, target)
        assert confusion.matrix.sum() == 0
    else:
        confusion.update(pred, target)
        with pytest.raises(ValueError, match="were out of range; classes are 0 to 2, ignore_index is 255"):
            confusion.compute()


def test_prediction_at_an_ignored_pixel_is_not_looked_at():
    confusion = ConfusionMatrix(2, ignore_index=255)
    confusion.update(torch.tensor([0, 200], dtype=torch.uint8), torch.tensor([0, 255], dtype=torch.uint8))
    assert confusion.matrix.tolist() == [[1, 0], [0, 0]]


def test_device_without_a_look():
    """The path that other devices take counts the same, and reports a bad index when the scores are asked for."""

    class Elsewhere(ConfusionMatrix):
        def update(self, pred, target):
            bins = self._bins(pred.flatten().long(), target.flatten().long())
            self._counts.scatter_add_(0, bins, torch.ones_like(bins))

    confusion, want = Elsewhere(3, ignore_index=255), ConfusionMatrix(3, ignore_index=255)
    pred, target = torch.randint(3, (50,)), torch.randint(3, (50,))
    target[:9] = 255
    confusion.update(pred, target)
    want.update(pred, target)
    assert torch.equal(confusion.matrix, want.matrix)
    confusion.update(torch.tensor([3, 0]), torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="1 target and 1 pred values were out of range"):
        confusion.compute()


def test_an_ignored_class_is_left_out_of_the_means():
    """As torchmetrics' jaccard index does: 0.75, where the class with IoU 0 would make it 0.5."""
    confusion = ConfusionMatrix(3, ignore_index=0)
    confusion.update([1, 0, 2, 2, 1], [1, 1, 2, 2, 0])
    for absent in ("nan", "zero", "one"):
        scores = confusion.compute(absent)
        assert scores.mean_iou == pytest.approx(0.75) and scores.iou.tolist()[1:] == [0.5, 1.0]
        assert math.isnan(scores.iou[0]) and math.isnan(scores.precision[0]) and math.isnan(scores.recall[0])
        assert scores.mean_recall == pytest.approx(0.75) and scores.mean_precision == 1.0
        assert scores.frequency_weighted_iou == pytest.approx((2 * 0.5 + 2 * 1.0) / 4)
        assert scores.pixel_accuracy == 0.75


def test_frequency_weighted_by_hand():
    """A class that is only predicted has no pixels, so no weight; its false positives lower the others' IoU."""
    confusion = ConfusionMatrix(3)
    confusion.update(np.array([0, 0, 0, 1, 2, 0]), np.array([0, 0, 0, 1, 1, 1]))
    scores = confusion.compute("one")
    assert scores.iou.tolist() == pytest.approx([3 / 4, 1 / 3, 0])
    assert scores.frequency_weighted_iou == pytest.approx((3 * 3 / 4 + 3 * 1 / 3) / 6)


@pytest.mark.parametrize(
    "as_given",
    [list, tuple, np.array, lambda v: np.array(v, np.uint16), lambda v: np.array(v, np.uint64), torch.tensor,
     lambda v: torch.tensor(v, dtype=torch.uint8), lambda v: [np.int32(x) for x in v]],
    ids=["list", "tuple", "array", "uint16", "uint64", "tensor", "uint8", "numpy integers"],
)  # fmt: skip
def test_whatever_holds_integers_is_counted(as_given):
    confusion = ConfusionMatrix(np.int64(3), ignore_index=np.uint8(255))
    confusion.update(as_given([0, 1, 2, 2]), as_given([0, 2, 2, 255]))
    assert confusion.matrix.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    confusion.update(np.int64(1), 1)  # one pixel
    assert confusion.matrix[1, 1] == 1
    with pytest.raises(ValueError, match="pred 0 to 9"):
        confusion.update(as_given([0, 9]), as_given([0, 1]))


@pytest.mark.parametrize("values", [[0.0, 1.0], np.array([0.5, 1]), ["a", "b"], [[0], [0, 1]], None], ids=str)
def test_what_holds_no_integers_is_refused(values):
    with pytest.raises(TypeError, match="pred is"):
        ConfusionMatrix(2).update(values, [0, 1])
    with pytest.raises(TypeError, match=r"num_classes is 2\.5"):
        ConfusionMatrix(2.5)
    with pytest.raises(TypeError, match="ignore_index is 'void'"):
        ConfusionMatrix(2, ignore_index="void")


def test_bad_arguments():
    confusion = ConfusionMatrix(2)
    with pytest.raises(ValueError, match=r"pred is \(1, 2, 4, 4\), target is \(1, 4, 4\).*argmax"):
        confusion.update(torch.zeros(1, 2, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"pred is torch\.float32"):
        confusion.update(torch.zeros(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="absent is 'ignore'; use one of nan, zero, one"):
        confusion.compute("ignore")
    with pytest.raises(ValueError, match="num_classes is 0"):
        ConfusionMatrix(0)


def test_table():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]))
    lines = str(confusion.compute()).splitlines()
    assert lines[0].split() == ["class", "IoU", "precision", "recall", "pixels"]
    assert lines[2].split() == ["1", "0.6667", "1.0000", "0.6667", "3"]
    assert lines[3].split() == ["2", "nan", "nan", "nan", "0"]
    assert lines[4].split() == ["mean", "0.5833", "0.7500", "0.8333", "4"]
    assert lines[5] == "pixel accuracy 0.7500, mPA 0.8333, mIoU 0.5833, FWIoU 0.6250"
    named = confusion.compute().table(["sky", "a longer name", "car"]).splitlines()
    assert named[2].split() == ["a", "longer", "name", *lines[2].split()[1:]]
    assert len({len(line) for line in named[:5]}) == 1


def test_median_frequency_weights_by_hand():
    """Class 0 in both images, 6 of 16 pixels; 1 in the first, 4 of 8; 2 in the second, 2 of 8; the rest is ignored."""
    first = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 9]], dtype=torch.uint8)
    second = torch.tensor([[0, 0, 0, 2], [2, 9, 9, 9]], dtype=torch.uint8)
    weights = median_frequency_weights([first, second], 4, ignore_index=9)
    frequencies = [6 / 16, 4 / 8, 2 / 8]
    torch.testing.assert_close(weights, torch.tensor([*(6 / 16 / f for f in frequencies), 0.0]))
    even = median_frequency_weights([first[:, :3]], 2)  # two classes: the median is between them
    torch.testing.assert_close(even, torch.tensor([1.0, 1.0]))
    loss = torch.nn.functional.cross_entropy(torch.randn(1, 4, 2, 4), first[None].long(), weights, ignore_index=9)
    assert loss.isfinite()


def test_median_frequency_weights_refuses():
    image = torch.tensor([[0, 1], [2, 255]])
    with pytest.raises(ValueError, match=r"target 2 has values 0 to 255; classes are 0 to 2, ignore_index is None"):
        median_frequency_weights([image[:1], image], 3)
    with pytest.raises(TypeError, match=r"target 1 is torch.float32"):
        median_frequency_weights([image.float()], 3)
    with pytest.raises(ValueError, match="no targets were given"):
        median_frequency_weights([], 3)


def test_frequency_weighted_iou_by_hand():
    """Weighted by the pixels of the target, not of the prediction; a class that no target holds has no weight."""
    confusion = ConfusionMatrix(4)
    confusion.update(torch.tensor([0, 0, 0, 1, 2, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2]))
    scores = confusion.compute()
    # IoU: 3/5, 2/4, 2/4, none; pixels of the target: 5, 3, 2
    assert scores.frequency_weighted_iou == pytest.approx((5 * 3 / 5 + 3 * 2 / 4 + 2 * 2 / 4) / 10)
    for absent in ("zero", "one"):
        assert confusion.compute(absent).frequency_weighted_iou == pytest.approx(0.55)
    confusion.update(torch.tensor([3, 3]), torch.tensor([0, 0]))  # predicted alone: it takes from class 0
    assert confusion.compute().frequency_weighted_iou == pytest.approx((7 * 3 / 7 + 3 * 2 / 4 + 2 * 2 / 4) / 12)
