"""Sizes as callers pass them."""

import operator

import torch


def whole(n):
    """``n`` as an int if it is a whole number, numpy's included; else unchanged, for the caller to report."""
    if type(n) is int or isinstance(n, torch.SymInt):
        return n
    try:
        return operator.index(n)
    except TypeError:
        return n
