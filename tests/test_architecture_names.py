"""Rules of who may use which name: private names, developer tools, facts about chips; each is shown to bite."""

import ast
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from syntax import ROOT, SOURCES, Finding, Rule, calls, findings_of, module_of

MODULES = {module_of(path.relative_to(ROOT)) for path in SOURCES}
PRIVATE_NAMES = (
    "fastseg/ops/core/torch_private.py", "kernels/runtime/torch_private.py", "kernels/tools/triton_private.py",
)  # fmt: skip
CEILINGS = "kernels/runtime/ceilings.py"
# What a cost model may import beside cost models and plain sizes: nothing that needs Triton.
WITHOUT_TRITON = ("ceilings", "config", "conv_sizes", "sizes", "torch_private", "verdict")


def private(name: str) -> bool:
    """Whether a dotted name has a part that begins with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def bound(tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted name, of all that is imported."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an expression that is no more than that, else ""."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


@functools.lru_cache(maxsize=1024)
def used(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, and of every attribute of something imported, by its full name.

    ``getattr(torch._C, "_x")`` counts as ``torch._C._x``.
    """
    names, found = bound(tree), set()

    def note(line: int, name: str) -> None:
        first, _, rest = name.partition(".")
        if first in names and rest:
            found.add((line, f"{names[first]}.{rest}"))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.update((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            note(node.lineno, dotted(node))
        elif isinstance(node, ast.Call) and dotted(node.func) == "getattr" and isinstance(node.args[1], ast.Constant):
            note(node.lineno, f"{dotted(node.args[0])}.{node.args[1].value}")
    return sorted(found)


def folder_of(name: str) -> str | None:
    """The folder, as a module, of the longest module of fastseg that ``name`` begins with."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if module in MODULES:
            return module.rpartition(".")[0]
    return None


def underscores_stay_in_their_folder(tree: ast.Module, path: Path) -> Iterator[Finding]:
    here = module_of(path).rpartition(".")[0]
    for line, name in used(tree):
        if name.startswith("fastseg.") and private(name) and folder_of(name) != here:
            yield line, f"{name} is private to its folder: give it a public name, or use what is public"


def private_names_in_one_file(tree: ast.Module, path: Path) -> Iterator[Finding]:
    if path.as_posix() in PRIVATE_NAMES:
        return
    for line, name in used(tree):
        insides = name.startswith(("triton.backends", "triton.compiler", "triton.runtime"))
        if name.split(".")[0] in ("torch", "triton") and (private(name) or insides):
            yield line, f"{name} is private: give it a fallback in torch_private.py or triton_private.py"


def no_frames(tree: ast.Module, path: Path) -> Iterator[Finding]:
    """A function does not look at who calls it, and does not guess how deep it lies under the user's line."""
    for line, name in used(tree):
        if name in ("sys._getframe", "inspect.currentframe", "inspect.stack", "traceback.extract_stack"):
            yield line, f"{name}: a result must not depend on the caller"
    for call, _ in calls(tree):
        levels = [k.value for k in call.keywords if k.arg == "stacklevel"]
        if levels and not (isinstance(levels[0], ast.Constant) and levels[0].value <= 3):
            yield call.lineno, "stacklevel above 3 is a guess: name what is wrong in the text"


def tools_are_for_developers(tree: ast.Module, path: Path) -> Iterator[Finding]:
    if path.as_posix().startswith(("kernels/tools/", "fastseg/cli/")):  # the commands `tune` and `doctor` are tools too
        return
    for line, name in used(tree):
        if name.startswith("fastseg.kernels.tools"):
            yield line, f"{name}: nothing that launches imports tools"


# Its cost model lies in the file of its launcher, and another is built of it.
MODEL_BESIDE_KERNEL = ("fastseg.kernels.dense_conv.pointwise",)


def cost_models_need_no_triton(tree: ast.Module, path: Path) -> Iterator[Finding]:
    if path.name != "cost.py":
        return
    for line, name in used(tree):
        module = next((m for m in (name, name.rpartition(".")[0]) if m in MODULES), "")
        last = module.rpartition(".")[2]
        plain = last in ("cost", "regions") or (".runtime." in module and last in WITHOUT_TRITON)
        if name.startswith("triton") or (module and not plain and module not in MODEL_BESIDE_KERNEL):
            yield line, f"{name}: a cost model imports sizes, ceilings and cost models"


_CHIP = re.compile(r"(^|_)(MULTIPROCESSORS|SMS|BANDWIDTH|LANES|MUFU|DOT_RATES?|L2|L2_BYTES|TFLOPS|GBPS|LAUNCH_US)($|_)")


def chips_in_one_table(tree: ast.Module, path: Path) -> Iterator[Finding]:
    """A number of 132, or of 1e11 and more, is a fact about a chip; so is a constant that says so by its name."""
    if path.as_posix() == CEILINGS:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            rate = type(node.value) is float and 1e11 <= node.value < 1e16 and not math.log10(node.value).is_integer()
            if node.value == 132 or rate:
                yield node.lineno, f"{node.value} is a chip's number; read {CEILINGS}"
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            literal = isinstance(node.value, ast.Constant)
            if isinstance(target, ast.Name) and _CHIP.search(target.id) and literal:
                yield node.lineno, f"{target.id} is a chip's number; read {CEILINGS}"


_MAKES_TENSORS = re.compile(r"torch\.(tensor|as_tensor|from_numpy|arange|zeros|ones|empty|full|eye|linspace)$")


def no_cached_tensors(tree: ast.Module, path: Path) -> Iterator[Finding]:
    """A function that gives a tensor is not memoised: the tensor would outlive the call, its mode and its stream.

    ``constant`` of ``fastseg/ops/core/constants.py`` leaves every mode first, for tables on a CPU.
    """
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            kinds = {ast.unparse(d).partition("(")[0].rpartition(".")[2] for d in node.decorator_list}
            if not kinds & {"cache", "lru_cache", "memoized", "memoized_as_given"}:
                continue
            made = [
                name
                for statement in ast.walk(node)
                if isinstance(statement, ast.Return)
                for _, name in calls(statement)
                if _MAKES_TENSORS.search(name)
            ]
            if made or (node.returns is not None and re.search(r"\bTensor\b", ast.unparse(node.returns))):
                yield node.lineno, f"{node.name} is memoised and gives a tensor"


def forms_are_chosen_in_one_place(tree: ast.Module, path: Path) -> Iterator[Finding]:
    """A cost model is asked in a form's ``cost``; nobody exchanges it: ``fastseg.force`` forces a form."""
    for call, name in calls(tree):
        patched = call.args[1] if name.endswith(("setattr", "patch.object")) and len(call.args) > 1 else None
        if isinstance(patched, ast.Constant) and str(patched.value).startswith("plan"):
            yield call.lineno, f"{patched.value} is patched: use fastseg.force(op, form)"
    if path.parts[0] != "fastseg":
        return
    models = {local for local, name in bound(tree).items() if name.startswith("fastseg.kernels.") and local == "plan"}
    asked = {
        call.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "cost"
        for call, name in calls(node)
        if name in models
    }
    for call, name in calls(tree):
        if name in models and call.lineno not in asked:
            yield call.lineno, f"{name} is a cost model: ask it in the cost() of a Form, and let Forms choose"


RULES: dict[Rule, tuple[str, ...]] = {
    forms_are_chosen_in_one_place: ("fastseg", "tests", "benchmarks"),
    underscores_stay_in_their_folder: ("kernels", "fastseg", "tests", "benchmarks", "examples"),
    private_names_in_one_file: ("kernels", "fastseg"),
    no_frames: ("kernels", "fastseg"),
    tools_are_for_developers: ("kernels", "fastseg"),
    cost_models_need_no_triton: ("kernels",),
    chips_in_one_table: ("kernels", "fastseg"),
    no_cached_tensors: ("fastseg/ops", "fastseg/nn", "fastseg/models"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    findings = findings_of(rule, RULES[rule])
    assert not findings, f"{len(findings)} findings\n" + "\n".join(findings)


PLANTED = [  # rule, path, source with one violation on its last line, the same source put right
    (
        underscores_stay_in_their_folder,
        "fastseg/nn/x.py",
        "from fastseg.ops.aspp import _x",
        "from fastseg.ops.aspp import x; from fastseg.nn.aspp import _x",
    ),
    (
        underscores_stay_in_their_folder,
        "tests/x.py",
        "from fastseg.nn import aspp\naspp._x()",
        "from fastseg.nn import aspp\naspp.x(); self._x(); aspp.__name__",
    ),
    (
        underscores_stay_in_their_folder,
        "fastseg/ops/x.py",
        "from fastseg.ops.core.kept import _x",
        "from fastseg.ops.aspp import _x",
    ),
    (private_names_in_one_file, "fastseg/x.py", "from torch._subclasses import FakeTensor", "from torch import nn"),
    (private_names_in_one_file, "fastseg/x.py", "import torch\ntorch._assert_async(x)", "import torch\ntorch.add(x)"),
    (
        private_names_in_one_file,
        "fastseg/x.py",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from torch.autograd import forward_ad\nforward_ad.unpack_dual",
    ),
    (
        private_names_in_one_file,
        "kernels/x.py",
        "from torch import nn\ngetattr(nn, '_x', None)",
        "from torch import nn\ngetattr(nn, 'x', None)",
    ),
    (private_names_in_one_file, "kernels/x.py", "from triton.runtime import driver", "from triton import cdiv"),
    (no_frames, "fastseg/x.py", "import sys\nsys._getframe(1)", "import sys\nsys.exit(1)"),
    (no_frames, "fastseg/x.py", "warnings.warn(x, stacklevel=6)", "warnings.warn(x, stacklevel=2)"),
    (
        tools_are_for_developers,
        "fastseg/ops/x.py",
        "from fastseg.kernels.tools.watch import observe",
        "from fastseg.kernels.runtime.launch import intercept",
    ),
    (tools_are_for_developers, "kernels/pooling/x.py", "import fastseg.kernels.tools", "import fastseg.kernels.common"),
    (
        cost_models_need_no_triton,
        "kernels/pooling/cost.py",
        "from fastseg.kernels.pooling.windows import x",
        "from fastseg.kernels.runtime.sizes import cdiv; from fastseg.kernels.separable_conv.cost import plan",
    ),
    (cost_models_need_no_triton, "kernels/pooling/cost.py", "import triton", "import torch"),
    (chips_in_one_table, "kernels/x.py", "programs = 2 * 132", "programs = 2 * 128"),
    (chips_in_one_table, "kernels/x.py", "rate = 4.3e12", "rate = 4.3e-6"),
    (chips_in_one_table, "kernels/x.py", "L2_BYTES = 50", "from x import L2_BYTES"),
    (
        forms_are_chosen_in_one_place,
        "fastseg/ops/x.py",
        "from fastseg.kernels.x.cost import plan\ndef f(x):\n    return plan(x).pays",
        "from fastseg.kernels.x.cost import plan\nclass A(Form):\n    def cost(self, r):\n        return plan(r).pays",
    ),
    (
        forms_are_chosen_in_one_place,
        "tests/x.py",
        "monkeypatch.setattr(op, 'plan', lambda *sizes: None)",
        "fastseg.force('op', 'form')\nassert plan(1).pays",
    ),
    (
        no_cached_tensors,
        "kernels/x.py",
        "@functools.lru_cache\n\ndef table(n): return torch.arange(n)",
        "@functools.lru_cache\ndef table(n):\n    return tuple(range(n))\ndef f(n): return torch.arange(n)",
    ),
    (
        no_cached_tensors,
        "fastseg/ops/x.py",
        "@memoized\ndef table(n) -> tuple[Tensor, Tensor]: return make(n)",
        "@constant(64)\ndef table(n):\n    return torch.tensor([n])",
    ),
]


@pytest.mark.parametrize(("rule", "path", "bad", "good"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_the_rule_bites(rule, path, bad, good):
    findings = list(rule(ast.parse(bad), Path(path)))
    assert findings and {line for line, _ in findings} == {len(bad.splitlines())}, findings
    assert not list(rule(ast.parse(good), Path(path)))


def test_every_rule_is_shown_to_bite():
    assert set(RULES) == {rule for rule, *_ in PLANTED}
