"""Peak memory, launches and kept bytes are counted by one function each, and come to the numbers of a call by hand."""

import platform

import pytest
import torch

from fastseg.measure import counting
from fastseg.measure.machine import machine, version

CPU = torch.device("cpu")
MIB = 2**18  # elements of fp32


def test_peak_counts_what_lives_at_once_each_storage_once():
    x = torch.zeros(MIB)

    def chain():
        y = x + 1  # 1 MiB
        z = (y * 2).view(-1, 2)  # 2 MiB: a view is no memory
        del y
        return z - 1  # 2 MiB

    assert counting.peak_mib(chain, CPU) == 2.0
    assert counting.peak_mib(lambda: [x + i for i in range(5)], CPU) == 5.0
    assert counting.peak_mib(lambda: x.view(2, -1), CPU) == 1.0  # the input's own storage, which the view shows


def test_launches_are_ops_that_write():
    x = torch.zeros(4)
    assert counting.launches(lambda: (x + 1).view(2, 2).relu_(), CPU) == 2
    assert counting.launches(lambda: x.view(2, 2), CPU) == 0


def test_kept_bytes_leave_parameters_out():
    x, layer = torch.ones(8, 4, requires_grad=True), torch.nn.Linear(4, 4)
    assert counting.kept_bytes(lambda: x.exp().square()) == 8 * 4 * 4  # of both, one storage
    assert counting.kept_bytes(lambda: layer(x)) == 8 * 4 * 4


def test_work_is_of_the_convolutions():
    x, conv = torch.zeros(1, 2, 8, 8), torch.nn.Conv2d(2, 4, 3, padding=1, bias=False)
    found = counting.work(lambda: conv(x).relu())
    assert found["gflop"] == pytest.approx(2 * 9 * 2 * 4 * 64 * 1e-9)
    assert found["mbytes"] == pytest.approx(4 * (2 * 64 + 9 * 8 + 4 * 64) * 1e-6)


def test_machine_names_what_a_time_depends_on():
    facts = machine(CPU)
    assert facts["chip"] == f"cpu ({platform.machine()})" and facts["torch"] == torch.__version__
    assert facts["threads"] == str(torch.get_num_threads()) and facts["python"] == platform.python_version()
    assert version("no-such-package-here") == "" and facts.get("openvino", "") == version("openvino")
