"""What every ``bench_<op>.py`` offers: its cases, each of which builds a problem, which has providers to time.

A module has ``OP``, its name in results, and ``cases(size)``, where size is "full", "small" (one image, for a CPU) or
"tiny" (a smoke test). ``gpu.ops.OPS`` lists the modules; stages, tables and pytest need no more of them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.roofline.floors import Cost, Device, find_device, floor_of

MOST_MACS = 2e9  # of a case on a CPU


@dataclass(frozen=True)
class Case:
    """One shape in one mode, before anything is allocated.

    Attributes:
        op: ``OP`` of its module.
        shape: a name, unique among the op's shapes.
        N: images.
        mode: which direction or form.
        build: device -> problem.
        floors: provider -> the kernels it needs at least; a provider without an entry has no floor.
        macs: multiply-adds of the dearest provider, by which a CPU leaves a case out.
    """

    op: str
    shape: str
    N: int
    mode: str
    build: partial["Problem"]
    floors: Mapping[str, list[Cost]] = field(default_factory=dict)
    macs: float = 0.0

    def floor_us(self, provider: str, chip: Device) -> float | None:
        """Microseconds at the ceilings of ``chip``."""
        return floor_of(self.floors[provider], chip).us if provider in self.floors else None

    def floor_s(self, device: torch.device) -> float | None:
        """Seconds of fastseg's floor on the device at hand, where its ceilings are known."""
        chip = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        us = None if chip is None else self.floor_us("fastseg", chip)
        return None if us is None else us * 1e-6


class Problem:
    """One case on one device: inputs, and what each provider calls. Subclasses give ``forms`` and ``bytes_moved``.

    Attributes:
        baseline: the form that, run in fp32, is the exact result.
        autocast: bf16 autocast on a GPU, entered outside the timed call: it then casts each weight once, as in a model.
        compiled: provider -> the form that ``torch.compile`` gets, on a GPU only: a CPU would need minutes.
        inputs: names of the attributes that hold floating-point inputs; None where a mode has no use for one.
        generator: of the inputs, on the device itself: a map of 1e9 elements takes a CPU seconds.
    """

    baseline = "eager"
    autocast = False
    compiled: ClassVar[Mapping[str, str]] = {"compile": "eager"}
    inputs: tuple[str, ...] = ("x",)

    def __init__(self, mode: str, device: torch.device, *, grad: bool):
        self.mode, self.device, self.dtype = mode, device, harness.dtype_for(device)
        self.grad = grad
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        self._dy: Tensor | None = None

    def draw(self, *size: int, last: bool = True) -> Tensor:
        """Normal numbers on the device, in the problem's dtype; ``last``: a map in channels_last."""
        layout = torch.channels_last if last and len(size) == 4 else torch.contiguous_format
        empty = torch.empty(size, device=self.device, dtype=self.dtype, memory_format=layout)
        return empty.normal_(generator=self.generator)

    def gradient(self, y: Tensor) -> Tensor:
        """The gradient at ``y``: drawn once, the same for every provider, in the dtype and the layout of its ``y``."""
        last = y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last)
        if self._dy is None:
            self._dy = self.draw(*y.shape, last=last)
        return self._dy.to(y.dtype, memory_format=torch.channels_last if last else torch.contiguous_format)

    @property
    def backward(self) -> bool:
        """Whether a backward is timed; it belongs to a forward outside, so no graph may capture it."""
        return self.mode.endswith("backward")

    @property
    def bytes_moved(self) -> float:
        """The least traffic of the file's header."""
        raise NotImplementedError

    def forms(self) -> dict[str, Callable]:
        """provider -> function or module, uncompiled."""
        raise NotImplementedError

    def function(self, form: Callable) -> Callable[[], object]:
        """What is timed. A backward contains no forward: its forward runs here, once."""
        raise NotImplementedError

    @contextmanager
    def context(self) -> Iterator[None]:
        """What holds around the timed calls."""
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=self.autocast and self.device.type == "cuda")
        with torch.set_grad_enabled(self.grad), autocast:
            yield

    def providers(self) -> dict[str, Callable]:
        """The forms, and on a GPU those compiled."""
        forms = self.forms()
        if self.device.type == "cuda":
            torch._functorch.config.donated_buffer = False  # a timed backward runs many times on one graph
            torch._dynamo.reset()  # else all shapes share one cache, and past its limit run uncompiled
            for name, form in self.compiled.items():
                forms[name] = torch.compile(forms[form], mode="max-autotune-no-cudagraphs", dynamic=False)
        return forms

    def functions(self, *names: str) -> dict[str, Callable[[], object]]:
        """provider -> what is timed, for the baseline and those named that exist here. Call it inside ``context``."""
        providers = self.providers()
        return {
            name: self.function(providers[name]) for name in dict.fromkeys((self.baseline, *names)) if name in providers
        }

    def notes(self, provider: str) -> dict[str, object]:
        """What else a row says of a provider."""
        return {}

    def comparable(self, result: object) -> list[Tensor]:
        """The tensors of a result that all providers share."""
        return harness.floats(result)

    def exact(self) -> list[Tensor]:
        """The baseline's result in fp32, without tf32."""
        saved = {name: t for name in self.inputs if (t := getattr(self, name)) is not None}
        tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        try:
            for name, t in saved.items():
                setattr(self, name, t.detach().float().requires_grad_(t.requires_grad))
            with torch.autocast(self.device.type, enabled=False), torch.set_grad_enabled(self.grad):
                return self.comparable(self.function(self.forms()[self.baseline])())
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
            for name, t in saved.items():
                setattr(self, name, t)

    def disagreement(self, functions: Mapping[str, Callable[[], object]]) -> str:
        """Why the providers do not compute the same, or "". Called before anything is timed."""
        results = {name: self.comparable(function()) for name, function in functions.items()}
        return harness.disagreement(results, self.exact(), self.dtype, self.baseline)


