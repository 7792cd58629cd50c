"""Class map of a mask classifier, against torch's own lines in fp64."""

import pytest
import torch
from head_inputs import AC, allocations

import fastseg
from fastseg.metrics import ConfusionMatrix
from fastseg.ops import masks_to_classes
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.testing import guard, guarded

if INTERPRETED:
    from traffic import count_traffic

NAN = float("nan")
# N, Q, K, (h, w), (H, W): more queries than a block; a smaller output; one of each
SIZES = [(2, 5, 3, (4, 3), (9, 7)), (1, 35, 20, (3, 4), (5, 6)), (1, 2, 2, (5, 6), (3, 2)), (1, 1, 1, (1, 1), (2, 3))]
LARGE = (2, 40, 30, (20, 24), (110, 170))  # in blocks of rows on a CPU


def inputs(N, Q, K, low, device="cpu", dtype=torch.float32):
    scores, masks = 2 * torch.randn(N, Q, K + 1), 3 * torch.randn(N, Q, *low)
    return scores.to(device, dtype), masks.to(device, dtype)


def sums(scores, masks, size, align_corners=False, at=None):
    """(N, K, H, W) in fp64."""
    resize = lambda x, n: torch.nn.functional.interpolate(x, n, mode="bilinear", align_corners=align_corners)
    p = scores.double().cpu().softmax(-1)[..., :-1]
    s = torch.einsum("nqk,nqhw->nkhw", p, resize(masks.double().cpu(), at or size).sigmoid())
    return s if at is None else resize(s, size)


def assert_best(classes, s, tolerance=1e-6):
    """The chosen sum is the largest, up to rounding."""
    chosen = s.gather(1, classes.cpu().long()[:, None])[:, 0]
    assert classes.shape == chosen.shape and (s.amax(1) - chosen).max() <= tolerance * s.amax()


@AC
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_classes(case, align_corners, device):
    *shape, size = case
    scores, masks = inputs(*shape, device)
    classes = masks_to_classes(scores, masks, size, align_corners=align_corners)
    assert classes.dtype == torch.uint8 and classes.is_contiguous()
    assert_best(classes, sums(scores, masks, size, align_corners))


@AC
@pytest.mark.parametrize("at", [(4, 3), (6, 8), 5], ids=str)
def test_sums_of_a_size_of_their_own(at, align_corners, device):
    scores, masks = inputs(2, 5, 6, (4, 3), device)
    classes = masks_to_classes(scores, masks, (9, 7), scores_size=at, align_corners=align_corners)
    at = (at, at) if isinstance(at, int) else at
    assert_best(classes, sums(scores, masks, (9, 7), align_corners, at))


@pytest.mark.skipif(INTERPRETED, reason="kernels run on a CPU only under the interpreter")
def test_few_values_have_queries_innermost():
    """Also of masks of the output's size, which stay as they were, and with NaN, the largest of a pixel."""
    for low, size in (((4, 3), (9, 7)), ((5, 6), (5, 6))):
        scores, masks = inputs(2, 5, 4, low)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = masks.contiguous(memory_format=layout)
            before = given.clone()
            with fastseg.explain() as report:
                classes = masks_to_classes(scores, given, size)
            assert [d.form for d in report] == ["few"] and torch.equal(given, before)
            assert_best(classes, sums(scores, masks, size))
    masks[1, 3, 2, 2] = NAN
    with fastseg.reference():
        want = masks_to_classes(scores, masks, (5, 6))
    assert torch.equal(masks_to_classes(scores, masks, (5, 6)), want) and want[1, 2, 2] == 0


