"""Blocks of volumes on a CPU: each equals torch's own steps at full size, in value and in gradient."""

import pytest
import torch
from torch.nn import functional as F

import fastseg
from fastseg import losses
from fastseg.ops import upsample_argmax, upsample_confidence, upsample_cross_entropy, upsample_loss, upsample_topk
from fastseg.ops import volume_heads as heads
from fastseg.ops.core import dispatch
from fastseg.ops.core.loss_columns import KINDS, SOFTMAX, Column
from fastseg.ops.cpu import loss_sums, upsampled_slabs
from fastseg.ops.cpu.upsampled_slabs import Slabs
from fastseg.ops.upsample_loss_sums import upsample_loss_sums

SIZES = {  # low, full, align_corners
    "larger": ((3, 4, 5), (7, 9, 8), False),
    "corners": ((3, 4, 5), (7, 9, 8), True),
    "smaller": ((7, 9, 8), (3, 4, 5), False),
    "thick slices": ((4, 3, 3), (4, 9, 7), False),
    "the same": ((5, 4, 6), (5, 4, 6), False),
    "one voxel": ((1, 1, 1), (4, 3, 5), True),
    "into one voxel": ((4, 3, 5), (1, 1, 1), True),
}


@pytest.fixture(params=[1, 40, 10**6], ids=["a line each", "several", "one"])
def block(request, monkeypatch):
    """Blocks of one line, of some, or of the whole volume."""
    monkeypatch.setattr(upsampled_slabs, "BLOCK", request.param)
    monkeypatch.setattr(heads, "_FEW", 0)
    monkeypatch.setattr(loss_sums, "_VOLUME", 0)


def drawn(low, full, C=3, N=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(N, C, *low, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return logits, torch.randint(C, (N, *full), generator=g)


def up(logits, full, corners):
    return F.interpolate(logits, full, mode="trilinear", align_corners=corners)


def assert_same(ours, want, logits):
    torch.testing.assert_close(ours, want)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, want)]
    torch.testing.assert_close(*grads)
    assert grads[0].stride() == logits.stride()


@pytest.mark.parametrize("case", SIZES)
def test_upsampling(case, block):
    """The blocks' logits are torch's, and the transposes carry any gradient back."""
    low, full, corners = SIZES[case]
    logits, _ = drawn(low, full)
    over, v = Slabs(logits, full, corners, torch.float64), torch.empty(2, 3, *full, dtype=torch.float64)
    seed, dx = torch.randn_like(v), over.gradient()
    for strip in over.strips:
        (rows,) = over.blocks(strip)
        over.put(v, strip, rows, over.up(over.wide(strip), strip, rows))
        over.add(dx, strip, over.narrow(over.down(None, over.of(seed, strip, rows), strip, rows), strip))
    want = up(logits, full, corners)
    torch.testing.assert_close(v, want)
    torch.testing.assert_close(over.finished(dx), torch.autograd.grad(want, logits, seed)[0])


def test_an_interpolation_along_long_lines(monkeypatch):
    """Lines of more logits than a product pays for, and a factor that is not the quotient of the sizes."""
    monkeypatch.setattr(upsampled_slabs, "_DENSE", 1)
    logits, _ = drawn((3, 3, 6), ())
    factors = (1.7, 2.4, 1.3)
    want = F.interpolate(logits, scale_factor=factors, mode="trilinear")
    over, v = Slabs(logits, want.shape[2:], False, torch.float64, factors), torch.empty_like(want)
    for strip in over.strips:
        (rows,) = over.blocks(strip)
        over.put(v, strip, rows, over.up(over.wide(strip), strip, rows))
    torch.testing.assert_close(v, want)


@pytest.mark.parametrize("C", [1, 2, 3, 9])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(C, reduction, block):
    low, full, corners = SIZES["larger"]
    logits, target = drawn(low, full, C)
    weight = torch.linspace(0.5, 1.5, C, dtype=torch.float64)
    options = {"label_smoothing": 0.1, "ignore_index": C - 1 if C > 1 else -100, "reduction": reduction}
    want = F.cross_entropy(up(logits, full, corners), target, weight, **options)
    with fastseg.force("upsample_cross_entropy3d", "blocks"), fastseg.explain() as report:
        ours = upsample_cross_entropy(logits, target.to(torch.uint8), weight, **options)
    assert [r.form for r in report if r.op == "upsample_cross_entropy3d"] == ["blocks"]
    seed = torch.rand_like(want)
    assert_same((ours * seed).sum(), (want * seed).sum(), logits)


