"""Kernel or reference: the one decision, the switch that forces the reference, and the record of what was decided."""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator, suppress
from contextvars import ContextVar, Token
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is decorated
IN_REFERENCE = "inside fastseg.reference()"  # a decision's reason
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_in_reference: ContextVar[bool] = ContextVar("fastseg_in_reference", default=False)
_reference_depth = 0  # the same for compiled code: Dynamo cannot trace ContextVar.get, but guards a module variable
_report: ContextVar["Report | None"] = ContextVar("fastseg_report", default=None)


class reference(ContextDecorator):  # named as it is used: `with fastseg.reference():`
    """Inside the block (or the decorated function), every fastseg op runs its plain-PyTorch reference.

    The A/B switch for tests, benchmarks and debugging. Scoped to the calling thread or task; code compiled by
    ``torch.compile`` sees it process-wide.
    """

    def __init__(self) -> None:
        self._tokens: list[Token[bool]] = []  # one an entry: a block may be entered again inside itself

    def _recreate_cm(self) -> "reference":
        return reference()  # a decorated function's calls, in any threads, share nothing

    def __enter__(self) -> "reference":
        global _reference_depth
        self._tokens.append(_in_reference.set(True))
        _reference_depth += 1
        return self

    def __exit__(self, *exc) -> None:
        global _reference_depth
        _reference_depth -= 1
        with suppress(ValueError):  # left in another thread or task, as a generator may be: there it was never entered
            _in_reference.reset(self._tokens.pop())


class Decision(NamedTuple):
    op: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    path: str  # "triton", "cudnn", "torch" (an own form in plain PyTorch) or "reference"
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


class explain:  # named as it is used: `with fastseg.explain() as report:`
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


def use_kernel(
    op: str, x: Tensor, *others: Tensor | None, unsupported: str = "", form: Callable[[], str] = str
) -> bool:
    """Whether ``op`` runs its Triton kernel on these tensors; records the decision for ``explain``.

    Args:
        op: public name, for messages.
        x: the tensor that decides device and dtype.
        others: further tensors; they must be on the device of ``x``. None is skipped.
        unsupported: why the kernel cannot take this configuration, or "".
        form: says which of the op's kernels runs; called only where a record is kept.

    Raises:
        ValueError: the tensors are on different devices.
    """
    for t in others:
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: tensors on {x.device} and {t.device}; move them to one device")
    if torch.compiler.is_compiling():
        return not (in_reference() or unsupported or _no_kernel(x))
    why = IN_REFERENCE if _in_reference.get() else unsupported or _no_kernel(x) or _follower((x, *others))
    if _report.get() is not None:
        record(op, x, *(("reference", why) if why else ("triton", form())))
    return not why


def kernels_run(x: Tensor) -> bool:
    """Whether kernels run on a tensor like ``x`` at all: for choices of what to ask an op for."""
    return not (in_reference() or _no_kernel(x) or followed(x))


def in_reference() -> bool:
    """Whether ``fastseg.reference()`` is on."""
    return bool(_reference_depth if torch.compiler.is_compiling() else _in_reference.get())


def record_reference(op: str, x: Tensor, why: str) -> None:
    """Record for ``explain`` that ``op`` has only its reference path."""
    use_kernel(op, x, unsupported=why)


def record(op: str, x: Tensor, path: str, why: str) -> None:
    """Record for ``explain`` what was decided for ``op``; not to be called while compiling."""
    report = _report.get()
    if report is not None:
        report.decisions.append(
            Decision(op, tuple(x.shape), str(x.dtype).removeprefix("torch."), str(x.device), path, why)
        )


def _no_kernel(x: Tensor) -> str:
    """Why no kernel can run on a tensor like ``x``, or ""."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if x.device.type == "cuda":
        return "" if x.dtype in KERNEL_DTYPES else f"no kernel for {x.dtype}"
    if x.device.type != "cpu":
        return f"no kernel for a {x.device.type} tensor"
    if not INTERPRETED:
        return "CPU tensor"
    return "" if x.dtype in (*KERNEL_DTYPES, torch.float64) else f"no kernel for {x.dtype}"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether the op's own Function shall record this call; a captured graph records the bare op instead."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(t is not None and t.requires_grad for t in tensors)
    )


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD follows one, in eager code."""
    if torch.compiler.is_dynamo_compiling() or forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


# Private to torch; where a version lacks one, its kind of follower is not seen.
transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", bool)
is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", bool)


def _follower(tensors: Iterable[Tensor | None]) -> str:
    """What follows eager calls on these tensors through torch's own ops, and knows no others, or ""."""
    if transforms_active():
        return "a transform of functions"
    if is_tracing():
        return "torch.jit.trace"
    return "forward-mode AD" if forward_ad._current_level >= 0 and has_tangent(*tensors) else ""


def followed(*tensors: Tensor | None) -> bool:
    """Whether something follows a call on these tensors: a compiler, a trace, a function transform, forward-mode AD.

    Then torch's own ops must run, one by one, none of them in place on what a transform may have to widen, and no value
    may be looked at.
    """
    if torch.compiler.is_compiling() or transforms_active() or is_tracing():
        return True
    return forward_ad._current_level >= 0 and has_tangent(*tensors)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution computes in: autocast's where it is on, else that of ``x`` (float64 stays)."""
    kind = x.device.type
    if x.dtype in KERNEL_DTYPES and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
