"""Choose between kernel and reference, apply ``fastseg.reference()``, and record the choice."""

import importlib.util
import os
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastseg.ops.core.explain import IN_REFERENCE, _in_reference, _report, in_reference, record
from fastseg.ops.core.forms import IN_FORCE, Form, Forms, OneKernel, _forced, forced_to_reference
from fastseg.ops.core.torch_private import forward_ad_level, is_tracing, transforms_active

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is decorated
EMULATED = False  # True in the second checker of tests, whose CUDA tensors say that they are on the CPU
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def use_kernel(
    op: str, x: Tensor, *others: Tensor | None, unsupported: str = "", form: Callable[[], str] | None = str
) -> bool:
    """True if the registered op computes this call, False if torch's own ops must; records it for ``explain``.

    Torch's ops run where no kernel takes such tensors, inside ``fastseg.reference()``, and where something follows the
    call that understands torch's ops only.

    Args:
        op: public name, for error messages and ``explain``.
        x: the tensor whose device and dtype decide.
        others: further tensors, which must be on the device of ``x``; None is skipped.
        unsupported: why the op cannot take this configuration, or "".
        form: returns what ``explain`` says of the op's one kernel; called only inside ``explain``. None: the op has
            several forms, and records the one that it chooses.

    Raises:
        ValueError: the tensors are on different devices.
    """
    device = x.device
    for t in others:
        if t is not None and t.device != device:
            raise _elsewhere(op, x, t)
    if torch.compiler.is_compiling():
        return not (in_reference() or unsupported or _no_kernel(x))
    why = IN_REFERENCE if _in_reference.get() and in_reference() else ""
    if not why and _forced.get() and forced_to_reference(op):
        why = IN_FORCE
    why = why or unsupported or _no_kernel(x)
    if not why and (transforms_active() or is_tracing() or forward_ad_level() >= 0):
        why = _follower((x, *others))
    if _report.get() is not None:
        if why:
            record(op, x, "reference", why, "reference")
        elif form is not None:
            record(op, x, "triton", form(), "kernel")
    return not why


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
    if others:
        one_device(name or forms.op, x, others)
    why = _no_kernel(x)
    if torch.compiler.is_compiling():
        return forms.in_graph(OneKernel(why, () if why else sizes)) is forms.forms[0]
    if not why and (transforms_active() or is_tracing() or forward_ad_level() >= 0):
        why = _follower((x, *others))
    return forms.decide(OneKernel(why, () if why else sizes), x, name) is forms.forms[0]


def what_follows(*tensors: Tensor | None) -> str:
    """Name what follows an eager call on these tensors and understands torch's own ops only, or ""."""
    watched = transforms_active() or is_tracing() or forward_ad_level() >= 0
    return _follower(tensors) if watched else ""


def form_of(forms: Forms, request: Hashable, x: Tensor) -> Form:
    """The form for this request, chosen and recorded for ``explain`` as a call on ``x``; the caller runs it."""
    return forms.in_graph(request) if torch.compiler.is_compiling() else forms.decide(request, x)


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
    """True if Triton kernels can run on tensors like ``x``."""
    if torch.compiler.is_compiling():  # a captured graph holds the registered op
        return not (in_reference() or _no_kernel(x))
    return kernels_run_eagerly(x)


def kernels_run_eagerly(x: Tensor) -> bool:
    """``kernels_run``, where no compiler looks on."""
    return not ((_in_reference.get() and in_reference()) or _no_kernel(x) or _follower((x,)))


def record_reference(op: str, x: Tensor, why: str) -> None:
    """Record for ``explain`` that ``op`` has only its reference path."""
    use_kernel(op, x, unsupported=why)


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
    if torch.compiler.is_dynamo_compiling() or forward_ad_level() < 0 or torch.compiler.is_compiling():
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _follower(tensors: Iterable[Tensor | None]) -> str:
    """Name what follows eager calls on these tensors and understands torch's own ops only, or ""."""
    if transforms_active():
        return "a transform of functions"
    if is_tracing():
        return "torch.jit.trace"
    return "forward-mode AD" if forward_ad_level() >= 0 and has_tangent(*tensors) else ""


def followed(*tensors: Tensor | None) -> bool:
    """True if a compiler, a trace, a function transform or forward-mode AD follows a call on these tensors.

    The call must then run torch's own ops, one by one. It must not read values, nor write in place to a tensor that a
    transform may have to widen.
    """
    if torch.compiler.is_compiling() or transforms_active() or is_tracing():
        return True
    return forward_ad_level() >= 0 and has_tangent(*tensors)


def followed_eagerly(*tensors: Tensor | None) -> bool:
    """``followed``, but not by a compiler: a graph holds the registered op, a trace or a transform torch's own ops."""
    return not torch.compiler.is_compiling() and bool(_follower(tensors))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution computes in: autocast's if autocast is on, else that of ``x`` (float64 stays)."""
    kind = x.device.type
    if x.dtype in KERNEL_DTYPES and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def autocasts(x: Tensor) -> bool:
    """True if autocast is on for the device of ``x``; there is none for meta tensors, and torch raises if asked."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
