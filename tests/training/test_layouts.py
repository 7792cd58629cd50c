"""VOC's and Cityscapes' folders with a few synthetic pictures: the pairs, the ids, what is missing."""

import numpy as np
import pytest
from layout_folders import cityscapes, voc
from PIL import Image

from fastseg.training.layouts import CITYSCAPES_SPEC, VOC, CityscapesDataset, VOCDataset, open_dataset, train_ids


def test_voc(tmp_path):
    root = voc(tmp_path / "VOCdevkit" / "VOC2012")
    for folder in (root, root.parent, tmp_path):
        dataset = VOCDataset(folder, "val")
        assert dataset.names == ["v0", "v1"]
        image, label = dataset[1]
        assert image.shape == (24, 32, 3) and label.shape == (24, 32)
        assert set(np.unique(label)) <= {*range(21), 255} and 255 in label
        dataset.check()
    assert len(VOC.classes) == 21 and VOC.void == 255
    assert VOC.palette[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)) and VOC.palette[20] == (0, 64, 128)


def test_voc_augmented_labels(tmp_path):
    """Lists of stems or of files; where the augmented folder has a label, it is taken for trainaug alone."""
    root = voc(tmp_path)
    dataset = open_dataset("voc", root, "trainaug")
    assert dataset.names == ["t0", "t1", "a0"]
    assert [path.parent.name for _, path in dataset.pairs] == ["SegmentationClass"] * 2 + ["SegmentationClassAug"]
    assert dataset.label(2)[0, 0] == 20


def test_voc_faults(tmp_path):
    root = voc(tmp_path)
    with pytest.raises(ValueError, match="no ImageSets/Segmentation is there"):
        VOCDataset(root / "JPEGImages", "val")
    with pytest.raises(ValueError, match=r"test.txt: no such list$"):
        VOCDataset(root, "test")
    (root / "ImageSets/Segmentation/trainaug.txt").unlink()
    with pytest.raises(ValueError, match="Semantic Boundaries"):
        VOCDataset(root, "trainaug")
    (root / "SegmentationClass/v1.png").unlink()
    with pytest.raises(ValueError, match=r"v1\.png: is missing; .*val\.txt asks for it"):
        VOCDataset(root, "val")
    Image.new("L", (32, 24), 21).save(root / "SegmentationClass/v1.png")
    with pytest.raises(ValueError, match="has the label 21; classes are 0 to 20"):
        VOCDataset(root, "val").check()
    with pytest.raises(ValueError, match="has classes of its own"):
        open_dataset("voc", root, "val", tmp_path / "dataset.json")


def test_cityscapes_ids():
    """The 19 that are trained, in the order of the published label table; 255 for all else."""
    table = train_ids()
    trained = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert table[trained].tolist() == list(range(19))
    assert set(np.delete(table, trained)) == {255}
    assert CITYSCAPES_SPEC.classes[13] == "car" and CITYSCAPES_SPEC.palette[13] == (0, 0, 142)


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, kind):
    root = cityscapes(tmp_path, kind)
    dataset = CityscapesDataset(root, "train")
    assert dataset.names == ["bonn_000000_000019", "bonn_000001_000019", "ulm_000000_000019", "ulm_000001_000019"]
    image, label = dataset[0]
    assert image.shape == (16, 32, 3)
    assert label[0, :3].tolist() == [13, 0, 255]  # car 26, road 7, ego vehicle 1
    dataset.check()
    assert len(CityscapesDataset(root, "val")) == 1


def test_cityscapes_faults(tmp_path):
    root = cityscapes(tmp_path, "labelIds")
    label = root / "gtFine/val/ulm/ulm_000009_000019_gtFine_labelIds.png"
    Image.new("L", (32, 16), 34).save(label)
    with pytest.raises(ValueError, match="has the id 34; Cityscapes has 0 to 33, and 255"):
        CityscapesDataset(root, "val").label(0)
    label.unlink()
    with pytest.raises(ValueError, match=r"labelIds\.png: is missing"):
        CityscapesDataset(root, "val")
    with pytest.raises(ValueError, match="no such folder; Cityscapes has"):
        CityscapesDataset(root, "test")
    with pytest.raises(ValueError, match="layout is 'coco'"):
        open_dataset("coco", root, "val")
