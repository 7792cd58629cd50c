"""BatchNormAct2d against torch's BatchNorm2d and what follows it, and norms that modules share with the op."""

import copy
import pickle

import pytest
import torch
from module_samples import module_samples
from torch import Tensor, nn

import fastseg
from fastseg.nn import BatchNormAct2d, SyncBatchNorm
from fastseg.nn.fuse.conv_norm_act import run_conv_norm_act
from fastseg.nn.fuse.norm import run_norm_act

OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "no affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "nothing": {"affine": False, "track_running_stats": False},
    "eps": {"eps": 0.1, "momentum": 0.7},
}


def pair(options: dict, device: str, act: str | None = "relu") -> tuple[BatchNormAct2d, nn.BatchNorm2d]:
    ours = BatchNormAct2d(5, **options, act=act, device=device)
    if ours.affine:
        nn.init.uniform_(ours.weight, 0.5, 1.5)
        nn.init.uniform_(ours.bias, -0.5, 0.5)
    theirs = nn.BatchNorm2d(5, **options, device=device)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(options, device):
    """Three steps of training, each with values, gradients and buffers; then evaluation."""
    ours, theirs = pair(options, device)
    for training in (True, True, True, False):
        ours.train(training), theirs.train(training)
        x = (torch.randn(2, 5, 7, 3, device=device) * 2 + 1).requires_grad_()
        r = torch.randn_like(x).requires_grad_()
        y, want = ours(x, r), torch.relu(theirs(x) + r)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, [x, r, *ours.parameters()], dy)
        for g, w in zip(got, torch.autograd.grad(want, [x, r, *theirs.parameters()], dy), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, msg=key)


def test_torchs_module_samples(device):
    """module_db's own inputs of BatchNorm2d, against the module itself."""
    seen = 0
    for sample in module_samples("BatchNorm2d", dtype=torch.float32, device=device):
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        ours = BatchNormAct2d(*arguments, **options, act=None, device=device)
        theirs = nn.BatchNorm2d(*arguments, **options, device=device)
        inputs = sample.forward_input.args
        for training in (True, False):
            ours.train(training), theirs.train(training)
            torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-5, atol=1e-5)
        seen += 1
    assert seen > 0


def test_half_and_bias_of_its_own(device):
    ours, theirs = pair({}, device)
    x = torch.randn(2, 5, 6, 4, device=device)
    want = torch.relu(theirs(x))
    for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 4e-2)):
        y = ours(x.to(dtype))  # fp32 parameters and statistics
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), want, rtol=tolerance, atol=tolerance)
    ours.bias = None  # as BatchNorm2d(bias=False) of newer torch
    theirs.bias = None
    torch.testing.assert_close(ours(x), torch.relu(theirs(x)), rtol=1e-5, atol=1e-5)


def test_repr_pickle_copy_and_errors(device):
    norm = BatchNormAct2d(4, act="leaky_relu", sync=True, device=device)
    as_torch = repr(nn.BatchNorm2d(4)).removeprefix("BatchNorm2d(").removesuffix(")")
    assert repr(norm) == f"BatchNormAct2d({as_torch}, act='leaky_relu', sync=True)"
    norm(torch.randn(2, 4, 3, 3, device=device))  # without a process group: this process alone
    for other in (pickle.loads(pickle.dumps(norm)), copy.deepcopy(norm)):
        assert repr(other) == repr(norm) and other.num_features == 4
        assert all(torch.equal(other.state_dict()[k], v) for k, v in norm.state_dict().items())
    with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
        norm(torch.randn(2, 4, device=device))
    assert int(norm.num_batches_tracked) == 1  # a batch that raised is not counted, as in torch
    with pytest.raises(ValueError, match="act is 'elu'"):
        BatchNormAct2d(4, act="elu")


def test_conversion_keeps_the_activation():
    """torch's converter would lose it, and is told so; ours converts the rest as torch's does."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(TypeError, match=r"call fastseg.nn.SyncBatchNorm.convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    converted = SyncBatchNorm.convert_sync_batchnorm(net)
    assert converted[1] is net[1] and converted[1].sync and converted[1].act == "relu"
    assert type(converted[2][0]) is BatchNormAct2d and converted[2][0].sync and converted[2][0].act is None
    assert converted.state_dict().keys() == nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4))
    ).state_dict().keys()  # fmt: skip


class Watched(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_run_norm_act(device):
    """A plain norm is one op; another class and a hooked one are called."""
    x, r = (torch.randn(2, 5, 4, 4, device=device) for _ in range(2))
    calls = []
    hooked = nn.BatchNorm2d(5, device=device)
    hooked.register_forward_hook(lambda *_: calls.append(1))
    for norm, path in ((nn.BatchNorm2d(5, device=device), "triton"), (Watched(5, device=device), "reference"),
                       (hooked, "reference")):  # fmt: skip
        twin = copy.deepcopy(norm)
        with fastseg.explain() as report:
            y = run_norm_act(x, norm, "relu6", r)
        torch.testing.assert_close(y, nn.functional.relu6(twin(x) + r), rtol=1e-5, atol=1e-5)
        assert [d.path for d in report] == [path]
        for key, value in twin.state_dict().items():
            torch.testing.assert_close(norm.state_dict()[key], value, msg=key)
    assert len(calls) >= 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_conv_norm_act_with_a_residual(grad, training, device):
    """Folded in evaluation without gradients, else one op behind the convolution."""
    conv, norm = nn.Conv2d(3, 5, 3, padding=1, device=device), nn.BatchNorm2d(5, device=device)
    nn.init.uniform_(norm.running_mean, -1, 1)
    norm.train(training)
    twin = copy.deepcopy(norm)
    x, r = torch.randn(2, 3, 6, 5, device=device), torch.randn(2, 5, 6, 5, device=device)
    kept = r.clone()
    with torch.set_grad_enabled(grad), fastseg.explain() as report:
        y = run_conv_norm_act(x, conv, norm, "relu", r)
        want = torch.relu(twin(conv(x)) + r)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert [d.op for d in report] == ["batch_norm_act" if training or grad else "conv2d_act"]
    assert torch.equal(r, kept)
