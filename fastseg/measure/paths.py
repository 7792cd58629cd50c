"""The paths of a latency study: one model called in eager PyTorch, as fastseg, compiled, or by a peer."""

import contextlib
import copy
import importlib.util
import io
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseg.exporting.file_model import FileModel
from fastseg.inference.graphs import captured
from fastseg.inference.runner import Runner
from fastseg.io.files import first_line
from fastseg.io.quiet import quiet
from fastseg.measure.comparison import eager_form
from fastseg.ops.core.kept import Kept, keeping, tensors_of
from fastseg.ops.core.torch_private import inductor_patch

CL = torch.channels_last


class Built(NamedTuple):
    """A path, ready to be timed."""

    call: Callable[[], object]
    counts: bool  # True if torch's dispatcher sees what runs


class Unavailable(Exception):
    """A path that cannot run here, and why."""


def _autocast(call: Callable[[], object], device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return call()

    return run


def _eager(model: nn.Module, x: Tensor, dtype: torch.dtype, memory_format=torch.contiguous_format) -> Built:
    plain, x = eager_form(model).to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
    return Built(_autocast(lambda: plain(x), x.device, dtype), counts=True)


def _fastseg(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Built:
    own, x = copy.deepcopy(model).to(memory_format=CL), x.contiguous(memory_format=CL)
    return Built(_autocast(lambda: own(x), x.device, dtype), counts=True)


def frozen_call(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Built:
    """As ``_fastseg``, what is made of the weights once: a graph must not make it again at each replay."""
    own, x = copy.deepcopy(model).to(memory_format=CL), x.contiguous(memory_format=CL)
    kept = Kept(tensors_of(own))

    def call() -> object:
        with keeping(kept):
            return own(x)

    return Built(_autocast(call, x.device, dtype), counts=True)


def _runner(model: nn.Module, x: Tensor, dtype: torch.dtype, exact: bool = False) -> Built:
    runner = Runner(model, x, dtype=None if dtype == torch.float32 else dtype, exact=exact)
    return Built(lambda: runner(x), counts=x.device.type != "cuda")


def _graph(build: Callable[..., Built]) -> Callable[..., Built]:
    def built(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Built:
        if x.device.type != "cuda":
            raise Unavailable("graphs are of CUDA")
        call = build(model, x, dtype).call
        replay = captured(call)
        return Built(lambda held=call: replay(), counts=False)  # held: the graph reads the weights' memory

    return built


def _compiled(mode: str | None, freezing: bool = False) -> Callable[..., Built]:
    def built(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Built:
        plain, x = eager_form(model).requires_grad_(False).to(memory_format=CL), x.contiguous(memory_format=CL)
        torch.compiler.reset()
        compiled = torch.compile(plain, mode=mode, dynamic=False)
        call = _autocast(lambda: compiled(x), x.device, dtype)
        try:
            with quiet(), inductor_patch(freezing=True) if freezing else contextlib.nullcontext():
                call()
        except Exception as error:  # no compiler, or an op that it cannot take: the study goes on
            raise Unavailable(f"torch.compile: {first_line(error)}") from error
        return Built(call, counts=False)

    return built


def _onnx(model: nn.Module, x: Tensor, dtype: torch.dtype) -> bytes:
    """The eager form as an ONNX file."""
    if dtype != torch.float32 or x.device.type != "cpu":
        raise Unavailable(f"it is measured in fp32 on a CPU only, not in {str(dtype)[6:]} on {x.device.type}")
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed")
    buffer = io.BytesIO()
    try:
        with quiet():
            torch.onnx.export(eager_form(model), (x,), dynamo=True, verbose=False).save(buffer)
    except Exception as error:
        raise Unavailable(f"ONNX export: {first_line(error)}") from error
    return buffer.getvalue()


def _onnxruntime(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Built:
    if importlib.util.find_spec("onnxruntime") is None:
        raise Unavailable("onnxruntime is not installed")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_onnx(model, x, dtype), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return Built(lambda: session.run(None, feed), counts=False)


def _openvino(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Built:
    if importlib.util.find_spec("openvino") is None:
        raise Unavailable("openvino is not installed")
    import openvino

    core = openvino.Core()
    network = core.compile_model(
        core.read_model(_onnx(model, x, dtype)), "CPU",
        {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"},
    )  # fmt: skip
    request, feed = network.create_infer_request(), x.numpy()
    return Built(lambda: request.infer([feed]), counts=False)


def _file(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Built:
    if not isinstance(model, FileModel):
        raise Unavailable("it is of exported files, FILE.onnx and FILE.pt2")
    if dtype != torch.float32:
        raise Unavailable(f"a file runs in its own dtype, not in {str(dtype)[6:]}")
    return Built(lambda: model.run(x), counts=False)


FILE = "file"
PATHS: dict[str, Callable[[nn.Module, Tensor, torch.dtype], Built]] = {
    "eager": _eager,
    "eager-cl": lambda *args: _eager(*args, memory_format=CL),
    "fastseg": _fastseg,
    "runner": _runner,
    "runner-exact": lambda *args: _runner(*args, exact=True),
    "eager-cl-graph": _graph(lambda *args: _eager(*args, memory_format=CL)),
    "fastseg-graph": _graph(frozen_call),
    "compile": _compiled(None),
    "compile-max": _compiled("max-autotune"),
    "compile-freeze": _compiled(None, freezing=True),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    FILE: _file,
}
