"""Texture mosaics: pictures composed of real photographs, with a label map that is exact by construction.

The photographs are four from scikit-image's wheel, each in the public domain (CC0): brick, grass, gravel and a retina.
The left and right halves of a photograph never mix, so a net trained on mosaics of one half is tested on pixels that it
has not seen. All four have the same mean and contrast: only texture tells them apart.
"""

import importlib.util
from pathlib import Path

import numpy as np

from fastseg.io.images import read_image

# File, and the square of 512 x 512 pixels that is used (row, column); the retina's is around the fovea.
PHOTOGRAPHS = {
    "brick": ("brick.png", (0, 0)),
    "grass": ("grass.png", (0, 0)),
    "gravel": ("gravel.png", (0, 0)),
    "retina": ("retina.jpg", (450, 450)),
}
CLASSES = tuple(PHOTOGRAPHS)
SIDE = 512


def load_photographs() -> dict[str, np.ndarray]:
    """Load the photographs, (512, 512) float32 each, with mean 0 and deviation 1. Reads files only; never downloads.

    Raises:
        ValueError: scikit-image is not installed, or lacks the files.
    """
    spec = importlib.util.find_spec("skimage")  # found, not imported: importing it sets up its downloader
    if spec is None or spec.origin is None:
        raise ValueError("the photographs are in scikit-image's wheel: pip install scikit-image")
    folder = Path(spec.origin).parent / "data"
    photographs = {}
    for name, (file, (row, column)) in PHOTOGRAPHS.items():
        square = read_image(folder / file)[row : row + SIDE, column : column + SIDE].mean(2, dtype=np.float32)
        photographs[name] = (square - square.mean()) / square.std()
    return photographs


def halves(photographs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The left halves, for training, and the right halves, for testing."""
    train = {name: photo[:, : photo.shape[1] // 2] for name, photo in photographs.items()}
    test = {name: photo[:, photo.shape[1] // 2 :] for name, photo in photographs.items()}
    return train, test


def regions(side: int, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """A random label map, (side, side) int64: Voronoi cells with wavy borders, each of a random class."""
    count = int(rng.integers(num_classes, num_classes + 2))
    seeds = rng.uniform(0, side, (count, 2))
    classes = rng.permutation(num_classes)[np.arange(count) % num_classes]  # each class gets a cell
    axis = np.arange(side)
    waves = rng.uniform(0.02, 0.08, 2), rng.uniform(0, 2 * np.pi, 2)  # radians a pixel; phase
    rows, columns = np.meshgrid(axis, axis, indexing="ij")
    rows, columns = (
        rows + 6 * np.sin(waves[0][0] * columns + waves[1][0]),
        columns + 6 * np.sin(waves[0][1] * rows + waves[1][1]),
    )
    distance = (rows[..., None] - seeds[:, 0]) ** 2 + (columns[..., None] - seeds[:, 1]) ** 2
    return classes[distance.argmin(-1)]


def mosaic(textures: dict[str, np.ndarray], side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One mosaic: each class shows a random window of its photograph, mirrored or not, with random light.

    Args:
        textures: class name -> (H, W) float32 of mean 0 and deviation 1, both at least ``side``.
        side: height and width in pixels.
        rng: source of all randomness.

    Returns:
        The picture, (side, side, 3) uint8 (grey), and its labels, (side, side) int64.
    """
    labels = regions(side, len(textures), rng)
    picture = np.empty((side, side), np.float32)
    for index, texture in enumerate(textures.values()):
        row, column = (int(rng.integers(0, size - side + 1)) for size in texture.shape)
        window = texture[row : row + side, column : column + side]
        window = window[:, ::-1] if rng.random() < 0.5 else window
        light, contrast = rng.normal(128, 12), rng.uniform(35, 55)
        picture = np.where(labels == index, light + contrast * window, picture)
    grey = picture.clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, 2), labels


def mosaics(
    textures: dict[str, np.ndarray], count: int, side: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` mosaics: pictures, (count, side, side, 3) uint8, and labels, (count, side, side) int64."""
    pictures, labels = zip(*(mosaic(textures, side, rng) for _ in range(count)), strict=True)
    return np.stack(pictures), np.stack(labels)
