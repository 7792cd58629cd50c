"""The heads' plain CPU paths: on one thread and several, few classes and many, with few calls of torch."""

import os
import threading

import pytest
import torch
import torch.nn.functional as F
from head_inputs import LAYOUTS, allocations
from torch.utils._python_dispatch import TorchDispatchMode

import fastseg
from fastseg.ops import upsample_argmax, upsample_cross_entropy
from fastseg.ops.core import dispatch
from fastseg.ops.cpu.argmax import request_of
from fastseg.ops.cpu.cross_entropy_rows import fastest
from fastseg.ops.cpu.threads import each
from fastseg.ops.upsample_argmax import FORMS

CLASSES = [1, 2, 3, 21, 150]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Calls(TorchDispatchMode):
    """Counts torch's calls that compute; views and empty tensors are none."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.count += not (op.is_view or "empty" in op.name())
        return out


def two_steps(x, target, **options):
    x = x.detach().double().requires_grad_()
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    full = F.interpolate(x, target.shape[1:], mode="bilinear")
    loss = F.cross_entropy(full, target.long(), **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def options_of(kind: str, classes: int, target: torch.Tensor) -> dict:
    if kind == "plain":
        return {}
    target[:, ::3] = 255
    return {"weight": torch.rand(classes) + 0.1, "ignore_index": 255, "label_smoothing": 0.1, "reduction": kind}


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch):
    """As on a machine without Triton's interpreter."""
    monkeypatch.setattr(dispatch, "INTERPRETED", False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("classes", "kind"), [
    *((classes, kind) for classes in CLASSES for kind in ("plain", "none")), *((c, "mean") for c in (1, 2, 13, 21)),
    (13, "none"), (13, "sum"),
])  # fmt: skip
def test_loss(classes, kind, layout, threads):
    """Every form: planes, two classes by their difference, strips; over several strips of an image of odd size."""
    side = {1: 96, 2: 300, 3: 96, 13: 40, 21: 200, 150: 130}[classes]
    logits = (3 * torch.randn(2, classes, 9, 7)).to(memory_format=layout).requires_grad_()
    target = torch.randint(classes, (2, side, side + 3))
    options = options_of(kind, classes, target)
    loss = upsample_cross_entropy(logits, target, **options)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    want, want_grad = two_steps(logits, target, **options)
    torch.testing.assert_close(loss.detach(), want.float(), rtol=3e-6, atol=3e-6)
    scale = want_grad.abs().max().clamp_min(1e-6)
    torch.testing.assert_close(grad / scale, (want_grad / scale).float(), rtol=0, atol=2e-5)
    assert classes == 1 or grad.stride() == logits.stride()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_argmax(classes, layout, threads):
    side = {1: 40, 2: 40, 3: 40, 21: 131, 150: 68}[classes]
    logits = torch.randn(2, classes, 9, 7).to(memory_format=layout)
    if classes > 3:
        logits[:, 3] = logits[:, 1]
    got = upsample_argmax(logits, (side, side + 3))
    full = F.interpolate(logits.double(), (side, side + 3), mode="bilinear")
    chosen = full.gather(1, got.long()[:, None])[:, 0]
    assert got.dtype == torch.uint8 and got.shape == (2, side, side + 3)
    assert (full.amax(1) - chosen).max() <= 1e-6
    assert not (got == 3).any()  # its equal, class 1, comes first


@pytest.mark.parametrize("values", [(1.0, 1.0), (float("nan"), 0.0), (0.0, float("nan")), (3e38, -3e38)], ids=str)
def test_two_classes_equal_or_not_finite(values):
    logits = torch.tensor(values).view(1, 2, 1, 1).expand(1, 2, 3, 3).contiguous()
    got = upsample_argmax(logits, 8)
    assert torch.equal(got.long(), F.interpolate(logits, (8, 8), mode="bilinear").argmax(1))


def test_one_confident_label_in_two_classes():
    """Where the logits differ by 1e4 a loss is 0 or that difference; a mean over one kind must not cancel."""
    logits = torch.tensor([1e4, 0.0]).view(1, 2, 1, 1).repeat(1, 1, 8, 8).requires_grad_()
    target = torch.zeros(1, 400, 400, dtype=torch.uint8)
    target[:, 100:] = 1
    loss = upsample_cross_entropy(logits, target, reduction="none")
    assert not loss[:, :100].any()
    torch.testing.assert_close(loss[:, 100:], torch.full((1, 300, 400), 1e4), rtol=1e-6, atol=0)
    assert upsample_cross_entropy(logits, target).item() == pytest.approx(7500, rel=1e-6)


@pytest.mark.parametrize(("classes", "side", "one", "two"), [
    (1, 512, "planes", "planes"), (2, 128, "block", "block"), (2, 512, "rows", "rows"),
    (4, 512, "planes", "planes"), (5, 512, "rows", "planes"), (5, 128, "planes", "planes"),
    (21, 128, "pixels", "pixels"), (21, 256, "rows", "pixels"), (21, 512, "rows", "rows"),
    (150, 128, "rows", "rows"),
])  # fmt: skip
def test_form_of_the_loss(classes, side, one, two, threads):
    """Batch 2. Rows of small maps took 1.4 of eager's time on two threads."""
    assert fastest(classes, 2 * side * side) == (one if threads == 1 else two)


