"""Convolution and activation without a gradient: what cuDNN's fused call is given, and what happens when it refuses.

No GPU is needed: the decision is a function of a ``ConvRequest``; the call is replaced.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastseg
from fastseg.kernels.runtime.ceilings import chip_of
from fastseg.ops import conv_act as _conv_act
from fastseg.ops.conv_act import FORMS, conv2d_act, conv2d_act_ref
from fastseg.ops.core.conv_request import ConvCall, ConvRequest, request_of
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.registered.cudnn_conv import CUDNN, unsupported

GOOD = ConvRequest(
    device="cuda", cudnn=True, deterministic=False, plain=True, dtypes=(torch.bfloat16,) * 3, act="relu",
    padding=(1, 1), channels=(64, 128), groups=1, channels_last=True, elements=2**28,
)  # fmt: skip
ARGS = ((1, 1), (1, 1), (1, 1), 1)
HAS_CUDNN = torch.backends.cudnn.is_available()  # in CUDA wheels, without a device too


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"dtypes": (torch.float32,) * 2, "channels": (4, 12), "channels_last": False}, ""),
        ({"device": "xpu"}, "xpu tensor"),
        ({"cudnn": False}, "no cuDNN"),
        ({"deterministic": True}, "not deterministic"),
        ({"plain": False}, "a gradient"),
        ({"act": "relu6"}, ""),  # the ReLU, and a minimum after it
        ({"act": "leaky_relu"}, "has a ReLU, not leaky_relu"),
        ({"act": None}, "not no activation"),
        ({"dtypes": (torch.float64,) * 3}, "dtypes float64"),
        ({"dtypes": (torch.bfloat16, torch.float32)}, "dtypes bfloat16, float32"),  # autocast casts the weight
        ({"padding": "same"}, 'padding "same"'),
        ({"groups": 2}, "2 groups"),
        ({"channels": (3, 64)}, "3 -> 64 channels are not multiples of 8"),
        ({"channels": (64, 21)}, "64 -> 21 channels"),
        ({"channels_last": False}, "not channels_last"),
        ({"elements": 2**31}, "2\\^31"),
    ],
    ids=str,
)
def test_what_is_fused(change, why):
    got = unsupported(GOOD._replace(**change))
    assert (got == "") == (why == "")
    if why:
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(got)


def test_a_request_says_what_the_call_is():
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(8, 16, 3, padding=1).to(memory_format=torch.channels_last)
    ask = lambda x=x, act="relu", residual=None: request_of(ConvCall(x, conv.weight, conv.bias, act, *ARGS, residual))
    with torch.no_grad():
        request = ask()
    kernel = {"no_kernel": "", "chip": chip_of(x.device)} if INTERPRETED else {"no_kernel": "CPU tensor"}
    assert request == ConvRequest(
        device="cpu", cudnn=False, deterministic=False, plain=True, dtypes=(torch.float32,) * 3, act="relu",
        padding=(1, 1), channels=(8, 16), groups=1, channels_last=True, elements=2 * 16 * 30,
        shape=(2, 8, 6, 5), taps=(16, 8, 3, 3), bias=True, map_last=True, **kernel,
    )  # fmt: skip
    assert not ask().plain  # the parameters want gradients
    with torch.no_grad():
        assert not ask(x[0]).plain
        assert not ask(x.contiguous()).channels_last
        skip = torch.randn(2, 16, 6, 5)
        assert not ask(residual=skip).channels_last and ask(residual=skip).dtypes == (torch.float32,) * 4
        assert ask(residual=skip.to(memory_format=torch.channels_last)).channels_last
        with torch.autograd.forward_ad.dual_level():
            assert not ask(torch.autograd.forward_ad.make_dual(x, x)).plain
        plain = []
        torch.func.vmap(lambda x: (plain.append(ask(x).plain), x)[1])(x[None])
        assert plain == [False]


class TestTheCall:
    """On CPU tensors, with the decision and the call replaced."""

    @pytest.fixture(autouse=True)
    def _fused(self, monkeypatch):
        self.calls, self.error = [], None

        def fused(x, weight, bias, *args):
            self.calls.append(args)
            if self.error is not None:
                raise self.error
            return F.relu(F.conv2d(x, weight, bias, *args))

        def fused_add(x, weight, z, alpha, bias, *args):
            self.calls.append(args)
            return F.relu(F.conv2d(x, weight, bias, *args) + alpha * z)

        monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", fused_add)
        on_cuda = {"device": "cuda", "cudnn": True, "deterministic": False}
        monkeypatch.setattr(_conv_act, "is_torchs", lambda x: False)
        monkeypatch.setattr(_conv_act, "request_of", lambda *a, **k: request_of(*a, **k)._replace(**on_cuda))
        monkeypatch.setattr(CUDNN, "no_engine", set())
        yield
        FORMS.forget()

    def run(self, act="relu", skip: float = 0.0):
        torch.manual_seed(0)
        x, weight, bias = torch.randn(1, 8, 5, 5), torch.randn(16, 8, 3, 3), torch.randn(16)
        residual = skip * torch.randn(1, 16, 5, 5)
        with fastseg.explain() as report:
            y = conv2d_act(x, weight, bias, act, *ARGS, residual=residual if skip else None)
        torch.testing.assert_close(y, getattr(F, act)(F.conv2d(x, weight, bias, *ARGS) + residual))
        (decision,) = report
        return decision.op, decision.path, decision.why

    def test_is_recorded(self):
        assert self.run() == ("conv2d_act", "cudnn", "convolution, bias and ReLU in one call")
        assert self.calls == [ARGS]

    def test_takes_a_residual(self):
        assert self.run(skip=2.0)[1:] == ("cudnn", "convolution, bias, residual and ReLU in one call")
        assert self.calls == [ARGS]
        assert self.run("relu6", skip=2.0)[1] == "reference"
        with fastseg.reference():
            self.run(skip=2.0)

    def test_relu6_is_a_minimum_after_it(self):
        assert self.run("relu6")[1:] == ("cudnn", "convolution, bias and ReLU in one call, a minimum after it")
        assert self.calls == [ARGS]

    @pytest.mark.parametrize(
        "words", ["cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", "GET was unable to find an engine to execute this"]
    )
    def test_a_refusal_is_remembered(self, words):
        self.error = RuntimeError(words)
        for _ in range(2):
            assert self.run() == ("conv2d_act", "reference", "cuDNN has no engine for it")
        assert len(self.calls) == 1

    def test_other_errors_are_raised(self):
        self.error = torch.OutOfMemoryError("CUDA out of memory")
        with pytest.raises(torch.OutOfMemoryError):
            self.run()

    def test_the_reference_does_not_ask(self):
        with fastseg.reference():
            assert self.run() == ("conv2d_act", "reference", "inside fastseg.reference()")
        assert not self.calls

    def test_what_refused_is_listed(self):
        """Each form before the one that ran, with its reason."""
        self.error = RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")
        with fastseg.explain() as report:
            conv2d_act(torch.randn(1, 8, 5, 5), torch.randn(16, 8, 3, 3), None, "relu", *ARGS)
        (decision,) = report
        assert decision.form == "reference" and [each.form for each in decision.refused] == [
            "pointwise", "cudnn", "stem", "taps", "packed",
        ]  # fmt: skip
        assert dict(each[:2] for each in decision.refused)["cudnn"] == "cuDNN has no engine for it"


@pytest.mark.parametrize("extras", [(), ("residual",), ("image_bias",), ("residual", "image_bias")], ids=str)
@pytest.mark.parametrize("act", [None, "relu", "relu6", "leaky_relu"])
def test_the_last_form_is_the_oracle(act, extras):
    x, weight, bias = torch.randn(2, 4, 5, 6), torch.randn(3, 4, 3, 3), torch.randn(3)
    more = {"residual": torch.randn(2, 3, 5, 6), "image_bias": torch.randn(2, 3)}
    more = {name: more[name] for name in extras}
    with fastseg.reference(), torch.no_grad():
        y = conv2d_act(x, weight, bias, act, *ARGS, **more)
    torch.testing.assert_close(y, conv2d_act_ref(x, weight, bias, act, *ARGS, **more), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skip", [False, True])
def test_the_fused_call_agrees(dtype, skip, device):
    x = torch.randn(2, 64, 33, 47, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = (
        torch.randn(128, 64, 3, 3, device=device, dtype=dtype).div(24).contiguous(memory_format=torch.channels_last)
    )
    bias = torch.randn(128, device=device, dtype=dtype)
    residual = torch.randn(2, 128, 33, 47, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    residual = residual if skip else None
    torch.use_deterministic_algorithms(False)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False), fastseg.explain() as report:
        y = conv2d_act(x, weight, bias, "relu", *ARGS, residual=residual)
    assert [decision.path for decision in report] == ["cudnn"]
    want = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), *ARGS) + (residual.double() if skip else 0))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
