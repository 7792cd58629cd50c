"""The demo's training: by the library's own loop, reproducible, and it learns; its table has what it promises."""

import numpy as np
import pytest
import torch

import fastseg
from fastseg.demo import latency, training
from fastseg.demo.mosaic import CLASSES, halves, load_photographs, mosaic
from fastseg.demo.training import Mosaics
from fastseg.measure import comparison
from fastseg.models import create

TINY = {"backbone": "resnet18", "stride": 8, "width": 0.05}


def trained(name: str, options: dict, steps: int, seed: int, side: int, batch: int) -> tuple[torch.nn.Module, Mosaics]:
    textures, test_textures = halves(load_photographs())
    torch.manual_seed(seed)
    model = create(name, len(CLASSES), **options)
    test = Mosaics(test_textures, 8, side, (seed, 1), "test")
    with fastseg.reference():  # interpreted kernels would take minutes
        training.train(name, model, textures, test, steps, seed, batch, side)
    return model, test


def test_an_item_is_the_same_each_time_and_no_two_are_alike():
    textures = halves(load_photographs())[0]
    data = Mosaics(textures, 3, 40, (5, 0))
    picture, label = data[1]
    want, labels = mosaic(textures, 40, np.random.default_rng([5, 0, 1]))
    assert len(data) == 3 and picture.dtype == label.dtype == np.uint8
    assert (picture == want).all() and (label == labels).all() and (data[1][0] == picture).all()
    assert not (data[0][0] == data[2][0]).all() and not (Mosaics(textures, 3, 40, (6, 0))[1][0] == picture).all()
    assert [np.array_equal(one, data[i][1]) for i, one in enumerate(data.labels())] == [True] * 3
    assert [part.shape for part in data.arrays()] == [(3, 40, 40, 3), (3, 40, 40)]


def test_training_is_reproducible():
    weights = [trained("fcn", TINY, 2, seed, 48, 2)[0].state_dict() for seed in (1, 1, 2)]
    name = next(name for name, value in weights[0].items() if value.dim() == 4)
    torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=0)
    assert not torch.equal(weights[0][name], weights[2][name])


EXPECTED_MIOU = {"fcn": 0.33}  # after 100 steps of 4 mosaics of 64 pixels; guessing gives 0.14


@pytest.mark.parametrize("name", EXPECTED_MIOU)
def test_training_learns(name):
    model, test = trained(name, training.OPTIONS[name] | {"width": 0.125}, 100, 0, 64, 4)
    assert not model.training
    pictures, labels = test.arrays()
    with fastseg.reference():
        scores = training.score(training.predictions(model, pictures), labels)
    assert scores.mean_iou > EXPECTED_MIOU[name]


def test_table_is_measured_at_the_default_threads_and_at_one(monkeypatch):
    seen = []
    monkeypatch.setattr(latency, "cases", lambda *args: [1, 2])
    monkeypatch.setattr(comparison, "compare", lambda case, seconds: seen.append((case, torch.get_num_threads())))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        results = latency.measured("net", torch.nn.Identity(), torch.device("cpu"), torch.float32)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert list(results) == ["3 threads", "1 thread"]
    assert seen == [(1, 3), (2, 3), (1, 1), (2, 1)]


def test_models_are_timed_through_a_runner_too(monkeypatch):
    monkeypatch.setattr(comparison, "op_cases", lambda device, dtype: [])
    monkeypatch.setattr(latency, "TRAINED_SIDE", 33)
    monkeypatch.setattr(latency, "FULL_SIDE", 33)
    monkeypatch.setattr(latency, "create", lambda *args, **options: create("fcn", 4, **TINY))
    found = latency.cases("fcn", create("fcn", 4, **TINY), torch.device("cpu"), torch.float32)
    assert [case.name for case in found] == ["fcn, as trained", "fcn, full size"]
    for case in found:
        with fastseg.reference():
            assert case.runner is not None and (case.runner() == case.eager()).float().mean() > 0.99
