"""Tiles: exactly the whole image for valid nets, known sums for blended ones, memory of a tile, and clear errors."""

import itertools

import numpy as np
import pytest
import torch
from live_bytes import peak
from torch import Tensor, nn
from torch.nn import functional as F

import fastseg
from fastseg.inference import overlap_tile, stitching
from fastseg.inference.tile_plan import plan_tiles
from fastseg.inference.tile_probe import tile_geometry
from fastseg.inference.tiling import run_tiles
from fastseg.models import create


class UNet(nn.Module):
    """U-Net, valid (``padding=0``) or padded. Pooling raises on an odd side, or with ``floors`` drops a pixel."""

    def __init__(self, widths: tuple[int, ...], padding: int = 0, floors: bool = False):
        super().__init__()
        self.floors = floors
        self.down, self.up, self.mix = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for before, width in itertools.pairwise((2, *widths)):
            self.down.append(_convs(before, width, padding))
        for deep, width in itertools.pairwise(widths[::-1]):
            self.up.append(nn.ConvTranspose2d(deep, width, 2, 2))
            self.mix.append(_convs(2 * width, width, padding))
        self.head = nn.Conv2d(widths[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.down[0](x)]
        for stage in self.down[1:]:
            if not self.floors and (maps[-1].shape[2] % 2 or maps[-1].shape[3] % 2):
                raise ValueError(f"odd: {tuple(maps[-1].shape)}")
            maps.append(stage(F.max_pool2d(maps[-1], 2)))
        x = maps.pop()
        for up, mix in zip(self.up, self.mix, strict=True):
            x, skip = up(x), maps.pop()
            top, left = ((a - b) // 2 for a, b in zip(skip.shape[2:], x.shape[2:], strict=True))
            x = mix(torch.cat([skip[:, :, top : top + x.shape[2], left : left + x.shape[3]], x], 1))
        return self.head(x)


def _convs(before: int, width: int, padding: int) -> nn.Sequential:
    convs = nn.Conv2d(before, width, 3, padding=padding), nn.Conv2d(width, width, 3, padding=padding)
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU())


def _unet(widths=(4, 5, 6), **options) -> UNet:
    """Two levels: margin 20, phase 4; valid sizes are multiples of 4."""
    return UNet(widths, **options).double().eval()


def _pixelwise(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, classes, 1)).double().eval()


def _whole(model: nn.Module, image: Tensor, margin: int, phase: int, mode: str = "reflect") -> Tensor:
    """The model on the whole image, padded by numpy on all sides, and at the end to a size that the model takes."""
    height, width = image.shape[2:]
    sides = [(margin, margin + -(side + 2 * margin) % phase) for side in (height, width)]
    padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), *sides), mode=mode))
    with torch.no_grad():
        return model(padded)[:, :, :height, :width]


def _close(got, want, atol=1e-13):
    torch.testing.assert_close(torch.as_tensor(got), want, rtol=0, atol=atol)


# Nets without padding


@pytest.mark.parametrize("floors", [False, True], ids=["strict", "floors"])
@pytest.mark.parametrize(
    ("height", "width", "tile", "batch_size"),
    [
        (75, 61, 60, 1),  # odd sides, several tiles both ways
        (64, 128, 64, 4),  # multiples of the step
        (30, 97, 44, 3),  # the smallest tile that makes a step
        (7, 50, 52, 2),  # lower than the margin: mirrored more than once
        (1, 1, 60, 1),
        (2, 90, 76, 5),
        (40, 40, 1000, 1),  # one tile, of the size that is needed
    ],
)
def test_valid_net_gives_what_it_gives_of_the_whole_image(height, width, tile, batch_size, floors):
    model, image = _unet(floors=floors), torch.randn(2, 2, height, width, dtype=torch.float64)
    got = overlap_tile(model, image, tile=tile, batch_size=batch_size)
    _close(got, _whole(model, image, 20, 4))
    assert not got.requires_grad


