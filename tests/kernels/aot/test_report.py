"""The ahead-of-time report sees planted faults, and its numbers are those worked out by hand."""

import inspect

import pytest
import torch
import triton
import triton.language as tl

from fastseg.kernels.runtime.launch import launch
from fastseg.kernels.tools.cases import Claims
from fastseg.kernels.tools.machine_code import Code, read_amdgcn, read_sass
from fastseg.kernels.tools.report import TARGETS, broken_claims, compile_launches, main, occupancy, table


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


@triton.jit
def dot_kernel(
    a_ptr, b_ptr, c_ptr, K, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + offs_m[:, None] * K + offs_k[None, :])
        b = tl.load(b_ptr + offs_k[:, None] * BLOCK_N + offs_n[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(c_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], acc)


@triton.jit
def planes_kernel(x_ptr, y_ptr, C, HW, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over channels; the image's offset in i32, or in i64 with WIDE."""
    n = tl.program_id(1)
    if WIDE:
        n = n.to(tl.int64)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for c in range(0, C):
        acc += tl.load(x_ptr + (n * C * HW + c * HW + offs), mask=offs < HW, other=0.0)
    tl.store(y_ptr + n * HW + offs, acc, mask=offs < HW)


@triton.jit
def walk_kernel(x_ptr, y_ptr, steps, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """An offset that a loop carries: it grows to steps * STRIDE."""
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(steps):
        acc += tl.load(x_ptr + offs)
        offs += STRIDE
    tl.store(y_ptr + tl.arange(0, BLOCK), acc)


@triton.jit
def gather_kernel(x_ptr, index_ptr, y_ptr, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows named by memory: their offsets have no bounds."""
    offs = tl.arange(0, BLOCK)
    row = tl.load(index_ptr + offs)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(y_ptr + offs, tl.load(x_ptr + row * stride))


@triton.jit
def tiles_kernel(x_ptr, y_ptr, H, W, tiles, last, BLOCK: tl.constexpr):
    """One program number for image and tile, with i32 offsets inside the image only, and a branch at run time."""
    pid = tl.program_id(0)
    tile = pid % tiles
    if pid > last:
        tile = tl.minimum(tile, last)
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    offs = (offs // W) * W + offs % W
    image = (pid // tiles).to(tl.int64) * H * W
    tl.store(y_ptr + image + offs, tl.load(x_ptr + image + offs, mask=offs < H * W, other=0.0), mask=offs < H * W)


@triton.jit
def while_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    """The number of trips is in memory."""
    offs = tl.arange(0, BLOCK)
    row = 0
    while row < tl.load(x_ptr).to(tl.int32):
        tl.store(y_ptr + row * stride + offs, tl.load(x_ptr + offs))
        row += 1


def copy(numel: int, *, offset: int = 0) -> None:
    x = torch.empty(numel + offset, dtype=torch.float16, device="meta")[offset:]
    launch(
        copy_kernel,
        (triton.cdiv(numel, 2048),),
        x,
        torch.empty_like(x),
        numel,
        BLOCK=2048,
        num_warps=4,
        enable_fp_fusion=True,
    )


def dot(block_m: int = 64, dtype: torch.dtype = torch.float16, precision: str = "ieee", **options) -> None:
    a, b, c = (torch.empty(shape, device="meta", dtype=dtype) for shape in ((block_m, 256), (256, 128), (block_m, 128)))
    blocks = {"BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_K": 64}
    launch(
        dot_kernel,
        (1,),
        a,
        b,
        c.float(),
        256,
        PRECISION=precision,
        num_warps=4,
        enable_fp_fusion=True,
        **blocks,
        **options,
    )


def planes(shape: tuple[int, int, int], *, wide: bool) -> None:
    N, C, HW = shape
    x, y = torch.empty(shape, device="meta"), torch.empty(N, HW, device="meta")
    launch(
        planes_kernel, (triton.cdiv(HW, 256), N), x, y, C, HW, WIDE=wide, BLOCK=256, num_warps=4, enable_fp_fusion=True
    )


def only(fn, target: str = "sm_90"):
    (report,) = compile_launches(fn, target)
    return report


def test_wide_accesses_of_an_aligned_copy():
    for target in TARGETS:
        report = only(lambda: copy(8192), target)
        assert broken_claims(report, Claims()) == []
        assert all(name.endswith(".128") for name in [*report.code.loads, *report.code.stores])
        assert sum(report.code.loads.values()) == 2048 * 2 // 16 // (4 * TARGETS[target].gpu.warp_size)
        assert report.config == {"BLOCK": 2048} and report.num_warps == 4


@pytest.mark.parametrize("target", TARGETS)
def test_narrow_loads_are_seen(target):
    report = only(lambda: copy(8191), target)  # the mask cuts inside 16 bytes
    assert [text for text in broken_claims(report, Claims()) if "no 128-bit global load" in text]
    assert broken_claims(report, Claims(vector=False)) == []


def test_view_at_an_odd_offset_is_not_aligned():
    assert "no 128-bit" in broken_claims(only(lambda: copy(8192, offset=1)), Claims())[0]


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_instructions(target):
    report = only(lambda: dot(block_m=128), target)
    assert report.code.matrix[TARGETS[target].matrix] > 0
    assert broken_claims(report, Claims(matrix=True)) == []


def test_tile_too_small_for_hgmma_is_seen():
    report = only(lambda: dot(block_m=32))
    assert report.code.matrix["HMMA"] > 0
    assert "no HGMMA" in broken_claims(report, Claims(matrix=True))[0]
    assert broken_claims(report, Claims(matrix=True, small_tile=True)) == []


def test_missing_matrix_instruction_is_seen():
    assert "no HGMMA, has {}" in broken_claims(only(lambda: copy(8192)), Claims(matrix=True))[0]


def test_tf32_is_seen():
    exact = only(lambda: dot(dtype=torch.float32))
    rounded = only(lambda: dot(dtype=torch.float32, precision="tf32"))
    assert not exact.tf32 and rounded.tf32
    assert broken_claims(rounded, Claims()) == ["tf32, where fp32 was asked for"]
    assert broken_claims(rounded, Claims(tf32=True)) == []


def test_spills_are_seen():
    report = only(lambda: dot(block_m=128, maxnreg=64), "sm_80")
    assert report.code.registers <= 64 and report.code.spills > 100 and report.code.stack > 100
    assert f"{report.code.spills} spills" in broken_claims(report, Claims())[0]


def test_shared_memory_past_the_chip_is_seen():
    report = only(lambda: dot(block_m=128, num_stages=8))
    assert report.shared > 227 * 1024
    assert f"{report.shared} bytes of shared memory, 232448 allowed" in broken_claims(report, Claims())


HUGE = (70, 64, 512 * 960)  # 2.2e9 elements


def test_i32_plane_offset_is_seen():
    report = only(lambda: planes(HUGE, wide=False))
    (fault,) = report.overflows
    source, first = inspect.getsourcelines(planes_kernel.fn)
    line = first + next(i for i, text in enumerate(source) if "x_ptr + (n *" in text)
    reach = (70 - 1) * 64 * 512 * 960  # where the last image begins
    assert fault == f"test_report.py:{line}: muli reaches {reach} in i32; cast to tl.int64 before it"
    assert fault in broken_claims(report, Claims())


@pytest.mark.parametrize("target", TARGETS)
def test_i64_plane_offset_passes(target):
    report = only(lambda: planes(HUGE, wide=True), target)
    assert report.overflows == [] and report.elements == 70 * 64 * 512 * 960


def test_small_launch_shows_no_overflow_and_does_not_hide_that_of_a_large_one():
    def both():
        planes(HUGE, wide=False)
        planes(HUGE, wide=False)
        planes((2, 64, 512 * 960), wide=False)

    assert only(lambda: planes((2, 64, 512 * 960), wide=False)).overflows == []
    report = only(both)  # one specialisation, three launches
    assert len(report.overflows) == 1 and report.elements == 70 * 64 * 512 * 960


@pytest.mark.parametrize("steps", [2**20, 2**22])
def test_offset_carried_by_a_loop(steps):
    def fn():
        x = torch.empty(1024, device="meta")
        launch(walk_kernel, (1,), x, x, steps, STRIDE=1024, BLOCK=128, num_warps=4, enable_fp_fusion=True)

    assert len(only(fn).overflows) == (steps > 2**21)


@pytest.mark.parametrize("wide", [False, True])
def test_offset_loaded_from_memory(wide):
    def fn():
        x, index = torch.empty(1024, device="meta"), torch.empty(128, dtype=torch.int32, device="meta")
        launch(gather_kernel, (1,), x, index, x, 24, WIDE=wide, BLOCK=128, num_warps=4, enable_fp_fusion=True)

    found = only(fn).overflows
    assert found == [] if wide else "has an operand without bounds" in found[0]


def test_no_false_alarm_where_i32_offsets_stay_inside_an_image():
    N, H, W = 4500, 512, 960
    tiles = triton.cdiv(H * W, 512)

    def fn():
        x = torch.empty(N, H, W, device="meta")
        launch(tiles_kernel, (N * tiles,), x, x, H, W, tiles, tiles - 1, BLOCK=512, num_warps=4, enable_fp_fusion=True)

    report = only(fn)
    assert report.overflows == [] and report.elements > 2**31


def test_offset_in_a_while_loop_has_no_bounds():
    def fn():
        x = torch.empty(1024, device="meta")
        launch(while_kernel, (1,), x, x, 24, BLOCK=128, num_warps=4, enable_fp_fusion=True)

    assert "has an operand without bounds" in only(fn).overflows[0]


# registers, warps, shared -> blocks, limiter: worked out by hand from what one multiprocessor of sm_90 has: 65536
# registers, 64 warps, and 233472 bytes of shared memory, of which each block takes 1 KiB more than it asks for.
OCCUPANCY = [
    (40, 4, 0, 12, "registers"),  # 1280 a warp: 12 warps a quarter
    (33, 4, 0, 12, "registers"),  # 1056 a warp, rounded up to 1280
    (255, 8, 0, 1, "registers"),  # 8192 a warp: 2 warps a quarter, 8 in all
    (32, 4, 116000, 1, "shared"),  # 233472 // 117024
    (24, 1, 0, 32, "blocks"),
    (24, 8, 0, 8, "warps"),
]


@pytest.mark.parametrize("registers, warps, shared, blocks, limiter", OCCUPANCY)
def test_occupancy(registers, warps, shared, blocks, limiter):
    code = Code(registers=registers, spills=0, stack=0, instructions=1)
    assert occupancy(TARGETS["sm_90"], warps, code, shared) == (blocks, limiter)


def test_occupancy_of_amd_follows_the_waves_and_the_lds():
    code = Code(registers=64, spills=0, stack=0, instructions=1, waves=5)
    assert occupancy(TARGETS["gfx942"], 4, code, 0) == (5, "registers")
    assert occupancy(TARGETS["gfx942"], 4, code, 30000) == (2, "shared")


def test_sass_reading():
    text = """
      REG:42 STACK:16 SHARED:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/             @!UP1 LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0040*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0050*/                   STL.64 [R1], R2 ;
        /*0060*/                   LDL R2, [R1] ;
        /*0070*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;
        /*0080*/                   NOP ;
    """
    code = read_sass(text)
    assert (code.registers, code.stack, code.spills, code.instructions) == (42, 16, 2, 8)
    assert code.loads == {"LDG.128": 1, "LDGSTS.128": 1, "LDG.32": 1} and code.stores == {"STG.64": 1}
    assert code.matrix == {"HGMMA": 1}


def test_amdgcn_reading():
    text = """
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\tbuffer_load_ushort v1, v2, s[0:3], 0 offen
\tv_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
\tbuffer_store_dwordx2 v[0:1], v2, s[0:3], 0 offen
\ts_nop 1
; Occupancy: 3
    .vgpr_count: 77
    .vgpr_spill_count: 4
    .private_segment_fixed_size: 16
"""
    code = read_amdgcn(text)
    assert (code.registers, code.spills, code.stack, code.waves, code.instructions) == (77, 4, 16, 3, 4)
    assert code.loads == {"global_load.128": 1, "buffer_load.32": 1} and code.stores == {"buffer_store.64": 1}
    assert code.matrix == {"v_mfma": 1}


def test_unknown_disassembly_is_an_error():
    with pytest.raises(ValueError, match="format has changed"):
        read_sass("nothing")


def test_identical_launches_are_compiled_once_and_nothing_is_launched():
    seen = []
    reports = compile_launches(lambda: [copy(8192), copy(16384), copy(8191)], "sm_90", seen.append)
    assert [r.kernel for r in reports] == ["copy_kernel"] * 2 and seen == reports
    lines = table(reports).splitlines()
    assert len(lines) == 3 and "2*LDG.128" in lines[1] and "LDG.128" not in lines[2]


def test_driver_and_cache_folder_are_restored():
    driver, folder = triton.runtime.driver._active, triton.knobs.cache.dir
    with pytest.raises(ZeroDivisionError):
        compile_launches(lambda: 1 // 0, "sm_90")
    assert triton.runtime.driver._active is driver and triton.knobs.cache.dir == folder


def test_kernel_that_does_not_compile_is_named():
    with pytest.raises(RuntimeError, match="dot_kernel does not compile for sm_90"):
        compile_launches(lambda: dot(precision="no such"), "sm_90")


def test_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        "fastseg.kernels.tools.cases.CASES", {"good": lambda dtype: copy(8192), "bad": lambda dtype: copy(8191)}
    )
    monkeypatch.setattr("fastseg.kernels.tools.cases.DTYPES", (torch.float16,))
    assert main(["--target", "sm_90", "--case", "good", "--json", str(tmp_path / "report.json")]) == 0
    assert '"LDG.128": 2' in (tmp_path / "report.json").read_text()
    assert "good float16: copy_kernel for sm_90" in capsys.readouterr().err
    assert main(["--target", "sm_90"]) == 1
    assert "bad float16, copy_kernel for sm_90: no 128-bit global load" in capsys.readouterr().out
