"""Batch inference as one picklable callable, for a DataLoader, Ray Data, or a service."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastseg.inference.segment import segment
from fastseg.io.checkpoint import load_checkpoint


class Predictor:
    """Class maps of a batch of pictures: a dictionary of arrays in, a dictionary of arrays out.

    It can be pickled. Weights given by a path are read at the first call.

    Args:
        model: a model, or the path of a checkpoint.
        device: None means a GPU if there is one at the first call.
        column: key of the pictures, (N, H, W, 3) uint8, or N pictures of several sizes in an object array.
        result: key of the class maps, (N, H, W), or N of them; other columns are passed on, the pictures are not.

    Example:
        >>> ray.data.read_images(folder).map_batches(Predictor("best.pt"), batch_size=4)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        *,
        device: str | None = None,
        column: str = "image",
        result: str = "classes",
    ):
        self.path = None if isinstance(model, nn.Module) else Path(model)
        self.model = model.eval() if isinstance(model, nn.Module) else None
        self.device, self.column, self.result = device, column, result

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Segment the pictures of ``batch``.

        Raises:
            ValueError: the batch has no such pictures, or the weights cannot be read.
        """
        if self.column not in batch:
            raise ValueError(f"Predictor: the batch has {', '.join(batch)}, and no {self.column!r}")
        pictures = [np.asarray(picture) for picture in batch[self.column]]
        for picture in pictures:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(f"Predictor: a picture is {picture.shape} {picture.dtype}; give (H, W, 3) uint8")
        model = self._ready()
        others = {name: value for name, value in batch.items() if name != self.column}
        if len({picture.shape for picture in pictures}) == 1:
            return others | {self.result: segment(model, np.stack(pictures))}
        maps = np.empty(len(pictures), object)
        for i, picture in enumerate(pictures):
            maps[i] = segment(model, picture[None])[0]
        return others | {self.result: maps}

    def _ready(self) -> nn.Module:
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.model is None:
            self.model = load_checkpoint(self.path)[0]
        self.model = self.model.to(device)
        return self.model

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        if self.path is not None:
            state["model"] = None
        return state
