"""The kernel of class volumes, against torch's two steps at full resolution; its traffic, to the byte."""

import pytest
import torch
from torch.nn import functional as F

import fastseg
from fastseg.ops import upsample_argmax
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.upsample_argmax import upsample_argmax_ref

if INTERPRETED:
    from traffic import count_traffic


def assert_is_argmax(classes, logits, align_corners, **target):
    """Equal where the two best logits are apart; one of the best elsewhere."""
    full = F.interpolate(logits.cpu().double(), **target, mode="trilinear", align_corners=align_corners)
    assert classes.shape == (full.shape[0], *full.shape[2:]) and classes.is_contiguous()
    chosen = full.gather(1, classes.cpu().long()[:, None])[:, 0]
    assert ((full.amax(1) - chosen) <= 2e-6).all()


@pytest.mark.parametrize("align_corners", [False, True], ids=["halves", "corners"])
@pytest.mark.parametrize(("shape", "target", "dtype", "last"), [
    ((2, 5, 3, 4, 3), {"size": (5, 7, 6)}, torch.float32, False),
    ((1, 2, 3, 4, 3), {"size": (3, 20, 31)}, torch.float16, True),  # planes stay; several blocks
    ((1, 3, 4, 5, 3), {"size": (2, 5, 2)}, torch.bfloat16, False),  # smaller
    ((1, 4, 2, 3, 4), {"scale_factor": (1.7, 2.0, 1.3)}, torch.float32, True),
    ((1, 1, 1, 1, 1), {"size": 3}, torch.float32, False),
], ids=str)  # fmt: skip
def test_values(shape, target, dtype, last, align_corners, device):
    layout = torch.channels_last_3d if last else torch.contiguous_format
    logits = torch.randn(shape, device=device).to(dtype).to(memory_format=layout)
    with fastseg.explain() as report:
        classes = upsample_argmax(logits, **target, align_corners=align_corners)
    assert [(d.op, d.form) for d in report] == [("upsample_argmax3d", "kernel")]
    assert_is_argmax(classes, logits, align_corners, **target)


def test_views_and_out(device):
    base = torch.randn(2, 6, 5, 6, 7, device=device)
    for logits in (
        base[:, ::2, 1:4, 2:, ::3],
        base.transpose(2, 4)[:1],
        base[:1, :3, :2, :2, :2].expand(2, -1, -1, -1, -1),
    ):
        out = torch.empty(logits.shape[0], 4, 5, 6, dtype=torch.int64, device=device)
        assert upsample_argmax(logits, (4, 5, 6), out=out) is out
        assert_is_argmax(out, logits, False, size=(4, 5, 6))
    assert upsample_argmax(base[:0], 4).shape == (0, 4, 4, 4)


def test_nan_ties_and_uint16(device):
    logits = torch.zeros(1, 6, 2, 2, 3, device=device)
    logits[:, [2, 4]] = 1
    assert (upsample_argmax(logits, 4) == 2).all()
    logits[0, 3, 1, 1, 2], logits[0, 5, 0, 0, 0] = float("nan"), float("inf")
    assert torch.equal(upsample_argmax(logits, (4, 4, 5)).long(), upsample_argmax_ref(logits, (4, 4, 5)))
    classes = upsample_argmax(torch.randn(1, 3, 2, 2, 3, device=device), 4, dtype=torch.uint16)
    assert classes.dtype == torch.uint16 and 0 < classes.cpu().long().max() < 3


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")
def test_traffic():
    logits = torch.randn(2, 3, 2, 3, 4)
    with count_traffic() as traffic:
        upsample_argmax(logits, (4, 6, 8))
    total = traffic.total
    assert (total.read_bytes, total.written_bytes, total.launches) == (4 * logits.numel(), 2 * 4 * 6 * 8, 1)
