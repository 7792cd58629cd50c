"""Can an offset of this launch overflow 32 bits? Interval arithmetic over a kernel's Triton IR.

Triton passes a size below 2^31 as i32, and an i32 product wraps silently: ``program_id * plane_stride`` corrupts memory
on maps of more than 2^31 elements. Program ids are bounded by the launch grid and sizes by the launch arguments, so
every integer of the kernel has an interval. An i32 result whose interval leaves i32, and which reaches an address or
the mask of an access, is a fault. The check is as strong as the launch is large: give it tensors past 2^31 elements
(``meta`` tensors cost nothing). A value that cannot be bounded (loaded from memory, say) counts as any i32.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastseg.kernels.tools.ttir import Op, count, opcode, operands, parse, place, places, targets

_TYPE = re.compile(r"(?:x|\b)i(1|8|16|32|64)>*$")
_COPIES = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.unsplat", "arith.extsi",
           "arith.extui", "arith.index_cast", "arith.trunci", "tt.split"}  # fmt: skip


@dataclass(eq=False)
class _Value:
    """One SSA value: its interval (None: not known), what it is computed from, and its fault if it overflows first."""

    range: tuple[int, int] | None = None
    deps: list["_Value"] = field(default_factory=list)
    fault: str = ""
    wrapped: bool = False  # it or something before it overflows: one fault is reported, not all that follow


def i32_overflows(ttir: str, arguments: Mapping[str, object], grid: tuple[int, ...]) -> list[str]:
    """Faults of one launch, as ``file:line: muli reaches 4294967296 in i32``; empty if every offset fits.

    Args:
        ttir: the kernel's Triton IR as text (``compiled.asm["ttir"]``).
        arguments: launch arguments by parameter name; only the integers matter.
        grid: the launch grid, one to three sizes.
    """
    return _Walk(ttir, arguments, grid).faults()


class _Walk:
    def __init__(self, ttir: str, arguments: Mapping[str, object], grid: tuple[int, ...]):
        self.grid = (*grid, 1, 1)
        self.locs = places(ttir)
        self.env: dict[str, _Value] = {}
        self.roots: list[_Value] = []  # offsets and masks
        lines = iter(line.strip() for line in ttir.splitlines())
        header = next(line for line in lines if line.startswith("tt.func public"))
        for name, type_ in re.findall(r"%([\w$.-]+): ([^\s,){]+)", header):
            value = arguments.get(name)
            known = isinstance(value, int) and type_.startswith("i")
            self.env[f"%{name}"] = _Value((int(value), int(value)) if known else _full(type_))
        self.block(parse(lines))

    def faults(self) -> list[str]:
        found, seen, todo = [], set(), list(self.roots)
        while todo:
            value = todo.pop()
            if id(value) not in seen:
                seen.add(id(value))
                todo += value.deps
                if value.fault and value.fault not in found:
                    found.append(value.fault)
        return sorted(found)

    def block(self, ops: list[Op]) -> list[_Value]:
        """Interpret one region; the values that it yields."""
        for op in ops:
            name, uses = opcode(op.text), [self.env.get(n, _Value()) for n in operands(op.text)]
            if name in ("scf.yield", "scf.condition"):
                return uses
            if name in ("tt.addptr", "tt.load"):
                self.roots += uses[1:2]  # the offset, the mask
            elif name in ("tt.store", "tt.atomic_rmw"):
                self.roots += uses[2:]
            elif name.startswith("tt.descriptor_"):
                self.roots += uses
            results = self.results(op, name, uses)
            for target, value in zip(targets(op.text, len(results)), results, strict=False):
                self.env[target] = value
        return []

    def results(self, op: Op, name: str, uses: list[_Value]) -> list[_Value]:
        if name == "scf.for":
            return self.loop(op)
        if name == "scf.if":
            branches = [self.block(region) for region in op.regions]
            return [_join(pair) for pair in zip(*branches, strict=False)]
        for region in op.regions:  # reductions, scans, while loops: their results count as unknown
            self.block(region)
        full = _full(op.text)
        if name == "tt.load" or full is None:  # what memory holds does not depend on how its address was made
            return [_Value(full, [] if name == "tt.load" else uses)] * count(op.text)
        raw = self.interval(op.text, name, uses)
        if raw is None:
            return [_Value(full, uses)] * count(op.text)
        value = _Value(raw, uses, wrapped=any(u.wrapped for u in uses))
        if not full[0] <= raw[0] <= raw[1] <= full[1]:
            if full == _I32 and not value.wrapped:
                what = f"{name.split('.')[1]} {_why(raw, uses)}"
                value.fault = f"{place(self.locs, op.loc)}: {what}; cast to tl.int64 before it"
                value.wrapped = True
            value.range = full
        return [value] * count(op.text)

    def interval(self, text: str, name: str, uses: list[_Value]) -> tuple[int, int] | None:
        """The mathematical range of the result, before it wraps; None if nothing is known."""
        if name == "tt.get_program_id":
            return (0, self.grid["xyz".index(re.search(r"program_id ([xyz])", text)[1])] - 1)
        if name == "tt.get_num_programs":
            return (self.grid["xyz".index(re.search(r"num_programs ([xyz])", text)[1])],) * 2
        if name == "tt.make_range":
            return int(re.search(r"start = (\d+)", text)[1]), int(re.search(r"end = (\d+)", text)[1]) - 1
        if name == "arith.constant":
            value = re.search(r"arith\.constant (?:dense<)?(-?\d+)>? :", text)
            return (int(value[1]),) * 2 if value else None
        if name == "arith.extui" and uses[0].range and uses[0].range[0] < 0:  # a negative value counts as a large one
            source = _full(text.split(" to ")[0])
            return source and (0, source[1] - source[0])
        if name in _COPIES:
            return uses[0].range
        if name == "arith.cmpi":
            return 0, 1
        return _arithmetic(name, [u.range or _full(text) for u in uses])

    def loop(self, op: Op) -> list[_Value]:
        """``scf.for``: a carried integer is assumed to grow by equal steps; the assumption is then checked."""
        head = re.match(r"(?:%\S+ = )?scf\.for (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%[\w$.-]+)(.*)", op.text)
        lo, hi, step = (self.env[name].range or _I64 for name in head.groups()[1:4])
        bounds = [self.env[name] for name in head.groups()[1:3]]
        self.env[head[1]] = _Value((lo[0], max(lo[0], hi[1] - 1)), bounds)
        trips = max(0, -(-(hi[1] - lo[0]) // step[0])) if step[0] > 0 else hi[1] - lo[0]
        carried = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", head[5].split("->")[0])
        initial = [self.env[source] for _, source in carried]

        def once(values: list[_Value]) -> tuple[list[_Value], list[_Value]]:
            before = len(self.roots)
            self.env.update(zip((name for name, _ in carried), values, strict=True))
            yielded, roots = self.block(op.regions[0]), self.roots[before:]
            del self.roots[before:]
            return yielded, roots

        steps = [_growth(start, after) for start, after in zip(initial, once(initial)[0], strict=True)]
        entry = []
        for start, (down, up) in zip(initial, steps, strict=True):
            grown = start.range and (start.range[0] + down * max(trips - 1, 0), start.range[1] + up * max(trips - 1, 0))
            entry.append(_Value(grown, [start]))
        for value, after, (down, up) in zip(entry, once(entry)[0], steps, strict=True):
            again = _growth(value, after)
            if again[0] < down or again[1] > up:
                value.range = _I64
        final, roots = once(entry)
        self.roots += roots
        for value, after in zip(entry, final, strict=True):
            value.deps.append(after)
        return [_join(pair) for pair in zip(initial, final, strict=True)]


_I32 = (-(2**31), 2**31 - 1)
_I64 = (-(2**63), 2**63 - 1)


def _growth(before: _Value, after: _Value) -> tuple[int, int]:
    """How far one trip of a loop moves the ends of a carried value's interval."""
    if before.range is None or after.range is None:
        return 0, 0
    return min(0, after.range[0] - before.range[0]), max(0, after.range[1] - before.range[1])


