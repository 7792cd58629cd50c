"""Times of launches from counts: ``predict`` of one, ``predict_launches`` of all that a function makes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fastseg.kernels.runtime.ceilings import Chip, Core
from fastseg.kernels.tools.predict import sass, warp
from fastseg.kernels.tools.predict.program import Kernel, Work, mean
from fastseg.kernels.tools.report import TARGETS, KernelReport, Launched, compile_launches

PROGRAMS = (1 / 6, 1 / 2, 5 / 6)  # of the grid: those whose work is looked at
STAYS = 32 << 10  # bytes of an argument that L1 keeps beside a program's tiles: an estimate
BAND = "-10 to +30 %"


class Counts(NamedTuple):
    """Of a launch: what ``seconds`` needs of it.

    Attributes:
        programs, warps, blocks: of the grid; of a program; programs that a multiprocessor holds.
        dram, l2: bytes of the whole launch.
        slots: of one warp.
        matrix: seconds that the matrix units of one multiprocessor take for one program.
        alone: cycles of a warp alone.
    """

    programs: int
    warps: int
    blocks: int
    dram: float
    l2: float
    slots: warp.Slots
    matrix: float
    alone: float


class Prediction(NamedTuple):
    """Of one launch. ``bound``: the longest of ``terms``, which are seconds; ``assumed``: trips that memory decides."""

    kernel: str
    config: dict[str, object]
    seconds: float
    bound: str
    terms: dict[str, float]
    programs: int
    blocks: int
    assumed: bool
    refused: str = ""  # why the chip would not run it, or not well

    @property
    def us(self) -> float:
        return self.seconds * 1e6


def seconds(counts: Counts, chip: Chip) -> dict[str, float]:
    """The terms of the package's header, without the launch."""
    core, busiest = chip.core, -(-counts.programs // chip.multiprocessors)
    cycles = lambda n, lanes: n * counts.warps * busiest * 32 / lanes / chip.clock
    slots = counts.slots
    return {
        "dram": counts.dram / chip.bandwidth,
        "l2": counts.l2 / chip.l2_bandwidth,
        "l1": slots.bytes * counts.warps * busiest / core.port / chip.clock,
        "matrix": counts.matrix * busiest,
        "issue": cycles(slots.issued, 32 * core.schedulers),
        "fma": max(cycles(slots.fma, chip.lanes_each), cycles(slots.heavy, chip.lanes_each / 2)),
        "alu": cycles(slots.alu, core.alu_lanes),
        "special": cycles(slots.special, core.special_lanes),
        "double": cycles(slots.double, core.double_lanes),
        "latency": -(-counts.programs // (chip.multiprocessors * max(counts.blocks, 1))) * counts.alone / chip.clock,
    }


def predict(launched: Launched, chip: Chip, trips: Mapping[str, float] | None = None) -> Prediction:
    """Of a compiled launch. ``trips``: of loops whose ends are in memory, by their variables."""
    work = work_of(launched, trips)
    counts = count(launched, work, chip)
    terms = seconds(counts, chip)
    bound = max(terms, key=terms.__getitem__)
    report = launched.report
    return Prediction(
        report.kernel, dict(report.config, num_warps=report.num_warps, num_stages=report.num_stages),
        terms[bound] + chip.launch, bound, terms, counts.programs, counts.blocks, work.assumed, refused(report),
    )  # fmt: skip


def refused(report: KernelReport) -> str:
    """Why a configuration is out of the question: spills, too much shared memory, or ""."""
    if report.code.spills or report.code.stack:
        return f"{report.code.spills} spills, {report.code.stack} bytes of stack"
    if report.shared > TARGETS[report.target].block_shared or not report.blocks:
        return f"{report.shared} bytes of shared memory, {report.blocks} blocks fit"
    return ""


def work_of(launched: Launched, trips: Mapping[str, float] | None = None) -> Work:
    """The mean of some of its programs."""
    kernel, programs = _parsed(launched.ttir), _product(launched.grid)
    chosen = sorted({min(int(share * programs), programs - 1) for share in PROGRAMS})
    return mean([kernel.work(launched.arguments, launched.grid, program, trips) for program in chosen])


def count(launched: Launched, work: Work, chip: Chip) -> Counts:
    """Of a launch whose programs do ``work``."""
    report, programs, core = launched.report, _product(launched.grid), chip.core
    listing = _listing(launched.cubin)
    sass.set_runs(listing, _parsed(launched.ttir), work.bodies)
    slots = warp.slots(listing, work.shares)
    sizes = {name: a.numel() * a.element_size() for name, a in launched.arguments.items() if isinstance(a, Tensor)}
    once = lambda touched: sum(min(sizes.get(name, float("inf")), programs * n) for name, n in touched.items())
    dram, each = once(work.read) + once(work.written), sum(work.read.values()) + sum(work.written.values())
    matrix, product = 0.0, 0.0
    if slots.matrix and work.flop:
        through_registers = slots.matrix["HMMA"] > 0
        rate = chip.tf32 if any("TF32" in one.suffixes for one in listing.instructions) else chip.half
        rate *= core.mma_share if through_registers else 1.0
        matrix = work.flop / (rate / chip.multiprocessors)
        product = matrix * chip.clock / slots.matrix.total()
    of = lambda name: _latency(programs * work.read.get(name, 0.0), sizes.get(name, 0), core)
    memory = {at: max(map(of, names)) for at, names in work.loads.items()}
    alone = warp.alone(listing, core, memory, product, work.shares)
    return Counts(programs, report.num_warps, report.blocks, dram, programs * each, slots, matrix, alone)


def _latency(touched: float, size: float, core: Core) -> float:
    """Cycles of a load from an argument of ``size`` bytes, of which all programs together touch ``touched``: small ones
    stay in L1 from one program to the next, others come from DRAM once and then from the L2."""
    if size <= STAYS:
        return core.l1
    return core.l2 + core.dram * min(1.0, size / max(touched, 1.0))


def predict_launches(
    fn: Callable[[], object],
    chip: Chip,
    trips: Callable[[Launched], Mapping[str, float]] = lambda launched: {},
    wanted: Callable[[str], bool] = lambda kernel: True,
) -> list[Prediction]:
    """Of all launches of the kernels wanted that ``fn()`` makes with ``meta`` tensors, in their order."""
    return predict_on(fn, [chip], trips, wanted)[chip.name]


def predict_on(
    fn: Callable[[], object],
    chips: Sequence[Chip],
    trips: Callable[[Launched], Mapping[str, float]] = lambda launched: {},
    wanted: Callable[[str], bool] = lambda kernel: True,
) -> dict[str, list[Prediction]]:
    """``predict_launches`` for chips of one architecture, by their names: its code is compiled once."""
    found: dict[str, list[Prediction]] = {chip.name: [] for chip in chips}
    known: dict[object, list[Prediction]] = {}

    def on_launch(launched: Launched) -> None:
        like = lambda a: (a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a
        key = (launched.cubin, launched.grid, *(repr(like(a)) for a in launched.arguments.values()))
        if key not in known:
            known[key] = [predict(launched, chip, trips(launched)) for chip in chips]
        for chip, prediction in zip(chips, known[key], strict=True):
            found[chip.name].append(prediction)

    compile_launches(fn, chips[0].arch, each=on_launch, wanted=wanted)
    return found


@functools.lru_cache(maxsize=256)
def _parsed(ttir: str) -> Kernel:
    return Kernel(ttir)


@functools.lru_cache(maxsize=256)
def _listing(cubin: bytes) -> sass.Listing:
    return sass.read(sass.disassemble(cubin))


def _product(grid: tuple[int, ...]) -> int:
    out = 1
    for n in grid:
        out *= n
    return out
