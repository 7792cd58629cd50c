"""What chips can do: the one table of ceilings, which cost models, floors and the replay of the L2 read.

A cost model asks ``chip_of(x.device)``. Only ratios decide between two forms, and they differ by chip: an L4 has 50
lane operations for each byte of DRAM, an A100 5. A chip that is not in the table counts as one of its architecture, or
as an H200.
"""

import functools
from typing import NamedTuple

import torch

from fastseg.kernels.runtime.torch_private import constant_while_compiling


class Core(NamedTuple):
    """One multiprocessor of an architecture, and its way to memory: lanes a cycle; latencies in cycles.

    Hopper's by default: measured by others with microbenchmarks (arXiv 2402.13499, 2501.12084, 2503.20481, 2512.02189).
    """

    schedulers: int = 4  # an instruction a cycle each
    alu_lanes: int = 64  # integers, comparisons, conversions to bf16; multiply-adds have ``Chip.lanes_each``
    special_lanes: int = 16  # MUFU, conversions
    double_lanes: int = 64
    port: int = 128  # bytes a cycle through L1 and shared memory
    alu: int = 4  # latency of a result, integers and fp32
    special: int = 27
    shared: int = 30
    l1: int = 39
    l2: int = 273
    dram: int = 307  # on top of the L2's
    mma: int = 26  # of a product through registers
    wgmma_tail: int = 56  # from the last cycle of an asynchronous product to its registers
    barrier: int = 20  # an estimate
    mma_share: float = 1.0  # of the matrix rate that products through registers reach


# Where nothing is said, Hopper's figures stand in.
_CORES = {
    "sm_80": Core(double_lanes=32, l1=33, l2=200),  # arXiv 2208.11174
    "sm_86": Core(double_lanes=2, l1=33, l2=230),
    "sm_89": Core(double_lanes=2, l1=33),  # arXiv 2402.13499
    "sm_90": Core(mma_share=0.62),  # the same
    "sm_100": Core(alu_lanes=128, l2=350, mma_share=0.25),  # arXiv 2507.10789, 2512.02189; the share: an estimate
    "sm_120": Core(alu_lanes=128, double_lanes=2, l2=350),  # arXiv 2507.10789
}


class Chip(NamedTuple):
    """Ceilings of one chip: bytes or operations per second, bytes, seconds."""

    name: str
    arch: str  # as Triton's targets and the tuned tables name it
    bandwidth: float  # of DRAM, bytes read + written
    half: float  # FLOP of fp16 and bf16 products with fp32 sums, dense
    tf32: float  # FLOP of fp32 products that are rounded to tf32 (AMD: xf32)
    fp64: float  # FLOP of fp64 products, by whichever unit is faster
    multiprocessors: int  # SMs, CUs
    lanes_each: int  # fp32 multiply-adds a cycle and multiprocessor
    clock: float  # Hz
    l2_bytes: int  # the last cache before DRAM
    l2_bandwidth: float  # bytes, read + written
    source: str
    launch: float = 2e-6  # between two kernels of a graph: an estimate for every chip, to be measured

    @property
    def described(self) -> str:
        """``an H200``, ``a B200``: for sentences."""
        return ("a " if self.name.startswith("B") else "an ") + self.name

    @property
    def core(self) -> Core:
        """Its multiprocessor."""
        return _CORES.get(self.arch, Core())

    @property
    def lanes(self) -> float:
        """fp32 lane operations, one multiply-add each."""
        return self.multiprocessors * self.lanes_each * self.clock

    @property
    def mufu(self) -> float:
        """Transcendental lane operations."""
        return self.multiprocessors * self.core.special_lanes * self.clock

    def dot(self, dtype: torch.dtype, *, tf32: bool = True) -> float:
        """FLOP of products of ``dtype``; fp32 without ``tf32`` runs on the lanes."""
        if dtype == torch.float64:
            return self.fp64
        if dtype == torch.float32:
            return self.tf32 if tf32 else 2 * self.lanes
        return self.half


