"""Every kernel of the project, as its launchers launch it, keeps its budgets on every chip."""

import ast
import functools
from pathlib import Path

import pytest
import torch

from fastseg.kernels.tools import cases
from fastseg.kernels.tools.report import COMMON, TARGETS, KernelReport, broken_claims, compile_launches

KERNELS = Path(cases.__file__).parents[2]
ROWS = [pytest.param(c, d, id=f"{c}-{str(d).removeprefix('torch.')}") for c in cases.CASES for d in cases.DTYPES]


@functools.cache
def reports(case: str, dtype, target: str) -> list[KernelReport]:
    return compile_launches(lambda: cases.CASES[case](dtype), target)


# The heavy kernels, in bf16, on chips with 100 KB of shared memory a multiprocessor.
MAIN = ("decoder 304->256", "decoder 304->256, backward", "MobileNetV2 960->160, dilated")
TRIED = [
    *(pytest.param(*row.values, target, id=f"{row.id}-{target}") for row in ROWS for target in COMMON),
    *(
        pytest.param(case, torch.bfloat16, target, id=f"{case}-bfloat16-{target}")
        for case in MAIN
        for target in TARGETS
        if target not in COMMON
    ),
]


@pytest.mark.parametrize("case, dtype, target", TRIED)
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
    for case, dtype in ((c, d) for c in cases.CASES for d in cases.DTYPES):
        found = reports(case, dtype, "sm_90")
        for r in found:
            largest[r.kernel] = max(largest.get(r.kernel, 0), *(other.elements for other in found))
    assert sorted(written - set(largest)) == [], "no case of kernels/tools/cases/__init__.py launches these kernels"
    assert sorted(k for k in largest if largest[k] <= 2**31) == [], "no case with these goes past 2^31 elements"


def test_claims_name_what_exists():
    kernels = {r.kernel for case in cases.CASES for d in cases.DTYPES for r in reports(case, d, "sm_90")}
    assert kernels >= cases.MATRIX_KERNELS
    assert set(cases.SCALAR_LOADS) <= kernels | set(cases.CASES)
    assert set(cases.CASES) >= cases.SMALL_TILE_CASES | cases.TF32_CASES
