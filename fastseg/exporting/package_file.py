"""An answer as an AOTInductor package, and such a package as a function."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastseg.exporting.ceil_pools import CEIL_POOLS
from fastseg.exporting.onnx_file import Run
from fastseg.exporting.trace import Traced
from fastseg.io.files import first_line
from fastseg.io.quiet import quiet
from fastseg.ops.core.torch_private import aoti_compiler, aoti_loader


def write_package(traced: Traced, path: Path, facts: Mapping[str, str]) -> None:
    """Compile the graph into the file ``path``, which ends in ``.pt2``; ``facts`` become its metadata.

    Raises:
        ValueError: this torch has no AOTInductor, or it cannot compile the graph here.
    """
    compile_and_package = aoti_compiler()
    if compile_and_package is None:
        raise ValueError(f"export: torch {torch.__version__} has no AOTInductor; write .onnx")
    program = traced.program
    try:
        with quiet():
            if {"height", "width"} & set(traced.free):
                program = program.run_decompositions(CEIL_POOLS)
            compile_and_package(
                program, package_path=str(path), inductor_configs={"aot_inductor.metadata": dict(facts)}
            )
    except Exception as error:  # no C++ compiler, or an op that Inductor cannot take
        raise ValueError(f"export: AOTInductor: {first_line(error)}") from error


def open_package(path: Path) -> tuple[Run, dict[str, str]]:
    """Run and metadata of a package.

    Raises:
        ValueError: torch cannot load it here.
    """
    load = aoti_loader()
    if load is None:
        raise ValueError(f"{path}: torch {torch.__version__} loads no AOTInductor packages")
    try:
        with quiet():
            package = load(str(path))
        about = dict(package.loader.get_metadata())
    except Exception as error:  # no package, or one of another machine
        raise ValueError(f"{path}: no AOTInductor package that runs here: {first_line(error)}") from None
    device = torch.device("cuda" if about.get("AOTI_DEVICE_KEY", "cpu") == "cuda" else "cpu")

    def run(x: Tensor) -> tuple[Tensor, ...]:
        try:
            found = package(x.detach().to(device).contiguous())  # it reads other strides as if they were these
        except RuntimeError as error:
            raise ValueError(f"{path}: {first_line(error)}") from None
        return tuple(y.to(x.device) for y in (found if isinstance(found, (list, tuple)) else (found,)))

    return run, about
