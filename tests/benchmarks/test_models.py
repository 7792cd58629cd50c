"""Benchmarks of whole models: the providers compute the same, what a training step is, and the two tables."""

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_models, workloads
from benchmarks.report import tables
from fastseg import explain, reference

CPU = torch.device("cpu")


@pytest.fixture
def model_problem():
    return bench_models.Problem(replace(bench_models.SHAPES[0], H=64, W=64), CPU)


def test_the_eager_model_is_plain_and_agrees(model_problem):
    functions = model_problem.functions()
    with model_problem.context():
        with explain() as eager:
            functions["eager"]()
        with reference():  # the interpreter would take minutes
            with explain() as ours:
                functions["fastseg"]()
            assert model_problem.disagreement(functions) == ""
            model_problem.model.cls_conv.bias.add_(1)
            assert model_problem.disagreement(functions).startswith("fastseg is")
    assert {decision.why for decision in eager} == {"inside fastseg.unfused()"}
    assert {decision.why for decision in ours} == {"inside fastseg.reference()"}


def test_what_is_exported_for_a_peer_is_a_copy():
    """The exporter changes the mode of what it is given; eager would be timed in training mode."""
    from benchmarks.studies.convert import Logits

    model = torch.nn.BatchNorm2d(3).eval()
    Logits(model).train()
    assert not model.training


def test_a_training_step_of_a_model(monkeypatch):
    """U-Net: both providers give the same loss and gradients; the parameters keep none; bytes kept of both."""
    monkeypatch.setitem(bench_models.CREATED, "unet", ("unet", {"padding": "same", "norm": True, "widths": (8, 8)}))
    problem = bench_models.Problem(workloads.ModelShape("unet", 16, 16, 2, 3), CPU, "train")
    functions = problem.functions()
    with problem.context(), reference():
        assert [tuple(t.shape) for t in functions["fastseg"]()] == [(), (8, 3, 3, 3), (3, 8, 1, 1)]
        assert problem.disagreement(functions) == ""
        kept = [problem.kept_bytes(name) for name in ("eager", "fastseg")]
        assert all(bytes_ > 8 * 2 * 8 * 256 * 4 for bytes_ in kept) and problem.kept_bytes("compile") is None
        assert all(p.grad is None for p in problem.model.parameters())
        problem.model.outc.conv.bias.data.add_(1)
        assert problem.disagreement(functions) == ""  # the same for every class: softmax does not see it
        problem.model.outc.conv.bias.data[0] += 1
        assert problem.disagreement(functions).startswith("fastseg is")


def test_what_is_compiled_is_the_eager_model(model_problem, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or model)
    model_problem.device = torch.device("cuda")
    functions = model_problem.functions()
    assert compiled == [model_problem.plain]
    assert torch.equal(functions["compile"](), functions["eager"]())


def test_the_table_of_models():
    name = bench_models.label(bench_models.SHAPES[0])
    times = {("eager", False): 900.0, ("fastseg", False): 500.0, ("fastseg", True): 100.0}
    rows = [
        {"shape": name, "provider": provider, "cuda_graph": graph, "median_us": us, "images_per_s": 1e6 / us}
        | {"peak_mib": None if graph else us / 100, "kernels": 5}
        for (provider, graph), us in times.items()
    ]
    text = tables.models("NVIDIA_H200", {"models": {"tests": "passed", "rows": rows}})
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:] == ["900 / -", "-", "500 / 100", "10000", "9 / 5", "5 / 5"]


def test_the_table_of_training_steps():
    name = bench_models.label(bench_models.TRAINING[0])
    row = {"shape": name, "mode": "train", "cuda_graph": False, "images_per_s": 1.0, "peak_mib": 20.0, "kernels": 5}
    rows = [
        row | {"provider": "eager", "median_us": 9000.0, "kept_bytes": 8_000_000},
        row | {"provider": "fastseg", "median_us": 4500.0, "kept_bytes": 4_000_000},
    ]
    stages = {"models": {"tests": "passed", "rows": rows}}
    (line,) = [
        line for line in tables.models_train("NVIDIA_H200", stages).splitlines() if line.startswith(f"| {name} ")
    ]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:] == ["9.0", "-", "4.5", "2.00x", "", "20 / 20", "8 / 4"]
    assert tables.models("NVIDIA_H200", stages) == ""  # it shows evaluation, of which nothing was measured
