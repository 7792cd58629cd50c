"""Kernels compiled before a GPU is there: what a run would launch, found without one, and a cache that can be carried.

    python -m benchmarks.gpu.warm_cache [--seconds 600] [--target 90]

``make warm-cache`` does this with the GPU machine's own Triton (``make gpu-env``): the launches of the benchmarks are
found on ``meta`` tensors, those of the tests by running them interpreted (``--tests``), both as signatures in
``.triton-cache/signatures.pickle``; what there is time for is compiled into the same folder, without what a launch
does not need, below 64 MiB. ``gpu.py`` uses the folder, compiles what is missing there in processes side by side, and
says how many kernels came out of the cache: keys hash Triton's own files, so that another build finds none.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import record
from benchmarks.report.record import Log

CACHE = record.ROOT / ".triton-cache"
SIGNATURES = "signatures.pickle"
LIMIT = 64 * 2**20  # bytes of the folder
NEEDED = (".json", ".cubin", ".hsaco")  # of what Triton keeps of a kernel, what a launch and a look at its code read


def adopt(folder: Path) -> int:
    """Make a cache that was written elsewhere one of this place; -> its kernels.

    Triton keeps absolute paths in it: in a folder that moved, it finds nothing, and says nothing.
    """
    groups = list(folder.glob("*/__grp__*.json"))
    for group in groups:
        children = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.parent / name) for name in children if (group.parent / name).exists()}
        if here != children:
            group.write_text(json.dumps({"child_paths": here}))
    return len(groups)


def prune(folder: Path, limit: int = LIMIT) -> int:
    """Leave only what a launch needs, and drop the largest kernels past ``limit`` bytes; -> the folder's bytes."""
    for file in folder.glob("*/*"):
        if file.suffix not in NEEDED:
            file.unlink()
    adopt(folder)
    sizes = {kernel: sum(f.stat().st_size for f in kernel.iterdir()) for kernel in folder.iterdir() if kernel.is_dir()}
    total = sum(sizes.values()) + sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    for kernel in sorted(sizes, key=sizes.get, reverse=True):
        if total <= limit:
            break
        shutil.rmtree(kernel)
        total -= sizes[kernel]
    return total


