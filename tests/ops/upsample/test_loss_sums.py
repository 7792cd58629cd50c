"""The kernels of sums over upsampled logits, against torch's own steps at full resolution."""

import pytest
import torch
from head_inputs import AC

import fastseg
from fastseg.losses import CrossEntropy, Dice
from fastseg.nn import UpsampleLoss
from fastseg.ops.core.dispatch import HAS_TRITON, INTERPRETED
from fastseg.ops.core.loss_columns import KINDS, SIGMOID, SOFTMAX, Column, Sums
from fastseg.ops.core.loss_full import at_full_size
from fastseg.ops.upsample_loss_sums import upsample_loss_sums
from fastseg.testing import guard, guarded

if INTERPRETED:
    from traffic import count_traffic

NAN = float("nan")


@pytest.fixture(autouse=True)
def small_blocks():
    """Several programs and ragged edges at sizes that the interpreter can bear."""
    if not HAS_TRITON:
        yield
        return
    from fastseg.kernels.runtime import config

    sums = config.override("upsample_loss_sums", BLOCK_H=4, BLOCK_W=8, BLOCK_C=4)
    inner = config.override("upsample_loss_inner", BLOCK_H=4, BLOCK_W=8, BLOCK_C=4)
    with sums, inner, config.override("upsample_loss_bwd", BLOCK_H=4, BLOCK_X=4, LANES=1, BLOCK_C=4):
        yield


def every(activation):
    """All columns, focal ones with and without a threshold."""
    for kind in KINDS[activation]:
        focal = kind.startswith(("focal", "factor"))
        for threshold in (0.0, 0.5) if focal and activation == SIGMOID else (0.0,):
            yield Column(kind, 1.5 if focal else 0.0, threshold)


def inputs(classes, form, device, size=(5, 7), dtype=torch.float32, low=(2, 3)):
    logits = (2 * torch.randn(2, classes, *low, device=device)).to(dtype).requires_grad_()
    if form == "classes":
        target = torch.randint(classes, (2, *size), device=device)
    elif form == "each":
        target = torch.randint(2, (2, classes, *size), device=device)
    else:
        return logits, torch.rand(2, classes, *size, device=device)
    return logits, target.masked_fill(torch.rand(target.shape, device=device) < 0.2, 255)


def check(logits, target, columns, activation, *, weight=None, align_corners=False, tol=3e-6, ignore_index=255):
    columns = tuple(columns)
    sums = upsample_loss_sums(logits, target, columns, activation, ignore_index=ignore_index, pixel_weight=weight,
                              align_corners=align_corners)  # fmt: skip
    wide = logits.detach().double().cpu().requires_grad_()
    weight = None if weight is None else weight.double().cpu()
    target = target.double() if target.is_floating_point() else target
    want = at_full_size(wide, target.cpu(), weight, Sums(columns, activation, ignore_index, align_corners))
    torch.testing.assert_close(sums.cpu(), want, rtol=tol, atol=tol)
    seed = torch.randn_like(want)
    (got,) = torch.autograd.grad(sums, logits, seed.to(sums.device))
    (grad,) = torch.autograd.grad(want, wide, seed)
    scale = grad.abs().max().clamp_min(1)
    torch.testing.assert_close(got.double().cpu() / scale, grad / scale, rtol=10 * tol, atol=10 * tol)


@pytest.mark.parametrize(("activation", "form", "classes"), [
    (SOFTMAX, "classes", 5), (SIGMOID, "each", 3), (SIGMOID, "classes", 5), (SIGMOID, "soft", 3),
    (SOFTMAX, "each", 3), (SOFTMAX, "soft", 5),
], ids=str)  # fmt: skip
def test_every_column(activation, form, classes, device):
    """More columns than a launch takes."""
    check(*inputs(classes, form, device), every(activation), activation)


DICE = (Column("nll"), Column("inter"), Column("prob"), Column("target"))


