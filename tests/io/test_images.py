"""Images in and out: what is read is exact or refused in one line; what is written is whole or not there."""

import os
import secrets
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode

from fastseg.io import images


def _random_image(height=7, width=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _save(image, path, **options):
    image.save(path, **options)
    return path


def test_read_is_exact(tmp_path):
    rgb = _random_image()
    np.testing.assert_array_equal(images.read_image(_save(Image.fromarray(rgb), tmp_path / "rgb.png")), rgb)
    alpha = np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)])
    np.testing.assert_array_equal(images.read_image(_save(Image.fromarray(alpha), tmp_path / "alpha.png")), rgb)
    grey = images.read_image(_save(Image.fromarray(rgb[..., 0]), tmp_path / "grey.png"))
    np.testing.assert_array_equal(grey, rgb[..., :1].repeat(3, 2))


def test_sixteen_bits_keep_the_high_byte(tmp_path):
    deep = np.array([[0x00FF, 0x0100, 0xABCD, 0xFFFF]], np.uint16)
    read = images.read_image(_save(Image.fromarray(deep), tmp_path / "deep.png"))
    assert read[0, :, 0].tolist() == [0x00, 0x01, 0xAB, 0xFF]


def test_jpeg_is_turned_upright(tmp_path):
    half = np.zeros((16, 32, 3), np.uint8)
    half[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right
    upright = images.read_image(_save(Image.fromarray(half), tmp_path / "turned.jpg", exif=exif, quality=95))
    assert upright.shape == (32, 16, 3)
    assert upright[:12].max() < 32
    assert upright[20:].min() > 224


def _bomb(path, side):
    _save(Image.new("1", (side, side)), path)
    assert path.stat().st_size < 50_000
    return path


def _bad_file(kind, folder):
    path = folder / f"{kind.replace(' ', '_')}.png"
    rgb = Image.fromarray(_random_image(64, 64))
    match kind:
        case "directory":
            path.mkdir()
        case "empty":
            path.touch()
        case "pipe":
            os.mkfifo(path)
        case "circle":
            path.symlink_to(path)
        case "text":
            path.write_text("<svg><script>alert(1)</script></svg>")
        case "eps" | "pcx":  # EPS runs Ghostscript
            _save(rgb, path, format=kind.upper())
        case "truncated png" | "truncated jpeg":
            _save(rgb, path, format=kind.split()[1].upper())
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        case "header only":
            path.write_bytes(_save(rgb, path).read_bytes()[:20])
        case "own cap":
            _bomb(path, 6000)
        case "bomb":
            _bomb(path, 12_000)
        case "huge bomb":
            _bomb(path, 18_000)
    return path


BAD = {
    "missing": "no such file",
    "directory": "a folder, not a file",
    "empty": "not a PNG or JPEG",
    "text": "not a PNG or JPEG",
    "eps": "not a PNG or JPEG",
    "pcx": "not a PNG or JPEG",
    "pipe": "not a regular file",
    "circle": "cannot be opened: Too many levels of symbolic links",
    "truncated png": "cannot be read: ",
    "truncated jpeg": "cannot be read: ",
    "header only": "",  # Pillow's versions differ on whether such a file is recognised
    "own cap": "6000 x 6000 pixels",  # below Pillow's limits
    "bomb": "limit",  # Pillow only warns
    "huge bomb": "limit",  # Pillow raises
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_one_clear_error(kind, tmp_path):
    path = _bad_file(kind, tmp_path)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")  # a caller's filter does not open the gate
        with pytest.raises(ValueError, match=BAD[kind]) as error:
            images.read_image(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert not [w for w in leaked if issubclass(w.category, Image.DecompressionBombWarning)]


def _png(rows: bytes, height: int, *, colour: int = 0, interlaced: int = 0, piece: int = 1000) -> bytes:
    """A PNG 5 pixels wide, in pieces, whose compressed data are whole whatever they hold."""
    data = zlib.compress(rows)
    pieces = [(b"IDAT", data[i : i + piece]) for i in range(0, len(data), piece)]
    header = struct.pack(">IIBBBBB", 5, height, 8, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *([(b"PLTE", bytes(range(48)))] if colour == 3 else []), *pieces, (b"IEND", b"")]
    pack = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + b"".join(pack(*chunk) for chunk in chunks)


@pytest.mark.parametrize("colour", [0, 2, 3])
@pytest.mark.parametrize("missing", [0, 1, 6])
def test_a_png_with_rows_missing(tmp_path, colour, missing):
    """Pillow leaves them at 0; rows that are 0 in the file are right."""
    width = 15 if colour == 2 else 5
    rows = b"".join(b"\0" + bytes([value] * width) for value in (1, 2, 3, 4, 5, 0, 0)[: 7 - missing])
    path = tmp_path / "image.png"
    path.write_bytes(_png(rows, 7, colour=colour, piece=1000 if missing else 5))
    reads = [images.read_image] if colour == 2 else [images.read_image, images.read_label]
    for read in reads:
        if missing:
            with pytest.raises(ValueError, match=r"image.png: .* its data end after \d+ of \d+ bytes of pixels"):
                read(path)
        else:
            assert len(read(path)) == 7


def test_an_interlaced_png_with_rows_missing(tmp_path):
    grids = [(1, 1), (1, 1), (1, 2), (2, 1), (2, 3), (4, 2), (3, 5)]  # rows and columns of each pass over 7 x 5 pixels
    rows = [b"\0" + bytes(range(1, columns + 1)) for count, columns in grids for _ in range(count)]
    path = tmp_path / "image.png"
    path.write_bytes(_png(b"".join(rows), 7, interlaced=1))
    assert images.read_label(path).all()
    for missing in (1, 3, 9):
        path.write_bytes(_png(b"".join(rows[:-missing]), 7, interlaced=1))
        with pytest.raises(ValueError, match="its data end after"):
            images.read_label(path)


def test_a_tiff_whose_strips_end_early(tmp_path):
    path = _save(Image.fromarray(_random_image(8, 6)), tmp_path / "image.tif")
    data = bytearray(path.read_bytes())
    entry = data.index(struct.pack("<HH", 257, 4))  # the number of rows
    data[entry + 8 : entry + 12] = struct.pack("<I", 16)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its data end after 8 of 16 rows"):
        images.read_image(path)


@pytest.mark.parametrize("suffix", ["bmp", "tif", "webp", "gif", "ppm", "jp2"])
def test_the_other_formats(tmp_path, suffix):
    rgb = _random_image()
    lossless = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}
    path = _save(Image.fromarray(rgb), tmp_path / f"a.{suffix}", **lossless.get(suffix, {}))
    assert images.is_image(path)
    if suffix == "gif":  # of 35 colours none is lost
        rgb = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(images.read_image(path), rgb)


@pytest.mark.parametrize("stored", ["pbm", "fax"])
def test_bits_that_are_one_where_it_is_black_are_no_labels(tmp_path, stored):
    """Pillow turns them round: what was written as 1 would be class 0. As pictures they are read."""
    path = tmp_path / ("a.pbm" if stored == "pbm" else "a.tif")
    if stored == "pbm":
        path.write_bytes(b"P1\n2 1\n0 1\n")
    else:
        _save(Image.new("1", (2, 1)), path, tiffinfo={262: 0})
    with pytest.raises(ValueError, match=r"its bits are 1 where it is black; class indices are bits where black is 0"):
        images.read_label(path)
    assert images.read_image(path).shape == (1, 2, 3)


def test_of_several_pages_the_first(tmp_path):
    pages = [Image.fromarray(_random_image(seed=seed)) for seed in range(3)]
    for name in ("pages.tif", "pages.png"):
        path = _save(pages[0], tmp_path / name, save_all=True, append_images=pages[1:])
        np.testing.assert_array_equal(images.read_image(path), np.asarray(pages[0]))
        assert images.read(path, images.several_pages)
    assert not images.read(_save(pages[0], tmp_path / "one.tif"), images.several_pages)


def test_pictures_of_more_than_8_bits(tmp_path):
    """16 bits: the high byte, in TIFF as in PNG, grey and colour; what has no 16 bits is refused."""
    deep = np.array([[0x00FF, 0x0100, 0xABCD, 0xFFFF]], np.uint16)
    high = [0x00, 0x01, 0xAB, 0xFF]
    assert images.read_image(_save(Image.fromarray(deep), tmp_path / "deep.tif"))[0, :, 0].tolist() == high
    wide = _save(Image.fromarray(deep.astype(np.int32)), tmp_path / "wide.tif")
    assert images.read_image(wide)[0, :, 2].tolist() == high
    for name, values, words in (
        ("large", np.array([[0, 70_000]], np.int32), "0 to 70000"),
        ("below", np.array([[-1, 9]], np.int32), "-1 to 9"),
        ("real", np.array([[0.5, 1.0]], np.float32), "floating-point"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            images.read_image(_save(Image.fromarray(values), tmp_path / f"{name}.tif"))
        assert str(error.value).startswith(str(tmp_path / f"{name}.tif"))


@pytest.mark.parametrize("kind", ["P png", "L png", "I;16 png", "P tif", "L tif", "I;16 tif", "I tif", "L bmp", "P bmp",
                                  "L gif", "L pgm", "I pgm", "L tif lzw"])  # fmt: skip
def test_labels_are_as_stored(tmp_path, kind):
    mode, suffix, *packed = kind.split()
    want = np.array([[0, 2, 3], [9, 250, 255]])  # with holes, which writers of GIF close
    dtype = {"P": np.uint8, "L": np.uint8, "I;16": np.uint16, "I": np.int32}[mode]
    label = Image.fromarray(want.astype(dtype))
    if mode == "P":
        label.putpalette(images.palette(256).tobytes())
    assert label.mode == mode
    path = _save(label, tmp_path / f"a.{suffix}", **({"compression": "tiff_lzw"} if packed else {}))
    got = images.read_label(path)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == (np.uint8 if dtype is np.uint8 else np.int64)


@pytest.mark.parametrize("bits", [2, 4])
def test_labels_of_few_bits(tmp_path, bits):
    """Pillow spreads grey of 2 and 4 bits over 0 to 255."""
    want = np.arange(2**bits, dtype=np.uint8)[None]
    packed = np.packbits(np.unpackbits(want[..., None], axis=-1)[..., -bits:].reshape(1, -1), axis=-1)
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", want.size, 1, bits, 0, 0, 0, 0)
    body = zlib.compress(b"\0" + packed.tobytes())
    path = tmp_path / "grey.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(images.read_label(path), want)


@pytest.mark.parametrize(
    ("mode", "name", "words"),
    [("RGB", "a.png", "mode RGB"), ("RGBA", "a.tif", "mode RGBA"), ("LA", "a.png", "mode LA"), ("F", "a.tif", "mode F"),
     ("CMYK", "a.tif", "mode CMYK"), ("L", "a.jpg", "JPEG, which may change"), ("L", "a.webp", "WEBP, which may"),
     ("RGB", "a.gif", "GIF with colours")],
)  # fmt: skip
def test_labels_that_hold_no_indices(tmp_path, mode, name, words):
    path = tmp_path / name
    Image.new(mode, (4, 3), 1.0 if mode == "F" else 1).save(path)
    with pytest.raises(ValueError, match=words) as error:
        images.read_label(path)
    assert str(error.value).startswith(f"{path}: cannot be read: it ")


def test_a_spread_pgm_is_no_label(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 3 1 20\n" + bytes([0, 1, 20]))
    with pytest.raises(ValueError, match="largest value is neither"):
        images.read_label(path)


def test_normalising_remembers_nothing():
    """A first call under inference mode or with fake tensors once decided what later ones got."""
    pixels = torch.full((1, 3, 2, 2), 255.0)
    want = (1 - torch.tensor(images.MEAN)) / torch.tensor(images.STD)
    with FakeTensorMode():
        images.normalised(torch.empty(1, 3, 2, 2))
    with torch.inference_mode():
        images.normalised(pixels)
    torch.testing.assert_close(images.normalised(pixels.requires_grad_())[0, :, 0, 0], want)
    images.normalised(pixels).sum().backward()


def test_bomb_is_not_decoded(tmp_path, monkeypatch):
    path = _bomb(tmp_path / "bomb.png", 12_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # some programs switch Pillow's check off
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="12000 x 12000 pixels"):
        images.read_image(path)


def test_to_tensor_normalises(tmp_path):
    image = _random_image()
    x = images.to_tensor(image)
    assert x.shape == (1, 3, 7, 5)
    want = (image[2, 3, 1] / 255 - images.MEAN[1]) / images.STD[1]
    torch.testing.assert_close(x[0, 1, 2, 3].item(), want, rtol=1e-6, atol=1e-6)
    both = images.to_tensor(np.stack([image, 255 - image]))
    torch.testing.assert_close(both[0], x[0], rtol=0, atol=0)


def test_atomic_write_keeps_the_old_file_on_error(tmp_path):
    path = tmp_path / "result.png"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk"), images.atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError("disk full")
    assert path.read_bytes() == b"old"
    with images.atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"  # nothing is seen before the end
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["result.png"]


@pytest.mark.parametrize("length", [251, 255])
def test_atomic_write_of_the_longest_names(tmp_path, length):
    path = tmp_path / ("\N{GREEK SMALL LETTER ALPHA}" * 120 + "x" * (length - 244) + ".png")
    with images.atomic_write(path) as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"new"


def test_atomic_write_does_not_follow_what_is_planted(tmp_path, monkeypatch):
    """Not even where its temporary's name is guessed."""
    victim, path = tmp_path / "victim", tmp_path / "result.png"
    victim.write_bytes(b"mine")
    monkeypatch.setattr(secrets, "token_hex", lambda count: "ab")
    (tmp_path / ".result.png.ab.tmp").symlink_to(victim)
    (tmp_path / f".result.png.{os.getpid()}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError), images.atomic_write(path) as file:
        file.write(b"new")
    assert victim.read_bytes() == b"mine" and not path.exists()


def test_class_map_holds_indices_and_colours(tmp_path):
    labels = np.array([[0, 1, 2], [18, 255, 7]])
    path = tmp_path / "map.png"
    images.write_png(path, images.class_map(labels, 256))
    with Image.open(path) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), images.palette(256)[labels])


@pytest.mark.parametrize("labels", [[[0, 3]], [[-1, 0]], [[0, 256]]], ids=str)  # 256 would wrap to 0
def test_class_map_refuses_labels_out_of_range(labels):
    with pytest.raises(ValueError, match="num_classes=3"):
        images.class_map(np.array(labels), 3)


def test_palette_colours_are_distinct():
    assert len({tuple(colour) for colour in images.palette(256).tolist()}) == 256
    with pytest.raises(ValueError, match="257"):
        images.palette(257)


def test_overlay_blends():
    image, labels = _random_image(), np.arange(35).reshape(7, 5) % 4
    got = np.asarray(images.overlay(image, labels, 4, alpha=0.25)).astype(float)
    want = 0.75 * image + 0.25 * images.palette(4)[labels]
    assert np.abs(got - want).max() <= 1


def test_figure_places_panels_and_legend():
    panels = [Image.fromarray(_random_image(20, 30, seed)) for seed in range(4)]
    sheet = np.asarray(images.figure([panels[:2], panels[2:]], ("left", "right"), ("a", "b")))
    for panel in panels:
        windows = np.lib.stride_tricks.sliding_window_view(sheet, (20, 30, 3))[:, :, 0]
        assert (windows == np.asarray(panel)).all((2, 3, 4)).sum() == 1
    for colour in images.palette(2):
        assert (sheet[-22:] == colour).all(-1).any()


def test_a_long_legend_goes_on_in_a_further_line():
    names, colours = [f"class {index}" for index in range(12)], np.arange(36, dtype=np.uint8).reshape(12, 3) + 90
    panels = [[Image.fromarray(_random_image(20, 100))] * 2]
    sheet = np.asarray(images.figure(panels, ("left", "right"), names, colours))
    assert sheet.shape[1] == 224 and sheet.shape[0] > 100
    assert all((sheet == colour).all(-1).sum() == 15 * 13 for colour in colours)
