"""The floors against numbers derived by hand and by counting; a wrong formula here misjudges every benchmark."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from benchmarks.roofline import __main__ as roofline
from benchmarks.roofline.floors import (
    DEVICES,
    Cost,
    find_device,
    floor_of,
    floor_us,
    saved_bytes,
    separable_training,
    times_us,
)
from benchmarks.roofline.model_layers import mobilenet_blocks, walk
from benchmarks.roofline.op_floors import (
    argmax_kernels,
    aspp_kernels,
    bilinear_macs,
    halo_factor,
    loss_memory,
    mbconv_kernels,
    pool_bytes,
    upsampled_loss,
)
from benchmarks.roofline.pruned_argmax import adjacent_logits, check_pruning, smooth_logits, to_bf16
from benchmarks.roofline.useful_macs import aspp_fraction, region_fraction, strip_shape, tile_fraction, useful_fraction
from benchmarks.workloads import ASPP, ASPP_MAPS, SEPARABLE, ModelShape, tiny
from fastseg.kernels.runtime import ceilings

H200 = DEVICES["H200"]
SHAPES = {shape.name: shape for shape in SEPARABLE}


def counted(height: int, width: int, rate: int, executes) -> int:
    """(pixel, tap) pairs for which ``executes(y, x, dy, dx)``, one by one."""
    shifts = (-rate, 0, rate)
    return sum(
        executes(y, x, dy, dx)
        for y, x, dy, dx in itertools.product(range(height), range(width), shifts, shifts)
    )  # fmt: skip


# Rates inside the map, beyond half of it (the middle region swaps), equal to it, and beyond it.
@pytest.mark.parametrize(("size", "rate"), [((7, 5), 1), ((8, 8), 5), ((5, 9), 5), ((4, 6), 9)], ids=str)
def test_useful_macs_are_the_taps_inside_the_map(size, rate):
    H, W = size
    taps = counted(H, W, rate, lambda y, x, dy, dx: 0 <= y + dy < H and 0 <= x + dx < W)
    assert useful_fraction(H, W, rate) == Fraction(taps, 9 * H * W)
    assert aspp_fraction(H, W, (rate,)) == Fraction(taps + H * W, 10 * H * W)
    # Regions without rounding, and tiles of one pixel, execute just that.
    assert region_fraction(H, W, (rate,), 3, 1) == aspp_fraction(H, W, (rate,))
    assert tile_fraction(H, W, (rate,), (1, 1)) == aspp_fraction(H, W, (rate,))


def test_tiles_skip_a_tap_only_when_it_misses_the_map_entirely():
    H, W, rate, tile = 6, 10, 3, 4

    def touches(y, x, dy, dx):
        top, left = y // tile * tile + dy, x // tile * tile + dx
        return top < H and top + tile > 0 and left < W and left + tile > 0

    padded = (8, 12)  # the ragged tiles run whole
    taps = counted(*padded, rate, touches)
    assert tile_fraction(H, W, (rate,), (tile, tile)) == Fraction(taps + padded[0] * padded[1], 10 * H * W)


# Per rate; ASPP; tiles 8x16 and 8x8, strips; regions at N=1 BM=64 and N=16 BM=128. Rounded to 3 digits.
USEFUL = [
    ((0.766, 0.562, 0.391), 0.588, (0.768, 0.723, 0.786), (0.717, 0.593)),
    ((0.772, 0.574, 0.405), 0.599, (1.188, 0.976, 0.766), (0.697, 0.614)),
    ((0.850, 0.713, 0.587), 0.727, (0.921, 0.893, 0.851), (0.789, 0.731)),
    ((0.879, 0.766, 0.660), 0.777, (0.875, 0.850, 0.879), (0.813, 0.778)),
    ((0.766, 0.562, 0.391), 0.588, (0.674, 0.629, 0.759), (0.610, 0.588)),
    ((0.881, 0.769, 0.665), 0.780, (1.092, 0.983, 0.881), (0.822, 0.785)),
    ((0.769, 0.568, 0.398), 0.593, (0.880, 0.769, 0.763), (0.630, 0.597)),
    ((0.908, 0.820, 0.736), 0.828, (0.897, 0.885, 0.879), (0.846, 0.829)),
    ((0.908, 0.820, 0.736), 0.828, (0.859, 0.847, 0.879), (0.831, 0.828)),
    ((0.842, 0.697, 0.566), 0.712, (0.916, 0.839, 0.841), (0.733, 0.714)),
]


@pytest.mark.parametrize(("case", "golden"), list(zip(ASPP_MAPS, USEFUL, strict=True)), ids=str)
def test_useful_macs_table(case, golden):
    (H, W), rates = case
    computed = (
        [useful_fraction(H, W, rate) for rate in rates],
        aspp_fraction(H, W, rates),
        [tile_fraction(H, W, rates, tile) for tile in ((8, 16), (8, 8), strip_shape(H, W))],
        [region_fraction(H, W, rates, 1, 64), region_fraction(H, W, rates, 16, 128)],
    )
    for ours, theirs in zip(np.hstack(computed), np.hstack(golden), strict=True):
        assert float(ours) == pytest.approx(theirs, abs=5.1e-4)


def test_exact_fractions():
    shares = [useful_fraction(32, 32, rate) for rate in (6, 12, 18)]
    assert shares == [Fraction(49, 64), Fraction(9, 16), Fraction(25, 64)]
    assert aspp_fraction(32, 32, (6, 12, 18)) == Fraction(1054, 1792)
    assert aspp_fraction(64, 64, (12, 24, 36)) == aspp_fraction(32, 32, (6, 12, 18))


def test_floor_is_the_longest_resource_and_kernels_add_up():
    tensor, memory = Cost(bytes=4.3e6, tensor=790e7), Cost(bytes=8.6e7, mufu=4.18e6)
    one = floor_of([tensor], H200)
    assert (one.us, one.bound) == (pytest.approx(10), "tensor")
    both = floor_of([tensor, memory], H200)
    assert (both.us, both.bytes, both.bound) == (pytest.approx(30), pytest.approx(9.03e7), "dram")
    assert floor_of([tensor + memory], H200).us == pytest.approx(21)


# Shape: eager, compile, DRAM, DW-FMA, PW-tensor, floor; microseconds on an H200.
SEPARABLE_US = {
    "xception_middle_n1": (4.8, 3.5, 0.9, 0.2, 1.4, 1.4),
    "xception_middle": (77, 55, 11.3, 3.2, 22.0, 22.0),
    "xception_middle_cityscapes": (39, 28, 5.8, 1.6, 11.0, 11.0),
    "xception_entry_128": (749, 499, 124.9, 36.2, 43.5, 124.9),
    "xception_entry_256": (375, 250, 62.5, 18.1, 43.5, 62.5),
    "decoder": (416, 279, 68.3, 21.5, 51.6, 68.3),
    "decoder_cityscapes": (208, 139, 34.2, 10.7, 25.8, 34.2),
    "aspp_separable": (123, 88, 17.8, 9.0, 21.7, 21.7),
    "mobilenet_144_24": (138, 97, 20.5, 10.2, 2.3, 20.5),
    "mobilenet_960_160": (57, 40, 8.6, 4.2, 6.4, 8.6),
}


@pytest.mark.parametrize("name", SEPARABLE_US)
def test_separable_inference(name):
    eager, compiled, *parts, floor = SEPARABLE_US[name]
    shape = SHAPES[name]
    fused = floor_us(shape, H200)
    assert floor_us(shape, H200, strategy="eager").us == pytest.approx(eager, abs=0.6)
    assert floor_us(shape, H200, strategy="compile").us == pytest.approx(compiled, abs=0.6)
    times = times_us(Cost(fused.bytes, fused.fma, fused.tensor), H200)
    assert [times[k] for k in ("dram", "fma", "tensor")] == [pytest.approx(part, abs=0.06) for part in parts]
    assert fused.us == pytest.approx(floor, abs=0.06)
    assert fused.bound == ("tensor" if "xception_middle" in name or name == "aspp_separable" else "dram")


# eager, compile, fused, recompute in GB; the same in microseconds; saved eager, fused storing u, recomputing u in GB.
SEPARABLE_TRAIN = {
    "xception_middle": ((0.91, 0.67, 0.31, 0.26), (211, 155, 72, 66), (0.12, 0.07, 0.05)),
    "decoder": ((5.65, 4.19, 1.97, 1.65), (1315, 973, 458, 384), (0.75, 0.45, 0.29)),
    "xception_entry_128": ((10.20, 7.52, 3.49, 2.95), (2372, 1748, 812, 687), (1.34, 0.81, 0.54)),
    "mobilenet_144_24": ((1.86, 1.42, 0.73, 0.58), (433, 331, 170, 135), (0.25, 0.16, 0.09)),
}


@pytest.mark.parametrize("name", SEPARABLE_TRAIN)
def test_separable_training(name):
    gigabytes, microseconds, saved = SEPARABLE_TRAIN[name]
    shape = SHAPES[name]
    forms = [("eager", False), ("compile", False), ("fused", False), ("fused", True)]
    floors = [floor_us(shape, H200, training=True, strategy=s, recompute=r) for s, r in forms]
    assert [f.bytes / 1e9 for f in floors] == [pytest.approx(gb, abs=0.006) for gb in gigabytes]
    assert [f.us for f in floors] == [pytest.approx(us, abs=0.6) for us in microseconds]
    kept = [saved_bytes(shape, "eager"), saved_bytes(shape, "fused"), saved_bytes(shape, "fused", recompute=True)]
    assert [k / 1e9 for k in kept] == [pytest.approx(gb, abs=0.006) for gb in saved]


@pytest.mark.parametrize("form", [("eager", False), ("compile", False), ("fused", False), ("fused", True)], ids=str)
def test_the_halves_of_a_training_step_add_up_to_it(form):
    strategy, recompute = form
    parts = [separable_training(SHAPES["decoder"], strategy, recompute, p)[0] for p in ("forward", "backward")]
    assert parts[0] + parts[1] == separable_training(SHAPES["decoder"], strategy, recompute)[0]
    # The forward at least reads the input and writes the output; two thirds of the matrix work are backward.
    assert parts[0].bytes >= 2 * (SHAPES["decoder"].inputs + SHAPES["decoder"].outputs)
    assert parts[1].tensor == 2 * parts[0].tensor


def test_recomputing_computes_the_depthwise_output_three_times_more():
    stored, again = (separable_training(SHAPES["decoder"], "fused", recompute=r)[0] for r in (False, True))
    assert (again.fma - stored.fma) == 3 * 9 * SHAPES["decoder"].hidden


# eager, compile, fused microseconds.
ASPP_US = [
    (44, 42, 23),
    (699, 679, 369),
    (2794, 2716, 1476),
    (349, 340, 258),
    (173, 153, 67),
    (86, 77, 45),
    (923, 844, 402),
]


@pytest.mark.parametrize(("shape", "golden"), list(zip(ASPP, ASPP_US, strict=True)), ids=str)
def test_aspp(shape, golden):
    us = [floor_of(aspp_kernels(shape, strategy), H200).us for strategy in ("eager", "compile", "fused")]
    assert us == [pytest.approx(g, abs=0.6) for g in golden]


def test_whole_mbconv():
    def trunk(batch, form):
        size, us = 256, []
        for C, COUT, expand, stride, dilation in mobilenet_blocks():
            us.append(floor_of(mbconv_kernels(C, COUT, size, size, batch, expand, stride, dilation, form), H200).us)
            size //= stride
        return us

    eager, pair, block = (trunk(16, form) for form in ("eager", "pair", "block"))
    assert [sum(eager), sum(pair), sum(block)] == [pytest.approx(g, abs=0.6) for g in (1688, 373, 157)]
    assert sum(map(min, pair, block)) == pytest.approx(146.5, abs=0.6)
    assert [eager[1], pair[1], block[1]] == [pytest.approx(g, abs=0.5) for g in (368, 104, 11)]
    assert all(b > p for p, b in zip(pair[-3:], block[-3:], strict=True))  # wide dilated blocks stay with the pair
    assert sum(trunk(1, "block")) == pytest.approx(10, abs=0.5)
    halos = [halo_factor(8, 1, 1), halo_factor(8, 2, 1), halo_factor(8, 1, 2)]
    assert halos == [pytest.approx(g, abs=5e-3) for g in (1.56, 1.13, 2.25)]


def test_pooling():
    hi = 16 * 64 * 360 * 480
    us = {name: b / 4.3e6 for name, b in pool_bytes(hi // 4, hi).items()}
    golden = {
        "pool eager": 185.2, "pool 2-bit": 105.4, "pool int8": 113.2,
        "unpool eager NCHW": 267.5, "unpool eager CL": 637.8, "unpool ours": 105.4,
        "unpool in prologue": 23.1, "unpool bwd eager CL": 576.1, "unpool bwd ours": 105.4,
    }  # fmt: skip
    assert us == {name: pytest.approx(value, abs=0.06) for name, value in golden.items()}


# classes, low-resolution size, scale, N: eager us, fused MB, brute ALU us, pruned ALU us
@pytest.mark.parametrize(
    ("case", "golden"),
    [
        ((21, 128 * 128, 4, 16), (92.3, 15.2, 18.5, 4.7)),
        ((150, 128 * 128, 4, 16), (611.3, 82.8, 131.9, 14.8)),
        ((19, 256 * 512, 4, 1), (42.1, 7.1, 8.4, 2.3)),
        ((21, 64 * 64, 8, 16), (90.4, 6.9, 18.5, 3.4)),
    ],
    ids=str,
)
def test_upsample_argmax(case, golden):
    C, size, scale, N = case
    lo, hi, pixels = N * C * size, N * C * size * scale**2, N * size * scale**2
    eager = floor_of(argmax_kernels(lo, hi, pixels, "eager"), H200).us
    brute, pruned = (argmax_kernels(lo, hi, pixels, "fused", pruned=p)[0] for p in (False, True))
    alu = [times_us(cost, H200)["fma"] for cost in (brute, pruned)]
    assert [eager, pruned.bytes / 1e6, *alu] == [pytest.approx(g, abs=0.06) for g in golden]


def test_upsample_cross_entropy():
    lo, hi, pixels = 16 * 150 * 128**2, 16 * 150 * 512**2, 16 * 512**2
    eager, fused = (floor_of([upsampled_loss(lo, hi, pixels, s)], H200) for s in ("eager", "fused"))
    assert (fused.us, fused.bound) == (pytest.approx(301, abs=0.5), "mufu")
    assert fused.bytes / 1e6 == pytest.approx(337, abs=0.6)
    assert eager.us == pytest.approx(5919, rel=2e-3)
    memory = [loss_memory(lo, hi, pixels, s) for s in ("eager", "fused")]
    assert (memory[0] / 1e9, memory[1] / 1e6) == (pytest.approx(11.32, abs=5e-3), pytest.approx(174, abs=0.5))


def test_separable_interpolation_counts_both_passes():
    # s = 4, rows 3 -> 12, columns 5 -> 20: two MACs for each element of both passes.
    vertical, horizontal = 2 * 12 * 5, 2 * 12 * 20
    assert bilinear_macs(4) * 12 * 20 == vertical + horizontal


# GFLOP; GB, microseconds and kernels under eager, compile and fused.
MODEL_FLOORS = [
    (ModelShape("deeplabv3plus_mobilenet_v2", N=16), 145.8, (10.43, 6.95, 2.19), (2430, 1629, 526), (186, 130, 45)),
    (ModelShape("deeplabv3plus_xception65", N=16), 1607.7, (35.62, 23.59, 7.30), (9160, 6372, 2480), (452, 292, 80)),
    (ModelShape("unet", N=16), 6176.2, (33.59, 24.52, 10.79), (13509, 11400, 8149), (68, 50, 23)),
    (ModelShape("segnet", 360, 480, 16, 12), 3418.0, (21.86, 16.90, 4.07), (8348, 7195, 4435), (107, 82, 26)),
    (ModelShape("fcn8s", N=16), 3546.7, (11.61, 10.71, 3.49), (6334, 6124, 4623), (44, 42, 21)),
    (ModelShape("fcn8s", N=16, classes=150), 3557.5, (13.92, 12.98, 3.58), (7538, 7312, 4644), (44, 42, 21)),
]


@pytest.mark.parametrize("case", MODEL_FLOORS, ids=lambda case: f"{case[0].model}-{case[0].classes}")
def test_models(case):
    shape, gflop, gigabytes, microseconds, kernels = case
    nets = [walk(shape, strategy) for strategy in ("eager", "compile", "fused")]
    floors = [floor_of(net.kernels, H200) for net in nets]
    assert nets[0].flop / 1e9 == pytest.approx(gflop, rel=1e-4)
    assert tuple(net.launches for net in nets) == kernels
    assert [f.bytes / 1e9 for f in floors] == [pytest.approx(g, rel=2e-3) for g in gigabytes]
    assert [f.us for f in floors] == [pytest.approx(g, rel=2e-3) for g in microseconds]


# eager, compile and fused ms; saved GB eager and fused.
TRAINING = {
    "deeplabv3plus_mobilenet_v2": ((8.0, 5.5, 3.1), (3.8, 1.9)),
    "unet": ((40.6, 34.8, 25.6), (11.9, 5.6)),
    "fcn8s": ((18.5, 17.5, 14.5), (4.0, 1.7)),
}


@pytest.mark.parametrize("model", TRAINING)
def test_training(model):
    milliseconds, saved = TRAINING[model]
    nets = [walk(ModelShape(model, N=16), s, training=True) for s in ("eager", "compile", "fused")]
    assert [floor_of(net.kernels, H200).us / 1e3 for net in nets] == [pytest.approx(m, abs=0.06) for m in milliseconds]
    kept = [sum(net.saved.values()) / 1e9 for net in nets]
    assert [kept[0], kept[2]] == [pytest.approx(s, abs=0.06) for s in saved]


@pytest.mark.parametrize("scale", [4, 7, 16])
@pytest.mark.parametrize("logits", [smooth_logits(21, 8, 8), smooth_logits(2, 8, 8, 1), adjacent_logits(7, 8, 8)])
def test_pruned_argmax_is_exact(logits, scale):
    result = check_pruning(to_bf16(logits), scale, exact=True)
    assert result.mismatches == 0
    assert result.pixels == 64 * scale**2
    assert 1 <= result.mean_candidates <= result.max_candidates <= len(logits)


def test_pruning_leaves_classes_out_and_spares_infinite_cells():
    smooth = to_bf16(smooth_logits(19, 16, 16))
    result = check_pruning(smooth, 8, exact=True)
    assert result.mean_candidates < 5
    assert result.same_argmax_share > 0.2
    smooth[:, :2, :2] = -1
    smooth[3, 0, 1] = -np.inf  # at the border its weight is 0: NaN in full, the class would be pruned
    smooth[5, :2, :2] = 1
    with np.errstate(invalid="ignore"):
        assert check_pruning(smooth, 8, exact=True).mismatches == 0


def test_bf16_rounds_to_nearest_even():
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.0], dtype=np.float32)
    assert to_bf16(x).tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -3.0]


def test_devices_are_found_by_the_name_a_gpu_reports():
    assert find_device("NVIDIA A100-SXM4-80GB") is DEVICES["A100"]
    assert find_device("NVIDIA H200") is H200
    assert find_device("NVIDIA GeForce RTX 4090") is DEVICES["RTX 4090"]
    assert find_device("NVIDIA L40S") is None and find_device("NVIDIA GeForce RTX 4090D") is None


def test_the_cost_model_and_the_floors_have_the_same_ceilings():
    assert DEVICES is ceilings.CHIPS and H200 is ceilings.chip_of(torch.device("cpu"))
    assert (H200.bandwidth, H200.dot(torch.bfloat16), H200.dot(torch.float32, tf32=False)) == (
        4.3e12,
        790e12,
        2 * H200.lanes,
    )


def test_ratios_that_decide_between_forms_differ_by_chip():
    """Lane operations for each byte, and bf16 FLOP, as published figures give them."""
    ratios = {name: (round(c.lanes / c.bandwidth, 1), round(c.half / c.bandwidth)) for name, c in DEVICES.items()}
    assert ratios == {
        "H200": (7.8, 184), "H100": (10.0, 295), "A100": (4.8, 153), "A10": (26.0, 208), "L4": (50.5, 403),
        "RTX 4090": (41.0, 164), "B200": (4.7, 281), "RTX 5090": (29.3, 117), "MI300X": (15.4, 247),
    }  # fmt: skip


def test_tiny_shapes_keep_the_kind_of_case():
    small = tiny(SHAPES["aspp_separable"])
    assert (small.C, small.COUT, small.H, small.W, small.N, small.dilation) == (16, 8, 12, 12, 1, 6)
    assert tiny(ModelShape("unet", classes=150)) == ModelShape("unet", 64, 64, 1, 150)


def test_command_prints_what_it_is_asked_for(capsys):
    roofline.main(["A", "useful-macs", "--device", "A100", "--markdown"])
    text = capsys.readouterr().out
    assert text.startswith("Floors, not measured. A100")
    assert "| decoder 304->256 128x128 N16 |" in text
    assert "| 32x32 | 6/12/18 | 0.766 0.562 0.391 | 0.588 |" in text
    assert "B. The same pair" not in text
    with pytest.raises(SystemExit):
        roofline.main(["no-such-table"])
