"""Evaluation counts classes from small logits, as ``predict`` gives them, for models of anyone."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastseg
from fastseg.io.processes import Processes
from fastseg.metrics import ConfusionMatrix
from fastseg.models import create
from fastseg.training import evaluation
from fastseg.training.dataset import DatasetSpec

CLASSES = ("sky", "road", "car")
ALONE = Processes(torch.device("cpu"))


class Foreign(nn.Module):
    """Ends in a bilinear resize, as torchvision's do."""

    def __init__(self, channels: int = 3, as_dict: bool = True):
        super().__init__()
        self.conv, self.as_dict = nn.Conv2d(3, channels, 3, 4, 1), as_dict

    def forward(self, x):
        y = F.interpolate(self.conv(x), x.shape[2:], mode="bilinear")
        return {"out": y} if self.as_dict else y


def batches() -> list:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(0, 256, (n, 24, 32, 3), dtype=torch.uint8, generator=generator),
            torch.randint(0, 4, (n, 24, 32), dtype=torch.uint8, generator=generator),
            torch.arange(n) + start,
        )
        for n, start in ((2, 0), (1, 2))
    ]


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "foreign":
        return Foreign()
    options = {"backbone": "resnet18", "width": 0.05, **({"channels": 8} if name == "deeplabv3" else {"stride": 8})}
    return create(name, 3, **options).eval()


@pytest.mark.parametrize("name", ["foreign", "deeplabv3", "fcn"])
@pytest.mark.parametrize("worst", [0, 2])
def test_scores_are_those_of_predict(name, worst):
    net, order = model(name), torch.tensor([2, 0, 1])
    spec = DatasetSpec(CLASSES, 3)
    total, each = ConfusionMatrix(3, ignore_index=3), []
    for images, labels, indices in batches():
        classes = order[fastseg.predict(net.eval(), evaluation.pixels(images, ALONE.device)).long()]
        total.update(classes, labels)
        for one, label, index in zip(classes, labels, indices.tolist(), strict=True):
            alone = ConfusionMatrix(3, ignore_index=3)
            alone.update(one, label)
            each.append((alone.compute().mean_iou, index))
    found = evaluation.evaluate(net, batches(), spec, ALONE, worst=worst, mapping=order)
    assert torch.equal(found.scores.iou, total.compute().iou)
    assert found.worst == sorted(each)[:worst]


def test_no_full_size_logits(monkeypatch):
    """What is counted of another library's model is its logits in front of the resize."""
    monkeypatch.setattr(evaluation, "ConfusionMatrix", _Noting)
    evaluation.evaluate(Foreign(as_dict=False), batches()[:1], DatasetSpec(CLASSES, 3), ALONE)
    assert _Noting.shapes == [(2, 3, 6, 8)]


class _Noting(ConfusionMatrix):
    shapes: ClassVar[list] = []

    def update(self, pred=None, target=None, *, logits=None, align_corners=False):
        self.shapes.append(tuple(logits.shape))
        super().update(pred, target, logits=logits, align_corners=align_corners)


def test_merge_of_others():
    one, other = ConfusionMatrix(2), ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"ConfusionMatrix\(num_classes=3, ignore_index=None\) does not count"):
        one.merge(other)
