"""Upsampling modules as drop-ins for torch's, and the transposed convolution that knows what its weight is."""

import copy
import io
import pickle

import pytest
import torch
from samples import op_info, samples
from torch import nn
from torch.nn import functional as F

import fastseg
from fastseg.nn import (
    BilinearConvTranspose2d,
    Upsample,
    UpsamplingBilinear2d,
    UpsamplingNearest2d,
    bilinear_kernel,
)
from fastseg.ops.core.dispatch import INTERPRETED

PAIRS = [
    (Upsample, nn.Upsample, {"scale_factor": 2, "mode": "bilinear"}),
    (Upsample, nn.Upsample, {"size": (5, 7), "mode": "bilinear", "align_corners": True}),
    (Upsample, nn.Upsample, {"scale_factor": (1.7, 0.6), "mode": "bilinear", "recompute_scale_factor": True}),
    (Upsample, nn.Upsample, {"scale_factor": 1.7, "mode": "bilinear", "align_corners": False}),
    (Upsample, nn.Upsample, {"scale_factor": 2}),  # nearest: torch's
    (Upsample, nn.Upsample, {"size": 6, "mode": "bicubic", "align_corners": True}),
    (UpsamplingBilinear2d, nn.UpsamplingBilinear2d, {"scale_factor": 3}),
    (UpsamplingBilinear2d, nn.UpsamplingBilinear2d, {"size": (2, 9)}),
    (UpsamplingNearest2d, nn.UpsamplingNearest2d, {"scale_factor": 2}),
]


@pytest.mark.parametrize(("ours", "torchs", "kwargs"), PAIRS, ids=str)
def test_drop_in(ours, torchs, kwargs, device):
    module, want = ours(**kwargs), torchs(**kwargs)
    assert isinstance(module, torchs)
    assert repr(module) == repr(want)
    assert module.state_dict() == want.state_dict() == {}
    x = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    with fastseg.explain() as report:
        y = pickle.loads(pickle.dumps(copy.deepcopy(module)))(x)
    torch.testing.assert_close(y, want(x), atol=2e-6, rtol=1e-5)
    assert y.stride() == want(x).stride()
    assert [d.op for d in report] == (["upsample_bilinear"] if want.mode == "bilinear" else [])


def test_errors_are_torchs():
    zeros = torch.zeros(1, 2, 3, 3)
    for kwargs, x in (
        ({"mode": "bilinear"}, zeros),
        ({"mode": "bilinear", "scale_factor": 2}, zeros[0]),
        ({"mode": "nearest", "scale_factor": 2, "align_corners": True}, zeros),
        ({"mode": "bilinear", "scale_factor": 2}, zeros.int()),
        ({"mode": "no such mode", "scale_factor": 2}, zeros),
    ):
        with pytest.raises(Exception) as want:
            nn.Upsample(**kwargs)(x)
        with pytest.raises(type(want.value)) as got:
            Upsample(**kwargs)(x)
        assert str(got.value) == str(want.value)


@pytest.mark.parametrize(("name", "variant"), [("interpolate", "nearest"), ("upsample_nearest", "")])
def test_torch_samples_of_nearest(name, variant):
    op, found = op_info(name, variant), samples(name, variant, dtype=torch.float32)
    assert found
    for sample in found:
        size = sample.args[0] if sample.args else sample.kwargs.get("size")
        kwargs = {key: sample.kwargs.get(key) for key in ("scale_factor", "recompute_scale_factor")}
        module = Upsample(size, **kwargs)
        assert torch.equal(module(sample.input), op(sample.input, *sample.args, **sample.kwargs))


def torchs(module: BilinearConvTranspose2d) -> nn.ConvTranspose2d:
    """torch's own module with the same parameters."""
    other = nn.ConvTranspose2d(
        module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
        bias=module.bias is not None,
    ).to(module.weight)  # fmt: skip
    assert other.load_state_dict(module.state_dict()).missing_keys == []
    return other


def path(module, x, **kwargs) -> str:
    with fastseg.explain() as report:
        module(x, **kwargs)
    return report.decisions[0].why if "the weight is" in report.decisions[0].why else "four taps"


