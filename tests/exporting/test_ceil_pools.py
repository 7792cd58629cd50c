"""Pools with ``ceil_mode`` as pools without, against torch's own; and a package that is called at a size of its own."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import fastseg
from fastseg.exporting import package_file
from fastseg.exporting.answer import Answer
from fastseg.exporting.ceil_pools import CEIL_POOLS, avg_pool2d, max_pool2d_with_indices
from fastseg.exporting.trace import traced

WINDOWS = [(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 0, 1), (3, 2, 0, 1), (3, 3, 0, 2), (2, 1, 1, 1)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", list(itertools.product((7, 8), (9, 10))), ids=str)
def test_as_torchs(window, size):
    k, s, p, d = window
    x = torch.randn(2, 3, *size)
    x[0, 0, -1, -1] = torch.nan
    y, index = max_pool2d_with_indices(x, [k], [s], [p], [d], True)
    want, where = F.max_pool2d(x, k, s, p, d, True, True)
    assert torch.equal(y.nan_to_num(9.0), want.nan_to_num(9.0)) and torch.equal(index, where)
    if d == 1:
        for counts, divisor in itertools.product((True, False), (None, 5)):
            y = avg_pool2d(x, [k, k], [s, s], [p, p], True, counts, divisor)
            torch.testing.assert_close(y, F.avg_pool2d(x, k, s, p, True, counts, divisor), equal_nan=True)


def test_what_is_left_to_torch():
    x = torch.randn(1, 1, 5, 5)
    assert max_pool2d_with_indices(x, [2], [2]) is NotImplemented  # no ceil_mode
    assert max_pool2d_with_indices(x, [1], [2], [0], [1], True) is NotImplemented  # a window may begin behind the map
    assert avg_pool2d(x, [1], [2], [0], True) is NotImplemented


X = torch.randn(2, 3, 8, 12)


class Halved(torch.nn.Module):
    """Pools of every sort, and the codes of one."""

    def forward(self, x):
        y, index = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        means = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        return F.max_unpool2d(y, index, 2, output_size=x.shape[-2:]) + means.mean()


def test_a_package_of_free_sizes_holds_no_such_pool(tmp_path, monkeypatch):
    """With one, AOTInductor's gave 64 of 129 columns, in rows 65 apart."""
    compiled = []
    compiler = lambda: lambda program, **options: compiled.append(program)
    monkeypatch.setattr(package_file, "aoti_compiler", compiler)
    answer = Answer(Halved().eval(), "logits", None, X)
    package_file.write_package(traced(answer, X), tmp_path / "halved.pt2", {})
    pools = [node for node in compiled[0].graph.nodes if node.target in CEIL_POOLS]
    assert pools and not any(True in node.args[4 if "avg" in str(node.target) else 5 :][:1] for node in pools)
    x = torch.randn(1, 3, 9, 13)
    torch.testing.assert_close(compiled[0].module()(x), Halved()(x))


@pytest.mark.long  # Inductor and a C++ compiler
def test_a_package_takes_sizes_that_the_stride_does_not_divide(tmp_path):
    done = fastseg.export(Halved().eval(), tmp_path / "halved.pt2", example=X, output="logits")
    assert done.free == ("batch", "height", "width")  # the comparison is at odd sizes too
