"""A ``Runner``'s large maps stay in memory between its calls."""

import subprocess
import sys

import pytest

from fastseg.inference import kept_memory
from fastseg.inference.kept_memory import MUCH, Heap, KeptMemory
from fastseg.ops.core.dispatch import INTERPRETED

IN_A_NEW_PROCESS = """
import resource, torch
from torch import nn
from fastseg.inference import Runner

torch.set_num_threads(1)
model, x = nn.Sequential(nn.Conv2d(3, 160, 1), nn.ReLU(), nn.Conv2d(160, 1, 1)), torch.rand(1, 3, 256, 256)  # 40 MiB
runner, faults = Runner(model, x, exact=True), []
for _ in range(7):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    runner(x)
    faults.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
print(max(faults[:2]), max(faults[-3:]))
"""


@pytest.mark.skipif(INTERPRETED, reason="of the form for a CPU")
@pytest.mark.skipif(not kept_memory.KEEPS, reason="another C library")
def test_large_maps_fault_in_the_first_calls_alone():
    """In a process whose heap has no room yet: torch's own way is to map and unmap in each call."""
    done = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS], capture_output=True, text=True, check=True)
    first, then = map(int, done.stdout.split())
    assert first >= MUCH and then < MUCH // 8


def asked(calls: list) -> Heap:
    return Heap(lambda name, value: calls.append((name, value)) or 1, lambda pad: calls.append("trimmed") or 1)


def test_settings_hold_while_calls_run_and_while_a_runner_lives(monkeypatch):
    calls: list = []
    pages = iter([0, MUCH, 0, MUCH - 1, 0, MUCH, 0, MUCH])
    monkeypatch.setattr(kept_memory, "HEAP", asked(calls))
    monkeypatch.setattr(kept_memory, "KEEPS", True)
    monkeypatch.setattr(kept_memory, "faulted", lambda: 1 + next(pages))
    memory = KeptMemory()
    with memory.call(again=False):  # what is prepared is not counted
        pass
    for _ in range(3):  # much, less, much
        with memory.call(again=True):
            pass
    assert not memory.keeps and not calls
    with memory.call(again=True):
        pass
    assert memory.keeps and calls == [(kept_memory.TRIM_THRESHOLD, -1), (kept_memory.MMAP_THRESHOLD, MUCH)]
    calls.clear()
    with pytest.raises(RuntimeError), memory.call(again=True), memory.call(again=True):
        raise RuntimeError
    assert calls == [(kept_memory.MMAP_MAX, 0), (kept_memory.MMAP_MAX, 65536)]  # nested calls, an error inside
    calls.clear()
    del memory
    assert calls[0][0] == kept_memory.TRIM_THRESHOLD and calls[0][1] > 0 and calls[-1] == "trimmed"
