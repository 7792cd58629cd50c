"""Pooling and the unpooling that it gives its indices to: codes of 2 to 8 bits in the place of int64."""

import operator
from typing import Any

from fastseg.ops.max_pool import max_pool2d
from fastseg.ops.max_unpool import max_unpool2d
from fastseg.optimizing.graph import Work, argument, aten, pair

NAME = "pool + unpool as codes"
DEVICES = ("cuda",)  # a CPU has no bytes to spare there: to make and read codes takes longer
CELLS = 256  # of a window, which a code can name


def run(work: Work) -> list[str]:
    """max_pool2d with windows side by side, whose indices go into max_unpool2d alone."""
    matched = []
    for pool in work.calls(aten.max_pool2d_with_indices.default):
        size = pair(argument(pool, "kernel_size"))
        stride = pair(argument(pool, "stride") or size)
        plain = pair(argument(pool, "padding")) == (0, 0) and pair(argument(pool, "dilation")) == (1, 1)
        indices = [node for node in pool.users if node.target is operator.getitem and node.args[1] == 1]
        readers = [user for node in indices for user in node.users]
        if not plain or stride != size or size[0] * size[1] > CELLS or not readers:
            continue
        if any(user.target is not aten.max_unpool2d.default or user.args[1] not in indices for user in readers):
            continue
        matched.append(f"{pool.name}, {', '.join(user.name for user in readers)}")
        for user in readers:
            args: Any = (user.args[0], user.args[1], size, stride, 0, user.args[2])
            work.replace(user, max_unpool2d, args)
        ceil = bool(argument(pool, "ceil_mode"))
        args = (pool.args[0], size, stride, 0, 1, ceil, True)
        work.replace(pool, max_pool2d, args, {"index_format": "compact"})
    return matched