def _why(raw: tuple[int, int], uses: list[_Value]) -> str:
    if any(u.range is None or (u.range[0] <= _I32[0] and _I32[1] <= u.range[1]) for u in uses):
        return "in i32 has an operand without bounds"
    return f"reaches {raw[1] if raw[1] > _I32[1] else raw[0]} in i32"


def _full(type_: str) -> tuple[int, int] | None:
    """The range of the integer type that ``type_`` ends with; None for other types."""
    bits = _TYPE.search(type_.strip())
    if bits is None:
        return None
    return (0, 1) if bits[1] == "1" else (-(2 ** (int(bits[1]) - 1)), 2 ** (int(bits[1]) - 1) - 1)


def _arithmetic(name: str, ranges: list[tuple[int, int]]) -> tuple[int, int] | None:
    if name == "arith.select":
        return min(r[0] for r in ranges[1:]), max(r[1] for r in ranges[1:])
    if len(ranges) != 2:
        return None
    (a, b), (c, d) = ranges
    if name == "arith.addi":
        return a + c, b + d
    if name == "arith.subi":
        return a - d, b - c
    if name == "arith.muli":
        corners = (a * c, a * d, b * c, b * d)
        return min(corners), max(corners)
    if name == "arith.shli" and 0 <= c <= d < 64:
        return min(a << c, a << d), max(b << c, b << d)
    if name == "arith.shrsi" and 0 <= c <= d < 64:
        return min(a >> c, a >> d), max(b >> c, b >> d)
    if name in ("arith.maxsi", "arith.minsi"):
        pick = max if name == "arith.maxsi" else min
        return pick(a, c), pick(b, d)
    return _nonnegative(name, a, b, c, d)


def _nonnegative(name: str, a: int, b: int, c: int, d: int) -> tuple[int, int] | None:
    """Division and bit operations; precise where no operand is negative."""
    if name in ("arith.divsi", "arith.divui"):
        if a >= 0 and c > 0:
            return a // d, b // c
        return None if name == "arith.divui" else (-max(abs(a), abs(b)), max(abs(a), abs(b)))
    if name in ("arith.remsi", "arith.remui"):
        most = max(abs(c), abs(d)) - 1
        if a >= 0:
            return 0, min(b, most) if name == "arith.remsi" or c > 0 else b
        return None if name == "arith.remui" else (max(a, -most), min(max(b, 0), most))
    if name in ("arith.andi", "arith.ori", "arith.xori") and a >= 0 and c >= 0:
        return 0, min(b, d) if name == "arith.andi" else 2 ** max(b, d).bit_length() - 1
    return None


def _join(values: tuple[_Value, ...]) -> _Value:
    ranges = [v.range for v in values]
    hull = None if None in ranges else (min(r[0] for r in ranges), max(r[1] for r in ranges))
    return _Value(hull, list(values), wrapped=any(v.wrapped for v in values))
