"""What a cost model says: the one type that every model returns, here and for a CPU."""

from typing import NamedTuple


class Verdict(NamedTuple):
    """Whether a form is to run, and what it costs."""

    pays: bool  # False: another form is faster
    microseconds: float | None  # of the form; None where the model counts in other units
    says: object = ""  # ``str()`` of it is a sentence for ``fastseg.explain()``
    other: float | None = None  # microseconds of the form that runs in its place

    def __str__(self) -> str:
        return str(self.says)

    def reversed(self) -> "Verdict":
        """The same verdict, asked about the other form."""
        return Verdict(not self.pays, self.other, self.says, self.microseconds)


def verdict(pays: bool, form: str, seconds: float, other: str, other_seconds: float, taken: str, chip: str) -> Verdict:
    """The verdict on ``form`` beside ``other``, with their times, and how the one that is taken is called."""
    us, other_us = seconds * 1e6, other_seconds * 1e6
    return Verdict(pays, us, f"{taken}: model says {form} {us:.1f} us, {other} {other_us:.1f} us on {chip}", other_us)
