"""Deep supervision for any net: auxiliary heads at chosen depths, trained and then left out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.nn.loss import criterion
from fastseg.nn.modes import evaluating

SIDE = 64  # pixels per side of the image that is traced through the net; enough to tell depths 0 to 5 apart


class DeepSupervision(nn.Module):
    """``model`` with an auxiliary head, a 1x1 convolution, at each depth of ``at``.

    In training, the heads' class scores are upsampled to the size of the label (bilinear, ``align_corners=False``), and
    their losses are added to the model's. In evaluation the heads are not computed: everything is the model's own. The
    model is ``self.model``; save that one. UNet++ has heads of its own, ``deep_supervision=True``.

    Args:
        model: a net of this package, or one with its ``loss`` and ``predict``.
        at: one entry per head: the dotted name of a submodule whose output is supervised, such as "backbone.layer3", or
            an integer i for the last map of stride 2^i before the logits (in the decoder, if there is one).
        weights: factors of the heads' losses, or one for all; that of the model's own loss is 1.
        in_channels: channels of the image; None means those of the model's first convolution.

    Attributes:
        at: the names.
        supervised: the number of losses, that of the model included.

    Raises:
        ValueError: there is no such submodule or depth, it returns no map (N, C, h, w) or is not called, there is not
            one weight per head, or the model's logits leave out a margin.

    Reference: Lee et al., Deeply-supervised nets, arXiv:1409.5185.

    Example:
        >>> from fastseg.models import create
        >>> model = DeepSupervision(create("unet", 3, padding="same", norm=True, widths=(8, 8, 8)), at=[1, 2])
        >>> image, target = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
        >>> model.loss(image, target, weights=[0.5, 0.25, 1.0]).backward()
        >>> model.eval()(image).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        model: nn.Module,
        at: Sequence[str | int],
        weights: float | Sequence[float] = 0.5,
        *,
        in_channels: int | None = None,
    ):
        super().__init__()
        if isinstance(at, (str, int)) or not at:
            raise ValueError(f"DeepSupervision: at is {at!r}; give a list of names of submodules, or of depths")
        if getattr(model, "margin", 0):
            raise ValueError(
                f'DeepSupervision: {type(model).__name__} leaves a margin out; build it with padding="same"'
            )
        factors = [float(weights)] * len(at) if isinstance(weights, (int, float)) else [float(w) for w in weights]
        if len(factors) != len(at):
            raise ValueError(f"DeepSupervision: weights are {tuple(weights)}; give {len(at)}, one for each of at")
        names, channels, num_classes = _followed(model, at, in_channels)
        self.at, self.weights = tuple(names), (*factors, 1.0)
        self.model = model
        like = next(model.parameters())
        self.heads = nn.ModuleList(nn.Conv2d(C, num_classes, 1, device=like.device, dtype=like.dtype) for C in channels)

    @property
    def supervised(self) -> int:
        return len(self.weights)

    def forward(self, x: Tensor) -> Tensor | list:
        """(N, in_channels, H, W) -> the model's output; in training a list of the heads' logits (N, C, H, W) and it."""
        if not self.training:
            return self.model(x)
        with self._watched() as maps:
            y = self.model(x)
        resized = lambda scores: F.interpolate(scores, x.shape[-2:], mode="bilinear", align_corners=False)
        return [*map(resized, self._scores(maps)), y]

    def logits(self, x: Tensor) -> Tensor:
        """The model's logits."""
        return self.model.logits(x)

    def predict(self, x: Tensor, *, confidence: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The model's class map; with ``confidence`` its probabilities too."""
        return self.model.predict(x, confidence=True) if confidence else self.model.predict(x)

    def loss(self, x: Tensor, target: Tensor, weights: Sequence[float] | None = None, **options: Any) -> Tensor:
        """The model's loss, in training with those of the heads.

        Args:
            x: (N, in_channels, H, W).
            target: class indices (N, H, W).
            weights: factors of the losses, first the heads' in the order of ``at``, then the model's; None means those
                of the constructor. ``fading_weights`` computes factors that fade out.
            options: those of ``SegmentationNet.loss``, such as ``ignore_index=255`` or ``terms``.

        Raises:
            ValueError: there is not one weight per loss.
        """
        weights = self.weights if weights is None else weights
        if len(weights) != len(self.weights):
            raise ValueError(
                f"DeepSupervision.loss: weights are {tuple(weights)}; give {len(self.weights)}, one a loss"
            )
        if not self.training:
            return self.model.loss(x, target, **options)
        with self._watched() as maps:
            total = weights[-1] * self.model.loss(x, target, **options)
        if options.get("terms") is not None:
            heads = criterion(**options, head_weights=weights[:-1])
            return total + heads(list(self._scores(maps)), target)
        for weight, scores in zip(weights, self._scores(maps), strict=False):
            total = total + weight * criterion(**options)(scores, target)
        return total

    def extra_repr(self) -> str:
        return f"at={self.at}, weights={self.weights}"

    def _scores(self, maps: Mapping[str, Tensor]) -> Iterator[Tensor]:
        return (head(maps[name]) for name, head in zip(self.at, self.heads, strict=True))

    @contextmanager
    def _watched(self) -> Iterator[dict[str, Tensor]]:
        """The outputs of ``at``, filled in while the block runs; no hook stays."""
        with _outputs({name: self.model.get_submodule(name) for name in self.at}) as found:
            yield found


@contextmanager
def _outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Map names to the last outputs of their modules, in the order in which these return."""
    found: dict[str, Tensor] = {}

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            found.pop(name, None)
            found[name] = output

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(note(name))
            stack.callback(handle.remove)
        yield found


def _followed(model: nn.Module, at: Sequence[str | int], in_channels: int | None) -> tuple[list[str], list[int], int]:
    """The names and widths of the maps that ``at`` means, and the number of classes, found by two small runs."""
    name, modules = type(model).__name__, {key: module for key, module in model.named_modules() if key}
    missing = [key for key in at if not isinstance(key, int) and key not in modules]
    if missing:
        children = ", ".join(key for key, _ in model.named_children())
        raise ValueError(f"DeepSupervision: {name} has no submodule {missing[0]!r}; its children are {children}")
    if in_channels is None:
        in_channels = next(module.in_channels for module in modules.values() if isinstance(module, nn.Conv2d))
    like = next(model.parameters())
    x = torch.zeros(1, in_channels, SIDE, SIDE, device=like.device, dtype=like.dtype)
    with evaluating(model), torch.no_grad():
        with _outputs(modules) as every:
            logits = model.logits(x)
        is_map = lambda y: isinstance(y, Tensor) and y.dim() == 4 and y is not logits
        depths: dict[int, str] = {}
        for key, y in every.items():
            if is_map(y) and 1 < y.shape[2] == y.shape[3]:
                i = round(math.log2(SIDE / y.shape[2]))
                if i >= 0 and abs(y.shape[2] - SIDE / 2**i) <= 1:  # a pooling in ceil mode may add a pixel
                    depths[i] = key
        absent = [i for i in at if isinstance(i, int) and i not in depths]
        if absent:
            raise ValueError(f"DeepSupervision: {name} has no map at depth {absent[0]}; it has {sorted(depths)}")
        names = [depths[i] if isinstance(i, int) else i for i in at]
        with _outputs({key: modules[key] for key in names}) as maps:
            logits = model.logits(x)
    for key in names:
        if key not in maps:
            raise ValueError(f"DeepSupervision: {name} does not call {key!r}; name what is inside of it, or around it")
        if not is_map(maps[key]):
            raise ValueError(f"DeepSupervision: {key!r} of {name} gives no map (N, C, h, w)")
    return names, [maps[key].shape[1] for key in names], logits.shape[1]
