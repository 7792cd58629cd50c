"""A warp's way through a kernel: the slots that its instructions take, and its cycles when nothing else runs.

Alone, a warp issues in order, an instruction a cycle, and waits for the registers, barriers and groups of copies that
an instruction needs; no program ends sooner, however idle the chip. What is left out: stalls that the control codes
name, bank conflicts, the skew between warps at a barrier.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fastseg.kernels.runtime.ceilings import Core
from fastseg.kernels.tools.machine_code import NVIDIA_MATRIX
from fastseg.kernels.tools.predict.sass import Instruction, Listing, Loop, own

FMA = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2", "HFMA2", "HADD2", "HMUL2", "FSWZADD"}
INTEGER_FMA = {"IMAD"}
ALU = {
    "IADD3", "IADD", "VIADD", "VIMNMX", "VIADDMNMX", "LOP3", "SHF", "LEA", "ISETP", "SEL", "FSETP", "FMNMX", "FMNMX3",
    "FSEL", "FSET", "PRMT", "IMNMX", "F2FP", "PLOP3", "P2R", "R2P", "I2FP", "IABS", "MOV", "SGXT", "BMSK",
}  # fmt: skip
SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "POPC", "FLO", "BREV", "F2IP"}
GLOBAL = {"LDG", "STG", "LDGSTS", "LDL", "STL", "ATOMG", "REDG", "RED", "ATOM", "LD", "ST"}
SHARED = {"LDS", "STS", "LDSM", "STSM", "LDGSTS", "ATOMS", "SHFL"}
DOUBLE = {"DFMA", "DADD", "DMUL", "DSETP"}
PORT = 128  # bytes: what an access takes at least of the port to L1 and shared memory
_REGISTER = re.compile(r"\bU?R\d+\b")


class Slots(NamedTuple):
    """Of one warp through a whole program: instructions by pipe, bytes through L1 and shared memory."""

    issued: float
    fma: float  # multiply-adds, integers' too
    heavy: float  # those of them that half of the lanes can do: integers'
    alu: float
    special: float
    double: float
    bytes: float  # global and shared accesses of all 32 lanes, in whole cycles of the port
    matrix: Counter  # matrix instructions by opcode


def slots(listing: Listing, shares: Mapping[str, float] | None = None) -> Slots:
    """Counted over the loops' runs; ``shares``: of places in the source that run less often than their loop."""
    counts: Counter[str] = Counter()
    matrix: Counter[str] = Counter()
    for i, runs in _weighted(listing):
        one = listing.instructions[i]
        runs *= (shares or {}).get(one.place, 1.0)
        counts["issued"] += runs
        counts["fma"] += runs * (one.opcode in FMA or one.opcode in INTEGER_FMA)
        counts["heavy"] += runs * (one.opcode in INTEGER_FMA)
        counts["alu"] += runs * (one.opcode in ALU)
        counts["special"] += runs * (one.opcode in SPECIAL)
        counts["double"] += runs * (one.opcode in DOUBLE)
        if one.opcode in GLOBAL or one.opcode in SHARED:
            counts["bytes"] += runs * max(PORT, 32 * moved(one))
        if one.opcode in NVIDIA_MATRIX:
            matrix[one.opcode] += runs
    return Slots(*(counts[name] for name in Slots._fields[:-1]), matrix)


def moved(one: Instruction) -> int:
    """Bytes of one lane's access."""
    if one.opcode in ("LDSM", "STSM"):
        return 4 * next((int(part) for part in ("4", "2") if part in one.suffixes), 1)
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    found = next((widths[part] for part in one.suffixes if part in widths), 4)
    return found * (2 if one.opcode == "LDGSTS" else 1)  # into L1's path, and out of it into shared memory


def _weighted(listing: Listing) -> Iterable[tuple[int, float]]:
    inside: dict[int, float] = {}

    def walk(loops: list[Loop]) -> None:
        for loop in loops:
            inside.update(dict.fromkeys(own(loop), loop.runs))
            walk(loop.inner)

    walk(listing.loops)
    return ((i, inside.get(i, 1.0)) for i in range(len(listing.instructions)))


def alone(
    listing: Listing, core: Core, memory: Mapping[str, float], product: float = 0.0,
    shares: Mapping[str, float] | None = None,
) -> float:  # fmt: skip
    """Cycles of a warp that runs alone.

    ``memory``: place in the source -> latency of its loads, an L2's where it is not named; ``product``: how long the
    block's warps together keep the matrix units busy for each matrix instruction of one warp.
    """
    warp = _Warp(listing, core, memory, product, shares or {})
    warp.body(Loop(0, len(listing.instructions) - 1, listing.loops))
    return max([warp.now, *warp.ready.values(), *warp.products])


