"""Sizes as callers pass them."""

import operator

import torch


def whole(n):
    """``n`` as an int if it is a whole number, numpy's included; else unchanged, for the caller to report."""
    # Dynamo cannot ask a symbol for its index, and torch 2.11's not None either: the error ends its trace.
    if n is None or isinstance(n, (int, float, torch.SymInt, torch.SymFloat)):
        return n
    try:
        return operator.index(n)
    except TypeError:
        return n


def same_number(a, b) -> bool:
    """True if ``a == b``; of a graph's symbolic numbers only if they are always equal, so that no guard is made."""
    if not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # two seconds, paid in exports only

    return statically_known_true(a == b)
