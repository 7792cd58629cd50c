"""Losses of volumes on low-resolution logits: torch's own steps at full size, in value and in gradient."""

import pytest
import torch
from torch.nn import functional as F

import fastseg
from fastseg import losses, nn
from fastseg.ops import upsample_cross_entropy, upsample_loss, volume_loss
from fastseg.ops.core import dispatch

SHAPE, SIZE = (2, 4, 3, 4, 3), (5, 7, 6)


# A slab is a call of the op on maps, whose kernels have tests of their own: interpreted, they run in these.
KERNELS = ("test_half_and_slabs_of_any_length", "test_labels_of_each_class_and_factors", "test_cross_entropy[kernels]")


@pytest.fixture(autouse=True)
def slabs(monkeypatch, request):
    """One slice a slab, whatever else a CPU would take of volumes so small."""
    walked, slab = [], volume_loss.slab_of
    monkeypatch.setattr(volume_loss, "slab_of", lambda *args: (walked.append(args[-1]), slab(*args))[1])
    monkeypatch.setattr(volume_loss, "SLAB", 1)
    if request.node.name not in KERNELS:
        monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with fastseg.force("upsample_cross_entropy3d", "slabs"), fastseg.force("upsample_loss_sums3d", "slabs"):
        yield
    assert len(walked) > 1 or request.node.originalname == "test_errors"


def drawn(dtype=torch.float64, shape=SHAPE, size=SIZE, labels=torch.int64):
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=dtype, requires_grad=True)
    return logits, torch.randint(0, shape[1], (shape[0], *size)).to(labels)


def full(logits, size=SIZE, align_corners=False):
    return F.interpolate(logits, size=size, mode="trilinear", align_corners=align_corners)


def assert_same(ours, want, logits):
    torch.testing.assert_close(ours, want.to(ours.dtype))
    got, grad = (torch.autograd.grad(loss, logits)[0] for loss in (ours, want))
    torch.testing.assert_close(got, grad)


@pytest.mark.parametrize("options", [
    {}, {"reduction": "sum"}, {"align_corners": True}, {"label_smoothing": 0.2}, {"ignore_index": 2},
    {"weight": torch.tensor([1.0, 0.5, 2.0, 0.0])},
    pytest.param(
        {"weight": torch.tensor([1.0, 0.5, 2.0, 0.3]), "label_smoothing": 0.1, "ignore_index": 1}, id="kernels"
    ),
], ids=str)  # fmt: skip
def test_cross_entropy(options):
    logits, target = drawn()
    corners = options.get("align_corners", False)
    torchs = {k: v.double() if k == "weight" else v for k, v in options.items() if k != "align_corners"}
    assert_same(upsample_cross_entropy(logits, target, **options),
                F.cross_entropy(full(logits, align_corners=corners), target, **torchs), logits)  # fmt: skip


def test_each_voxel_and_bytes():
    logits, target = drawn(labels=torch.uint8)
    factor = torch.rand(target.shape, dtype=torch.float64)
    ours, want = (
        factor * loss
        for loss in (
            upsample_cross_entropy(logits, target, reduction="none"),
            F.cross_entropy(full(logits), target.long(), reduction="none"),
        )
    )
    torch.testing.assert_close(ours, want)
    assert_same(ours.sum(), want.sum(), logits)
    assert_same(upsample_cross_entropy(logits, target, ignore_index=255), F.cross_entropy(full(logits), target.long()),
                logits)  # fmt: skip


def test_no_voxel_counts():
    logits, target = drawn()
    loss = upsample_cross_entropy(logits, torch.full_like(target, -100))
    assert loss.isnan() and (torch.autograd.grad(loss, logits)[0] == 0).all()
    with pytest.raises(IndexError):
        upsample_cross_entropy(logits, target + 4)


def test_half_and_slabs_of_any_length(monkeypatch):
    logits, target = drawn(torch.float16)
    loss = upsample_cross_entropy(logits, target)
    assert loss.dtype == torch.float16
    (grad,) = torch.autograd.grad(loss, logits)
    wide = logits.detach().float().requires_grad_()
    (want,) = torch.autograd.grad(F.cross_entropy(full(wide), target), wide)
    assert grad.dtype == torch.float16 and (grad - want).abs().max() < 1e-3
    monkeypatch.setattr(volume_loss, "SLAB", 10**6)
    torch.testing.assert_close(upsample_cross_entropy(logits, target), loss)


