"""Data sets in their publishers' folders: PASCAL VOC 2012 and Cityscapes; and fastseg's own.

VOC         DIR/JPEGImages/NAME.jpg, DIR/SegmentationClass/NAME.png, DIR/ImageSets/Segmentation/SPLIT.txt; DIR may be
            VOC2012 itself or a folder around it. The 10,582 training pictures of the articles are those of the list
            trainaug.txt, with labels in SegmentationClassAug (Hariharan et al.'s), where it holds them.
Cityscapes  DIR/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png, DIR/gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png, or
            NAME_gtFine_labelTrainIds.png where that is missing
"""

from pathlib import Path

import numpy as np

from fastseg.io.images import read_label
from fastseg.training.dataset import DatasetSpec, FolderDataset, read_spec

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
BORDER = 255  # VOC's value of object borders; Cityscapes' of what is not a class in training

# name: (id, colour), in the order of the train ids
CITYSCAPES = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
CITYSCAPES_IDS = 34


def voc_palette() -> np.ndarray:
    """The VOC palette, (21, 3) uint8: the bits of a class index, three at a time, become the high bits of RGB."""
    index = np.arange(len(VOC_CLASSES))
    colours = np.zeros((len(index), 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def train_ids() -> np.ndarray:
    """Map Cityscapes' ids, (256,) uint8, to train ids 0 to 18, or to 255 for those that are not trained."""
    table = np.full(256, BORDER, np.uint8)
    table[[index for index, _ in CITYSCAPES.values()]] = np.arange(len(CITYSCAPES))
    return table


VOC = DatasetSpec(VOC_CLASSES, BORDER, tuple(map(tuple, voc_palette().tolist())))
CITYSCAPES_SPEC = DatasetSpec(tuple(CITYSCAPES), BORDER, tuple(colour for _, colour in CITYSCAPES.values()))


class VOCDataset(FolderDataset):
    """PASCAL VOC 2012: 21 classes; borders, 255, are left out.

    Args:
        data: VOC2012, VOCdevkit or the folder around it.
        split: the name of a list in ImageSets/Segmentation: "train", "trainaug", "val" ...

    Raises:
        ValueError: the folder, the list or a file that it names is missing.
    """

    def __init__(self, data: str | Path, split: str):
        self.spec, self.split, self.left_out = VOC, split, []
        root = next((folder for folder in _around(Path(data)) if (folder / "ImageSets/Segmentation").is_dir()), None)
        if root is None:
            raise ValueError(f"{data}: no ImageSets/Segmentation is there; name the folder VOC2012, or VOCdevkit")
        listed = root / "ImageSets/Segmentation" / f"{split}.txt"
        if not listed.is_file():
            hint = "; it is no part of VOC 2012, but of the Semantic Boundaries Dataset" if split == "trainaug" else ""
            raise ValueError(f"{listed}: no such list{hint}")
        lines = listed.read_text().splitlines()
        self.names = [Path(line.split()[0]).stem for line in lines if line.strip()]  # some name files, some stems
        fine, more = root / "SegmentationClass", root / "SegmentationClassAug"
        label = lambda name: more / name if split == "trainaug" and (more / name).is_file() else fine / name
        self.pairs = [(root / "JPEGImages" / f"{name}.jpg", label(f"{name}.png")) for name in self.names]
        _all_there(self, listed)


def _around(folder: Path) -> tuple[Path, ...]:
    return folder, folder / "VOC2012", folder / "VOCdevkit/VOC2012"


class CityscapesDataset(FolderDataset):
    """Cityscapes with fine labels: of the 34 ids 19 become the classes of training, the others 255.

    Args:
        data: the folder with leftImg8bit and gtFine.
        split: "train", "val" or "test".

    Raises:
        ValueError: a folder or a label is missing.
    """

    def __init__(self, data: str | Path, split: str):
        self.spec, self.split, self.left_out = CITYSCAPES_SPEC, split, []
        folder, tail = Path(data) / "leftImg8bit" / split, "_leftImg8bit.png"
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: no such folder; Cityscapes has leftImg8bit/ and gtFine/, of train, val and test"
            )
        pictures = sorted(folder.glob(f"*/*{tail}"))
        self.names = [path.name.removesuffix(tail) for path in pictures]
        self.pairs = []
        for path, name in zip(pictures, self.names, strict=True):
            labels = Path(data) / "gtFine" / split / path.parent.name
            ids, trained = (labels / f"{name}_gtFine_{kind}.png" for kind in ("labelIds", "labelTrainIds"))
            self.pairs.append((path, trained if trained.is_file() and not ids.is_file() else ids))
        _all_there(self, folder)

    def label(self, index: int) -> np.ndarray:
        """Return the train ids, (H, W) uint8.

        Raises:
            ValueError: the file cannot be read, or holds a value that is not an id.
        """
        path = self.pairs[index][1]
        if path.name.endswith("labelTrainIds.png"):
            return super().label(index)
        ids = read_label(path)
        wrong = ids[(ids < 0) | ((ids >= CITYSCAPES_IDS) & (ids != BORDER))]
        if wrong.size:
            raise ValueError(f"{path}: has the id {wrong.flat[0]}; Cityscapes has 0 to {CITYSCAPES_IDS - 1}, and 255")
        return train_ids()[ids]


def _all_there(dataset: FolderDataset, source: Path) -> None:
    if not dataset.names:
        raise ValueError(f"{source}: names no picture; the split {dataset.split!r} is empty")
    missing = [path for pair in dataset.pairs for path in pair if not path.is_file()]
    if missing:
        more = f", as are {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}: is missing{more}; {source} asks for it")


LAYOUTS = ("folders", "voc", "cityscapes")


def open_dataset(layout: str, data: Path, split: str, spec: Path | None = None) -> FolderDataset:
    """Open one split of a data set.

    Args:
        layout: "folders", as ``fastseg.training.dataset`` says, "voc" or "cityscapes".
        data: its folder.
        split: its name.
        spec: the file that names the classes of "folders"; None means dataset.json in ``data``.

    Raises:
        ValueError: the layout is unknown, a spec is given for a layout that has its own, or the data is bad.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"open_dataset: layout is {layout!r}; use one of {', '.join(LAYOUTS)}")
    if layout == "folders":
        return FolderDataset(data, split, read_spec(spec or data / "dataset.json"))
    if spec is not None:
        raise ValueError(f"{spec}: the layout {layout!r} has classes of its own; leave the file out")
    return VOCDataset(data, split) if layout == "voc" else CityscapesDataset(data, split)
