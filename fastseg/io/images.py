"""Images in and out: safe reading of files from anyone, atomic writing.

A file is opened only if it is regular and has one of the formats below. Its size is checked from the header before a
pixel is decoded. Whatever a decoder raises on a broken file becomes one ``ValueError`` that names the file.

Of 16 bits per pixel the high byte is read; of several pages (TIFF, GIF, APNG) the first.
"""

import colorsys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from fastseg.io.files import atomic_write, first_line, open_regular, printable
from fastseg.io.whole import check_rows, check_strips

T = TypeVar("T")

# Pillow's name of a format -> its files' suffixes. None of them runs a program, as EPS does, or lacks a signature.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")  # or may be: labels would not be what they were
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MAX_PIXELS = 2**25  # 33.5 million: above what cameras give, and 100 MB of RGB
MAX_CLASSES = 256  # a class map is a palette PNG of 8 bits

# Mean and deviation of ImageNet's RGB values in [0, 1], which torchvision's and timm's weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def is_image(path: Path) -> bool:
    """True if a file is an image of its folder, by its name; hidden files such as "._a.png" are not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a picture in one of ``FORMATS``, upright by its EXIF orientation, without alpha.

    Args:
        path: the file; of several pages the first is read, of 16 bits a pixel the high byte.
        max_pixels: refuse an image of more pixels than this before decoding it.

    Returns:
        (H, W, 3), uint8, RGB.

    Raises:
        ValueError: the file is missing, unreadable, of another format, truncated, or too large, or has 32 bits per
            pixel.
    """
    return read(path, lambda image: _rgb(ImageOps.exif_transpose(image)), max_pixels)


def read_label(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read the class indices of a palette or grey picture as stored, with 1, 2, 4, 8, 16 or 32 bits.

    Args:
        path: the file, in a format that keeps values: PNG, TIFF, BMP, PGM, or a grey GIF; of several pages the first is
            read.
        max_pixels: as ``read_image``.

    Returns:
        (H, W): uint8, or int64 where the file has more than 8 bits a pixel.

    Raises:
        ValueError: as ``read_image``, or the file holds colours or fractions, not indices.
    """
    return read(path, _indices, max_pixels)


def read_palette(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """Read the palette of a picture, (N, 3) uint8, or None if it has none."""
    return read(path, _colours, max_pixels)


def read(path: str | Path, convert: Callable[[Image.Image], T], max_pixels: int = MAX_PIXELS) -> T:
    """Return ``convert`` of the opened picture, of which only the header has been read.

    Raises:
        ValueError: as ``read_image``, or ``convert`` raises anything.
    """
    with open_regular(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd tags; what matters is an error, and one line is enough
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=_formats()) as image:
                pixels = image.width * image.height
                if pixels <= max_pixels:
                    check_strips(image)
                    result = convert(image)
                    check_rows(image, file)
                    return result
        except Image.UnidentifiedImageError:
            raise ValueError(f"{path}: not a PNG or JPEG image, nor {', '.join(list(FORMATS)[2:])}") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"{path}: a decompression bomb: more than the limit of {max_pixels} pixels") from None
        except Exception as error:  # on broken data decoders raise OSError, SyntaxError, struct.error, EOFError, ...
            raise ValueError(f"{path}: cannot be read: {first_line(error)}") from error
    raise ValueError(f"{path}: {image.width} x {image.height} pixels, more than the limit of {max_pixels}")


def _formats() -> list[str]:
    """The formats that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def several_pages(image: Image.Image) -> bool:
    """True if pages follow the first; a camera's JPEG with a thumbnail counts as one picture."""
    return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # Pillow would clip to 255
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() < 2**16:
            raise ValueError(f"its values are {values.min()} to {values.max()}; a picture has 8 or 16 bits a pixel")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits a pixel")
    return np.array(image.convert("RGB"))


# Factor by which Pillow multiplies grey of few bits; undone for class indices.
SPREAD = {"L": 1, "L;2": 85, "L;4": 17}


def _indices(image: Image.Image) -> np.ndarray:
    mode, stored = image.mode, image.tile[0] if image.tile else None
    if image.format in LOSSY:
        raise ValueError(f"it is {image.format}, which may change values; class indices need PNG, TIFF, BMP or PGM")
    if mode not in ("P", "L", "1") and not mode.startswith("I"):
        raise ValueError(f"it has pixels of mode {mode}; class indices are a palette or grey picture")
    if stored is not None and stored[0].startswith("ppm") and mode != "1":
        raise ValueError("it is a PGM whose largest value is neither 255 nor 65535, which Pillow would spread")
    if image.format == "GIF":
        return _grey_gif(image)
    rule = stored[3] if stored is not None else mode
    rule = rule if isinstance(rule, str) else next(iter(rule or ()), mode)
    if mode == "1" and (";I" in rule or image.format == "PPM"):  # PBM and faxes; Pillow turns them round
        raise ValueError("its bits are 1 where it is black; class indices are bits where black is 0")
    values = np.array(image)
    if mode == "L":
        if rule not in SPREAD:
            raise ValueError(f"its grey is stored as {rule!r}; class indices are grey where black is 0")
        return values // SPREAD[rule]
    return values.astype(np.uint8 if mode in ("P", "1") else np.int64)


def _grey_gif(image: Image.Image) -> np.ndarray:
    """The greys of a GIF: writers renumber the colours, so that the indices alone mean nothing."""
    colours = np.array(image.convert("RGB"))
    if (colours != colours[..., :1]).any():
        raise ValueError("it is a GIF with colours, which writers of GIF number anew; class indices need PNG or TIFF")
    return colours[..., 0]


def _colours(image: Image.Image) -> np.ndarray | None:
    return np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3) if image.mode == "P" else None


def to_tensor(images: np.ndarray) -> Tensor:
    """Convert uint8 RGB, (H, W, 3) or (N, H, W, 3), to float32 (N, 3, H, W): ``(image / 255 - MEAN) / STD``."""
    stack = torch.from_numpy(images).reshape(-1, *images.shape[-3:])
    return normalised(stack.permute(0, 3, 1, 2).float())  # channels_last in memory, as the pixels were


def normalised(pixels: Tensor) -> Tensor:
    """Normalise RGB (N, 3, H, W), floating point, 0 to 255, for the models: ``(pixels / 255 - MEAN) / STD``."""
    mean, std = (_channels(values, pixels) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    """(C, 1, 1), filled where ``like`` is: a copy to a GPU would wait for it, and one that is kept be of one mode."""
    return torch.cat([like.new_full((1, 1, 1), value) for value in values])


def write_png(path: str | Path, image: Image.Image) -> None:
    """Write ``image`` as a PNG file, atomically."""
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def palette(num_classes: int) -> np.ndarray:
    """Distinct colours, (num_classes, 3) uint8; hues step by the golden ratio, so that neighbours differ."""
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
        colours: of the classes, (num_classes, 3) uint8; None means ``palette``.

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
    """Blend the colours of ``labels`` (H, W) over ``image`` (H, W, 3) uint8: ``(1 - alpha) image + alpha colour``."""
    return Image.blend(Image.fromarray(image), class_map(labels, num_classes).convert("RGB"), alpha)


def figure(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    classes: Sequence[str],
    colours: np.ndarray | None = None,
) -> Image.Image:
    """Rows of panels of one size under their titles, and below them a legend of the class colours.

    A legend wider than the panels continues on a further line. ``colours`` are those of ``class_map``.
    """
    font, gap, line = ImageFont.load_default(), 8, 22
    classes = [printable(name) for name in classes]
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
