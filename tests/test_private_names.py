"""A version of torch or Triton without one of the private names costs speed; results and imports stay."""

import ast
import collections
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastseg.kernels.runtime import torch_private as ground

ROOT = Path(__file__).parents[1]
FILES = {
    "ops": ROOT / "fastseg" / "ops" / "core" / "torch_private.py",
    "runtime": ROOT / "kernels" / "runtime" / "torch_private.py",
    "tools": ROOT / "kernels" / "tools" / "triton_private.py",
}


def names_in(path: Path) -> list[str]:
    """What a file looks for with ``find``."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "find"]


NAMES = {file: names_in(path) for file, path in FILES.items()}


def hiding(monkeypatch, *hidden: str):
    """``torch_private`` as it is where torch has none of ``hidden``, beside the imported one."""
    real = ground.find
    monkeypatch.setattr(ground, "find", lambda name, fallback: fallback if name in hidden else real(name, fallback))
    spec = importlib.util.spec_from_file_location("torch_private_without", FILES["ops"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_this_torch_has_every_name():
    """Else a fallback runs from now on: look for the new name, and say in torch_private.py which release moved it."""
    nothing = object()
    assert {name: len(names) > 2 for name, names in NAMES.items()} == dict.fromkeys(FILES, True)
    lost = [name for names in NAMES.values() for name in names if ground.find(name, nothing) is nothing]
    assert not lost
    assert ground.find("torch._C._no_such_name", nothing) is nothing
    assert ground.find("torch._no_such_module.name", nothing) is nothing


@pytest.mark.parametrize("name", NAMES["ops"])
def test_each_fallback_is_safe(monkeypatch, name):
    """What cannot be asked is answered so that torch's own ops run; what cannot be done is done otherwise."""
    p = hiding(monkeypatch, name)
    x = torch.arange(6.0)
    inside = []
    torch.func.vmap(lambda t: inside.append(bool(p.transforms_active())) or t)(x)
    assert inside == [True]
    assert p.dispatch_modes() in (0, True) and isinstance(p.is_batched(x), (bool, int))
    if "dispatch_tls" in name or name.endswith(("_dispatch_keys", "_mode_enabled", "_profiler_enabled")):
        assert not p.is_bare((x,))
    else:
        assert p.is_bare((x,)) and not p.is_bare((x.requires_grad_(),))
    assert p.hooks_enabled() == (not name.startswith("torch._C._autograd._") or name.endswith("_profiler_enabled"))
    assert len(p.plain_modes()) == (0 if "disable_" in name or ".Disable" in name or "_Disable" in name else 3)
    negated = p.tree_map_only(torch.Tensor, torch.neg, [x.detach(), 2, ({"x": x.detach()},)])
    assert negated[1] == 2 and torch.equal(negated[0], -x) and torch.equal(negated[2][0]["x"], -x)
    targets = [torch.zeros(2), torch.zeros(3)]
    p.foreach_copy_(targets, [torch.ones(2), torch.full((3,), 2.0)])
    assert [t.tolist() for t in targets] == [[1, 1], [2, 2, 2]]
    p.assert_async(torch.tensor(True), "right")
    with pytest.raises(RuntimeError, match="wrong"):
        p.assert_async(torch.tensor(False), "wrong")
    assert isinstance(torch.nn.BatchNorm1d(2), p.NORMS) and isinstance(torch.nn.InstanceNorm3d(2), p.NORMS)


def test_plain_fallbacks_do_what_torch_does():
    Pair = collections.namedtuple("Pair", "a b")
    tree = {"x": [1, (2, 3)], "y": Pair(4, [5])}
    assert ground.leaves_of(tree) == ground.tree_leaves(tree) == [1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError, match="TorchDispatchMode"), ground.NoDispatchMode():
        pass


_WITHOUT_ANY = """
import importlib, pkgutil, torch
def resolve(name):
    raise AttributeError(name)
pkgutil.resolve_name = resolve  # all that finds private names
for name in {modules}:
    importlib.import_module(name)
import fastseg
from fastseg.nn import SeparableConv2d
from fastseg.ops.cpu import onednn
assert onednn.why_not() == "this version of torch has no packed convolution"
torch.manual_seed(0)
model = fastseg.models.create("deeplabv3plus", 3, width=0.1, decoder_channels=16).eval()
x = torch.randn(1, 3, 33, 33)
with torch.no_grad():
    got = model(x)
    runner = fastseg.inference.Runner(model, x)
    torch.testing.assert_close(runner(x), got, atol=1e-4, rtol=1e-4)
    with fastseg.reference():
        torch.testing.assert_close(got, model(x), atol=1e-4, rtol=1e-4)
block = SeparableConv2d(3, 4, mid_norm=True, mid_act="relu").train()
x.requires_grad_()
(got,) = torch.autograd.grad(block(x).square().sum(), x)
with fastseg.reference():
    (want,) = torch.autograd.grad(block(x).square().sum(), x)
torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
up = lambda t: fastseg.ops.upsample_bilinear(t, scale_factor=2)
torch.testing.assert_close(torch.func.vmap(up)(x[None]), up(x)[None])
"""


def test_fastseg_works_without_any_of_them():
    modules = ["fastseg.inference.tiling", "fastseg.measure.study", "fastseg.training.run", "fastseg.cli.demo"]
    script = _WITHOUT_ANY.format(modules=modules)
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