X = (2, 3, 3, 4)


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_defaults(stride, device):
    module = BilinearConvTranspose2d(3, stride).to(device)
    assert isinstance(module, nn.ConvTranspose2d)
    K = 2 * stride - stride % 2
    assert module.weight.shape == (3, 3, K, K)
    assert not module.weight.requires_grad
    assert torch.equal(module.weight.cpu(), bilinear_kernel(3, 3, K))
    x = torch.randn(X, device=device)
    y = module(x)
    assert y.shape == (2, 3, 3 * stride, 4 * stride)
    torch.testing.assert_close(y, torchs(module)(x), atol=2e-6, rtol=1e-5)
    assert path(module, x) == "four taps"


def test_bias_skip_and_output_size(device):
    module = BilinearConvTranspose2d(3, 2, 4, 0, bias=True).to(device)
    nn.init.normal_(module.bias)
    x, skip = torch.randn(X, device=device), torch.randn(2, 3, 14, 15, device=device)
    for kind in ("four taps", "diagonal", "dense"):
        y = module(x, (7, 9), skip=skip, skip_offset=5)
        want = torchs(module)(x)[:, :, :7, :9] + skip[:, :, 5:12, 5:14]
        torch.testing.assert_close(y, want, atol=5e-6, rtol=1e-5)
        assert kind in path(module, x, skip=skip)
        with torch.no_grad():
            module.weight[0, 0 if kind == "four taps" else 1, 1, 1] = 3.0
    assert module(x[0]).shape == (3, 8, 10)  # not batched, as torch's
    torch.testing.assert_close(module(x, [9, 11]), torchs(module)(x, [9, 11]), atol=5e-6, rtol=1e-5)


def test_four_taps_only_while_the_weight_is_the_frozen_kernel(device):
    """Off-diagonal values are never dropped, however they came in."""
    x = torch.randn(X, device=device)

    def check(module, kind):
        torch.testing.assert_close(module(x), torchs(module)(x), atol=5e-6, rtol=1e-5)
        assert kind in path(module, x)

    module = BilinearConvTranspose2d(3, 2).to(device)
    check(module, "four taps")
    with torch.no_grad():
        module.weight[0, 0, 1, 1] += 0.5  # in place
    check(module, "diagonal")
    module.load_state_dict(BilinearConvTranspose2d(3, 2).state_dict())
    check(module, "four taps")
    learnt = nn.ConvTranspose2d(3, 3, 4, 2, 1, bias=False)
    module.load_state_dict(learnt.state_dict())  # loaded
    check(module, "dense")
    module.load_state_dict(BilinearConvTranspose2d(3, 2).state_dict(), assign=True)
    module.to(device)
    check(module, "four taps")
    module.weight = nn.Parameter(learnt.weight.detach().clone().to(device), requires_grad=False)  # replaced
    check(module, "dense")
    module.reset_parameters()
    check(module, "four taps")
    module.weight.data.copy_(learnt.weight)  # behind torch's back: seen at the next change of mode
    module.eval()
    check(module, "dense")
    fresh = BilinearConvTranspose2d(3, 2).to(device)
    fresh.weight.data[0, 1] = 1.0  # as FCN scripts initialise, before the first call
    check(fresh, "dense")
    nan = BilinearConvTranspose2d(3, 2).to(device)
    with torch.no_grad():
        nan.weight[0, 1, 0, 0] = float("nan")
    assert nan(x)[:, 1].isnan().any()


def test_another_rounding_of_the_kernel_is_the_kernel(device):
    """surgery.py computes it in float64."""
    module = BilinearConvTranspose2d(3, 3).to(device)
    module.load_state_dict({"weight": bilinear_kernel(3, 3, 5, dtype=torch.float64).float() * (1 + 1e-7)})
    assert path(module, torch.randn(X, device=device)) == "four taps"
    assert path(module.half(), torch.randn(X, device=device).half()) == "four taps"


