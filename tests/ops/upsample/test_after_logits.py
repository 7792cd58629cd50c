"""How sure each pixel is, top-k classes, a threshold, and the confusion matrix, from low-resolution logits."""

import pytest
import torch
import torch.nn.functional as F
from head_inputs import AC

import fastseg
from fastseg.metrics import ConfusionMatrix
from fastseg.ops import (
    upsample_argmax,
    upsample_confidence,
    upsample_confusion,
    upsample_threshold,
    upsample_topk,
)
from fastseg.ops.upsample_confidence import upsample_threshold_ref, upsample_topk_ref
from fastseg.ops.upsample_confusion import upsample_confusion_ref

MEASURES = ("probability", "margin", "entropy")
NAN = float("nan")


def expected(v, measure):
    p = v.softmax(1)
    if measure == "entropy":
        return -torch.xlogy(p, p).sum(1)
    best = p.topk(min(2, p.shape[1]), 1).values
    return best[:, 0] if measure == "probability" or p.shape[1] == 1 else best[:, 0] - best[:, 1]


@AC
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("classes", [1, 2, 6])
def test_values(classes, measure, align_corners, device):
    logits = 3 * torch.randn(2, classes, 3, 4, device=device)
    full = F.interpolate(logits, (7, 9), mode="bilinear", align_corners=align_corners)
    found, values = upsample_confidence(logits, (7, 9), measure=measure, align_corners=align_corners)
    assert found.dtype == torch.uint8 and values.dtype == torch.float32
    assert torch.equal(found, upsample_argmax(logits, (7, 9), align_corners=align_corners))
    torch.testing.assert_close(values, expected(full, measure), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_in_strips(measure):
    """Large maps on a CPU; a factor that is no whole number."""
    logits = torch.randn(2, 7, 60, 50)
    with fastseg.force("upsample_confidence", "rows"):
        found, values = upsample_confidence(logits, scale_factor=4.3, measure=measure)
    full = F.interpolate(logits, scale_factor=4.3, mode="bilinear")
    torch.testing.assert_close(values, expected(full, measure), rtol=1e-5, atol=1e-5)
    assert (found != full.argmax(1)).float().mean() < 1e-4


def test_argmax_gives_it_too(device):
    logits = torch.randn(1, 5, 3, 4, device=device)
    found, values = upsample_argmax(logits, scale_factor=2, confidence=True, dtype=torch.int64)
    assert found.dtype == torch.int64
    assert torch.equal(found, upsample_argmax(logits, scale_factor=2, dtype=torch.int64))
    full = F.interpolate(logits, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(values, full.softmax(1).amax(1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_sure_and_not_finite(measure, device):
    """Large logits do not overflow; a class of no probability is not there; NaN stays."""
    logits = torch.tensor([1e4, -1e4, 0.0], device=device)[None, :, None, None].expand(1, 3, 2, 2)
    sure = upsample_confidence(logits, 4, measure=measure)[1]
    assert (sure == (0 if measure == "entropy" else 1)).all()
    logits = torch.tensor([-1e38, 0.0, 1.0], device=device)[None, :, None, None].expand(1, 3, 2, 2).clone()
    two = upsample_confidence(logits[:, 1:], 2, measure=measure)[1]
    torch.testing.assert_close(upsample_confidence(logits, 2, measure=measure)[1], two)
    logits[0, 1, 0, 0] = NAN
    found, values = upsample_confidence(logits, 2, measure=measure)
    assert values[0, 0, 0].isnan() and found[0, 0, 0] == 1 and values[0, 1, 1].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_logits(dtype, device):
    logits = torch.randn(2, 5, 3, 4, device=device).to(dtype)
    for got, want in zip(upsample_confidence(logits, 8), upsample_confidence(logits.float(), 8), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("side", [4, 70])
def test_topk(side):
    """Small maps, and strips of large ones."""
    logits = torch.randn(2, 8, side, side)
    classes, values = upsample_topk(logits, 3, scale_factor=4)
    indices, want = upsample_topk_ref(logits, 3, scale_factor=4)
    torch.testing.assert_close(values, want)
    assert classes.shape == indices.shape and (classes != indices).float().mean() < 1e-4


@pytest.mark.parametrize("classes", [1, 2])
def test_topk_of_few(classes, device):
    """Nothing, or one plane; where differences overflow, and NaN, torch's steps."""
    logits = 4 * torch.randn(2, classes, 3, 4, device=device)
    for changed in (0.0, 3e38, NAN):
        logits[0, 0, 0, 0] += changed
        full = F.interpolate(logits, (7, 9), mode="bilinear").softmax(1)
        for k in range(1, classes + 1):
            found, values = upsample_topk(logits, k, (7, 9))
            want = full.topk(k, 1)
            torch.testing.assert_close(values, want.values, equal_nan=True, rtol=2e-5, atol=1e-6)
            known = ~full.isnan().any(1, keepdim=True).expand_as(found)
            assert found.dtype == torch.int64 and torch.equal(found[known], want.indices[known])


@pytest.mark.parametrize("measure", MEASURES)
def test_two_far_apart(measure, device):
    logits = torch.tensor([3e38, -3e38], device=device)[None, :, None, None].expand(1, 2, 3, 3).contiguous()
    found, values = upsample_confidence(logits, 8, measure=measure)
    assert not found.any() and (values == (0 if measure == "entropy" else 1)).all()


def test_threshold():
    logits = torch.randn(2, 1, 4, 5)
    assert torch.equal(upsample_threshold(logits, (8, 9)), upsample_threshold_ref(logits, (8, 9)))
    above, values = upsample_threshold(logits, (8, 9), threshold=0.8, confidence=True)
    want, full = upsample_threshold_ref(logits, (8, 9), threshold=0.8, confidence=True)
    assert torch.equal(above, want) and 0 < above.sum() < above.numel()
    torch.testing.assert_close(values, full)


def test_confusion(device):
    logits = torch.randn(3, 4, 3, 4, device=device)
    target = torch.randint(4, (3, 7, 9), device=device, dtype=torch.uint8)
    target[:, 2] = 255
    counts = upsample_confusion(logits, target, 5, ignore_index=255)
    pred = upsample_argmax(logits, (7, 9))
    want, got = ConfusionMatrix(5, ignore_index=255), ConfusionMatrix(5, ignore_index=255)
    want.update(pred, target)
    got.update(logits=logits, target=target)
    got.update(logits=logits, target=target)
    assert torch.equal(counts.cpu(), want.matrix) and torch.equal(got.matrix, 2 * want.matrix)
    assert counts.sum() == 3 * 6 * 9
    assert torch.equal(counts, upsample_confusion_ref(logits, target, 5, ignore_index=255))


@pytest.mark.parametrize(("classes", "ignored"), [(1, None), (3, 1), (3, None)])
def test_confusion_of_one_class(classes, ignored, device):
    """More pixels than are counted together; the labels stay as they are."""
    logits = torch.randn(2, 1, 3, 4, device=device)
    target = torch.randint(classes, (2, 400, 500), device=device)
    before = target.clone()
    counts = upsample_confusion(logits, target, classes, ignore_index=ignored)
    want = torch.bincount(target.flatten(), minlength=classes)
    if ignored is not None:
        want[ignored] = 0
    assert torch.equal(counts[:, 0], want) and not counts[:, 1:].any() and torch.equal(target, before)


def test_bad_arguments():
    logits, target = torch.randn(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)
    confusion = ConfusionMatrix(3)
    for message, error, call in (
        ("measure is 'max'", ValueError, lambda: upsample_confidence(logits, 8, measure="max")),
        ("give exactly one", ValueError, lambda: upsample_confidence(logits)),
        ("logits are torch.int64", TypeError, lambda: upsample_confidence(logits.long(), 8)),
        ("300 classes do not fit uint8", ValueError,
         lambda: upsample_confidence(torch.randn(1, 300, 2, 2), 4, dtype=torch.uint8)),
        ("k is 4; give 1 to 3", ValueError, lambda: upsample_topk(logits, 4, 8)),
        ("give one channel", ValueError, lambda: upsample_threshold(logits, 8)),
        ("threshold is 1", ValueError, lambda: upsample_threshold(logits[:, :1], 8, threshold=1)),
        ("3 classes of logits, num_classes is 2", ValueError, lambda: upsample_confusion(logits, target, 2)),
        ("Target 9 is out of bounds", IndexError, lambda: upsample_confusion(logits, target + 9, 3)),
        ("Target 9 is out of bounds; classes are 0 to 2", ValueError,
         lambda: confusion.update(logits=logits, target=target + 9)),
        ("pred and logits given; give pred, or logits", TypeError,
         lambda: confusion.update(target, target, logits=logits)),
        ("target is torch.float32", TypeError, lambda: upsample_confusion(logits, target.float(), 3)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert confusion.matrix.sum() == 0
