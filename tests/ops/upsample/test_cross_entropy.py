"""Cross entropy from low-resolution logits, against torch's two steps at full resolution."""

import contextlib
import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from head_inputs import AC, LAYOUTS, SIZES, allocations, interpolate

import fastseg
from fastseg.kernels.runtime.launch import intercept
from fastseg.ops import upsample_cross_entropy
from fastseg.ops.core import dispatch
from fastseg.ops.core.dispatch import HAS_TRITON, INTERPRETED
from fastseg.ops.registered.upsample_cross_entropy import Call, launch_bwd, launch_fwd
from fastseg.testing import check_op, guard, guarded

NAN, INF = float("nan"), float("inf")


def without_kernels():
    """As on a machine without Triton's interpreter: the forms of a CPU."""
    return mock.patch.object(dispatch, "INTERPRETED", False)


def two_steps(logits, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, *, align_corners):
    full = interpolate(logits, align_corners, target.shape[-2:])
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return F.cross_entropy(full, target.long(), weight, **options)


def inputs(shape=(2, 5, 4, 3), size=(11, 9), device="cpu", dtype=torch.float32, layout=torch.contiguous_format):
    logits = torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout).requires_grad_()
    return logits, torch.randint(shape[1], (shape[0], *size), device=device)


def check(*args, align_corners=False, **options):
    terms = max(args[1].numel(), 100)
    check_op(upsample_cross_entropy, two_steps, args, align_corners=align_corners, terms=terms, **options)


def step(*args, **options):
    """-> loss and gradient."""
    loss = upsample_cross_entropy(*args, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), args[0])[0]


@AC
@pytest.mark.parametrize(("shape", "size", "layout", "dtype"), [
    *((shape, size, layout, torch.float32) for shape, size in SIZES[1:-1] for layout in LAYOUTS),
    (*SIZES[0], LAYOUTS[1], torch.float32),
    (*SIZES[1], LAYOUTS[0], torch.float64),
    ((1, 11, 2, 33), (5, 70), LAYOUTS[0], torch.float32),  # more cells and classes than a program takes
    ((1, 3, 3, 4), (27, 70), LAYOUTS[1], torch.float32),  # lanes share a cell
], ids=str)  # fmt: skip
def test_values_and_gradient(shape, size, layout, dtype, align_corners, device):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("fp64 has no kernel on a GPU")
    check(*inputs(shape, size, device, dtype, layout), align_corners=align_corners)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("weighted", "label_smoothing", "ignore_index", "target_dtype"), [
    (True, 0.1, 2, torch.int32),
    (True, 0.0, 255, torch.uint8),
    (False, 0.1, -100, torch.int64),
    (False, 1.0, 2, torch.uint8),
], ids=str)  # fmt: skip
def test_options(weighted, label_smoothing, ignore_index, target_dtype, reduction, device):
    """ignore_index outside the classes, inside, and past what uint8 holds; a class of weight 0."""
    logits, target = inputs((1, 5, 4, 3), (9, 8), device)
    weight = torch.rand(5, device=device) if weighted else None
    if weighted and label_smoothing == 0:
        weight[1] = 0
    target = target.to(target_dtype)
    target[:, 3:5] = ignore_index
    check(logits, target, weight, ignore_index, reduction, label_smoothing, align_corners=True)


