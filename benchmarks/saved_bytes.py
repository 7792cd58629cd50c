"""Bytes that training keeps for the backward at SegNet's five stages, counted by saved-tensor hooks; no GPU needed.

    TRITON_INTERPRET=1 python benchmarks/saved_bytes.py

A stage is batch norm, ReLU and 2x2 max pooling of a convolution's output, in bf16 and channels_last: "eager" is plain
PyTorch with an in-place ReLU, "fastseg" ``batch_norm_act_max_pool2d``. Each is run on a sixteenth of the channels and
scaled: every tensor kept has them as a factor. Per image, MiB; vectors of a channel's length are counted too.
"""

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from workloads import SEGNET_STAGES, PoolShape

from fastseg.ops import BatchNormArgs, batch_norm_act_max_pool2d

SHARE = 16  # of the channels that are run


def kept_bytes(run: Callable[[], object]) -> int:
    """Bytes that autograd keeps of one call, each memory once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


def stage_bytes(shape: PoolShape, share: int = SHARE, divisor: int = 1) -> dict[str, dict[str, int]]:
    """provider -> {"kept", "index"} bytes of one stage; ``divisor`` makes the map smaller (tests)."""
    C, H, W = shape.C // share, shape.H // divisor, shape.W // divisor
    z = torch.randn(1, C, H, W).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    affine = [torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)]
    window = {"kernel_size": 2, "stride": 2, "ceil_mode": True, "return_indices": True}

    def eager() -> tuple[Tensor, Tensor]:
        y = F.relu_(F.batch_norm(z, None, None, *affine, training=True))
        return F.max_pool2d(y, **window)

    fused = lambda: batch_norm_act_max_pool2d(z, BatchNormArgs(None, None, *affine, True), "relu", **window)
    return {
        name: {"kept": share * kept_bytes(run), "index": share * run()[1].nbytes}
        for name, run in (("eager", eager), ("fastseg", fused))
    }


def table() -> str:
    """The README's table."""
    lines = ["| stage | kept MiB: eager / fastseg | | index MiB: int64 / 2 bits |", "| --- | --- | --- | --- |"]
    totals: dict[tuple[str, str], int] = {}
    for shape in [s for s in SEGNET_STAGES if s.N == 1]:
        counted = stage_bytes(shape)
        for name, row in counted.items():
            for what, count in row.items():
                totals[name, what] = totals.get((name, what), 0) + count
        lines.append(
            _line(f"{shape.C}x{shape.H}x{shape.W}", {(n, w): c for n, r in counted.items() for w, c in r.items()})
        )
    return "\n".join([*lines, _line("all five", totals)])


def _line(name: str, counts: dict[tuple[str, str], int]) -> str:
    eager, ours, int64, codes = (
        counts[key] for key in (("eager", "kept"), ("fastseg", "kept"), ("eager", "index"), ("fastseg", "index"))
    )
    mib = lambda count: f"{count / 2**20:.2f}"
    return f"| {name} | {mib(eager)} / {mib(ours)} | {ours / eager:.2f} | {mib(int64)} / {mib(codes)} |"


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        sys.exit("saved_bytes: the kernels run under the interpreter here; set TRITON_INTERPRET=1")
    print(table())