@pytest.mark.parametrize("overlap", [4, 12])
def test_valid_net_with_blended_overlap(overlap):
    model, image = _unet(), torch.randn(1, 2, 75, 61, dtype=torch.float64)
    _close(overlap_tile(model, image, tile=60, overlap=overlap), _whole(model, image, 20, 4))


@pytest.mark.parametrize(("mode", "numpys"), [("reflect", "reflect"), ("replicate", "edge"), ("constant", "constant")])
def test_pad_modes(mode, numpys):
    model, image = _unet(), torch.randn(1, 2, 9, 70, dtype=torch.float64)
    _close(overlap_tile(model, image, tile=64, pad_mode=mode), _whole(model, image, 20, 4, numpys))


@pytest.mark.parametrize("floors", [False, True], ids=["strict", "floors"])
@pytest.mark.parametrize(
    ("depth", "margin", "tile", "wrong", "nearest"),
    [
        (1, 8, 40, 41, "40, 42"),
        (3, 44, 140, 99, "100"),  # 92 makes 4 pixels, of which tiles make no grid
        (4, 92, 572, 570, "556, 572"),  # the paper's: 572 pixels make 388
        (4, 92, 204, 20, "204"),
    ],
)
def test_margin_phase_and_valid_sizes_are_found(depth, margin, tile, wrong, nearest, floors):
    model = UNet((1,) * (depth + 1), floors=floors).eval()
    geometry = tile_geometry(model, tile, 2)
    assert (geometry.margin, geometry.phase, geometry.num_classes) == (margin, 2**depth, 3)
    message = rf"cannot take tiles of {wrong} pixels \(margin {margin}, phase {2**depth}\); .* sizes: {nearest}$"
    with pytest.raises(ValueError, match=message):
        overlap_tile(model, torch.zeros(1, 2, 9, 9), tile=wrong)


