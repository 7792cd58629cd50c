"""The rules that hold for every file, checked on its syntax tree; each rule is shown to bite on a planted violation."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from references import references_are_torchs
from syntax import ROOT, SOURCES, Finding, Rule, calls, findings_of, keywords, module_of, room_of

LINES = 400

# room: (rooms of fastseg it may import, packages besides the standard library; None: any)
ROOMS = {
    "kernels": ({"kernels"}, {"torch", "triton"}),
    "ops": ({"ops", "kernels"}, {"torch"}),
    "nn": ({"nn", "ops"}, {"torch"}),
    "losses": ({"losses", "ops"}, {"torch"}),
    "models": ({"models", "nn", "metrics"}, {"torch", "safetensors"}),
    "io": ({"io", "models", "nn", "ops"}, {"torch", "numpy", "PIL", "safetensors", "tqdm", "skimage"}),
    "optimizing": ({"optimizing", "io", "measure", "nn", "ops"}, {"torch"}),
    "inference": ({"inference", "io", "models", "nn", "ops", "optimizing"}, {"torch", "numpy", "PIL", "tqdm"}),
    "measure": (
        {"measure", "exporting", "inference", "io", "models", "nn", "ops"},
        {"torch", "numpy", "matplotlib", "onnxruntime", "openvino"},
    ),
    "integrations": ({"integrations", "ops"}, {"torch", "numpy", "nnunetv2"}),
    "exporting": ({"exporting", "inference", "io", "models", "nn", "ops"}, {"torch", "numpy", "onnxruntime"}),
    "converting": ({"converting", "measure", "nn", "ops"}, {"torch"}),
    "training": (
        {"training", "inference", "io", "losses", "metrics", "models", "nn", "ops"},
        {"torch", "numpy", "PIL", "matplotlib"},
    ),
    "demo": (
        {"demo", "inference", "io", "losses", "measure", "metrics", "models", "training"},
        {"torch", "numpy", "PIL"},
    ),
    "metrics": ({"metrics", "ops"}, {"torch", "numpy"}),
    "cli": (
        {"cli", "", "demo", "exporting", "inference", "io", "losses", "measure", "training", "metrics", "models", "nn",
         "ops", "kernels", "testing"},
        None,
    ),
    "testing": ({"testing"}, {"torch"}),
    "__main__": ({"cli"}, set()),
    "": (  # __init__.py
        {"", "converting", "demo", "exporting", "inference", "io", "measure", "metrics", "models", "nn", "ops",
         "optimizing"},
        {"torch"},
    ),
}  # fmt: skip
TESTS_AND_BENCHMARKS = {"tests", "benchmarks", "conftest", "workloads", "interpreter", "traffic", "pytest"}

# ---------------------------------------------------------------------------------------------------------------------
# Rules: (tree, path relative to the root) -> findings.


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; ``from fastseg import ops`` imports ``fastseg.ops``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                submodule = node.module == "fastseg" and alias.name in ROOMS
                yield node.lineno, f"fastseg.{alias.name}" if submodule else str(node.module)


def import_directions(tree: ast.Module, path: Path) -> Iterator[Finding]:
    room = room_of(module_of(path))
    if room not in ROOMS:
        yield 1, f"{room} is no room; write into ROOMS what it may import"
        return
    rooms, packages = ROOMS[room]
    for line, module in imports(tree):
        top = module.split(".")[0]
        if top == "fastseg":
            if room_of(module) not in rooms:
                yield line, f"{room or 'fastseg'} imports {module}"
        elif top in TESTS_AND_BENCHMARKS:
            yield line, f"{room or 'fastseg'} imports {module}: nothing imports tests and benchmarks"
        elif packages is not None and top not in packages and top not in sys.stdlib_module_names:
            yield line, f"{room or 'fastseg'} imports {module}"


def no_relative_imports(tree: ast.Module, path: Path) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            yield node.lineno, "relative import"


def kernels_by_their_installed_name(tree: ast.Module, path: Path) -> Iterator[Finding]:
    for line, module in imports(tree):
        if module.split(".")[0] == "kernels":
            yield line, f"import {module}: it is fastseg.{module}; a second copy of every kernel otherwise"


def no_nn_and_no_autograd(tree: ast.Module, path: Path) -> Iterator[Finding]:
    for line, module in imports(tree):
        if module.startswith(("torch.nn", "torch.autograd")):
            yield line, f"kernels import {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.nn", "torch.autograd"):
            yield node.lineno, f"kernels use {ast.unparse(node)}"


# test_import_needs_no_triton imports them: sizes, private names of torch, and cost models
PLAIN = ("sizes", "torch_private", "ceilings", "config", "verdict")
WITHOUT_TRITON = {f"fastseg.kernels.runtime.{name}" for name in PLAIN}
WITHOUT_TRITON |= {"fastseg.kernels.atrous_conv.cost", "fastseg.kernels.separable_conv.cost"}


def kernels_only_with_triton(tree: ast.Module, path: Path) -> Iterator[Finding]:
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "HAS_TRITON"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in guarded:
            for line, module in imports(ast.Module([node], [])):
                plain = any(module == name or module.startswith(f"{name}.") for name in WITHOUT_TRITON)
                if room_of(module) == "kernels" and not plain:
                    yield line, f"import {module} outside `if HAS_TRITON:`"


def has_docstring(tree: ast.Module, path: Path) -> Iterator[Finding]:
    if not (ast.get_docstring(tree) or "").strip():
        yield 1, "no module docstring"
    if path == Path("kernels/__init__.py") and len(tree.body) > 1:
        yield 1, "kernels/__init__.py holds a docstring and nothing else"


def masked_load_has_other(tree: ast.Module, path: Path) -> Iterator[Finding]:
    for call, name in calls(tree):
        masked = "mask" in keywords(call) or len(call.args) > 1
        if name == "tl.load" and masked and "other" not in keywords(call) and len(call.args) < 3:
            yield call.lineno, "masked tl.load without other="


def dot_names_precision(tree: ast.Module, path: Path) -> Iterator[Finding]:
    for call, name in calls(tree):
        if name == "tl.dot" and "input_precision" not in keywords(call):
            yield call.lineno, "tl.dot without input_precision="


def no_maximum_of_data(tree: ast.Module, path: Path) -> Iterator[Finding]:
    """Outside the functions of kernels/common whose name says nan."""
    helpers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and path.parent == Path("kernels/common") and "nan" in node.name
        for inner in ast.walk(node)
    }
    for call, name in calls(tree):
        if name in ("tl.max", "tl.argmax", "tl.maximum") and id(call) not in helpers:
            yield (
                call.lineno,
                f"{name}: NaN is lost; write the comparison, or use the helper of kernels/common/norm_act.py",
            )


def launches_through_the_guard(tree: ast.Module, path: Path) -> Iterator[Finding]:
    """``thing[index](...)`` is a launch where the thing is called kernel, or the index is a tuple or called grid."""
    guard = {
        id(inner)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and path == Path("kernels/runtime/launch.py") and node.name == "run"
        for inner in ast.walk(node)
    }
    for call, name in calls(tree):
        if not isinstance(call.func, ast.Subscript) or id(call) in guard:
            continue
        index = call.func.slice
        grid = isinstance(index, (ast.Tuple, ast.Lambda)) or ast.unparse(index).endswith("grid")
        if grid or ast.unparse(call.func.value).endswith("kernel"):
            yield call.lineno, f"{name}(...): launch through fastseg.kernels.runtime.launch.launch"


def no_float_atomics(tree: ast.Module, path: Path) -> Iterator[Finding]:
    """An added value says that it is an integer: a literal, or ``.to(tl.int32)`` or ``.to(tl.int64)``."""
    for call, name in calls(tree):
        if name == "tl.atomic_add":
            value = call.args[1] if len(call.args) > 1 else None
            literal = isinstance(value, ast.Constant) and type(value.value) is int
            if not literal and not (value and ast.unparse(value).endswith((".to(tl.int32)", ".to(tl.int64)"))):
                yield call.lineno, "tl.atomic_add of what may be a float: the order of the sum is not fixed"


def no_tuning_and_no_block_pointers(tree: ast.Module, path: Path) -> Iterator[Finding]:
    banned = ("triton.autotune", "tl.make_block_ptr", "tl.advance")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in banned:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("triton"):
            names = [alias.name for alias in node.names if alias.name in ("autotune", "make_block_ptr", "advance")]
            if names:
                yield node.lineno, ", ".join(names)


def loads_weights_only(tree: ast.Module, path: Path) -> Iterator[Finding]:
    for call, name in calls(tree):
        safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
        if name == "torch.load" and not safe:
            yield call.lineno, "torch.load without weights_only=True runs code from the file"


def no_environment_variables(tree: ast.Module, path: Path) -> Iterator[Finding]:
    """Beyond Triton's own."""
    allowed = set()
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv") and node.args:
            key = node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            key = node.slice
        if isinstance(key, ast.Constant) and str(key.value).startswith("TRITON_"):
            allowed.update(id(inner) for inner in ast.walk(node))
    for node in ast.walk(tree):
        imported = isinstance(node, ast.ImportFrom) and node.module == "os"
        if imported and any(alias.name in ("environ", "getenv") for alias in node.names):
            yield node.lineno, "import os, so that uses of the environment can be seen"
        used = isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
        if used and id(node) not in allowed:
            yield node.lineno, "an environment variable that is not Triton's"