@AC
@pytest.mark.parametrize(("classes", "size", "low"), [
    (1, (5, 7), (2, 3)), (2, (3, 17), (2, 6)), (5, (2, 3), (2, 3)), (3, (9, 3), (2, 3)),
], ids=str)  # fmt: skip
def test_shapes(classes, size, low, align_corners, device):
    """One class and two, more classes and cells than a program takes, an axis that keeps its size."""
    check(*inputs(classes, "classes", device, size, low=low), DICE, SOFTMAX, align_corners=align_corners)


def test_a_whole_loss(device):
    """Cross entropy plus Dice, by kernels and by reference."""
    logits, target = inputs(3, "classes", device)
    loss = UpsampleLoss([(1.0, CrossEntropy(label_smoothing=0.1)), (0.5, Dice(batch=True))], ignore_index=255)
    value = loss(logits, target)
    with fastseg.reference():
        want = loss(logits, target)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (value, want)), rtol=1e-4, atol=1e-6)


def test_pixel_weights(device):
    for activation, form in ((SOFTMAX, "classes"), (SOFTMAX, "soft"), (SIGMOID, "each")):
        weight = torch.rand(2, 5, 7, device=device)
        columns = DICE if activation == SOFTMAX else (Column("bce"), *DICE[1:])
        check(*inputs(3, form, device), columns, activation, weight=weight)


def test_fp64_gradients():
    if not INTERPRETED:
        pytest.skip("fp64 kernels run under the interpreter")
    for activation, form in ((SOFTMAX, "classes"), (SIGMOID, "each")):
        logits, target = inputs(3, form, "cpu", dtype=torch.float64)
        columns = (Column("focal", 2.0), *DICE, Column("square")) if activation == SOFTMAX else every(SIGMOID)
        check(logits, target, columns, activation, tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_logits(dtype, device):
    logits, target = inputs(3, "classes", device)
    half = logits.detach().to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    sums = upsample_loss_sums(half, target, DICE, ignore_index=255)
    want = upsample_loss_sums(half.detach().float().requires_grad_(), target, DICE, ignore_index=255)
    torch.testing.assert_close(sums, want)
    (grad,) = torch.autograd.grad(sums[..., 1].sum(), half)
    assert grad.dtype == dtype and grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool], ids=str)
def test_labels_of_every_dtype(dtype, device):
    logits, target = inputs(2, "each", device)
    target = target.clamp(max=1)
    columns = (Column("bce"), Column("count"))
    sums = upsample_loss_sums(logits, target.to(dtype), columns, SIGMOID, ignore_index=None)
    torch.testing.assert_close(sums, upsample_loss_sums(logits, target, columns, SIGMOID, ignore_index=None))


def test_the_same_bits_twice(device):
    logits, target = inputs(3, "classes", device)
    runs = [torch.autograd.grad(upsample_loss_sums(logits, target, DICE, ignore_index=255).sum(), logits)[0]
            for _ in range(2)]  # fmt: skip
    assert torch.equal(*runs)


def test_a_pixel_that_does_not_count_leaves_nothing(device):
    """Not a NaN either, on an axis that keeps its size."""
    logits, target = inputs(3, "classes", device, (3, 4), low=(3, 4))
    with torch.no_grad():
        logits[0, 1, 2, 0] = NAN
    target[0, 2, 0] = 255
    sums = upsample_loss_sums(logits, target, DICE, ignore_index=255)
    assert sums.isfinite().all()
    (grad,) = torch.autograd.grad(sums.sum(), logits)
    assert torch.equal(grad.isnan().nonzero().cpu(), torch.empty(0, 4, dtype=torch.int64))


def test_empty_batch(device):
    logits = torch.randn(0, 3, 4, 4, device=device, requires_grad=True)
    sums = upsample_loss_sums(logits, torch.zeros(0, 8, 8, dtype=torch.int64, device=device), DICE)
    assert sums.shape == (0, 3, 4)
    assert torch.autograd.grad(sums.sum(), logits)[0].shape == logits.shape


