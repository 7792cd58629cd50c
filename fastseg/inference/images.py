"""Images in and out: safe reading of files from anyone, whole files or none on the way out.

A file is opened only as PNG or JPEG, its size is checked from the header before a pixel is decoded, and whatever a
decoder raises on a broken file becomes one ``ValueError`` that names the file.
"""

import colorsys
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG")
SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_PIXELS = 2**25  # 33.5 million: above what cameras give, and 100 MB of RGB
MAX_CLASSES = 256  # a class map is a palette PNG of 8 bits

# Mean and deviation of ImageNet's RGB values in [0, 1], which torchvision's and timm's weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def is_image(path: Path) -> bool:
    """Whether a file of a folder is one of its images, by its name: what a system hides, as "._a.png", is none."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a PNG or JPEG file, upright as its EXIF orientation says, without alpha.

    Args:
        path: the file.
        max_pixels: refuse an image of more pixels than this before decoding it.

    Returns:
        (H, W, 3), uint8, RGB.

    Raises:
        ValueError: the file is missing, unreadable, no PNG or JPEG, truncated, or too large.
    """
    return _read(path, max_pixels, lambda image: _rgb(ImageOps.exif_transpose(image)))


def read_label(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read the class indices of a palette or grey PNG, as they are stored.

    Args:
        path: the file; grey of 2 or 4 bits is no good, as Pillow spreads it over 0 to 255.
        max_pixels: as ``read_image``.

    Returns:
        (H, W), uint8.

    Raises:
        ValueError: as ``read_image``, or the file has colours and no indices.
    """
    return _read(path, max_pixels, _indices)


def read_palette(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """The palette of a PNG, (N, 3) uint8, or None where it has none."""
    return _read(path, max_pixels, _colours)


def _read(path: str | Path, max_pixels: int, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    path = Path(path)
    if not path.is_file():  # a directory, or a pipe that would block
        raise ValueError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=FORMATS) as image:
                pixels = image.width * image.height
                if pixels <= max_pixels:
                    return convert(image)
        except Image.UnidentifiedImageError:
            raise ValueError(f"{path}: not a PNG or JPEG image") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"{path}: a decompression bomb: more than the limit of {max_pixels} pixels") from None
        except (
            Exception
        ) as error:  # on broken data the decoders raise OSError, SyntaxError, struct.error, EOFError, ...
            raise ValueError(f"{path}: cannot be read: {first_line(error)}") from error
    raise ValueError(f"{path}: {image.width} x {image.height} pixels, more than the limit of {max_pixels}")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where there is none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


def _indices(image: Image.Image) -> np.ndarray:
    if image.mode not in ("P", "L", "1"):
        raise ValueError(f"it has pixels of mode {image.mode}; class indices are a palette or grey PNG of up to 8 bits")
    return np.array(image).astype(np.uint8)


def _colours(image: Image.Image) -> np.ndarray | None:
    return np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3) if image.mode == "P" else None


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 RGB, (H, W, 3) or (N, H, W, 3), to float32, (N, 3, H, W): ``(image / 255 - MEAN) / STD``."""
    stack = torch.from_numpy(images).reshape(-1, *images.shape[-3:])
    return normalised(stack.permute(0, 3, 1, 2).float())  # channels_last in memory, as the pixels were


def normalised(pixels: Tensor) -> Tensor:
    """RGB (N, 3, H, W), floating point, 0 to 255, to what models take: ``(pixels / 255 - MEAN) / STD``."""
    mean, std = (_channels(values, pixels) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    """(C, 1, 1), filled where ``like`` is: a copy to a GPU would wait for it, and one that is kept be of one mode."""
    return torch.cat([like.new_full((1, 1, 1), value) for value in values])


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write into that replaces ``path`` at the end of the block; on an error ``path`` stays as it was.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}.tmp"
    )  # the same folder: a rename does not cross file systems
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(path: str | Path, image: Image.Image) -> None:
    """Write ``image`` as a PNG file, whole or not at all."""
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def palette(num_classes: int) -> np.ndarray:
    """Distinct colours, (num_classes, 3) uint8: the hue turns by the golden ratio, so neighbours differ."""
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"palette: num_classes is {num_classes}; a class map holds 1 to {MAX_CLASSES} classes")
    tones = ((0.75, 0.95), (0.95, 0.65), (0.45, 0.85))  # saturation and value, by turns
    colours = [colorsys.hsv_to_rgb(0.618034 * i % 1, *tones[i % len(tones)]) for i in range(num_classes)]
    return np.round(np.array(colours) * 255).astype(np.uint8)


def class_map(labels: np.ndarray, num_classes: int, colours: np.ndarray | None = None) -> Image.Image:
    """A palette image whose pixel values are the class indices of ``labels``, (H, W).

    Args:
        labels: class indices.
        num_classes: classes.
        colours: of the classes, (num_classes, 3) uint8; None: ``palette``.

    Raises:
        ValueError: a label is outside ``[0, num_classes)``.
    """
    colours = palette(num_classes) if colours is None else colours
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"class_map: labels from {labels.min()} to {labels.max()} with num_classes={num_classes}")
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(colours.tobytes())
    return image


def overlay(image: np.ndarray, labels: np.ndarray, num_classes: int, alpha: float = 0.45) -> Image.Image:
    """The colours of ``labels``, (H, W), laid over ``image``, (H, W, 3) uint8: ``(1 - alpha) image + alpha colour``."""
    return Image.blend(Image.fromarray(image), class_map(labels, num_classes).convert("RGB"), alpha)


def figure(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    classes: Sequence[str],
    colours: np.ndarray | None = None,
) -> Image.Image:
    """Rows of panels of one size under their titles, and below them a legend of the class colours.

    A legend wider than the panels goes on in a further line. ``colours`` are those of ``class_map``.
    """
    font, gap, line = ImageFont.load_default(), 8, 22
    width, height = rows[0][0].size
    across, below, x = gap + (width + gap) * len(titles), line + (height + gap) * len(rows), gap
    places = []
    for name in classes:
        entry = 32 + int(font.getlength(name))
        if x > gap and x + entry > across:
            x, below = gap, below + line
        places.append((x, below + 2))
        x += entry
    sheet = Image.new("RGB", (across, below + line), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = gap + (width + gap) * column
        draw.text((x, 5), title, (0, 0, 0), font)
        for row, panels in enumerate(rows):
            sheet.paste(panels[column].convert("RGB"), (x, line + (height + gap) * row))
    colours = palette(len(classes)) if colours is None else colours
    for name, (x, y), colour in zip(classes, places, colours.tolist(), strict=True):
        draw.rectangle((x, y, x + 14, y + 12), tuple(colour))
        draw.text((x + 20, y), name, (0, 0, 0), font)
    return sheet