def short_enough(tree: ast.Module, path: Path, lines: int | None = None) -> Iterator[Finding]:
    lines = len((ROOT / path).read_text().splitlines()) if lines is None else lines
    if lines > LINES:
        yield lines, f"{lines} lines, the limit is {LINES}: split it by phase"


# rule: the first folders it holds for
RULES: dict[Rule, tuple[str, ...]] = {
    import_directions: ("kernels", "fastseg"),
    no_relative_imports: ("kernels", "fastseg", "tests", "benchmarks"),
    kernels_by_their_installed_name: ("kernels", "fastseg", "tests", "benchmarks"),
    short_enough: ("kernels", "fastseg", "tests", "benchmarks"),
    no_nn_and_no_autograd: ("kernels",),
    kernels_only_with_triton: ("fastseg/ops",),
    has_docstring: ("kernels",),
    masked_load_has_other: ("kernels",),
    dot_names_precision: ("kernels",),
    no_maximum_of_data: ("kernels",),
    launches_through_the_guard: ("kernels",),
    no_float_atomics: ("kernels",),
    no_tuning_and_no_block_pointers: ("kernels", "fastseg"),
    loads_weights_only: ("kernels", "fastseg", "tests", "benchmarks"),
    no_environment_variables: ("kernels", "fastseg"),
    references_are_torchs: ("fastseg/ops",),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    findings = findings_of(rule, RULES[rule])
    assert not findings, f"{len(findings)} findings\n" + "\n".join(findings)


PLANTED = [  # rule, path, source with one violation on its last line, the same source put right
    (import_directions, "fastseg/nn/x.py", "from fastseg.kernels.x import x_fwd", "from fastseg.ops.x import x"),
    (import_directions, "fastseg/ops/x.py", "import triton", "import torch.nn.functional as F"),
    (import_directions, "fastseg/ops/x.py", "from fastseg import nn", "from fastseg import kernels"),
    (import_directions, "fastseg/models/x.py", "import fastseg.ops.x", "import fastseg.nn.x"),
    (
        import_directions,
        "kernels/x.py",
        "from fastseg.ops.x import x",
        "from fastseg.kernels.common.norm_act import relu",
    ),
    (import_directions, "kernels/x.py", "import numpy", "import math"),
    (import_directions, "fastseg/metrics.py", "from PIL import Image", "import numpy"),
    (import_directions, "fastseg/testing.py", "import pytest", "import torch"),
    (import_directions, "fastseg/inference/x.py", "def f():\n    import fastseg.cli", "import fastseg.models"),
    (import_directions, "fastseg/nn/x.py", "from fastseg import explain", "from fastseg.ops import explain"),
    (import_directions, "fastseg/cli/x.py", "from conftest import device", "from fastseg.kernels import config"),
    (no_relative_imports, "fastseg/ops/x.py", "from .aspp import aspp", "from fastseg.ops.aspp import aspp"),
    (kernels_by_their_installed_name, "tests/x.py", "import kernels.x", "import fastseg.kernels.x"),
    (no_nn_and_no_autograd, "kernels/x.py", "y = torch.nn.functional.relu(x)", "y = torch.empty_like(x)"),
    (no_nn_and_no_autograd, "kernels/x.py", "from torch.autograd import Function", "from torch import Tensor"),
    (
        kernels_only_with_triton,
        "fastseg/ops/x.py",
        "if HAS_TRITON:\n    pass\nelse:\n    from fastseg.kernels.x import x_fwd",
        "if HAS_TRITON:\n    from fastseg.kernels.x import x_fwd",
    ),
    (has_docstring, "kernels/x.py", "x = 1", '"""What it computes."""'),
    (has_docstring, "kernels/__init__.py", '"""The kernels."""; import torch', '"""The kernels."""'),
    (masked_load_has_other, "kernels/x.py", "tl.load(p, mask=m)", "tl.load(p, mask=m, other=0.0); tl.load(p)"),
    (masked_load_has_other, "kernels/x.py", "tl.load(p, m)", "tl.load(p, m, 0.0)"),
    (dot_names_precision, "kernels/x.py", "tl.dot(a, b, acc)", "tl.dot(a, b, acc, input_precision=P)"),
    (no_maximum_of_data, "kernels/x.py", "tl.max(x, 1)", "tl.where(x > y, x, y)"),
    (
        no_maximum_of_data,
        "kernels/common/norm_act.py",
        "def peak(x):\n    return tl.maximum(x, 0)",
        "def nan_max(x):\n    return tl.max(x)",
    ),
    (launches_through_the_guard, "kernels/x.py", "_k[(1,)](x, n)", "launch(_k, (1,), x, n)"),
    (launches_through_the_guard, "kernels/x.py", "_x_kernel[blocks](x, n)", "_heuristics[kernel](n)"),
    (
        launches_through_the_guard,
        "kernels/runtime/launch.py",
        "def launch(k):\n    k[grid](x)",
        "def run(k, grid):\n    k[grid](x)",
    ),
    (no_float_atomics, "kernels/x.py", "tl.atomic_add(p, x)", "tl.atomic_add(p, x.to(tl.int32)); tl.atomic_add(p, 1)"),
    (no_tuning_and_no_block_pointers, "kernels/x.py", "@triton.autotune\ndef k(): ...", "@triton.jit\ndef k(): ..."),
    (no_tuning_and_no_block_pointers, "kernels/x.py", "from triton import autotune", "from triton import cdiv"),
    (no_tuning_and_no_block_pointers, "kernels/x.py", "tl.make_block_ptr(p)", "tl.make_tensor_descriptor(p)"),
    (loads_weights_only, "fastseg/models/x.py", "torch.load(f)", "torch.load(f, weights_only=True)"),
    (loads_weights_only, "tests/x.py", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=True)"),
    (
        no_environment_variables,
        "fastseg/x.py",
        "os.environ.get('FASTSEG_X')",
        "os.environ.get('TRITON_INTERPRET') == '1'",
    ),
    (no_environment_variables, "fastseg/x.py", "os.getenv(name)", "os.getenv('TRITON_CACHE_DIR')"),
    (no_environment_variables, "fastseg/x.py", "from os import environ", "from os import path"),
    (
        references_are_torchs,
        "fastseg/ops/x.py",
        "from fastseg.ops.cpu.x import fast\ndef _lines(v):\n    return fast(v)\ndef x_ref(v):\n    return _lines(v)",
        "from fastseg.ops.cpu.x import fast\ndef x(v):\n    return fast(v)\ndef x_ref(v):\n    return v.relu()",
    ),
    (
        references_are_torchs,
        "fastseg/ops/x.py",
        "def x_ref(v):\n    return FORMS(v)",
        "from fastseg.ops.registered.y import y_ref\ndef x_ref(v):\n    return y_ref(v)",
    ),
]


@pytest.mark.parametrize(("rule", "path", "bad", "good"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_the_rule_bites(rule, path, bad, good):
    findings = list(rule(ast.parse(bad), Path(path)))
    assert len(findings) == 1 and 1 <= findings[0][0] <= len(bad.splitlines())
    assert not list(rule(ast.parse(good), Path(path)))


def test_every_rule_is_shown_to_bite():
    assert set(RULES) - {rule for rule, *_ in PLANTED} == {short_enough}
    assert list(short_enough(ast.Module([], []), Path("x.py"), LINES + 1))
    assert not list(short_enough(ast.Module([], []), Path("x.py"), LINES))


# ---------------------------------------------------------------------------------------------------------------------
# Import, in a process of its own.

_IMPORT_ALL = """
import importlib, sys, torch
def asked(*args, **kwargs):
    raise AssertionError("a device was asked for at import")
for query in ("current_device", "device_count", "get_device_capability", "get_device_name", "get_device_properties",
              "init", "is_available"):
    setattr(torch.cuda, query, asked)
{before}
for name in {names}:
    importlib.import_module(name)
from fastseg.ops.core import dispatch as _dispatch
assert not _dispatch.INTERPRETED
assert _dispatch.HAS_TRITON is {has_triton}
"""


def _import_all(*, before: str, has_triton: bool) -> None:
    modules = [module_of(path.relative_to(ROOT)) for path in SOURCES if path.name != "__main__.py"]
    names = [name for name in modules if has_triton or room_of(name) != "kernels" or name in WITHOUT_TRITON]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    script = _IMPORT_ALL.format(before=before, names=names, has_triton=has_triton)
    done = subprocess.run([sys.executable, "-P", "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_import_needs_no_gpu_and_no_interpreter():
    _import_all(before="", has_triton=True)


def test_import_needs_no_triton():
    _import_all(before="sys.modules['triton'] = None", has_triton=False)
