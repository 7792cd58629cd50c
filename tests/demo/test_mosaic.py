"""Texture mosaics: real photographs without a download, exact labels, and no pixel in both training and test."""

import importlib.util
import socket

import numpy as np
import pytest

from fastseg.demo import mosaic


def test_photographs_come_from_the_wheel(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *args, **options: pytest.fail("opened a connection"))
    photographs = mosaic.load_photographs()
    assert tuple(photographs) == mosaic.CLASSES
    for photo in photographs.values():
        assert photo.shape == (512, 512)
        np.testing.assert_allclose([photo.mean(), photo.std()], [0, 1], atol=1e-4)
    flat = np.stack([photo.ravel() for photo in photographs.values()])
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.2  # four different pictures


def test_photographs_need_scikit_image(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        mosaic.load_photographs()


def test_halves_are_disjoint_and_complete():
    photo = np.arange(6 * 10).reshape(6, 10)  # each pixel has its own number
    train, test = mosaic.halves({"one": photo})
    seen, held_out = set(train["one"].ravel().tolist()), set(test["one"].ravel().tolist())
    assert not seen & held_out
    assert seen | held_out == set(range(60))


def test_labels_are_exact():
    textures = {name: np.full((80, 80), value) for name, value in (("a", -2.5), ("b", 0), ("c", 2.5))}  # one grey each
    for seed in range(5):
        picture, labels = mosaic.mosaic(textures, 64, np.random.default_rng(seed))
        assert (picture == picture[..., :1]).all()
        greys = [np.unique(picture[labels == label]) for label in np.unique(labels)]
        assert all(len(grey) == 1 for grey in greys)
        assert len(np.unique(greys)) == len(greys) == 3


def test_windows_are_pieces_of_the_texture():
    texture = np.random.default_rng(0).normal(size=(40, 44)).astype(np.float32)
    picture, _ = mosaic.mosaic({"only": texture}, 32, np.random.default_rng(1))
    grey = picture[..., 0].astype(float)
    scores = [
        np.corrcoef(np.ravel(texture[row : row + 32, column : column + 32][:, ::step]), grey.ravel())[0, 1]
        for row in range(9)
        for column in range(13)
        for step in (1, -1)
    ]
    assert max(scores) > 0.98  # less than 1: grey values are clipped to 0..255


def test_regions_use_all_classes_evenly():
    rng = np.random.default_rng(0)
    share = np.mean([np.bincount(mosaic.regions(48, 4, rng).ravel(), minlength=4) / 48**2 for _ in range(100)], 0)
    np.testing.assert_allclose(share, 0.25, atol=0.05)


def test_seed_decides_everything():
    textures = {name: np.random.default_rng(i).normal(size=(48, 48)) for i, name in enumerate("ab")}
    first, again, other = (mosaic.mosaics(textures, 3, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    for one, two, three in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, two)
        assert (one != three).any()
    assert (first[0][0] != first[0][1]).any()