class _Warp:
    def __init__(self, listing: Listing, core: Core, memory: Mapping[str, float], product: float, shares):
        self.listing, self.core, self.memory, self.product, self.shares = listing, core, memory, product, shares
        self.now, self.unit = 0.0, 0.0  # the next issue; when the matrix unit is free
        self.ready: dict[str, float] = {}  # register -> when it can be read
        self.copies: list[float] = []  # ends of groups of asynchronous copies
        self.group = 0.0  # end of the copies not yet in a group
        self.products: list[float] = []  # ends of asynchronous products

    def body(self, loop: Loop) -> None:
        """One run of a loop's body."""
        starts = {inner.first: inner for inner in loop.inner}
        i = loop.first
        while i <= loop.last:
            if i in starts:
                self.repeat(starts[i], starts[i].runs / max(loop.runs, 1e-9))
                i = starts[i].last + 1
            else:
                self.issue(self.listing.instructions[i])
                i += 1

    def repeat(self, loop: Loop, trips: float) -> None:
        """Two trips as they are, the rest as the second."""
        ran, took = min(2, round(trips)), 0.0
        for _ in range(ran):
            begin = self.now
            self.body(loop)
            took = self.now - begin
        more = max(0.0, trips - ran) * took
        self.now, self.unit = self.now + more, self.unit + more
        self.ready = {name: at + more for name, at in self.ready.items()}
        self.copies = [at + more for at in self.copies]
        self.products = [at + more for at in self.products]

    def issue(self, one: Instruction) -> None:
        if self.shares.get(one.place, 1.0) < 0.5:
            return  # a branch that is seldom taken
        core, op = self.core, one.opcode
        into, sources = registers(one)
        self.now = max([self.now, *(self.ready.get(name, 0.0) for name in sources)])
        if op == "BAR" or op == "SYNCS":
            if op == "SYNCS" and "TRYWAIT" in one.suffixes:
                self.wait(self.products, 0)
            self.now += core.barrier
        elif op == "LDGDEPBAR":
            self.copies.append(self.group)
            self.group = 0.0
        elif op == "DEPBAR":
            self.wait(self.copies, _number(one.operands))
        elif op == "WARPGROUP" and "DEPBAR" in one.suffixes:
            self.wait(self.products, _number(one.operands))
        elif op == "LDGSTS":
            self.group = max(self.group, self.now + self.memory.get(one.place, core.l2))
        elif op in NVIDIA_MATRIX:
            self.unit = max(self.now, self.unit) + self.product
            if op in ("HMMA", "IMMA", "DMMA"):
                self.ready.update(dict.fromkeys(into, max(self.unit, self.now + core.mma)))
            else:
                self.products.append(self.unit + core.wgmma_tail)
        else:
            self.ready.update(dict.fromkeys(into, self.now + latency(one, core, self.memory.get(one.place, core.l2))))
        self.now += 1

    def wait(self, ends: list[float], left: int) -> None:
        """Until at most ``left`` of them have not ended."""
        done, ends[:] = ends[: len(ends) - left], ends[len(ends) - left :] if left else []
        self.now = max([self.now, *done])


def latency(one: Instruction, core: Core, memory: float) -> float:
    """Cycles until the result can be read."""
    op = one.opcode
    if op in GLOBAL:
        return memory
    if op in SHARED or op in ("LDC", "S2R", "S2UR", "LDTM", "R2UR"):
        return core.shared
    if op in SPECIAL:
        return core.special
    if op in DOUBLE:
        return 2 * core.shared
    return core.alu if not op.startswith("U") else 2 * core.alu


def registers(one: Instruction) -> tuple[list[str], list[str]]:
    """Those that an instruction writes, and those that it reads."""
    parts = [part.strip() for part in one.operands.split(",")]
    into: list[str] = []
    rest = parts
    if parts and re.fullmatch(r"U?R\d+", parts[0]) and one.opcode not in ("STG", "STS", "STL", "RED", "BRX"):
        kind, number = re.fullmatch(r"(U?R)(\d+)", parts[0]).groups()
        into = [f"{kind}{int(number) + i}" for i in range(_width(one))]
        rest = parts[1:]
    return into, [name for part in rest for name in _REGISTER.findall(part)]


def _width(one: Instruction) -> int:
    """Registers of the result."""
    if one.opcode in ("LDSM", "LDG", "LDS", "LDL", "LDC", "LDTM", "ULDC"):
        return max(1, moved(one) // 4)
    return 4 if one.opcode == "HMMA" else 2 if {"64", "WIDE"} & {*one.suffixes} or one.opcode == "CS2R" else 1


def _number(operands: str) -> int:
    """The last number of ``SB0, 0x1``."""
    return int(operands.split(",")[-1].strip(), 0)
