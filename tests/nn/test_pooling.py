"""The pooling modules as drop-ins for torch's, and the functions that run modules as stages of an encoder-decoder."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fastseg
import fastseg.nn
from fastseg.nn.fuse.conv_norm_act import folded, run_conv_norm_act
from fastseg.nn.fuse.pooling import run_conv_norm_act_pool, run_unpool_conv_norm_act

CL = torch.channels_last
pytestmark = pytest.mark.filterwarnings("ignore:max_unpool")  # torch's own is the reference, and not deterministic
NAMES = [f"Max{kind}{dims}d" for kind in ("Pool", "Unpool") for dims in (1, 2, 3)]


@pytest.mark.parametrize("name", NAMES)
def test_drop_in(name):
    ours, theirs = getattr(fastseg.nn, name), getattr(nn, name)
    a, b = ours(3, stride=2, padding=1), theirs(3, stride=2, padding=1)
    assert isinstance(a, theirs) and ours.__name__ == name
    assert repr(a) == repr(b) and a.state_dict() == {} and list(a.children()) == []
    assert list(inspect.signature(theirs).parameters)[:3] == ["kernel_size", "stride", "padding"]
    for twin in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert type(twin) is ours and repr(twin) == repr(a)


def test_options_of_the_pools():
    pool = fastseg.nn.MaxPool2d(2, return_indices=True, index_format="compact")
    assert repr(pool).endswith("ceil_mode=False, index_format='compact')")
    assert pickle.loads(pickle.dumps(pool)).index_format == "compact"
    with pytest.raises(ValueError, match="MaxPool2d: index_format is 'uint8'"):
        fastseg.nn.MaxPool2d(2, index_format="uint8")


def test_options_of_the_unpools(device):
    unpool = fastseg.nn.MaxUnpool2d(2, check_indices="sync")
    assert repr(unpool).endswith("padding=(0, 0), check_indices='sync')")
    with pytest.raises(RuntimeError, match="Found an invalid max index: 99"):
        unpool(torch.ones(1, 1, 2, 2, device=device), torch.full((1, 1, 2, 2), 99, device=device))
    with pytest.raises(ValueError, match="MaxUnpool2d: check_indices is 'never'"):
        fastseg.nn.MaxUnpool2d(2, check_indices="never")


@pytest.mark.parametrize("index_format", ["int64", "compact"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_there_and_back(dims, index_format, device):
    pool = getattr(fastseg.nn, f"MaxPool{dims}d")(2, return_indices=True, index_format=index_format)
    unpool = getattr(fastseg.nn, f"MaxUnpool{dims}d")(2)
    x = torch.randn(2, 3, *(7, 6, 5)[:dims], device=device, requires_grad=True)
    y = unpool(*pool(x), output_size=x.shape)
    theirs = getattr(nn, f"MaxPool{dims}d")(2, return_indices=True), getattr(nn, f"MaxUnpool{dims}d")(2)
    want = theirs[1](*theirs[0](x), output_size=x.shape)
    assert torch.equal(y, want)
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(want, x, dy)[0])


# --- stages


def stage(C=6, COUT=8, bias=True, affine=True) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv, norm = nn.Conv2d(C, COUT, 3, padding=1, bias=bias), nn.BatchNorm2d(COUT, affine=affine)
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    if affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return conv.double(), norm.double()


def pools(index_format="compact"):
    pool = fastseg.nn.MaxPool2d(2, 2, ceil_mode=True, return_indices=True, index_format=index_format)
    return pool, fastseg.nn.MaxUnpool2d(2, 2)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("bias, affine", [(True, True), (False, True), (True, False)], ids=str)
def test_down_and_up(bias, affine, grad, training, device):
    """One fused stage each way against plain modules: values, gradients, running statistics."""
    torch.manual_seed(1)
    down, up = stage(bias=bias, affine=affine), stage(8, 5, bias=bias, affine=affine)
    modules = nn.ModuleList([*down, *up]).to(device).train(training)
    plain = copy.deepcopy(modules)
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64, device=device).contiguous(memory_format=CL)
    results = []
    for conv1, norm1, conv2, norm2 in (modules, plain):
        x = x.detach().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            if conv1 is modules[0]:
                pool, unpool = pools()
                y, indices = run_conv_norm_act_pool(x, conv1, norm1, "relu", pool)
                y = run_unpool_conv_norm_act(y, indices, unpool, (9, 7), conv2, norm2, "relu")
            else:
                y, indices = nn.MaxPool2d(2, 2, ceil_mode=True, return_indices=True)(norm1(conv1(x)).relu())
                y = norm2(conv2(nn.MaxUnpool2d(2, 2)(y, indices, output_size=(9, 7)))).relu()
        results.append([y.detach()])
        if grad:
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).view(y.shape)).sum().backward()
            results[-1].append(x.grad)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    for (name, ours), theirs in zip(modules.named_parameters(), plain.parameters(), strict=True):
        if grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=name)
    for (name, ours), theirs in zip(modules.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


def test_evaluation_folds_at_each_call():
    conv, norm = (module.eval() for module in stage())
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    plain = lambda: norm(conv(x)).relu()
    run = lambda: run_conv_norm_act(x, conv, norm, "relu")
    state = {key: value.clone() for key, value in conv.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(run(), plain())
        weight = folded(x, conv, norm)[0]
        assert folded(x, conv, norm)[0] is not weight
        with fastseg.frozen(conv, norm):
            assert folded(x, conv, norm)[0] is folded(x, conv, norm)[0]
        for change in (
            lambda: conv.weight.mul_(2),
            lambda: conv.weight.data.mul_(2),
            lambda: setattr(norm, "eps", 0.5),
            lambda: norm.running_var.add_(1),
            lambda: norm.load_state_dict({**norm.state_dict(), "bias": torch.full((8,), 0.25)}),
            lambda: setattr(conv, "bias", nn.Parameter(torch.ones(8, dtype=torch.float64))),
            lambda: norm.train()(torch.randn(4, 8, 3, 3, dtype=torch.float64)) is None or norm.eval(),
        ):
            change()
            torch.testing.assert_close(run(), plain())
        norm.num_batches_tracked = None  # as in old files: then nothing counts the training steps
        torch.testing.assert_close(run(), plain())
        norm.train()
        run()
        norm.eval()
        torch.testing.assert_close(run(), plain())
    assert conv.state_dict().keys() == state.keys()
    twin = copy.deepcopy(conv)
    with torch.no_grad():
        twin.weight.zero_()
        torch.testing.assert_close(run_conv_norm_act(x, twin, norm, None), norm(twin(x)))
        torch.testing.assert_close(run(), plain())
    assert len(pickle.dumps(conv)) < 3 * sum(p.nbytes for p in conv.parameters())


def test_folding_keeps_out_of_the_way():
    """Gradients, hooks, and other kinds of norm go through the modules."""
    conv, norm = (module.eval() for module in stage())
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    run_conv_norm_act(x, conv, norm, "relu").sum().backward()
    assert conv.weight.grad is not None and norm.weight.grad is not None
    seen = []
    norm.register_forward_hook(lambda *_: seen.append("norm"))
    with torch.no_grad():
        y = run_conv_norm_act(x, conv, norm, "relu")
        pool, unpool = pools()
        run_conv_norm_act_pool(x, conv, norm, "relu", pool)
    assert seen == ["norm"] * 2
    group = nn.GroupNorm(2, 8).double()
    with torch.no_grad():
        pooled, indices = run_conv_norm_act_pool(x, conv, group, "relu", pool)
        want, want_indices = nn.MaxPool2d(2, 2, ceil_mode=True, return_indices=True)(group(conv(x)).relu())
        assert torch.equal(pooled, want) and torch.equal(indices.to_torch(), want_indices)
        conv2 = nn.Conv2d(8, 4, 3, padding=1, stride=2).double()  # not one that unpooling can be folded into
        got = run_unpool_conv_norm_act(pooled, indices, unpool, (5, 5), conv2, None, None)
        torch.testing.assert_close(got, conv2(nn.MaxUnpool2d(2, 2)(want, want_indices, output_size=(5, 5))))
    assert y.shape == (2, 8, 5, 5)


def test_autocast_folds_in_its_dtype():
    conv, norm = (module.float().eval() for module in stage())
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = run_conv_norm_act(x, conv, norm, "relu")
        want = norm(conv(x)).relu()
        assert folded(x, conv, norm)[0].dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want.float(), rtol=2e-2, atol=2e-2)