@pytest.mark.parametrize("classes", [67, 130])
def test_many_classes(classes, device):
    check(*inputs((1, classes, 2, 2), (4, 3), device), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_computed_in_fp32(dtype, device):
    logits, target = inputs(dtype=dtype, device=device, layout=torch.channels_last)
    check(logits, target, None, 2, "none")
    check(logits, target, torch.rand(5, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_logits(dtype, device):
    """exp(1e4) overflows unless the largest logit is taken off first; a confident pixel has a gradient of exactly 0."""
    logits = (1e4 * torch.randn(1, 4, 5, 5, device=device)).to(dtype).requires_grad_()
    target = torch.randint(4, (1, 10, 10), device=device)
    check(logits, target, None, -100, "none")
    with torch.no_grad():
        logits[:] = torch.tensor([1e4, -1e4, 0, 0], dtype=dtype)[:, None, None]
    loss, _ = step(logits, torch.ones_like(target), reduction="none")
    torch.testing.assert_close(loss, torch.full_like(loss, 20000), rtol=1e-6, atol=0)
    assert not step(logits, torch.zeros_like(target))[1].any()


def test_all_ignored(device):
    """As torch: a mean over nothing is NaN with a zero gradient, a sum over nothing 0."""
    logits, target = inputs(device=device)
    target = torch.full_like(target, 255, dtype=torch.uint8)
    for reduction, expected in (("mean", NAN), ("sum", 0.0), ("none", 0.0)):
        loss, grad = step(logits, target, ignore_index=255, reduction=reduction)
        assert loss.isnan() if expected != expected else (loss == expected).all()
        assert not grad.any() and not grad.isnan().any()


def test_empty_batch(device):
    logits, target = inputs((0, 3, 4, 4), (8, 8), device)
    assert step(logits, target)[0].isnan()
    assert step(logits, target, reduction="sum")[0] == 0
    loss, grad = step(logits, target, reduction="none")
    assert loss.shape == (0, 8, 8) and grad.shape == logits.shape


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("values", [(NAN,), (INF,), (-INF,)], ids=str)
def test_what_is_not_finite(values, reference, device):
    """Pixels without such a corner are as they were; losses of the others as torch has them."""
    logits, target = inputs((1, 3, 4, 5), (8, 10), device)
    with torch.no_grad():
        logits[:, 1, 1, 2] = values[0]
    want = two_steps(logits.cpu(), target.cpu(), reduction="none", align_corners=False)
    want_grad = torch.autograd.grad(want.sum(), logits)[0] if device == "cpu" else None
    with without_kernels() if reference else fastseg.explain():
        loss, grad = step(logits, target, reduction="none")
    torch.testing.assert_close(loss.cpu(), want.detach(), equal_nan=True, atol=2e-6, rtol=2e-6)
    if want_grad is not None:
        torch.testing.assert_close(grad, want_grad, equal_nan=True, atol=2e-6, rtol=2e-6)


def test_minus_infinity_for_a_class_never_meant(device):
    logits, target = inputs((1, 3, 4, 4), (4, 4), device)  # each output is one pixel: no weight is 0 but on its own
    with torch.no_grad():
        logits[:, 1] = -INF
    want = F.cross_entropy(logits.cpu(), 0 * target.cpu(), reduction="none")
    for size in ((5, 7),):
        loss = upsample_cross_entropy(logits, 0 * target.new_ones(1, *size), reduction="none").cpu()
        inside = two_steps(logits.cpu(), torch.zeros(1, *size), reduction="none", align_corners=False)
        torch.testing.assert_close(loss, inside, equal_nan=True)
        assert inside.isfinite().any() and want.isfinite().all()


@pytest.mark.parametrize("reference", [False, True])
def test_target_out_of_range(reference):
    logits, target = inputs((1, 3, 4, 4), (8, 8))
    if not INTERPRETED and not reference:
        pytest.skip("on a GPU the error is asynchronous: test_upsample_heads_gpu.py")
    with without_kernels() if reference else fastseg.explain():
        for bad in (3, -1, -100, 2**31, 2**32 + 1, -(2**63)):
            target[:, 2, 5] = bad
            with pytest.raises(IndexError, match=f"Target {bad} is out of bounds."):
                upsample_cross_entropy(logits, target, ignore_index=255)
        target[:, 2, 5] = 255
        assert upsample_cross_entropy(logits, target, ignore_index=255).isfinite()


@pytest.mark.parametrize("reference", [False, True])
def test_nothing_of_full_size_exists(reference, device):
    """On a CPU a few rows do: the map is larger there."""
    side = 192 if reference else 12  # from 2^20 values on
    logits = torch.randn(1, 40, side // 4, side // 4, device=device).to(memory_format=torch.channels_last)
    logits.requires_grad_()
    target = torch.randint(40, (1, side, side), device=device)
    with without_kernels() if reference else fastseg.explain(), allocations() as seen:
        upsample_cross_entropy(logits, target).backward()
    assert seen.largest <= target.numel() * 40 / (2 if reference else 16)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_memory_at_ade20k_size(layout):
    """16 x 150 x 512^2 in bf16, on tensors without memory: all that is allocated, against eager's peak."""
    if not HAS_TRITON:
        pytest.skip("needs Triton's launchers")

    logits = torch.empty(16, 150, 128, 128, dtype=torch.bfloat16, device="meta", memory_format=layout)
    call = Call(logits, torch.empty(16, 512, 512, dtype=torch.int64, device="meta"), None, 255, "mean", 0.0, False,
                False, True)  # fmt: skip
    with allocations() as seen, intercept(lambda *launch: None):
        _, lse, total = launch_fwd(*call)
        dx = launch_bwd(total, lse, total, *call)
    assert dx.stride() == logits.stride()
    eager = (
        18 * 16 * 150 * 512**2
    )  # bytes of an upsampled logit, of its fp32 copy, of log-softmax, and of the gradients
    assert eager / seen.nbytes > (60 if layout == torch.channels_last else 110)  # channels_last: one copy


def test_stays_inside_its_buffers(device):
    for shape, size in SIZES[:2]:
        with guarded():
            logits, target = inputs(shape, size, device)
            logits, target = guard(logits.detach()).requires_grad_(), guard(target)
            kept = logits.detach().clone(), target.clone()
            weight = guard(torch.rand(shape[1], device=device))
            loss, grad = step(logits, target, weight, label_smoothing=0.1)
        assert torch.equal(logits, kept[0]) and torch.equal(target, kept[1])
        assert loss.isfinite() and grad.isfinite().all()


def test_strided_arguments(device):
    """Sliced logits and targets, a gradient of stride 0, a weight of every second class."""
    base, labels = torch.randn(2, 8, 9, 8, device=device), torch.randint(4, (2, 12, 24), device=device)
    weight = torch.rand(8, device=device)
    logits = base.to(memory_format=torch.channels_last)[:, 1:5, 2:6, 3:].detach().requires_grad_()
    check(logits, labels[:, 1:, ::2], weight[::2], -100, "none")
    loss = upsample_cross_entropy(logits, labels[:, 1:, ::2], reduction="none")
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


def test_gradcheck():
    if not INTERPRETED:
        pytest.skip("fp64 kernels run under the interpreter")
    logits, target = inputs((1, 3, 2, 3), (5, 7), dtype=torch.float64)
    weight = torch.rand(3, dtype=torch.float64)
    options = {"weight": weight, "label_smoothing": 0.2, "ignore_index": 1, "reduction": "none"}
    for loss in (upsample_cross_entropy, functools.partial(upsample_cross_entropy, **options)):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, target), logits, fast_mode=True)


@pytest.mark.parametrize(("reference", "strips"), [(False, False), (True, False), (True, True)])
def test_second_derivative(reference, strips, device):
    logits, target = inputs((1, 6, 30, 30), (300, 300), device) if strips else inputs(device=device)
    with without_kernels() if reference else fastseg.explain():
        (grad,) = torch.autograd.grad(upsample_cross_entropy(logits, target), logits, create_graph=True)
        (same,) = torch.autograd.grad(two_steps(logits, target, align_corners=False), logits, create_graph=True)
        want, got = (torch.autograd.grad(g.square().sum(), logits)[0] for g in (same, grad))
    assert got.abs().max() > 0
    torch.testing.assert_close(got, want)


def test_weights_that_want_a_gradient_take_the_reference(device):
    logits, target = inputs(device=device)
    with fastseg.explain() as report:
        weight = torch.rand(5, device=device, requires_grad=True)
        with pytest.raises(RuntimeError, match="not differentiable"):  # torch has none
            upsample_cross_entropy(logits, target, weight).backward()
    assert [d.why for d in report] == ["the class weights require a gradient"]


def test_autocast_gives_an_fp32_loss(device):
    kind = torch.device(device).type
    for reference in (False, True):
        logits, target = inputs(device=device, dtype=torch.bfloat16)
        with torch.autocast(kind, torch.bfloat16), without_kernels() if reference else fastseg.explain():
            loss = upsample_cross_entropy(logits, target)
        assert loss.dtype == torch.float32
        loss.backward()
        assert logits.grad.dtype == torch.bfloat16


def test_bad_arguments():
    logits, target = torch.randn(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)
    for message, args in {
        r"logits are \(2, 3, 4, 4\) and target is \(1, 8, 8\)": (logits, target[:1]),
        r"give \(N, C, h, w\) and \(N, H, W\)": (logits[0], target),
        "no pixel": (logits, target[:, :0]),
        r"weight is \(4,\)": (logits, target, torch.ones(4)),
        "reduction is 'max'": (logits, target, None, -100, "max"),
        "label_smoothing is 2": (logits, target, None, -100, "mean", 2),
        "tensors on cpu and meta": (logits, target.to("meta")),
    }.items():
        with pytest.raises(ValueError, match=message):
            upsample_cross_entropy(*args)
    with pytest.raises(TypeError, match=r"target is torch\.float32"):
        upsample_cross_entropy(logits, target.float())
    with pytest.raises(TypeError, match=r"logits are torch\.int64"):
        upsample_cross_entropy(logits.long(), target)


@pytest.fixture
def small_blocks():
    if not HAS_TRITON:
        yield
        return
    from fastseg.kernels.runtime import config

    fwd = config.override("upsample_cross_entropy_fwd", BLOCK_H=2, BLOCK_W=8, BLOCK_C=16)
    with fwd, config.override("upsample_cross_entropy_bwd", BLOCK_H=2, BLOCK_X=4, LANES=1, BLOCK_C=16):
        yield


def double_steps(logits, target, weight, reduction, smoothing, ignore_index=-100):
    """Loss and gradient of torch's two steps in fp64, of the loss's sum."""
    wide = logits.detach().cpu().double().requires_grad_()
    loss = two_steps(wide, target.cpu(), None if weight is None else weight.cpu().double(), ignore_index, reduction,
                     smoothing, align_corners=False)  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss.sum(), wide)[0]


small = pytest.mark.usefixtures("small_blocks")
PATHS = pytest.mark.parametrize("plain", [False, True], ids=["kernel", "plain"])


def both_steps(plain, logits, target, *args, ignore_index=-100, **options):
    """-> ours, torch's: loss and gradient. ``args``: weight, reduction, smoothing."""
    weight, reduction, smoothing = args
    with without_kernels() if plain else contextlib.nullcontext():
        ours = step(logits, target, weight, ignore_index, reduction, smoothing)
    return ours, double_steps(logits, target, *args, ignore_index)


def assert_same(ours, theirs):
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=2e-5, atol=2e-6, equal_nan=True)


