"""An answer as an ONNX file, and such a file as a function."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastseg.exporting.answer import NAMES
from fastseg.exporting.trace import Traced
from fastseg.io.files import first_line
from fastseg.io.quiet import quiet

LARGEST = 2**31 - 1  # bytes of a protobuf message
Run = Callable[[Tensor], tuple[Tensor, ...]]


def packages_missing() -> str:
    """What writing needs and is not there, or ""."""
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    return " and ".join(absent)


def runtime_missing() -> bool:
    return importlib.util.find_spec("onnxruntime") is None


def onnx_bytes(traced: Traced, output: str, facts: Mapping[str, str]) -> bytes:
    """The file's contents; ``facts`` become its metadata.

    Raises:
        ValueError: ONNX lacks an operator, or the file would exceed 2 GiB.
    """
    names = {place: name for name, place in traced.axes.items() if name in traced.free}
    try:
        with quiet():
            file = torch.onnx.export(
                traced.program, (traced.example,), dynamo=True, verbose=False, input_names=["image"],
                output_names=list(NAMES[output]), dynamic_shapes=(names,) if names else None,
            )  # fmt: skip
    except Exception as error:  # of the exporter's many kinds
        raise ValueError(f"export: {_fault(error)}") from error
    assert file is not None  # None is of the old exporter
    file.model.producer_name = "fastseg"
    file.model.metadata_props.update(facts)
    proto = file.model_proto
    if proto.ByteSize() > LARGEST:
        raise ValueError(f"export: {proto.ByteSize()} bytes; an ONNX file holds at most {LARGEST}")
    return proto.SerializeToString()


def _fault(error: BaseException) -> str:
    """One line: the operator that ONNX lacks, or the innermost reason."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for cause in causes:
        found = re.search(r"No (?:ONNX function|decompositions?)[^<]*<[^']*'?([\w.:]+)'?", str(cause))
        if found:
            return f"ONNX has no operator for {found[1]}"
    return f"ONNX: {first_line(causes[-1])}"


def open_onnx(path: Path) -> tuple[Run, dict[str, str], tuple[str, ...]]:
    """Run, metadata, and the kinds of the outputs ("float" or "int" and dimensions) of a file, by onnxruntime on a CPU.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: it cannot read the file.
    """
    if runtime_missing():
        raise ImportError(f"{path}: onnxruntime is not installed: pip install onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own kinds, which share no base
        raise ValueError(f"{path}: onnxruntime cannot read it: {first_line(error)}") from None
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ValueError(f"{path}: takes {len(inputs)} inputs; one picture is given")

    def run(x: Tensor) -> tuple[Tensor, ...]:
        try:
            found = session.run(None, {inputs[0].name: x.detach().cpu().contiguous().numpy()})
        except Exception as error:
            raise ValueError(f"{path}: onnxruntime: {first_line(error)}") from None
        return tuple(torch.from_numpy(np.asarray(y)).to(x.device) for y in found)

    about = session.get_modelmeta().custom_metadata_map
    return run, dict(about), tuple(f"{one.type}{len(one.shape)}" for one in session.get_outputs())
