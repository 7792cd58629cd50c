"""Folders of pictures and label PNGs, and the small file beside them that names the classes.

    DIR/dataset.json                    {"classes": ["sky", "road"], "ignore_index": 255, "palette": [[0, 0, 128], ...]}
    DIR/train|val|test/images/NAME.png  or .jpg
    DIR/train|val|test/labels/NAME.png  palette or grey: the pixel values are class indices

Whatever is wrong with a file is one ``ValueError`` that names it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastseg.inference.images import MAX_CLASSES, SUFFIXES, first_line, palette, read_image, read_label, read_palette
from fastseg.inference.progress import progress

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DatasetSpec:
    """What the labels of a data set mean.

    Attributes:
        classes: a name for each class index.
        ignore_index: label value that is no class, such as "void"; None: every pixel has a class.
        palette: RGB, 0 to 255, of each class; None: as ``FolderDataset.colours`` says.
    """

    classes: tuple[str, ...]
    ignore_index: int | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None

    @property
    def void(self) -> int:
        """The value that loss and metrics leave out: ``ignore_index``, or 255 in what padding adds."""
        return 255 if self.ignore_index is None else self.ignore_index


def read_spec(path: str | Path) -> DatasetSpec:
    """Read a ``dataset.json``.

    Raises:
        ValueError: it is missing, no JSON, or says something that cannot be.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f'{path}: no such file; it names the classes: {{"classes": ["sky", "road"]}}') from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object with classes")
    unknown = sorted(set(content) - {"classes", "ignore_index", "palette"})
    if unknown:
        raise ValueError(f"{path}: {unknown[0]!r} is not known; use classes, ignore_index and palette")
    classes = content.get("classes")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{path}: classes is {classes!r}; give a list of names")
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"{path}: {len(classes)} classes; a label PNG holds at most {MAX_CLASSES}")
    ignore = content.get("ignore_index")
    if ignore is not None and (type(ignore) is not int or not 0 <= ignore < 256):
        raise ValueError(f"{path}: ignore_index is {ignore!r}; use a label value from 0 to 255, or leave it out")
    return DatasetSpec(tuple(classes), ignore, _palette(content.get("palette"), len(classes), path))


def _palette(colours: object, count: int, path: Path) -> tuple[tuple[int, int, int], ...] | None:
    if colours is None:
        return None
    byte = lambda value: type(value) is int and 0 <= value < 256
    triple = lambda colour: isinstance(colour, list) and len(colour) == 3 and all(map(byte, colour))
    if not isinstance(colours, list) or len(colours) != count or not all(map(triple, colours)):
        raise ValueError(f"{path}: palette must be {count} colours [red, green, blue] of 0 to 255, one a class")
    return tuple(tuple(colour) for colour in colours)


class FolderDataset:
    """The pairs of one split: ``dataset[i]`` is a picture, (H, W, 3) uint8, and its class indices, (H, W) uint8.

    Args:
        data: the data set's folder.
        split: "train", "val" or "test".
        spec: of the labels.

    Raises:
        ValueError: a folder is missing or empty, or a picture has no label.

    Example:
        >>> dataset = FolderDataset("camvid", "train", read_spec("camvid/dataset.json"))  # doctest: +SKIP
        >>> image, label = dataset[0]  # doctest: +SKIP
    """

    def __init__(self, data: str | Path, split: str, spec: DatasetSpec):
        self.spec, self.split = spec, split
        folder = Path(data) / split
        images, labels = _by_stem(folder / "images", SUFFIXES), _by_stem(folder / "labels", (".png",))
        if not images:
            raise ValueError(f"{folder / 'images'}: no PNG or JPEG picture is there; the split {split!r} is empty")
        lonely = [name for name in images if name not in labels]
        if lonely:
            raise ValueError(
                f"{images[lonely[0]]}: has no label {folder / 'labels' / lonely[0]}.png"
                + (f", as {len(lonely) - 1} others" if len(lonely) > 1 else "")
            )
        self.names = sorted(images)
        self.pairs = [(images[name], labels[name]) for name in self.names]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        path, label_path = self.pairs[index]
        image, label = read_image(path), self.label(index)
        if label.shape != image.shape[:2]:
            raise ValueError(_other_size(label_path, label.shape, image.shape))
        return image, label

    def label(self, index: int) -> np.ndarray:
        """Class indices alone, (H, W) uint8.

        Raises:
            ValueError: the file cannot be read, or holds a value that is neither a class nor ``ignore_index``.
        """
        path, (classes, ignore) = self.pairs[index][1], (self.spec.classes, self.spec.ignore_index)
        label = read_label(path)
        if label.size and label.max() >= len(classes):
            values = np.unique(label)
            wrong = [int(value) for value in values if value >= len(classes) and value != ignore]
            if wrong:
                raise ValueError(
                    f"{path}: has the label {wrong[0]}; classes are 0 to {len(classes) - 1}, ignore_index is {ignore}"
                )
        return label

    def colours(self) -> np.ndarray:
        """(classes, 3), uint8: the spec's palette, else that of the first label PNG, else the library's own.

        A label's palette counts where it has a colour of its own for each class, and not only greys.
        """
        count = len(self.spec.classes)
        if self.spec.palette is not None:
            return np.array(self.spec.palette, np.uint8)
        found = read_palette(self.pairs[0][1])
        if found is not None and len(found) >= count:
            found = found[:count]
            if len(np.unique(found, axis=0)) == count and (found != found[:, :1]).any():
                return found
        return palette(count)

    def labels(self) -> Iterator[np.ndarray]:
        """The class indices of one picture after another."""
        return (self.label(index) for index in range(len(self)))

    def check(self, indices: Sequence[int] | None = None, shown: bool = True) -> None:
        """Read every label, and the header of every picture: an error now, and not in the third hour.

        Raises:
            ValueError: as indexing, but for pictures that are damaged behind their header.
        """
        for index in progress(indices or range(len(self)), f"check {self.split}", "pair", leave=False, shown=shown):
            path, label_path = self.pairs[index]
            label = self.label(index)
            try:
                with Image.open(path) as image:  # reads the header
                    size = (image.height, image.width)
                    turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5  # by 90 degrees
            except Exception as error:  # as in read_image
                raise ValueError(f"{path}: cannot be read: {first_line(error)}") from None
            size = size[::-1] if turned else size
            if label.shape != size:
                raise ValueError(_other_size(label_path, label.shape, size))


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a data set has DIR/train, val and test with images/ and labels/")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(
                    f"{path}: {found[path.stem].name} has the same name; which one does the label go with?"
                )
            found[path.stem] = path
    return found


def _other_size(path: Path, label: Sequence[int], image: Sequence[int]) -> str:
    return f"{path}: the label has {label[1]} x {label[0]} pixels, its picture {image[1]} x {image[0]}"