def test_confusion_is_counted_image_by_image(monkeypatch, device):
    """Of queries as of the class maps; a target that is no class leaves the counts as they were on a CPU."""
    scores, masks = inputs(3, 5, 4, (4, 3), device)
    target = torch.randint(4, (3, 9, 7), dtype=torch.uint8, device=device)
    target[:, 2] = 255
    want, got = ConfusionMatrix(5, ignore_index=255), ConfusionMatrix(5, ignore_index=255)
    want.update(masks_to_classes(scores, masks, (9, 7), scores_size=(6, 8)), target)
    images = []
    one = lambda s, m, *args, **options: images.append(len(m)) or masks_to_classes(s, m, *args, **options)
    monkeypatch.setattr("fastseg.metrics.masks_to_classes", one)
    for _ in range(2):
        got.update(class_scores=scores, mask_logits=masks, target=target, scores_size=(6, 8))
    assert torch.equal(got.matrix, 2 * want.matrix) and images == [1] * 6
    if masks.is_cpu:
        target[2, 0, 0] = 9
        with pytest.raises(ValueError, match="update: Target 9 is out of bounds; classes are 0 to 4"):
            got.update(class_scores=scores, mask_logits=masks, target=target)
        assert torch.equal(got.matrix, 2 * want.matrix)


def test_confusion_of_what_does_not_match():
    (scores, masks), target, confusion = inputs(2, 3, 4, (2, 2)), torch.zeros(2, 4, 4), ConfusionMatrix(3)
    target = target.long()
    for message, error, call in (
        ("mask_logits given; give pred", TypeError, lambda: confusion.update(target=target, mask_logits=masks)),
        ("pred and class_scores and mask_logits given", TypeError,
         lambda: confusion.update(target, target, class_scores=scores, mask_logits=masks)),
        ("class scores of 4 classes; ConfusionMatrix.num_classes=3", ValueError,
         lambda: confusion.update(class_scores=scores, mask_logits=masks, target=target)),
        (r"target is \(1, 4, 4\); give \(N, Q, C \+ 1\) and \(N, H, W\)", ValueError,
         lambda: confusion.update(class_scores=scores[..., :4], mask_logits=masks, target=target[:1])),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert confusion.matrix.sum() == 0


def test_the_two_sizes_differ():
    """A sigmoid before the resize is not one after it."""
    scores, masks = inputs(1, 8, 5, (4, 4))
    masks = 5 * masks
    after, before = (masks_to_classes(scores, masks, 12, scores_size=at) for at in (None, 4))
    assert (after != before).any()
    assert torch.equal(masks_to_classes(scores, masks, 12, scores_size=12), after)


@pytest.mark.skipif(INTERPRETED, reason="of a CPU without kernels")
@AC
@pytest.mark.parametrize("at", [None, (20, 24), (31, 50)], ids=str)
def test_in_blocks_of_rows(at, align_corners):
    *shape, size = LARGE
    scores, masks = inputs(*shape)
    with fastseg.explain() as report:
        classes = masks_to_classes(scores, masks, size, scores_size=at, align_corners=align_corners)
    assert next(d for d in report if d.op == "masks_to_classes").form == "rows"
    assert_best(classes, sums(scores, masks, size, align_corners, at), 1e-5)
    with fastseg.reference():
        plain = masks_to_classes(scores, masks, size, scores_size=at, align_corners=align_corners)
    assert (plain != classes).float().mean() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, device):
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("fp64 has no kernel on a GPU")
    scores, masks = inputs(1, 18, 7, (3, 4), device, dtype)
    tolerance = 1e-6 if dtype == torch.float64 or not (INTERPRETED or device != "cpu") else 2e-3  # products of fp16
    assert_best(masks_to_classes(scores, masks, (6, 7)), sums(scores, masks, (6, 7)), tolerance)


def test_scale_factor_and_views(device):
    scores, masks = inputs(2, 9, 5, (6, 8), device)
    scores, masks = scores[:, ::2], masks.to(memory_format=torch.channels_last)[:, ::2, 1:, ::2]
    classes = masks_to_classes(scores, masks, scale_factor=1.7)
    p = scores.double().cpu().softmax(-1)[..., :-1]
    full = torch.nn.functional.interpolate(masks.double().cpu(), scale_factor=1.7, mode="bilinear").sigmoid()
    assert_best(classes, torch.einsum("nqk,nqhw->nkhw", p, full))