@small
@PATHS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_weights_and_ignored_pixels(plain, reduction, smoothing, device):
    """An ignored pixel has no weight, whatever class 0 has; maps of more rows than a block of the plain path."""
    for size, classes in (((9, 5), 4), ((70, 3), 2)) if plain else (((9, 5), 4),):
        logits, target = inputs((2, classes, 3, 2), size, device)
        target[torch.rand(size, device=device).expand(2, *size) < 0.4] = 255
        for low in (5.0, -0.5):
            weight = torch.linspace(low, 1, classes, device=device)
            assert_same(*both_steps(plain, logits, target, weight, reduction, smoothing, ignore_index=255))


@small
@PATHS
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_weights_that_sum_up_to_0(plain, smoothing, device):
    """The mean is NaN, and so is the gradient where a pixel counts; it is exactly 0 where all are ignored."""
    logits, target = inputs((1, 3, 2, 4), (2, 4), device)
    target.fill_(-100)
    weight = torch.tensor([0.0, 1.0, 2.0], device=device)
    for w in (None, weight):
        for reduction in ("mean", "sum", "none"):
            loss, grad = both_steps(plain, logits, target, w, reduction, smoothing)[0]
            assert (loss.isnan() if reduction == "mean" else loss == 0).all() and (grad == 0).all()
    target[0, 0, 0] = 0
    ours, theirs = both_steps(plain, logits, target, weight, "mean", smoothing)
    assert ours[0].isnan() and theirs[0].isnan()
    assert torch.equal(ours[1].isnan().cpu(), theirs[1].isnan()) and (ours[1][0, :, 0, 0].isnan()).all()
    assert (ours[1][0, :, 1, 1:] == 0).all()


