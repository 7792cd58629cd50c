"""How a model changes the size of an image: the margin that it removes, and the phase at which it repeats.

Both are found by propagating shapes: the model runs on fake tensors, which have sizes and no memory. Its own tensors
are neither copied nor changed. A model whose code needs values (``.item()``) runs on zeros instead.
"""

import copy
import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain

import torch
from torch import Tensor, nn

from fastseg.io.images import first_line
from fastseg.ops.core.torch_private import VALUES_ASKED_FOR, FakeTensorMode, TorchDispatchMode

SEARCH = 512  # sizes above the asked one that are tried before a model is said to take none
SPAN = 960  # 2^6 * 3 * 5: strides that divide it are found
SPAN_ON_ZEROS = 64  # without fake tensors the pixels are computed


@dataclass(frozen=True)
class TileGeometry:
    """How a model treats square tiles: ``tile`` pixels in, the central ``tile - 2 margin`` out.

    A shift of the image by ``phase`` pixels shifts the result by as many; a smaller shift moves the pooling windows.
    """

    tile: int
    margin: int
    phase: int
    num_classes: int
    probe: "SizeProbe" = field(repr=False, compare=False)


def tile_geometry(model: nn.Module, tile: int, channels: int, dims: int = 2) -> TileGeometry:
    """Find margin and phase of a model from the sizes of its maps.

    A size is valid if the model runs and removes no more than it must, which is the least difference of input and
    output over one period of sizes. So a net that floors odd sizes is held to the sizes that it does not floor.

    Args:
        model: (1, channels, H, W) -> (1, K, H - 2 margin, W - 2 margin), in eval mode.
        tile: side of the square that the model is given, in pixels.
        channels: of the image.
        dims: 2 for images, 3 for volumes, whose tiles are cubes.

    Raises:
        ValueError: the model cannot take tiles of this size (the nearest valid sizes are named), or is of another kind.
        TypeError: it does not return one tensor of logits.
    """
    probe = SizeProbe(model, channels, dims)
    anchor = next((side for side in range(tile, tile + SEARCH) if probe.output(*[side] * dims)), None)
    if anchor is None:
        raise ValueError(
            f"overlap_tile: the model takes no tile of {tile} to {tile + SEARCH - 1} pixels with {channels} channels: "
            f"{probe.why[(tile,) * dims]}"
        )
    phase = probe.phase(anchor)
    lost = _lost(probe, anchor)
    if lost > 0:
        lost = min(_lost(probe, side) for side in range(anchor, anchor + phase) if probe.output(*[side] * dims))
    if lost < 0 or lost % 2:
        raise ValueError(
            f"overlap_tile: the model makes {anchor - lost} pixels of {anchor}; tiles need an output that is smaller "
            "by equal margins, or of the same size"
        )

    def valid(side: int) -> bool:
        return side - lost >= phase and probe.output(*[side] * dims) == (side - lost,) * dims

    if not valid(tile):
        least = max(tile + 1, lost + phase)
        nearest = chain(range(tile - 1, max(0, tile - 1 - phase), -1)), range(least, least + max(SEARCH, phase))
        found = [side for side in (next(filter(valid, sides), None) for sides in nearest) if side is not None]
        raise ValueError(
            f"overlap_tile: the model cannot take tiles of {tile} pixels (margin {lost // 2}, phase {phase}); "
            f"the nearest valid sizes: {', '.join(map(str, found)) or 'none'}"
        )
    return TileGeometry(tile, lost // 2, phase, probe.num_classes, probe)


def _lost(probe: "SizeProbe", side: int) -> int:
    sides = probe.output(*[side] * probe.dims)
    if len(set(sides)) > 1:
        made, given = (" x ".join(map(str, s)) for s in (sides, [side] * probe.dims))
        raise ValueError(f"overlap_tile: the model makes {made} pixels of {given}; it must be even")
    return side - sides[0]


class SizeProbe:
    """The size of the output for any size of the input, and the strides in between.

    Args:
        model: as in ``tile_geometry``.
        channels: of the image.
        dims: 2 for images, 3 for volumes.
    """

    def __init__(self, model: nn.Module, channels: int, dims: int = 2):
        self.channels, self.dims, self.num_classes = channels, dims, 0
        self.why: dict[tuple[int, ...], str] = {}
        self.device, self.dtype = placement(model)
        self._original = self._model = model
        self._mode: FakeTensorMode | None = None
        self._known: dict[tuple[int, ...], tuple[int, ...] | None] = {}
        try:  # a copy that has fake tensors where the model has its own
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            tensors = {id(t): mode.from_tensor(t) for t in chain(model.parameters(), model.buffers())}
            self._model, self._mode = copy.deepcopy(model, tensors), mode
        except Exception:  # whatever a model may hold that cannot be copied
            return

    def output(self, *size: int) -> tuple[int, ...] | None:
        """The sides of the logits for a map of these sides; None if the model fails at them, and ``why`` says so."""
        if size not in self._known:
            try:
                self._known[size] = self._run(size)
            except TypeError:
                raise
            except Exception as error:  # models may raise anything for a size
                self._known[size], self.why[size] = None, first_line(error)
        return self._known[size]

    def phase(self, side: int) -> int:
        """The least common multiple of all strides, from the square maps of two images that differ by ``SPAN``.

        Both images are larger than ``side``, at which deep maps may be as small as pooled ones.
        """
        span = SPAN if self._mode else SPAN_ON_ZEROS
        pair = []
        for size in (side + span, side + 2 * span):
            sides = (size,) * self.dims
            if self.output(*sides) is None:
                raise ValueError(
                    f"overlap_tile: the model takes {side} pixels, not {size}: {self.why[sides]}; no phase found"
                )
            recorder = _Recorder(self.dims)
            self._run(sides, recorder)
            pair.append([size for k, size in enumerate(recorder.sizes) if k == 0 or size != recorder.sizes[k - 1]])
        if len(pair[0]) != len(pair[1]):
            raise ValueError(
                f"overlap_tile: the model takes other steps at {side + 2 * span} pixels than at {side + span}"
            )
        strides = [Fraction(span, large - small) for small, large in zip(*pair, strict=True) if large > small]
        return math.lcm(*(stride.numerator for stride in strides if stride >= 1))

    def _run(self, sides: tuple[int, ...], recorder: "_Recorder | None" = None) -> tuple[int, ...]:
        options = {"size": (1, self.channels, *sides), "device": self.device, "dtype": self.dtype}
        watch = recorder or nullcontext()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self._mode:
                try:
                    with self._mode, watch:
                        return self._size(self._model(torch.empty(**options)))
                except VALUES_ASKED_FOR:
                    self._model, self._mode = self._original, None
            with watch:
                return self._size(self._model(torch.zeros(**options)))

    def _size(self, logits: Tensor) -> tuple[int, ...]:
        if not isinstance(logits, Tensor) or logits.dim() != self.dims + 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            wanted = "(N, K, H, W)" if self.dims == 2 else "(N, K, D, H, W)"
            raise TypeError(f"overlap_tile: the model returns {got}; it must return logits {wanted}")
        self.num_classes = logits.shape[1]
        return tuple(logits.shape[2:])


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model's first floating-point tensor; without any, the CPU and float32."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


class _Recorder(TorchDispatchMode):
    """Record the side of every square map, or cube, that any op returns, in order."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() == self.dims + 2 and len(set(tensor.shape[2:])) == 1:
                self.sizes.append(tensor.shape[2])
        return out
