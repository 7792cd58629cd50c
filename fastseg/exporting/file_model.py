"""An exported file as a model: ``FILE.onnx`` by onnxruntime, ``FILE.pt2`` by AOTInductor."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseg import ops
from fastseg.exporting.answer import NAMES
from fastseg.exporting.onnx_file import open_onnx
from fastseg.exporting.package_file import open_package
from fastseg.exporting.preprocessing import Preprocessing
from fastseg.inference.classes import device_of
from fastseg.io.files import open_regular
from fastseg.io.images import MEAN, STD


class FileModel(nn.Module):
    """The file's network behind fastseg's normalisation; its own, where the file records one, replaces that.

    A recorded size that the file does not apply is applied here. Without metadata, as of other exporters, one output
    (N, C, H, W) of floating point is logits, and one (N, H, W) of integers is classes. Results are where the input is.

    Args:
        path: ends in ``.onnx`` or ``.pt2``.

    Attributes:
        output: "logits", "classes" or "confidence".
        classes: their names as recorded, or None.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: the file cannot be read, or its answers are of another kind.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        with open_regular(self.path):
            pass
        if self.path.suffix == ".onnx":
            self._run, words, kinds = open_onnx(self.path)
        else:
            self._run, words = open_package(self.path)
            kinds = ()
        facts = _facts(words)
        self.output = facts["output"] if facts.get("output") in NAMES else _output_of(kinds, self.path)
        names = facts.get("classes")
        self.classes = [str(name) for name in names] if isinstance(names, list) else None
        recorded = facts.get("preprocessing")
        try:
            self.preprocessing = Preprocessing.of(recorded) if isinstance(recorded, Mapping) else None
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        self.register_buffer("place", torch.zeros(()), persistent=False)  # where the caller keeps the model

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), normalised as ``fastseg.io.images.normalised`` does -> logits (N, classes, H, W).

        Raises:
            ValueError: the file gives classes alone, or does not take such an input.
        """
        if self.output != "logits":
            raise ValueError(f"{self.path}: gives {self.output}, no logits; export it with output='logits'")
        logits = self.run(x)[0]
        return logits if self._size is None else F.interpolate(logits, x.shape[2:], mode="bilinear")

    def predict(self, x: Tensor, *, confidence: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Class map (N, H, W) of an input as ``forward`` takes it; with ``confidence`` probabilities too.

        Raises:
            ValueError: the file gives no confidence, or does not take such an input.
        """
        if self.output == "logits":
            logits = self(x)
            if logits.shape[1] == 1:
                logits = torch.cat([torch.zeros_like(logits), logits], 1)
            return ops.upsample_argmax(logits, (x.shape[2], x.shape[3]), confidence=confidence)
        if confidence and self.output != "confidence":
            raise ValueError(f"{self.path}: gives {self.output} alone; export it with output='confidence'")
        answers = self.run(x)
        if self._size is not None:
            resize = lambda y: F.interpolate(y[:, None].float(), x.shape[2:], mode="nearest-exact")[:, 0].to(y.dtype)
            answers = tuple(resize(y) for y in answers)
        return (answers[0], answers[1]) if confidence else answers[0]

    @property
    def _size(self) -> tuple[int, int] | None:
        """The size to which the picture is brought here."""
        return None if self.preprocessing is None or self.preprocessing.apply else self.preprocessing.size

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        """All outputs of the file, for an input as ``forward`` takes it."""
        if self.preprocessing is not None:
            mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (MEAN, STD))
            pixels = (x * std + mean) * 255
            if self.preprocessing.apply:
                x = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
            else:
                x = self.preprocessing.normalise(pixels)
        return self._run(x)

    def __deepcopy__(self, memo: dict) -> "FileModel":
        return FileModel(self.path).to(device_of(self)).train(self.training)

    def __reduce__(self):
        return FileModel, (self.path,)

    def extra_repr(self) -> str:
        return f"{self.path}, output={self.output}"


def _facts(words: Mapping[str, str]) -> dict[str, object]:
    """The metadata that are JSON; others are not ours."""
    facts = {}
    for name, text in words.items():
        try:
            facts[name] = json.loads(text)
        except (ValueError, RecursionError):
            continue
    return facts


def _output_of(kinds: tuple[str, ...], path: Path) -> str:
    """What a file without our metadata gives, by the kinds of its outputs."""
    if not kinds or (kinds[0].startswith("tensor(float") and kinds[0].endswith("4")):
        return "logits"
    if "int" in kinds[0] and kinds[0].endswith("3"):
        return "classes"
    raise ValueError(f"{path}: gives {', '.join(kinds)}; neither logits (N, C, H, W) nor classes (N, H, W)")
