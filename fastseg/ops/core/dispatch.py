"""Choose between kernel and reference, apply ``fastseg.reference()``, and record the choice."""

import importlib.util
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastseg.ops.core.explain import IN_REFERENCE, _in_reference, _report, in_reference, record
from fastseg.ops.core.forms import Forms, OneKernel, _forced
from fastseg.ops.core.torch_private import forward_ad_level, is_tracing, transforms_active

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is decorated
EMULATED = False  # True in the second checker of tests, whose CUDA tensors say that they are on the CPU
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def runs_kernel(forms: Forms, x: Tensor, sizes: tuple, *others: Tensor | None, name: str = "") -> bool:
    """Ask the list of an op that has one kernel. True if the registered op computes the call, False if torch's ops.

    A graph holds the registered op, which asks the list when it runs: of symbolic sizes nothing is known before.

    Args:
        forms: a ``KernelForm`` and torch's own ops.
        x: the tensor whose device and dtype decide.
        sizes: what the kernel's ``unsupported`` takes.
        others: further tensors, which must be on the device of ``x``; None is skipped.
        name: of the op in error messages and ``explain``, if not the list's own.

    Raises:
        ValueError: the tensors are on different devices.
    """
    why = why_torchs(name or forms.op, x, *others)
    return forms.decide(OneKernel(why, () if why else sizes), x, name) is forms.forms[0]


def why_torchs(op: str, x: Tensor, *others: Tensor | None) -> str:
    """Why torch's own ops must compute a call, whatever its sizes, or "".

    They must where no kernel takes tensors like ``x``, and where something follows the call that understands torch's
    ops only: what a list's kernels refuse.

    Args:
        op: its name in error messages.
        x: the tensor whose device and dtype decide.
        others: further tensors, which must be on the device of ``x``; None is skipped.

    Raises:
        ValueError: the tensors are on different devices.
    """
    device = x.device
    for t in others:
        if t is not None and t.device != device:
            raise _elsewhere(op, x, t)
    why = _no_kernel(x)
    if why or torch.compiler.is_dynamo_compiling():
        return why
    watched = transforms_active() or is_tracing() or forward_ad_level() >= 0
    return what_follows(x, *others) if watched else ""


def what_follows(*tensors: Tensor | None) -> str:
    """Name what follows a call on these tensors and understands torch's own ops only, or ""; a compiler is none.

    ``torch.compile`` and ``torch.export`` understand registered ops.
    """
    if torch.compiler.is_dynamo_compiling():  # first: it follows none of the next questions
        return ""
    if transforms_active():
        return "a transform of functions"
    if is_tracing():
        return "torch.jit.trace"
    return "forward-mode AD" if forward_ad_level() >= 0 and has_tangent(*tensors) else ""


def known(*sizes: Any) -> tuple:
    """The sizes, but () in a captured graph, where they are symbols: the registered op asks when it runs."""
    return () if torch.compiler.is_compiling() else sizes


def one_device(op: str, x: Tensor, others: Iterable[Tensor | None]) -> None:
    """Raise unless all tensors are on the device of ``x``; None is skipped."""
    device = x.device
    for t in others:
        if t is not None and t.device != device:
            raise _elsewhere(op, x, t)


def _elsewhere(op: str, x: Tensor, t: Tensor) -> ValueError:
    return ValueError(f"{op}: tensors on {x.device} and {t.device}; move them to one device")


def is_torchs(x: Tensor) -> bool:
    """Whether torch's own ops are all there is for ``x``, and nobody asks why: on a CPU, and nothing follows the call.

    Small maps take a CPU so few microseconds that more questions would cost as much as the answer.
    """
    if INTERPRETED or EMULATED or type(x) is not Tensor or not x.is_cpu:
        return False
    if torch.compiler.is_dynamo_compiling():  # first: it follows none of the next questions
        return False
    if transforms_active() or is_tracing() or forward_ad_level() >= 0:
        return False
    return _report.get() is None and not _forced.get()


def kernels_run(x: Tensor) -> bool:
    """True if Triton kernels can run on tensors like ``x``, or a captured graph may hold the op that has them."""
    if torch.compiler.is_dynamo_compiling():
        return not (in_reference() or _no_kernel(x))
    if (_in_reference.get() and in_reference()) or _no_kernel(x):
        return False
    return not ((transforms_active() or is_tracing() or forward_ad_level() >= 0) and what_follows(x))


def record_reference(op: str, x: Tensor, why: str) -> None:
    """Record for ``explain`` that ``op`` has only its reference path."""
    record(op, x, "reference", IN_REFERENCE if in_reference() else why, "reference")


def no_kernel(x: Tensor) -> str:
    """Why no kernel can run on a tensor like ``x``, or ""."""
    return _no_kernel(x)


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
    """True if the op's own Function must record this call; a captured graph records the bare op instead."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(t is not None and t.requires_grad for t in tensors)
    )


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD follows one, in eager code."""
    if torch.compiler.is_dynamo_compiling() or forward_ad_level() < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def followed(*tensors: Tensor | None) -> bool:
    """True if a compiler, a trace, a function transform or forward-mode AD follows a call on these tensors.

    The call must then run torch's own ops, one by one. It must not read values, nor write in place to a tensor that a
    transform may have to widen.
    """
    if torch.compiler.is_compiling() or transforms_active() or is_tracing():
        return True
    return forward_ad_level() >= 0 and has_tangent(*tensors)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution computes in: autocast's if autocast is on, else that of ``x`` (float64 stays)."""
    kind = x.device.type
    if x.dtype in KERNEL_DTYPES and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def autocasts(x: Tensor) -> bool:
    """True if autocast is on for the device of ``x``; there is none for meta tensors, and torch raises if asked."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
