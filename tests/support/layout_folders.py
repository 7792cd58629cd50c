"""VOC 2012 and Cityscapes as their publishers lay them out, with a few synthetic pictures."""

from pathlib import Path

import numpy as np
from PIL import Image


def _pair(picture: Path, label: Path, values: np.ndarray, rng: np.random.Generator) -> None:
    for path in (picture, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*values.shape, 3), np.uint8)).save(picture)
    Image.fromarray(values.astype(np.uint8)).save(label)


def voc(root: Path) -> Path:
    """24x32 pixels; train t0, t1, val v0, v1; trainaug train and a0, whose label is in SegmentationClassAug."""
    rng, lists = np.random.default_rng(0), root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name in ("t0", "t1", "v0", "v1", "a0"):
        values = np.kron(rng.integers(0, 21, (3, 4)), np.ones((8, 8), int))
        values[8] = 255
        values[0, 0] = 20
        folder = "SegmentationClassAug" if name == "a0" else "SegmentationClass"
        _pair(root / "JPEGImages" / f"{name}.jpg", root / folder / f"{name}.png", values, rng)
    (lists / "train.txt").write_text("t0\nt1\n")
    (lists / "val.txt").write_text("v0\nv1\n\n")
    augmented = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in ("t0", "t1", "a0")]
    (lists / "trainaug.txt").write_text("\n".join(augmented))
    return root


def cityscapes(root: Path, kind: str) -> Path:
    """16x32 pixels; two train pictures of each of two cities, one of val; ``kind``: labelIds or labelTrainIds."""
    rng = np.random.default_rng(0)
    names = [("train", city, n) for city in ("ulm", "bonn") for n in range(2)] + [("val", "ulm", 9)]
    for split, city, n in names:
        name = f"{city}_{n:06d}_000019"
        ids = kind == "labelIds"
        values = rng.integers(0, 34 if ids else 19, (16, 32))
        values[0, :3] = (26, 7, 1) if ids else (13, 0, 255)
        label = root / "gtFine" / split / city / f"{name}_gtFine_{kind}.png"
        _pair(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", label, values, rng)
    return root
