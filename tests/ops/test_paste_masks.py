"""Instance masks in the image, against torchvision's function and by hand."""

import pytest
import torch
from foreign import foreign

import fastseg
from fastseg.ops import paste_masks
from fastseg.ops.paste_masks import paste_masks_ref

SIZE = (60, 80)
# inside; past two edges; past the other two; less than a pixel; off the image; all of it
BOXES = torch.tensor([[10, 5, 40.5, 50], [-8, -3, 20, 11], [60.2, 40, 95, 70], [3, 4, 3.2, 4.1], [90, 5, 99, 9],
                      [0, 0, 80, 60]])  # fmt: skip


def masks(dtype=torch.float32):
    return torch.rand(len(BOXES), 1, 14, 14).to(dtype)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("form", ["boxes", "reference"])
def test_values(form, padding):
    m = masks()
    want = paste_masks_ref(m, BOXES, SIZE, padding=padding)
    with fastseg.force("paste_masks", form), fastseg.explain() as report:
        got = paste_masks(m, BOXES, SIZE, padding=padding)
    assert report.decisions[-1].form == form
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)  # fp32 positions of up to 100 pixels
    assert got[4].count_nonzero() == 0 and got[0].count_nonzero() > 900


@pytest.mark.parametrize("form", ["boxes", "reference"])
def test_nan_stays_near_its_pixel(form):
    m = masks()
    m[0, 0, 3, 4] = torch.nan
    with fastseg.force("paste_masks", form):
        got = paste_masks(m, BOXES, SIZE)
    want = paste_masks_ref(m, BOXES, SIZE)
    assert torch.equal(got.isnan(), want.isnan()) and 0 < got.isnan().sum() < 100


def test_torchvision():
    foreign("torchvision")
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    m, boxes = masks(), BOXES[[0, 1, 2, 3, 5]]
    assert torch.equal(paste_masks(m[:5], boxes, SIZE), paste_masks_in_image(m[:5], boxes, SIZE))


@pytest.mark.parametrize("threshold", [0.5, 0.0])
def test_threshold(threshold):
    m = masks()
    got = paste_masks(m, BOXES, SIZE, threshold=threshold)
    assert got.dtype == torch.bool and torch.equal(got, paste_masks(m, BOXES, SIZE) >= threshold)


def test_none_and_bfloat16():
    assert paste_masks(torch.rand(0, 1, 14, 14), torch.rand(0, 4), SIZE).shape == (0, 1, *SIZE)
    m = masks(torch.bfloat16)
    torch.testing.assert_close(paste_masks(m, BOXES, SIZE), paste_masks_ref(m, BOXES, SIZE))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"boxes \(5, 4\)"):
        paste_masks(masks(), BOXES[:5], SIZE)
    with pytest.raises(ValueError, match="size is"):
        paste_masks(masks(), BOXES, (0, 4))
    with pytest.raises(TypeError, match="boxes are"):
        paste_masks(masks(), BOXES.long(), SIZE)
