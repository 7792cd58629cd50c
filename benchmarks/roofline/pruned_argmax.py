"""Upsample + argmax with most classes left out, checked against full fp32 interpolation in NumPy.

Bilinear weights are convex, so between four corners a class cannot exceed its largest corner nor fall below its
smallest: with L = max over classes of the smallest corner, only classes whose largest corner reaches L can win. One
candidate, or one class winning at all four corners, settles the cell without interpolating.

With 16-bit logits the result is exact, ties included. In fp32 values an ulp apart may tie after rounding: candidates
keep a margin of 8 ulp of the largest corner, and the four-corner shortcut is not taken (exact at factors 4 and above).
"""

from dataclasses import dataclass

import numpy as np

MARGIN = 8 * 2.0**-24  # fp32, relative to the largest corner
LOSS_CUTOFF = 12 * np.log(2)  # a class below 2^-12 of the largest probability adds nothing in bf16


@dataclass(frozen=True)
class Pruning:
    """What pruning did to one map. Shares and counts are per output pixel."""

    pixels: int
    mismatches: int
    same_argmax_share: float
    mean_candidates: float
    max_candidates: int
    mean_loss_classes: float


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 values rounded to the nearest bf16, ties to even, still stored as fp32."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def smooth_logits(classes: int, height: int, width: int, passes: int = 3, seed: int = 0) -> np.ndarray:
    """Synthetic logits, (classes, height, width): noise of standard deviation 4, box-blurred ``passes`` times."""
    x = np.random.default_rng(seed).standard_normal((classes, height, width), dtype=np.float32)
    for _ in range(passes):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
        x = sum(padded[:, dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)) / np.float32(9)
    return (4 * x / x.std()).astype(np.float32)


def adjacent_logits(classes: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Logits that differ by one bf16 step or not at all: the worst case for ties."""
    steps = np.random.default_rng(seed).integers(0, 3, (classes, height, width))
    return (1 + steps * 2.0**-7).astype(np.float32)


def check_pruning(logits: np.ndarray, scale: int, *, exact: bool) -> Pruning:
    """Prune ``logits`` (C, H, W), upsample by ``scale`` (align_corners=False), and compare with the full argmax.

    ``exact`` is the rule for 16-bit values (round them with ``to_bf16`` first); otherwise the margin of fp32 applies.
    """
    (y0, y1, v), (x0, x1, u) = (_lines(size, scale) for size in logits.shape[1:])
    rows = []
    for i in range(len(v)):  # one output row at a time: (C, width) arrays
        corners = [logits[:, y][:, x] for y in (y0[i], y1[i]) for x in (x0, x1)]
        rows.append(_prune_row(corners, v[i], u, exact))
    mismatches, same, candidates, loss_classes = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return Pruning(
        pixels=mismatches.size,
        mismatches=int(mismatches.sum()),
        same_argmax_share=float(same.mean()),
        mean_candidates=float(candidates.mean()),
        max_candidates=int(candidates.max()),
        mean_loss_classes=float(loss_classes.mean()),
    )


def _lines(size: int, scale: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per output line: the two source lines and the fp32 weight of the second."""
    source = np.maximum((np.arange(size * scale, dtype=np.float32) + np.float32(0.5)) / scale - np.float32(0.5), 0)
    first = source.astype(np.int64)
    return first, np.minimum(first + 1, size - 1), (source - first).astype(np.float32)


def _prune_row(corners: list[np.ndarray], v: np.float32, u: np.ndarray, exact: bool) -> tuple[np.ndarray, ...]:
    """Per pixel of one output row: mismatch, same argmax at all corners, candidates, classes that matter to a loss."""
    a, b, c, d = corners
    one = np.float32(1)
    full = (one - v) * ((one - u) * a + u * b) + v * ((one - u) * c + u * d)
    stacked = np.stack(corners)
    highest, threshold = stacked.max(0), stacked.min(0).max(0)
    if not exact:
        threshold = threshold - np.float32(MARGIN) * np.abs(stacked).max((0, 1))
    finite = np.isfinite(stacked).all((0, 1))  # 0 x inf is NaN: such a cell is not pruned
    candidates = (highest >= threshold) | ~finite
    pruned = np.where(candidates, full, -np.inf).argmax(0)
    winners = stacked.argmax(1)
    same = (winners == winners[0]).all(0) & finite
    if exact:
        pruned = np.where(same, winners[0], pruned)
    matter = (full >= full.max(0) - LOSS_CUTOFF).sum(0)
    return pruned != full.argmax(0), same, candidates.sum(0), matter
