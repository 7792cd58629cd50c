"""Every model among torch's tools: one graph under ``torch.compile``, export with other sizes, ONNX; as a Runner."""

import pytest
import torch
from nets import NARROW, unsettle
from torch import nn
from torch.export import Dim

from fastseg.inference import Runner
from fastseg.models import create, names
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.ops.core.register import DECOMPOSITIONS

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the ops' graphs are tested one by one; whole models take minutes")


@pytest.fixture(params=names())
def model(request) -> nn.Module:
    return unsettle(create(request.param, 3, **NARROW[request.param])).float().eval()


def _named(*short: str) -> list:
    """Every model; those not among ``short``, whose parts others have too, with --long."""
    return [pytest.param(name, marks=[] if name in short else [pytest.mark.long]) for name in names()]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item())


# An FCN: test_fcn_graphs.py; a U-Net and UNet++: test_unet_graphs.py.
@pytest.mark.parametrize("model", _named("deeplabv3", "segnet_basic"), indirect=True)
def test_compile_in_one_graph(model):
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("name", ["unet", pytest.param("unetplusplus", marks=pytest.mark.long)])
def test_compile_for_any_size(name):
    model = unsettle(create(name, 3, **NARROW[name] | {"widths": (4, 8)})).float().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for x in (torch.randn(1, 3, 64, 96), torch.randn(2, 3, 96, 64)):
            close(compiled(x), model(x))


@pytest.mark.parametrize("model", _named("deeplabv3", "deeplabv3plus", "fcn", "segnet", "unetplusplus"), indirect=True)
def test_export_for_any_size(model):
    """Of the batch too; captured at a size that no stride divides, called at others of every remainder."""
    sides = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(2, 3, 67, 94),), dynamic_shapes=(sides,))
    for size in ((3, 3, 64, 96), (1, 3, 81, 53)):
        x = torch.randn(size)
        with torch.no_grad():
            close(program.module()(x), model(x))


@pytest.mark.parametrize("recorded", [False, pytest.param(True, marks=pytest.mark.long)])
def test_jit_trace(model, recorded):
    """In torch's own ops, at other sizes too; parameters stay variables, with norms that could be folded too."""
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(model, torch.randn(1, 3, 48, 64), check_trace=False)
    assert "fastseg::" not in str(traced.inlined_graph)
    with torch.no_grad():
        for p in model.parameters():  # the trace shares them
            p *= 0.9 if p.requires_grad else 1
        for size in ((1, 3, 48, 64), (2, 3, 35, 50)):
            x = torch.randn(size)
            close(traced(x), model(x))


@pytest.mark.parametrize("model", ["deeplabv3", "fcn", "segnet", "unetplusplus"], indirect=True)
def test_a_trace_of_a_class_map_holds_for_other_sizes(model):
    model.requires_grad_(False)
    predict = lambda x: model.predict(x)
    traced = torch.jit.trace(predict, torch.randn(1, 3, 48, 64), check_trace=False)
    x = torch.randn(2, 3, 35, 50)
    got, want = traced(x), predict(x)
    assert got.shape == want.shape and (got == want).float().mean() > 0.999


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("model", ["deeplabv3plus", "fcn", "segnet"], indirect=True)
def test_onnx_by_trace(model, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    with torch.no_grad():
        torch.onnx.export(model, (torch.randn(1, 3, 48, 64),), tmp_path / "model.onnx", dynamo=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        x = torch.randn(1, 3, 48, 64)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        close(torch.from_numpy(got), model(x))


# Without kernels their graphs are torch's own: the ops of the other models are in test_onnx_by_trace, and the table of
# decompositions in tests/ops/*/test_graphs.py.
@pytest.mark.parametrize("model", _named("deeplabv3", "unetplusplus"), indirect=True)
def test_onnx(model, tmp_path):
    """In onnxruntime, through the table of decompositions."""
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    onnxruntime = pytest.importorskip("onnxruntime")
    x = torch.randn(1, 3, 64, 96)
    program = torch.export.export(model, (x,)).run_decompositions(DECOMPOSITIONS)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        close(torch.from_numpy(got), model(x))


def test_runner(model):
    """At a size that returns and at others; on wide layers: tests/ops/dense_conv/test_packed.py, test_runner.py."""
    x = torch.randn(1, 3, 64, 96)
    runner = Runner(model, x)
    for image in (x, torch.randn(2, 3, 65, 47)):
        with torch.no_grad():
            close(runner(image), model(image))
            agree = runner.predict(image) == model.predict(image)
        assert agree.float().mean() > 0.999  # ties of rounded logits
