"""How sure each voxel is, its best classes, a threshold and the confusion matrix, against torch at full size."""

import pytest
import torch
from torch.nn import functional as F

import fastseg
from fastseg.metrics import ConfusionMatrix
from fastseg.ops import (
    upsample_argmax,
    upsample_confidence,
    upsample_confusion,
    upsample_threshold,
    upsample_topk,
    volume_argmax,
)
from fastseg.ops.upsample_confidence import upsample_threshold_ref, upsample_topk_ref
from fastseg.ops.upsample_confusion import upsample_confusion_ref

SHAPE, SIZE = (2, 5, 3, 4, 3), (5, 7, 6)


@pytest.fixture(params=[1, 2**30], ids=["slices", "one slab"], autouse=True)
def slab(request, monkeypatch):
    monkeypatch.setattr(volume_argmax, "SLAB", request.param)


def full(logits, align_corners=False):
    return F.interpolate(logits, size=SIZE, mode="trilinear", align_corners=align_corners)


def expected(v, measure):
    p = v.softmax(1)
    if measure == "entropy":
        return -torch.xlogy(p, p).sum(1)
    best = p.topk(2, 1).values
    return best[:, 0] if measure == "probability" else best[:, 0] - best[:, 1]


@pytest.mark.parametrize("align_corners", [False, True], ids=["halves", "corners"])
@pytest.mark.parametrize("measure", ["probability", "margin", "entropy"])
def test_values(measure, align_corners, device):
    logits = 3 * torch.randn(SHAPE, device=device)
    options = {"size": SIZE, "align_corners": align_corners}
    classes, values = upsample_confidence(logits, measure=measure, **options)
    assert classes.dtype == torch.uint8 and values.dtype == torch.float32
    assert torch.equal(classes, upsample_argmax(logits, **options))
    torch.testing.assert_close(values, expected(full(logits, align_corners), measure), rtol=5e-6, atol=5e-6)


def test_by_argmax_of_a_factor_and_many_classes():
    logits = torch.randn(1, 300, 2, 2, 3)
    with fastseg.reference():  # the interpreter walks over 300 classes for each slice
        classes, values = upsample_argmax(logits, scale_factor=1.7, confidence=True)
    want = F.interpolate(logits, scale_factor=1.7, mode="trilinear").softmax(1).max(1)
    assert classes.dtype == torch.uint16 and torch.equal(classes.long(), want.indices)
    torch.testing.assert_close(values, want.values)
    assert upsample_confidence(logits[:, :3].bfloat16(), 4)[1].shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match="300 classes do not fit uint8"):
        upsample_confidence(logits, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"use torch\.uint8, torch\.uint16 or torch\.int64"):
        upsample_confidence(logits, 4, dtype=torch.int32)


def test_nan_stays_where_it_is():
    logits = torch.randn(SHAPE)
    logits[0, 2, 0, 0, 0] = float("nan")
    classes, values = upsample_confidence(logits, SIZE)
    want = full(logits)
    assert torch.equal(values.isnan(), want.isnan().any(1)) and values[1].isfinite().all()
    assert torch.equal(classes.long(), want.argmax(1))


def test_topk_and_threshold():
    logits = torch.randn(SHAPE)
    classes, values = upsample_topk(logits, 3, SIZE)
    indices, want = upsample_topk_ref(logits, 3, SIZE)
    assert torch.equal(classes, indices)
    torch.testing.assert_close(values, want)
    above, values = upsample_threshold(logits[:, :1], SIZE, threshold=0.3, confidence=True)
    above_ref, want = upsample_threshold_ref(logits[:, :1], SIZE, threshold=0.3, confidence=True)
    torch.testing.assert_close(values, want)
    assert torch.equal(above, above_ref)


def test_confusion():
    logits, target = torch.randn(SHAPE), torch.randint(5, (2, *SIZE), dtype=torch.uint8)
    target[:, 2] = 255
    want, got = ConfusionMatrix(5, ignore_index=255), ConfusionMatrix(5, ignore_index=255)
    want.update(upsample_argmax(logits, SIZE), target)
    got.update(logits=logits, target=target)
    assert torch.equal(got.matrix, want.matrix) and got.matrix.sum() == 2 * 4 * 7 * 6
    assert torch.equal(got.matrix, upsample_confusion_ref(logits, target, 5, ignore_index=255))
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        upsample_confusion(logits, target.clamp(max=7), 5)
    with pytest.raises(ValueError, match=r"or \(N, C, d, h, w\) and \(N, D, H, W\)"):
        upsample_confusion(logits, target[:, 0], 5)


def test_graphs_and_transforms():
    logits = torch.randn(2, 1, *SHAPE[1:])
    call = lambda x: upsample_confidence(x, SIZE, measure="entropy")[1]
    want = torch.stack([call(x) for x in logits])
    torch.testing.assert_close(torch.vmap(call)(logits), want)
    torch.testing.assert_close(torch.compile(call, backend="eager", fullgraph=True)(logits[0]), want[0])
