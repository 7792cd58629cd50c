"""Every loss with input that is wrong, not finite, or nothing at all; of maps and of volumes."""

import pytest
import torch
from torch.nn import functional as F

from fastseg.losses import OHEM, BinaryCrossEntropy, CrossEntropy, Dice, Focal, GeneralizedDice, Jaccard, TopK, Tversky
from fastseg.ops import upsample_loss

C, IGNORED = 4, 255
SOFTMAX = {
    "ce": CrossEntropy(), "focal": Focal(), "dice": Dice(), "jaccard": Jaccard(batch=True),
    "tversky": Tversky(0.3, 0.7, 0.75), "generalised": GeneralizedDice(), "topk": TopK(0.5), "ohem": OHEM(0.5, 3),
}  # fmt: skip
SIGMOID = {
    "bce": BinaryCrossEntropy(),
    "focal": Focal(alpha=0.25, activation="sigmoid"),
    "dice": Dice(activation="sigmoid"),
}
TERMS = [*((name, term, False) for name, term in SOFTMAX.items()), *((n, t, True) for n, t in SIGMOID.items())]
EVERY = pytest.mark.parametrize(("term", "each"), [t[1:] for t in TERMS],
                                ids=[f"{name}{', each class' * each}" for name, _, each in TERMS])  # fmt: skip
SIZES = pytest.mark.parametrize(("low", "full"), [((2, 3), (5, 4)), ((2, 2, 3), (3, 5, 4))], ids=["maps", "volumes"])


def drawn(low, full, each, images=2):
    logits = torch.randn(images, C, *low, dtype=torch.float64, requires_grad=True)
    target = torch.randint(2, (images, C, *full)) if each else torch.randint(C, (images, *full))
    return logits, target


def call(term, logits, target, **options):
    return upsample_loss(logits, target, [(1.0, term)], ignore_index=IGNORED, **options)


@SIZES
@EVERY
def test_a_label_that_is_no_class_is_named(term, each, low, full):
    logits, target = drawn(low, full, each)
    for value in (9, -3):
        target[1][..., 1, 2] = value
        with pytest.raises(IndexError, match=f"Target {value} is out of bounds"):
            call(term, logits, target)


@SIZES
@EVERY
def test_logits_that_are_integers(term, each, low, full):
    logits, target = drawn(low, full, each)
    with pytest.raises(TypeError, match=r"logits are torch\.int64; give floating-point logits"):
        call(term, logits.detach().long(), target)


def test_weights_of_two_lengths():
    """Of the classes and of their positive labels: the wrong one is named."""
    logits, target = drawn((2, 3), (5, 4), True)
    for weight, pos_weight, name in ((C + 1, C, "weight"), (C, C + 1, "pos_weight"), (C + 1, C + 1, "pos_weight")):
        term = BinaryCrossEntropy(torch.ones(weight), pos_weight=torch.ones(pos_weight))
        with pytest.raises(ValueError, match=rf"BinaryCrossEntropy: {name} is \({C + 1},\)"):
            call(term, logits, target)


@SIZES
@EVERY
def test_shapes(term, each, low, full):
    """Another number of images, of axes, of classes; a factor for each image in place of one for each pixel."""
    logits, target = drawn(low, full, each)
    fewer = target[:, :3] if each else target[..., 0]  # of classes, or of axes
    for labels in (target[:1], fewer, target[..., :0], target.unsqueeze(1).expand(-1, 3, *target.shape[1:])):
        with pytest.raises(ValueError, match=r"logits are \(2, 4.*target is \("):
            call(term, logits, labels)
    with pytest.raises(ValueError, match=r"pixel_weight is \(2,\)"):
        call(term, logits, target, pixel_weight=torch.ones(2))


@SIZES
@EVERY
def test_nan_and_infinity_are_seen(term, each, low, full):
    logits, target = drawn(low, full, each)
    for value in (torch.nan, torch.inf):
        bad = logits.detach().clone()
        bad[1, 2].view(-1)[1] = value
        if value == torch.inf and each:  # a sigmoid is then 1; torch's own lines say the rest
            v = F.interpolate(bad, full, mode="trilinear" if len(full) == 3 else "bilinear")
            want = F.binary_cross_entropy_with_logits(v, target.double())
            torch.testing.assert_close(call(SIGMOID["bce"], bad, target), want, equal_nan=True)
        else:
            assert call(term, bad, target).isnan()


@SIZES
@EVERY
def test_no_image_and_no_pixel(term, each, low, full):
    """A gradient of 0 where nothing counts; no error where there is no image."""
    logits, target = drawn(low, full, each)
    loss = call(term, logits, torch.full_like(target, IGNORED))
    assert loss.dim() == 0 and not torch.autograd.grad(loss, logits)[0].any()
    logits, target = drawn(low, full, each, images=0)
    loss = call(term, logits, target)
    assert loss.dim() == 0 and torch.autograd.grad(loss, logits)[0].shape == logits.shape


@SIZES
def test_weights_of_the_wrong_length(low, full):
    logits, target = drawn(low, full, False)
    for loss in (CrossEntropy, Focal, Dice, Jaccard, Tversky, TopK, OHEM):
        with pytest.raises(ValueError, match=r"weight is \(3,\).*give a"):
            call(loss(weight=torch.ones(3)), logits, target)
    labels = drawn(low, full, True)[1]
    for term in (BinaryCrossEntropy(torch.ones(3)), BinaryCrossEntropy(pos_weight=torch.ones(3))):
        with pytest.raises(ValueError, match=r"weight is \(3,\); give a factor for each of 4 channels|4 classes"):
            call(term, logits, labels)


@pytest.mark.parametrize("classes", [1, 65536])
def test_one_class_and_many(classes):
    logits = torch.randn(1, classes, 1, 2, dtype=torch.float64)
    target = torch.tensor([[[0, classes - 1, 0]]], dtype=torch.int32)
    v = F.interpolate(logits, (1, 3), mode="bilinear")
    torch.testing.assert_close(call(SOFTMAX["ce"], logits, target), F.cross_entropy(v, target.long()))
    p, y = v.softmax(1), torch.zeros_like(v).scatter_(1, target.long()[:, None], 1.0)
    both = (p + y).sum((0, 2, 3)) + 1
    torch.testing.assert_close(
        call(Dice(batch=True), logits, target), 1 - ((2 * (p * y).sum((0, 2, 3)) + 1) / both).mean()
    )
