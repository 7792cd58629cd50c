"""Class volume from low-resolution logits, against torch's two steps at full resolution."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastseg
from fastseg import ops
from fastseg.ops import volume_argmax
from fastseg.ops.core import volume
from fastseg.ops.upsample_argmax import upsample_argmax, upsample_argmax_ref

NAN, INF = float("nan"), float("inf")
AC = pytest.mark.parametrize("align_corners", [False, True], ids=["halves", "corners"])


@pytest.fixture(autouse=True)
def slabs():
    """Small volumes too are walked, so that the tests are cheap."""
    with fastseg.force("upsample_argmax3d", "slabs"):
        yield


def assert_is_argmax(classes, logits, align_corners=False, **target):
    """Equal where the two best logits are apart; one of the best elsewhere."""
    full = F.interpolate(logits.double(), **target, mode="trilinear", align_corners=align_corners)
    assert classes.shape == (full.shape[0], *full.shape[2:])
    chosen = full.gather(1, classes.long()[:, None])[:, 0]
    assert ((full.amax(1) - chosen) <= 2e-6).all()


@AC
@pytest.mark.parametrize(("shape", "target"), [
    ((1, 2, 3, 5, 4), {"size": (7, 9, 12)}),  # two classes: the sign of a difference
    ((2, 5, 4, 3, 6), {"size": (9, 10, 11)}),  # several volumes
    ((1, 3, 6, 7, 8), {"size": (6, 14, 16)}),  # planes stay
    ((1, 5, 3, 7, 8), {"size": (9, 7, 8)}),  # maps stay
    ((1, 4, 8, 9, 7), {"size": (3, 4, 5)}),  # smaller
    ((1, 4, 1, 1, 1), {"size": 3}),
    ((1, 1, 2, 3, 3), {"size": (4, 5, 6)}),
    ((1, 6, 4, 5, 8), {"scale_factor": (1.3, 2.0, 5.1)}),
    ((1, 6, 4, 5, 8), {"scale_factor": 1.7}),
], ids=str)  # fmt: skip
def test_values(shape, target, align_corners):
    torch.manual_seed(0)
    logits = torch.randn(shape)
    classes = upsample_argmax(logits, **target, align_corners=align_corners)
    assert classes.dtype == torch.uint8 and classes.is_contiguous()
    assert_is_argmax(classes, logits, align_corners, **target)
    assert torch.equal(classes, upsample_argmax_ref(logits, **target, align_corners=align_corners).byte())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_are_interpolated_without_rounding(dtype):
    logits = torch.randn(1, 7, 3, 6, 5).to(dtype).transpose(3, 4)
    assert_is_argmax(upsample_argmax(logits, (7, 9, 11)), logits, size=(7, 9, 11))


def test_more_classes_than_a_byte_holds():
    logits = torch.randn(1, 300, 2, 2, 3)
    logits[:, 290] += 9
    classes = upsample_argmax(logits, (3, 4, 5))
    assert classes.dtype == torch.uint16 and (classes.long() == 290).all()
    with pytest.raises(ValueError, match=r"300 classes do not fit torch.uint8; use dtype=torch.uint16"):
        upsample_argmax(logits, 4, dtype=torch.uint8)
    assert upsample_argmax(logits, 4, dtype=torch.int64).dtype == torch.int64


def test_the_first_class_wins_and_the_first_nan():
    logits = torch.zeros(1, 6, 3, 4, 4)
    logits[:, [2, 4]] = 1
    assert (upsample_argmax(logits, 8) == 2).all()
    assert (upsample_argmax(torch.zeros(1, 2, 3, 4, 4), 8) == 0).all()
    for value in (NAN, INF, -INF):
        logits = torch.randn(1, 6, 3, 4, 5)
        logits[0, 3, 1, 2, 2] = value
        for size in ((6, 8, 10), (3, 8, 10), (6, 4, 5)):
            full = F.interpolate(logits, size=size, mode="trilinear")
            assert torch.equal(upsample_argmax(logits, size).long(), full.argmax(1))


def test_slabs_of_any_length_give_the_same(monkeypatch):
    logits = torch.randn(2, 5, 4, 6, 6)
    want = upsample_argmax(logits, (11, 12, 13))
    for values in (1, 2000):
        monkeypatch.setattr(volume_argmax, "SLAB", values)
        assert torch.equal(upsample_argmax(logits, (11, 12, 13)), want)


def test_slices_that_are_the_same_are_computed_once():
    to = volume.Resize((8, 4, 4), (0.0, 0.0, 0.0), False)
    slices = volume.slices_of(1, to, torch.float32)
    different, which = volume.distinct(slices, 0, 8)
    assert len(different.first) == len(set(zip(*slices, strict=True))) and max(which) == len(different.first) - 1


def test_out_is_a_tensor_an_array_or_a_file(tmp_path):
    logits = torch.randn(1, 5, 3, 4, 5)
    want = upsample_argmax(logits, (6, 7, 8))
    file = np.lib.format.open_memmap(tmp_path / "classes.npy", "w+", np.uint16, (1, 6, 7, 8))
    for out in (torch.empty(1, 6, 7, 8, dtype=torch.uint8), np.zeros((1, 6, 7, 8), np.int64), file):
        assert upsample_argmax(logits, (6, 7, 8), out=out) is out
        np.testing.assert_array_equal(np.asarray(out), want.numpy())
    file.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "classes.npy"), want.numpy())
    flat = torch.empty(2, 8, 8, dtype=torch.uint8)
    assert upsample_argmax(logits[0].transpose(0, 1)[:2], 8, out=flat) is flat
    with pytest.raises(ValueError, match=r"out is \(1, 6, 7, 9\) on cpu; give \(1, 6, 7, 8\) on cpu"):
        upsample_argmax(logits, (6, 7, 8), out=np.zeros((1, 6, 7, 9), np.uint8))
    with pytest.raises(ValueError, match=r"out is read-only; map a file"):  # to write there would end the process
        upsample_argmax(logits, (6, 7, 8), out=np.load(tmp_path / "classes.npy", mmap_mode="r"))
    with pytest.raises(TypeError, match="out is str; give a tensor or a numpy array"):
        upsample_argmax(logits, (6, 7, 8), out="classes.npy")
    with pytest.raises(TypeError, match=r"out is torch.uint8, dtype is torch.int64"):
        upsample_argmax(logits, (6, 7, 8), dtype=torch.int64, out=np.zeros((1, 6, 7, 8), np.uint8))


@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda x: upsample_argmax(x[0, 0], 4), ValueError, r"logits are \(3, 4, 5\); give \(N, C, h, w\) or"),
    (lambda x: upsample_argmax(x, (4, 4)), ValueError, r"size is \(4, 4\); give one number, or \(depth, height"),
    (lambda x: upsample_argmax(x), ValueError, "give exactly one of them"),
    (lambda x: upsample_argmax(x, 4.5), TypeError, "give whole numbers of voxels"),
    (lambda x: upsample_argmax(x, 0), ValueError, "each must be at least 1"),
    (lambda x: upsample_argmax(x, scale_factor=-1), ValueError, "positive and finite"),
    (lambda x: upsample_argmax(x[..., :0], 4), ValueError, "there is no voxel"),
    (lambda x: upsample_argmax(x.long(), 4), TypeError, "give floating-point logits"),
    (lambda x: upsample_argmax(x, 4, dtype=torch.int32), TypeError, "dtype is torch.int32; use one of"),
    (lambda x: upsample_argmax(x, 4, confidence=True, out=torch.empty(1, 4, 4, 4, dtype=torch.uint8)), ValueError,
     "confidence is without out"),
], ids=str)  # fmt: skip
def test_errors(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.zeros(1, 2, 3, 4, 5))


def test_reference_explain_and_no_volume():
    logits = torch.randn(1, 3, 4, 5, 6)
    with fastseg.explain() as report:
        upsample_argmax(logits, 8)
    assert [d.form for d in report if d.op == "upsample_argmax3d"] == ["slabs"]
    with fastseg.explain() as report, fastseg.reference():
        upsample_argmax(logits, 8)
    assert {d.path for d in report} == {"reference"}
    assert upsample_argmax(logits[:0], 8).shape == (0, 8, 8, 8)


def test_transforms_and_graphs():
    logits = torch.randn(2, 1, 3, 4, 5, 6)
    want = torch.stack([upsample_argmax(x, 7) for x in logits])
    assert torch.equal(torch.vmap(lambda x: upsample_argmax(x, 7))(logits), want)
    with torch.no_grad():
        compiled = torch.compile(lambda x: ops.upsample_argmax(x, 7), backend="eager", fullgraph=True)
        assert torch.equal(compiled(logits[0]), want[0])


PEAK = """
import sys, torch
from pathlib import Path
from fastseg.ops import upsample_argmax

def mib(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024

torch.set_num_threads(2)
upsample_argmax(torch.randn(1, 9, 8, 32, 32), (16, 64, 64))
logits = torch.randn(1, 9, 8, 32, 32)
Path("/proc/self/clear_refs").write_text("5")
before = mib("VmRSS")
upsample_argmax(logits, (int(sys.argv[1]), 64, 64))
print(mib("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_memory_does_not_grow_with_the_volume():
    """512 slices of 9 classes are 72 MiB of logits, and 2 MiB of classes."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-c", PEAK, "512"]
    peak = float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert peak < 24
