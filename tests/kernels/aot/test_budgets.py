"""Every kernel of the project, as its launchers launch it, keeps its budgets on every chip.

Every case is compiled for sm_90 in bf16. In fp32, and for gfx942, the first of each kernel; for the other NVIDIA chips,
whose compiler is that of sm_90, the first of each kernel with matrix instructions; for the chips beside these the
heaviest kernel. The rest with ``--long``: those cases differ in shapes alone, which sm_90 has all of.
"""

import ast
import contextlib
import functools
from pathlib import Path

import pytest
import torch
import triton

from fastseg.kernels.atrous_conv.regions import Branch
from fastseg.kernels.atrous_conv.tables import tables
from fastseg.kernels.runtime.launch import intercept
from fastseg.kernels.tools import cases, machine_code, report
from fastseg.kernels.tools.report import COMMON, TARGETS, KernelReport, broken_claims, compile_launches

KERNELS = Path(cases.__file__).parents[2]
HEAVIEST = "decoder 304->256"  # for chips with 100 KB of shared memory a multiprocessor


def rows():
    """Case, dtype, chip; marked ``long`` where another row stands for it."""
    seen: set[str] = set()
    for case, call in cases.CASES.items():
        kernels: set[str] = set()
        with intercept(lambda kernel, *_, kernels=kernels: kernels.add(kernel.fn.__name__)):
            call(torch.bfloat16)
        first, seen = kernels - seen, seen | kernels
        for dtype in cases.DTYPES:
            half = dtype == torch.bfloat16
            short = {"sm_90": half or bool(first), "gfx942": half and bool(first)}
            other = half and bool(first & cases.MATRIX_KERNELS)
            for target in TARGETS:
                keep = short.get(target, other) if target in COMMON else half and case == HEAVIEST
                marks = [] if keep else [pytest.mark.long]
                yield pytest.param(case, dtype, target, id=f"{case}-{str(dtype)[6:]}-{target}", marks=marks)


@functools.cache
def reports(case: str, dtype, target: str) -> list[KernelReport]:
    return compile_launches(lambda: cases.CASES[case](dtype), target)


@pytest.fixture(scope="module", autouse=True)
def _read_together(request) -> None:
    """Compiles the rows that will run, and reads their machine code in one process for each chip."""
    chosen: dict[str, list] = {}
    for item in request.session.items:
        if item.nodeid.partition("[")[0].endswith("test_budgets.py::test_claims"):
            case, dtype, target = (item.callspec.params[name] for name in ("case", "dtype", "target"))
            chosen.setdefault(target, []).append((case, dtype))
    for target, calls in chosen.items():
        cubins = []

        def kept(asm, cubins=cubins):
            cubins.append(asm.get("cubin", b""))
            return machine_code.Code(registers=1, spills=0, stack=0, instructions=1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "read_code", kept)
            patch.setattr(triton.knobs.compilation, "disable_line_info", True)  # changes no instruction; a tenth
            for case, dtype in calls:
                with contextlib.suppress(RuntimeError):  # of a row, which says so
                    compile_launches(lambda case=case, dtype=dtype: cases.CASES[case](dtype), target)
        if TARGETS[target].gpu.backend == "cuda":
            machine_code.read_together(cubins, TARGETS[target].gpu.arch)


def test_read_together_or_alone_the_counts_are_the_same(monkeypatch):
    cubins: dict[bytes, None] = {}
    for case in list(cases.CASES)[::20]:
        compile_launches(lambda case=case: cases.CASES[case](torch.bfloat16), "sm_90",
                         each=lambda one: cubins.update({one.cubin: None}))  # fmt: skip
    monkeypatch.setattr(machine_code, "known", {})
    machine_code.read_together(cubins, 90)
    assert len(machine_code.known) == len(cubins) > 2
    for cubin in cubins:
        assert machine_code.read_code({"cubin": cubin}) == machine_code.read_sass(machine_code.dump(cubin))


@pytest.mark.parametrize("case, dtype, target", rows())
def test_claims(case, dtype, target):
    found = reports(case, dtype, target)
    assert found, f"case {case} launches nothing"
    broken = [f"{r.kernel}: {b}" for r in found for b in broken_claims(r, cases.claims_of(case, r.kernel, dtype))]
    assert not broken, "\n".join(broken)


def test_every_kernel_has_a_case_and_a_large_one():
    written = set()
    for path in KERNELS.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                written.add(node.name)
    largest: dict[str, int] = {}  # kernel -> elements of the largest map among the cases that reach it
    for case in cases.CASES:
        found = reports(case, torch.bfloat16, "sm_90")
        for r in found:
            largest[r.kernel] = max(largest.get(r.kernel, 0), *(other.elements for other in found))
    assert sorted(written - set(largest)) == [], "no case of kernels/tools/cases/__init__.py launches these kernels"
    assert sorted(k for k in largest if largest[k] <= 2**31) == [], "no case with these goes past 2^31 elements"


def test_tables_of_two_mirrored_branches_compile():
    """They did not with Triton 3.7: a layout conversion was moved before what it converts (`atrous_conv/tables.py`)."""
    x = torch.empty(2, 64, 33, 33, dtype=torch.bfloat16, device="meta")
    (found,) = compile_launches(lambda: tables(x, (Branch(3, 6), Branch(3, 12)), 64, mirrored=True), "sm_90")
    assert broken_claims(found, cases.Claims(vector=False)) == []


def test_claims_name_what_exists():
    kernels = {r.kernel for case in cases.CASES for r in reports(case, torch.bfloat16, "sm_90")}
    assert kernels >= cases.MATRIX_KERNELS
    assert set(cases.SCALAR_LOADS) <= kernels | set(cases.CASES)
    assert set(cases.CASES) >= cases.SMALL_TILE_CASES | cases.TF32_CASES
