"""The picklable predictor: equal to `segment`, in this process, after pickling, in a DataLoader and on Ray."""

import importlib.util
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fastseg
from fastseg.inference import Runner, class_map
from fastseg.inference.predictor import Predictor
from fastseg.inference.segment import segment
from fastseg.io.checkpoint import save_checkpoint
from fastseg.models import create

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():
        yield


@pytest.fixture
def model():
    return create("segnet_basic", 3, channels=8).eval()


def test_pickled_and_from_a_file(model, tmp_path):
    save_checkpoint(tmp_path / "w.pt", model, "segnet_basic", {"channels": 8}, list("abc"))
    want = segment(model, PICTURES)
    for predictor in (Predictor(model, device="cpu"), Predictor(tmp_path / "w.pt", device="cpu")):
        for each in (predictor, pickle.loads(pickle.dumps(predictor))):
            out = each({"image": PICTURES, "path": np.array(["a", "b", "c"])})
            assert set(out) == {"classes", "path"}
            np.testing.assert_array_equal(out["classes"], want)
    assert len(pickle.dumps(predictor)) < 1000  # the path, not the weights it has read by now


def test_batches_of_a_loader_and_of_several_sizes(model):
    loader = DataLoader([{"image": picture} for picture in PICTURES], batch_size=3)
    (out,) = map(Predictor(model, device="cpu"), loader)
    np.testing.assert_array_equal(out["classes"], segment(model, PICTURES))
    mixed = Predictor(model, device="cpu")({"image": [PICTURES[0], PICTURES[1][:8]]})["classes"]
    assert [part.shape for part in mixed] == [(16, 24), (8, 24)]


def test_batches_that_cannot_be(model):
    with pytest.raises(ValueError, match="has path, and no 'image'"):
        Predictor(model)({"path": []})
    with pytest.raises(ValueError, match="float64"):
        Predictor(model, device="cpu")({"image": PICTURES / 255})


@pytest.mark.parametrize("scale", [1, 4])
def test_one_channel_of_logits_is_cut_at_0(scale):
    """A binary net's class map: probabilities of more than a half, at the picture's size."""
    net = torch.nn.Conv2d(3, 1, 1, scale)
    x = torch.randn(2, 3, 16, 24)
    want = torch.nn.functional.interpolate(net(x).detach(), (16, 24), mode="bilinear")[:, 0].sigmoid() > 0.5
    got = class_map(net, x)
    assert 0 < got.float().mean() < 1 and torch.equal(got, want.to(torch.uint8))
    assert torch.equal(Runner(net, x, exact=True).predict(x), got)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_on_ray(model):
    import ray

    ray.init(num_cpus=1, include_dashboard=False)
    try:
        rows = ray.data.from_numpy(PICTURES).rename_columns({"data": "image"})
        out = rows.map_batches(Predictor(model, device="cpu"), batch_size=2).take_all()
    finally:
        ray.shutdown()
    np.testing.assert_array_equal(np.stack([row["classes"] for row in out]), segment(model, PICTURES))
    assert torch.is_grad_enabled()
