"""The tables of op floors: each function returns a title, a header and rows of text for one device."""

from benchmarks.roofline.floors import (
    DEVICES,
    Cost,
    Device,
    floor_of,
    saved_bytes,
    separable_inference,
    separable_training,
    times_us,
)
from benchmarks.roofline.model_layers import mobilenet_blocks
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
from benchmarks.roofline.useful_macs import aspp_fraction, region_fraction, strip_shape, tile_fraction, useful_fraction
from benchmarks.workloads import (
    ARGMAX,
    ASPP,
    ASPP_MAPS,
    CROSS_ENTROPY,
    DECONV,
    POOLING,
    SEPARABLE,
    SEPARABLE_TRAINING,
    UPSAMPLING,
    HeadShape,
)

FORMS = ("eager", "pair", "block")
STRATEGIES = ("eager", "compile", "fused")

Table = tuple[str, list[str], list[list[str]]]


def devices(_: Device) -> Table:
    """The ceilings, and the width below which a pointwise C -> C is bound by memory: 2 tensor / bandwidth."""
    header = ["device", "TB/s", "bf16 TFLOP/s", "FMA T/s", "MUFU T/s", "L2 MB", "PW memory-bound below C", "source"]
    rows = [
        [d.name, f"{d.bandwidth / 1e12:.2f}", f"{d.half / 1e12:.0f}", f"{d.lanes / 1e12:.1f}", f"{d.mufu / 1e12:.2f}",
         f"{d.l2_bytes >> 20}", f"{2 * d.half / d.bandwidth:.0f}", d.source]
        for d in DEVICES.values()
    ]  # fmt: skip
    return "Ceilings", header, rows


def useful_macs(_: Device) -> Table:
    """Shares of the nominal ASPP work."""
    header = ["map", "rates", "per rate", "ASPP", "bound", "tile 8x16", "8x8", "strips", "9-region N=1 BM 64",
              "9-region N=16 BM 128"]  # fmt: skip
    rows = []
    for (H, W), rates in ASPP_MAPS:
        exact = aspp_fraction(H, W, rates)
        tiles = [tile_fraction(H, W, rates, tile) for tile in ((8, 16), (8, 8), strip_shape(H, W))]
        regions = [region_fraction(H, W, rates, 1, 64), region_fraction(H, W, rates, 16, 128)]
        per_rate = " ".join(f"{float(useful_fraction(H, W, rate)):.3f}" for rate in rates)
        rows.append([f"{H}x{W}", "/".join(map(str, rates)), per_rate,
                     f"{float(exact):.3f}", f"{float(1 / exact):.2f}x", *(f"{float(t):.3f}" for t in tiles),
                     *(f"{float(r):.3f} ({float(1 / r):.2f}x)" for r in regions)])  # fmt: skip
    return "Useful multiplications of an ASPP, and those each tiling executes", header, rows


def mbconv(device: Device) -> Table:
    """MobileNetV2's trunk at 512x512, output stride 16, 8x8 output tiles."""
    header = [
        "block",
        "map",
        "stride, dilation",
        "halo",
        *(f"N={n} {f} us" for n in (16, 1) for f in FORMS),
        "best N=16",
    ]
    rows, size = [], 256
    totals = [0.0] * 7
    for C, COUT, expand, stride, dilation in mobilenet_blocks():
        us = [
            floor_of(mbconv_kernels(C, COUT, size, size, n, expand, stride, dilation, form), device).us
            for n in (16, 1)
            for form in FORMS
        ]
        us.append(min(us[1], us[2]))
        totals = [total + t for total, t in zip(totals, us, strict=True)]
        rows.append([f"{C}->{expand * C}->{COUT}", f"{size}x{size}", f"{stride}, {dilation}",
                     f"{halo_factor(8, stride, dilation):.2f}", *(f"{t:.1f}" for t in us)])  # fmt: skip
        size //= stride
    rows.append(["trunk", "", "", "", *(f"{t:.0f}" for t in totals)])
    return "Whole inverted residuals (MobileNetV2)", header, rows


def table_a(device: Device) -> Table:
    """Separable convolution, inference."""
    header = ["shape", "eager GB / us", "compile us", "fused GB", "DRAM us", "DW-FMA us", "PW-tensor us", "floor us",
              "bound", "vs eager", "vs compile"]  # fmt: skip
    rows = []
    for shape in SEPARABLE:
        eager, compiled, fused = (floor_of(separable_inference(shape, s), device) for s in STRATEGIES)
        part = times_us(separable_inference(shape, "fused")[0], device)
        rows.append([f"{shape.name} {shape.C}->{shape.COUT} {shape.H}x{shape.W} N{shape.N}",
                     f"{eager.bytes / 1e9:.2f} / {eager.us:.0f}", f"{compiled.us:.0f}", f"{fused.bytes / 1e9:.3f}",
                     f"{part['dram']:.1f}", f"{part['fma']:.1f}", f"{part['tensor']:.1f}", f"{fused.us:.1f}",
                     fused.bound, f"{eager.us / fused.us:.1f}", f"{compiled.us / fused.us:.1f}"])  # fmt: skip
    return "A. Depthwise 3x3 + BN + ReLU -> pointwise + BN + ReLU, inference", header, rows