def stage(log: Log, device: torch.device, tiny: bool) -> None:
    """The stage "compile": the kernels that were written down, those that the carried cache lacks, on all cores."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fastseg.kernels.tools import precompile

    path = CACHE / SIGNATURES
    if not path.exists():
        log.row(what="nothing to compile: `make warm-cache` writes what a run launches")
        return
    target = driver.active.get_current_target() if device.type == "cuda" else GPUTarget("cuda", 90, 32)
    wanted = precompile.read(path)[: 2 if tiny else None]
    done, failed, left = compile_all(wanted, target, None, log.time_left() - 5, log.path.with_name(record.COMPILATIONS))
    log.row(what="kernels compiled or found", done=done, failed=failed)
    if left:
        log.left_out.append(f"{left} kernels not compiled")


def compile_all(
    wanted: Iterable, target, folder: Path | None, seconds: float, noted: Path | None = None
) -> tuple[int, list[str], int]:
    """Compile signatures side by side; -> how many are there now, why others are not, and how many were not begun."""
    from fastseg.kernels.tools.precompile import Compiler

    compiler = Compiler(target, folder, noted=noted)
    try:
        futures = [compiler.submit(one) for one in wanted]
        wait(futures, timeout=max(seconds, 0))
        ended = [f.result() for f in futures if f.done()]
    finally:
        compiler.close()
    failed = [why for why in ended if why]
    return len(ended) - len(failed), failed, len(futures) - len(ended)


# What the benchmarks launch, on meta tensors.


class _Launchers(TorchDispatchMode):
    """Registered ops run what they run on CUDA, whatever their tensors are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastseg":
            with self:
                return func._op_dk(torch._C.DispatchKey.CUDA, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _library(x, weight, bias, *options):
    """The map that cuDNN's fused call would give."""
    return torch.convolution(x, weight, bias, *options[:3], False, (0, 0), options[3])


@contextmanager
def _as_on(gpu: str, autocast: bool) -> Iterator[None]:
    """Meta tensors count as those of a GPU: the ops' decisions, the tables, the dtype of the benchmarks, autocast."""
    from benchmarks import harness
    from fastseg.kernels.runtime import config
    from fastseg.ops import conv_act
    from fastseg.ops.core import dispatch

    enabled, context, request_of = torch.is_autocast_enabled, torch.autocast, conv_act.request_of
    on_cuda = {"device": "cuda", "cudnn": True, "deterministic": False}
    select = config.select
    as_cuda = lambda kernel, *, size, device, **key: select(kernel, size=size, device=torch.device("cuda", 0), **key)
    patches = [
        mock.patch.object(dispatch, "_no_kernel", lambda x: "" if x.dtype in dispatch.KERNEL_DTYPES else "dtype"),
        mock.patch.object(config, "table_names", lambda index: (gpu, "sm_90")),
        mock.patch.object(harness, "dtype_for", lambda device: torch.bfloat16),
        mock.patch.object(
            torch, "is_autocast_enabled", lambda kind="cuda": autocast if kind == "meta" else enabled(kind)
        ),
        mock.patch.object(
            torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == "meta" else context(kind, *a, **k)
        ),
        mock.patch.object(torch, "equal", lambda a, b: True),  # of indices with their own rounding to a format
        mock.patch.object(conv_act, "request_of", lambda *a, **k: request_of(*a, **k)._replace(**on_cuda)),
        mock.patch.object(torch, "cudnn_convolution_relu", _library),
        mock.patch.object(
            torch, "cudnn_convolution_add_relu", lambda x, w, z, alpha, bias, *options: _library(x, w, bias, *options)
        ),
    ]
    for module in list(sys.modules.values()):  # launchers have it by name
        if getattr(module, "__name__", "").startswith("fastseg.kernels") and getattr(module, "select", None) is select:
            patches.append(mock.patch.object(module, "select", as_cuda))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def of_benchmarks(modules: Sequence, say: Callable[[str], None] = print, gpu: str = "NVIDIA_H200") -> list:
    """The signatures of what each case of each benchmark launches."""
    from fastseg.kernels.tools.precompile import collected

    found = {}
    for module in modules:
        for case in module.cases("full"):
            try:
                with _as_on(gpu, case.build.func.autocast), collected() as launches:
                    problem = case.build(torch.device("meta"))
                    with problem.context(), _Launchers():
                        problem.function(problem.forms()["fastseg"])()
            except Exception as error:  # what a case does besides its kernels may need a device
                say(f"{case.op} {case.shape} {case.mode}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            found |= launches
    return list(found.values())


# What tests launch: a plugin, for a run under the interpreter.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--signatures", type=Path, help="file that gets the signatures of all launches")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("signatures")
    if path is not None:
        config.pluginmanager.register(_Signatures(path))


class _Signatures:
    """Notes every launch that the interpreter makes."""

    def __init__(self, path: Path):
        from triton.runtime.interpreter import InterpretedFunction

        from fastseg.kernels.tools.precompile import signature

        self.path, self.found = path, {}
        getitem = InterpretedFunction.__getitem__

        def noting(kernel, grid):
            launch = getitem(kernel, grid)

            def call(*args, **kwargs):
                one = signature(kernel, args, kwargs)
                self.found.setdefault(one.key, one)
                return launch(*args, **kwargs)

            return call

        InterpretedFunction.__getitem__ = noting

    def pytest_sessionfinish(self) -> None:
        from fastseg.kernels.tools import precompile

        kept = [one for one in self.found.values() if one.module.startswith("fastseg.")]
        precompile.write(self.path, [one for one in kept if "float64" not in one.key])  # no kernel of a GPU takes it


def main(argv: Sequence[str] | None = None) -> int:
    """Find the benchmarks' launches, compile what is known, prune the folder."""
    parser = argparse.ArgumentParser(description="Compile the kernels of benchmarks and tests without a GPU.")
    parser.add_argument("--seconds", type=float, default=600, help="for compiling (default 600)")
    parser.add_argument("--target", type=int, default=90, help="compute capability, 10 times (default 90)")
    parser.add_argument("--folder", type=Path, default=CACHE)
    options = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "0"
    from triton.backends.compiler import GPUTarget

    from benchmarks.gpu.ops import OPS
    from fastseg.kernels.tools import precompile

    options.folder.mkdir(exist_ok=True)
    path, begin = options.folder / SIGNATURES, time.monotonic()
    precompile.write(path, of_benchmarks(OPS))
    wanted = precompile.read(path)
    print(f"{len(wanted)} kernels, found in {time.monotonic() - begin:.0f} s", flush=True)
    adopt(options.folder)
    done, failed, left = compile_all(wanted, GPUTarget("cuda", options.target, 32), options.folder, options.seconds)
    print("".join(f"  {line}\n" for line in failed), end="")
    size = prune(options.folder)
    print(f"{done} kernels in {options.folder}, {size / 2**20:.0f} MiB; {left} left to the machine itself")
    return 0


if __name__ == "__main__":
    sys.exit(main())
