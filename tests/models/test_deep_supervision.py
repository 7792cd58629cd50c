"""Heads at chosen depths: the losses of plain torch, no trace in evaluation, and what is refused."""

import copy

import pytest
import torch
from nets import NARROW, unsettle
from torch import nn
from torch.nn import functional as F

import fastseg
from fastseg.models import DeepSupervision, create, fading_weights

SHAPE = (24, 17)


@pytest.fixture(autouse=True)
def _reference():
    with fastseg.reference():  # the interpreter would take minutes
        yield


def supervised(name, at, **options):
    for module in (model := create(name, 3, **NARROW[name])).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return unsettle(DeepSupervision(model, at, **options))


@pytest.mark.parametrize(
    ("name", "at"), [("unet", [1, 2]), ("segnet", [3]), ("fcn", ["backbone.layer2", "backbone.layer3"])]
)
def test_loss_is_that_of_plain_torch(name, at):
    """Loss and gradients: the maps taken by hooks of this test, interpolated, and torch's cross entropy."""
    model = supervised(name, at)
    x, target = torch.randn(2, 3, *SHAPE, dtype=torch.float64), torch.randint(3, (2, *SHAPE))
    target[:, :5] = 255
    weights = (0.25, 0.5, 2.0)[-len(at) - 1 :]
    state = copy.deepcopy(model.state_dict())
    learnt = [p for p in model.parameters() if p.requires_grad]
    loss = model.loss(x, target, weights, ignore_index=255)
    ours = torch.autograd.grad(loss, learnt)

    model.load_state_dict(state)
    maps = {}
    handles = [
        model.model.get_submodule(key).register_forward_hook(lambda m, i, y, key=key: maps.__setitem__(key, y))
        for key in model.at
    ]
    want = weights[-1] * model.model.loss(x, target, ignore_index=255)
    for weight, key, head in zip(weights, model.at, model.heads, strict=False):
        scores = F.interpolate(F.conv2d(maps[key], head.weight, head.bias), size=SHAPE, mode="bilinear")
        want = want + weight * F.cross_entropy(scores, target, ignore_index=255)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-10)
    for a, b in zip(ours, torch.autograd.grad(want, learnt), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    assert all(
        head.weight.grad is None and g.any() for head, g in zip(model.heads, ours[-2 * len(at) :: 2], strict=True)
    )


def test_depths_are_the_last_maps_of_their_stride():
    """UNet's widths by depth: 4 at full size, 8 at half, 8 at a quarter; the heads see the decoder's."""
    model = supervised("unet", [0, 1, 2])
    sizes = {}
    for key in model.at:
        model.model.get_submodule(key).register_forward_hook(
            lambda m, i, y, key=key: sizes.__setitem__(key, y.shape[1:])
        )
    model.eval()(torch.zeros(1, 3, 32, 16, dtype=torch.float64))
    assert [tuple(sizes[key]) for key in model.at] == [(4, 32, 16), (8, 16, 8), (8, 8, 4)]
    assert [head.in_channels for head in model.heads] == [4, 8, 8]


def test_evaluation_is_the_models_own():
    model = supervised("unet", [1])
    x, target = torch.randn(1, 3, 16, 16, dtype=torch.float64), torch.randint(3, (1, 16, 16))
    full, (aux, main) = model.model.train()(x), model(x)
    assert torch.equal(full, main) and aux.shape == full.shape
    model.eval()
    model.heads[0].weight.data.fill_(float("nan"))  # not computed
    assert torch.equal(model(x), model.model(x)) and torch.equal(model.predict(x), model.model.predict(x))
    assert torch.equal(model.loss(x, target), model.model.loss(x, target))
    assert not any(module._forward_hooks for module in model.modules())
    assert set(model.model.state_dict()) == set(create("unet", 3, **NARROW["unet"]).state_dict())
    assert copy.deepcopy(model).at == model.at


def test_what_was_frozen_stays_frozen():
    """The run that finds the maps changes no mode and no statistic."""
    model = create("segnet", 3, **NARROW["segnet"])
    frozen = model.decoder[0][1].eval()
    before = copy.deepcopy(model.state_dict())
    DeepSupervision(model, [4])
    assert model.training and model.decoder[1].training and not frozen.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_the_constructor_and_fading_ones():
    model = supervised("unet", [1, 2], weights=[0.5, 0.0])
    x, target = torch.randn(1, 3, 16, 16, dtype=torch.float64), torch.randint(3, (1, 16, 16))
    own = model.loss(x, target, (0, 0, 1))
    torch.testing.assert_close(model.loss(x, target), own + 0.5 * model.loss(x, target, (1, 0, 0)))
    torch.testing.assert_close(model.loss(x, target, fading_weights(model.supervised, 1.0)), own)


@pytest.mark.parametrize(
    ("at", "options", "message"),
    [
        ([], {}, "at is"),
        ("encoder", {}, "at is 'encoder'"),
        (["nothing"], {}, "UNet has no submodule 'nothing'"),
        ([7], {}, "UNet has no map at depth 7; it has"),
        ([-1], {}, "no map at depth -1"),
        ([1, 2], {"weights": [1]}, r"weights are \(1,\); give 2"),
        (["upsample_argmax"], {}, "UNet does not call 'upsample_argmax'"),
    ],
)
def test_refused(at, options, message):
    with pytest.raises(ValueError, match=message):
        supervised("unet", at, **options)


def test_refused_with_a_margin():
    with pytest.raises(ValueError, match='UNet leaves a margin out; build it with padding="same"'):
        DeepSupervision(create("unet", 2, widths=(4, 4)), [0])
