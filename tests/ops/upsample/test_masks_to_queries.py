"""The owner of each pixel of a mask classifier and the areas of its masks, against torch's own lines in fp64."""

import pytest
import torch
from head_inputs import AC, allocations

import fastseg
from fastseg.ops import masks_to_queries
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.masks_to_queries import masks_to_queries_ref
from fastseg.testing import guard, guarded

if INTERPRETED:
    from traffic import count_traffic

SMALL, LARGE = (9, 7), (190, 150)  # the latter in blocks of rows on a CPU


def inputs(N=2, Q=40, low=(12, 10), dtype=torch.float32):
    return torch.rand(N, Q).to(dtype), (3 * torch.randn(N, Q, *low)).to(dtype)


@AC
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "own"])
@pytest.mark.parametrize(("at", "dtype"), [
    (None, torch.float32), ((4, 3), torch.float16), ((5, 7), torch.bfloat16),
], ids=str)  # fmt: skip
def test_kernel(at, dtype, weighted, align_corners, device):
    """Several blocks, two images, a view; a query that has no pixel."""
    scores, masks = inputs(2, 7, (3, 4), dtype)
    masks[:, 2] = -30.0
    scores, masks = scores.to(device), masks.to(device).transpose(2, 3)
    more = {"scores_size": at, "align_corners": align_corners, "threshold": 0.4, "weighted": weighted}
    with fastseg.explain() as report, fastseg.force("masks_to_queries", "kernel"):
        queries, inside, areas = masks_to_queries(scores, masks, (23, 29), **more)
    assert [(d.op, d.form) for d in report] == [("masks_to_queries", "kernel")]
    want = masks_to_queries_ref(scores.double(), masks.double(), (23, 29), **more)
    assert (queries.dtype, inside.dtype, areas.dtype) == (torch.uint8, torch.bool, torch.int64)
    assert (queries != want[0]).sum() <= 1 and (inside != want[1]).sum() <= 1
    assert (areas - want[2]).abs().max() <= 1 and (areas[:, 2] == 0).all()


def test_kernel_of_nan_equals_and_nothing(device):
    scores, masks = torch.ones(1, 300, device=device), torch.zeros(1, 300, 2, 2, device=device)
    queries, inside, areas = masks_to_queries(scores, masks, 5)
    assert queries.dtype == torch.int64 and (queries == 0).all() and inside.all() and (areas == 25).all()
    scores, masks = torch.ones(1, 4, device=device), torch.randn(1, 4, 2, 2, device=device)
    masks[0, 2, 0, 0] = float("nan")
    queries, inside, areas = masks_to_queries(scores, masks, 4)
    want = masks_to_queries_ref(scores, masks, 4)
    assert torch.equal(queries.long(), want[0]) and torch.equal(inside, want[1]) and torch.equal(areas, want[2])
    assert masks_to_queries(scores[:0], masks[:0], 4)[2].shape == (0, 4)
    with guarded():
        masks_to_queries(guard(scores), guard(masks), (5, 6))


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")
def test_traffic():
    """The header's figures, to the byte; every area is added to."""
    N, Q, low, size = 2, 3, 4, 6
    scores, masks = torch.ones(N, Q), torch.ones(N, Q, low, low)
    with count_traffic() as traffic:
        masks_to_queries(scores, masks, size)
    total = traffic.total
    areas = 8 * N * Q
    assert (total.read_bytes, total.written_bytes, total.launches) == (
        4 * (N * Q * low * low + N * Q) + areas, 2 * N * size * size + areas, 1
    )  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="of a CPU without kernels")
@AC
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "own"])
@pytest.mark.parametrize("at", [None, (12, 10), (17, 23)], ids=str)
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=str)
def test_against_fp64(size, at, weighted, align_corners):
    scores, masks = inputs()
    more = {"scores_size": at, "align_corners": align_corners, "threshold": 0.4, "weighted": weighted}
    with fastseg.explain() as report:
        queries, inside, areas = masks_to_queries(scores, masks, size, **more)
    assert report.decisions[-1].form == ("rows" if size == LARGE else "reference")
    want = masks_to_queries_ref(scores.double(), masks.double(), size, **more)
    assert (queries.dtype, inside.dtype, areas.dtype) == (torch.uint8, torch.bool, torch.int64)
    assert (queries != want[0]).float().mean() < 1e-4 and (inside != want[1]).float().mean() < 1e-4
    assert (areas - want[2]).abs().max() <= 1  # a pixel on the threshold
    assert areas.sum() > inside.sum() > 0


@pytest.mark.skipif(INTERPRETED, reason="of a CPU without kernels")
def test_dtypes():
    scores, masks = inputs(dtype=torch.bfloat16)
    got, want = (masks_to_queries(s, m, LARGE) for s, m in ((scores, masks), (scores.float(), masks.float())))
    assert all(map(torch.equal, got, want))


@pytest.mark.skipif(INTERPRETED, reason="of a CPU without kernels")
def test_nan():
    """Blocks of rows would spread it: torch's lines run."""
    scores, masks = inputs()
    masks[1, 3, 5, 5] = float("nan")
    with fastseg.explain() as report:
        queries, _, _ = masks_to_queries(scores, masks, LARGE)
    assert report.decisions[-1].form == "reference"
    assert torch.equal(queries, masks_to_queries_ref(scores, masks, LARGE)[0].byte()) and (queries[1] == 3).any()


@pytest.mark.skipif(INTERPRETED, reason="of a CPU without kernels")
def test_no_map_of_queries():
    scores, masks = inputs(1, 60)
    with allocations() as seen:
        masks_to_queries(scores, masks, 300)
    assert seen.largest < 60 * 300 * 300 / 10


def test_wrong_arguments():
    scores, masks = inputs(1, 3)
    with pytest.raises(ValueError, match=r"query scores are \(1, 2\)"):
        masks_to_queries(scores[:, :2], masks, 8)
    with pytest.raises(TypeError, match="mask logits are"):
        masks_to_queries(scores, masks.long(), 8)
    with pytest.raises(ValueError, match="at least 1"):
        masks_to_queries(scores, masks, 0)