@small
@PATHS
def test_nothing_of_an_ignored_pixel_comes_back(plain, device):
    """Neither an upstream gradient that is not finite nor, on an axis that keeps its size, the neighbour's NaN."""
    logits, target = inputs((1, 3, 4, 2), (4, 2), device)
    target[0, 1, 1] = 255
    upstream = torch.ones(target.shape, device=device)
    upstream[0, 1, 1] = NAN
    with without_kernels() if plain else contextlib.nullcontext():
        loss = upsample_cross_entropy(logits, target, None, 255, "none", 0.1)
        assert torch.autograd.grad(loss, logits, upstream)[0].isfinite().all()
    with torch.no_grad():
        logits[0, 1, 2, 0] = NAN
    ours, theirs = both_steps(plain, logits, target, None, "none", 0.1, ignore_index=255)
    assert_same(ours, theirs)
    assert ours[1].isnan().sum() == 3  # its pixel's classes


@small
def test_one_class_has_no_gradient(device):
    """It is certain: exactly 0, with smoothing and weights; torch's own steps, taken on a CPU, leave a rounding."""
    logits, target = inputs((2, 1, 3, 2), (7, 5), device)
    for plain in (False, True):
        (_, grad), _ = both_steps(plain, logits, target, torch.tensor([0.63], device=device), "sum", 0.1)
        assert grad.abs().max() <= (1e-6 if plain else 0)


