"""Class map and cross entropy from low-resolution logits, against torch's two steps at full resolution."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastseg import explain
from fastseg.nn.loss import UpsampleCrossEntropyLoss
from fastseg.nn.upsampling import UpsampleArgmax
from fastseg.ops.upsample_argmax import upsample_argmax
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy
from fastseg.testing import check_op

# Logits (N, C, h, w) and full size (H, W).
SIZES = [
    ((2, 5, 7, 4), (28, 16)),  # a whole factor
    ((1, 3, 5, 6), (17, 22)),  # none
    ((1, 4, 9, 8), (5, 3)),  # smaller
    ((2, 19, 1, 1), (6, 5)),  # one pixel
    ((1, 1, 3, 3), (1, 1)),  # one class, to one pixel
    ((0, 3, 4, 4), (8, 8)),  # empty batch
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
AC = pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])


def interpolate(logits, align_corners, size=None, scale_factor=None):
    return F.interpolate(logits, size, scale_factor, mode="bilinear", align_corners=align_corners)


def assert_is_argmax(classes, full):
    """Equal where the two best logits are apart; one of the best elsewhere."""
    assert classes.shape == (full.shape[0], *full.shape[2:])
    best = full.amax(1)
    chosen = full.gather(1, classes.long()[:, None])[:, 0]
    assert ((best - chosen) <= 1e-6).all()


@AC
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("shape", "size"), SIZES, ids=str)
def test_argmax(shape, size, layout, align_corners, device):
    logits = torch.randn(shape, device=device).to(memory_format=layout)
    classes = upsample_argmax(logits, size, align_corners=align_corners)
    assert classes.dtype == torch.uint8
    assert classes.is_contiguous()
    assert_is_argmax(classes.cpu(), interpolate(logits.cpu().double(), align_corners, size))


@AC
@pytest.mark.parametrize("factor", [4, 1.7, 0.5, (2.0, 3.0)], ids=str)
def test_argmax_scale_factor(factor, align_corners, device):
    """A factor of 1.7 samples at 1/1.7 of a pixel, not at the quotient of the sizes."""
    logits = torch.randn(1, 6, 5, 8, device=device)
    classes = upsample_argmax(logits, scale_factor=factor, align_corners=align_corners)
    assert_is_argmax(classes.cpu(), interpolate(logits.cpu().double(), align_corners, scale_factor=factor))


def test_argmax_first_class_among_equals(device):
    logits = torch.zeros(1, 7, 4, 4, device=device)
    logits[:, [2, 5]] = 1
    assert (upsample_argmax(logits, 9) == 2).all()


def test_argmax_takes_nan_for_the_largest(device):
    logits = torch.randn(1, 4, 3, 3, device=device)
    logits[:, 1] = float("nan")
    assert (upsample_argmax(logits, 6) == 1).all()


def test_argmax_dtype(device):
    logits = torch.randn(1, 257, 2, 3, device=device)
    logits[:, 255] += 20
    assert upsample_argmax(logits, 4).dtype == torch.int64
    assert upsample_argmax(logits[:, :256], 4).dtype == torch.uint8
    assert (upsample_argmax(logits[:, :256], 4) == 255).all()
    assert upsample_argmax(logits[:, :9], 4, dtype=torch.int64).dtype == torch.int64
    with pytest.raises(ValueError, match="257 classes do not fit uint8"):
        upsample_argmax(logits, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"dtype is torch\.float32"):
        upsample_argmax(logits, 4, dtype=torch.float32)


def test_argmax_bad_arguments():
    logits = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match="give exactly one"):
        upsample_argmax(logits)
    with pytest.raises(ValueError, match="give exactly one"):
        upsample_argmax(logits, 8, 2.0)
    with pytest.raises(ValueError, match=r"logits are \(3, 4, 4\)"):
        upsample_argmax(logits[0], 8)
    with pytest.raises(ValueError, match=r"logits are \(1, 0, 4, 4\)"):
        upsample_argmax(logits[:, :0], 8)
    with pytest.raises(TypeError, match=r"logits are torch\.uint8"):
        upsample_argmax(logits.to(torch.uint8), 8)


def test_argmax_module():
    logits = torch.randn(2, 5, 4, 6, requires_grad=True)
    full = interpolate(logits, True, (13, 17))
    assert torch.equal(UpsampleArgmax((13, 17), align_corners=True)(logits).long(), full.argmax(1))
    assert torch.equal(UpsampleArgmax(align_corners=True)(logits, (13, 17)).long(), full.argmax(1))
    assert torch.equal(
        UpsampleArgmax(scale_factor=2)(logits, (13, 17)).long(), interpolate(logits, False, (13, 17)).argmax(1)
    )
    twice = UpsampleArgmax(scale_factor=2)
    assert torch.equal(twice(logits, dtype=torch.int64), interpolate(logits, False, None, 2.0).argmax(1))
    assert repr(twice) == "UpsampleArgmax(scale_factor=2, align_corners=False)"
    assert repr(pickle.loads(pickle.dumps(twice))) == repr(twice)
    assert not twice.state_dict()


def two_steps(logits, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, *, align_corners):
    full = interpolate(logits, align_corners, target.shape[-2:])
    return F.cross_entropy(
        full,
        target.long(),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


@AC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("shape", "size"), SIZES[:-1], ids=str)
def test_cross_entropy(shape, size, layout, dtype, align_corners, device):
    logits = torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *size), device=device)
    terms = shape[0] * size[0] * size[1]
    check_op(upsample_cross_entropy, two_steps, [logits, target], align_corners=align_corners, terms=terms)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [255, 2], ids=["ignored outside", "ignored class"])
@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_options(reduction, ignore_index, target_dtype, label_smoothing, device):
    logits = torch.randn(2, 5, 4, 3, device=device, requires_grad=True)
    weight = torch.rand(5, device=device)
    target = torch.randint(5, (2, 11, 9), device=device).to(target_dtype)
    target[:, 3:5] = ignore_index
    check_op(
        upsample_cross_entropy,
        two_steps,
        [logits, target, weight, ignore_index, reduction, label_smoothing],
        align_corners=True,
        terms=200,
    )


def test_cross_entropy_all_ignored():
    """As torch: a mean over nothing is NaN, a sum over nothing 0."""
    logits, target = torch.randn(1, 3, 4, 4), torch.full((1, 8, 8), 255, dtype=torch.uint8)
    assert upsample_cross_entropy(logits, target, ignore_index=255).isnan()
    assert upsample_cross_entropy(logits, target, ignore_index=255, reduction="sum") == 0


def test_cross_entropy_large_logits(device):
    """exp(1e4) overflows unless the largest logit is taken off first."""
    logits = (1e4 * torch.randn(1, 4, 5, 5, device=device)).requires_grad_()
    target = torch.randint(4, (1, 10, 10), device=device)
    check_op(upsample_cross_entropy, two_steps, [logits, target], align_corners=False, terms=100)


def test_cross_entropy_bad_arguments():
    logits, target = torch.randn(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits are \(2, 3, 4, 4\) and target is \(1, 8, 8\)"):
        upsample_cross_entropy(logits, target[:1])
    with pytest.raises(ValueError, match=r"give \(N, C, h, w\) and \(N, H, W\)"):
        upsample_cross_entropy(logits[0], target)
    with pytest.raises(TypeError, match=r"target is torch\.float32"):
        upsample_cross_entropy(logits, target.float())
    with pytest.raises(TypeError, match=r"logits are torch\.int64"):
        upsample_cross_entropy(logits.long(), target)


def test_cross_entropy_module():
    weight = torch.rand(3)
    options = {"ignore_index": 1, "reduction": "sum", "label_smoothing": 0.2}
    ours, torchs = (
        UpsampleCrossEntropyLoss(weight, align_corners=True, **options),
        nn.CrossEntropyLoss(weight, **options),
    )
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 9, 11), dtype=torch.uint8)
    for loss in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(loss(logits, target), torchs(interpolate(logits, True, (9, 11)), target.long()))
    assert ours.state_dict().keys() == torchs.state_dict().keys() == {"weight"}
    ours.load_state_dict(nn.CrossEntropyLoss(torch.ones(3)).state_dict())
    assert torch.equal(ours.weight, torch.ones(3))
    assert not UpsampleCrossEntropyLoss().state_dict()
    assert repr(UpsampleCrossEntropyLoss()) == "UpsampleCrossEntropyLoss(align_corners=False)"


def test_path_is_recorded():
    logits = torch.randn(1, 3, 4, 4)
    with explain() as report:
        upsample_argmax(logits, 8)
        upsample_cross_entropy(logits, torch.zeros(1, 8, 8, dtype=torch.int64))
    assert [(d.op, d.path, d.why) for d in report] == [
        ("upsample_argmax", "reference", "this op has only a reference path"),
        ("upsample_cross_entropy", "reference", "this op has only a reference path"),
    ]
