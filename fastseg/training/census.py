"""Count what the labels of a split hold before training: classes that never occur, and marks of each pair."""

import hashlib
from collections.abc import Sequence

import numpy as np

from fastseg.io.processes import Processes


class Census:
    """Counts over the pairs of a split.

    Attributes:
        pixels: (256,), int64, of each label value.
        several: number of pairs whose picture or label has several pages.
        largest: pixels of the largest picture.
        marks: (index, mark) of each pair.
    """

    def __init__(self, classes: int):
        self.classes, self.several, self.largest = classes, 0, 0
        self.pixels = np.zeros(256, np.int64)
        self.marks: list[tuple[int, str]] = []

    def add(self, index: int, label: np.ndarray, several: bool, mark: str) -> None:
        """Count one pair."""
        self.pixels += np.bincount(label.ravel(), minlength=256)
        self.several += several
        self.largest = max(self.largest, label.size)
        self.marks.append((index, mark))

    def of_all(self, processes: Processes) -> "Census":
        """The counts of all processes together, on each of them."""
        whole = Census(self.classes)
        for pixels, several, largest, marks in processes.gather(
            [(self.pixels, self.several, self.largest, self.marks)]
        ):
            whole.pixels += pixels
            whole.several += several
            whole.largest = max(whole.largest, largest)
            whole.marks += marks
        return whole

    def fingerprint(self) -> dict[str, object]:
        """The number of pairs, and a digest of them all, which changes if the split changes."""
        marks = "".join(mark for _, mark in sorted(self.marks))
        return {"pictures": len(self.marks), "digest": hashlib.blake2b(marks.encode(), digest_size=16).hexdigest()}

    def remarks(self, split: str, names: Sequence[str], ignore: int | None) -> list[str]:
        """Lines that a user should read before training: classes that no label holds, pages that are left out.

        Raises:
            ValueError: no pixel has a class, or, in "train", all have the same.
        """
        counts, void = self.pixels[: self.classes].copy(), ""
        if ignore is not None:
            counts[ignore : ignore + 1] = 0
            share = self.pixels[ignore] / max(1, self.pixels.sum())
            void = f"; {share:.0%} of the pixels have ignore_index {ignore}, which is no class"
        there = np.flatnonzero(counts)
        if not len(there):
            raise ValueError(f"the labels of {split} hold no class at all{void}")
        if len(there) == 1 and split == "train":
            one = names[there[0]]
            raise ValueError(f"the labels of train hold one class only, {one!r}: there is nothing to learn{void}")
        lines = []
        missing = [repr(name) for index, name in enumerate(names) if not counts[index] and index != ignore]
        if missing:
            what = "cannot be learned" if split == "train" else "has no IoU of its own"
            lines.append(f"no label of {split} holds {', '.join(missing)}: what no label holds {what}{void}")
        if self.several:
            lines.append(f"{self.several} pairs of {split} have files of several pages; of each the first is taken")
        return lines