@small
@PATHS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 255, 256])
def test_labels_against_numbers_their_dtype_cannot_hold(ignore_index, dtype, plain, device):
    """300 classes, and -100, 156 in uint8: neither wraps round."""
    classes, most = 300, min(299, torch.iinfo(dtype).max)
    logits = torch.randn(1, classes, 1, 2, device=device, requires_grad=True)
    target = torch.tensor([0, 2, most, min(156, most)], device=device).view(1, 2, 2).to(dtype)
    ours, theirs = both_steps(plain, logits, target, None, "sum", 0.0, ignore_index=ignore_index)
    assert_same(ours, theirs)


@small
@PATHS
@pytest.mark.parametrize(("dtype", "label", "classes"), [(torch.uint8, 156, 100), (torch.uint8, 255, 255),
                                                         (torch.int16, 300, 300), (torch.int8, -100, 3)])  # fmt: skip
def test_labels_that_are_no_class_are_found_in_every_dtype(dtype, label, classes, plain):
    logits = torch.randn(1, classes, 1, 1)
    ignored = 7 if label == -100 else -100
    with without_kernels() if plain else contextlib.nullcontext(), pytest.raises(IndexError, match=f"{label} is"):
        upsample_cross_entropy(logits, torch.full((1, 1, 1), label, dtype=dtype), ignore_index=ignored)
