"""What a conversion did: one row for each module that a rule knows."""

from dataclasses import dataclass, field


@dataclass
class Row:
    """One module.

    Attributes:
        module: its name in the model; "" is the model itself.
        kind: its class.
        rule: the rule that knows the class; "" if what is said holds for any rule.
        converted: True if the rule computes it now.
        why: why not, or what the rule does.
        products: multiplications on the example, before and after; None without one.
        bytes: read and written by torch's operators on the example, before and after.
        error: the largest difference on the example in float64, relative to the largest value; forward and gradients.
    """

    module: str
    kind: str
    rule: str
    converted: bool
    why: str
    products: tuple[int, int] | None = None
    bytes: tuple[int, int] | None = None
    error: float | None = None


@dataclass
class Conversion:
    """The rows of a model, in the order of its modules; ``str()`` gives a table."""

    rows: list[Row] = field(default_factory=list)

    def __iter__(self):
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def converted(self) -> list[Row]:
        """The modules that a rule computes now."""
        return [row for row in self.rows if row.converted]

    @property
    def left(self) -> list[Row]:
        """The modules that were left as they are, and why."""
        return [row for row in self.rows if not row.converted]

    def __str__(self) -> str:
        head = ("module", "class", "rule", "Mproducts", "MB", "")
        rows = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if not self.converted:
            lines.append("nothing was converted")
        return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    pair = lambda p: "" if p is None else f"{p[0] * 1e-6:.4g} -> {p[1] * 1e-6:.4g}"
    said = row.why if row.converted else f"left: {row.why}"
    return row.module or "(model)", row.kind, row.rule, pair(row.products), pair(row.bytes), said
