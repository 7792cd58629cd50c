"""``auto_prune``: levels with known scores, chosen by the tolerance; the scores are those of the heads."""

import pytest
import torch
from torch import nn

import fastseg
from fastseg.metrics import ConfusionMatrix
from fastseg.models import UNetPlusPlus, auto_prune, create

WIDTHS = (4, 6, 8, 8)


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():  # the interpreter would take minutes
        yield


def trained(mode: str = "fast") -> UNetPlusPlus:
    torch.manual_seed(0)
    model = UNetPlusPlus(2, norm=True, up="bilinear", widths=WIDTHS, deep_supervision=True, mode=mode)
    model.train()(torch.randn(2, 3, 32, 32))  # statistics that are not those of a new norm
    return model.eval()


def noisy(labels: torch.Tensor, wrong: int) -> torch.Tensor:
    """The labels with the first ``wrong`` pixels of each picture turned round."""
    labels = labels.clone()
    labels.flatten(1)[:, :wrong] = 1 - labels.flatten(1)[:, :wrong]
    return labels


class Oracle(nn.Module):
    """Stands for a level: gives the first channel's labels with some pixels wrong."""

    def __init__(self, wrong: int):
        super().__init__()
        self.weight, self.wrong = nn.Parameter(torch.zeros(wrong)), wrong

    def predict(self, x):
        return noisy(x[:, 0].long(), self.wrong)


def mean_iou(wrong: int, of: int) -> float:
    """Of two classes, half the pixels each, with ``wrong`` pixels of the first turned."""
    half = of // 2
    return ((half - wrong) / half + half / (half + wrong)) / 2


@pytest.mark.parametrize(("tolerance", "level"), [(0.0, 3), (0.02, 3), (0.05, 2), (0.2, 1), (1.0, 1)])
def test_the_smallest_level_within_the_tolerance(monkeypatch, tolerance, level):
    """Levels with 24, 6 and 0 wrong pixels of 400: mean IoU 0.886, 0.970 and 1."""
    model, wrongs = trained(), {1: 24, 2: 6, 3: 0}
    monkeypatch.setattr(UNetPlusPlus, "prune", lambda self, level: Oracle(wrongs[level]))
    monkeypatch.setattr(UNetPlusPlus, "predict", lambda self, x: x[:, 0].long())
    labels = torch.zeros(2, 20, 20, dtype=torch.long)
    labels[:, 10:] = 1
    image = labels[:, None].float().expand(2, 3, 20, 20)
    pruned = auto_prune(model, [(image[:1], labels[:1]), (image[1:], labels[1:])], tolerance)
    want = [mean_iou(wrong, 400) for wrong in (24, 6, 0, 0)]
    assert want == pytest.approx([0.8864, 0.9704, 1, 1], abs=1e-4)
    assert [row.mean_iou for row in pruned.levels] == pytest.approx(want)
    assert pruned.level == level and pruned.model.wrong == wrongs[level] and pruned.pictures == 2


@pytest.mark.parametrize("mode", ["fast", "accurate"])
def test_rows_are_the_heads_own(mode):
    """Scores from the logits of the whole net's heads; nothing of the model changes."""
    model = trained(mode).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, target = torch.randn(2, 3, 24, 16), torch.randint(2, (2, 24, 16))
    target[:, :4] = 7
    pruned = auto_prune(model, [(x, target)], 0.0, ignore_index=7)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        heads = model.eval()._branches(x, model._heads())
        maps = [y.argmax(1) for y in heads] + [model.logits(x).argmax(1)]
    for row, classes in zip(pruned.levels, maps, strict=True):
        counts = ConfusionMatrix(2, ignore_index=7)
        counts.update(classes, target)
        assert row.mean_iou == pytest.approx(counts.compute().mean_iou, abs=0.01)  # ties of rounded logits
        net = model if row.level is None else model.prune(row.level)
        assert row.parameters == sum(p.numel() for p in net.parameters()) and row.seconds > 0
    lines = str(pruned).splitlines()
    assert [line.split()[0] for line in lines] == ["net", "L1", "L2", "L3", "whole"]
    assert sum("<- chosen" in line for line in lines) == 1
    chosen = next(row for row in pruned.levels if row.level == pruned.level)
    assert chosen.mean_iou >= pruned.levels[-1].mean_iou


def test_no_level_is_good_enough(monkeypatch):
    """The mean of the heads beats each of them: the whole net it is."""
    model = trained("accurate")
    monkeypatch.setattr(UNetPlusPlus, "prune", lambda self, level: Oracle(5))
    monkeypatch.setattr(UNetPlusPlus, "predict", lambda self, x: x[:, 0].long())
    labels = torch.tensor([[[0, 0, 0, 0, 0, 1]]])
    pruned = auto_prune(model, [(labels[:, None].float(), labels)], 0.1)
    assert pruned.level is None and pruned.model is model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tolerance": -0.1}, ValueError, "tolerance is -0.1"),
        ({"tolerance": float("nan")}, ValueError, "tolerance is nan"),
        ({"data": []}, ValueError, "data is empty"),
        ({"model": create("unetplusplus", 2, widths=WIDTHS)}, ValueError, "needs? deep_supervision=True"),
        ({"model": nn.Identity()}, TypeError, "model is a Identity"),
        ({"ignore_index": 0}, ValueError, "no pixel of the data has a class"),
    ],
)
def test_refused(change, error, message):
    data = [(torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long))]
    arguments = {"model": trained(), "data": data, "tolerance": 0.01} | change
    with pytest.raises(error, match=message):
        auto_prune(**arguments)