def test_training_the_weight_is_torchs(device):
    module = BilinearConvTranspose2d(3, 2, trainable=True).to(device)
    other = torchs(module)
    x = torch.randn(X, device=device)
    for m in (module, other):
        m(x).pow(2).sum().backward()
    torch.testing.assert_close(module.weight.grad, other.weight.grad)
    assert module.weight.grad[0, 1].abs().sum() > 0
    assert "dense" in path(module, x)
    with torch.no_grad():
        assert path(module, x) == "four taps"  # not touched yet
        module.weight -= 0.1 * module.weight.grad
        assert "dense" in path(module, x)
    module.weight.requires_grad_(False)
    torch.testing.assert_close(module(x), torchs(module)(x), atol=5e-6, rtol=1e-5)


def test_bias_is_trained_and_the_weight_is_not(device):
    module = BilinearConvTranspose2d(3, 2, bias=True).to(device)
    x = torch.randn(X, device=device, requires_grad=True)
    module(x).sum().backward()
    assert module.weight.grad is None
    torch.testing.assert_close(module.bias.grad, torch.full((3,), 2.0 * 6 * 8, device=device))
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["bias"]


def test_the_weight_is_looked_at_in_each_call(device, monkeypatch):
    from fastseg.nn import upsampling

    looks = []
    original = upsampling.kind_of
    monkeypatch.setattr(upsampling, "kind_of", lambda w: looks.append(1) or original(w))
    module, x = BilinearConvTranspose2d(3, 2).to(device), torch.randn(X, device=device)
    for _ in range(3):
        module(x)
    assert len(looks) == 3
    with fastseg.frozen(module):
        for _ in range(3):
            module(x)
    assert len(looks) == 4
    module.weight.data[0, 1] = 1.0
    torch.testing.assert_close(module(x), F.conv_transpose2d(x, module.weight, None, 2, module.padding))


def test_copies_pickles_and_places(device):
    module = BilinearConvTranspose2d(3, 2, bias=True).to(device)
    x = torch.randn(X, device=device)
    want = module(x)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = BilinearConvTranspose2d(3, 2, bias=True).to(device)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x), want)
    assert repr(module) == repr(torchs(module)).replace("ConvTranspose2d", "BilinearConvTranspose2d")
    last = copy.deepcopy(module).to(memory_format=torch.channels_last)
    assert torch.equal(last(x), want)
    meta = BilinearConvTranspose2d(3, 2, device="meta")
    assert meta(torch.empty(X, device="meta")).shape == want.shape
    meta = meta.to_empty(device=device)
    meta.reset_parameters()
    assert torch.equal(meta(x), want)
    with torch.inference_mode():
        inference = BilinearConvTranspose2d(3, 2).to(device)
        assert torch.equal(inference(x), want)
        inference.weight[0, 1] = 1.0
        assert not torch.equal(inference(x), want)


def test_compiled_and_exported(device):
    torch._dynamo.reset()
    module, x = BilinearConvTranspose2d(3, 2).to(device), torch.randn(X, device=device)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))
    op = "fastseg.bilinear_conv_transpose2d.default"
    for strict in (False, True):
        program = torch.export.export(module.eval(), (x,), strict=strict)
        held = [str(node.target) for node in program.graph.nodes]
        assert (op in held) == INTERPRETED or device == "cuda"
        torch.testing.assert_close(program.module()(x), module(x))
    module.load_state_dict(nn.ConvTranspose2d(3, 3, 4, 2, 1, bias=False).state_dict())
    want = F.conv_transpose2d(x, module.weight, stride=2, padding=1)
    torch._dynamo.reset()
    for run in (torch.compile(module, fullgraph=True, backend="eager"), torch.export.export(module, (x,)).module()):
        torch.testing.assert_close(run(x), want)
    torch._dynamo.reset()


def test_invalid_geometry():
    for kwargs in ({"stride": 0}, {"stride": 2, "kernel_size": 3}, {"stride": 2, "kernel_size": 1}):
        with pytest.raises(ValueError):
            BilinearConvTranspose2d(3, **kwargs)
