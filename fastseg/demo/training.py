"""Small models trained on texture mosaics by ``fastseg.training``, and their scores."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastseg.demo.mosaic import CLASSES, mosaic
from fastseg.inference.segment import segment
from fastseg.io.processes import Processes
from fastseg.metrics import ConfusionMatrix, Scores
from fastseg.training.checkpoints import Diverged
from fastseg.training.dataset import DatasetSpec
from fastseg.training.run import Settings
from fastseg.training.run import train as run_training

# A quarter of the width learns the four textures in 400 steps, 55 s of one core (FCN: 25 s); the full width takes
# minutes for 100. mIoU after 400 steps: over 0.9 for DeepLabV3+ and FCN. SegNet's deep, narrow encoder learns slowest:
# 0.63, and 0.74 after 1000 steps; its authors start from a VGG16 trained on ImageNet.
OPTIONS: dict[str, dict[str, Any]] = {
    "deconvnet": {"width": 0.125, "bottleneck": 5},
    "deeplabv2": {"backbone": "resnet50", "output_stride": 16, "width": 0.125, "scales": ()},
    "deeplabv3": {"backbone": "resnet18", "output_stride": 16, "width": 0.25, "channels": 32},
    "deeplabv3plus": {"width": 0.25, "decoder_channels": 32},
    "fcn": {"backbone": "resnet18", "stride": 4, "width": 0.25},
    "segformer": {"width": 0.5, "decoder_channels": 32},
    "segnet": {"width": 0.125},
    "segnet_basic": {"channels": 16},
    "unet": {"padding": "same", "norm": True, "widths": (8, 16, 32, 64)},
    "unetplusplus": {"norm": True, "up": "bilinear", "widths": (8, 16, 32), "deep_supervision": True},
    "upernet": {"backbone": "resnet18", "width": 0.25, "channels": 32},
}
STEPS, BATCH, SIDE = 400, 6, 160
LEARNING_RATE = 0.02


class Mosaics:
    """Mosaics as a data set in memory: item i is made when it is asked for, and is the same each time.

    Args:
        textures: as in ``mosaic``.
        count: of mosaics.
        side: in pixels.
        seed: numbers that decide, with the index, all that is random.
        split: its name, for messages.

    Example:
        >>> image, label = Mosaics(textures, 8, 160, (0,))[3]  # doctest: +SKIP
    """

    spec = DatasetSpec(CLASSES)

    def __init__(
        self, textures: dict[str, np.ndarray], count: int, side: int, seed: tuple[int, ...], split: str = "train"
    ):
        self.textures, self.count, self.side, self.seed, self.split = textures, count, side, seed, split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        picture, labels = mosaic(self.textures, self.side, np.random.default_rng([*self.seed, index]))
        return picture, labels.astype(np.uint8)

    def labels(self) -> Iterator[np.ndarray]:
        """The class indices of one mosaic after another."""
        return (self[index][1] for index in range(self.count))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All pictures, (count, side, side, 3) uint8, and their labels, (count, side, side) uint8."""
        pictures, labels = zip(*(self[index] for index in range(self.count)), strict=True)
        return np.stack(pictures), np.stack(labels)


def train(
    name: str,
    model: nn.Module,
    textures: dict[str, np.ndarray],
    test: Mosaics,
    steps: int,
    seed: int,
    batch: int,
    side: int,
    *,
    loss: str = "ce",
) -> None:
    """Train in place with ``fastseg.training``, no mosaic twice; the model is in eval mode afterwards.

    Args:
        name: of the model.
        model: on its device.
        textures: of the mosaics to train on.
        test: mosaics to score the trained model on.
        steps: of the optimiser: one epoch of as many batches.
        seed: of mosaics, their order and dropout.
        batch: mosaics a step.
        side: of a mosaic, in pixels.
        loss: names and factors, as ``fastseg.losses.parse_loss`` takes them.

    Raises:
        ValueError: the loss is not finite.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # no mosaic comes twice: in so short a training dropout only costs
    settings = Settings(
        name, {}, CLASSES, 1, batch, "adamw", LEARNING_RATE, weight_decay=0.01, schedule="onecycle", flip=False,
        seed=seed, loss=loss,
    )  # fmt: skip
    data = Mosaics(textures, steps * batch, side, (seed, 0))
    processes = Processes(next(model.parameters()).device)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_training(model, settings, data, test, Path(folder), processes)
        except Diverged as error:
            raise ValueError(f"{str(error).partition(';')[0]}; try another --seed") from error
    model.eval()


def predictions(model: nn.Module, pictures: np.ndarray) -> np.ndarray:
    """Class maps (N, H, W) of pictures (N, H, W, 3) uint8, eight at a time."""
    return np.concatenate([segment(model, pictures[i : i + 8]) for i in range(0, len(pictures), 8)])


def score(predicted: np.ndarray, labels: np.ndarray) -> Scores:
    """Scores of class maps against the true ones."""
    confusion = ConfusionMatrix(len(CLASSES))
    confusion.update(torch.from_numpy(predicted), torch.from_numpy(labels))
    return confusion.compute()


def score_table(scores: Scores) -> str:
    """One line a class, then the means."""
    lines = [f"{'':<8}{'IoU':>10}{'precision':>12}{'recall':>10}"]
    columns = (scores.iou.tolist(), scores.precision.tolist(), scores.recall.tolist())
    for name, iou, precision, recall in zip(CLASSES, *columns, strict=True):
        lines.append(f"{name:<8}{iou:>10.3f}{precision:>12.3f}{recall:>10.3f}")
    lines.append(f"{'mean':<8}{scores.mean_iou:>10.3f}{scores.mean_precision:>12.3f}{scores.mean_recall:>10.3f}")
    lines.append(f"mIoU {scores.mean_iou:.4f}  mPA {scores.mean_pixel_accuracy:.4f}")
    return "\n".join(lines)
