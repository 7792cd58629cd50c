"""The SASS of a kernel as instructions and loops, with the places in the source that they were made from."""

import re
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastseg.kernels.tools.machine_code import CUOBJDUMP
from fastseg.kernels.tools.predict.program import Kernel

_PLACE = re.compile(r'//## File "(?:.*/)?([^"/]+)", line (\d+)')
_LABEL = re.compile(r"^(\.\w+):")
_CODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.\w+)\)")


class Instruction(NamedTuple):
    opcode: str
    suffixes: tuple[str, ...]
    operands: str
    guard: str  # its predicate, or ""
    place: str  # file.py:line


@dataclass(eq=False)
class Loop:
    """Instructions ``first`` to ``last`` of the listing, both in it; ``runs``: of its body, for one program."""

    first: int
    last: int
    inner: list["Loop"] = field(default_factory=list)
    runs: float = 1.0


class Listing(NamedTuple):
    instructions: list[Instruction]
    loops: list[Loop]  # the outermost


def disassemble(cubin: bytes) -> str:
    """SASS with the lines of the source, as text; the disassembler comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP.with_name("nvdisasm")), "-g", "-c", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"disassemble: nvdisasm failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def read(text: str) -> Listing:
    """The output of ``nvdisasm -g -c``: what comes after the end of the program, padding, is left out."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    place = "?"
    for line in text.splitlines():
        if found := _PLACE.search(line):
            place = f"{found[1]}:{found[2]}"
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif (found := _CODE.match(line)) and found[2] != "NOP":
            guard, opcode, suffixes, operands = found.groups()
            parts = tuple(suffixes.split(".")[1:])
            instructions.append(Instruction(opcode, parts, operands.strip(), (guard or "").strip(), place))
    jumps = {
        i: labels[target[1]]
        for i, one in enumerate(instructions)
        if one.opcode == "BRA" and (target := _TARGET.search(one.operands)) and target[1] in labels
    }
    before = _dominators(instructions, jumps)
    ends: dict[int, int] = {}  # first instruction of a loop -> last
    for i, first in jumps.items():
        if first < i and first in before(i):  # else a way back from code that stands behind the end, a slow path
            ends[first] = i
    return Listing(instructions, _nested([Loop(first, last) for first, last in sorted(ends.items())]))


def _dominators(instructions: Sequence[Instruction], jumps: Mapping[int, int]) -> Callable[[int], set[int]]:
    """-> a function: instruction -> the beginnings of blocks that every way to it goes through."""
    starts = sorted({0, *jumps.values(), *(i + 1 for i in jumps)} & set(range(len(instructions))))
    ends = dict(zip(starts, [*(start - 1 for start in starts[1:]), len(instructions) - 1], strict=True))
    came: dict[int, set[int]] = {start: set() for start in starts}
    for start, end in ends.items():
        last = instructions[end]
        if end in jumps:
            came[jumps[end]].add(start)
        leaves = last.opcode in ("EXIT", "RET") or (last.opcode == "BRA" and last.operands.startswith("`"))
        if end + 1 in came and (last.guard or not leaves):  # `BRA P0, ...` goes on as well
            came[end + 1].add(start)
    through = {start: set(starts) for start in starts}
    through[0] = {0}
    changed = True
    while changed:
        changed = False
        for start in starts[1:]:
            ways = [through[other] for other in came[start]]
            new = {start} | (set.intersection(*ways) if ways else set())
            changed |= new != through[start]
            through[start] = new
    block = lambda i: starts[bisect_right(starts, i) - 1]
    return lambda i: through[block(i)]


def _nested(loops: list[Loop]) -> list[Loop]:
    """Loops in the order of their beginnings -> the outermost, the others inside them."""
    outermost: list[Loop] = []
    open_: list[Loop] = []
    for loop in loops:
        while open_ and open_[-1].last < loop.first:
            open_.pop()
        (open_[-1].inner if open_ else outermost).append(loop)
        open_.append(loop)
    return outermost


def own(loop: Loop) -> list[int]:
    """The numbers of a loop's instructions outside its inner loops."""
    inside = {i for inner in loop.inner for i in range(inner.first, inner.last + 1)}
    return [i for i in range(loop.first, loop.last + 1) if i not in inside]


def set_runs(listing: Listing, kernel: Kernel, bodies: Sequence[float]) -> list[str]:
    """Give each loop of the listing the runs of the IR's loop that it was made from; -> loops without one.

    Which that is, the lines of its instructions say. Several loops from one of the IR are its unrolled form and what
    remains, by how often their instructions stand in them. A loop that no line tells counts one trip.
    """
    found: dict[int, list[Loop]] = {}
    unknown: list[str] = []

    def match(loops: list[Loop], within: int | None) -> None:
        for loop in loops:
            index = _source(listing, loop, kernel, within)
            if index is None:
                unknown.append(f"instructions {loop.first} to {loop.last}")
                loop.runs = bodies[within] if within is not None else 1.0
            else:
                found.setdefault(index, []).append(loop)
            match(loop.inner, within if index is None else index)

    match(listing.loops, None)
    for index, loops in found.items():
        kinds = [Counter(listing.instructions[i].opcode for i in own(loop)) for loop in loops]
        unrolled = [_times(kind, min(kinds, key=Counter.total)) for kind in kinds]
        for loop, factor in zip(loops, unrolled, strict=True):
            # the unrolled form makes nearly all of the trips, what remains at most factor - 1
            largest = max(unrolled)
            loop.runs = bodies[index] / factor if factor == largest else min(bodies[index], (largest - 1) / 2)
    return unknown


def _times(kinds: Counter[str], of: Counter[str]) -> int:
    """How often the work of the loop ``of`` stands in another: what runs the loop itself stands there once."""
    return max([1, *(round(n / of[kind]) for kind, n in kinds.items() if of[kind])])


def _source(listing: Listing, loop: Loop, kernel: Kernel, within: int | None) -> int | None:
    """The loop of the IR, ``within`` another, whose lines most of a loop's own instructions name.

    A loop around others was made from one around others: the first loads of a pipelined inner loop stand in front of
    it, and would name that.
    """
    votes: Counter[int] = Counter()
    lines = Counter(listing.instructions[i].place for i in own(loop))
    inside = [i for i in range(len(kernel.loops)) if within is None or _is_in(kernel, i, within)]
    if loop.inner:
        around = [i for i in inside if any(_is_in(kernel, other, i) for other in range(len(kernel.loops)))]
        inside = around or inside
    for at, times in lines.items():
        for i in inside:
            if at in kernel.loops[i].own:
                votes[i] += times
    if not votes:
        return None
    most = max(votes.values())
    return min(i for i, n in votes.items() if n == most)


def _is_in(kernel: Kernel, index: int, outer: int) -> bool:
    loop = kernel.loops[index].parent
    while loop is not None:
        if loop is kernel.loops[outer]:
            return True
        loop = loop.parent
    return False
