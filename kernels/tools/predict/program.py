"""What one program of a launch does, by running the integers of its Triton IR: trips of loops, bytes, products.

Sizes, strides and scales come from the launch's arguments, the program's number from the grid, so that addresses, masks
and the bounds of loops are known exactly, those of bilinear kernels too, whose coordinates are computed in floating
point. What memory holds is not known: an address made of it touches bytes nobody counted before; of a branch on it each
side counts half; a loop bounded by it makes the trips that ``trips`` says, or one, and the program is ``assumed``.

A loop of many trips is run for ``SAMPLE`` of them, from its middle; what they added after the first counts for those
left out.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastseg.kernels.tools.predict import values
from fastseg.kernels.tools.predict.values import Pointer
from fastseg.kernels.tools.ttir import Op, count, opcode, operands, parse, place, places, targets

SECTOR = 32  # bytes that move between L1 and L2 at a time
SAMPLE = 8  # trips of a long loop that are run
BYTES = {"i1": 1, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}
_POINTED = re.compile(r"tensor<((?:\d+x)*)!tt\.ptr<(\w+)>")
_PRODUCT = re.compile(r"tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x")


class Work(NamedTuple):
    """Of one program, or the mean of some.

    Attributes:
        read, written: argument -> distinct bytes, in whole sectors.
        requested: bytes that all loads and stores name, each time.
        flop: of the products of ``tl.dot``, two for a multiply-add.
        bodies: how often the body of each loop runs, in the order of the IR.
        loads: place in the source -> the arguments that it loads from.
        shares: place in the source -> how often its operations run for each run of their loop, where that is below 1.
        assumed: a loop's trips were not to be known.
    """

    read: dict[str, float]
    written: dict[str, float]
    requested: float
    flop: float
    bodies: tuple[float, ...]
    loads: dict[str, set[str]]
    shares: dict[str, float]
    assumed: bool


def mean(works: list[Work]) -> Work:
    """The mean of some programs' work."""
    average = lambda numbers: sum(numbers) / len(works)
    shares = _average([work.shares for work in works], 1.0)
    return Work(
        _average([work.read for work in works], 0.0),
        _average([work.written for work in works], 0.0),
        average([work.requested for work in works]),
        average([work.flop for work in works]),
        tuple(map(average, zip(*(work.bodies for work in works), strict=True))),
        {at: names for work in works for at, names in work.loads.items()},
        {at: share for at, share in shares.items() if share < 1},
        any(work.assumed for work in works),
    )


def _average(each: list[dict[str, float]], missing: float) -> dict[str, float]:
    names = {name for one in each for name in one}
    return {name: sum(one.get(name, missing) for one in each) / len(each) for name in sorted(names)}


@dataclass
class Loop:
    """A loop of the IR; ``own``: the places of its operations outside the loops inside it."""

    op: Op
    parent: "Loop | None"
    own: set[str] = field(default_factory=set)


class Kernel:
    """The IR of a kernel, to be run for several programs."""

    def __init__(self, ttir: str):
        self.aliases = places(ttir)
        lines = iter(line.strip() for line in ttir.splitlines())
        header = next(line for line in lines if line.startswith("tt.func public"))
        self.parameters = re.findall(r"%([\w$.-]+): ([^\s,){]+)", header)
        self.ops = parse(lines)
        self.loops: list[Loop] = []
        self._find(self.ops, None)

    def _find(self, ops: Iterable[Op], loop: Loop | None) -> None:
        for op in ops:
            if loop is not None:
                loop.own.add(place(self.aliases, op.loc))
            inner = loop
            if opcode(op.text) in ("scf.for", "scf.while"):
                inner = Loop(op, loop)
                self.loops.append(inner)
            for region in op.regions:
                self._find(region, inner)

    def work(
        self,
        arguments: Mapping[str, object],
        grid: tuple[int, ...],
        program: int,
        trips: Mapping[str, float] | None = None,
    ) -> Work:
        """Of program ``program``, counted x fastest. ``trips``: a loop's variable in the source, or "while" -> its
        trips where memory decides."""
        return _Run(self, arguments, grid, program, trips or {}).work()