def table_b(device: Device) -> Table:
    """Separable convolution, training."""
    header = ["shape", "eager GB / us", "compile GB / us", "fused GB / us", "recompute GB / us", "tensor us",
              "DW-FMA us", "eager/fused...recompute", "saved GB eager -> fused (recompute)"]  # fmt: skip
    rows = []
    for shape in SEPARABLE_TRAINING:
        floors = [floor_of(separable_training(shape, s), device) for s in STRATEGIES]
        floors.append(floor_of(separable_training(shape, "fused", recompute=True), device))
        eager, _, fused, recompute = floors
        part = times_us(separable_training(shape, "fused")[0], device)
        saved = [saved_bytes(shape, "eager"), saved_bytes(shape, "fused"), saved_bytes(shape, "fused", recompute=True)]
        rows.append([f"{shape.name} {shape.C}->{shape.COUT} {shape.H}x{shape.W}",
                     *(f"{f.bytes / 1e9:.2f} / {f.us:.0f}" for f in floors), f"{part['tensor']:.0f}",
                     f"{part['fma']:.0f}", f"{eager.us / fused.us:.2f}-{eager.us / recompute.us:.2f}",
                     "{:.2f} -> {:.2f} ({:.2f})".format(*(s / 1e9 for s in saved))])  # fmt: skip
    return "B. The same pair, training, forward + backward", header, rows


def batch_norm(_: Device) -> Table:
    """BN + ReLU in training: passes over Y, one read or write each, in both directions."""
    rows = [
        ["eager", "5", "8", "13", "1.0x"],  # statistics R, normalise R W, ReLU R W; ReLU 2R W, sums 2R, BN 2R W
        ["compile, or one fused op", "3", "5", "8", f"{13 / 8:.1f}x"],  # one R and one 2R less the ReLU's own passes
        ["one fused op, second reads from L2", "2", "3", "5", f"{13 / 5:.1f}x"],
        ["in the convolutions' epilogues and prologues", "0", "2-3", "2-3", f"{13 / 3:.1f}-{13 / 2:.1f}x"],
    ]
    return "BN + ReLU, training: passes", ["form", "forward", "backward", "both", "vs eager"], rows


def table_c(device: Device) -> Table:
    """Dense ASPP."""
    header = ["shape", "rates", "GFLOP branches + projection", "useful GFLOP", "eager us", "compile us", "fused us",
              "vs eager / compile"]  # fmt: skip
    rows = []
    for shape in ASPP:
        eager, compiled, fused = (floor_of(aspp_kernels(shape, s), device) for s in STRATEGIES)
        pixels, useful = shape.N * shape.H * shape.W, float(aspp_fraction(shape.H, shape.W, shape.rates))
        branches, projection = 28 * 2 * pixels * shape.C * 256 / 1e9, 5 * 2 * pixels * 256**2 / 1e9
        rows.append([f"{shape.C} {shape.H}x{shape.W} N{shape.N}", "/".join(map(str, shape.rates)),
                     f"{branches:.1f} + {projection:.1f}", f"{useful * branches:.1f} ({useful:.3f})", f"{eager.us:.0f}",
                     f"{compiled.us:.0f}", f"{fused.us:.0f}",
                     f"{eager.us / fused.us:.2f} / {compiled.us / fused.us:.2f}"])  # fmt: skip
    return "C. Dense ASPP, forward", header, rows


def table_d(device: Device) -> Table:
    """Max pooling and unpooling."""
    header = ["shape", "pool eager -> 2-bit (int8) us", "unpool eager NCHW / CL -> ours us", "in a prologue us",
              "unpool backward eager CL -> ours us", "index MB"]  # fmt: skip
    rows = []
    for shape in POOLING:
        hi = shape.N * shape.C * shape.H * shape.W
        lo = hi // 4
        us = {name: floor_of([Cost(bytes=b)], device).us for name, b in pool_bytes(lo, hi).items()}
        rows.append([f"{shape.name} {shape.C}x{shape.H}x{shape.W} N{shape.N}",
                     "{pool eager:.1f} -> {pool 2-bit:.1f} ({pool int8:.1f})".format(**us),
                     "{unpool eager NCHW:.1f} / {unpool eager CL:.1f} -> {unpool ours:.1f}".format(**us),
                     "{unpool in prologue:.1f}".format(**us),
                     "{unpool bwd eager CL:.1f} -> {unpool bwd ours:.1f}".format(**us),
                     f"{8 * lo / 1e6:.0f} -> {lo / 4 / 1e6:.1f}"])  # fmt: skip
    return "D. Max pooling with indices, max unpooling", header, rows


