"""Transforms of a picture and its label on the way into a batch; all randomness comes from the given generator."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastseg.io.images import MEAN

PADDING = tuple(round(255 * value) for value in MEAN)  # the colour that normalisation turns into 0


def resized(image: np.ndarray, label: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Picture (H, W, 3) and label (H, W) at ``size`` (height, width): bilinear, and nearest neighbour."""
    if size == label.shape:
        return image, label
    box = (size[1], size[0])
    picture = Image.fromarray(image).resize(box, Image.Resampling.BILINEAR)
    return np.asarray(picture), np.asarray(Image.fromarray(label).resize(box, Image.Resampling.NEAREST))


@dataclass(frozen=True)
class Augment:
    """Scale, crop and flip a picture and its label alike.

    Attributes:
        size: height and width to which every picture is resized first; None keeps its size.
        scale: least and largest random factor, log-uniform; (1, 1) keeps the size.
        crop: height and width of the random window, padded beyond the picture; None means the whole picture.
        flip: True to mirror half of the pictures, left to right.
        void: label value of padding.
    """

    size: tuple[int, int] | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] | None = None
    flip: bool = True
    void: int = 255

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Transform a picture (H, W, 3) uint8 and a label (H, W) uint8."""
        if self.size is not None:
            image, label = resized(image, label, self.size)
        if self.scale != (1.0, 1.0):
            factor = math.exp(rng.uniform(*map(math.log, self.scale)))
            image, label = resized(image, label, tuple(max(1, round(side * factor)) for side in label.shape))
        if self.crop is not None:
            image, label = self._crop(image, label, rng)
        if self.flip and rng.random() < 0.5:
            image, label = image[:, ::-1], label[:, ::-1]
        return np.ascontiguousarray(image), np.ascontiguousarray(label)

    def _crop(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        window = np.empty((*self.crop, 3), np.uint8)
        window[:] = PADDING
        classes = np.full(self.crop, self.void, np.uint8)
        source, target = [], []
        for side, crop in zip(label.shape, self.crop, strict=True):
            first = int(rng.integers(min(0, side - crop), max(0, side - crop) + 1))  # below 0: padding comes first
            source.append(slice(max(0, first), min(side, first + crop)))
            target.append(slice(max(0, -first), max(0, -first) + source[-1].stop - source[-1].start))
        window[tuple(target)], classes[tuple(target)] = image[tuple(source)], label[tuple(source)]
        return window, classes
