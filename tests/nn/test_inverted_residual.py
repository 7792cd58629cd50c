"""run_inverted_residual over MobileNetV2's own blocks: whole or in parts, the same result; and what it launches."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fastseg
from fastseg.models.encoders.mobilenet_v2 import InvertedResidual, MobileNetV2
from fastseg.ops.core.dispatch import INTERPRETED

CL = torch.channels_last
RESIDUAL = {"in_channels": 8, "out_channels": 8, "stride": 1, "dilation": 1, "expansion": 3, "residual": True}
STRIDED = {"in_channels": 8, "out_channels": 12, "stride": 2, "dilation": 2, "expansion": 3, "residual": False}


def build(options: dict, device: str) -> InvertedResidual:
    block = InvertedResidual(**options)
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for t in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(t.data, 0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return block.to(device, memory_format=CL).half().eval()


def image(device: str) -> Tensor:
    return torch.randn(2, 8, 7, 9, device=device).half().to(memory_format=CL)


def one_by_one(block: InvertedResidual, x: Tensor) -> Tensor:
    wide = copy.deepcopy(block).double().cpu()
    y = wide.conv(x.double().cpu())
    return y + x.double().cpu() if block.residual else y


def close(y: Tensor, want: Tensor) -> bool:
    return (y.double().cpu() - want).norm() < 4 * torch.finfo(torch.float16).eps * want.norm()


@pytest.fixture
def whole():
    """The whole block, whatever the cost model says."""
    with fastseg.force("inverted_residual", "whole"):
        yield


@pytest.mark.parametrize("options", [RESIDUAL, STRIDED], ids=["residual", "strided"])
def test_whole_equals_parts(options, whole, device):
    block, x = build(options, device), image(device)
    with torch.no_grad(), fastseg.explain() as report:
        y = block(x)
        with fastseg.reference():
            want = block(x)
    assert report.decisions[0][0:5:4] == ("inverted_residual", "triton")
    assert report.decisions[0].form == "whole" and ": model says whole " in report.decisions[0].why
    exact = one_by_one(block, x)
    assert close(y, exact) and close(want, exact) and y.is_contiguous(memory_format=CL)


def test_parts_say_why(device):
    block, x = build(RESIDUAL, device), image(device)
    wide = copy.deepcopy(block).float()
    reasons = {
        "inside fastseg.force()": lambda: fastseg.force("inverted_residual", "parts")(block)(x),
        "expansion and pair: not channels_last": lambda: block(x.contiguous()),
        "expansion and pair: the whole block is for 16 bits": lambda: wide(x.float()),
    }
    for why, call in reasons.items():
        with torch.no_grad(), fastseg.explain() as report:
            y = call()
        decisions = {d.op: d for d in report}
        assert decisions["inverted_residual"].why.startswith(why) and "separable_conv2d" in decisions
        assert close(y, one_by_one(block, x))


def test_watched_children_and_gradients_take_parts(whole, device):
    """Hooks see their modules called; training folds nothing."""
    x = image(device)

    def ops(block: InvertedResidual) -> set[str]:
        with fastseg.explain() as report:
            y = block(x)
        assert y.requires_grad or close(y, one_by_one(block, x))
        return {d.op for d in report}

    assert "inverted_residual" not in ops(build(RESIDUAL, device))  # parameters want gradients
    for index in (0, 1, 3, 4, 6, 7):
        block, seen = build(RESIDUAL, device), []
        block.conv[index].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        with torch.no_grad():
            assert "inverted_residual" not in ops(block) and seen
    block = build(RESIDUAL, device)
    block.conv[3].padding = (0, 0)
    block.residual = False
    with torch.no_grad():
        assert "inverted_residual" not in ops(block)


def test_changed_weights_are_folded_again(whole, device):
    block, x = build(RESIDUAL, device), image(device)
    with torch.no_grad():
        block(x)
        block.conv[4].running_mean.add_(1)
        block.conv[6].weight.mul_(2)
        assert close(block(x), one_by_one(block, x))


def test_compiled_code_holds_the_pair(whole, device):
    """A compiler folds and fuses the rest by itself, and decides with the sizes it sees."""
    graphs = []
    block, x = build(RESIDUAL, device), image(device)
    capture = lambda module, _: (graphs.append(module.graph), module.forward)[1]
    with torch.no_grad():
        y = torch.compile(block, fullgraph=True, backend=capture)(x)
    assert close(y, one_by_one(block, x))
    targets = [str(node.target) for graph in graphs for node in graph.nodes if "fastseg" in str(node.target)]
    assert targets == ["fastseg.batch_norm_act.default", "fastseg.separable_conv2d.default"]


@pytest.mark.skipif(not INTERPRETED, reason="counted on a CPU")
def test_launches_of_the_encoder():
    """MobileNetV2 at 512^2, one image, output stride 16. Counted, not run.

    One launch for the stem; one for the block without expansion, and one for a whole block; two for each other block.
    """
    from benchmarks.studies import launches  # sets the interpreter up

    model = MobileNetV2(output_stride=16).to(memory_format=CL).bfloat16().eval()
    x = torch.zeros(1, 3, 512, 512, dtype=torch.bfloat16).to(memory_format=CL)
    counts = launches.launches(model, x)
    assert counts["_inverted_residual_fwd_kernel"] == 1
    assert counts.total() == 1 + 1 + 1 + 15 * 2, counts