@pytest.mark.skipif(dispatch.INTERPRETED, reason="there the kernels run")
@pytest.mark.parametrize(("changed", "reduction", "form"), [
    (0.0, "mean", "block"), (0.0, "none", "planes"), (float("inf"), "sum", "reference"),
])  # fmt: skip
def test_two_classes_in_one_block(changed, reduction, form):
    """From about a hundred pixels a side on; a loss for each pixel, and infinity, take torch's steps."""
    logits, target = torch.randn(2, 2, 16, 16), torch.randint(2, (2, 128, 128))
    with fastseg.explain() as report:
        upsample_cross_entropy(logits + changed, target, reduction=reduction)
    assert next(iter(report)).form == form


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_of_one_class(bad):
    """0 with gradient 0, NaN where the logits are not finite, and nothing stays on the caller's tensor."""
    logits = torch.randn(1, 1, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    target = torch.zeros(1, 16, 16, dtype=torch.long)
    loss = upsample_cross_entropy(logits, target, reduction="none")
    assert not loss.any() and not torch.autograd.grad(loss.sum(), logits)[0].any()
    assert not logits._backward_hooks
    with pytest.raises(IndexError):
        upsample_cross_entropy(logits, target + 1)
    assert upsample_cross_entropy(logits, target - 100).isnan()
    broken = logits.detach().clone()
    broken[..., 0, 0] = bad
    got = upsample_cross_entropy(broken, target, reduction="none")
    want = F.cross_entropy(F.interpolate(broken, (16, 16), mode="bilinear"), target, reduction="none")
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()


@pytest.mark.parametrize(("classes", "side", "one", "two"), [
    (5, 64, False, False), (21, 512, True, False), (21, 640, True, True), (150, 128, False, False),
    (150, 240, True, True),
])  # fmt: skip
def test_argmax_in_strips(classes, side, one, two, threads):
    """Large maps only: torch's two steps are as fast as eager for others, whatever the layout."""
    chosen = FORMS.choose(request_of(torch.zeros(1, classes, 2, 2), side, side)).form.name
    assert (chosen == "rows") == (one if threads == 1 else two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_argmax_of_16_bits_is_interpolated_in_32(classes, dtype):
    logits = torch.randn(1, classes, 6, 5).to(dtype)
    got = upsample_argmax(logits, (60, 50))
    full = F.interpolate(logits.double(), (60, 50), mode="bilinear")
    assert (full.amax(1) - full.gather(1, got.long()[:, None])[:, 0]).max() <= 1e-6


@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize(("head", "classes", "most"), [
    ("argmax", 1, 1), ("argmax", 2, 10), ("argmax", 21, 1100), ("loss", 1, 14), ("loss", 2, 160), ("loss", 21, 1150),
])  # fmt: skip
def test_calls(head, classes, most, threads):
    """512 x 512 pixels from strides of 4: blocks, not rows or pixels, decide on the number of torch's calls."""
    logits = torch.randn(1, classes, 128, 128, requires_grad=True)
    target = torch.randint(classes, (1, 512, 512))
    with Calls() as calls, allocations() as seen:
        if head == "argmax":
            upsample_argmax(logits, 512)
        else:
            torch.autograd.grad(upsample_cross_entropy(logits, target), logits)
    assert 1 <= calls.count <= most
    if classes == 21:
        assert seen.largest <= 21 * 512 * 512 / 8


def test_parts_on_threads():
    """Results in order, one thread a part, the first part's error, and this thread's number as before; fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            kept = torch.zeros(8)

            def part(i):
                kept[i] = i  # an inference tensor: only in inference mode
                return i, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

            assert each(part, range(8)) == [(i, 1, False) for i in range(8)]
        assert kept.tolist() == list(range(8))
        assert torch.get_num_threads() == 2
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]

        def fails(i):
            if i >= 3:
                raise IndexError(f"part {i}")

        with pytest.raises(IndexError, match=r"part [34]"):
            each(fails, range(8))
        if hasattr(os, "fork"):
            child = os.fork()
            if child == 0:
                os._exit(each(abs, [-1, 2]) != [1, 2])
            assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_a_wrong_label_in_one_strip(threads):
    logits, target = torch.randn(1, 2, 8, 8), torch.zeros(1, 512, 512, dtype=torch.uint8)
    target[0, 400, 7] = 9
    with pytest.raises(IndexError, match=r"Target 9 is out of bounds\."):
        upsample_cross_entropy(logits, target)


def test_under_a_default_device():
    """What an op makes for itself lies on a CPU, where its arguments are."""
    logits, target = torch.randn(1, 6, 40, 40, requires_grad=True), torch.randint(6, (1, 300, 300))
    want = upsample_cross_entropy(logits, target), upsample_argmax(logits, 300)
    with torch.device("meta"):
        got = upsample_cross_entropy(logits, target), upsample_argmax(logits, 300)
        torch.autograd.grad(got[0], logits)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_values_are_not_read_while_something_follows(classes):
    """A transform, which has none to read, and a trace, which holds for other values."""
    logits = torch.randn(3, 1, classes, 4, 4)
    want = torch.stack([upsample_argmax(each, 8) for each in logits])
    assert torch.equal(torch.func.vmap(lambda each: upsample_argmax(each, 8))(logits), want)
    traced = torch.jit.trace(lambda each: upsample_argmax(each, 8), logits[0])
    broken = logits[1].clone()
    broken[0, 0, 1, 1] = float("nan")
    assert torch.equal(traced(broken), upsample_argmax(broken, 8))
