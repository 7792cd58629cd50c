"""The text form of Triton's IR: one operation a line, regions in braces, places in the source at its end."""

import re
from dataclasses import dataclass, field

_LOC = re.compile(r" loc\((#\w+|.*)\)$")
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")


@dataclass(eq=False)
class Op:
    """One operation: its text without its place, the place, and the operations inside its braces."""

    text: str
    loc: str
    regions: list[list["Op"]] = field(default_factory=list)


def places(ttir: str) -> dict[str, str]:
    """The aliases of places in the source."""
    return dict(re.findall(r"^(#\w+) = loc\((.*)\)$", ttir, re.MULTILINE))


def place(aliases: dict[str, str], loc: str) -> str:
    """``file.py:line`` of a place, of the innermost function where functions were inlined; or ``?``."""
    for _ in range(20):
        if file := re.search(r'"([^"]+)":(\d+):\d+', loc):
            return f"{file[1].rsplit('/', 1)[-1]}:{file[2]}"
        alias = re.search(r"#\w+", loc)
        loc = aliases.get(alias[0], "") if alias else ""
    return "?"


def parse(lines) -> list[Op]:
    """The operations up to the brace that closes the current region."""
    ops: list[Op] = []
    for line in lines:
        loc = _LOC.search(line)
        text = line[: loc.start()].rstrip() if loc else line
        if text.startswith("}"):
            if not text.endswith("{"):
                break
            ops.append(Op("next region", ""))  # "} else {"
        elif text and not text.startswith("^"):
            op = Op(text, loc[1] if loc else "")
            if text.endswith("{"):
                regions: list[list[Op]] = [[]]
                for inner in parse(lines):
                    if inner.text == "next region":
                        regions.append([])
                    else:
                        regions[-1].append(inner)
                op.regions = regions
            ops.append(op)
    return ops


def opcode(text: str) -> str:
    return re.match(r'(?:%\S+(?:, %\S+)* = )?"?([\w.]+)', text)[1]


def operands(text: str) -> list[str]:
    return _NAME.findall(re.split(r"^%[^=]* = ", text)[-1])


def count(text: str) -> int:
    many = re.match(r"%[\w$.-]+:(\d+) = ", text)
    return int(many[1]) if many else text.split(" = ")[0].count("%") if text.startswith("%") else 0


def targets(text: str, count: int) -> list[str]:
    if not text.startswith("%"):
        return []
    left = text.split(" = ")[0]
    if many := re.match(r"(%[\w$.-]+):(\d+)$", left):
        return [f"{many[1]}#{i}" for i in range(int(many[2]))]
    return left.split(", ")
