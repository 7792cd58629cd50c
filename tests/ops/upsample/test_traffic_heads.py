"""Counted traffic of the fused heads: the figures in the headers of their kernels, to the byte.

Distinct bytes of each launch, counted by the interpreter's checker: what a cache serves again is not DRAM's.
"""

import pytest
import torch

from fastseg.ops import upsample_argmax, upsample_cross_entropy
from fastseg.ops.core.dispatch import INTERPRETED

if INTERPRETED:
    from traffic import count_traffic

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="traffic is counted under the interpreter")

N, C, LOW, FULL = 2, 12, 5, 20
LO, PIXELS = 4 * N * C * LOW * LOW, N * FULL * FULL


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("full", [FULL, 2 * LOW], ids=["pruned", "all classes"])
def test_argmax(full, layout):
    logits = torch.randn(N, C, LOW, LOW).to(memory_format=layout)
    with count_traffic() as traffic:
        upsample_argmax(logits, full)
    total = traffic.total
    assert (total.read_bytes, total.written_bytes, total.launches) == (LO, N * full * full, 1)


def test_pruning_interpolates_a_few_classes():
    """Accesses, repetitions counted: one class that wins everywhere costs less than a third of every class."""
    logits = torch.randn(N, C, LOW, LOW)
    with count_traffic() as every:
        upsample_argmax(torch.ones_like(logits), FULL)  # every class can win
    logits[:, 5] += 20
    with count_traffic() as one:
        upsample_argmax(logits, FULL)
    assert one.total.reads * 3 < every.total.reads


def test_cross_entropy():
    logits = torch.randn(N, C, LOW, LOW, requires_grad=True)
    target = torch.randint(C, (N, FULL, FULL), dtype=torch.uint8)
    with count_traffic() as traffic:
        loss = upsample_cross_entropy(logits, target)
    forward = traffic.total
    programs = N * LOW  # one block of columns, one split
    assert (forward.read_bytes, forward.written_bytes) == (LO + PIXELS, 4 * PIXELS + 3 * 4 * programs)
    with count_traffic() as traffic:
        loss.backward()
    backward = traffic.total
    assert (backward.read_bytes, backward.written_bytes) == (LO + 5 * PIXELS + 4, LO)
    assert forward.launches == backward.launches == 1
    with torch.no_grad(), count_traffic() as traffic:
        upsample_cross_entropy(logits, target)
    assert traffic.total.written_bytes == 3 * 4 * programs
