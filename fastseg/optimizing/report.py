"""What each pass did to a graph, as a table."""

from typing import NamedTuple


class Counts(NamedTuple):
    """What one call of a graph takes: multiplications, bytes that its operators move, launches (ops on a CPU)."""

    products: int
    bytes: int
    launches: int


class Row(NamedTuple):
    """One pass."""

    name: str
    matches: tuple[str, ...]
    before: Counts | None = None  # None where nothing matched
    after: Counts | None = None
    note: str = ""  # why nothing is left of it


HEADER = ("pass", "matches", "products, M", "bytes, MB", "launches", "note")


def table(rows: list[Row]) -> str:
    """The rows side by side, values before -> after."""
    lines = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    numbers = ["", "", ""]
    if row.before is not None and row.after is not None:
        pairs = zip(row.before, row.after, (1e6, 1e6, 1), strict=True)
        numbers = [f"{_number(a / unit)} -> {_number(b / unit)}" for a, b, unit in pairs]
    return (row.name, str(len(row.matches)), *numbers, row.note)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
