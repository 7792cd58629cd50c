"""Sizes as callers pass them."""

import operator

import torch


def whole(n):
    """``n`` as an int if it is a whole number, numpy's included; else unchanged, for the caller to report."""
    if isinstance(n, (int, float, torch.SymInt, torch.SymFloat)):  # Dynamo cannot ask a symbol for its index
        return n
    try:
        return operator.index(n)
    except TypeError:
        return n
