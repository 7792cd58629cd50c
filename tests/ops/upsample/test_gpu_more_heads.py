"""What only a GPU shows of the heads beside ``test_gpu_heads.py``: confidence, volumes, masks, sums for losses, sums of
maps. Each is compared with torch's own steps in fp32 or fp64, twice gives the same bits, is captured, and waits for
nothing; every candidate configuration gives the same."""

from collections.abc import Callable

import pytest
import torch
from candidates import check_candidates
from torch import Tensor
from torch.nn import functional as F

from fastseg.losses import CrossEntropy, Dice
from fastseg.nn import UpsampleLoss
from fastseg.ops import masks_to_classes, upsample_argmax, upsample_confidence, upsample_sum, upsample_trilinear
from fastseg.ops.core.loss_columns import Column

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
bf16 = torch.bfloat16


def draw(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
    return (2 * torch.randn(shape, device=DEVICE)).to(dtype)


def confidence(C: int = 21) -> tuple[Callable[[], list[Tensor]], Callable[[list[Tensor]], None]]:
    logits = draw(2, C, 33, 47)
    run = lambda: [t for m in ("probability", "margin", "entropy") for t in upsample_confidence(logits, 129, measure=m)]

    def check(got: list[Tensor]) -> None:
        v = F.interpolate(logits.float(), (129, 129), mode="bilinear")
        p = v.softmax(1)
        first, second = p.topk(2, 1).values.unbind(1)
        for classes, values, want in zip(
            got[::2], got[1::2], (first, first - second, -(p * v.log_softmax(1)).sum(1)), strict=True
        ):
            assert (v.amax(1) - v.gather(1, classes.long()[:, None])[:, 0]).max() <= 1e-4
            torch.testing.assert_close(values, want, rtol=1e-3, atol=1e-4)

    return run, check


def volume(C: int = 16):
    logits = draw(1, C, 17, 24, 31)
    size = (33, 48, 65)

    def check(got: list[Tensor]) -> None:
        v = F.interpolate(logits.float(), size, mode="trilinear")
        assert (v.amax(1) - v.gather(1, got[0].long()[:, None])[:, 0]).max() <= 1e-4

    return lambda: [upsample_argmax(logits, size)], check


def masks(dtype: torch.dtype = bf16, Q: int = 100, K: int = 150):
    scores, logits = draw(2, Q, K + 1, dtype=dtype), draw(2, Q, 33, 47, dtype=dtype)

    def check(got: list[Tensor]) -> None:
        p = scores.double().softmax(-1)[..., :-1]
        s = torch.einsum("nqk,nqhw->nkhw", p, F.interpolate(logits.double(), (129, 180), mode="bilinear").sigmoid())
        worse = s.amax(1) - s.gather(1, got[0].long()[:, None])[:, 0]
        assert worse.max() <= (1e-5 if dtype == torch.float32 else 2e-3) * s.amax()

    return lambda: [masks_to_classes(scores, logits, (129, 180))], check


def loss(C: int = 19):
    logits = draw(2, C, 33, 47, dtype=torch.float32).requires_grad_()
    target = torch.randint(C, (2, 129, 180), device=DEVICE)
    target[:, ::10] = 255
    module = UpsampleLoss([(1.0, CrossEntropy()), (1.0, Dice())], ignore_index=255)

    def run() -> list[Tensor]:
        value = module(logits, target)
        return [value.detach(), *torch.autograd.grad(value, logits)]

    def check(got: list[Tensor]) -> None:
        wide = logits.detach().double().requires_grad_()
        v = F.interpolate(wide, target.shape[-2:], mode="bilinear")
        value = module(v, target)  # at its own size: nothing is interpolated
        torch.testing.assert_close(got[0].double(), value.detach(), rtol=1e-4, atol=1e-5, check_dtype=False)
        (grad,) = torch.autograd.grad(value, wide)
        assert (got[1].double() - grad).abs().max() <= 1e-3 * grad.abs().max()

    return run, check


def levels(C: int = 64):
    base, *small = [
        draw(2, C, 96 >> i, 72 >> i).contiguous(memory_format=torch.channels_last) for i in range(4)
    ]  # fmt: skip

    def check(got: list[Tensor]) -> None:
        want = base.float() + sum(F.interpolate(m.float(), base.shape[2:], mode="bilinear") for m in small)
        assert (got[0].float() - want.relu()).abs().max() <= 2**-6 * want.abs().max()

    return lambda: [upsample_sum(base, small, act="relu")], check


def trilinear(C: int = 8):
    x = draw(2, C, 9, 12, 15, dtype=torch.float32).requires_grad_()
    dy = torch.linspace(-1, 1, 2 * C * 17 * 24 * 31, device=DEVICE).view(2, C, 17, 24, 31)

    def run() -> list[Tensor]:
        y = upsample_trilinear(x, (17, 24, 31))
        return [y.detach(), *torch.autograd.grad(y, x, dy)]

    def check(got: list[Tensor]) -> None:
        wide = x.detach().double().requires_grad_()
        y = F.interpolate(wide, (17, 24, 31), mode="trilinear")
        want = [y.detach(), *torch.autograd.grad(y, wide, dy.double())]
        for g, w in zip(got, want, strict=True):
            assert (g.double() - w).abs().max() <= 1e-4 * w.abs().max()

    return run, check


OPS = {op.__name__: op for op in (confidence, volume, masks, loss, levels, trilinear)}
KERNELS = {
    "upsample_confidence": confidence, "upsample_argmax3d_fwd": volume, "masks_to_classes_fwd": masks,
    "upsample_loss_sums": loss, "upsample_loss_inner": loss, "upsample_sum_fwd": levels,
}  # fmt: skip
CLASSES = {"upsample_argmax3d_fwd", "masks_to_classes_fwd", "upsample_confidence"}  # ties may go either way


@pytest.mark.parametrize("name", OPS)
def test_against_torch(name):
    run, check = OPS[name]()
    check(run())


def test_masks_in_fp32():
    run, check = masks(torch.float32)
    check(run())


@pytest.mark.parametrize("name", OPS)
def test_ten_runs_give_the_same_bits(name):
    torch.use_deterministic_algorithms(True)
    run, _ = OPS[name]()
    first = run()
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("name", sorted(OPS.keys() - {"loss", "trilinear"}))
def test_graph_capture_and_replay(name):
    run, _ = OPS[name]()
    with torch.no_grad():
        want = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_nothing_waits_for_the_gpu(name):
    run, _ = OPS[name]()
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_past_2_31_voxels():
    """The last volume's classes begin past 2^31 voxels, and past 2^31 upsampled logits by far."""
    logits = draw(17, 3, 64, 256, 256)
    classes = upsample_argmax(logits, (128, 1024, 1024))
    for image in (0, 16):
        assert torch.equal(classes[image], upsample_argmax(logits[image : image + 1], (128, 1024, 1024))[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_candidate_gives_the_same(kernel):
    run, check = KERNELS[kernel]()

    def close(got: Tensor, want: Tensor) -> None:
        if kernel in CLASSES and not got.is_floating_point():
            assert (got != want).float().mean() <= 1e-3
        else:
            rtol, atol = (2e-2, 2e-2) if got.dtype == bf16 else (1e-3, 1e-5)
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol)

    check_candidates(kernel, run, close)
    check(run())


def test_a_column_alone():
    """One sum, sigmoid, and a label for each class: the shapes of the kernels that a whole loss does not reach."""
    from fastseg.ops.core.loss_columns import SIGMOID, Sums
    from fastseg.ops.core.loss_full import at_full_size
    from fastseg.ops.upsample_loss_sums import upsample_loss_sums

    logits = draw(2, 3, 33, 47, dtype=torch.float32).requires_grad_()
    target = torch.randint(2, (2, 3, 129, 180), device=DEVICE, dtype=torch.uint8)
    columns = (Column("focal_pos", 1.5), Column("focal_neg", 1.5))
    sums = upsample_loss_sums(logits, target, columns, SIGMOID, ignore_index=None)
    wide = logits.detach().double().requires_grad_()
    want = at_full_size(wide, target, None, Sums(columns, SIGMOID, None, False))
    torch.testing.assert_close(sums.double(), want, rtol=1e-4, atol=1e-4)
    got, exact = torch.autograd.grad(sums.sum(), logits)[0], torch.autograd.grad(want.sum(), wide)[0]
    assert (got.double() - exact).abs().max() <= 1e-3 * exact.abs().max()


def test_softmax_of_probabilities():
    """A label for each class: the log-sum reads none, and the others read a number for each class."""
    from fastseg.ops.core.loss_columns import SOFTMAX, Sums
    from fastseg.ops.core.loss_full import at_full_size
    from fastseg.ops.upsample_loss_sums import upsample_loss_sums

    logits = draw(2, 5, 33, 47, dtype=torch.float32).requires_grad_()
    target = torch.rand(2, 5, 129, 180, device=DEVICE)
    columns = tuple(Column(kind) for kind in ("nll", "inter", "prob", "target"))
    sums = upsample_loss_sums(logits, target, columns, SOFTMAX, ignore_index=None)
    wide = logits.detach().double().requires_grad_()
    want = at_full_size(wide, target.double(), None, Sums(columns, SOFTMAX, None, False))
    torch.testing.assert_close(sums.double(), want, rtol=1e-4, atol=1e-3)
    seed = torch.linspace(-1, 1, want.numel(), device=DEVICE, dtype=torch.float64).view_as(want)
    got, exact = torch.autograd.grad(sums, logits, seed)[0], torch.autograd.grad(want, wide, seed)[0]
    assert (got.double() - exact).abs().max() <= 1e-3 * exact.abs().max()