class _AsksForValues(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * (1 if x.sum().item() < 1e9 else 0)


def test_a_model_that_asks_for_values_is_probed_on_zeros():
    model, image = _AsksForValues(_unet((2, 3))).eval(), torch.randn(1, 2, 30, 41, dtype=torch.float64)
    assert tile_geometry(model, 40, 2).phase == 2
    _close(overlap_tile(model, image, tile=40), _whole(model, image, 8, 2))


def test_the_model_is_left_as_it_was():
    model = _unet()
    before = {name: (id(tensor), tensor._version, tensor.clone()) for name, tensor in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    overlap_tile(model, torch.randn(1, 2, 30, 41), tile=60)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    for name, tensor in model.state_dict().items():
        assert type(tensor) is Tensor and tensor._version == before[name][1] and torch.equal(tensor, before[name][2])


# Nets that pad


class _Ramp(nn.Module):
    """Logits that depend on where in the tile a pixel lies, so every wrong weight shows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        down, across = (torch.arange(side, dtype=x.dtype, device=x.device) for side in x.shape[2:])
        return torch.cat([x[:, :1] * down[:, None], x[:, 1:] + across], 1)


def _naive(model: nn.Module, image: Tensor, rows, columns, profile) -> Tensor:
    """Sums over the whole image, divided by the sum of the weights."""
    tall, wide = (axis.start(axis.count - 1) + axis.side for axis in (rows, columns))
    padded = torch.from_numpy(
        np.pad(image.numpy(), ((0, 0), (0, 0), (0, tall - rows.extent), (0, wide - columns.extent)), "reflect")
    )
    weight = profile(rows.side)[:, None] * profile(columns.side)
    total, weights = torch.zeros(1, 2, tall, wide, dtype=torch.float64), torch.zeros(tall, wide, dtype=torch.float64)
    for i, j in itertools.product(range(rows.count), range(columns.count)):
        top, left = rows.start(i), columns.start(j)
        place = (..., slice(top, top + rows.side), slice(left, left + columns.side))
        total[place] += weight * model(padded[place]).detach()
        weights[place] += weight
    return (total / weights)[..., : rows.extent, : columns.extent]


def _gaussian(side: int) -> Tensor:
    z = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) / (side / 8)
    return torch.exp(-z.square() / 2)


def _ones(side: int) -> Tensor:
    return torch.ones(side, dtype=torch.float64)


def _tent(side: int) -> Tensor:
    return side / 2 + 0.5 - (torch.arange(side, dtype=torch.float64) - (side - 1) / 2).abs()


def test_linear_weights_fall_as_the_next_tiles_rise():
    axis = stitching.Axis(28, 16, 0, 1, 12)
    first, second = (axis.weights(i, "linear").tolist() for i in range(2))
    assert first == pytest.approx([1.0] * 12 + [0.8, 0.6, 0.4, 0.2]) and second == pytest.approx(first[::-1])


@pytest.mark.parametrize(("blend", "profile"), [("gaussian", _gaussian), ("linear", _tent), ("constant", _ones)])
@pytest.mark.parametrize("overlap", [3, 5, 8, 11])  # of 16: the last two put three and four tiles on a pixel
@pytest.mark.parametrize("panel", [2, 100])
def test_blending_is_the_weighted_mean(blend, profile, overlap, panel, monkeypatch):
    monkeypatch.setattr(stitching, "PANEL", panel)
    model, image = _Ramp().eval(), torch.randn(1, 2, 41, 83, dtype=torch.float64)
    rows, columns = (stitching.Axis(extent, 16, 0, 1, 16 - overlap) for extent in image.shape[2:])
    got = overlap_tile(model, image, tile=16, overlap=overlap, blend=blend, batch_size=7)
    _close(got, _naive(model, image, rows, columns, profile), 1e-11)


@pytest.mark.parametrize("blend", stitching.BLENDS)
def test_a_pixelwise_model_gives_the_whole_image(blend):
    model, image = _pixelwise(), torch.randn(2, 2, 50, 37, dtype=torch.float64)
    want = model(image).detach()
    for tile, overlap in ((16, None), (16, 0), (15, 9), (40, 7), (200, None)):
        _close(overlap_tile(model, image, tile=tile, overlap=overlap, blend=blend), want)


@pytest.mark.parametrize("panel", [2, 100])
def test_crop_gives_the_whole_image_where_the_overlap_is_twice_the_reach(panel, monkeypatch):
    monkeypatch.setattr(stitching, "PANEL", panel)
    model, image = _unet((3, 4), padding=1), torch.randn(1, 2, 78, 122, dtype=torch.float64)
    want = model(image).detach()  # the reach is 9: 2 + 2 * 2, and 2 + 1 of the way up
    got = overlap_tile(model, image, tile=40, overlap=20, blend="crop")
    _close(got, want)
    assert (overlap_tile(model, image, tile=40, overlap=4, blend="crop") - want).abs().max() > 1e-6


OPTIONS = {"deeplabv3plus": {"width": 0.1, "decoder_channels": 16}, "segnet": {"width": 0.0625}}


@pytest.mark.parametrize(("name", "phase"), [("deeplabv3plus", 16), ("segnet", 32)])
def test_models_in_tiles(name, phase):
    """An image of a tile or less is given to the model as it is; a larger one is done in several."""
    with fastseg.reference():  # the interpreter would take minutes
        model = create(name, 4, **OPTIONS[name]).eval()
        plan = plan_tiles(model, 128)
        assert (plan.geometry.margin, plan.geometry.phase, plan.overlap) == (0, phase, 32)
        image = torch.randn(1, 3, 100, 128)
        with torch.no_grad():
            want = model(image)
        torch.testing.assert_close(run_tiles(model, image, plan), want)
        image = torch.randn(1, 3, 100, 200)
        logits = run_tiles(model, image, plan, batch_size=2)
        assert torch.equal(run_tiles(model, image, plan, argmax=True), logits.argmax(1))
        with torch.no_grad():
            torch.testing.assert_close(logits[..., :64], model(image[..., :128])[..., :64])  # of the first tile alone


@pytest.mark.parametrize("size", [(70, 81), (30, 9)], ids=str)
def test_the_valid_unet_in_tiles_is_the_whole_mirrored_image(size):
    """Two levels down: margin 20, phase 4; an image of several tiles, and one shorter than the margin."""
    with fastseg.reference(), torch.no_grad():
        model = create("unet", 3, widths=(3, 4, 5)).double().eval()
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        plan = plan_tiles(model, 68)
        assert (plan.geometry.margin, plan.geometry.phase, plan.overlap) == (20, 4, 0)
        assert (model.margin, model.stride) == (20, 4)
        index = []
        for extent in size:  # reflected as often as needed, up to a side that the net takes
            pixels, period = torch.arange(-20, extent + 20 + (-extent) % 4), 2 * (extent - 1)
            index.append(torch.minimum(pixels % period, period - pixels % period))
        want = model(image[:, :, index[0]][..., index[1]])[..., : size[0], : size[1]]
        torch.testing.assert_close(run_tiles(model, image, plan, batch_size=2), want, rtol=0, atol=1e-12)


# Images, results, memory


class _Counts(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.shapes = model, []

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:  # not the probe's
            self.shapes.append(tuple(x.shape))
        return self.model(x)


def test_tiles_come_in_batches():
    model = _Counts(_unet()).eval()
    overlap_tile(model, torch.randn(1, 2, 70, 70), tile=64, batch_size=4)
    assert model.shapes == [(4, 2, 64, 64)] * 2 + [(1, 2, 64, 64)]  # 24 pixels a tile: 3 x 3


def test_arrays_of_any_kind(tmp_path):
    """(H, W, C) uint8 in a file, read-only, of the other byte order, reversed: the same as the tensor."""
    model, pixels = _unet((2, 3)), np.random.default_rng(0).integers(0, 256, (37, 45, 2), np.uint8)
    want = overlap_tile(model, torch.from_numpy(pixels).permute(2, 0, 1)[None].double(), tile=40)
    np.save(tmp_path / "pixels.npy", pixels)
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    for array in (mapped, pixels.astype(">f4"), np.ascontiguousarray(pixels[:, ::-1])[:, ::-1]):
        got = overlap_tile(model, array.transpose(2, 0, 1)[None], tile=40)
        assert isinstance(got, np.ndarray) and got.dtype == np.float64
        _close(got, want)


def test_results_into_given_memory(tmp_path):
    model, image = _unet((2, 3)), torch.randn(2, 2, 37, 45)
    logits = overlap_tile(model, image, tile=40)
    out = np.lib.format.open_memmap(tmp_path / "logits.npy", "w+", np.float32, tuple(logits.shape))
    assert overlap_tile(model, image, tile=40, out=out) is out
    out.flush()
    _close(np.load(tmp_path / "logits.npy"), logits.float())
    for classes in (torch.zeros(2, 37, 45, dtype=torch.int16), np.zeros((2, 37, 45), np.uint8)):
        assert overlap_tile(model, image, tile=40, argmax=True, out=classes) is classes
        assert (torch.as_tensor(classes) == logits.argmax(1)).all()


@pytest.mark.parametrize(("classes", "dtype"), [(256, torch.uint8), (257, torch.int64)])
def test_class_maps_are_uint8_up_to_256_classes(classes, dtype):
    model, image = _pixelwise(classes), torch.randn(1, 2, 9, 11)
    got = overlap_tile(model, image, tile=8, argmax=True)
    assert got.dtype == dtype and torch.equal(got.long(), model(image.double()).argmax(1))


def test_the_dtype_is_the_models():
    model, image = _pixelwise().bfloat16(), torch.randn(1, 2, 30, 20, dtype=torch.float64)
    got = overlap_tile(model, image, tile=16)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, model(image.bfloat16()).detach())
    assert overlap_tile(model, image.numpy(), tile=16).dtype == np.float32


def _peak(side: int, padding: int, folder, **options) -> int:
    """Bytes held while a picture of side x 2 side pixels is read from a file, and its class map written to another."""
    model = _unet((2, 3), padding=padding).float()
    plan = plan_tiles(model, 64, channels=2)
    pixels = np.lib.format.open_memmap(folder / "pixels.npy", "w+", np.uint8, (side, 2 * side, 2))
    options = {"out": np.lib.format.open_memmap(folder / "out.npy", "w+", np.uint8, (1, side, 2 * side))} | options
    with peak() as counted:
        run_tiles(model, pixels.transpose(2, 0, 1)[None], plan, argmax=True, **options)
    return counted.bytes


@pytest.mark.parametrize("padding", [0, 1], ids=["valid", "blended"])
def test_memory_is_that_of_the_tile(padding, tmp_path, monkeypatch):
    monkeypatch.setattr(stitching, "PANEL", 2)
    small, large = (_peak(side, padding, tmp_path) for side in (128, 256))
    assert small > 4 * 3 * 64 * 64 * 2  # the largest maps of a tile, twice
    assert large < small + 20_000  # of four times the pixels
    assert _peak(256, padding, tmp_path, out=None) > large + 2 * 256 * 256 - 30_000  # a whole class map is seen
    if padding:
        monkeypatch.setattr(stitching, "PANEL", 100)
        assert _peak(256, padding, tmp_path) > large + 20_000  # rows that are shared, as wide as the image


# What a user can get wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile is 0; give pixels, an integer of at least 1"),
        ({"tile": 60.0}, "tile is 60.0"),
        ({"overlap": -1}, "overlap is -1"),
        ({"overlap": 17}, "overlap is 17; tiles of 60 pixels with margin 20 and phase 4 overlap by at most 16"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"pad_mode": "circular"}, "pad_mode is 'circular'; use one of reflect, replicate, constant"),
        ({"blend": "mean"}, "blend is 'mean'; use one of gaussian, linear, constant, crop"),
        ({"image": torch.zeros(2, 9, 9)}, r"image is \(2, 9, 9\); give \(N, C, H, W\)"),
        ({"image": torch.zeros(1, 2, 0, 9)}, r"image is \(1, 2, 0, 9\)"),
        (
            {"image": torch.zeros(1, 5, 9, 9)},
            "the model takes no tile of 60 to 571 pixels with 5 channels: .* 5, 60, 60",
        ),
        ({"out": torch.zeros(1, 3, 9, 8)}, r"out is \(1, 3, 9, 8\); the result is \(1, 3, 9, 9\)"),
        ({"out": torch.zeros(1, 3, 9, 9, dtype=torch.uint8)}, "out is of torch.uint8; the result is of floating point"),
        ({"out": np.zeros((1, 9, 9)), "argmax": True}, "out is of float64; the result is of integers up to 2"),
    ],
)
def test_errors_say_what_to_do(options, message):
    arguments = {"image": torch.zeros(1, 2, 9, 9), "tile": 60} | options
    with pytest.raises(ValueError, match=f"overlap_tile: {message}"):
        overlap_tile(_unet((1, 1, 1)), arguments.pop("image"), **arguments)


def test_wrong_kinds():
    with pytest.raises(TypeError, match="image is a list"):
        overlap_tile(_unet(), [[1]], tile=60)
    with pytest.raises(TypeError, match="out is a list"):
        overlap_tile(_unet(), torch.zeros(1, 2, 9, 9), tile=60, out=[])
    with pytest.raises(TypeError, match=r"the model returns \(1, 162\)"):
        overlap_tile(nn.Flatten().eval(), torch.zeros(1, 2, 9, 9), tile=9)
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        overlap_tile(_unet().train(), torch.zeros(1, 2, 9, 9), tile=60)
    with pytest.raises(ValueError, match="makes 80 pixels of 40"):
        overlap_tile(nn.Upsample(scale_factor=2).eval(), torch.zeros(1, 2, 9, 9), tile=40)


def test_progress_is_shown_when_asked_for(capsys):
    overlap_tile(_pixelwise(), torch.zeros(1, 2, 30, 30), tile=16)
    assert capsys.readouterr().err == ""
    overlap_tile(_pixelwise(), torch.zeros(1, 2, 30, 30), tile=16, progress=True)
    assert "tiles: " in capsys.readouterr().err
