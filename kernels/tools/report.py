"""What every kernel compiles to on each chip, on any machine: registers, spills, occupancy, instructions, offsets.

``compile_launches`` calls ordinary launchers on ``meta`` tensors and compiles each launch instead of running it: the
report is about the code and the configuration that the launcher would run. As a command (in a process without Triton's
interpreter) it prints the cases of ``cases/`` and fails if a kernel breaks its claims:

    TRITON_INTERPRET=0 python -P -m fastseg.kernels.tools.report --target sm_90
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastseg.kernels.runtime import tensors
from fastseg.kernels.runtime.launch import intercept
from fastseg.kernels.tools import cases
from fastseg.kernels.tools.cases import Claims
from fastseg.kernels.tools.int32_offsets import i32_overflows
from fastseg.kernels.tools.machine_code import Code, read_code
from fastseg.kernels.tools.triton_private import DriverBase, GPUTarget, JITFunction, active_driver, driver


@dataclass(frozen=True)
class Target:
    """A chip: what one block may use, and what one multiprocessor (SM, CU) has.

    Attributes:
        gpu: the chip as Triton's compiler names it.
        block_shared: most shared memory of one block, bytes.
        warps, blocks, shared: per multiprocessor; shared memory in bytes.
        matrix: the chip's own matrix instruction for fp16 and bf16.
    """

    gpu: GPUTarget
    block_shared: int
    warps: int
    blocks: int
    shared: int
    matrix: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, 64, 32, 167936, "HMMA"),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * 1024, 48, 16, 102400, "HMMA"),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * 1024, 48, 24, 102400, "HMMA"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, 64, 32, 233472, "HGMMA"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, 64, 32, 233472, "UTCHMMA"),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024, 48, 24, 102400, "HMMA"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 32, 32, 65536, "v_mfma"),
    "gfx950": Target(GPUTarget("hip", "gfx950", 64), 160 * 1024, 32, 32, 163840, "v_mfma"),
}
COMMON = ("sm_80", "sm_90", "sm_100", "gfx942")  # compiled for in every case; the others in the main ones


@dataclass
class KernelReport:
    """One kernel in one specialisation, compiled for one target.

    Attributes:
        config: its compile-time arguments (block sizes, flags).
        shared: bytes per block.
        blocks, limiter, occupancy: resident blocks per multiprocessor, what bounds them, and the share of warp slots
            that they fill. For AMD an estimate, from the waves that the compiler says fit.
        tf32: the code rounds fp32 operands to tf32 (AMD: xf32).
        overflows: offsets that leave 32 bits, over all launches of this specialisation (``int32_offsets.py``).
        elements: of the largest tensor among those launches.
        seconds: compilation time.
    """

    kernel: str
    target: str
    config: dict[str, object]
    num_warps: int
    num_stages: int
    shared: int
    blocks: int
    limiter: str
    occupancy: float
    tf32: bool
    code: Code
    overflows: list[str] = field(default_factory=list)
    elements: int = 0
    seconds: float = 0.0


def occupancy(target: Target, num_warps: int, code: Code, shared: int) -> tuple[int, str]:
    """Resident blocks per multiprocessor, and what limits them; equal to NVIDIA's ``cuda_occupancy.h``."""
    if target.gpu.backend == "hip":
        bounds = {"registers": 4 * code.waves // num_warps, "shared": target.shared // max(shared, 1)}  # 4 SIMDs a CU
    else:
        warp_registers = max(-(-32 * code.registers // 256), 1) * 256
        bounds = {
            "registers": 16384 // warp_registers * 4 // num_warps,
            "shared": target.shared // (shared + 1024),  # 1 KiB of each block is the system's
        }
    bounds |= {"warps": target.warps // num_warps, "blocks": target.blocks}
    limiter = min(bounds, key=bounds.get)
    return bounds[limiter], limiter


class Launched(NamedTuple):
    """One launch that was compiled: its kernel's report and code, its arguments by name, its grid."""

    report: KernelReport
    arguments: dict[str, object]
    grid: tuple[int, ...]
    ttir: str
    cubin: bytes  # b"" for AMD


def compile_launches(
    fn: Callable[[], object],
    target: str,
    progress: Callable[[KernelReport], None] = lambda report: None,
    each: Callable[[Launched], None] = lambda launched: None,
    wanted: Callable[[str], bool] = lambda kernel: True,
) -> list[KernelReport]:
    """Compile every launch that ``fn()`` would make, for ``target``; nothing is launched.

    Args:
        fn: calls launchers with ``meta`` tensors. Fresh ones count as aligned; a view is as aligned as its offset.
        target: a name of ``TARGETS``.
        progress: called after each compilation.
        each: called for each launch.
        wanted: whether a kernel of this name is looked at; the others are left out.

    Returns:
        One report per kernel and specialisation, in the order of the first launch.

    Raises:
        RuntimeError: the kernels are interpreted, or one does not compile.
    """
    reports: dict[str, KernelReport] = {}

    def on_launch(kernel, grid: tuple[int, ...], args: tuple, kwargs: dict) -> None:
        name = kernel.fn.__name__
        if not wanted(name):
            return
        if not isinstance(kernel, JITFunction):
            raise RuntimeError(f"compile_launches: {name} is interpreted; start the process with TRITON_INTERPRET=0")
        if TARGETS[target].gpu.backend == "hip":
            kwargs.pop("maxnreg", None)  # as `config.launch` does on such a GPU
        begin = time.perf_counter()
        try:
            compiled = kernel.warmup(*args, grid=grid, **kwargs)
        except Exception as error:
            raise RuntimeError(f"compile_launches: {name} does not compile for {target}: {error}") from error
        named = {key: value for key, value in kwargs.items() if key in kernel.arg_names}
        bound = kernel.signature.bind(*args, **named).arguments
        if compiled.hash not in reports:
            constants = {p.name: bound[p.name] for p in kernel.params if p.is_constexpr and p.name in bound}
            reports[compiled.hash] = _report(name, target, compiled, constants)
            reports[compiled.hash].seconds = time.perf_counter() - begin
            progress(reports[compiled.hash])
        report = reports[compiled.hash]
        found = i32_overflows(compiled.asm["ttir"], bound, grid)
        report.overflows += [text for text in found if text not in report.overflows]
        report.elements = max([report.elements, *(a.numel() for a in bound.values() if isinstance(a, Tensor))])
        each(Launched(report, _flat(bound), grid, compiled.asm["ttir"], compiled.asm.get("cubin", b"")))

    with _ahead_of_time(TARGETS[target].gpu), intercept(on_launch):
        fn()
    return list(reports.values())


def _flat(arguments: dict[str, object]) -> dict[str, object]:
    """Tuples as Triton names their parts: ``w_ptrs.0``."""
    parts: dict[str, object] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            parts |= _flat({f"{name}.{i}": part for i, part in enumerate(value)})
        else:
            parts[name] = value
    return parts


def _report(name: str, target: str, compiled, constants: dict[str, object]) -> KernelReport:
    meta, code, chip = compiled.metadata, read_code(compiled.asm), TARGETS[target]
    blocks, limiter = occupancy(chip, meta.num_warps, code, meta.shared)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return KernelReport(
        kernel=name, target=target, config=constants, num_warps=meta.num_warps, num_stages=meta.num_stages,
        shared=meta.shared, blocks=blocks, limiter=limiter, occupancy=blocks * meta.num_warps / chip.warps,
        tf32=re.search(r"[.:]tf32\b|_xf32\b", text) is not None, code=code,
    )  # fmt: skip


class _CompileOnly(DriverBase):
    """Answers "which target?" and nothing else: enough for Triton to compile without a device."""

    def __init__(self, gpu: GPUTarget):
        self.gpu = gpu

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> str:
        return f"{self.gpu.backend}:{self.gpu.arch}"  # the key of the JIT's cache in memory

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Callable:
        return lambda fn, **options: [1.0, 1.0, 1.0]


@contextmanager
def _ahead_of_time(gpu: GPUTarget) -> Iterator[None]:
    """Inside the block Triton compiles for ``gpu``, into a temporary cache folder."""
    # reset_active() looks for a device, and fails where there is none
    saved, arch = active_driver(), tensors.amd_arch
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        driver.set_active(_CompileOnly(gpu))
        tensors.amd_arch = lambda device: str(gpu.arch) if gpu.backend == "hip" else ""
        try:
            yield
        finally:
            tensors.amd_arch = arch
            driver.set_active(saved)


def broken_claims(report: KernelReport, claims: Claims) -> list[str]:
    """Return where ``report`` breaks the rules of all kernels (spills, shared memory, offsets) or its own claims."""
    target, code = TARGETS[report.target], report.code
    matrix = {target.matrix, "HMMA"} if claims.small_tile else {target.matrix}
    broken = {
        f"{code.spills} spills, {code.stack} bytes of stack": code.spills > claims.spills
        or (code.stack and not claims.spills),
        f"{report.shared} bytes of shared memory, {target.block_shared} allowed": report.shared > target.block_shared,
        f"no {' or '.join(sorted(matrix))}, has {code.matrix}": claims.matrix
        and not any(code.matrix.get(name) for name in matrix),
        f"no 128-bit global load, has {code.loads}": claims.vector and not _loads(code, wide=True),
        "tf32, where fp32 was asked for": report.tf32 and not claims.tf32,
    }
    return [text for text, is_broken in broken.items() if is_broken] + report.overflows


def _loads(code: Code, *, wide: bool) -> int:
    return sum(n for name, n in code.loads.items() if wide == name.endswith(("128", "256", "UTMALDG")))


def table(reports: Sequence[KernelReport]) -> str:
    """The reports as text, one line each."""
    head = (
        "kernel", "target", "blocks", "warps", "stages", "regs", "spills", "stack", "shared", "occ", "per SM", "limit",
        "matrix", "loads", "stores", "instr", "i32",
    )  # fmt: skip
    rows = [head]
    for r in reports:
        blocks = "x".join(str(value) for name, value in r.config.items() if name.startswith("BLOCK"))
        rows.append((
            r.kernel.strip("_").removesuffix("_kernel"), r.target, blocks, r.num_warps, r.num_stages, r.code.registers,
            r.code.spills, r.code.stack, r.shared, f"{r.occupancy:.2f}", r.blocks, r.limiter, _counts(r.code.matrix),
            _counts(r.code.loads), _counts(r.code.stores), r.code.instructions, len(r.overflows) or "ok",
        ))  # fmt: skip
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{n}*{name}" for name, n in sorted(counts.items()) if n) or "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report of ``cases.CASES``; 1 if a kernel breaks a claim, else 0."""
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time and report what came out.")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; all without it")
    parser.add_argument("--case", action="append", choices=cases.CASES, help="may be repeated; all without it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there as well")
    options = parser.parse_args(argv)
    written, broken = [], []
    for case in options.case or cases.CASES:
        for dtype in cases.DTYPES:
            for target in options.target or TARGETS:
                label = f"{case} {str(dtype).removeprefix('torch.')}"

                def progress(r: KernelReport, label: str = label) -> None:
                    print(f"{label}: {r.kernel} for {r.target}, {r.seconds:.1f} s", file=sys.stderr, flush=True)

                reports = compile_launches(lambda c=case, d=dtype: cases.CASES[c](d), target, progress)
                print(f"\n{label}\n{table(reports)}", flush=True)
                for r in reports:
                    faults = broken_claims(r, cases.claims_of(case, r.kernel, dtype))
                    broken += [f"{label}, {r.kernel} for {target}: {fault}" for fault in faults]
                    written.append({"case": case, "dtype": str(dtype), **asdict(r), "broken": faults})
    if options.json is not None:
        options.json.write_text(json.dumps(written, indent=1, default=str))
    print(f"\n{len(written)} kernels compiled with Triton {triton.__version__}, {len(broken)} claims broken")
    print("".join(f"  {line}\n" for line in broken), end="")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
