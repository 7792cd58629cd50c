"""The tables that the kernel writes at each call against the planner's, and that nothing of a call outlives it."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastseg.kernels.atrous_conv.bwd import atrous_conv_bwd_weight
from fastseg.kernels.atrous_conv.fwd import atrous_conv_bwd_input, atrous_conv_fwd
from fastseg.kernels.atrous_conv.regions import (
    Branch,
    forward_regions,
    input_regions,
    region_rows,
    work_items,
)
from fastseg.kernels.atrous_conv.tables import tables

ASPP = lambda *rates: (Branch(1, 1), *(Branch(3, rate) for rate in rates))
# N, H, W, branches: rates at half the map, at the map, past it; cuts that fall together; many branches; one pixel.
GEOMETRIES = [
    (2, 8, 8, ASPP(2, 3, 5)),
    (3, 9, 7, ASPP(1, 4, 6)),
    (1, 6, 8, ASPP(3, 4)),
    (5, 5, 4, ASPP(5, 9)),
    (2, 7, 11, (Branch(3, 2),)),
    (2, 7, 6, (Branch(3, 2), Branch(3, 2), Branch(3, 4))),
    (4, 1, 1, ASPP(6)),
    (2, 4, 1, (Branch(3, 1), Branch(3, 3))),
    (1, 3, 5, (Branch(1, 1), Branch(1, 7))),
    (1, 5, 6, tuple(Branch(3, rate) for rate in (1, 2, 3, 4, 5, 6, 7, 2**40))),
]


@pytest.mark.parametrize("N, H, W, branches", GEOMETRIES, ids=str)
@pytest.mark.parametrize("mirrored", [False, True], ids=["forward", "input"])
def test_tables_are_the_planners(N, H, W, branches, mirrored, device):
    block_m = 1 if N % 2 else 16
    regions = (input_regions if mirrored else forward_regions)(H, W, branches)
    x = torch.empty(N, 1, H, W, device=device)
    together = min(N, 2)  # of five images, one is left
    items, rows = (t.tolist() for t in tables(x, branches, block_m, mirrored=mirrored, together=together))
    wanted = region_rows(regions, W, branches, mirrored=mirrored)
    assert [row for _, row in items] == [row for _, row in work_items(regions, N, block_m, together)]
    wanted_of_items = [wanted[index] for index, _ in work_items(regions, N, block_m, together)]
    for (index, _), want in zip(items, wanted_of_items, strict=True):
        steps = {*range(7, len(want), 8), *range(8, len(want), 8)}  # of one tap: never taken
        row = rows[index]
        assert all(a == b for i, (a, b) in enumerate(zip(row, want, strict=True)) if i not in steps), (row, want)
        for tap in range(6, len(want), 8):
            if want[tap + 3] > 1:
                assert row[tap + 1] == want[tap + 1]
            if want[tap + 4] > 1:
                assert row[tap + 2] == want[tap + 2]


class _Made(TorchDispatchMode):
    """Weak references to all memory that ops make."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.storages.append(weakref.ref(t.untyped_storage()))
        return out


@pytest.mark.parametrize("launcher", ["forward", "input", "weight"])
def test_a_first_call_leaves_nothing_alive(launcher, device):
    """CUDA graphs of torch.compile run the first call in a pool of their own, and look for what outlives it."""
    H, W = 5, 7 + ["forward", "input", "weight"].index(launcher)  # a size that no other test has seen
    nhwc = lambda n, c, h, w: torch.zeros(n, h, w, c, device=device).permute(0, 3, 1, 2)
    x, dy, weights = nhwc(1, 8, H, W), nhwc(1, 16, H, W), [nhwc(8, 8, K, K) for K in (1, 3)]
    with _Made() as made:
        if launcher == "forward":
            y = atrous_conv_fwd(x, weights, [], None, [1, 3], "none")
        elif launcher == "input":
            y = atrous_conv_bwd_input(dy, weights, [1, 3])
        else:
            y = atrous_conv_bwd_weight(dy, x, [1, 3], [1, 3])
    del y
    gc.collect()
    given = {t.data_ptr() for t in (x, dy, *weights)}  # of which views were made
    left = [storage for ref in made.storages if (storage := ref()) is not None and storage.data_ptr() not in given]
    assert made.storages and not left
