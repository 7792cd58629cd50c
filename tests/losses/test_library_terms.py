"""The losses that bear other libraries' names: half precision, errors, and as terms of ``UpsampleLoss``."""

import pytest
import torch

from fastseg import losses
from fastseg.nn import UpsampleLoss

N, C, LOW, FULL = 2, 4, (3, 5), (9, 13)


def labels():
    return torch.randint(C, (N, *FULL))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", [
    losses.smp.DiceLoss("multiclass", ignore_index=255), losses.smp.FocalLoss("multiclass", ignore_index=255),
    losses.monai.DiceCELoss(softmax=True, to_onehot_y=True),
    losses.nnunet.DC_and_CE_loss({"ddp": False}, {}, ignore_label=255),
], ids=lambda loss: type(loss).__name__)  # fmt: skip
def test_half_logits_are_summed_in_fp32(loss, dtype):
    logits, target = torch.randn(N, C, *LOW).to(dtype).requires_grad_(), labels()[:, None]
    target = target if type(loss).__module__.endswith(("monai", "nnunet")) else target[:, 0]
    value = loss(logits, target)
    assert value.dtype == torch.float32
    (grad,) = torch.autograd.grad(value, logits)
    wide = logits.detach().float().requires_grad_()
    want = loss(wide, target)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want, wide)[0].to(dtype))


@pytest.mark.parametrize(("loss", "error", "message"), [
    (losses.smp.DiceLoss("multiclass"), RuntimeError, "Target 7 is out of bounds"),
    (losses.monai.DiceLoss(softmax=True, to_onehot_y=True), RuntimeError, "Target 7 is out of bounds"),
    (losses.monai.DiceLoss(softmax=True), AssertionError, "ground truth has different shape"),
    (losses.monai.DiceCELoss(softmax=True, to_onehot_y=True, weight=torch.ones(3)), ValueError, "length of the"),
    (losses.nnunet.DC_and_CE_loss({}, {}), RuntimeError, "Target 7 is out of bounds"),
    (losses.ultralytics.MultiChannelDiceLoss(), AssertionError, "size of predict and target"),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_errors_are_the_libraries(loss, error, message):
    target = labels()[:, None]
    if "7" in message:
        target[1, 0, 3, 4] = 7
    target = target[:, 0] if isinstance(loss, losses.smp.DiceLoss) else target
    with pytest.raises(error, match=message):
        loss(torch.randn(N, C, *LOW), target)


@pytest.mark.parametrize("loss", [
    losses.TopK(0.5), losses.OHEM(0.9, 1), losses.monai.FocalLoss(False, True, use_softmax=True, ignore_index=-100),
], ids=lambda loss: type(loss).__name__)  # fmt: skip
def test_an_ignored_label_that_the_dtype_cannot_hold(loss):
    """-100 is 156 in eight bits, which is a class here: its pixels count."""
    logits = torch.randn(1, 160, 2, 3, dtype=torch.float64)
    target = torch.tensor([[[156, 156, 3], [156, 0, 159]]], dtype=torch.uint8)
    target = target[:, None] if isinstance(loss, losses.monai.FocalLoss) else target
    torch.testing.assert_close(loss(logits, target), loss(logits, target.long()))


def test_bad_options():
    for make, error in (
        (lambda: losses.smp.DiceLoss("multi"), AssertionError),
        (lambda: losses.smp.DiceLoss("binary", class_weights=[1.0]), ValueError),
        (lambda: losses.smp.DiceLoss("binary", from_logits=False), ValueError),
        (lambda: losses.monai.DiceLoss(sigmoid=True, softmax=True), ValueError),
        (lambda: losses.monai.DiceLoss(), ValueError),
        (lambda: losses.monai.DiceCELoss(softmax=True, lambda_ce=-1.0), ValueError),
        (lambda: losses.monai.DiceLoss(softmax=True, other_act=3), TypeError),
        (lambda: losses.nnunet.SoftDiceLoss(), ValueError),
        (lambda: losses.nnunet.DeepSupervisionWrapper(None, [0.0]), AssertionError),
    ):
        with pytest.raises(error):
            make()


def test_libraries_losses_are_terms():
    """Together in one call they are the sum of each by itself."""
    logits, target = torch.randn(N, C, *LOW), labels()
    dice, focal = losses.smp.DiceLoss("multiclass"), losses.smp.FocalLoss("multiclass")
    together = UpsampleLoss([(0.5, dice), (2.0, focal), (1.0, losses.CrossEntropy())])(logits, target)
    alone = 0.5 * dice(logits, target) + 2 * focal(logits, target) + losses.CrossEntropy()(logits, target)
    torch.testing.assert_close(together, alone)
