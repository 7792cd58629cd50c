"""The switch that forces the reference, and the record of which path each op took and why."""

from collections.abc import Iterator
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

IN_REFERENCE = "inside fastseg.reference()"  # the reason of a decision
# The blocks that were entered here; [True] until one is left.
_in_reference: ContextVar[tuple[list[bool], ...]] = ContextVar("fastseg_in_reference", default=())
_reference_depth = 0  # the same for compiled code: Dynamo cannot trace ContextVar.get, but guards a module variable
_report: ContextVar["Report | None"] = ContextVar("fastseg_report", default=None)


class reference(ContextDecorator):  # lowercase, because it is used as `with fastseg.reference():`
    """Run the plain-PyTorch reference of every fastseg op inside the block, or the decorated function.

    Use it to compare in tests, benchmarks and debugging. It is scoped to the calling thread or task; code compiled by
    ``torch.compile`` sees it process-wide.
    """

    def __init__(self) -> None:
        self._blocks: list[list[bool]] = []  # one per entry: a block may be entered again inside itself

    def _recreate_cm(self) -> "reference":
        return reference()  # calls of a decorated function, in any threads, share nothing

    def __enter__(self) -> "reference":
        global _reference_depth
        self._blocks.append([True])
        _in_reference.set((*_in_reference.get(), self._blocks[-1]))
        _reference_depth += 1
        return self

    def __exit__(self, *exc) -> None:
        global _reference_depth
        _reference_depth -= 1
        self._blocks.pop()[0] = False  # where it was entered too, if it is left elsewhere, as a generator may be
        _in_reference.set(tuple(block for block in _in_reference.get() if block[0]))


class Decision(NamedTuple):
    op: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    path: str  # "triton", "cudnn", "torch" (a form of ours in plain PyTorch) or "reference"
    why: str


class Report:
    """The decisions recorded inside ``fastseg.explain()``, in call order; ``str()`` gives a table."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def __str__(self) -> str:
        rows = [Decision._fields, *([str(field) for field in d] for d in self.decisions)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(Decision._fields))]
        return "\n".join("  ".join(f.ljust(w) for f, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class explain:  # lowercase, because it is used as `with fastseg.explain() as report:`
    """Record, for each op called inside the block, which path ran and why.

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
    if torch.compiler.is_compiling():
        return _reference_depth > 0
    blocks = _in_reference.get()
    return bool(blocks) and any(block[0] for block in blocks)


def record(op: str, x: Tensor, path: str, why: str) -> None:
    """Record for ``explain`` what was decided for ``op``; must not be called while compiling."""
    report = _report.get()
    if report is not None:
        report.decisions.append(
            Decision(op, tuple(x.shape), str(x.dtype).removeprefix("torch."), str(x.device), path, why)
        )