def test_layouts_dtypes_and_autocast():
    low, full, _ = SIZES["larger"]
    logits, target = drawn(low, full, dtype=torch.float32)
    last = logits.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with fastseg.force("upsample_cross_entropy3d", "blocks"):
        assert_same(upsample_cross_entropy(last, target), F.cross_entropy(up(last, full, False), target), last)
        half = logits.detach().bfloat16().requires_grad_()
        loss = upsample_cross_entropy(half, target)
        assert loss.dtype == torch.bfloat16
        assert torch.autograd.grad(loss, half)[0].dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert upsample_cross_entropy(half, target).dtype == torch.float32
        everyother = torch.randn(2, 3, 6, 4, 10)[:, :, ::2, :, ::2].requires_grad_()
        ours, want = upsample_cross_entropy(everyother, target), F.cross_entropy(up(everyother, full, False), target)
        torch.testing.assert_close(torch.autograd.grad(ours, everyother), torch.autograd.grad(want, everyother))
        with pytest.raises(IndexError):
            upsample_cross_entropy(logits, target + 1)
        assert upsample_cross_entropy(logits * torch.inf, target).isnan()  # refused: as torch has it


@pytest.mark.parametrize("C", [1, 2, 3, 9])
def test_sums(C, block):
    """Regions, entropies and factors of voxels, few classes and many; labels of each class."""
    low, full, corners = SIZES["thick slices"]
    logits, target = drawn(low, full, C)
    factor = torch.rand(target.shape, dtype=torch.float64)
    flat = lambda x: x.flatten(-2)  # (..., D, H * W): a map of the final size
    softmax = [(1.0, losses.CrossEntropy()), (0.5, losses.Dice()), (0.3, losses.Focal())]
    sigmoid = [(1.0, losses.BinaryCrossEntropy()), (0.5, losses.Dice(activation="sigmoid"))]
    with fastseg.reference():
        for terms, labels in ((softmax, target), (sigmoid, F.one_hot(target, C).movedim(-1, 1))):
            if C == 1 and terms is softmax:
                continue
            want = upsample_loss(flat(up(logits, full, corners)), flat(labels), terms, pixel_weight=flat(factor))
            assert_same(upsample_loss(logits, labels, terms, pixel_weight=factor), want, logits)


def test_second_derivatives():
    logits, target = drawn((2, 1, 2), (3, 2, 3), 2, 1)

    def loss(x):
        with fastseg.reference():
            return upsample_loss(x, target, [(1.0, losses.Dice())])

    assert torch.autograd.gradgradcheck(loss, (logits,), check_undefined_grad=False)
    with fastseg.force("upsample_cross_entropy3d", "blocks"):
        assert torch.autograd.gradgradcheck(lambda x: upsample_cross_entropy(x, target), (logits,))


@pytest.mark.parametrize("C", [1, 2, 5])
def test_heads(C, block):
    low, full, corners = (2, 3, 3), (3, 5, 4), True
    logits = drawn(low, full, C)[0].detach()
    v, options = up(logits, full, corners), {"align_corners": corners}
    with fastseg.reference():
        for measure in ("probability", "margin", "entropy"):
            classes, values = upsample_confidence(logits, full, measure=measure, **options)
            p = v.softmax(1)
            best = torch.cat([p, torch.zeros_like(p)], 1).topk(2, 1).values
            want = {"probability": best[:, 0], "margin": best[:, 0] - best[:, 1], "entropy": -(p * p.log()).sum(1)}
            torch.testing.assert_close(values, want[measure].float())
            assert torch.equal(classes, v.argmax(1).to(torch.uint8))
        found = upsample_topk(logits, min(3, C), full, **options)
        want = v.softmax(1).topk(min(3, C), 1)
        torch.testing.assert_close(found[1], want.values.float())
        assert torch.equal(found[0], want.indices)
    assert torch.equal(upsample_argmax(logits, full, **options), v.argmax(1).to(torch.uint8))
    assert upsample_confidence(logits[:0], full)[0].shape == (0, *full)


@pytest.mark.parametrize("value, form", [(1.0, "walk"), (torch.nan, "slabs")])
def test_sums_of_volumes_take_blocks_where_numbers_allow(value, form, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    logits, target = torch.full((1, 2, 2, 3, 2), value), torch.zeros(1, 4, 5, 3, dtype=torch.int64)
    with fastseg.explain() as seen:
        upsample_loss_sums(logits, target, (Column(KINDS[SOFTMAX][0]),))
    assert [d.form for d in seen if d.op == "upsample_loss_sums3d"] == [form]
