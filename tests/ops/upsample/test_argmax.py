"""Class map from low-resolution logits, against torch's two steps at full resolution."""

import sys

import pytest
import torch
from head_inputs import AC, LAYOUTS, SIZES, allocations, interpolate

import fastseg
from fastseg.ops import upsample_argmax
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.upsample import output_size
from fastseg.ops.cpu import argmax as cpu
from fastseg.testing import guard, guarded

NAN, INF = float("nan"), float("inf")
# Enough classes and outputs a cell for the pruned kernel; some columns and rows outside the last tile.
PRUNED = [((2, 9, 5, 7), (20, 28)), ((1, 21, 3, 37), (13, 147)), ((1, 70, 4, 4), (33, 32))]


def assert_is_argmax(classes, logits, align_corners, size=None, scale_factor=None):
    """Equal where the two best logits are apart; one of the best elsewhere."""
    full = interpolate(logits.detach().cpu().double(), align_corners, size, scale_factor)
    assert classes.shape == (full.shape[0], *full.shape[2:])
    assert classes.is_contiguous()
    chosen = full.gather(1, classes.cpu().long()[:, None])[:, 0]
    assert ((full.amax(1) - chosen) <= 1e-6).all()


@AC
@pytest.mark.parametrize(("shape", "size", "layout"), [
    *((shape, size, layout) for shape, size in SIZES for layout in LAYOUTS),
    *((shape, size, layout) for (shape, size), layout in zip(PRUNED, [*LAYOUTS, *LAYOUTS], strict=False)),
], ids=str)  # fmt: skip
def test_argmax(shape, size, layout, align_corners, device):
    logits = torch.randn(shape, device=device).to(memory_format=layout)
    classes = upsample_argmax(logits, size, align_corners=align_corners)
    assert classes.dtype == torch.uint8
    assert_is_argmax(classes, logits, align_corners, size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_interpolated_without_rounding(dtype, device):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("fp64 has no kernel on a GPU")
    for shape, size in (SIZES[1], PRUNED[0]):
        logits = torch.randn(shape, device=device).to(dtype)
        assert_is_argmax(upsample_argmax(logits, size), logits, False, size)


@AC
@pytest.mark.parametrize("factor", [4, 1.7, 0.5, (2.0, 3.0), (1.3, 5.1), (1.1, 2.5)], ids=str)
def test_scale_factor(factor, align_corners, device):
    """1.7 samples at 1/1.7 of a pixel, not at the quotient of the sizes; 1.1 keeps the size of this axis: a copy."""
    logits = torch.randn(1, 6, 5, 8, device=device)
    classes = upsample_argmax(logits, scale_factor=factor, align_corners=align_corners)
    assert_is_argmax(classes, logits, align_corners, scale_factor=factor)


def test_layouts(device):
    """Slices of every axis, a transposed map, an expanded one, one pixel with odd strides."""
    base = torch.randn(2, 18, 10, 12, device=device)
    views = [
        base[:, 3:12, 1:6, 2:9],
        base.to(memory_format=torch.channels_last)[:, ::2, :5, 5:],
        base[:, :9, :5, :7].transpose(2, 3),
        base[:1, :9, :5, :7].expand(2, -1, -1, -1),
        torch.randn(9, device=device).as_strided((1, 9, 1, 1), (77, 1, 5, 3)),
    ]
    for logits in views:
        size = (4 * logits.shape[2], 4 * logits.shape[3])
        assert_is_argmax(upsample_argmax(logits, size), logits, False, size)


@pytest.mark.parametrize("classes", [7, 40], ids=["all", "pruned"])
def test_first_class_among_equals(classes, device):
    logits = torch.zeros(1, classes, 4, 4, device=device)
    assert (upsample_argmax(logits, 16) == 0).all()
    logits[:, [2, 5]] = 1
    assert (upsample_argmax(logits, 16) == 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_of_adjacent_values(dtype, device):
    """Logits one unit apart or equal: what pruning leaves out must not tie with the winner."""
    if device != "cpu":
        pytest.skip("the reference rounds as the interpreter does")
    step = torch.finfo(dtype).eps
    logits = (1 + torch.randint(3, (1, 12, 5, 6)) * step).to(dtype)
    kernel = upsample_argmax(logits, (20, 24))
    brute = upsample_argmax(torch.cat([logits, -torch.ones(1, 250, 5, 6, dtype=dtype)], 1), (20, 24))
    assert torch.equal(kernel.long(), brute)  # past 256 classes every class is looked at


@pytest.mark.parametrize("classes", [4, 12], ids=["all", "pruned"])
@pytest.mark.parametrize("values", [(NAN,), (INF,), (-INF,), (NAN, NAN), (INF, NAN)], ids=str)
def test_what_is_not_finite(values, classes, device):
    logits = torch.randn(1, classes, 4, 5, device=device)
    for i, value in enumerate(values):
        logits[:, 1 + 2 * i] = -9  # a class that could not win, but for the NaN of a zero weight at the border
        logits[:, 1 + 2 * i, 1 + i, 1] = value
    full = interpolate(logits.cpu(), False, (16, 20))
    assert torch.equal(upsample_argmax(logits, (16, 20)).cpu().long(), full.argmax(1))
    logits[:, 1:3] = NAN
    assert (upsample_argmax(logits, 16) == 1).all()
    assert (upsample_argmax(torch.full_like(logits, -INF), 16) == 0).all()


def test_output_dtype(device):
    logits = torch.randn(1, 257, 2, 3, device=device)
    logits[:, 255] += 20
    assert upsample_argmax(logits, 4).dtype == torch.int64
    assert (upsample_argmax(logits, 4) == 255).all()
    assert upsample_argmax(logits[:, :256], 4).dtype == torch.uint8
    assert (upsample_argmax(logits[:, :256], 4) == 255).all()
    assert (upsample_argmax(logits[:, :256], 8) == 255).all()
    assert upsample_argmax(logits[:, :9], 4, dtype=torch.int64).dtype == torch.int64
    with pytest.raises(ValueError, match="257 classes do not fit uint8"):
        upsample_argmax(logits, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"dtype is torch\.float32"):
        upsample_argmax(logits, 4, dtype=torch.float32)


def test_the_upsampled_logits_never_exist(device):
    logits = torch.randn(1, 12, 5, 7, device=device, requires_grad=True)
    for layout in LAYOUTS:
        x = logits.to(memory_format=layout)
        with allocations() as seen:
            classes = upsample_argmax(x, (20, 28))
        assert not classes.requires_grad
        assert seen.largest <= classes.numel()


def test_stays_inside_its_buffers(device):
    for shape, size in (SIZES[1], PRUNED[0]):
        with guarded():
            logits = guard(torch.randn(shape, device=device))
            before = logits.clone()
            assert_is_argmax(upsample_argmax(logits, size), before, False, size)
        assert torch.equal(logits, before)


@AC
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_reference(classes, align_corners):
    """Equal to torch's two steps to the bit: one class at a time, and one image at a time."""
    logits = torch.randn(2, classes, 5, 6)
    logits[0, :, 2, 2] = 1.0
    logits[1, 1, 1, 1] = NAN
    with fastseg.reference():
        got = upsample_argmax(logits, (17, 9), align_corners=align_corners)
        twice = upsample_argmax(logits, scale_factor=1.7, align_corners=align_corners)
    assert torch.equal(got.long(), interpolate(logits, align_corners, (17, 9)).argmax(1))
    assert torch.equal(twice.long(), interpolate(logits, align_corners, None, 1.7).argmax(1))


@AC
@pytest.mark.parametrize(("size", "factor"), [((170, 131), None), (None, (17.3, 1.2)), (None, (1.1, 30.0))], ids=str)
def test_reference_by_rows(size, factor, align_corners, monkeypatch):
    """Large maps on a CPU: blocks within a cell row and across, a kept axis, equal classes, and no map at full size."""
    monkeypatch.setattr(cpu, "_BLOCK", 2**12)
    logits = torch.randn(2, 5, 10, 6)
    logits[:, 3] = logits[:, 1]
    with allocations() as seen:
        target = output_size("upsample_argmax", logits, size, factor)
        got = cpu.argmax_by_rows(logits, *target, align_corners, torch.uint8)
    full = interpolate(logits, align_corners, size, factor)
    assert seen.largest < full.numel() / 2
    assert (got != 3).all()  # the value of class 1
    chosen = full.gather(1, got[:, None].long())[:, 0]
    torch.testing.assert_close(chosen, full.amax(1), atol=1e-6, rtol=0)
    assert (got == full.argmax(1)).float().mean() > 0.999


def test_bad_arguments():
    logits = torch.randn(1, 3, 4, 4)
    for message, args in {
        "give exactly one": (logits,),
        "size=8, scale_factor=2": (logits, 8, 2.0),
        r"logits are \(3, 4, 4\)": (logits[0], 8),
        r"logits are \(1, 0, 4, 4\)": (logits[:, :0], 8),
        "no pixel": (logits[:, :, :0], 8),
        "0 x 8 pixels": (logits, (0, 8)),
        r"size is \(1, 2, 3\)": (logits, (1, 2, 3)),
        "scale_factor is -2": (logits, None, -2),
        "scale_factor is inf": (logits, None, INF),
        "scale_factor is nan": (logits, None, NAN),
        "below 2": (logits, None, 1e10),
    }.items():
        with pytest.raises(ValueError, match=message):
            upsample_argmax(*args)
    with pytest.raises(TypeError, match=r"logits are torch\.uint8"):
        upsample_argmax(logits.to(torch.uint8), 8)


def test_path_is_recorded():
    logits = torch.randn(1, 12, 4, 4)
    with fastseg.explain() as report:
        upsample_argmax(logits, 16)
        upsample_argmax(logits, 8)
        with fastseg.reference():
            upsample_argmax(logits, 8)
    why = [(d.op, d.path, d.why) for d in report]
    here = [("triton", "pruned"), ("triton", "all classes")] if INTERPRETED else [("reference", "CPU tensor")] * 2
    assert why == [("upsample_argmax", *pair) for pair in (*here, ("reference", "inside fastseg.reference()"))]


@pytest.mark.skipif(not INTERPRETED, reason="the two kernels are compared under the interpreter")
@pytest.mark.parametrize("classes", [8, 64, 65, 129])
def test_every_class_can_win(classes):
    """The first and the last of each word of 64 classes, by a map of its own."""
    ends = {c for word in range(0, classes, 64) for c in (word, word + 1, word + 63) if c < classes}
    order = torch.tensor(sorted(ends | {classes - 1}))
    logits = torch.zeros(1, classes, 1, len(order))
    logits[0, order, 0, torch.arange(len(order))] = 1.0
    got = upsample_argmax(logits, (4, 4 * len(order)))
    assert torch.equal(got[0, 0, 1::4].long(), order)


@pytest.mark.skipif(not INTERPRETED, reason="the two kernels are compared under the interpreter")
@pytest.mark.parametrize("kind", ["a rounding apart", "flat, a rounding apart", "few values", "denormal", "rows alike"])
def test_pruning_changes_nothing(kind, monkeypatch):
    """Ties and near ties, where a class that is pruned could have won by a rounding."""
    op = sys.modules["fastseg.ops.upsample_argmax"]
    kernel = sys.modules["fastseg.kernels.upsample.argmax"]
    for seed in range(2):
        torch.manual_seed(seed)
        logits = {
            "a rounding apart": lambda: (1 + torch.randint(0, 3, (1, 9, 1, 1)) * 2.0**-23) * torch.rand(1, 1, 5, 9) * 3,
            "flat, a rounding apart": lambda: (
                (1 + torch.randint(0, 3, (8, 9, 1, 1)) * 2.0**-23) * torch.rand(8, 1, 1, 1) * 3
            ).expand(-1, -1, 2, 2),
            "few values": lambda: torch.randint(0, 2, (1, 9, 4, 6)).float(),
            "denormal": lambda: torch.randint(0, 4, (1, 9, 4, 6)) * 1e-45,
            "rows alike": lambda: torch.rand(1, 9, 1, 6).expand(1, 9, 4, 6) * (1 + torch.rand(1, 9, 4, 1) * 1e-7),
        }[kind]()
        pruned = upsample_argmax(logits, scale_factor=7)
        with monkeypatch.context() as patch:
            for module in (op, kernel):
                patch.setattr(module, "prunes", lambda *args: False)
            every = upsample_argmax(logits, scale_factor=7)
        assert torch.equal(pruned, every), seed
