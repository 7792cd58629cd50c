"""Semantic and panoptic maps of mask classifiers, equal to those of Hugging Face's own processors."""

import importlib

import pytest
import torch
from foreign import foreign
from torch.nn import functional as F

from fastseg.inference import post_process_panoptic_segmentation, post_process_semantic_segmentation
from fastseg.inference.mask_queries import FAMILIES

OUTPUTS = {
    "mask2former": "Mask2FormerForUniversalSegmentationOutput",
    "maskformer": "MaskFormerForInstanceSegmentationOutput",
    "oneformer": "OneFormerForUniversalSegmentationOutput",
    "eomt": "EomtForUniversalSegmentationOutput",
}
PROCESSORS = {
    "mask2former": "Mask2FormerImageProcessor", "maskformer": "MaskFormerImageProcessor",
    "oneformer": "OneFormerImageProcessor", "eomt": "EomtImageProcessor",
}  # fmt: skip
N, Q, K = 2, 12, 7
SIZES = [(450, 350), (61, 133)]  # in blocks of rows, and by torch's lines


class Outputs:
    """As transformers' classes of outputs, of any family."""

    def __init__(self, scores, masks, patch_offsets=None):
        self.class_queries_logits, self.masks_queries_logits, self.patch_offsets = scores, masks, patch_offsets


def blobs(low=(32, 40), images=N, seed=0):
    """Scores that keep some queries, and smooth masks that own regions."""
    g = torch.Generator().manual_seed(seed)
    scores = 6 * torch.randn(images, Q, K + 1, generator=g)
    masks = F.interpolate(14 * torch.randn(images, Q, 4, 5, generator=g), low, mode="bicubic")
    return scores, masks


def theirs(family):
    foreign("torchvision"), foreign("transformers")
    module = importlib.import_module(f"transformers.models.{family}.image_processing_{family}")
    return object.__new__(getattr(module, PROCESSORS[family]))


def outputs(family, *args):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    made = getattr(module, OUTPUTS[family])()
    made.class_queries_logits, made.masks_queries_logits = args[:2]
    if len(args) > 2:
        made.patch_offsets = args[2]
    return made


def options(family):
    return {"size": {"shortest_edge": 96, "longest_edge": 96}} if family == "eomt" else {}


@pytest.mark.parametrize("sizes", [SIZES, [(20, 90), (33, 21)], None], ids=["larger", "smaller", "as they are"])
@pytest.mark.parametrize("family", FAMILIES)
def test_semantic(family, sizes):
    processor, given = theirs(family), outputs(family, *blobs())
    if family == "eomt" and sizes is None:
        with pytest.raises(ValueError, match="target_sizes is None"):
            post_process_semantic_segmentation(given)
        return
    want = processor.post_process_semantic_segmentation(given, target_sizes=sizes, **options(family))
    got = post_process_semantic_segmentation(given, target_sizes=sizes, **options(family))
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        assert (g != w).float().mean() < 1e-3  # near ties


def test_patches():
    processor, sizes = theirs("eomt"), [(60, 150), (100, 50)]
    patches = [[0, 0, 48], [0, 40, 88], [0, 72, 120], [1, 0, 48], [1, 48, 96]]
    given = outputs("eomt", *blobs((12, 12), len(patches)), patches)
    size = {"shortest_edge": 48, "longest_edge": None}
    want = processor.post_process_semantic_segmentation(given, target_sizes=sizes, size=size)
    got = post_process_semantic_segmentation(given, sizes, size=size)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and (g != w).float().mean() < 1e-3


@pytest.mark.parametrize("sizes", [SIZES, [(20, 90), (33, 21)], None], ids=["larger", "smaller", "as they are"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [(), (1, 2, 3)], ids=["apart", "fused"])
def test_panoptic(family, sizes, fused):
    processor = theirs(family)
    for seed in range(2):
        given = outputs(family, *blobs(seed=seed))
        if family == "eomt" and sizes is None:
            with pytest.raises(ValueError, match="target_sizes is None"):
                post_process_panoptic_segmentation(given)
            return
        more = {"stuff_classes": list(fused)} if family == "eomt" else {"label_ids_to_fuse": set(fused)}
        more |= {"target_sizes": sizes, "overlap_mask_area_threshold": 0.3, **options(family)}
        want = processor.post_process_panoptic_segmentation(given, **more)
        got = post_process_panoptic_segmentation(given, **more)
        for g, w in zip(got, want, strict=True):
            assert w["segments_info"] and g["segments_info"] == w["segments_info"]
            assert g["segmentation"].shape == w["segmentation"].shape
            assert g["segmentation"].dtype == w["segmentation"].dtype
            assert (g["segmentation"] != w["segmentation"]).float().mean() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_no_segment(family):
    """No query is sure of its class."""
    processor, (_, masks) = theirs(family), blobs()
    given = outputs(family, torch.zeros(N, Q, K + 1), masks)
    want = processor.post_process_panoptic_segmentation(given, target_sizes=SIZES, **options(family))
    got = post_process_panoptic_segmentation(given, target_sizes=SIZES, **options(family))
    for g, w in zip(got, want, strict=True):
        assert g["segments_info"] == w["segments_info"] == [] and torch.equal(g["segmentation"], w["segmentation"])


# --- without transformers


def test_semantic_by_hand():
    scores, masks = blobs((8, 10))
    got = post_process_semantic_segmentation(Outputs(scores, masks), SIZES, family="maskformer")
    sums = torch.einsum("nqk,nqhw->nkhw", scores.softmax(-1)[..., :-1], masks.sigmoid())
    for i, size in enumerate(SIZES):
        want = F.interpolate(sums[i : i + 1], size, mode="bilinear")[0].argmax(0)
        assert got[i].dtype == torch.int64 and (got[i] != want).float().mean() < 1e-3


def test_panoptic_by_hand():
    """Two queries, side by side; the third's mask belongs to others."""
    scores = torch.full((1, 3, 4), -9.0)
    scores[0, 0, 1] = scores[0, 1, 2] = scores[0, 2, 0] = 9.0
    scores[0, 2, 1] = 8.0
    masks = torch.full((1, 3, 4, 8), -20.0)
    masks[0, 0, :, :4] = masks[0, 1, :, 4:] = masks[0, 2, :, 2:6] = 20.0
    (found,) = post_process_panoptic_segmentation(Outputs(scores, masks), family="maskformer")
    assert [(s["id"], s["label_id"]) for s in found["segments_info"]] == [(1, 1), (2, 2)]
    assert (found["segmentation"] == torch.tensor([1] * 4 + [2] * 4)).all()


def test_wrong_arguments():
    given = Outputs(*blobs((4, 4)))
    with pytest.raises(TypeError, match="names no family"):
        post_process_semantic_segmentation(given, SIZES)
    with pytest.raises(ValueError, match="family is 'detr'"):
        post_process_panoptic_segmentation(given, family="detr")
    with pytest.raises(ValueError, match="2 images and 1 target_sizes"):
        post_process_semantic_segmentation(given, SIZES[:1], family="maskformer")
    with pytest.raises(TypeError, match="has no class_queries_logits"):
        post_process_panoptic_segmentation(object(), family="eomt")