def every(cases: Callable[[str], list[Case]]) -> pytest.MarkDecorator:
    """Parametrizes a benchmark by the cases' ``number``; every size has them in the same order."""
    found, seen, values = cases("full"), set(), []
    for number, (case, tiny) in enumerate(zip(found, cases("tiny"), strict=True)):
        marks = [pytest.mark.same_when_tiny] if _work(tiny) in seen else []
        seen.add(_work(tiny))
        values.append(pytest.param(number, id=f"{case.shape}-{case.mode}", marks=marks))
    return pytest.mark.parametrize("number", values)


def _work(case: Case) -> str:
    """What a case runs: the arguments of its problem, without the names of their shapes."""
    unnamed = lambda arg: replace(arg, **dict.fromkeys({"name", "origin"} & vars(arg).keys(), ""))
    return repr([case.build.func, *(unnamed(arg) if is_dataclass(arg) else arg for arg in case.build.args)])


def bench(case: Case, provider: str, run: Callable, device: torch.device, size: str, benchmark) -> None:
    """The body of every op's benchmark under pytest."""
    if "compile" in provider and device.type == "cpu":
        pytest.skip("torch.compile is measured on a GPU")
    if size == "small" and case.macs > MOST_MACS:
        pytest.skip(f"{case.macs:.1e} multiply-adds: on a GPU, or with --full")
    benchmark.group = f"{case.op} {case.shape} {case.mode}"
    problem = case.build(device)
    with problem.context():
        functions = problem.functions(provider)
        wrong = problem.disagreement(functions)
        assert not wrong, wrong
        run(
            functions[provider], bytes_moved=problem.bytes_moved, floor_s=case.floor_s(device),
            graph=not problem.backward, op=case.op, shape=case.shape, N=case.N, dtype=str(problem.dtype),
            provider=provider, mode=case.mode, **problem.notes(provider),
        )  # fmt: skip
