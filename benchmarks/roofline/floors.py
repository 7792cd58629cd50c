"""Floors: the least time a piece of work can take on a device, from its bytes, its arithmetic and the ceilings.

A ``Cost`` is what a kernel must do: bytes to and from DRAM, FMA lane operations, tensor-core FLOP, MUFU operations
(exp). Its floor is the longest of the four times at 100 % of the ceilings, assuming perfect overlap; kernels that run
one after another add up. Activations are 16-bit, 2 bytes an element, NHWC. A floor is a bound, not a measurement.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from benchmarks.workloads import SeparableShape
from fastseg.kernels.runtime.ceilings import CHIPS, Chip, find_chip

ITEM = 2  # bytes of a bf16 or fp16 element

Strategy = Literal["eager", "compile", "fused"]
Phase = Literal["step", "forward", "backward"]


Device = Chip
DEVICES = CHIPS  # what cost models read
find_device = find_chip


@dataclass(frozen=True)
class Cost:
    """Work of one kernel: bytes of DRAM traffic, FMA lane operations, tensor-core FLOP, MUFU operations."""

    bytes: float = 0.0
    fma: float = 0.0
    tensor: float = 0.0
    mufu: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Both in one kernel: each resource adds up, and their times overlap."""
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))


@dataclass(frozen=True)
class Floor:
    """Least time of some kernels, ``us`` microseconds, their summed cost, and what most of that time waits for."""

    bytes: float
    fma: float
    tensor: float
    mufu: float
    us: float
    bound: Literal["dram", "fma", "tensor", "mufu"]


def times_us(cost: Cost, device: Device) -> dict[str, float]:
    """Microseconds each resource is busy, if it runs at its ceiling."""
    return {
        "dram": cost.bytes / device.bandwidth * 1e6,
        "fma": cost.fma / device.lanes * 1e6,
        "tensor": cost.tensor / device.half * 1e6,
        "mufu": cost.mufu / device.mufu * 1e6,
    }


def floor_of(kernels: Iterable[Cost], device: Device) -> Floor:
    """Floor of kernels that run one after another: the sum of each one's longest time."""
    total, us, share = Cost(), 0.0, dict.fromkeys(times_us(Cost(), device), 0.0)
    for kernel in kernels:
        times = times_us(kernel, device)
        bound = max(times, key=times.__getitem__)
        share[bound] += times[bound]
        us += times[bound]
        total += kernel
    return Floor(total.bytes, total.fma, total.tensor, total.mufu, us, max(share, key=share.__getitem__))


def floor_us(
    shape: SeparableShape,
    device: Device,
    *,
    training: bool = False,
    strategy: Strategy = "fused",
    recompute: bool = False,
    phase: Phase = "step",
) -> Floor:
    """Floor of a separable convolution, the figure a benchmark divides by.

    Args:
        shape: the workload.
        device: whose ceilings, one of ``DEVICES``.
        training: forward and backward with batch statistics; otherwise inference.
        strategy: "fused" for ours, "eager" and "compile" for the baselines' own floors.
        recompute: training, fused: the depthwise output is never stored but computed again where it is needed.
        phase: training: the whole step, or one half of it.
    """
    if training:
        return floor_of(separable_training(shape, strategy, recompute, phase), device)
    return floor_of(separable_inference(shape, strategy), device)


def separable_inference(shape: SeparableShape, strategy: Strategy) -> list[Cost]:
    """Depthwise + BN + ReLU, then pointwise + BN + ReLU, kernel by kernel.

    eager      each conv 2 (in + out) bytes, each BN and each ReLU one more pass of 4 Y
    compile    each conv, then one pass of 4 Y for BN and ReLU together
    fused      2 (A + Y + weights); the depthwise output never leaves the chip
    """
    A, M, Y, taps = shape.inputs, shape.hidden, shape.outputs, shape.kernel_size**2
    pointwise_flop = 2.0 * M * shape.COUT
    if strategy == "fused":
        weights = shape.C * (taps + shape.COUT)
        return [Cost(bytes=ITEM * (A + Y + weights), fma=taps * M, tensor=pointwise_flop)]
    passes = 4 if strategy == "eager" else 2  # reads and writes of BN and ReLU
    return [
        Cost(bytes=ITEM * (A + M + taps * shape.C), fma=taps * M),
        Cost(bytes=ITEM * passes * M),
        Cost(bytes=ITEM * (M + Y + shape.C * shape.COUT), tensor=pointwise_flop),
        Cost(bytes=ITEM * passes * Y),
    ]


def separable_training(
    shape: SeparableShape, strategy: Strategy, recompute: bool = False, phase: Phase = "step"
) -> list[Cost]:
    """The same pair, forward and backward, in passes of 2 bytes an element. One entry: the bytes and FLOP of the whole.

    eager      conv 3 in + 3 out; BN 3 forward, 5 backward; ReLU 2 forward, 3 backward: 3 in + 16 out for each conv
    compile    BN and ReLU share 3 forward and 5 backward: 3 in + 11 out for each conv
    fused      depthwise reads x, writes u; pointwise reads u (BN and ReLU in its prologue), writes y; backward reads y
               to reduce, dy and y to apply, u for the prologue, writes du, reads du, u, x, writes dx: 3 A + 6 M + 4 Y
    recompute  u never stored: statistics, forward and the backwards of pointwise and depthwise read x: 5 A + 2 M + 4 Y
    """
    M, taps = shape.hidden, shape.kernel_size**2
    traffic = training_bytes(shape.inputs, M, shape.outputs, strategy, recompute)
    # Forward; gradients of the input and of the weights. Where u is not stored it is computed three times more: for the
    # statistics, and in the backward of the pointwise and of the depthwise.
    depthwise = {"forward": 1, "backward": 2}
    if recompute and strategy == "fused":
        depthwise = {"forward": 2, "backward": 4}
    halves = {
        part: Cost(bytes=traffic[part], fma=depthwise[part] * taps * M, tensor=times * 2.0 * M * shape.COUT)
        for part, times in (("forward", 1), ("backward", 2))
    }
    return [halves["forward"] + halves["backward"] if phase == "step" else halves[phase]]


def training_bytes(A: int, M: int, Y: int, strategy: Strategy, recompute: bool = False) -> dict[str, float]:
    """Bytes of both halves of ``separable_training`` for A, M, Y elements of input, depthwise output and output."""
    forward, backward = {
        "eager": (A + 7 * M + 6 * Y, 2 * A + 12 * M + 10 * Y),
        "compile": (A + 5 * M + 4 * Y, 2 * A + 9 * M + 7 * Y),
        "fused": (2 * A + Y, 3 * A + 2 * M + 3 * Y) if recompute else (A + 2 * M + Y, 2 * A + 4 * M + 3 * Y),
    }[strategy]
    return {"forward": ITEM * forward, "backward": ITEM * backward}


def saved_bytes(shape: SeparableShape, strategy: Literal["eager", "fused"], recompute: bool = False) -> float:
    """Bytes kept from the forward for the backward: eager x, u, relu(u), y, relu(y); fused x, y and, if stored, u."""
    A, M, Y = shape.inputs, shape.hidden, shape.outputs
    return ITEM * (A + 2 * M + 2 * Y if strategy == "eager" else A + Y + (0 if recompute else M))