class _Run:
    def __init__(self, kernel: Kernel, arguments: Mapping[str, object], grid, program: int, trips):
        self.kernel, self.trips, self.grid = kernel, trips, (*grid, 1, 1)[:3]
        x, y, _ = self.grid
        self.pid = (program % x, program // x % y, program // (x * y))
        self.env: dict[str, object] = {}
        for name, type_ in kernel.parameters:
            given = arguments.get(name)
            self.env[f"%{name}"] = Pointer(name, 0) if "ptr" in type_ else values.scalar(given)
        self.weight, self.requested, self.flop, self.assumed = 1.0, 0.0, 0.0, False
        self.touched = {kind: defaultdict(set) for kind in ("read", "written")}
        self.left_out = {kind: defaultdict(float) for kind in ("read", "written")}  # of loops' trips that are not run
        self.unknown = {kind: defaultdict(float) for kind in ("read", "written")}  # at addresses that are not known
        self.bodies = dict.fromkeys((id(loop.op) for loop in kernel.loops), 0.0)
        self.ran: dict[str, float] = defaultdict(float)  # place -> weighted runs of its conditional operations
        self.chances: dict[str, float] = defaultdict(float)  # the same, had every branch been taken
        self.taken = 1.0
        self.loads: dict[str, set[str]] = defaultdict(set)

    def work(self) -> Work:
        self.block(self.kernel.ops)
        distinct = {kind: self.distinct(kind) for kind in self.touched}
        for kind, more in self.unknown.items():
            for name, moved in more.items():
                distinct[kind][name] = distinct[kind].get(name, 0.0) + moved
        return Work(
            distinct["read"], distinct["written"], self.requested, self.flop,
            tuple(self.bodies[id(loop.op)] for loop in self.kernel.loops), dict(self.loads),
            {at: self.ran[at] / n for at, n in self.chances.items() if n and self.ran[at] < n}, self.assumed,
        )  # fmt: skip

    def distinct(self, kind: str) -> dict[str, float]:
        sets, more = self.touched[kind], self.left_out[kind]
        return {name: SECTOR * len(found) + more[name] for name, found in sets.items()}

    def block(self, ops: list[Op]) -> list[object]:
        """Run one region; the values that it yields."""
        for op in ops:
            name, uses = opcode(op.text), [self.env.get(n) for n in operands(op.text)]
            at = place(self.kernel.aliases, op.loc)
            self.ran[at] += self.weight * self.taken
            self.chances[at] += self.weight
            if name in ("scf.yield", "scf.condition"):
                return uses
            results = self.results(op, name, uses)
            wanted = targets(op.text, count(op.text))
            for target, value in zip(wanted, [*results, *[None] * len(wanted)], strict=False):
                self.env[target] = value
        return []

    def results(self, op: Op, name: str, uses: list[object]) -> list[object]:
        if name == "scf.for":
            return self.loop(op)
        if name == "scf.if":
            return self.branch(op, uses[0])
        if name == "scf.while":
            return self.repeat(op)
        if name == "tt.load":
            if isinstance(uses[0], Pointer):
                self.loads[place(self.kernel.aliases, op.loc)].add(uses[0].name)
            self.access("read", op.text, uses[0], uses[1] if len(uses) > 1 else True)
        elif name == "tt.store":
            self.access("written", op.text, uses[0], uses[2] if len(uses) > 2 else True)
        elif name.startswith("tt.atomic"):
            for kind in ("read", "written"):
                self.access(kind, op.text, uses[0], uses[2] if len(uses) > 2 else True)
        elif name == "tt.dot":
            m, k, n = map(int, _PRODUCT.search(op.text).groups())
            self.flop += 2 * m * k * n * self.weight * self.taken
        elif name == "tt.get_program_id":
            return [self.pid["xyz".index(re.search(r"program_id ([xyz])", op.text)[1])]]
        elif name == "tt.get_num_programs":
            return [self.grid["xyz".index(re.search(r"num_programs ([xyz])", op.text)[1])]]
        elif name == "tt.reduce":
            how = next((opcode(inner.text) for region in op.regions for inner in region), "")
            return values.reduced(op.text, how, uses[0])
        elif name == "tt.split":
            return list(uses[0].unbind(-1)) if isinstance(uses[0], Tensor) else []
        else:
            return [values.computed(name, op.text, uses)]
        return []

    def access(self, kind: str, text: str, pointer: object, mask: object) -> None:
        shape, type_ = _POINTED.search(text.split(" : ")[-1]).groups() if "tensor<" in text else ("", _scalar(text))
        size = BYTES[type_]
        numel = 1
        for side in shape.split("x")[:-1]:
            numel *= int(side)
        share = float(mask.double().mean()) if isinstance(mask, Tensor) else 0.0 if mask is False else 1.0
        moved = numel * size * share * self.weight * self.taken
        self.requested += moved
        if not isinstance(pointer, Pointer):
            return
        if pointer.offset is None:
            self.unknown[kind][pointer.name] += moved
        elif share:
            offset = pointer.offset
            if isinstance(offset, Tensor):
                offset = offset.expand([int(side) for side in shape.split("x")[:-1]])
                offset = offset[mask] if isinstance(mask, Tensor) else offset
                found = torch.unique(offset // SECTOR).tolist()
            else:
                found = [offset // SECTOR]
            self.touched[kind][pointer.name].update(found)

    def branch(self, op: Op, chosen: object) -> list[object]:
        """The region that the condition picks; where that is not known, both, half each."""
        if chosen is None:
            share = [1 / len(op.regions) if len(op.regions) > 1 else 0.5] * len(op.regions)
        else:
            share = [float(bool(chosen)), float(not chosen)][: len(op.regions)]
        taken, results = self.taken, []
        for region, each in zip(op.regions, share, strict=True):
            self.taken = taken * each
            if each:
                results.append(self.block(region))
            else:
                self.skip(region)
        self.taken = taken
        return results[0] if len(results) == 1 and chosen is not None else []

    def skip(self, ops: list[Op]) -> None:
        for op in ops:
            self.chances[place(self.kernel.aliases, op.loc)] += self.weight
            for region in op.regions:
                self.skip(region)

    def repeat(self, op: Op) -> list[object]:
        """A while loop, whose trips are not known."""
        self.assumed = True
        trips = self.trips.get("while", 1.0)
        self.bodies[id(op)] += trips * self.weight * self.taken
        weight, self.weight = self.weight, self.weight * trips
        for region in op.regions:
            self.block(region)
        self.weight = weight
        return []

    def loop(self, op: Op) -> list[object]:
        head = re.match(r"(?:%\S+ = )?scf\.for (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%[\w$.-]+)(.*)", op.text)
        lo, hi, step = (self.env.get(name) for name in head.groups()[1:4])
        carried = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", head[5].split("->")[0])
        now = [self.env.get(source) for _, source in carried]
        known = None not in (lo, hi, step)
        self.assumed |= not known
        variable = re.sub(r"_\d+$", "", head[1][1:])
        if not known and self.trips and variable not in self.trips:
            raise RuntimeError(
                f"predict: trips of the loop over {variable} are not given, but those over {[*self.trips]}"
            )
        named = self.trips.get(variable, 1)
        trips = max(0, -(-(hi - lo) // step)) if known else named
        self.bodies[id(op)] += trips * self.weight * self.taken
        if not trips:
            self.skip(op.regions[0])
            return now
        ran = min(int(trips) or 1, SAMPLE)
        weight, self.weight = self.weight, self.weight * trips / ran
        before = {}
        for i in range(ran):
            if i == 1 and ran < trips:
                before = {kind: self.distinct(kind) for kind in self.touched}
            first = 0 if lo is None or step is None else lo + (i + int(trips - ran) // 2) * step
            self.env[head[1]] = first
            self.env.update(zip((name for name, _ in carried), now, strict=True))
            now = self.block(op.regions[0])
        for kind, old in before.items():
            for name, moved in self.distinct(kind).items():
                self.left_out[kind][name] += (moved - old.get(name, 0)) / (ran - 1) * (trips - ran)
        self.weight = weight
        return now


def _scalar(text: str) -> str:
    return re.search(r"!tt\.ptr<(\w+)", text)[1]
