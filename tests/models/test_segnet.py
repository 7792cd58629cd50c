"""SegNet and SegNet-Basic: golden counts, the nets written with torch alone, folding, memory, torchvision files."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseg
from fastseg.measure.comparison import eager_form
from fastseg.models import SegNet, SegNetBasic, create, load_encoder_weights
from fastseg.ops import PoolIndices

pytestmark = pytest.mark.filterwarnings("ignore:max_unpool")  # torch's own is the reference, and not deterministic
CL = torch.channels_last
NARROW = {SegNet: {"width": 0.02}, SegNetBasic: {"channels": 8}}
BOTH = pytest.mark.parametrize("net", [SegNet, SegNetBasic])


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomised(model: nn.Module) -> nn.Module:
    """Norms that are not the identity they begin as."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@pytest.mark.parametrize("classes, count", [(11, 29_449_355), (12, 29_449_932), (21, 29_455_125), (32, 29_461_472)])
def test_golden_counts_segnet(classes, count):
    with torch.device("meta"):
        model = SegNet(classes)
    assert parameters(model) == count
    assert parameters(model.encoder) == 14_723_136
    assert parameters(model.decoder) == 14_719_872


def test_golden_count_basic():
    model = SegNetBasic(11)
    assert parameters(model) == 1_416_587
    without = parameters(model) - sum(m.bias.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    assert without == 1_416_064  # the paper's form


def test_names_of_the_encoder_are_torchvisions():
    with torch.device("meta"):
        keys = SegNet(11).encoder.state_dict().keys()
    convs = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
    parts = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert set(keys) == {f"features.{i + j}.{part}" for i in convs for j in (0, 1) for part in parts[j]}


def plain_segnet(model: SegNet, x: Tensor, training: bool) -> Tensor:
    """SegNet from the parameters of ``model``, written with torch.nn.functional alone."""

    def layer(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        y = F.conv2d(x, conv.weight, conv.bias, padding=1)
        stats = (None, None) if training else (norm.running_mean, norm.running_var)
        return F.relu(F.batch_norm(y, *stats, norm.weight, norm.bias, training))

    features, memory = model.encoder.features, []
    convs = [i for i, module in enumerate(features) if isinstance(module, nn.Conv2d)]
    ends = iter((2, 2, 3, 3, 3))
    left = next(ends)
    for i in convs:
        x = layer(x, features[i], features[i + 1])
        left -= 1
        if left == 0:
            size = x.shape[-2:]
            x, indices = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
            memory.append((indices, size))
            left = next(ends, 0)
    for stage in model.decoder:
        indices, size = memory.pop()
        x = F.max_unpool2d(x, indices, 2, 2, output_size=size)
        for i in range(0, len(stage), 3):
            x = layer(x, stage[i], stage[i + 1])
    return F.conv2d(x, model.classifier.weight, model.classifier.bias, padding=1)


def plain_basic(model: SegNetBasic, x: Tensor, training: bool) -> Tensor:
    def layer(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        y = F.conv2d(x, conv.weight, conv.bias, padding=3)
        stats = (None, None) if training else (norm.running_mean, norm.running_var)
        return F.batch_norm(y, *stats, norm.weight, norm.bias, training)

    memory = []
    x = F.local_response_norm(x, 5, 1e-4, 0.75)
    for conv, norm in model.encoder:
        size = x.shape[-2:]
        x, indices = F.max_pool2d(F.relu(layer(x, conv, norm)), 2, 2, ceil_mode=True, return_indices=True)
        memory.append((indices, size))
    for conv, norm in model.decoder:
        indices, size = memory.pop()
        x = layer(F.max_unpool2d(x, indices, 2, 2, output_size=size), conv, norm)
    return F.conv2d(x, model.classifier.weight, model.classifier.bias)


PLAIN = {SegNet: plain_segnet, SegNetBasic: plain_basic}


# In four of the eight combinations every two options meet in every way; the rest with --long.
@BOTH
@pytest.mark.parametrize(
    ("index_format", "layout", "training"),
    [
        pytest.param(
            index_format, layout, training, id=f"{index_format}-{name}-{'train' if training else 'eval'}",
            marks=[] if (index_format == "int64") ^ (name == "NCHW") ^ training else [pytest.mark.long],
        )
        for index_format in ("compact", "int64")
        for name, layout in (("NCHW", torch.contiguous_format), ("channels_last", CL))
        for training in (True, False)
    ],
)  # fmt: skip
def test_equals_plain_pytorch(net, index_format, layout, training, device):
    """Forward and gradients in fp64 on 29x36, whose halves are odd: 15x18, 8x9, 4x5, 2x3, 1x2."""
    model = randomised(net(4, index_format, **NARROW[net])).double().to(device).train(training)
    x = torch.randn(2, 3, 29, 36, dtype=torch.float64, device=device).contiguous(memory_format=layout)
    with fastseg.explain() as report:
        got = model(x)
    paths = {(d.op, d.path) for d in report if d.op != "max_unpool_conv2d"}
    assert ("max_unpool2d", "triton") in paths
    assert (("batch_norm_act_max_pool2d", "triton") in paths) == (layout == CL)
    want = PLAIN[net](model, x, training)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    upstream = torch.randn_like(want)
    learnt = list(model.parameters())
    ours, theirs = (torch.autograd.grad(y, learnt, upstream) for y in (got, want))
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        # A bias before batch norm in training has no effect: its gradient is rounding.
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * float(upstream.norm()), msg=name)


@BOTH
def test_folded_evaluation_equals_the_unfolded(net, device):
    model = randomised(net(4, **NARROW[net])).double().to(device, memory_format=CL).eval()
    x = torch.randn(2, 3, 45, 60, dtype=torch.float64, device=device).contiguous(memory_format=CL)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        folded, unfolded = model(x), eager_form(model)(x)
        torch.testing.assert_close(folded, unfolded, rtol=1e-10, atol=1e-11)
        with fastseg.reference():
            torch.testing.assert_close(model(x), unfolded, rtol=1e-10, atol=1e-11)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@BOTH
def test_any_size(net):
    model = net(3, **NARROW[net]).eval()
    for size in ((1, 1), (7, 33), (32, 32)):
        with torch.no_grad(), fastseg.reference():
            assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_the_papers_sizes():
    """360x480 pools to 180x240, 90x120, 45x60, 23x30, 12x15."""
    sizes = []
    model = SegNet(3, width=0.02).eval()
    original = model.unpool.forward
    model.unpool.forward = lambda x, i, output_size: sizes.append(tuple(x.shape[-2:])) or original(x, i, output_size)
    with torch.no_grad(), fastseg.reference():
        model(torch.zeros(1, 3, 360, 480))
    assert sizes == [(12, 15), (23, 30), (45, 60), (90, 120), (180, 240)]


def test_loads_torchvisions_file(tmp_path):
    """A file laid out as torchvision's vgg16_bn: the encoder takes it, the classifier of the file is left out."""
    model, source = SegNet(5, width=0.02), randomised(SegNet(7, width=0.02))
    state = source.encoder.state_dict() | {"classifier.0.weight": torch.zeros(3, 3), "classifier.0.bias": torch.ones(3)}
    torch.save(state, tmp_path / "vgg16_bn.pth")
    decoder = copy.deepcopy(model.decoder.state_dict())
    load_encoder_weights(model, tmp_path / "vgg16_bn.pth")
    assert all(
        torch.equal(model.encoder.state_dict()[key], value) for key, value in source.encoder.state_dict().items()
    )
    assert all(torch.equal(model.decoder.state_dict()[key], value) for key, value in decoder.items())


@BOTH
def test_what_training_keeps(net, device):
    """In channels_last with codes no stage keeps its activated map or an int64 index."""
    model = net(4, **NARROW[net]).to(device, memory_format=CL)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model(torch.randn(2, 3, 32, 32, device=device).contiguous(memory_format=CL))
    assert not [t for t in kept.values() if t.dtype == torch.int64]
    assert sum(t.dtype == torch.uint8 for t in kept.values()) == len(model.decoder)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("segnet", {"num_classes": 0}, "SegNet: num_classes is 0"),
        ("segnet", {"index_format": "int8"}, "index_format is 'int8'"),
        ("segnet", {"width": -1}, "width is -1"),
        ("segnet_basic", {"channels": 0}, "SegNetBasic: channels is 0"),
    ],
)
def test_bad_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, **{"num_classes": 2, **options})


def test_indices_of_the_model_are_compact_where_kernels_run(device):
    seen = []
    model = SegNetBasic(3, channels=8).to(device).eval()
    original = model.unpool.forward
    model.unpool.forward = lambda x, indices, output_size: seen.append(indices) or original(x, indices, output_size)
    with torch.no_grad():
        model(torch.zeros(1, 3, 16, 16, device=device))
        assert all(isinstance(indices, PoolIndices) for indices in seen) and len(seen) == 4
        with fastseg.reference():
            model(torch.zeros(1, 3, 16, 16, device=device))
    assert all(isinstance(indices, Tensor) for indices in seen[4:]) and len(seen) == 8
