"""How the tests run: on a CUDA device, or under Triton's interpreter with our checker; seed, NaN poison, skips."""

import importlib.util
import os
import sys

import pytest
import torch
from pairwise import covering

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated: Triton reads it there

if "ttsem" in sys.modules:
    from emulated import launchers_for_all

    with launchers_for_all():
        import fastseg.ops  # noqa: F401

if importlib.util.find_spec("fastseg") is None or importlib.util.find_spec("fastseg.kernels") is None:
    pytest.exit("fastseg is not installed: run `pip install -e .` in the repository's root", returncode=4)

from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.testing import poison

if INTERPRETED:
    import interpreter
    import quick_interpreter

    interpreter.install()
    quick_interpreter.install()
    torch.set_num_threads(1)  # the maps are tiny: threads cost more than they bring


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the tests marked `long` as well (make test-all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        short = [item for item in items if not item.get_closest_marker("long")]
        kept = {id(item) for item in (covering(short) if INTERPRETED else short)}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
        items[:] = [item for item in items if id(item) in kept]
    if HAS_CUDA and not INTERPRETED:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> str:
    """Where the kernels run: "cpu" under the interpreter, else "cuda"."""
    if INTERPRETED:
        return "cpu"
    if not HAS_CUDA:
        pytest.skip("kernels run on a CUDA device, or with TRITON_INTERPRET=1")
    return "cuda"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    with poison():
        yield


@pytest.fixture(autouse=True)
def _ieee(monkeypatch) -> None:
    """fp32 means fp32: with tf32 on, torch's default for convolutions, three digits are all that could be compared."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _fresh_dynamo(request):
    """Tests among torch's tools, which compile, begin and end with an empty cache."""
    compiles = request.path.parent.name == "integration" or request.path.name.startswith("test_graphs")
    if compiles:
        torch._dynamo.reset()
    yield
    if compiles:
        torch._dynamo.reset()
