"""Whether a file holds all rows of its picture: Pillow leaves those that are missing at 0, without an error."""

import struct
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour types
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 2**16  # bytes that are decompressed at a time


def check_strips(image: Image.Image) -> None:
    """Raise if the strips or tiles that the header of a file lists do not reach the last row.

    Raises:
        ValueError: they do not.
    """
    ends = [part[1][3] for part in image.tile if part[1] is not None]
    if ends and max(ends) < image.height:
        raise ValueError(f"its data end after {max(ends)} of {image.height} rows")


def check_rows(image: Image.Image, file: BinaryIO) -> None:
    """Raise if the data of a decoded PNG end before its last row; others raise while they are decoded.

    Rows that are missing are 0, so that the data are looked at again only if one of the last two rows is.

    Raises:
        ValueError: they do.
    """
    if image.format != "PNG" or image.tile:  # nothing has been decoded
        return
    last = np.asarray(image.crop((0, max(0, image.height - 2), *image.size)))
    if last.reshape(last.shape[0], -1).any(1).all():
        return
    file.seek(16)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", file.read(13))
    bits = depth * _CHANNELS[colour]
    grids = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    want = 0
    for x, y, dx, dy in grids:
        columns, rows = -(-max(0, width - x) // dx), -(-max(0, height - y) // dy)
        want += rows * (1 + -(-columns * bits // 8)) if columns else 0
    have = _decompressed(file, want)
    if have < want:
        raise ValueError(f"its data end after {have} of {want} bytes of pixels")


def _decompressed(file: BinaryIO, most: int) -> int:
    """Bytes in the image data of a PNG, counted up to ``most``."""
    file.seek(8)
    stream, count = zlib.decompressobj(), 0
    while len(head := file.read(8)) == 8 and count < most:
        size, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT":
            piece = file.read(size)
            while piece and not stream.eof and count < most:
                count += len(stream.decompress(piece, _PIECE))
                piece = stream.unconsumed_tail
            file.seek(4, 1)
        else:
            file.seek(size + 4, 1)
    return count
