"""Sizes as callers pass them."""

import operator

import torch
from torch import Tensor

from fastseg.ops.core.torch_private import is_tracing


def whole(n):
    """``n`` as an int if it is a whole number, numpy's included; else unchanged, for the caller to report.

    A size of ``torch.jit.trace`` is a tensor and stays one: as a number it would be that of the example for ever.
    """
    # Dynamo cannot ask a symbol for its index, and torch 2.11's not None either: the error ends its trace.
    if n is None or isinstance(n, (int, float, torch.SymInt, torch.SymFloat)):
        return n
    if isinstance(n, Tensor) and is_tracing():
        return n
    try:
        return operator.index(n)
    except TypeError:
        return n


def is_open(n) -> bool:
    """True of a number that a graph or a trace leaves open; an answer about its value would hold for all of them."""
    return isinstance(n, (torch.SymInt, Tensor))


def is_size(n) -> bool:
    """True of a whole number of elements, and of one that is open."""
    return isinstance(n, int) or is_open(n)


def by_index(*sizes) -> bool:
    """True where a map must be cut to ``sizes`` by indices: a slice of open sizes would add a guard to a graph.

    Torch's exporter of traces to ONNX loses the channels of a slice of open sizes, and of a padded map.
    """
    if torch.compiler.is_dynamo_compiling():  # to Dynamo a symbol is an int, but one without an end
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return any(not statically_known_true(n < 2**31) for n in sizes)
    if any(isinstance(n, torch.SymInt) for n in sizes):
        return True
    return any(isinstance(n, Tensor) for n in sizes) and torch.onnx.is_in_onnx_export()


def scaled(n, factor: float):
    """``floor(n * factor)``, recorded where ``n`` is a size of a trace."""
    return (n * factor).floor().long() if isinstance(n, Tensor) else torch.sym_int(n * factor)


def same_number(a, b) -> bool:
    """True if ``a == b``; of open numbers only if they are always equal, so that a graph gets no guard."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    # To Dynamo a symbol is an int.
    if not (isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) or torch.compiler.is_dynamo_compiling()):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # two seconds, paid in exports only

    return statically_known_true(a == b)