def dice(logits, target, smooth=1e-5):
    p = full(logits).softmax(1)
    y = F.one_hot(target, 4).movedim(-1, 1).to(p)
    inter, total = (p * y).sum((0, 2, 3, 4)), (p + y).sum((0, 2, 3, 4))
    return p, y, inter, total


def test_dice_and_cross_entropy():
    """The sums of Dice, and a sum of both losses, equal those of the volumes at full size as flat maps."""
    logits, target = drawn()
    terms = [(1.0, losses.CrossEntropy()), (0.7, losses.Dice())]
    flat = lambda x: x.flatten(-2)  # (N, C, D, H * W): a map of the final size, which is not interpolated
    want = upsample_loss(flat(full(logits)), flat(target), terms)
    assert_same(upsample_loss(logits, target, terms), want, logits)
    module = nn.UpsampleLoss(terms)
    torch.testing.assert_close(module(logits, target[:, None]), want)
    dice_alone = upsample_loss(logits, target, [(1.0, losses.Dice())])
    assert 0 < dice_alone < 1


def eager_worst(logits, target, count, factor=1.0):
    losses = factor * F.cross_entropy(full(logits), target, ignore_index=3, reduction="none")
    return losses.flatten().topk(count).values.mean()


def test_worst_voxels():
    """Top-k and online hard example mining; a channel of the target, and a factor for each voxel."""
    logits, target = drawn()
    counted = int((target != 3).sum())
    terms = lambda term: {"terms": [(1.0, term)], "ignore_index": 3}
    assert_same(upsample_loss(logits, target[:, None], **terms(losses.TopK(0.2))),
                eager_worst(logits, target, int(0.2 * counted)), logits)  # fmt: skip
    factor = torch.rand(target.shape, dtype=torch.float64)
    assert_same(upsample_loss(logits, target, pixel_weight=factor, **terms(losses.TopK(0.3))),
                eager_worst(logits, target, int(0.3 * counted), factor), logits)  # fmt: skip
    assert_same(upsample_loss(logits, target, **terms(losses.OHEM(1e-9, 40))), eager_worst(logits, target, 40), logits)


def test_labels_of_each_class_and_factors():
    logits, _ = drawn()
    labels, factor = (torch.rand(2, 4, *SIZE) > 0.5).to(torch.uint8), torch.rand(2, *SIZE)
    flat = lambda x: x.flatten(-2)
    terms = [(1.0, losses.BinaryCrossEntropy())]
    want = upsample_loss(flat(full(logits)), flat(labels), terms, pixel_weight=flat(factor))
    assert_same(upsample_loss(logits, labels, terms, pixel_weight=factor), want, logits)


def test_second_derivatives():
    logits, target = drawn(shape=(1, 2, 2, 2, 2), size=(3, 3, 3))
    call = lambda x: upsample_cross_entropy(x, target)
    assert torch.autograd.gradcheck(call, (logits,))
    assert torch.autograd.gradgradcheck(call, (logits,), check_undefined_grad=False)
    grads = torch.func.grad(call)(logits)
    torch.testing.assert_close(grads, torch.autograd.grad(call(logits), logits)[0])


@pytest.mark.parametrize(("change", "says"), [
    (lambda x, t: upsample_cross_entropy(x, t[0]), r"give \(N, C, h, w\) and \(N, H, W\), or \(N, C, d, h, w\)"),
    (lambda x, t: upsample_loss(x, t[0], [(1.0, losses.Dice())]), r"give \(N, C, d, h, w\), and \(N, D, H, W\)"),
    (lambda x, t: upsample_loss(x, t, [(1.0, losses.Dice())], pixel_weight=torch.ones(2, 5, 7)), "one each voxel"),
], ids=["entropy", "loss", "factor"])  # fmt: skip
def test_errors(change, says):
    with pytest.raises(ValueError, match=says):
        change(*drawn())
