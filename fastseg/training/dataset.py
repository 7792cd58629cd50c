"""Folders of pictures and label PNGs, and the file beside them that names the classes.

    DIR/dataset.json                    {"classes": ["sky", "road"], "ignore_index": 255, "palette": [[0, 0, 128], ...]}
    DIR/train|val|test/images/NAME.png  or .jpg, .bmp, .tif, .webp, .gif ...: as ``fastseg.io.images``
    DIR/train|val|test/labels/NAME.png  or .tif, .bmp ...; palette or grey: the pixel values are class indices

A fault of a file is one ``ValueError`` that names it; files that are left out are counted.
"""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from fastseg.io.files import open_regular, read_json
from fastseg.io.images import MAX_CLASSES, is_image, palette, read, read_image, read_label, read_palette, several_pages
from fastseg.io.progress import progress
from fastseg.training.census import Census

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DatasetSpec:
    """What the labels of a data set mean.

    Attributes:
        classes: a name for each class index.
        ignore_index: label value that is not a class, such as "void"; None if every pixel has a class.
        palette: RGB, 0 to 255, of each class; None means that ``FolderDataset.colours`` chooses.
    """

    classes: tuple[str, ...]
    ignore_index: int | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None

    @property
    def void(self) -> int:
        """The value that loss and metrics leave out: ``ignore_index``, or 255 for padding."""
        return 255 if self.ignore_index is None else self.ignore_index