def test_stays_inside_its_buffers(device):
    for activation, form in ((SOFTMAX, "classes"), (SOFTMAX, "each"), (SIGMOID, "each")):
        with guarded():
            logits, target = inputs(3, form, device)
            logits, target = guard(logits.detach()).requires_grad_(), guard(target)
            columns = DICE if activation == SOFTMAX else (Column("bce"), *DICE[1:])
            sums = upsample_loss_sums(logits, target, columns, activation, ignore_index=255)
            assert torch.autograd.grad(sums.sum(), logits)[0].isfinite().all()


@AC
def test_softmax_of_labels_of_each_class(align_corners, device):
    """More classes and cells than a program takes; an image whose labels all do not count; one class."""
    logits, target = inputs(6, "each", device, (3, 17), low=(2, 6))
    target[1] = 255
    check(logits, target, DICE, SOFTMAX, align_corners=align_corners)
    check(*inputs(1, "soft", device), DICE, SOFTMAX, align_corners=align_corners)


def test_what_runs(device):
    """Softmax of labels of each class has a kernel; torch's own steps are for what has none, and say why."""
    logits, soft = inputs(3, "soft", device)
    with fastseg.explain() as report:
        upsample_loss_sums(logits, soft, DICE)
    first = next(iter(report))
    assert (first.path == "triton") == (not first.why), first
    if INTERPRETED or device.type == "cuda":
        assert first.path == "triton"


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")
def test_traffic():
    """To the byte: the figures in the header of the kernels."""
    N, C, LOW, FULL, K = 2, 4, 2, 16, len(DICE)
    logits = torch.randn(N, C, LOW, LOW, requires_grad=True)
    target = torch.randint(C, (N, FULL, FULL), dtype=torch.uint8)
    lo, pixels = 4 * N * C * LOW * LOW, N * FULL * FULL
    columns, segments = 2, LOW  # blocks of 8 columns; a segment of one cell row
    with count_traffic() as traffic:
        sums = upsample_loss_sums(logits, target, DICE)
    log_sum = (lo + pixels, 4 * pixels + 3 * 4 * N * LOW)
    assert traffic.total.launches == 2
    assert traffic.total.read_bytes == log_sum[0] + lo + 5 * pixels
    assert traffic.total.written_bytes == log_sum[1] + 4 * N * C * K * columns * segments
    slopes = torch.randn_like(sums)
    with count_traffic() as traffic:
        torch.autograd.grad(sums, logits, slopes)
    assert traffic.total.launches == 2
    assert traffic.total.read_bytes == 2 * (lo + 5 * pixels + 4 * N * C * K) + 4 * pixels
    assert traffic.total.written_bytes == 4 * pixels + lo


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")
def test_traffic_of_labels_of_each_class():
    """The log-sum reads no label; each later launch reads them once."""
    N, C, LOW, FULL, K = 2, 4, 2, 16, len(DICE)
    logits = torch.randn(N, C, LOW, LOW, requires_grad=True)
    target = torch.rand(N, C, FULL, FULL)
    lo, pixels = 4 * N * C * LOW * LOW, 4 * N * FULL * FULL
    columns, segments = 2, LOW
    with count_traffic() as traffic:
        sums = upsample_loss_sums(logits, target, DICE)
    assert traffic.total.launches == 2
    assert traffic.total.read_bytes == lo + lo + pixels + C * pixels
    assert traffic.total.written_bytes == pixels + 4 * N * C * K * columns * segments
    slopes = torch.randn_like(sums)
    with count_traffic() as traffic:
        torch.autograd.grad(sums, logits, slopes)
    assert traffic.total.launches == 2
    assert traffic.total.read_bytes == 2 * (lo + pixels + C * pixels + 4 * N * C * K) + pixels
    assert traffic.total.written_bytes == pixels + lo
