"""The interpreter's checker and the counters: each planted fault is reported, and clean kernels pass."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import OutOfBoundsError, RaceError, install
from torch import Tensor
from traffic import count_launches, count_traffic
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from fastseg.kernels.runtime.launch import launch
from fastseg.ops.core.dispatch import INTERPRETED
from fastseg.testing import compare

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the checker hooks the interpreter")
N, BLOCK = 40, 64  # one block overhangs by 24 elements
SEVERAL = 4 * BLOCK


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0) if MASK_LOAD else tl.load(x_ptr + offs)  # planted: load
    if MASK_STORE:
        tl.store(y_ptr + offs, x, mask=offs < n)
    else:
        tl.store(y_ptr + offs, x)  # planted: store


@triton.jit
def _accumulate_kernel(x_ptr, y_ptr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.sum(tl.load(x_ptr + offs), axis=0)
    if ATOMIC:
        tl.atomic_add(y_ptr, s)
    else:
        tl.store(y_ptr, tl.load(y_ptr) + s)  # planted: accumulation


@triton.jit
def _overlap_kernel(y_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, offs.to(tl.float32), mask=offs < n)  # planted: overlap


@triton.jit
def _neighbour_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + 1, mask=offs + 1 < n, other=0.0)  # planted: neighbour
    tl.store(x_ptr + offs, x, mask=offs < n)


@triton.jit
def _twice_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    mean = tl.sum(tl.load(x_ptr + offs, mask=mask, other=0.0), axis=0) / n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=0.0) - mean, mask=mask)


@triton.jit
def _load_helper(ptrs):
    return tl.load(ptrs)  # planted: helper


@triton.jit
def _through_helper_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, _load_helper(x_ptr + offs), mask=offs < n)


@triton.jit
def _atomics_kernel(y_ptr, n, CAS: tl.constexpr, BLOCK: tl.constexpr):
    if CAS:
        tl.atomic_cas(y_ptr + n, 0, 1)  # planted: cas
    else:
        tl.atomic_add(y_ptr + tl.arange(0, BLOCK), 1)  # planted: atomic


@triton.jit
def _atomic_beside_load_kernel(y_ptr, x_ptr):
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(x_ptr, tl.load(y_ptr))
    else:
        tl.atomic_add(y_ptr, 1)


@triton.jit
def _common_first_kernel(x_ptr):
    pid = tl.program_id(0)
    tl.store(x_ptr + 1 + pid, tl.load(x_ptr) + pid)


@triton.jit
def _interleave_kernel(pair, wrapped_ptr, desc, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    both = tl.load(tl.where(offs % 2 == 0, pair[0] + offs, pair[1] + offs))
    tl.store(y_ptr + offs, both + tl.load(wrapped_ptr + offs).to(tl.float32) + desc.load([0]))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a, b = tl.load(a_ptr + rows * BLOCK + cols), tl.load(b_ptr + rows * BLOCK + cols)
    tl.store(c_ptr + rows * BLOCK + cols, tl.dot(a, b, input_precision="ieee"))


def _planted(what: str) -> int:
    with open(__file__) as file:
        return next(i for i, line in enumerate(file, 1) if f"# planted: {what}\n" in line)


def _pair(view: bool) -> tuple[Tensor, Tensor]:
    """x, y of N elements: an exact allocation each, or views with room on both sides."""
    if view:
        return tuple(torch.zeros(N + 2 * BLOCK)[BLOCK : BLOCK + N] for _ in range(2))
    return torch.zeros(N), torch.zeros(N)


@pytest.mark.parametrize("view", [False, True], ids=["exact", "view"])
@pytest.mark.parametrize("fault", ["load", "store"])
def test_out_of_bounds_is_reported_with_kernel_and_line(fault, view):
    x, y = _pair(view)
    with pytest.raises(OutOfBoundsError) as error:
        launch(_copy_kernel, (1,), x, y, N, MASK_LOAD=fault != "load", MASK_STORE=fault != "store", BLOCK=BLOCK)
    message = str(error.value)
    assert message.startswith(f"_copy_kernel: {fault} of 24 elements outside")
    assert f"{__file__}:{_planted(fault)}" in message
    assert "0 bytes past the end" in message
    assert isinstance(error.value, InterpreterError)


def test_out_of_bounds_in_a_device_function_is_reported():
    with pytest.raises(OutOfBoundsError, match=f"_through_helper_kernel: load .*:{_planted('helper')};"):
        launch(_through_helper_kernel, (1,), *_pair(True), N, BLOCK=BLOCK)


def test_out_of_bounds_by_one_element_is_reported():
    x, y = torch.zeros(BLOCK - 1), torch.zeros(2 * BLOCK)[: BLOCK - 1]
    for load, store in ((False, True), (True, False)):
        with pytest.raises(OutOfBoundsError, match=r"of 1 elements .* 0 bytes past the end"):
            launch(_copy_kernel, (1,), x, y, BLOCK - 1, MASK_LOAD=load, MASK_STORE=store, BLOCK=BLOCK)


@pytest.mark.parametrize(("cas", "count"), [(False, 24), (True, 1)], ids=["atomic", "cas"])
def test_out_of_bounds_of_an_atomic_is_reported(cas, count):
    y = torch.zeros(2 * BLOCK, dtype=torch.int32)[:N]
    line = _planted("cas" if cas else "atomic")
    with pytest.raises(OutOfBoundsError, match=f"_atomics_kernel: atomic of {count} elements .*:{line};"):
        launch(_atomics_kernel, (1,), y, N, CAS=cas, BLOCK=BLOCK)


def test_an_argument_inside_another_is_one_span():
    whole = torch.randn(2 * BLOCK)
    want = whole[8 : 8 + BLOCK].clone()
    launch(_copy_kernel, (1,), whole[8:16], whole, BLOCK, MASK_LOAD=True, MASK_STORE=True, BLOCK=BLOCK)
    assert torch.equal(whole[:BLOCK], want)


def test_tensors_in_tuples_descriptors_and_wrappers_are_arguments():
    a, b, c = (torch.randn(16) for _ in range(3))
    codes, y = torch.full((16,), -1, dtype=torch.int8), torch.empty(16)
    with count_traffic() as traffic:
        wrapped, desc = triton.reinterpret(codes, tl.uint8), TensorDescriptor.from_tensor(c, [16])
        launch(_interleave_kernel, (1,), (a, b), wrapped, desc, y, BLOCK=16)
    assert torch.equal(y, torch.where(torch.arange(16) % 2 == 0, a, b) + 255.0 + c)
    assert traffic.total.read_bytes == 64 + 16 + 64 and traffic.total.written_bytes == 64


def test_two_arguments_side_by_side_are_two_spans():
    whole = torch.zeros(3 * BLOCK)
    x, y = whole[:N], whole[2 * BLOCK :]  # what lies between belongs to neither
    with pytest.raises(OutOfBoundsError, match="load of 24 elements"):
        launch(_copy_kernel, (1,), x, y, N, MASK_LOAD=False, MASK_STORE=True, BLOCK=BLOCK)


def test_accumulation_by_several_programs_is_a_race():
    x, y = torch.ones(SEVERAL), torch.zeros(1)
    with pytest.raises(RaceError, match=f"_accumulate_kernel: race on 1 .*line {_planted('accumulation')}"):
        launch(_accumulate_kernel, (4,), x, y, ATOMIC=False, BLOCK=BLOCK)


def test_overlapping_stores_of_neighbours_are_a_race():
    with pytest.raises(RaceError, match="_overlap_kernel: race on 48 addresses") as error:
        launch(_overlap_kernel, (4,), torch.zeros(SEVERAL), SEVERAL, STEP=BLOCK - 16, BLOCK=BLOCK)
    line = _planted("overlap")
    assert f"store by program (0, 0, 0), line {line}; store by program (1, 0, 0), line {line}" in str(error.value)


def test_reading_what_a_neighbour_writes_is_a_race():
    with pytest.raises(RaceError, match=f"race on 3 .*load by .* line {_planted('neighbour')}"):
        launch(_neighbour_kernel, (4,), torch.zeros(SEVERAL), SEVERAL, BLOCK=BLOCK)


def test_an_atomic_beside_a_plain_load_is_a_race():
    y = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RaceError, match=r"load by program .*atomic by program"):
        launch(_atomic_beside_load_kernel, (3,), y, torch.zeros_like(y))


def test_clean_kernels_pass():
    install()  # a second time: nothing is checked twice
    x, y = torch.randn(SEVERAL - 3), torch.zeros(SEVERAL - 3)
    launch(_copy_kernel, (4,), x, y, x.numel(), MASK_LOAD=True, MASK_STORE=True, BLOCK=BLOCK)
    assert torch.equal(x, y)
    total = torch.zeros(1)
    launch(_accumulate_kernel, (4,), torch.ones(SEVERAL), total, ATOMIC=True, BLOCK=BLOCK)
    assert total.item() == SEVERAL
    launch(_overlap_kernel, (4,), y, y.numel(), STEP=BLOCK, BLOCK=BLOCK)
    launch(_neighbour_kernel, (1,), x[:BLOCK], BLOCK, BLOCK=BLOCK)
    launch(_common_first_kernel, (4,), x)  # all read one element, and write others


def test_bf16_dot_is_exact():
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    c = torch.empty(16, 16)
    launch(_dot_kernel, (1,), a, b, c, BLOCK=16)
    compare(c, a.double() @ b.double(), terms=16)


def test_traffic_counts_distinct_bytes():
    x, y = torch.randn(SEVERAL - 3), torch.empty(SEVERAL - 3)
    with count_traffic() as traffic, count_launches() as launches:
        launch(_copy_kernel, (4,), x, y, x.numel(), MASK_LOAD=True, MASK_STORE=True, BLOCK=BLOCK)
        launch(_copy_kernel, (4,), x.half(), y.half(), x.numel(), MASK_LOAD=True, MASK_STORE=True, BLOCK=BLOCK)
        launch(_twice_kernel, (4,), x, y, x.numel(), BLOCK=BLOCK)
    copied = traffic.by_kernel["_copy_kernel"]
    assert copied.launches == 2 and copied.read_bytes == copied.written_bytes == (4 + 2) * (SEVERAL - 3)
    twice = traffic.by_kernel["_twice_kernel"]
    assert twice.read_bytes == 4 * (SEVERAL - 3) and twice.reads == 2 * (SEVERAL - 3)
    assert twice.written_bytes == 4 * (SEVERAL - 3) and twice.writes == SEVERAL - 3
    assert traffic.total.launches == launches.total() == 3
    assert launches == {"_copy_kernel": 2, "_twice_kernel": 1}
    with count_traffic() as atomics:
        launch(_accumulate_kernel, (4,), torch.ones(SEVERAL), torch.zeros(1), ATOMIC=True, BLOCK=BLOCK)
    assert (atomics.total.read_bytes, atomics.total.written_bytes) == (4 * SEVERAL + 4, 4)
    assert traffic.total.launches == 3  # nothing is counted outside the block


def test_poison_shows_an_unwritten_element():
    y = torch.empty(SEVERAL)
    launch(_copy_kernel, (3,), torch.ones(SEVERAL), y, SEVERAL, MASK_LOAD=True, MASK_STORE=True, BLOCK=BLOCK)
    assert y[: 3 * BLOCK].eq(1).all() and y[3 * BLOCK :].isnan().all()
