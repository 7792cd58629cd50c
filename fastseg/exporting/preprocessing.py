"""What happens to a picture before the network: recorded in an exported file, and computed by it on request."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseg.io.images import MEAN, STD


@dataclass(frozen=True)
class Preprocessing:
    """``(interpolate(pixels, size, mode="bilinear") / 255 - mean) / std``.

    Attributes:
        size: height and width in pixels that the network gets; None keeps the picture's.
        mean: of the channels, of pixels from 0 to 1; ImageNet's by default, as fastseg's models take it.
        std: their standard deviations.
        apply: True puts it into the graph: the file then takes pictures (N, H, W, C), uint8, as decoders give them.
            False records it alone: the file takes what the model takes.

    Raises:
        ValueError: a size is not positive, ``mean`` and ``std`` differ in length, or a deviation is 0.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    apply: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"Preprocessing: size is {self.size}; give height and width in pixels")
        if len(self.mean) != len(self.std) or not self.mean or 0 in self.std:
            raise ValueError(
                f"Preprocessing: mean is {self.mean}, std is {self.std}; give one of each a channel, and no std 0"
            )

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W), floating point, 0 to 255 -> (N, C, *size)."""
        if self.size is not None:
            pixels = F.interpolate(pixels, self.size, mode="bilinear")
        mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels / 255 - mean) / std

    def facts(self) -> dict[str, object]:
        """As plain data."""
        return {
            "size": None if self.size is None else list(self.size), "mean": list(self.mean), "std": list(self.std),
            "apply": self.apply,
        }  # fmt: skip

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Preprocessing":
        """From ``facts()``, as a file has them.

        Raises:
            ValueError: they are not those of a preprocessing.
        """
        try:
            size = facts["size"]
            height_and_width = None if size is None else (int(size[0]), int(size[1]))
            mean, std = (tuple(map(float, facts[name])) for name in ("mean", "std"))
            return cls(height_and_width, mean, std, facts["apply"] is True)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no preprocessing: {dict(facts)}") from error