MIB = 1 << 20
# The L2's bandwidth: an H200's by the simulators' model; the others' by the same 29 bytes a cycle and multiprocessor,
# and by 16 for the chips with GDDR memory: estimates.
_TABLE = (
    Chip("H200", "sm_90", 4.3e12, 790e12, 395e12, 67e12, 132, 128, 1.977e9, 60 * MIB, 7.7e12,
         "measured copy and GEMM rates"),
    Chip("H100", "sm_90", 3.35e12, 989e12, 494.7e12, 67e12, 132, 128, 1.98e9, 50 * MIB, 7.7e12,
         "datasheet, SXM5 80 GB"),
    Chip("A100", "sm_80", 2.039e12, 312e12, 156e12, 19.5e12, 108, 64, 1.41e9, 40 * MIB, 4.4e12,
         "datasheet, SXM4 80 GB"),
    Chip("A10", "sm_86", 0.6e12, 125e12, 62.5e12, 0.49e12, 72, 128, 1.695e9, 6 * MIB, 2.0e12, "datasheet"),
    Chip("L4", "sm_89", 0.3e12, 121e12, 60e12, 0.47e12, 58, 128, 2.04e9, 48 * MIB, 1.9e12, "datasheet"),
    Chip("RTX 4090", "sm_89", 1.008e12, 165.2e12, 82.6e12, 1.29e12, 128, 128, 2.52e9, 72 * MIB, 5.2e12,
         "Ada whitepaper; products with fp32 sums"),
    Chip("B200", "sm_100", 8.0e12, 2250e12, 1125e12, 37e12, 148, 128, 1.98e9, 126 * MIB, 8.5e12,
         "datasheet; clock derived"),
    Chip("RTX 5090", "sm_120", 1.792e12, 209.5e12, 104.8e12, 1.64e12, 170, 128, 2.41e9, 96 * MIB, 6.6e12,
         "Blackwell whitepaper; products with fp32 sums"),
    Chip("MI300X", "gfx942", 5.3e12, 1307.4e12, 653.7e12, 163.4e12, 304, 128, 2.1e9, 256 * MIB, 17e12,
         "datasheet; MUFU assumed; its cache is the one behind the L2s"),
)  # fmt: skip
CHIPS = {chip.name: chip for chip in _TABLE}
H200 = CHIPS["H200"]

OWN_GEMM = 0.85  # of a library's rate: an estimate, to be measured
OWN_LANES = 0.5  # the same of fp32 without tf32, whose operands go through registers: another
ALONE = 0.5  # of a multiprocessor's rate: what one block with nothing beside it reaches. An estimate


def find_chip(gpu_name: str) -> Chip | None:
    """The chip whose name is part of ``gpu_name`` ("NVIDIA H200", "NVIDIA GeForce RTX 4090"), by words; or None."""
    words = f" {gpu_name.replace('-', ' ').replace('_', ' ')} "
    return next((chip for name, chip in CHIPS.items() if f" {name} " in words), None)


def chip_of(device: torch.device) -> Chip:
    """The ceilings that cost models take for tensors of ``device``: its own; of its architecture; or an H200's."""
    return _cuda_chip(device.index) if device.type == "cuda" else H200


@constant_while_compiling
@functools.cache
def _cuda_chip(index: int | None) -> Chip:
    if not torch.cuda.is_available():
        return H200  # a trace with fake tensors
    about = torch.cuda.get_device_properties(index)
    arch = about.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{about.major}{about.minor}"
    of_arch = (chip for chip in _TABLE if chip.arch == arch)
    return find_chip(about.name) or next(of_arch, H200)


def spread(programs: float, chip: Chip = H200) -> float:
    """How much longer ``programs`` blocks take than the same work over the whole chip; 1 where they fill it."""
    return max(1.0, chip.multiprocessors / (ALONE * programs))
