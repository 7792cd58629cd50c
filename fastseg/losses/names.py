"""Losses by name, as the command line gives them: ``ce+dice``, ``ce+0.5*dice``."""

from collections.abc import Callable

from fastseg.losses.hard_pixels import OHEM, TopK
from fastseg.losses.regions import Dice, GeneralizedDice, Jaccard, Tversky
from fastseg.losses.terms import CrossEntropy, Focal, Term

NAMES: dict[str, Callable[..., Term]] = {
    "ce": CrossEntropy,
    "dice": Dice,
    "focal": Focal,
    "gdice": GeneralizedDice,
    "jaccard": Jaccard,
    "ohem": OHEM,
    "topk": TopK,
    "tversky": Tversky,
}
WEIGHTED = ("ce", "focal", "ohem", "topk")  # take a factor for each class


def parse_loss(text: str, **options) -> list[tuple[float, Term]]:
    """(weight, loss) pairs of a text such as "ce+dice" or "ce+0.5*dice".

    Args:
        text: names of ``NAMES`` joined by "+", each after a factor and "*" if it is not 1.
        options: of those losses that take class weights, such as ``weight=...``.

    Raises:
        ValueError: a name or a factor is unknown.
    """
    terms = []
    for part in text.split("+"):
        factor, star, name = part.strip().rpartition("*")
        name = name.strip().lower()
        try:
            weight = float(factor) if star else 1.0
        except ValueError:
            weight = float("nan")
        if name not in NAMES or not 0 < weight < float("inf"):
            raise ValueError(
                f"loss {text!r}: {part.strip()!r} is no loss; join {', '.join(NAMES)} by +, each after a positive "
                "factor and * if it is not 1, such as ce+0.5*dice"
            )
        terms.append((weight, NAMES[name](**(options if name in WEIGHTED else {}))))
    return terms
