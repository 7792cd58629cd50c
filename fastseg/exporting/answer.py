"""The whole answer as a module: preprocessing, network, final resize, and classes."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg.exporting.preprocessing import Preprocessing
from fastseg.inference.classes import is_ours
from fastseg.io.files import first_line
from fastseg.ops.logits import logits_of

Output = Literal["logits", "classes", "confidence"]
OUTPUTS: tuple[str, ...] = get_args(Output)
NAMES = {"logits": ("logits",), "classes": ("classes",), "confidence": ("classes", "confidence")}
AXES = ("batch", "height", "width")
BYTE = 256  # classes that uint8 can tell apart


class Answer(nn.Module):
    """What an exported file computes, in torch's own ops.

    Args:
        model: as for ``fastseg.predict``.
        output: "logits" (N, C, H, W); "classes" (N, H, W), uint8 up to 256 classes, else int32; "confidence": these,
            and the probability of each pixel's class (N, H, W), float32.
        preprocessing: computed here where its ``apply`` is True.
        example: (N, C, H, W), as the model takes it.

    Attributes:
        channels: of the logits.
        classes: 2 for one channel, which is class 1 where it is above 0, else ``channels``.

    Raises:
        TypeError: the model returns no logits (N, C, h, w).
        ValueError: the model fails on the example, or pictures are to be resized, and the model leaves a margin out.
    """

    def __init__(self, model: nn.Module, output: str, preprocessing: Preprocessing | None, example: Tensor):
        super().__init__()
        self.model, self.output = model, output
        self.preprocessing = preprocessing if preprocessing is not None and preprocessing.apply else None
        try:
            logits = self._logits(example)
        except RuntimeError as error:
            shape = tuple(example.shape)
            raise ValueError(
                f"export: {type(model).__name__} fails on the example {shape}: {first_line(error)}"
            ) from error
        # The net without padding leaves a margin out; every other answer is as large as the picture.
        self.resize = logits.shape[2:] != example.shape[2:] and not is_ours(model)
        if self.preprocessing is not None and self.preprocessing.size is not None:
            if getattr(model, "margin", 0):
                raise ValueError(f"export: {type(model).__name__} leaves a margin out; leave the size out")
            self.resize = True
        self.channels = int(logits.shape[1])
        self.classes = max(2, self.channels)
        self.integer = torch.uint8 if self.classes <= BYTE else torch.int32

    def _logits(self, x: Tensor) -> Tensor:
        logits = logits_of(self.model(x))
        if logits is None:
            raise TypeError(f"export: {type(self.model).__name__} returns no logits (N, classes, H, W); wrap it")
        return logits

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        size = x.shape[2:]
        if self.preprocessing is not None:
            size = x.shape[1:3]
            x = self.preprocessing.normalise(x.permute(0, 3, 1, 2).float())
        logits = self._logits(x)
        if self.resize:
            logits = F.interpolate(logits, size, mode="bilinear")
        if self.output == "logits":
            return logits
        if self.channels == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        classes = logits.argmax(1).to(self.integer)
        if self.output == "classes":
            return classes
        return classes, logits.float().softmax(1).amax(1)

    @property
    def axes(self) -> dict[str, int]:
        """The place of batch, height and width in the input."""
        return dict(zip(AXES, (0, 2, 3) if self.preprocessing is None else (0, 1, 2), strict=True))

    def input_like(self, x: Tensor) -> Tensor:
        """An input of the file for (N, C, H, W): itself, or random pixels of its size."""
        if self.preprocessing is None:
            return x
        N, C, H, W = x.shape
        return torch.randint(0, 256, (N, H, W, C), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).to(
            x.device
        )