def _sizes(shape: HeadShape) -> tuple[str, int, int, int]:
    """Label, lo, hi and pixels."""
    H, W = shape.H * shape.scale, shape.W * shape.scale
    lo = shape.N * shape.C * shape.H * shape.W
    label = f"{shape.C} {shape.H}x{shape.W} -> {H}x{W} N{shape.N}"
    return label, lo, lo * shape.scale**2, shape.N * H * W


def table_e(device: Device) -> Table:
    """Bilinear upsampling."""
    header = ["shape", "floor us each way", "eager backward: atomics, M", "its memset us"]
    rows = []
    for shape in UPSAMPLING:
        label, lo, hi, _ = _sizes(shape)
        us = [floor_of([Cost(bytes=b)], device).us for b in (2 * (lo + hi), 2 * lo)]
        rows.append([label, f"{us[0]:.1f}", f"{4 * hi / 1e6:.0f}", f"{us[1]:.1f}"])
    return "E. Bilinear upsampling", header, rows


def table_f(device: Device) -> Table:
    """Upsampling and argmax."""
    header = ["shape", "eager MB / us", "fused MB", "memory us", "brute ALU us", "pruned ALU us",
              "brute / pruned vs eager", "logits MB -> 0"]  # fmt: skip
    rows = []
    for shape in ARGMAX:
        label, lo, hi, pixels = _sizes(shape)
        eager = floor_of(argmax_kernels(lo, hi, pixels, "eager"), device)
        costs = [argmax_kernels(lo, hi, pixels, "fused", pruned=p)[0] for p in (False, True)]
        brute, pruned = (times_us(c, device) for c in costs)
        ratios = [eager.us / floor_of([c], device).us for c in costs]
        rows.append([label, f"{eager.bytes / 1e6:.0f} / {eager.us:.1f}", f"{costs[1].bytes / 1e6:.1f}",
                     f"{pruned['dram']:.1f}", f"{brute['fma']:.1f}", f"{pruned['fma']:.1f}",
                     f"{ratios[0]:.1f} / {ratios[1]:.1f}", f"{2 * hi / 1e6:.0f}"])  # fmt: skip
    return "F. Upsampling + argmax", header, rows


def table_g(device: Device) -> Table:
    """Upsampling and cross entropy."""
    header = ["shape", "eager GB / us", "fused MB", "memory us", "ALU us", "MUFU us", "floor us", "vs eager",
              "peak extra memory"]  # fmt: skip
    rows = []
    for shape in CROSS_ENTROPY:
        label, lo, hi, pixels = _sizes(shape)
        eager, fused = (floor_of([upsampled_loss(lo, hi, pixels, s)], device) for s in ("eager", "fused"))
        part = times_us(upsampled_loss(lo, hi, pixels, "fused"), device)
        memory = [loss_memory(lo, hi, pixels, s) for s in ("eager", "fused")]
        extra = f"{memory[0] / 1e9:.2f} GB -> {memory[1] / 1e6:.0f} MB ({memory[0] / memory[1]:.0f}x)"
        rows.append([label, f"{eager.bytes / 1e9:.2f} / {eager.us:.0f}", f"{fused.bytes / 1e6:.0f}",
                     f"{part['dram']:.0f}", f"{part['fma']:.0f}", f"{part['mufu']:.0f}", f"{fused.us:.0f}",
                     f"{eager.us / fused.us:.1f}", extra])  # fmt: skip
    return "G. Upsampling + cross entropy, forward + backward", header, rows


def table_h(device: Device) -> Table:
    """Bilinear transposed convolution."""
    header = ["shape", "dense GFLOP / tensor us", "separable GFLOP", "bytes = floor us", "MAC ratio"]
    rows = []
    for shape in DECONV:
        label, lo, hi, _ = _sizes(shape)
        dense, separable = 4 * shape.C * hi, bilinear_macs(shape.scale) * hi
        times = times_us(Cost(bytes=2 * (lo + hi), tensor=2 * dense), device)
        rows.append([f"{label} k{2 * shape.scale} s{shape.scale}", f"{2 * dense / 1e9:.1f} / {times['tensor']:.1f}",
                     f"{2 * separable / 1e9:.2f}", f"{times['dram']:.1f}", f"{dense / separable:.0f}x"])  # fmt: skip
    return "H. Bilinear transposed convolution, dense against separable", header, rows


OP_TABLES = {
    "devices": devices,
    "useful-macs": useful_macs,
    "mbconv": mbconv,
    "A": table_a,
    "B": table_b,
    "batch-norm": batch_norm,
    "C": table_c,
    "D": table_d,
    "E": table_e,
    "F": table_f,
    "G": table_g,
    "H": table_h,
}
