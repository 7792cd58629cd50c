"""Sizes as callers give them."""

import operator

import torch


def whole(n):
    """``n`` as an int where it is a whole number (numpy's count), else as it is: the caller says what is wrong."""
    if type(n) is int or isinstance(n, torch.SymInt):
        return n
    try:
        return operator.index(n)
    except TypeError:
        return n
