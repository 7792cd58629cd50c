"""The switch that forces the reference, and the record of which path each op took and why."""

from collections.abc import Iterator
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

IN_REFERENCE = "inside fastseg.reference()"  # the reason of a decision
IN_UNFUSED = "inside fastseg.unfused()"
# The blocks that were entered here; [True] until one is left.
_in_reference: ContextVar[tuple[list[bool], ...]] = ContextVar("fastseg_in_reference", default=())
_in_unfused: ContextVar[tuple[list[bool], ...]] = ContextVar("fastseg_in_unfused", default=())
_reference_depth = 0  # the same for compiled code: Dynamo cannot trace ContextVar.get, but guards a module variable
UNFUSED_DEPTH = [0]  # how many ``unfused`` blocks the process is inside of: 0, and nobody has to ask further
_report: ContextVar["Report | None"] = ContextVar("fastseg_report", default=None)


class _Block(ContextDecorator):
    """A block that is scoped to the calling thread or task, and counted for the process."""

    entered: ContextVar[tuple[list[bool], ...]]

    def __init__(self) -> None:
        self._blocks: list[list[bool]] = []  # one per entry: a block may be entered again inside itself

    def _recreate_cm(self):
        return type(self)()  # calls of a decorated function, in any threads, share nothing

    def _count(self, by: int) -> None:
        raise NotImplementedError

    def __enter__(self):
        self._count(1)
        if not torch.compiler.is_dynamo_compiling():
            self._blocks.append([True])
            self.entered.set((*self.entered.get(), self._blocks[-1]))
        return self

    def __exit__(self, *exc) -> None:
        self._count(-1)
        if not torch.compiler.is_dynamo_compiling():
            self._blocks.pop()[0] = False  # where it was entered too, if it is left elsewhere, as a generator may be
            self.entered.set(tuple(block for block in self.entered.get() if block[0]))


class reference(_Block):  # lowercase, because it is used as `with fastseg.reference():`
    """Run the plain-PyTorch reference of every fastseg op inside the block, or the decorated function.

    Use it to compare in tests, benchmarks and debugging. It is scoped to the calling thread or task; code compiled by
    ``torch.compile`` sees it process-wide.
    """

    entered = _in_reference

    def _count(self, by: int) -> None:
        global _reference_depth
        _reference_depth += by


class unfused(_Block):  # lowercase, because it is used as `with fastseg.unfused():`
    """Run every block as its modules are written, one after another, inside the block or the decorated function.

    Convolution, norm and activation are then three calls of torch's modules, and a drop-in such as
    ``fastseg.nn.MaxPool2d`` runs as the torch module that it stands for. That is what eager PyTorch would do, and the
    baseline of every comparison with it. Scoped as ``reference``.

    Example:
        >>> with fastseg.unfused():  # doctest: +SKIP
        ...     baseline = model(x)
    """

    entered = _in_unfused

    def _count(self, by: int) -> None:
        UNFUSED_DEPTH[0] += by


class Refusal(NamedTuple):
    """Why a form of an op did not run, and what the cost model expected of it."""

    form: str
    why: str
    microseconds: float | None = None

    def __str__(self) -> str:
        cost = "" if self.microseconds is None else f" ({self.microseconds:.1f} us)"
        return f"{self.form}{cost}: {self.why}"


class Decision(NamedTuple):
    """One call of an op: which form ran, and why every form before it in the op's list did not."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    path: str  # "triton", "cudnn", "torch" (a form of ours in plain PyTorch) or "reference"
    why: str
    form: str = ""  # the name of the form that ran, as ``fastseg.force`` takes it
    microseconds: float | None = None  # what the cost model expects of it
    refused: tuple[Refusal, ...] = ()  # the forms asked before it


class Report:
    """The decisions recorded inside ``fastseg.explain()``, in call order; ``str()`` gives a table."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def __str__(self) -> str:
        rows = [Decision._fields, *(_cells(d) for d in self.decisions)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(Decision._fields))]
        return "\n".join("  ".join(f.ljust(w) for f, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cells(d: Decision) -> list[str]:
    cost = "" if d.microseconds is None else f"{d.microseconds:.1f}"
    return [*map(str, d[:7]), cost, "; ".join(map(str, d.refused))]


class explain:  # lowercase, because it is used as `with fastseg.explain() as report:`
    """Record, for each op called inside the block, which form ran and why, and why each form before it did not.

    Example:
        >>> with fastseg.explain() as report:
        ...     model(x)
        >>> print(report)
    """

    def __enter__(self) -> Report:
        report = Report()
        self._token = _report.set(report)
        return report

    def __exit__(self, *exc) -> None:
        _report.reset(self._token)


def in_reference() -> bool:
    """True inside ``fastseg.reference()``."""
    return _inside(_in_reference, _reference_depth)


def in_unfused() -> bool:
    """True inside ``fastseg.unfused()``."""
    return _inside(_in_unfused, UNFUSED_DEPTH[0])


def _inside(entered: ContextVar[tuple[list[bool], ...]], depth: int) -> bool:
    if torch.compiler.is_compiling():
        return depth > 0
    blocks = entered.get()
    return bool(blocks) and any(block[0] for block in blocks)


def record(
    op: str, x: Tensor, path: str, why: str, form: str = "", microseconds: float | None = None,
    refused: tuple[Refusal, ...] = (), place: int | None = None,
) -> None:  # fmt: skip
    """Record for ``explain`` what was decided for ``op``; in a graph, nothing.

    ``place``: where in the order of decisions; None, at the end.
    """
    if torch.compiler.is_dynamo_compiling():  # it does not follow the next line
        return
    report = _report.get()
    if report is None:
        return
    dtype, place = str(x.dtype).removeprefix("torch."), len(report) if place is None else place
    report.decisions.insert(
        place, Decision(op, tuple(x.shape), dtype, str(x.device), path, why, form, microseconds, refused)
    )