def test_first_among_equals_and_nan(device):
    scores, masks = torch.zeros(1, 3, 6, device=device), torch.randn(1, 3, 3, 3, device=device)
    assert (masks_to_classes(scores, masks, 6) == 0).all()
    scores[..., [2, 4]] = 1
    assert (masks_to_classes(scores, masks, 6) == 2).all()
    masks[0, 1, 0, 0] = NAN  # every sum of these pixels
    classes = masks_to_classes(scores, masks, 6)
    assert (classes[0, :2, :2] == 0).all() and (classes[0, 3:, 3:] == 2).all()
    masks[0, 1] = float("inf")  # NaN where it meets a weight of 0, as torch has it
    assert torch.equal(masks_to_classes(scores, masks, 6).cpu(), sums(scores, masks, (6, 6)).argmax(1).byte())


@pytest.mark.skipif(INTERPRETED, reason="of a CPU without kernels")
@pytest.mark.parametrize("at", [None, (20, 24)], ids=str)
def test_nan_of_large_maps(at):
    """Blocks of rows would spread it: torch's lines run."""
    *shape, size = LARGE
    scores, masks = inputs(*shape)
    masks[1, 3, 5, 5] = NAN
    with fastseg.explain() as report:
        classes = masks_to_classes(scores, masks, size, scores_size=at)
    assert next(d for d in report if d.op == "masks_to_classes").form == "reference"
    whole = masks_to_classes(scores, masks.nan_to_num(), size, scores_size=at)
    assert torch.equal(classes[1, 80:], whole[1, 80:]) and (classes[1, 28:31, 36:41] == 0).all()


def test_many_classes(device):
    scores, masks = inputs(1, 2, 300, (2, 2), device)
    classes = masks_to_classes(scores, masks, (1, 2))
    assert classes.dtype == torch.int64
    assert_best(classes, sums(scores, masks, (1, 2)))
    with pytest.raises(ValueError, match="do not fit uint8"):
        masks_to_classes(scores, masks, 2, dtype=torch.uint8)


def test_empty_batch(device):
    scores, masks = inputs(0, 2, 3, (2, 2), device)
    assert masks_to_classes(scores, masks, 4).shape == (0, 4, 4)


def test_writes_within_bounds(device):
    scores, masks = inputs(1, 5, 3, (4, 3), device)
    with guarded():
        masks_to_classes(guard(scores), guard(masks), (5, 6))


@pytest.mark.parametrize("change, message", [
    (lambda s, m: (s[:, :1], m, 8), r"class scores are \(1, 1, 4\), mask logits \(1, 2, 3, 3\)"),
    (lambda s, m: (s[..., :1], m, 8), "give .N, Q, K . 1."),
    (lambda s, m: (s, m[0], 8), "mask logits"),
    (lambda s, m: (s, m), "exactly one"),
    (lambda s, m: (s, m, 0), "at least 1"),
])  # fmt: skip
def test_wrong_shapes(change, message):
    scores, masks = inputs(1, 2, 3, (3, 3))
    with pytest.raises(ValueError, match=message):
        masks_to_classes(*change(scores, masks))


def test_wrong_dtypes():
    scores, masks = inputs(1, 2, 3, (3, 3))
    with pytest.raises(TypeError, match=r"mask logits are torch\.int64"):
        masks_to_classes(scores, masks.long(), 8)
    with pytest.raises(TypeError, match=r"dtype is torch\.int16"):
        masks_to_classes(scores, masks, 8, dtype=torch.int16)


@pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")
def test_traffic():
    """The header's figures, to the byte."""
    N, Q, K, low, size = 2, 5, 3, 4, 6
    scores, masks = inputs(N, Q, K, (low, low))
    with count_traffic() as traffic:
        masks_to_classes(scores, masks, size)
    total = traffic.total
    assert (total.read_bytes, total.written_bytes, total.launches) == (
        4 * (N * Q * low * low + N * Q * K), N * size * size, 1
    )  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="of a CPU without kernels")
@pytest.mark.parametrize("at", [None, (32, 32), (48, 48)], ids=str)
def test_no_map_of_queries_or_classes(at):
    """No tensor is as large as a tenth of the sums at full size."""
    N, Q, K, size = 1, 50, 70, 256
    scores, masks = inputs(N, Q, K, (32, 32))
    with allocations() as seen:
        masks_to_classes(scores, masks, size, scores_size=at)
    assert seen.largest < K * size * size / 10
