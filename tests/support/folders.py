"""Small data sets of folders: every picture is split by a line into two colours, its classes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["ground", "sky"]
COLOURS = np.array([[60, 140, 60], [90, 120, 230]])
VOID = 9


def make_folders(
    folder: Path, counts: dict[str, int] | None = None, size: tuple[int, int] = (16, 20), seed: int = 0
) -> Path:
    """Write ``folder``; a strip of each label is void. ``size`` is (height, width)."""
    rng = np.random.default_rng(seed)
    for split, count in (counts or {"train": 8, "val": 3, "test": 5}).items():
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            rows, columns = np.mgrid[: size[0], : size[1]]
            slope, height = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.7) * size[0]
            label = (rows < height + slope * (columns - size[1] / 2)).astype(np.uint8)
            image = (COLOURS[label] + rng.normal(0, 25, (*size, 3))).clip(0, 255).astype(np.uint8)
            label[:, : number % 4] = VOID
            Image.fromarray(image).save(folder / split / "images" / f"p{number}.png")
            picture = Image.fromarray(label)
            picture.putpalette([value for value in range(256) for _ in range(3)])
            picture.save(folder / split / "labels" / f"p{number}.png")
    (folder / "dataset.json").write_text(json.dumps({"classes": CLASSES, "ignore_index": VOID}))
    return folder