def read_spec(path: str | Path) -> DatasetSpec:
    """Read a ``dataset.json``.

    Raises:
        ValueError: it is missing, is not JSON, or has an invalid entry.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise ValueError(f'{path}: no such file; it names the classes: {{"classes": ["sky", "road"]}}')
    content = read_json(path)
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
    blank = next((i for i, name in enumerate(classes) if not name.strip()), None)
    if blank is not None:
        raise ValueError(f"{path}: the class {blank} is named {classes[blank]!r}; give each a name")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: the class {twice[0]!r} is there twice; each class has a name of its own")
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


class Pairs(Protocol):
    """What ``fastseg.training.run.train`` learns from: a folder, or anything in memory that has these.

    ``dataset[i]`` is a picture, (H, W, 3) uint8, and its class indices, (H, W) uint8, the same at each call.
    """

    spec: DatasetSpec
    split: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...

    def labels(self) -> Iterator[np.ndarray]:
        """The class indices of one picture after another; asked for where class weights are."""
        ...


class FolderDataset:
    """The pairs of one split: ``dataset[i]`` is a picture, (H, W, 3) uint8, and its class indices, (H, W) uint8.

    Args:
        data: the data set's folder.
        split: "train", "val" or "test".
        spec: of the labels.

    Raises:
        ValueError: a folder is missing or empty, a picture has no label, or a picture is not a regular file.

    Attributes:
        names: of the pictures, without suffixes, in order.
        pairs: the files of picture and label.
        left_out: a line for each folder that holds something else.

    Example:
        >>> dataset = FolderDataset("camvid", "train", read_spec("camvid/dataset.json"))  # doctest: +SKIP
        >>> image, label = dataset[0]  # doctest: +SKIP
    """

    def __init__(self, data: str | Path, split: str, spec: DatasetSpec):
        self.spec, self.split = spec, split
        folder = Path(data) / split
        images, strange = _by_stem(folder / "images")
        labels, strange_labels = _by_stem(folder / "labels")
        if not images:
            others = f"; what is there: {_counted(strange)}" if strange else ""
            raise ValueError(
                f"{folder / 'images'}: no PNG or JPEG picture is there; the split {split!r} is empty{others}"
            )
        lonely = [name for name in images if name not in labels]
        if lonely:
            raise ValueError(
                f"{images[lonely[0]]}: has no label {folder / 'labels' / lonely[0]}.png"
                + (f", as {len(lonely) - 1} others" if len(lonely) > 1 else "")
            )
        without = [labels[name].name for name in labels if name not in images]
        if without:
            strange_labels["label(s) without a picture, as " + without[0]] = len(without)
        self.left_out = [
            f"{folder / kind}: left out: {_counted(found)}"
            for kind, found in (("images", strange), ("labels", strange_labels))
            if found
        ]
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
        """Return the class indices alone, (H, W) uint8.

        Raises:
            ValueError: the file cannot be read, or holds a value that is neither a class nor ``ignore_index``.
        """
        path, (classes, ignore) = self.pairs[index][1], (self.spec.classes, self.spec.ignore_index)
        label = read_label(path)
        if label.size and not 0 <= label.min() <= label.max() < len(classes):
            values = np.unique(label)
            wrong = [int(value) for value in values if not 0 <= value < len(classes) and value != ignore]
            if wrong:
                raise ValueError(
                    f"{path}: has the label {wrong[0]}; classes are 0 to {len(classes) - 1}, ignore_index is {ignore}"
                )
        return label.astype(np.uint8, copy=False)

    def colours(self) -> np.ndarray:
        """Colours (classes, 3), uint8: the spec's palette, else that of the first label PNG, else the library's own.

        A label's palette is used if it has a distinct colour for each class, and not only greys.
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

    def check(self, indices: Iterable[int] | None = None, shown: bool = True) -> Census:
        """Read every label, and the header of every picture, so that errors show now and not in the third hour.

        Returns:
            A census of the labels, and marks that change if a pair changes.

        Raises:
            ValueError: as for indexing, except for pictures that are damaged behind their header.
        """
        census = Census(len(self.spec.classes))
        indices = range(len(self)) if indices is None else indices
        for index in progress(indices, f"check {self.split}", "pair", leave=False, shown=shown):
            path, label_path = self.pairs[index]
            label = self.label(index)
            size, pages = read(path, _header)
            if label.shape != size:
                raise ValueError(_other_size(label_path, label.shape, size))
            census.add(index, label, pages or read(label_path, several_pages), self._mark(index, label))
        return census

    def _mark(self, index: int, label: np.ndarray) -> str:
        """A mark of the label's values, and of the picture's size and its first and last 64 KiB."""
        mark = hashlib.blake2b(os.fsencode(self.names[index]), digest_size=16)
        mark.update(str(label.shape).encode() + label.tobytes())
        with open_regular(self.pairs[index][0]) as file:
            size = file.seek(0, os.SEEK_END)
            for start in (0, max(0, size - 2**16)):
                file.seek(start)
                mark.update(file.read(2**16))
        mark.update(str(size).encode())
        return mark.hexdigest()


def _header(image: Image.Image) -> tuple[tuple[int, int], bool]:
    """Height and width of the upright picture, and whether it has several pages."""
    turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5  # by 90 degrees
    size = (image.height, image.width)
    return size[::-1] if turned else size, several_pages(image)


def _by_stem(folder: Path) -> tuple[dict[str, Path], Counter]:
    """The pictures of a folder, and what else is there; hidden files are skipped."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a data set has DIR/train, val and test with images/ and labels/")
    found: dict[str, Path] = {}
    strange: Counter = Counter()
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            strange["folder(s)"] += 1
        elif not is_image(path):
            strange[f"{path.suffix.lower() or 'nameless'} file(s)"] += 1
        elif not stat.S_ISREG(mode):
            raise ValueError(f"{path}: {'not a regular file' if mode else 'a link to nowhere, or in a circle'}")
        elif path.stem in found:
            raise ValueError(f"{path}: {found[path.stem].name} has the same name; which one does the label go with?")
        else:
            found[path.stem] = path
    return found, strange


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _counted(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in found.items())


def _other_size(path: Path, label: Sequence[int], image: Sequence[int]) -> str:
    return f"{path}: the label has {label[1]} x {label[0]} pixels, its picture {image[1]} x {image[0]}"
