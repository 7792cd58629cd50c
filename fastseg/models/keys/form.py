"""A form of saved weights: the names that some code gives to the tensors of a model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

COUNTER = "num_batches_tracked"  # of batch norm; absent from old files, and not needed


@dataclass(frozen=True)
class Form:
    """How one code names the tensors of a model.

    Attributes:
        source: the code, in words; empty for fastseg's own names.
        names: {the model's name: the name in the file}.
        constants: {the model's name: its value}, for tensors that the source does not have.
        unused: prefixes of names in the file that the model does not need; they are left out.
        noted: {prefix of names in the file: the warning when they are left out}.
        refusal: why these weights would give other outputs in this model; empty if they would not.
        eps: epsilon that all norms get when these weights are loaded; None leaves it.
        flat: True if vectors may be saved with more dimensions, as Caffe does.
    """

    source: str
    names: Mapping[str, str]
    constants: Mapping[str, float] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    noted: Mapping[str, str] = field(default_factory=dict)
    refusal: str = ""
    eps: float | None = None
    flat: bool = False


def renamed(keys: Iterable[str], rename: Callable[[str], str]) -> dict[str, str]:
    """Return {key: rename(key)}, checked: two keys with one name would lose a tensor."""
    names = {key: rename(key) for key in keys}
    assert len(set(names.values())) == len(names), "two tensors have one name"
    return names


def by_parts(key: str, parts: Mapping[str, str]) -> str:
    """Replace the longest prefix of ``key`` (in whole segments) that ``parts`` names."""
    head = key
    while head not in parts:
        head, _, _ = head.rpartition(".")
        if not head:
            return key
    return parts[head] + key[len(head) :]
